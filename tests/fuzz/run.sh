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

# The dumps as bytes, each behind a byte that chooses the default policy.
seeds=$work/seeds
rm -rf "$seeds"
for target in capability_walk dump_parser policy_parser ring_request rom "$@"; do mkdir -p "$seeds/$target"; done
for dump in ../../pciback/tests/dumps/*.txt; do
    cp "$dump" "$seeds/dump_parser/"
    perl -ne 'BEGIN { print "\0" } if (s/^[0-9a-f]{2,3}: //) { s/\s//g; print pack("H*", $_) }' "$dump" \
        > "$seeds/capability_walk/$(basename "$dump" .txt)"
done

cp ../../configs/policies/*.yaml "$seeds/policy_parser/"

# Requests on each of the devices: ones and zeros all over its config space, interrupts on and off.
perl -e 'for my $device (0 .. 12) {
    open my $file, ">", "$ARGV[0]/$device" or die;
    my $request = sub { print $file pack("CCvVVCCCC", @_) };
    print $file chr $device;
    for my $at (0 .. 11) {
        $request->(1, 4, 4 * $at, 0xffffffff, 0, 0, 0, 0, 0);
        $request->(0, 4, 4 * $at, 0, 0, 0, 0, 0, 0);
    }
    for my $command (2, 3, 4, 5, 6) { $request->($command, 0, 0, 5, 0, 1, 0, 0, 0) for 0 .. 1 }
    $request->(1, 2, 0x40 + 2 * $_, 0x8003, 0, 0, 0, 0, 0) for 0 .. 20;
}' "$seeds/ring_request"

# A ROM of two images, of one unit each.
perl -e 'for my $last (0, 0x80) {
    print pack("a24 v x2 a4 x12 v x3 C x2", "\x55\xaa", 0x1c, "PCIR", 1, $last), "\0" x 460;
}' > "$seeds/rom/two"

for target; do
    case $target in
        capability_walk) longest=4097 ;;
        ring_request) longest=1025 ;;
        *) longest=16384 ;;
    esac
    program=$target_folder/$host/release/$target
    found=regressions/$target
    mkdir -p "$found" "$work/corpus/$target"
    echo "fuzz: $target: replaying $(find "$found" -type f | wc -l) findings, then $seconds s"
    find "$found" -type f -exec "$program" -timeout=10 {} + >"$work/$target.log" 2>&1 || {
        tail -n 30 "$work/$target.log" >&2
        echo "fuzz: $target: an old finding is back, see above" >&2
        exit 1
    }
    "$program" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 -max_len=$longest -use_value_profile=1 \
        -print_final_stats=1 -artifact_prefix="$found/" "$work/corpus/$target" "$seeds/$target" \
        >"$work/$target.log" 2>&1 || {
        grep -vE '^#[0-9]+' "$work/$target.log" | tail -n 40 >&2
        echo "fuzz: $target: found something; the input is in tests/fuzz/$found, the log is $work/$target.log" >&2
        exit 1
    }
    sed -n 's/^stat::number_of_executed_units: */fuzz: inputs tried: /p' "$work/$target.log"
done
