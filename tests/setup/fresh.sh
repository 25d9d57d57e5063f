#!/bin/sh
# tests/setup/fresh.sh: shows on a bare Debian 12 and a bare Debian 13, as root and as a user with sudo, that host.sh installs all
# that xpci needs, costs the machine nothing and does nothing the second time. Needs root or sudo, and debootstrap.
#
# Everything is in ${XDG_CACHE_HOME:-~/.cache}/xpci-fresh; downloads stay there for the next time. What is mounted is mounted in a
# namespace of this run's own, and so is gone when it ends, however that happens.
set -eu
export LC_ALL=C

say() { echo "fresh: $*"; }

fail() {
    say "$*" >&2
    exit 1
}

if [ "${1:-}" != inside ]; then
    workspace=$(cd "$(dirname "$0")/../.." && pwd)
    folder=${XDG_CACHE_HOME:-$HOME/.cache}/xpci-fresh
    rust=$(cd "$workspace" && rustc --print sysroot)
    crates=${CARGO_HOME:-$HOME/.cargo}
    # The machines have the crates, and Rust, from here.
    (cd "$workspace" && ${CARGO:-cargo} fetch --quiet --locked)
    mkdir -p "$folder"
    set -- unshare --mount --propagation private --pid --fork --kill-child --mount-proc \
        "$workspace/tests/setup/fresh.sh" inside "$workspace" "$folder" "$rust" "$crates"
    if [ "$(id -u)" = 0 ]; then exec "$@"; else exec sudo -n "$@"; fi
fi
workspace=$2 folder=$3 rust=$4 crates=$5

# shellcheck source=tests/setup/apt.sh
. "$workspace/tests/setup/apt.sh"

release=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
mirror=$(apt-get indextargets --format "$TARGETS_FORMAT" 'Created-By: Packages' | mirror_of "$release")
[ -n "$mirror" ] || fail "apt has no source of Debian's $release; run 'apt-get update'"

name=preparation
trap '[ $? = 0 ] || say "$name: FAILED" >&2' EXIT

# A bare Debian; make is what the README starts from, sudo is what one of the users needs.
bare() {
    name="$1, bare"
    say "$1: making a bare Debian"
    root=$folder/$1-bare
    mkdir -p "$folder/debs" "$folder/archives-$1"
    debootstrap --variant=minbase --include=make,sudo --cache-dir="$folder/debs" "$1" "$root" "$mirror" \
        > "$folder/debootstrap.log" 2>&1 || { tail -20 "$folder/debootstrap.log" >&2; fail "debootstrap failed"; }
    cp /etc/hosts /etc/resolv.conf "$root/etc/"
    # How the host's apt reaches its mirror.
    apt-config dump | grep -E '^Acquire::(http|https|Check)' > "$root/etc/apt/apt.conf.d/90host" || true
    chroot "$root" useradd --create-home user
    echo 'user ALL=(ALL) NOPASSWD: ALL' > "$root/etc/sudoers.d/user"
}

# Runs a command in the machine, as its user; with the network off if $offline says so.
offline=""
in_machine() {
    case "$user" in
        root) home=/root path=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin ;;
        *) home=/home/user path=/usr/local/bin:/usr/bin:/bin ;;
    esac
    # shellcheck disable=SC2016
    ${offline:+unshare --net} chroot --userspec="$user:$user" "$root" /usr/bin/env -i HOME="$home" PATH="/opt/rust/bin:$path" \
        CARGO_TARGET_DIR=/tmp/target /bin/sh -c 'cd /src && exec "$@"' sh "$@" </dev/null
}

# What apt has of sources, settings and lists.
apt_files() { (cd "$root" && find etc/apt var/lib/apt/lists -type f -exec cksum {} + | sort); }

packages() { chroot "$root" dpkg-query -W "$@" | sort; }

mount_read_only() {
    mkdir -p "$2"
    mount -o bind,ro "$1" "$2"
}

# machine RELEASE USER [newer]: a copy of the bare Debian, all checks.
machine() {
    user=$2
    name="$1, $([ "$user" = root ] && echo "as root without sudo" || echo "as a user with sudo")"
    [ -z "${3:-}" ] || name="$name, with the qemu-utils of backports"
    root=$folder/$1-machine
    rm -rf --one-file-system "$root"
    cp -a "$folder/$1-bare" "$root"
    mount -t proc proc "$root/proc"
    # Only the packages come from a cache, as from a mirror nearby.
    mount --bind "$folder/archives-$1" "$root/var/cache/apt/archives"
    mount_read_only "$workspace" "$root/src"
    mount_read_only "$rust" "$root/opt/rust"
    for home in "$root/root" "$root/home/user"; do
        mount_read_only "$crates/registry" "$home/.cargo/registry"
        [ ! -e "$crates/config.toml" ] || cp "$crates/config.toml" "$home/.cargo/"
    done
    chroot "$root" chown user /home/user/.cargo
    [ "$user" != root ] || chroot "$root" env SUDO_FORCE_REMOVE=yes dpkg --purge sudo >/dev/null 2>&1
    if [ -n "${3:-}" ]; then
        echo "deb $mirror $1-backports main" > "$root/etc/apt/sources.list.d/backports.list"
        chroot "$root" sh -c "apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -t $1-backports \
            --no-install-recommends -o Dpkg::Use-Pty=0 qemu-utils && rm /etc/apt/sources.list.d/backports.list" >/dev/null
    fi

    say "$name: running set-up"
    apt_before=$(apt_files)
    packages > "$folder/packages-before"
    in_machine make --silent deps
    [ "$(apt_files)" = "$apt_before" ] || fail "$name: apt's sources or lists are not as they were"
    say "$name: ok: apt's sources and lists are as they were"
    packages > "$folder/packages-after"
    lost=$(comm -23 "$folder/packages-before" "$folder/packages-after")
    [ -z "$lost" ] || fail "$name: removed or at another version: $lost"
    say "$name: ok: no package was removed or downgraded, $(comm -13 "$folder/packages-before" "$folder/packages-after" | wc -l) came"

    says=$(in_machine qemu-system-x86_64 -device igb,help 2>&1 | head -1)
    [ "$says" = "igb options:" ] || fail "$name: asked for the device igb, QEMU says $says"
    say "$name: ok: QEMU $(packages qemu-system-x86 | cut -f2) has the device igb"

    dpkg_before=$(cksum < "$root/var/lib/dpkg/status")
    again=$(offline=yes && in_machine make --silent deps 2>&1) || fail "$name: set-up failed the second time: $again"
    [ -z "$again" ] || fail "$name: the second time set-up says: $again"
    [ "$(cksum < "$root/var/lib/dpkg/status")$(apt_files)" = "$dpkg_before$apt_before" ] \
        || fail "$name: set-up did something the second time"
    say "$name: ok: the second time set-up did nothing, without a network"

    in_machine cargo check --quiet --locked --offline --workspace || fail "$name: cargo check failed"
    say "$name: ok: cargo check --locked --workspace"

    umount -R "$root/proc" "$root/var/cache/apt/archives" "$root/src" "$root/opt/rust" \
        "$root/root/.cargo/registry" "$root/home/user/.cargo/registry"
    rm -rf --one-file-system "$root"
}

for release in bookworm trixie; do
    rm -rf --one-file-system "$folder/$release-bare" "$folder/$release-machine"
    bare "$release"
    machine "$release" root
    machine "$release" user
    # What Debian 12's own QEMU cannot be installed beside.
    [ "$release" = trixie ] || machine "$release" root newer
    rm -rf --one-file-system "$folder/$release-bare"
done
say "all machines passed"
