#!/bin/bash
# First process of the lab's dom0: what an init system and Xen's own services would do, then the agent.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm /run /tmp
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /dev/shm
mount -t tracefs tracefs /sys/kernel/tracing 2>/dev/null
ln -sfn /run /var/run
mkdir -p /run/xen /run/lock /run/xenstored /run/xen-hotplug /var/lock /var/lib/xen /var/lib/xenstored /var/log/xen/console
hostname lab
ip link set lo up
for m in virtio_pci virtio_console xen-evtchn xen-privcmd xen-gntdev xen-gntalloc xenfs; do modprobe "$m"; done
mount -t xenfs xenfs /proc/xen
# The agent first: if a service fails, the harness can still look.
/lab/lab-agent dom0 &
agent=$!
# xenstored goes into the background when it is ready to serve.
xenstored --pid-file /run/xenstored.pid && xen-init-dom0 \
  && xenconsoled --log=guest --log-dir=/var/log/xen/console --pid-file=/run/xenconsoled.pid \
  && echo ok >/run/lab-ready || echo failed >/run/lab-ready
echo "lab: dom0 services $(cat /run/lab-ready) at $(cut -d' ' -f1 /proc/uptime) s"
# Waiting here also reaps what daemons leave behind.
wait $agent
echo "lab: the agent ended, status $?"
poweroff -f
