use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const BYTES: &str = " 86 80 ca 10 06 04 10 00 01 00 00 02 00 00 00 00\n";

fn lines(length: usize) -> String {
    (0..length).step_by(16).map(|offset| format!("{offset:02x}:{BYTES}")).collect()
}

fn dump(head: &str, length: usize) -> String {
    format!("{head}\n{}\n", lines(length))
}

fn error(text: &str) -> String {
    parse(text).expect_err("no dump").to_string()
}

#[test]
fn each_length_of_lspci_is_read() {
    for length in [64, 128, 256, 4096] {
        let functions = parse(&dump("01:10.2 Ethernet controller [0200]: Intel", length)).expect("a dump");
        assert_eq!(functions.len(), 1);
        assert_eq!(functions[0].address.to_string(), "0000:01:10.2");
        assert_eq!(functions[0].title, "Ethernet controller [0200]: Intel");
        assert_eq!(functions[0].bytes.len(), length);
        assert_eq!(functions[0].bytes[length - 16..][..4], [0x86, 0x80, 0xca, 0x10]);
        assert_eq!(functions[0].line, 1);
    }
}

#[test]
fn many_functions_with_and_without_domain() {
    let text = dump("00:1f.3 a", 64) + &dump("abcd:01:10.0 b", 256) + "\n\n" + &dump("0000:ff:1f.7", 4096);
    let found: Vec<_> = parse(&text)
        .expect("a dump")
        .into_iter()
        .map(|f| (f.address.to_string(), f.title, f.bytes.len(), f.line))
        .collect();
    let expected =
        [("0000:00:1f.3", "a", 64, 1), ("abcd:01:10.0", "b", 256, 7), ("0000:ff:1f.7", "", 4096, 27)];
    assert_eq!(found, expected.map(|(a, t, l, n)| (a.to_owned(), t.to_owned(), l, n)));
}

#[test]
fn functions_need_no_empty_line_between_them() {
    let text = dump("00:00.0", 64).trim_end().to_owned() + "\n" + &dump("00:01.0", 64);
    assert_eq!(parse(&text).expect("a dump").len(), 2);
}

#[test]
fn verbose_lines_and_messages_are_skipped() {
    let text = format!(
        "pcilib: sysfs_read_vpd: read failed: No such device\n01:00.0 Disk\n\tSubsystem: Red Hat, Inc.\n\tCapabilities: [40] \
         Power Management\n\t\tFlags: PMEClk-\n\t00: 11 22\n        Kernel driver in use: nvme\nlspci: Unable to load libkmod\n{}",
        lines(64)
    );
    assert_eq!(parse(&text).expect("a dump")[0].bytes.len(), 64);
}

#[test]
fn upper_case_and_carriage_returns() {
    let text = dump("0A:1F.0 ISA bridge", 256).to_uppercase().replace('\n', "\r\n");
    let functions = parse(&text).expect("a dump");
    assert_eq!(functions[0].address.to_string(), "0000:0a:1f.0");
    assert_eq!(functions[0].title, "ISA BRIDGE");
    assert_eq!(functions[0].bytes[2], 0xca);
}

#[test]
fn titles_are_bounded_and_safe_to_print() {
    let text = dump(&format!("00:00.0 \u{1b}[2J{}", "\u{e9}".repeat(1000)), 64);
    let title = &parse(&text).expect("a dump")[0].title;
    assert!(title.starts_with("[2J\u{e9}"));
    assert_eq!(title.chars().count(), MAX_TITLE);
    let text = dump("00:00.0 \u{1} a \u{7f}", 64);
    assert_eq!(parse(&text).expect("a dump")[0].title, "a");
}

#[test]
fn errors_are_safe_to_print() {
    let text = error("00:00.0\n00: f\r\u{1b}[2J 86\n");
    assert!(text.starts_with("line 2: '00: f[2J 86' is not"), "{text}");
}

#[test]
fn a_text_without_functions_says_what_is_expected() {
    for text in ["", "\n\n", "hello\n", "\u{0}\u{feff}", "\tCapabilities: [40]\n"] {
        assert_eq!(parse(text), Err(DumpError::Empty));
    }
    assert!(DumpError::Empty.to_string().contains("lspci -xxxx"));
}

#[test]
fn domains_over_ffff_are_refused_by_name() {
    let text = error(&dump("10000:e1:00.0 Disk", 256));
    assert!(text.starts_with("line 1: domain 10000 is over ffff"), "{text}");
}

#[test]
fn wrong_addresses_are_errors_and_not_text() {
    for head in ["00:20.0", "00:00.8", "00:00", "1:2:3:4.5", "00000000000000:00:00.0", "::.", "00:00.0."] {
        let text = error(&dump(head, 64));
        assert!(text.starts_with("line 1: "), "{head}: {text}");
    }
}

#[test]
fn the_same_function_twice() {
    let text = error(&(dump("01:00.0", 64) + &dump("0000:01:00.0", 64)));
    assert_eq!(text, "line 7: 0000:01:00.0 is in the file for the second time");
}

#[test]
fn bytes_without_a_function() {
    let expected = "bytes that belong to no function: a line with its address must stand before them";
    assert_eq!(error(&lines(64)), format!("line 1: {expected}"));
    assert_eq!(error(&format!("{}{}", dump("00:00.0", 64), lines(64))), format!("line 7: {expected}"));
}

#[test]
fn repeated_and_missing_lines() {
    let whole = dump("00:00.0", 64);
    let repeated = whole.replacen("20:", "10:", 1);
    assert_eq!(error(&repeated), "line 4: bytes of offset 0x10, where those of 0x20 should follow");
    let gap = whole.replacen(&format!("10:{BYTES}"), "", 1);
    assert_eq!(error(&gap), "line 3: bytes of offset 0x20, where those of 0x10 should follow");
    let not_from_0 = whole.replacen(&format!("00:{BYTES}"), "", 1);
    assert_eq!(error(&not_from_0), "line 2: bytes of offset 0x10, where those of 0x0 should follow");
}

#[test]
fn nothing_follows_the_last_byte() {
    let text = error(&dump("00:00.0", 4096 + 16));
    assert!(text.starts_with("line 258: 0000:00:00.0 has 4112 bytes; lspci prints 64 (-x)"), "{text}");
}

#[test]
fn short_long_and_strange_lines() {
    for line in [
        "00: 86 80",
        "00:",
        "00: 86 80 ca 10 06 04 10 00 01 00 00 02 00 00 00 00 00",
        "00: 86 80 ca 10 06 04 10 00 01 00 00 02 00 00 00 +1",
        "00: 86 80 ca 10 06 04 10 00 01 00 00 02 00 00 00 001",
        "00: 86 80 ca 10 06 04 10 00 01 00 00 02 00 00 00 xx",
        "00: 8680 ca10",
        "00000: 86 80 ca 10 06 04 10 00 01 00 00 02 00 00 00 00",
        ":",
    ] {
        let text = error(&format!("00:00.0\n{line}\n"));
        assert!(text.starts_with(&format!("line 2: '{line}' is not an offset and 16 bytes")), "{text}");
    }
}

#[test]
fn lengths_that_lspci_does_not_print() {
    for length in [0, 16, 48, 80, 240, 272, 4080] {
        let text = error(&dump("00:00.0 x", length));
        assert!(text.starts_with(&format!("line 1: 0000:00:00.0 has {length} bytes; ")), "{text}");
    }
}

#[test]
fn too_much_text_is_not_read() {
    let text = " ".repeat(MAX_TEXT + 1);
    assert_eq!(parse(&text), Err(DumpError::TooLong { length: MAX_TEXT + 1 }));
}

#[test]
fn a_line_that_a_message_has_torn_costs_only_the_rest_of_its_function() {
    let torn = dump("01:00.0 VGA", 4096).replace("f20:", "f2pcilib: sysfs_read_vpd: read failed\n0:");
    let dump = read(&(torn + &dump("01:00.1 Audio", 64))).expect("a dump");
    let lengths: Vec<_> = dump.functions.iter().map(|function| function.bytes.len()).collect();
    assert_eq!(lengths, [256, 64]);
    let damage: Vec<_> = dump.damage.iter().map(ToString::to_string).collect();
    assert_eq!(damage, ["line 245: bytes of offset 0x0, where those of 0xf20 should follow"]);
}

#[test]
fn a_function_whose_header_is_damaged_is_left_out() {
    let broken = dump("01:00.0", 64).replacen("20:", "x0:", 1);
    let dump = read(&(broken + &dump("02:00.0", 64))).expect("a dump");
    assert_eq!(dump.functions.len(), 1);
    assert_eq!(dump.functions[0].address.to_string(), "0000:02:00.0");
    assert_eq!(dump.damage.len(), 1, "{:?}", dump.damage);
}

#[test]
fn a_function_in_a_domain_over_ffff_is_left_out_and_named() {
    let text = dump("10000:e1:00.0 Disk", 256) + &dump("00:1f.0", 256);
    let dump = read(&text).expect("a dump");
    assert_eq!((dump.functions.len(), dump.damage.len()), (1, 1));
    assert!(dump.damage[0].to_string().starts_with("line 1: domain 10000 is over ffff"));
}

#[test]
fn a_function_that_stands_twice_is_read_once() {
    let dump = read(&(dump("01:00.0 a", 64) + &dump("01:00.0 b", 256))).expect("a dump");
    assert_eq!((dump.functions.len(), dump.functions[0].title.as_str()), (1, "a"));
    assert_eq!(dump.damage.len(), 1);
}

#[test]
fn a_byte_order_mark_before_the_first_address_is_no_damage() {
    let dump = read(&format!("\u{feff}{}", dump("03:00.0 Network", 256))).expect("a dump");
    assert_eq!((dump.functions.len(), dump.damage.len()), (1, 0));
}

#[test]
fn the_damage_that_is_reported_is_bounded() {
    let text = "10000:00:00.0\n".repeat(1000) + &dump("00:00.0", 64);
    assert_eq!(read(&text).expect("a dump").damage.len(), 100);
}

#[test]
fn sizes_of_regions_are_taken_from_verbose_lines_and_only_as_lspci_prints_them() {
    let head = "01:00.0 VGA\n\tRegion 0: Memory at 383ffff10000 (64-bit, prefetchable) [size=256M]\n\tI/O ports at e000 \
                [size=128]\n\tExpansion ROM at c0140000 [disabled] [size=128K]\n\tRegion 2: Memory at <unassigned> (64-bit) \
                [size=4K]\n\tMemory at f000 (32-bit) [size=3K]\n\tMemory at e000 (32-bit) [size=99999999999999999999T]\n\t\
                Memory at d000 (32-bit)";
    let regions = &parse(&dump(head, 64)).expect("a dump")[0].regions;
    let found: Vec<_> = regions.iter().map(|region| (region.start, region.size)).collect();
    assert_eq!(found, [(0x383f_fff1_0000, 256 << 20), (0xe000, 128), (0xc014_0000, 128 << 10)]);
}

fn functions() -> impl Strategy<Value = Vec<DumpedFunction>> {
    let length = prop::sample::select(LENGTHS.to_vec());
    let bytes = length.prop_flat_map(|length| prop::collection::vec(any::<u8>(), length));
    let one = (any::<u32>(), ("[!-~]?", "[ -~]{0,30}[!-~]"), bytes);
    prop::collection::vec(one, 1..5).prop_map(|list| {
        let unique: BTreeMap<_, _> = list.into_iter().map(|(packed, t, b)| (packed, (t, b))).collect();
        let mut line = 1;
        unique
            .into_iter()
            .map(|(packed, ((first, rest), bytes))| {
                let title = if first.is_empty() { first } else { first + &rest };
                let (address, regions) = (Sbdf::from_packed(packed), Vec::new());
                let function = DumpedFunction { address, title, bytes, line, regions };
                line += 2 + function.bytes.len() / LINE;
                function
            })
            .collect()
    })
}

/// Text that is nearly a dump.
fn nearly() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        Just("00:00.0 x\n".to_owned()),
        Just(lines(64)),
        (0usize..0x1100).prop_map(|offset| format!("{offset:02x}:{BYTES}")),
        "[0-9a-f:. \r\n\t+]{0,24}",
        "\\PC{0,8}",
        any::<char>().prop_map(String::from),
    ];
    prop::collection::vec(piece, 0..12).prop_map(|pieces| pieces.concat())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_printed_is_read_back(functions in functions()) {
        let text: String = functions.iter().map(|function| format!("{function}\n")).collect();
        prop_assert_eq!(parse(&text), Ok(functions));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2048, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_text_panics(text in prop_oneof![nearly(), any::<String>()]) {
        if let Ok(functions) = parse(&text) {
            for function in functions {
                prop_assert!(LENGTHS.contains(&function.bytes.len()));
            }
        }
    }
}
