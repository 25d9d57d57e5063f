#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| xpci_fuzz::netlink(data));
