# shellcheck shell=sh
# What host.sh asks QEMU and apt, and what it concludes from their answers. Sourced by it.

# The lab's SR-IOV network device. QEMU has it since 8.0; Debian's versions have the epoch 1.
QEMU_SINCE=1:8.0

# QEMU without the device says "Device 'igb' not found", and exits with 0 all the same.
qemu_has_igb() {
    qemu-system-x86_64 -device igb,help 2>&1 | grep -q '^igb options:'
}

# Prints those of these packages that are not installed.
missing_packages() {
    for package in "$@"; do
        dpkg-query -W -f '${Status}\n' "$package" 2>/dev/null | grep -q 'ok installed' || printf ' %s' "$package"
    done
}

# Reads `apt-cache policy PACKAGE`; prints the version that apt would install, nothing if there is none.
candidate_version() {
    sed -n 's/^  Candidate: //p' | grep -vxF '(none)' || true
}

# normal: the host's own sources have a QEMU that is new enough. backports: they do not, so nothing of theirs is tried.
qemu_source() {
    if [ -n "$1" ] && dpkg --compare-versions "$1" ge "$QEMU_SINCE"; then echo normal; else echo backports; fi
}

# What mirror_of and backports_line read: `apt-get indextargets` in this format. Literal, apt replaces the names.
# shellcheck disable=SC2016,SC2034
TARGETS_FORMAT='$(CODENAME)|$(ORIGIN)|$(COMPONENT)|$(REPO_URI)'

# Prints the mirror of Debian's release $1 that the host's apt uses; nothing if it has none.
mirror_of() {
    awk -F'|' -v release="$1" '$1 == release && $2 == "Debian" && $3 == "main" && $4 !~ /^cdrom:/ { print $4; exit }'
}

# Prints a source of the backports of release $1, on that mirror. Prints nothing if apt has it already; fails without a mirror.
backports_line() {
    targets=$(cat)
    case "$targets" in *"$1-backports|"*) return ;; esac
    mirror=$(printf '%s\n' "$targets" | mirror_of "$1")
    [ -n "$mirror" ] || return 1
    options=""
    for keyring in /usr/share/keyrings/debian-archive-keyring.gpg /usr/share/keyrings/debian-archive-keyring.pgp; do
        [ ! -e "$keyring" ] || { options="[signed-by=$keyring] "; break; }
    done
    echo "deb $options$mirror $1-backports main"
}

# Reads what `apt-get --simulate install` prints; prints each removal and each downgrade that it announces, one a line.
losses() {
    while read -r verb package old new _; do
        case "$verb $old" in
            "Remv "*) echo "it would remove $package" ;;
            "Inst ["*)
                old=${old#[} old=${old%]} new=${new#(}
                if dpkg --compare-versions "$new" lt "$old"; then echo "it would downgrade $package from $old to $new"; fi
                ;;
        esac
    done
}
