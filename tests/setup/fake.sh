#!/bin/sh
# Stands for each program that set-up asks or has do something, under that program's name. It plays recorded answers from the
# folder $FAKE, and writes down how it was called.
name=$(basename "$0")
printf '%s\n' "$name $*" >> "$FAKE/calls"

play() { cat "$FAKE/$1" 2>/dev/null; }

case "$name $*" in
    "id -u") play uid ;;
    "sudo "*)
        [ -e "$FAKE/sudo" ] || { echo "sudo: a password is required" >&2; exit 1; }
        shift
        "$@"
        ;;
    "qemu-system-x86_64 "*)
        [ -e "$FAKE/qemu" ] || exit 127
        # 7.2's complaint goes to standard error, and its status is 0.
        if grep -q 'not found' "$FAKE/qemu"; then play qemu >&2; else play qemu; fi
        ;;
    "dpkg-query "*)
        for package; do :; done
        grep -qxF "$package" "$FAKE/missing" && exit 1
        echo "install ok installed"
        ;;
    "apt-cache "*policy*) play policy ;;
    "apt-config "*) echo "host_sources='/etc/apt/sources.list'" ;;
    "apt-get "*indextargets*) play targets ;;
    "apt-get "*--simulate*" -t "*) play plan-backports ;;
    "apt-get "*--simulate*qemu*) play plan-normal ;;
    "apt-get "*install*" -t "*) cp "$FAKE/qemu-backports" "$FAKE/qemu" ;;
    "apt-get "*install*qemu*) cp "$FAKE/qemu-normal" "$FAKE/qemu" ;;
esac
