#!/bin/sh
# tests/fuzz/run.sh SECONDS [TARGET]...: builds the fuzz targets, replays what was once found, then looks for more for SECONDS
# each. Stable Rust is enough: libFuzzer comes with a crate, the counters are an option of LLVM that cargo-fuzz sets the same way.
set -eu

cd "$(dirname "$0")"
seconds=$1
shift
# shellcheck disable=SC2046
[ $# -gt 0 ] || set -- $(basename -s .rs targets/*.rs)
host=$(rustc -vV | sed -n 's/^host: //p')
target_folder=$(cd ../.. && pwd)/target
work=$target_folder/fuzz

# With --target these flags do not reach build scripts, which could not be linked with them; those are shared with the other
# release builds.
RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
-Cllvm-args=-sanitizer-coverage-trace-compares" \
    ${CARGO:-cargo} build --locked --release --target "$host" --target-dir "$target_folder"

seeds=$work/seeds
./seeds.sh "$seeds"
# Where targets put the files that they have read.
XPCI_FUZZ_FILES=$work/files
export XPCI_FUZZ_FILES

for target; do
    case $target in
        capability_walk) longest=4097 ;;
        ring_request | ioreq) longest=1025 ;;
        image | netlink | xenstore) longest=2048 ;;
        *) longest=16384 ;;
    esac
    program=$target_folder/$host/release/$target
    found=regressions/$target
    rm -rf "$XPCI_FUZZ_FILES"
    mkdir -p "$found" "$work/corpus/$target" "$XPCI_FUZZ_FILES"
    words=
    [ ! -e "$seeds/$target.words" ] || words=-dict=$seeds/$target.words
    echo "fuzz: $target: replaying $(find "$found" -type f | wc -l) findings, then $seconds s"
    find "$found" -type f -exec "$program" -timeout=10 {} + >"$work/$target.log" 2>&1 || {
        tail -n 30 "$work/$target.log" >&2
        echo "fuzz: $target: an old finding is back, see above" >&2
        exit 1
    }
    "$program" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 -max_len=$longest -use_value_profile=1 \
        -print_final_stats=1 ${words:+"$words"} -artifact_prefix="$found/" "$work/corpus/$target" "$seeds/$target" \
        >"$work/$target.log" 2>&1 || {
        grep -vE '^#[0-9]+' "$work/$target.log" | tail -n 40 >&2
        echo "fuzz: $target: found something; the input is in tests/fuzz/$found, the log is $work/$target.log" >&2
        exit 1
    }
    sed -n 's/^stat::number_of_executed_units: */fuzz: inputs tried: /p' "$work/$target.log"
done
