#!/bin/sh
# Tells the harness how dom0 has started: all jobs of the boot are done, and Xen's services run.
state=$(systemctl is-system-running --wait)
echo "lab: systemd says $state at $(cut -d' ' -f1 /proc/uptime) s" >/dev/hvc0
if xenstore-read /local/domain/0/name >/dev/null; then echo ok >/run/lab-ready; else echo failed >/run/lab-ready; fi
