#!/bin/sh
# finish.sh ROOT: mmdebstrap runs it when all packages are configured. Puts the files below $XPCI_FILES into the root file system, switches off
# what costs a dom0 under emulation time and shows nothing, and makes the image $XPCI_IMAGE of it, with the empty folder $XPCI_EMPTY.
set -eu
root=$1

cp -R "$XPCI_FILES/." "$root/"
ln -s run/lab "$root/lab"
ln -s run/lab/guest "$root/guest"
echo lab > "$root/etc/hostname"
printf '127.0.0.1 localhost\n127.0.1.1 lab\n' > "$root/etc/hosts"
tr -d - < /proc/sys/kernel/random/uuid > "$root/etc/machine-id"
mkdir -p "$root/etc/systemd/journald.conf.d"
printf '[Journal]\nStorage=volatile\nRateLimitIntervalSec=0\n' > "$root/etc/systemd/journald.conf.d/lab.conf"
units="$root/etc/systemd/system"
for unit in getty.target systemd-logind.service systemd-random-seed.service systemd-update-utmp.service \
    systemd-update-utmp-runlevel.service systemd-journal-flush.service systemd-binfmt.service proc-sys-fs-binfmt_misc.automount \
    dpkg-db-backup.timer fstrim.timer e2scrub_all.timer e2scrub_reap.service apt-daily.timer apt-daily-upgrade.timer \
    dev-hugepages.mount sys-fs-fuse-connections.mount; do
    ln -sf /dev/null "$units/$unit"
done
mkdir -p "$units/multi-user.target.wants" "$units/sysinit.target.wants"
ln -s ../lab-agent.service "$units/sysinit.target.wants/lab-agent.service"
ln -s ../lab-ready.service "$units/multi-user.target.wants/lab-ready.service"
rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/*

# What is mounted below the root stays out of a bind mount of it.
# shellcheck disable=SC2016
unshare --mount --propagation private sh -euc '
    mount --bind "$1" "$2"
    mke2fs -q -t ext4 -O ^has_journal -E lazy_itable_init=0 -m 0 -d "$2" "$3" 1G
' sh "$root" "$XPCI_EMPTY" "$XPCI_IMAGE"
