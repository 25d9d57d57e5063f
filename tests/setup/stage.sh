#!/bin/sh
# stage.sh NAME COMMAND...: runs a stage of 'make test', says what it is and how many seconds it took. stage.sh --begin forgets earlier
# stages; stage.sh --summary lists all since then.
set -eu

times=$(cd "$(dirname "$0")/../.." && pwd)/target/stages
case $1 in
    --begin)
        mkdir -p "$(dirname "$times")"
        : >"$times"
        exit
        ;;
    --summary)
        echo "== all stages passed, seconds:"
        awk '{ print; total += $1 } END { printf "%6d  in all\n", total }' "$times"
        exit
        ;;
esac
name=$1
shift
echo "== $name"
begun=$(date +%s)
status=0
"$@" || status=$?
took=$(($(date +%s) - begun))
echo "== $name: $took s"
[ ! -e "$times" ] || printf '%6d  %s\n' "$took" "$name" >>"$times"
exit "$status"
