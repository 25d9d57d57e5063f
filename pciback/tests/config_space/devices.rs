//! Composed devices: hardware, what the host says of it, and the oracle for its guest.

use pciback::Sbdf;
use pciback::config::{FunctionKind, FunctionSpec, GuestRom, Identity};
use pciback::platform::Resource;
use xpci_test_support::meaning;
use xpci_test_support::oracle::Oracle;

use crate::hardware::Hardware;

pub struct Device {
    pub name: String,
    pub hardware: Hardware,
    pub spec: FunctionSpec,
    pub oracle: Oracle,
}

pub const MEMORY_32: u64 = Resource::MEMORY;
pub const MEMORY_64: u64 = Resource::MEMORY | Resource::MEMORY_64 | Resource::PREFETCH;

pub fn resource(start: u64, size: u64, flags: u64) -> Resource {
    Resource { start, size, flags }
}

fn spec(hardware: &Hardware, resources: &[(usize, Resource)], gsi: u32) -> FunctionSpec {
    let mut all = [Resource::default(); 13];
    for (index, resource) in resources {
        all[*index] = *resource;
    }
    let bytes = hardware.bytes.borrow().clone();
    let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    FunctionSpec {
        address: Sbdf::from_devfn(0, 1, 0x80),
        identity: Identity {
            vendor: word(0),
            device: word(2),
            subsystem_vendor: word(0x2c),
            subsystem: word(0x2e),
            class: u32::from_le_bytes([bytes[9], bytes[10], bytes[11], 0]),
            revision: bytes[8],
        },
        bytes,
        resources: all,
        kind: FunctionKind::Physical,
        gsi,
        rom: None,
    }
}

/// A header whose registers behave as those of real functions.
fn header(size: usize, capabilities: u8) -> Hardware {
    let mut hardware = Hardware::new(size);
    hardware.put32(0x00, 0x10c9_8086);
    hardware.put32(0x04, 0x2118_0546);
    hardware.writable32(0x04, 0x0000_07ff);
    hardware.cleared_by_one32(0x04, 0xf900_0000);
    hardware.put32(0x08, 0x0200_0001);
    hardware.put32(0x0c, 0x0080_0010);
    hardware.writable32(0x0c, 0x0000_ffff);
    for bar in (0x10..0x28).step_by(4) {
        hardware.writable32(bar, 0xffff_f000);
    }
    hardware.put32(0x2c, 0xa03c_8086);
    hardware.writable32(0x30, 0xffff_f801);
    hardware.put(0x34, &[capabilities]);
    hardware.put(0x3c, &[0x55, 1, 8, 9]);
    hardware.writable32(0x3c, 0xff);
    hardware
}

fn oracle(hardware: &Hardware) -> Oracle {
    let bytes = hardware.bytes.borrow().clone();
    Oracle::new(bytes, hardware.writable.clone(), hardware.cleared_by_one.clone())
}

/// What a guest sees of `header`, the BARs excepted.
fn header_oracle(hardware: &Hardware, line: u8, first: u8) -> Oracle {
    let mut oracle = oracle(hardware);
    oracle
        .frozen(0x00, 4)
        // Command: bus mastering reaches hardware; decoding, which begins as off, INTx and the error bits are the guest's own.
        .own(0x04, 2, 0x07fb, 0x0140)
        .hardware(0x04, 2, 0x0004)
        // Status: the guest clears events for itself, INTx and readiness show.
        .zero(0x06, 2)
        .one(0x06, 0x10)
        .shown(0x06, 2, 0x0009)
        .events(0x06, 2, 0xf900)
        .frozen(0x08, 4)
        .own(0x0c, 2, 0xffff, 0x0010)
        .zero(0x0e, 2)
        .frozen(0x2c, 4)
        .constant(0x34, &[first])
        .own(0x3c, 1, 0xff, u64::from(line))
        // A pin only where the guest has a line.
        .constant(0x3d, &[u8::from(!matches!(line, 0 | 0xff)), 8, 9]);
    oracle
}

fn msix(hardware: &mut Hardware, at: usize, next: u8) {
    hardware.put(at, &[0x11, next, 0x09, 0x00, 3, 0, 0, 0, 3, 0x20, 0, 0]);
    hardware.writable32(at, 0xc000_0000);
}

fn express(hardware: &mut Hardware, at: usize, next: u8) {
    hardware.put(at, &[0x10, next, 0x02, 0x00]);
    hardware.put32(at + 4, 0x1000_8cc2);
    hardware.put32(at + 8, 0x0009_2930);
    hardware.writable32(at + 8, 0x0000_7fff);
    hardware.cleared_by_one32(at + 8, 0x000f_0000);
    hardware.put32(at + 0x0c, 0x0003_ec41);
    hardware.put32(at + 0x10, 0x5041_0043);
    hardware.writable32(at + 0x10, 0x0000_03ff);
    hardware.cleared_by_one32(at + 0x10, 0xc000_0000);
    hardware.put32(at + 0x24, 0x0000_001f);
    hardware.put32(at + 0x28, 0x0000_0005);
    hardware.writable32(at + 0x28, 0x0000_ffff);
    hardware.put32(at + 0x30, 0x0021_0001);
    hardware.writable32(at + 0x30, 0x0000_ffff);
    hardware.cleared_by_one32(at + 0x30, 0x8020_0000);
}

fn aer(hardware: &mut Hardware, at: usize, header: u32) {
    hardware.put32(at, header);
    hardware.put32(at + 0x04, 0x0010_4020);
    hardware.cleared_by_one32(at + 0x04, 0xffff_f030);
    hardware.put32(at + 0x08, 0x0040_0000);
    hardware.writable32(at + 0x08, 0xffff_f030);
    hardware.put32(at + 0x0c, 0x0006_2030);
    hardware.writable32(at + 0x0c, 0xffff_f030);
    hardware.put32(at + 0x10, 0x0000_2041);
    hardware.cleared_by_one32(at + 0x10, 0x0000_f1c1);
    hardware.put32(at + 0x14, 0x0000_2000);
    hardware.writable32(at + 0x14, 0x0000_f1c1);
    hardware.put32(at + 0x18, 0x0000_01ae);
    hardware.writable32(at + 0x18, 0x0000_0540);
    hardware.put32(at + 0x1c, 0x4000_0001);
}

/// A network PF with SR-IOV, like Intel's 82576.
pub fn network_pf() -> Device {
    let mut hardware = header(0x1000, 0x40);
    hardware.put32(0x10, 0xfe80_0000);
    hardware.put32(0x18, 0x0000_e001);
    hardware.put(0x40, &[0x01, 0x50, 0x23, 0xc8, 0x08, 0x20, 0, 7]);
    hardware.writable32(0x44, 0x0000_1f03);
    hardware.cleared_by_one32(0x44, 0x8000_0000);
    hardware.put(0x50, &[0x05, 0x70, 0x80, 0x01]);
    for offset in (0x50..0x64).step_by(4) {
        hardware.writable32(offset, if offset == 0x50 { 0x0071_0000 } else { u32::MAX });
    }
    hardware.put32(0x64, 0x0000_0001);
    msix(&mut hardware, 0x70, 0xa0);
    express(&mut hardware, 0xa0, 0xe0);
    hardware.put(0xe0, &[0x03, 0x00, 0x34, 0x80, 1, 2, 3, 4]);
    hardware.writable32(0xe0, 0xffff_0000);
    hardware.writable32(0xe4, u32::MAX);
    hardware.put32(0xe8, 0x1234_5678);
    hardware.writable32(0xe8, 0x00ff_ff00);
    aer(&mut hardware, 0x100, 0x1401_0001);
    hardware.put(0x140, &[3, 0, 1, 0x15, 1, 2, 3, 0xff, 0xff, 4, 5, 6]);
    hardware.put(0x150, &[0x0e, 0, 1, 0x16, 0, 1, 0, 0]);
    hardware.writable32(0x154, 0x0073_0000);
    hardware.put(0x160, &[0x10, 0, 1, 0]);
    for offset in (0x164..0x1a0).step_by(4) {
        hardware.put32(offset, 0x0101_0101 * (offset as u32 & 0xff));
        hardware.writable32(offset, u32::MAX);
    }
    hardware.put(0x17a, &[0xca, 0x10]);
    hardware.put32(0x1a0, 0xcafe_f00d);
    hardware.writable32(0x1a0, 0xffff_0000);
    let spec = spec(
        &hardware,
        &[
            (0, resource(0xfe80_0000, 0x2_0000, MEMORY_32)),
            (2, resource(0xe000, 0x20, Resource::IO)),
            (6, resource(0xfe40_0000, 0x8_0000, MEMORY_32)),
        ],
        17,
    );
    let mut oracle = header_oracle(&hardware, 17, 0x40);
    meaning::bar32(&mut oracle, 0x10, 0xfe80_0000, 0x2_0000, 0);
    meaning::bar32(&mut oracle, 0x18, 0xe000, 0x20, 1);
    // Power management: no PME, the state is the guest's own.
    oracle.constant(0x40, &[0x01, 0x50, 0x23, 0x00, 0x08, 0x20, 0, 7]).own(0x44, 1, 3, 0);
    oracle.frozen(0x50, 4).own(0x52, 1, 0x71, 0).zero(0x54, 0x14);
    oracle.own(0x54, 8, 0xffff_ffff_ffff_fffc, 0).own(0x5c, 2, 0xffff, 0).own(0x60, 1, 1, 0);
    oracle.shown(0x64, 4, 1);
    meaning::msix(&mut oracle, 0x70);
    meaning::express(&mut oracle, 0xa0);
    oracle.frozen(0xe0, 2).vpd(0xe0);
    meaning::aer(&mut oracle, 0x100, false, 0x1401_0001);
    oracle.frozen(0x140, 12);
    // ARI: no next function, and it is the last of the list.
    oracle.constant(0x150, &[0x0e, 0, 1, 0, 0, 0, 0, 0]).own(0x156, 1, 0x73, 0);
    oracle.zero(0x160, 0x40);
    Device { name: "network PF".into(), hardware, spec, oracle }
}

/// One of its VFs.
pub fn network_vf() -> Device {
    let pf = network_pf();
    let mut hardware = Hardware::new(0x1000);
    hardware.put32(0x00, u32::MAX);
    hardware.put32(0x04, 0x0010_0000);
    hardware.writable32(0x04, 0x0000_0004);
    hardware.cleared_by_one32(0x04, 0xf900_0000);
    hardware.put32(0x08, 0x0200_0001);
    hardware.put32(0x2c, 0xa03c_8086);
    hardware.put(0x34, &[0x70]);
    msix(&mut hardware, 0x70, 0xa0);
    express(&mut hardware, 0xa0, 0);
    aer(&mut hardware, 0x100, 0x1501_0001);
    // Logs that hardware lets anybody write, as QEMU's: no guest does.
    for offset in (0x138..0x148).step_by(4) {
        hardware.writable32(offset, u32::MAX);
    }
    hardware.put(0x150, &[0x0e, 0, 1, 0, 0, 0x11, 0, 0]);
    let mut spec = spec(
        &hardware,
        &[(0, resource(0xfe90_0000, 0x4000, MEMORY_64)), (3, resource(0xfe92_0000, 0x4000, MEMORY_64))],
        0,
    );
    let mut pf_bytes = pf.spec.bytes.clone();
    pf_bytes[0x184..0x19c].fill(0);
    pf_bytes[0x184] = 0x0c;
    pf_bytes[0x190] = 0x0c;
    spec.identity.vendor = 0x8086;
    spec.identity.device = 0x10ca;
    spec.kind = FunctionKind::Virtual { physical_function: Sbdf::from_devfn(0, 1, 0), pf_bytes, index: 0 };
    let mut oracle = oracle(&hardware);
    meaning::network_vf(
        &mut oracle,
        [0x86, 0x80, 0xca, 0x10],
        [(0xfe90_0000, 0x4000), (0xfe92_0000, 0x4000)],
    );
    Device { name: "network VF".into(), hardware, spec, oracle }
}

/// A disk whose first extended capability is hidden, with a vendor's own one.
pub fn disk() -> Device {
    let mut hardware = header(0x1000, 0x40);
    hardware.put32(0x10, 0x0000_000c);
    hardware.put32(0x14, 0x0000_0038);
    msix(&mut hardware, 0x40, 0x60);
    hardware.put(0x60, &[0x09, 0x80, 0x08, 1, 2, 3, 4, 5]);
    hardware.writable32(0x64, u32::MAX);
    express(&mut hardware, 0x80, 0);
    hardware.put(0x100, &[0x15, 0, 1, 0x12]);
    hardware.put32(0x108, 0x0000_0520);
    hardware.writable32(0x108, 0x0000_3f00);
    hardware.put(0x120, &[0x0b, 0, 1, 0x14, 0x34, 0x12, 0, 1]);
    hardware.writable32(0x128, u32::MAX);
    hardware.put(0x140, &[0x0f, 0, 1, 0x15, 0x60, 0, 0, 0x80]);
    hardware.writable32(0x144, 0x801f_0000);
    hardware.put(0x150, &[0x2e, 0, 1, 0]);
    hardware.writable32(0x158, u32::MAX);
    let spec = spec(&hardware, &[(0, resource(0x38_0000_0000, 0x2_0000_0000, MEMORY_64))], 300);
    let mut oracle = header_oracle(&hardware, 0xff, 0x40);
    meaning::bar64(&mut oracle, 0x10, 0x38_0000_0000, 0x2_0000_0000);
    meaning::msix(&mut oracle, 0x40);
    oracle.frozen(0x60, 2);
    meaning::express(&mut oracle, 0x80);
    oracle.constant(0x100, &[0, 0, 0, 0x12]).zero(0x104, 8);
    oracle.frozen(0x120, 4);
    // ATS ends the list now: what follows it is hidden.
    oracle.constant(0x140, &[0x0f, 0, 1, 0, 0x60, 0, 0, 0]).own(0x146, 2, 0x801f, 0);
    oracle.zero(0x150, 0x18);
    Device { name: "disk".into(), hardware, spec, oracle }
}

/// A paravirtual function with an I/O BAR and vendor-specific capabilities, 256 bytes.
pub fn virtio() -> Device {
    virtio_with_rom_register(0, 0)
}

/// With what its ROM's register holds, and the bits of it that can be written.
fn virtio_with_rom_register(rom: u32, writable: u32) -> Device {
    let mut hardware = header(0x100, 0x98);
    hardware.put32(0x30, rom);
    hardware.writable32(0x30, writable);
    hardware.put32(0x10, 0x0000_c041);
    hardware.put32(0x14, 0xfebd_1000);
    hardware.put(0x40, &[0x09, 0x00, 0x10, 0x01, 4, 0, 0, 0]);
    hardware.writable32(0x48, u32::MAX);
    hardware.put(0x98, &[0x11, 0x40, 3, 0, 1, 0, 0, 0, 1, 8, 0, 0]);
    hardware.writable32(0x98, 0xc000_0000);
    let spec = spec(
        &hardware,
        &[(0, resource(0xc040, 0x20, Resource::IO)), (1, resource(0xfebd_1000, 0x1000, MEMORY_32))],
        11,
    );
    let mut oracle = header_oracle(&hardware, 11, 0x98);
    meaning::bar32(&mut oracle, 0x10, 0xc040, 0x20, 1);
    meaning::bar32(&mut oracle, 0x14, 0xfebd_1000, 0x1000, 0);
    oracle.frozen(0x40, 2);
    meaning::msix(&mut oracle, 0x98);
    Device { name: "virtio".into(), hardware, spec, oracle }
}

/// A conventional function with Advanced Features and MSI in one of its layouts.
pub fn conventional(wide: bool, maskable: bool) -> Device {
    let mut hardware = header(0x100, 0x48);
    let control = 0x0004 | if wide { 0x80 } else { 0 } | if maskable { 0x100 } else { 0 };
    hardware.put(0x48, &[0x05, 0x70]);
    hardware.put16(0x4a, control);
    for offset in (0x4c..0x64).step_by(4) {
        hardware.put32(offset, 0x1111_1111);
        hardware.writable32(offset, u32::MAX);
    }
    hardware.put(0x70, &[0x13, 0x00, 6, 3, 0, 1]);
    hardware.writable32(0x74, 1);
    let spec = spec(&hardware, &[(5, resource(0xf000_0000, 0x10, MEMORY_32))], 5);
    let mut oracle = header_oracle(&hardware, 5, 0x48);
    meaning::bar32(&mut oracle, 0x24, 0xf000_0000, 0x10, 0);
    let length = 0x0c + if wide { 4 } else { 0 } + if maskable { 8 } else { 0 };
    // One vector, whatever hardware has.
    oracle.zero(0x48, length).frozen(0x48, 4).constant(0x4a, &(control & !0x000e).to_le_bytes());
    oracle.own(0x4a, 2, 0x0071, 0);
    oracle.own(0x4c, 4, 0xffff_fffc, 0);
    let data = if wide { 0x54 } else { 0x50 };
    if wide {
        oracle.own(0x50, 4, 0xffff_ffff, 0);
    }
    oracle.own(data, 2, 0xffff, 0);
    if maskable {
        oracle.own(data + 4, 4, 1, 0).shown(data + 8, 4, 1);
    }
    oracle.frozen(0x70, 4).zero(0x74, 2).shown(0x75, 1, 1).reset_bit(0x74, 1);
    let name = format!("conventional, 64-bit {wide}, maskable {maskable}");
    Device { name, hardware, spec, oracle }
}

/// A function of which the host shows the header only, with an endless list.
pub fn header_only() -> Device {
    let hardware = header(0x40, 0x40);
    let spec = spec(&hardware, &[], 0);
    let mut oracle = header_oracle(&hardware, 0, 0);
    oracle.zero(0x06, 1).shown(0x06, 1, 0x09);
    Device { name: "header only".into(), hardware, spec, oracle }
}

/// The same where the guest is given a copy of a ROM: larger than the host's, which has one of 4 KiB.
pub fn virtio_with_rom() -> Device {
    let Device { hardware, mut spec, mut oracle, .. } = virtio();
    spec.resources[6] = resource(0xfeb8_0000, 0x1000, MEMORY_32);
    spec.rom = Some(GuestRom::Copy(0x1_0000));
    meaning::rom(&mut oracle, 0x1_0000);
    Device { name: "virtio with a ROM".into(), hardware, spec, oracle }
}

/// The same where the guest is given the function's own ROM, of 4 KiB.
pub fn virtio_with_the_hosts_rom() -> Device {
    let Device { hardware, mut spec, mut oracle, .. } = virtio_with_rom_register(0xfeb8_0000, 0xffff_f001);
    spec.resources[6] = resource(0xfeb8_0000, 0x1000, MEMORY_32);
    spec.rom = Some(GuestRom::OfHost);
    meaning::rom_of_host(&mut oracle, 0xfeb8_0000, 0x1000);
    Device { name: "virtio with the host's ROM".into(), hardware, spec, oracle }
}

pub fn all() -> Vec<Device> {
    let mut all = vec![network_pf(), network_vf(), disk(), virtio(), virtio_with_rom(), header_only()];
    all.push(virtio_with_the_hosts_rom());
    for (wide, maskable) in [(false, false), (false, true), (true, false), (true, true)] {
        all.push(conventional(wide, maskable));
    }
    all
}
