#!/bin/sh
# packaging/deb.sh BINARIES OUTPUT: makes the Debian package of the programs in the folder BINARIES, in the folder OUTPUT.
# It fits the Debian release that the programs were built on, and newer ones.
set -eu
umask 022

fail() {
    echo "deb: $*" >&2
    exit 1
}

[ $# = 2 ] || fail "usage: packaging/deb.sh BINARIES OUTPUT"
output=$2
workspace=$(cd "$(dirname "$0")/.." && pwd)
version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$workspace/Cargo.toml")
[ -n "$version" ] || fail "Cargo.toml names no version"
architecture=$(dpkg --print-architecture)

mkdir -p "$output"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
root=$work/debian/xpci
make --silent -C "$workspace" install BINARIES="$(realpath "$1")" DESTDIR="$root" PREFIX=/usr
strip --strip-unneeded "$root/usr/sbin/xpcid" "$root/usr/sbin/xpci"
# Where Debian has them.
mv "$root/usr/share/zsh/site-functions" "$root/usr/share/zsh/vendor-completions"
find "$root/usr/share/man" -type f -exec gzip -9n {} +
documents=$root/usr/share/doc/xpci
install -D -m 644 "$workspace/packaging/copyright" "$documents/copyright"
install -D -m 644 "$workspace/LICENSE-MIT" "$documents/LICENSE-MIT"
install -D -m 644 "$workspace/CHANGELOG.md" "$documents/CHANGELOG.md"
install -D -m 644 -t "$documents/schema" "$workspace"/docs/schema/*.json

# dpkg-shlibdeps finds the libraries that are linked; it insists on a debian/control.
mkdir -p "$work/debian"
printf 'Source: xpci\n\nPackage: xpci\nArchitecture: any\n' > "$work/debian/control"
linked=$(cd "$work" && dpkg-shlibdeps -O debian/xpci/usr/sbin/xpcid debian/xpci/usr/sbin/xpci | sed -n 's/^shlibs:Depends=//p')
[ -n "$linked" ] || fail "dpkg-shlibdeps names no libraries"
# Those of Xen are loaded when the service starts; libxenmisc has libxenctrl, whose version is that of the running Xen.
xen="libxencall1, libxengnttab1, libxenevtchn1, libxendevicemodel1, libxenforeignmemory1, libxenstore4"
versions="libxenmisc4.17 | libxenmisc4.18 | libxenmisc4.19 | libxenmisc4.20"

size=$(du -k -s "$root" | cut -f1)
mkdir "$root/DEBIAN"
cat > "$root/DEBIAN/control" <<END
Package: xpci
Version: $version
Architecture: $architecture
Maintainer: xpci authors <xpci@localhost>
Installed-Size: $size
Depends: $linked, $xen, $versions
Recommends: xen-utils-common
Section: admin
Priority: optional
Homepage: $(sed -n 's/^repository = "\(.*\)"/\1/p' "$workspace/Cargo.toml")
Description: PCI backend for the guests of a Xen host
 The service xpcid gives PCI functions of the host to PV and HVM guests, with
 a virtual configuration space, MSI and MSI-X. The command xpci controls it.
END
echo /etc/xpci/xpcid.yaml > "$root/DEBIAN/conffiles"
for script in postinst prerm postrm; do
    install -m 755 "$workspace/packaging/$script" "$root/DEBIAN/$script"
done
(cd "$root" && find usr etc -type f -exec md5sum {} + > DEBIAN/md5sums)
dpkg-deb --root-owner-group --build "$root" "$output/xpci_${version}_$architecture.deb" >/dev/null
echo "deb: $output/xpci_${version}_$architecture.deb"
