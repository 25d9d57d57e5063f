#!/bin/sh
# tests/fuzz/seeds.sh FOLDER: makes inputs from which the fuzz targets begin, a folder for each target, and words for those that read text.
set -eu

cd "$(dirname "$0")"
seeds=$1
rm -rf "$seeds"
for target in targets/*.rs; do mkdir -p "$seeds/$(basename "$target" .rs)"; done

# The dumps as bytes, each behind a byte that chooses the default policy.
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

# A driver of each function of an HVM guest: it places BARs, writes its MSI-X table, enables its interrupts, reads; then the service is
# killed, or the function is reset, all vectors are unmasked, or MSI is enabled.
perl -e 'for my $seed (0 .. 15) {
    open my $file, ">", "$ARGV[0]/$seed" or die;
    my ($index, $end) = ($seed & 3, $seed >> 2);
    my $step = sub { print $file pack("CCCCvCCV", @_) };
    my ($table, @others) = ([3, 0], [0], [5], [0, 3, 5])[$index]->@*;
    $step->(0x89, 2, $_ << 4 | $index, 0, $_, 0x30, 0, 0) for @others;
    $step->(0x89, 2, 0x30 | $index, 0, $table, 0x30, 0, 0);
    $step->(0x8b, 1, $index, 0, 0, 0, 0, 0x8000);
    for my $entry (0 .. 2) {
        $step->(0x8e, 2, $index, 0, $entry, 4 * $_, 0, (0xfee00000, 0, 0x4041, 0)[$_]) for 0 .. 3;
    }
    $step->($_, 2, $index, 0, 0x10, 0, 0, 0) for 0, 3, 4, 5, 6, 7, 8;
    $step->(8, 3, 0x30 | $index, 0, 8, 16, 1, 0x1000);
    $step->(0x80, 2, $index, 0, 0xa8, 0, 0, 0x8000) if $end == 1;
    $step->(0x8d, 2, $index, 0, 12, 0, 0, 0) if $end == 2;
    $step->(0x8f, 2, $index, 0, 4 * $_, 0, 0, (0, 0xfee00000, 0, 0x41)[$_]) for $end == 3 ? (1 .. 3) : ();
    $step->(0x8f, 1, $index, 0, 2, 0, 0, 1) if $end == 3;
    $step->(0, 2, $index, 0x7e, 0, 0, 0, 0) if $end == 0;
    $step->(0x8a, 1, $index, 0, 0, 0, 0, 0);
}' "$seeds/ioreq"

# A file that is whole, one with a word that is another, and a guest that goes on; of PV guests, HVM guests, mailboxes.
perl -e 'for my $choice (0, 1, 3) {
    for my $damage ("", map { pack("vV", 0x8000 | $_->[0], $_->[1]) } [8, 1], [9, 7], [16, 0xf3000000], [32, 9]) {
        open my $file, ">", "$ARGV[0]/$choice-" . unpack("H*", $damage) or die;
        print $file chr($choice), chr(length($damage) / 6), $damage;
        print $file pack("CCvV", 1, 4, 4 * $_, 0xffffffff), pack("CCvV", 3, 0x83, 4 * $_, 0) for 0 .. 9;
    }
}' "$seeds/image"

# A function comes, the guest connects, another one comes and the first one goes; with and without a restart of the service.
perl -e 'for my $restart (0, 1) {
    open my $file, ">", "$ARGV[0]/$restart" or die;
    my $say = sub { print $file pack("C*", @_) };
    my $state = sub { $say->(0, 6 * ($_[0] - 1), 6, 1, 11, 1) };
    $say->(13, 0, 11, 1, 3, 0, 6, 1, 11, 1);
    $state->(4);
    $say->(19, 0, 11, 1) if $restart;
    $say->(13, 1, 14, 0, 11, 1);
    $state->($_) for 7, 4;
    $say->(14, 1, 11, 1);
    $state->($_) for 5, 6;
    $say->(17, 0, 16, 0, 11, 1);
    for my $other (0 .. 11) { print $file pack("CC", 19, 0xe0 | $other << 1 | 1), (qw(web 6 7 pv running 0))[$other % 6] x 1, "\0" x 11 }
}' "$seeds/xenstore"

# What QEMU says to each thing that it is asked, whole and in pieces.
perl -e 'my $begin = qq({"QMP":{"version":{"qemu":{"major":10}},"capabilities":["oob"]}}\r\n{"return":{}}\r\n{"event":"RTC_CHANGE","data":{"offset":0}}\r\n);
my $devices = qq({"return":[{"bus":0,"devices":[{"slot":0,"function":0,"qdev_id":""},{"slot":1,"function":0,"qdev_id":"xpci-1"}]},
    {"bus":1,"devices":[]}]}\r\n) =~ s/\n +//r;
my $done = qq({"return":{}}\r\n);
my $refused = qq({"error":{"class":"DeviceNotFound","desc":"Device xpci-1 not found"}}\r\n);
my $printed = qq({"return":"portl[0x0cfc] = 0x12378086\\r\\n"}\r\n);
my @said = ($devices, $devices x 2 . $done . $devices x 2 . $done x 2, $refused, $devices . $done . $devices, $done . $printed . $done, $done x 3);
for my $what (0 .. 5) { for my $piece (0, 6, 255) {
    open my $file, ">", "$ARGV[0]/$what-$piece" or die;
    print $file chr(6 * 1 + $what), chr $piece, $begin, $said[$what];
} }' "$seeds/qmp"

# The requests that the documentation shows.
perl -ne 'if (/^\| `([a-z-]+)` \|.*\| (`(\{.*\})` )?\|$/) {
    open my $file, ">", "'"$seeds"'/control_line/$1" or die;
    print $file qq({"version":1,"id":7,"command":"$1"), ($3 ? qq(,"arguments":$3) : ""), "}\n";
}' ../../docs/protocol.md

# What the kernel answers about a VF, in three depths.
perl -e 'sub attribute { my ($kind, $value) = @_; my $all = pack("S2", 4 + length $value, $kind) . $value; $all . "\0" x (-length($all) % 4) }
my $vf = join "", attribute(1, pack("L C6 x26", 1, 0x52, 0x54, 0, 1, 2, 3)), attribute(2, pack("L3", 1, 100, 3)),
    attribute(3, pack("L2", 1, 500)), attribute(4, pack("L2", 1, 1)), attribute(5, pack("L2", 1, 2)), attribute(6, pack("L3", 1, 0, 500)),
    attribute(7, pack("L2", 1, 0xffffffff)), attribute(9, pack("L2", 1, 0)),
    attribute(12, attribute(1, pack("L3 S2", 1, 100, 3, 0x8100, 0))), attribute(13, "\xff" x 32);
my $link = attribute(3, "eth0\0") . attribute(22, attribute(1, $vf));
my $message = pack("L S2 L2 x16", 32 + length $link, 16, 0, 1, 1) . $link;
my $error = pack("L S2 L2 l x16", 36, 2, 0, 1, 1, -95);
my @all = ($message, $link, $vf, $error);
for (0 .. 3) { open my $file, ">", "$ARGV[0]/$_" or die; print $file chr($_ % 3), $all[$_] }' "$seeds/netlink"

# Files of version 0.1, and one of each kind that the service writes by now.
old=../../toolstack/tests/transactions/written-by-0.1
state() { # KIND NAME [FILE]
    { printf "\\$(printf '%03o' "$1")"; cat "${3:--}"; } > "$seeds/state_file/$2"
}
state 0 journal "$old/0000:01:00.0.json"
state 1 ledger "$old/path/0000:01:00.0.json"
state 3 reservation "$old/persistent/0000:01:00.0.json"
device='{"address":"0000:01:00.0","identity":{"vendor":6966,"device":16,"subsystem-vendor":6900,"subsystem":4352,"class":67586,"revision":2,
    "serial":7},"path":"0000:00:01.0/00.0","function":0,"vf":1}'
state 0 record <<EOF
{"version":1,"boot":"this boot","address":"0000:01:00.0","state":"held","incarnation":3,"original-driver":"igb","original-override":"igb",
    "unprobed":true,"vf-autoprobe":true,"keeps-vfs":true,"managed":true,"msix-prepared":true,"guest":{"domain":1,"devfn":8},
    "announced":true,"grants":[{"kind":"ioport","first":49152,"count":32},{"kind":"iomem","first":1040896,"frames":32},
    {"kind":"gsi","gsi":21}],"without-line":true,"rom":{"bytes":4096,"hash":7},"own-rom":true,"unproved":true,"unknown-past":true,
    "unreset":true,"network":{"wished":{"mac":"02:00:00:00:00:01","vlan":"100:3","trust":true},"configured":{"max-rate":500},
    "before":{"spoof-check":true,"link-state":"auto"},"problem":"busy"},
    "pristine":[{"offset":4,"width":2,"mask":65535,"value":0,"reached":1},{"offset":64,"width":4,"mask":1,"value":1}],
    "transaction":{"kind":"attach","step":"serve","undoing":true},"quarantine":"it is unknown"}
EOF
state 2 former-owner <<EOF
{"version":1,"boot":"this boot","address":"0000:01:00.0",
    "ranges":[{"domain":1,"uuid":"00000000-0000-0000-0000-000000000001","first":1,"frames":1048576}]}
EOF
state 3 promised <<EOF
{"version":1,"address":"0000:01:00.0","identity":{"vendor":6966,"device":16,"subsystem-vendor":6900,"subsystem":4352,"class":67586,
    "revision":2},"device":$device,"promised":"0000:01:00.0:3","guest":"00000000-0000-0000-0000-000000000001","name":"web","devfn":8,
    "given":{"boot":"this boot","domain":1},"saved":1700000000}
EOF
state 4 wanted <<EOF
{"version":1,"wishes":[{"device":$device,"hold":true,"network":{"min-rate":1,"max-rate":500}}]}
EOF
state 5 saved <<EOF
{"version":1,"guest":"00000000-0000-0000-0000-000000000001","name":"web","functions":[{"device":$device,"slot":31,"persistent":true,
    "network":{"trust":true},"shape":{"bars":[{"size":16384,"flags":512},{"size":0,"flags":0},{"size":0,"flags":0},{"size":0,"flags":0},
    {"size":0,"flags":0},{"size":0,"flags":0}],"capabilities":[{"offset":64,"id":17,"extended":false},
    {"offset":256,"id":1,"extended":true}]}}]}
EOF
state 6 settings <<EOF
[["xpcid.yaml","guest-limit-seconds: 9\nnames: {nic: {address: \"01:00.0\"}}\nguests: {web: [\"nic@5\"]}\n"]]
EOF
state 7 policies <<EOF
[{"name":"a.yaml","text":"rules:\n  - match: {vendor: 8086}\n    hold: at-once\n"}]
EOF
echo '{"others":[0,2],"server":3}' | state 8 note

# The shipped settings, and all of their examples.
cp ../../configs/xpcid.yaml "$seeds/settings/"
cat > "$seeds/settings/all" <<EOF
holder: pci-stub
keep-from-libxl: false
reset: {methods: [flr, pm], limit-seconds: 10, answer-seconds: 2, checks: [answers, cleared]}
names: {uplink: {serial: "52-54-00-ff-ff-12-34-56", function: 0}, web-nic: {path: "0000:00:1c.0/00.0", vf: 3}, a: {address: "01:00.0"}}
guests: {web: ["01:00.0:3", "uplink:0@5"], 6d1f3a52-0c1b-4f5e-9a55-2d1c7e8b9a10: ["any:eth0"]}
virtual-functions:
  - {pf: "01:00.0", count: 4, network: {vlan: 100, spoof-check: true}, vfs: {0: {mac: "52:54:00:12:34:01", max-rate: 500}}}
  - {id: "8086:10c9", count: 7, unmanaged: true}
  - {serial: "52-54-00-ff-ff-12-34-56", count: 2}
status-group: wheel
EOF

# Words that mean something, as libFuzzer wants them.
for target in control_line qmp settings state_file policy_parser; do
    cat "$seeds/$target"/* | LC_ALL=C perl -ne 'print "\"$1\"\n" while /([A-Za-z][A-Za-z-]+)/g' | sort -u > "$seeds/$target.words"
done
