#!/bin/sh
# Installs what building and testing xpci needs on a fresh Debian 12 or 13; asks nothing, and does nothing when all is there.
set -eu

packages="gcc g++ libc6-dev make pkg-config libclang-dev libudev-dev libxen-dev kmod pciutils xz-utils ca-certificates"

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi
}

installed() {
    dpkg-query -W -f '${Status}\n' "$1" 2>/dev/null | grep -q 'ok installed'
}

# The lab's SR-IOV network device came with QEMU 8.0.
qemu_has_igb() {
    qemu-system-x86_64 -device igb,help >/dev/null 2>&1
}

missing=""
for package in $packages; do installed "$package" || missing="$missing $package"; done
[ -z "$missing" ] && qemu_has_igb && exit 0

export DEBIAN_FRONTEND=noninteractive
install="apt-get install -y -qq --no-install-recommends -o Dpkg::Use-Pty=0"
as_root apt-get update -qq
if [ -n "$missing" ]; then
    echo "setup: installing$missing"
    # shellcheck disable=SC2086
    as_root env DEBIAN_FRONTEND=noninteractive $install $missing
fi
qemu_has_igb && exit 0

echo "setup: installing QEMU"
as_root env DEBIAN_FRONTEND=noninteractive $install qemu-system-x86 || true
qemu_has_igb && exit 0

# Debian 12's own QEMU is too old: its backports come from the mirror that apt uses already, in a source of our own that
# only this call sees.
. /etc/os-release
mirror=$(apt-get indextargets --format '$(REPO_URI) $(RELEASE)' 'Created-By: Packages' \
    | awk -v suite="$VERSION_CODENAME" '$2 == suite { print $1; exit }')
[ -n "$mirror" ] || { echo "setup: apt has no source for $VERSION_CODENAME, so its backports cannot be found" >&2; exit 1; }
sources=$(mktemp -d)
trap 'rm -rf "$sources"' EXIT
chmod 755 "$sources"
echo "deb $mirror $VERSION_CODENAME-backports main" > "$sources/backports.list"
cp -r /etc/apt/sources.list /etc/apt/sources.list.d/. "$sources/" 2>/dev/null || true
as_root apt-get update -qq -o Dir::Etc::SourceList=/dev/null -o "Dir::Etc::SourceParts=$sources"
as_root env DEBIAN_FRONTEND=noninteractive $install -t "$VERSION_CODENAME-backports" \
    -o Dir::Etc::SourceList=/dev/null -o "Dir::Etc::SourceParts=$sources" qemu-system-x86
# The host's lists are left as they were.
as_root apt-get update -qq
qemu_has_igb || { echo "setup: no QEMU with the device igb (8.0 or newer) can be had here; the lab cannot run" >&2; exit 1; }
