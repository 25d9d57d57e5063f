//! Devices of shapes that are seen in real machines and that QEMU does not have. The values are made up.

use pciback::dump::DumpedFunction;

use crate::composer::Composer;

const PM: (u8, &[u8]) = (0x01, &[0x03, 0x00, 0x08, 0x00, 0x00, 0x00]);
const MSI_64_MASK: (u8, &[u8]) = (0x05, &[0x80, 0x01, 0, 0, 0xe0, 0xfe, 0, 0, 0, 0, 0x41]);
const MSI_32: (u8, &[u8]) = (0x05, &[0x00, 0x00]);
const MSI_X: (u8, &[u8]) = (0x11, &[0x3f, 0x00, 0x04, 0, 0, 0, 0x04, 0x20, 0, 0]);
const VPD: (u8, &[u8]) = (0x03, &[0x00, 0x80, 0x82, 0x0a, 0x00, 0x4e]);
const AER: (u16, u8, &[u32]) = (0x01, 2, &[0, 0, 0x0046_2030, 0x2000, 0x2000, 0xa0]);

trait Parts {
    fn old(self, at: usize, part: (u8, &[u8])) -> Self;
    fn aer(self, at: usize) -> Self;
}

impl Parts for Composer {
    fn old(self, at: usize, (id, body): (u8, &[u8])) -> Self {
        self.legacy(at, id, body)
    }

    fn aer(self, at: usize) -> Self {
        self.extended(at, AER.0, AER.1, AER.2)
    }
}

/// All of them: name and function.
pub fn all() -> Vec<(&'static str, DumpedFunction)> {
    let mut all: Vec<Composer> = Vec::new();
    all.extend([network(), graphics(), disk(), accelerator(), root_port(), event_collector(), cxl()]);
    all.extend([sata(), pci_x(), agp(), hyper_transport(), debug_port(), compact_pci()]);
    all.extend([card_bus(256), card_bus(128), allocation(), virtio(), out_of_order(), no_lists()]);
    all.extend([every_legacy_id(), every_extended_id(), most_legacy(), most_extended(), null_first()]);
    all.extend([bridge(), last_bytes(), unknown_ids(), isolated()]);
    all.into_iter().map(Composer::finish).collect()
}

fn network() -> Composer {
    Composer::express("server-network-pf", 0x02_0000)
        .old(0x80, PM)
        .old(0x90, MSI_64_MASK)
        .old(0xb0, MSI_X)
        .old(0xe0, VPD)
        .aer(0x100)
        .extended(0x148, 0x03, 1, &[0x5566_7788, 0x1122_3344])
        .extended(0x158, 0x0e, 1, &[0x0000_0101])
        .extended(0x168, 0x19, 1, &[0, 0, 0x7777_7777])
        .extended(0x188, 0x10, 1, &[2, 0, 0x0040_0040, 0, 0x0001_0080, 0x10f1_0000, 0x553, 1])
        .extended(0x1c8, 0x17, 1, &[0x0000_0205, 0])
        .extended(0x1e0, 0x0d, 1, &[0])
        .extended(0x1f0, 0x0f, 1, &[0x0020])
        .extended(0x200, 0x1b, 1, &[0x1404])
        .extended(0x210, 0x13, 1, &[0x0100_0000, 32])
        .extended(0x220, 0x18, 1, &[0x1003_1003])
        .extended(0x230, 0x1f, 1, &[0x0000_0411, 0])
}

fn graphics() -> Composer {
    Composer::express("graphics-resizable-bars", 0x03_0000)
        .legacy(0x80, 0x09, &[0x08, 1, 0, 0, 0, 0])
        .old(0x90, PM)
        .old(0xa0, MSI_64_MASK)
        .extended(0x100, 0x0b, 1, &[0x0101_0001, 0])
        .aer(0x150)
        .extended(0x200, 0x15, 1, &[0x003f_f000, 0x0000_0c40, 0x0000_0000, 0x22])
        .extended(0x240, 0x04, 1, &[0, 0, 0])
        .extended(0x270, 0x19, 1, &[0, 0, 0x7f7f_7f7f, 0x7f7f_7f7f])
        .extended(0x2a0, 0x0d, 1, &[0])
        .extended(0x2d0, 0x1b, 1, &[0x1006])
        .extended(0x320, 0x18, 1, &[0])
        .extended(0x370, 0x1e, 1, &[0x0028_1e1f, 0x4046_0a0f, 0x28])
        .extended(0x3c0, 0x02, 1, &[0, 0, 0, 0, 0x8000_00ff, 0])
        .extended(0x400, 0x16, 1, &[0, 0, 0])
}

fn disk() -> Composer {
    Composer::express("disk-32gt", 0x01_0802)
        .old(0x80, PM)
        .old(0xb0, MSI_X)
        .aer(0x100)
        .extended(0x148, 0x03, 1, &[1, 2])
        .extended(0x158, 0x04, 1, &[0, 0, 0])
        .extended(0x168, 0x19, 1, &[0, 0, 0x7777_7777])
        .extended(0x188, 0x26, 1, &[0, 0, 0, 0, 0, 0, 0, 0x7777_7777])
        .extended(0x1ac, 0x27, 1, &[0, 0, 0, 0, 0])
        .extended(0x1c4, 0x2a, 1, &[0, 0, 0, 0, 0, 0, 0, 0x7777_7777])
        .extended(0x1ec, 0x25, 1, &[0x8000_0001, 0])
        .extended(0x200, 0x18, 1, &[0x1008_1008])
        .extended(0x208, 0x1e, 1, &[0x0028_1e1f, 0, 0])
        .extended(0x220, 0x2e, 2, &[0, 0, 0x8000_0000, 0, 0])
        .extended(0x240, 0x2f, 1, &[8, 0, 0])
        .extended(0x250, 0x22, 1, &[0x8000_0000, 0])
}

fn accelerator() -> Composer {
    Composer::express("accelerator-64gt-ide", 0x12_0000)
        .old(0x80, PM)
        .old(0xb0, MSI_X)
        .aer(0x100)
        .extended(0x150, 0x30, 1, &[0x0000_0001, 0, 0, 0, 0, 0, 0])
        .extended(0x180, 0x2e, 2, &[0, 0, 0, 0, 0])
        .extended(0x1a0, 0x2e, 2, &[3, 0, 0, 0, 0])
        .extended(0x1c0, 0x2f, 1, &[0, 0, 0])
        .extended(0x1d0, 0x31, 1, &[0, 0, 0, 0x7777_7777])
        .extended(0x1f0, 0x32, 1, &[0; 9])
        .extended(0x220, 0x33, 1, &[0; 5])
        .extended(0x240, 0x34, 1, &[0; 4])
        .extended(0x260, 0x10, 1, &[2, 0, 0x0010_0010, 0, 0x0001_0001, 0x10f2_0000, 0x553, 1])
        .extended(0x2a0, 0x24, 1, &[0x003f_f000, 0x0000_0820])
        .extended(0x2b0, 0x15, 1, &[0xffff_f000, 0x0000_2a20])
        .extended(0x2c0, 0x23, 1, &[0x0140_10f0, 1, 0, 0, 0])
        .extended(0x2e0, 0x2b, 1, &[0, 0, 0, 0])
}

fn root_port() -> Composer {
    Composer::new("root-port-dpc", 4096, 1, 0x06_0400)
        .put32(0x18, 0x0002_0100)
        .legacy(0x40, 0x0d, &[0, 0, 0xf4, 0x1a, 0x01, 0x11])
        .old(0x48, PM)
        .old(0x50, MSI_32)
        .legacy(0x60, 0x10, &[0x42, 0x01, 1, 0x80, 0, 0])
        .aer(0x100)
        .extended(0x148, 0x0d, 1, &[0x001d_005f])
        .extended(0x158, 0x1d, 1, &[0x1ac4, 0, 0, 0])
        .extended(0x198, 0x1f, 1, &[0x0000_0417, 0])
        .extended(0x1b0, 0x19, 1, &[0, 0, 0x7777_7777])
        .extended(0x1d0, 0x26, 1, &[0; 8])
        .extended(0x1f8, 0x27, 1, &[0; 5])
        .extended(0x220, 0x29, 1, &[0x7ff, 0, 0])
        .extended(0x240, 0x12, 1, &[0x3f, 0, 0, 0, 0, 0, 0, 0, 0, 0])
        .extended(0x280, 0x25, 1, &[0x8000_0001, 0])
        .extended(0x290, 0x2c, 1, &[0, 0, 0])
        .extended(0x2b0, 0x28, 1, &[0, 0])
}

fn event_collector() -> Composer {
    Composer::new("root-complex-event-collector", 4096, 0, 0x08_0700)
        .legacy(0x40, 0x10, &[0xa2, 0x00, 1, 0x80, 0, 0])
        .old(0x80, MSI_32)
        .aer(0x100)
        .extended(0x160, 0x07, 2, &[0x0000_00fe, 0x0002_0100])
        .extended(0x180, 0x05, 1, &[0x0101_0100, 0, 0, 0, 0x0001_0001, 0, 0xfed1_9000, 0])
        .extended(0x1c0, 0x06, 1, &[0, 0, 0])
        .extended(0x1e0, 0x0a, 1, &[0, 0, 0])
        .extended(0x200, 0x0c, 1, &[0])
}

fn cxl() -> Composer {
    let dvsec = |length: u32, id: u32| [length << 20 | 0x1e98, id];
    Composer::express("cxl-memory", 0x05_0210)
        .extended(0x100, 0x23, 1, &[dvsec(0x3c, 0)[0] | 2 << 16, 0, 0x001e, 0])
        .extended(0x140, 0x23, 1, &[dvsec(0x24, 8)[0], dvsec(0x24, 8)[1], 0, 0])
        .extended(0x170, 0x23, 1, &[dvsec(0x10, 5)[0], dvsec(0x10, 5)[1]])
        .extended(0x190, 0x2e, 1, &[0, 0, 0, 0, 0])
        .extended(0x1b0, 0x2d, 1, &[0, 0])
        .aer(0x200)
}

fn sata() -> Composer {
    Composer::new("sata-advanced-features", 256, 0, 0x01_0601)
        .old(0x80, MSI_32)
        .old(0x70, PM)
        .legacy(0xa8, 0x12, &[0x10, 0, 0x48, 0, 0, 0])
        .legacy(0xb0, 0x13, &[0x06, 0x03, 0, 0])
}

fn pci_x() -> Composer {
    // Version 2 with mode 2: extended config space exists without PCI Express.
    Composer::new("pci-x-266", 4096, 0, 0x01_0000)
        .legacy(0x50, 0x07, &[0x22, 0x30, 0x18, 0x02, 0xc3, 0x41, 0, 0, 0, 0])
        .old(0x80, PM)
        .old(0x90, VPD)
        .old(0xa0, MSI_32)
        .extended(0x100, 0x03, 1, &[7, 8])
        .extended(0x110, 0x04, 1, &[0, 0, 0])
}

fn agp() -> Composer {
    Composer::new("agp-graphics", 256, 0, 0x03_0000)
        .legacy(0x58, 0x02, &[0x30, 0, 0x07, 0x02, 0, 0x1f, 0, 0, 0, 0])
        .legacy(0x70, 0x0e, &[0x30, 0])
        .old(0x50, PM)
}

fn hyper_transport() -> Composer {
    Composer::new("hypertransport-bridge", 256, 1, 0x06_0400)
        .legacy(0x40, 0x08, &[0x03, 0xa8, 0, 0, 0, 0])
        .legacy(0x48, 0x08, &[0x80, 0x00, 0x10, 0, 0, 0])
        .legacy(0x60, 0x0d, &[0, 0, 0xf4, 0x1a, 0x00, 0x11])
        .legacy(0x70, 0x0f, &[0x0b, 0, 0, 0, 0, 0])
}

fn debug_port() -> Composer {
    Composer::new("usb-debug-port", 256, 0, 0x0c_0320).old(0x50, PM).legacy(0x58, 0x0a, &[0xa0, 0x20]).legacy(
        0x98,
        0x13,
        &[0x06, 0x03, 0, 0],
    )
}

fn compact_pci() -> Composer {
    Composer::new("compactpci-bridge", 256, 1, 0x06_0400)
        .legacy(0x80, 0x04, &[0x20, 1])
        .legacy(0x90, 0x06, &[0, 0])
        .legacy(0xa0, 0x0b, &[0, 0])
        .legacy(0xb0, 0x0c, &[0, 0, 0, 0, 0, 0])
        .old(0xc0, PM)
}

fn card_bus(size: usize) -> Composer {
    let (name, at) = if size == 128 { ("cardbus-bridge-128", 0x60) } else { ("cardbus-bridge", 0xa0) };
    // Where other headers have the pointer to the list, this one has the limit of a window.
    Composer::new(name, size, 2, 0x06_0700).put32(0x18, 0x2002_0200).put32(0x34, 0x0000_4ffc).old(at, PM)
}

fn allocation() -> Composer {
    Composer::express("enhanced-allocation", 0x02_0000)
        .legacy(0x80, 0x14, &[1, 0, 2, 0, 0x00, 0x80, 0, 0, 0xe0, 0xfe, 0xfc, 0xff, 0, 0])
        .legacy(0xa0, 0x15, &[0, 0, 0, 0, 0, 0])
        .legacy(0xc8, 0x00, &[0, 0])
        .old(0xd0, MSI_X)
        .extended(0x100, 0x21, 1, &[0, 0, 0])
        .extended(0x120, 0x20, 1, &[0, 0])
}

fn virtio() -> Composer {
    let part = |kind: u8, at: u8| [0x10, kind, 4, 0, 0, 0, 0, at, 0, 0, 0, 0x10, 0, 0];
    Composer::new("many-vendor-capabilities", 256, 0, 0xff_0000)
        .old(0xdc, MSI_X)
        .legacy(0x84, 0x09, &part(1, 0))
        .legacy(0x70, 0x09, &part(2, 0x10))
        .legacy(0x60, 0x09, &part(3, 0x20))
        .legacy(0x50, 0x09, &part(4, 0x30))
        .legacy(0x40, 0x09, &part(5, 0x40))
}

fn out_of_order() -> Composer {
    Composer::new("lists-out-of-order", 4096, 0, 0x02_0000)
        .legacy(0xe0, 0x10, &[2, 0, 0xe0, 0x8f, 0, 0x10])
        .old(0x40, PM)
        .old(0xd0, VPD)
        .old(0x50, MSI_64_MASK)
        .aer(0x100)
        .extended(0xf00, 0x03, 1, &[1, 2])
        .extended(0x400, 0x0e, 1, &[0])
        .extended(0xff8, 0x18, 1, &[0x1001_1001])
        .extended(0x200, 0x0d, 1, &[0])
}

fn no_lists() -> Composer {
    Composer::new("no-lists-64-bytes", 64, 0, 0x07_0002)
}

fn every_legacy_id() -> Composer {
    let ids = (0x01..=0x15).filter(|id| *id != 0x10);
    let first = Composer::express("every-legacy-id", 0xff_0000);
    // Eight bytes of zeros for each is little, but all that lspci looks at for most.
    ids.enumerate().fold(first, |composer, (index, id)| {
        composer.legacy(0x50 + 8 * index, id, if id == 0x09 { &[8, 0, 0, 0] } else { &[] })
    })
}

fn every_extended_id() -> Composer {
    (0x01..=0x34u16).fold(Composer::express("every-extended-id", 0xff_0000), |composer, id| {
        let length = if matches!(id, 0x0b | 0x23) { 0x0100_0000 } else { 0 };
        composer.extended(0xc0 + 0x40 * usize::from(id), id, (id % 16) as u8, &[length])
    })
}

fn most_legacy() -> Composer {
    (0..48usize).fold(Composer::new("most-legacy-capabilities", 256, 0, 0xff_0000), |composer, index| {
        composer.legacy(0x40 + 4 * index, 0x40 + index as u8, &[index as u8, 0xff])
    })
}

fn most_extended() -> Composer {
    (0..960usize).fold(Composer::express("most-extended-capabilities", 0xff_0000), |composer, index| {
        composer.extended(0x100 + 4 * index, 0x4000 + index as u16, (index % 16) as u8, &[])
    })
}

fn null_first() -> Composer {
    // How a function without its first capability keeps the others.
    Composer::express("first-extended-null", 0x02_0000).extended(0x100, 0, 0, &[]).aer(0x200).extended(
        0x300,
        0x03,
        1,
        &[1, 2],
    )
}

fn bridge() -> Composer {
    Composer::new("switch-downstream", 4096, 1, 0x06_0400)
        .put32(0x18, 0x0004_0302)
        .old(0x40, PM)
        .old(0x50, MSI_64_MASK)
        .legacy(0x70, 0x10, &[0x62, 0x01, 1, 0x80, 0, 0])
        .legacy(0xb0, 0x0d, &[0, 0, 0xf4, 0x1a, 0x02, 0x11])
        .extended(0x100, 0x03, 1, &[1, 2])
        .aer(0x140)
        .extended(0x200, 0x08, 1, &[0, 0, 0, 0, 0, 0])
        .extended(0x230, 0x09, 1, &[0, 0, 0, 0, 0, 0])
        .extended(0x260, 0x11, 1, &[0, 0])
        .extended(0x280, 0x1a, 1, &[0, 0])
        .extended(0x2a0, 0x1c, 1, &[0, 0])
}

fn last_bytes() -> Composer {
    Composer::express("capabilities-in-the-last-bytes", 0xff_0000)
        .legacy(0xfc, 0x09, &[4, 0])
        .extended(0x100, 0x0e, 1, &[0])
        .extended(0xffc, 0x4321, 0xf, &[])
}

fn unknown_ids() -> Composer {
    Composer::express("unknown-ids", 0xff_0000)
        .legacy(0x80, 0x77, &[1, 2])
        .legacy(0x90, 0xfe, &[3, 4])
        .extended(0x100, 0x7777, 3, &[1])
        .extended(0x110, 0xffff, 0xe, &[2])
}

fn isolated() -> Composer {
    Composer::express("virtual-function", 0x02_0000)
        .put32(0, u32::MAX)
        .put32(4, 0x0010_0000)
        .old(0x70, MSI_X)
        .extended(0x100, 0x0e, 1, &[0])
        .extended(0x110, 0x0f, 1, &[0x20])
        .extended(0x120, 0x0d, 1, &[0])
}
