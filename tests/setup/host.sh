#!/bin/sh
# tests/setup/host.sh [PACKAGE]...: installs what building and testing xpci needs on a fresh Debian 12 or 13, and these packages.
# Asks nothing; does nothing, and needs no network, when all is there. Removes and downgrades nothing, and leaves apt's sources
# and package lists as they are.
# Lists of packages and of options are split at blanks throughout.
# shellcheck disable=SC2086,SC2100
set -eu
export LC_ALL=C

# shellcheck source=tests/setup/apt.sh
. "$(dirname "$0")/apt.sh"

needed="gcc g++ libc6-dev make pkg-config libclang-dev libudev-dev libxen-dev kmod pciutils xz-utils mmdebstrap e2fsprogs dpkg-dev ca-certificates ansible-core strace"

say() { echo "setup: $*"; }

fail() {
    say "$*" >&2
    exit 1
}

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi
}

missing=$(missing_packages $needed "$@")
qemu=qemu-system-x86
! qemu_has_igb || qemu=""
[ -n "$missing$qemu" ] || exit 0

wanted="$missing${qemu:+ $qemu (with the device igb)}"
command -v apt-get >/dev/null || fail "not installed:$wanted; there is no apt-get here, and set-up knows only Debian 12 and 13"
as_root true 2>/dev/null || fail "not installed:$wanted; run this as root, or as a user whose sudo asks for no password"

# Package lists of our own: the host's may be old or absent, and stay as they are.
scratch=$(as_root mktemp -d /tmp/xpci-setup-XXXXXX)
trap 'as_root rm -rf "$scratch"' EXIT
trap 'exit 1' HUP INT TERM
as_root mkdir -p "$scratch/lists/partial"
# apt downloads as a user of its own.
as_root chmod -R a+rX "$scratch"
own="-o Dir::State::Lists=$scratch/lists -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache="

# sudo forgets the environment.
apt_as_root() {
    as_root env LC_ALL=C DEBIAN_FRONTEND=noninteractive APT_LISTCHANGES_FRONTEND=none \
        ${http_proxy:+"http_proxy=$http_proxy"} ${https_proxy:+"https_proxy=$https_proxy"} apt-get $own "$@" </dev/null
}

update() {
    # Somebody else's broken source is no obstacle as long as Debian's own can be read.
    apt_as_root update -qq || say "apt could not read all of its sources; going on with those that it could read" >&2
}

# Prints why these packages cannot be installed, or what that would cost the host; nothing if all is well.
objections() {
    if plan=$(apt-get $own install --simulate -y -q --no-install-recommends --allow-downgrades "$@" 2>&1); then
        printf '%s\n' "$plan" | losses
    else
        printf '%s\n' "$plan"
    fi
}

refuse() {
    fail "nothing was installed, because of what apt answers to installing$1:
$2
Set-up removes and downgrades nothing: resolve this with apt, then run it again."
}

install_packages() {
    say "installing $*"
    said=$(apt_as_root install -y -qq --no-install-recommends --no-remove -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 \
        -o Dpkg::Options::=--force-confdef -o Dpkg::Options::=--force-confold "$@" 2>&1) || fail "apt cannot install $*:
$said"
}

# Has apt read the backports of this release besides its own sources, from the mirror that it uses already.
add_backports() {
    line=$(apt-get $own indextargets --format "$TARGETS_FORMAT" 'Created-By: Packages' | backports_line "$1") \
        || fail "nothing was installed: apt has no source of Debian's $1, on whose mirror its backports would be"
    [ -n "$line" ] || return 0
    eval "$(apt-config shell host_sources Dir::Etc::SourceList/f)"
    { cat "${host_sources:-/etc/apt/sources.list}" 2>/dev/null || true; echo; echo "$line"; } \
        | as_root tee "$scratch/sources.list" >/dev/null
    own="$own -o Dir::Etc::SourceList=$scratch/sources.list"
    update
}

update
if [ -n "$missing" ]; then
    against=$(objections $missing)
    [ -z "$against" ] || refuse "$missing" "$against"
fi
if [ -n "$qemu" ]; then
    candidate=$(apt-cache $own policy $qemu | candidate_version)
    source=$(qemu_source "$candidate")
    against=""
    [ "$source" = backports ] || against=$(objections $qemu)
    if [ "$source" = backports ] || [ -n "$against" ]; then
        # shellcheck disable=SC1090
        release=$(. "${XPCI_OS_RELEASE:-/etc/os-release}" && echo "${VERSION_CODENAME:-}")
        say "taking QEMU from $release-backports; that of $release is ${candidate:-absent}"
        add_backports "$release"
        qemu="-t $release-backports $qemu"
        against=$(objections $qemu)
    fi
    [ -z "$against" ] || refuse " qemu-system-x86" "$against"
fi
[ -z "$missing" ] || install_packages $missing
[ -z "$qemu" ] || install_packages $qemu

qemu_has_igb || fail "$(command -v qemu-system-x86_64 || echo qemu-system-x86_64) has no device igb, which QEMU has since 8.0, \
and apt has no newer one; the lab cannot run"
