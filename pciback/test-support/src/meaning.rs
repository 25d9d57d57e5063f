//! What registers mean to a guest, in the words of the oracle: the specification's bits, and who decides over them. Nothing here
//! comes from the library.

use crate::oracle::Oracle;

/// A BAR of one register: where it is on the host, its size, and its constant low bits.
pub fn bar32(oracle: &mut Oracle, at: usize, start: u32, size: u32, flags: u8) {
    oracle.own(at, 4, u64::from(!(size - 1)), u64::from(start)).one(at, flags);
}

/// A prefetchable BAR of two registers.
pub fn bar64(oracle: &mut Oracle, at: usize, start: u64, size: u64) {
    oracle.own(at, 8, !(size - 1), start).one(at, 0xc);
}

/// The BAR of a copy of an expansion ROM of so many bytes: it begins as unplaced and off, and hardware is left alone.
pub fn rom(oracle: &mut Oracle, bytes: u32) {
    oracle.own(0x30, 4, u64::from(!(bytes - 1) | 1), 0);
}

/// The BAR of the function's own expansion ROM: the guest sees where it is and how large, and cannot move it; it switches the decoder.
pub fn rom_of_host(oracle: &mut Oracle, start: u32, bytes: u32) {
    oracle.own(0x30, 4, u64::from(!(bytes - 1)), u64::from(start)).hardware(0x30, 1, 1);
}

/// MSI-X: the guest's own are Enable and Function Mask.
pub fn msix(oracle: &mut Oracle, at: usize) {
    oracle.frozen(at, 12).own(at + 2, 2, 0xc000, 0);
}

/// The PCI Express capability of an endpoint, version 2.
pub fn express(oracle: &mut Oracle, at: usize) {
    oracle
        .frozen(at, 0x3c)
        // Device Control: ordering and snooping pass, the reset bit reads 0, the rest is the guest's own.
        .kept(at + 8, 2, 0x77ef)
        .hardware(at + 8, 2, 0x0810)
        .zero(at + 10, 2)
        .events(at + 10, 2, 0x004f)
        .shown(at + 10, 2, 0x0030)
        // Link Control: own, but disabling and retraining read 0.
        .zero(at + 0x10, 2)
        .kept(at + 0x10, 2, 0xffcf)
        // Power management of the link is switched off, never on.
        .falling(at + 0x10, 2, 0x0103)
        .shown(at + 0x12, 2, 0xffff)
        .zero(at + 0x18, 12)
        .shown(at + 0x20, 4, 0x0002_ffff)
        .zero(at + 0x1e, 2)
        // Device Control 2: timeout and ordering pass, AtomicOps are not possible.
        .kept(at + 0x28, 2, 0xffff)
        .own(at + 0x28, 2, 0x0040, 0)
        .never(at + 0x28, 2, 0x0040)
        .hardware(at + 0x28, 2, 0x031f)
        .kept(at + 0x30, 2, 0xffbf)
        .zero(at + 0x32, 2)
        .shown(at + 0x32, 2, 0xf7ff)
        .zero(at + 0x38, 4)
        .sizes(at + 8)
        .reset_bit(at + 9, 0x80);
}

/// AER; `prefixes`: with the TLP Prefix Log, which only functions that take such prefixes have.
pub fn aer(oracle: &mut Oracle, at: usize, prefixes: bool, header: u32) {
    oracle
        .constant(at, &header.to_le_bytes())
        .zero(at + 4, 0x18)
        .events(at + 0x04, 4, 0xffff_f030)
        .kept(at + 0x08, 4, 0xffff_f030)
        .kept(at + 0x0c, 4, 0xffff_f030)
        .events(at + 0x10, 4, 0x0000_f1c1)
        .kept(at + 0x14, 4, 0x0000_f1c1)
        .frozen_bits(at + 0x18, 4, 0x0000_02a0)
        .kept(at + 0x18, 4, 0x0000_0540)
        .shown(at + 0x18, 4, 0x00fc_081f)
        .shown(at + 0x1c, 8, u64::MAX)
        .shown(at + 0x24, 8, u64::MAX)
        .zero(at + 0x2c, 12)
        .shown(at + 0x38, 8, u64::MAX);
    if prefixes {
        oracle.shown(at + 0x40, 8, u64::MAX);
    }
}

/// SR-IOV, the last of its list, for a guest that creates up to so many VFs, the first of them so many Routing IDs from the PF: none of it
/// is hardware's.
pub fn guest_vfs(oracle: &mut Oracle, at: usize, count: u16, first: u16) {
    let ([low, high], [first, beyond]) = (count.to_le_bytes(), first.to_le_bytes());
    oracle
        .zero(at, 0x40)
        .constant(at, &[0x10, 0, 1, 0])
        // VF Enable, VF MSE.
        .own(at + 0x08, 2, 0x0009, 0)
        // InitialVFs, TotalVFs.
        .constant(at + 0x0c, &[low, high, low, high])
        // NumVFs, while VF Enable is 0.
        .own(at + 0x10, 2, 0xffff, 0)
        .lock(at + 0x08, 1, at + 0x10, 2)
        // Function Dependency Link: the PF itself.
        .frozen(at + 0x12, 1)
        // First VF Offset, VF Stride, a VF Device ID that no driver has.
        .constant(at + 0x14, &[first, beyond, 1, 0, 0, 0, 0xff, 0xff])
        // 4 KiB, 8 KiB, 64 KiB, 256 KiB, 1 MiB, 4 MiB; 4 KiB at first. No VF BARs.
        .constant(at + 0x1c, &[0x53, 5, 0, 0])
        .own(at + 0x20, 4, 0xffff_ffff, 1);
}

/// A VF of Intel's 82576, with a 64-bit BAR 0 and 3: where they are, and how large.
pub fn network_vf(oracle: &mut Oracle, identity: [u8; 4], bars: [(u64, u64); 2]) {
    oracle
        .constant(0x00, &identity)
        // A VF's Command: memory reads as on, bus mastering reaches hardware, nothing else exists.
        .constant(0x04, &[2, 0, 0x10, 0])
        .hardware(0x04, 1, 4)
        .shown(0x06, 2, 0x0009)
        .events(0x06, 2, 0xf900)
        .frozen(0x08, 4)
        .kept(0x0c, 2, 0xffff)
        .frozen(0x2c, 4)
        .frozen(0x34, 1)
        .own(0x3c, 1, 0xff, 0);
    bar64(oracle, 0x10, bars[0].0, bars[0].1);
    bar64(oracle, 0x1c, bars[1].0, bars[1].1);
    msix(oracle, 0x70);
    express(oracle, 0xa0);
    aer(oracle, 0x100, true, 0x1501_0001);
    // ARI: no next function, and it is the last of the list.
    oracle.constant(0x150, &[0x0e, 0, 1, 0, 0, 0, 0, 0]).own(0x156, 1, 0x73, 0);
}
