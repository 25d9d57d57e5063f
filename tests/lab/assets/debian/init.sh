#!/bin/sh
# First process of a dom0 that is a real Debian: what its initramfs would do, and the lab's own files, which are not part of it.
export PATH=/bin:/sbin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
for m in virtio_pci virtio_console virtio_blk crc32c_generic ext4; do modprobe "$m"; done
mkdir -p /root
mount -t ext4 /dev/vda /root || { echo "lab: the root file system cannot be mounted"; poweroff -f; }
# systemd keeps a /run that is there; /lab and /guest of the root lead to it.
mount -t tmpfs -o mode=755 tmpfs /run
mv /payload /run/lab
for place in dev proc sys run; do mount --move /$place /root/$place; done
exec switch_root /root /sbin/init
