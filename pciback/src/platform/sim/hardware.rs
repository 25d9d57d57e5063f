//! How hardware treats writes to config space, derived from its registers: PCI Express 6.0, chapters 7 and 9.

use std::ops::Range;

/// Where the capabilities are that the simulation itself acts on.
#[derive(Debug, Clone, Default)]
pub(super) struct Layout {
    pub msi: Option<u16>,
    pub msix: Option<u16>,
    pub sriov: Option<u16>,
}

impl Layout {
    /// Clears MSI Enable and MSI-X Enable, which are 0 after power-up (sections 7.7.1.2 and 7.7.2.2): a dump of a function that its driver
    /// used has them set.
    pub fn disable_messages(&self, bytes: &mut [u8]) {
        // The high byte of Message Control of MSI-X, the low byte of MSI's.
        for (capability, at, enable) in [(self.msi, 2, 0x01), (self.msix, 3, 0x80)] {
            if let Some(control) = capability.and_then(|base| bytes.get_mut(usize::from(base + at))) {
                *control &= !enable;
            }
        }
    }
}

/// What a write does to each bit of config space.
#[derive(Debug, Clone)]
pub(super) struct Masks {
    /// Bits that keep what is written.
    pub writable: Vec<u8>,
    /// Bits that a written 1 clears.
    pub clear_on_one: Vec<u8>,
    /// The byte whose highest bit starts a function level reset.
    pub reset_trigger: Option<u16>,
    /// The byte of a bridge whose bit 6 resets what is below it.
    pub bus_reset: Option<u16>,
    /// What Linux saves before a reset.
    pub saved: Vec<Range<u16>>,
    pub layout: Layout,
}

/// Sizes of the ranges of a function: BAR 0-5, the expansion ROM, VF BAR 0-5.
pub(super) type Sizes = [u64; 13];

const BAR0: u16 = 0x10;
const ROM: u16 = 0x30;
/// In type 1 headers.
const BRIDGE_CONTROL: u16 = 0x3e;
/// A Device/Port Type (section 7.5.3.2).
const ROOT_PORT: u16 = 4;
/// VF BAR 0 in the SR-IOV capability.
pub(super) const VF_BAR0: u16 = 0x24;

impl Masks {
    /// The masks of a function that shows `bytes` and has ranges of these sizes. A VF's header and most of its controls are
    /// the PF's (sections 9.3.4 to 9.3.7): they read 0 and stay so.
    pub fn derive(bytes: &[u8], sizes: &Sizes, vf: bool) -> Self {
        let mut masks = Self {
            writable: vec![0; bytes.len()],
            clear_on_one: vec![0; bytes.len()],
            reset_trigger: None,
            bus_reset: None,
            saved: vec![0x04..0x06, 0x0c..0x40],
            layout: Layout::default(),
        };
        masks.clear(0x06, 0xf900);
        if vf {
            masks.write(0x04, 0x0004, 2);
        } else {
            masks.write(0x04, 0x0547, 2);
            masks.write(0x0c, 0xff, 1);
            masks.write(0x3c, 0xff, 1);
            if bridge(bytes) {
                masks.clear(0x1e, 0xf900);
                masks.write(BRIDGE_CONTROL, 0x0053, 2);
                masks.bus_reset = Some(BRIDGE_CONTROL);
                masks.bars(bytes, BAR0, &sizes[..2]);
            } else {
                masks.bars(bytes, BAR0, &sizes[..6]);
            }
            if sizes[6] != 0 && !bridge(bytes) {
                masks.write(ROM, !(sizes[6] - 1) & 0xffff_f800 | 1, 4);
            }
        }
        masks.legacy(bytes, vf);
        masks.extended(bytes, sizes, vf);
        masks
    }

    fn write(&mut self, at: u16, mask: u64, width: usize) {
        put(&mut self.writable, at, mask, width);
    }

    fn clear(&mut self, at: u16, mask: u64) {
        put(&mut self.clear_on_one, at, mask, 4);
    }

    fn bars(&mut self, bytes: &[u8], first: u16, sizes: &[u64]) {
        for (index, size) in (0u16..).zip(sizes).filter(|(_, size)| **size != 0) {
            let at = first + 4 * index;
            let kind = byte(bytes, at);
            let (fixed, width) = match kind & 7 {
                4 => (0xf, 8),
                kind if kind & 1 != 0 => (0x3, 4),
                _ => (0xf, 4),
            };
            self.write(at, !(size - 1) & !fixed, width);
        }
    }

    fn legacy(&mut self, bytes: &[u8], vf: bool) {
        let mut at = if word(bytes, 0x06) & 0x10 != 0 { u16::from(byte(bytes, 0x34)) & !3 } else { 0 };
        // 48 capabilities fill the space behind the header.
        for _ in 0..48 {
            if at < 0x40 {
                return;
            }
            match byte(bytes, at) {
                0x01 => {
                    let events = if word(bytes, at + 2) & 0xf800 != 0 { 0x100 } else { 0 };
                    self.write(at + 4, 0x0003 | events, 2);
                    self.clear(at + 4, if events != 0 { 0x8000 } else { 0 });
                }
                0x03 => {
                    self.write(at + 2, 0xffff, 2);
                    self.write(at + 4, 0xffff_ffff, 4);
                }
                0x05 => self.msi(bytes, at),
                0x10 => self.express(bytes, at, vf),
                0x11 => {
                    self.layout.msix = Some(at);
                    self.write(at + 2, 0xc000, 2);
                }
                _ => {}
            }
            at = u16::from(byte(bytes, at + 1)) & !3;
        }
    }

    fn msi(&mut self, bytes: &[u8], at: u16) {
        self.layout.msi = Some(at);
        let control = word(bytes, at + 2);
        let capable = (control >> 1 & 7).min(5);
        let enable_bits = if capable == 0 { 0 } else { 0x70 };
        self.write(at + 2, 0x0001 | enable_bits, 2);
        self.write(at + 4, 0xffff_fffc, 4);
        let data = if control & 0x80 != 0 { at + 12 } else { at + 8 };
        if data == at + 12 {
            self.write(at + 8, 0xffff_ffff, 4);
        }
        self.write(data, 0xffff, 2);
        if control & 0x100 != 0 {
            self.write(data + 4, (1u64 << (1 << capable)) - 1, 4);
        }
    }

    fn express(&mut self, bytes: &[u8], at: u16, vf: bool) {
        if double(bytes, at + 4) & 1 << 28 != 0 {
            // The bit itself reads 0.
            self.reset_trigger = Some(at + 9);
        }
        self.clear(at + 8, 0x000f_0000);
        if vf {
            return;
        }
        self.write(at + 8, 0x7fff, 2);
        self.write(at + 0x10, 0x03fb, 2);
        if word(bytes, at + 2) >> 4 & 0xf == ROOT_PORT {
            self.write(at + 0x1c, 0x001f, 2);
        }
        self.clear(at + 0x10, 0xc000_0000);
        self.saved.extend([at + 8..at + 10, at + 0x10..at + 0x12]);
        if word(bytes, at + 2) & 0xf >= 2 {
            self.write(at + 0x28, 0x031f, 2);
            self.write(at + 0x30, 0xffff, 2);
            self.saved.extend([at + 0x28..at + 0x2a, at + 0x30..at + 0x32]);
        }
    }

    fn extended(&mut self, bytes: &[u8], sizes: &Sizes, vf: bool) {
        let mut at = 0x100;
        // No more of at least 8 bytes fit.
        for _ in 0..480 {
            let header = double(bytes, at);
            if at < 0x100 || header == 0 || header == u32::MAX {
                return;
            }
            match header & 0xffff {
                0x01 => self.errors(bytes, at, vf),
                0x0d if !vf => self.write(at + 6, u64::from(word(bytes, at + 4) & 0x7f), 2),
                0x0e if !vf => self.write(at + 6, 0x0073, 2),
                0x0f => self.write(at + 6, if vf { 0x8000 } else { 0x801f }, 2),
                0x10 if !vf => self.sriov(bytes, at, sizes),
                0x13 => {
                    self.write(at + 4, 0x0003, 2);
                    self.clear(at + 4, 0x0003_0000);
                    self.write(at + 12, 0xffff_ffff, 4);
                }
                0x18 if !vf => self.write(at + 4, 0x1fff_1fff, 4),
                0x1b => self.write(at + 6, 0x0007, 2),
                _ => {}
            }
            at = (header >> 20) as u16 & !3;
        }
    }

    fn errors(&mut self, bytes: &[u8], at: u16, vf: bool) {
        // The bits this function knows are those it shows a severity or a mask for, and the ones every function has.
        let uncorrectable = 0x005f_f030 | double(bytes, at + 8) | double(bytes, at + 12);
        self.clear(at + 4, u64::from(uncorrectable));
        self.clear(at + 0x10, 0xf1c1);
        if vf {
            return;
        }
        self.write(at + 8, uncorrectable.into(), 4);
        self.write(at + 12, uncorrectable.into(), 4);
        self.write(at + 0x14, 0xf1c1, 4);
        self.write(at + 0x18, u64::from(double(bytes, at + 0x18) & 0xa0) << 1, 4);
        if bridge(bytes) {
            // Root Error Command and Status.
            self.write(at + 0x2c, 0x0007, 4);
            self.clear(at + 0x30, 0x0000_007f);
        }
        self.saved.extend([at + 8..at + 0x10, at + 0x14..at + 0x1c]);
    }

    fn sriov(&mut self, bytes: &[u8], at: u16, sizes: &Sizes) {
        self.layout.sriov = Some(at);
        self.write(at + 8, 0x001f, 2);
        self.write(at + 0x10, 0xffff, 2);
        self.write(at + 0x20, 0xffff_ffff, 4);
        // The register counts one VF's bytes, sysfs all VFs'.
        let total = u64::from(word(bytes, at + 0x0e)).max(1);
        let single: Vec<u64> = sizes[7..].iter().map(|size| size / total).collect();
        self.bars(bytes, at + VF_BAR0, &single);
        self.saved.extend([at + 8..at + 10, at + 0x10..at + 0x12, at + 0x20..at + 0x3c]);
    }
}

/// Whether the header is of type 1.
fn bridge(bytes: &[u8]) -> bool {
    byte(bytes, 0x0e) & 0x7f == 1
}

fn put(place: &mut [u8], at: u16, mask: u64, width: usize) {
    for (byte, bits) in place.iter_mut().skip(usize::from(at)).zip(&mask.to_le_bytes()[..width]) {
        *byte |= *bits;
    }
}

fn byte(bytes: &[u8], at: u16) -> u8 {
    bytes.get(usize::from(at)).copied().unwrap_or(0)
}

fn word(bytes: &[u8], at: u16) -> u16 {
    u16::from_le_bytes([byte(bytes, at), byte(bytes, at + 1)])
}

fn double(bytes: &[u8], at: u16) -> u32 {
    u32::from(word(bytes, at)) | u32::from(word(bytes, at + 2)) << 16
}

#[cfg(test)]
mod tests {
    use super::*;

    fn msi_function(control: u16) -> Masks {
        let mut bytes = vec![0; 256];
        bytes[6] = 0x10;
        bytes[0x34] = 0x50;
        bytes[0x50] = 5;
        bytes[0x52..0x54].copy_from_slice(&control.to_le_bytes());
        Masks::derive(&bytes, &[0; 13], false)
    }

    #[test]
    fn msi_registers_lie_where_the_control_word_says() {
        assert_eq!(msi_function(0x0000).writable[0x58..0x5c], [0xff, 0xff, 0, 0]);
        assert_eq!(msi_function(0x0080).writable[0x5c..0x60], [0xff, 0xff, 0, 0]);
        assert_eq!(msi_function(0x0184).writable[0x60..0x64], [0x0f, 0, 0, 0]);
        assert_eq!(msi_function(0x010a).writable[0x5c..0x60], [0xff; 4]);
    }

    #[test]
    fn a_list_that_bites_its_tail_ends() {
        let mut bytes = vec![0; 4096];
        bytes[6] = 0x10;
        bytes[0x34] = 0x40;
        bytes[0x41] = 0x40;
        bytes[0x100..0x104].copy_from_slice(&0x1001_0001u32.to_le_bytes());
        Masks::derive(&bytes, &[0; 13], false);
    }

    #[test]
    fn a_bar_keeps_only_the_address_bits_above_its_size() {
        let mut bytes = vec![0; 256];
        (bytes[0x10], bytes[0x18]) = (0x0c, 0x01);
        let mut sizes = [0; 13];
        (sizes[0], sizes[2]) = (1 << 33, 32);
        let masks = Masks::derive(&bytes, &sizes, false);
        assert_eq!(masks.writable[0x10..0x18], [0, 0, 0, 0, 0xfe, 0xff, 0xff, 0xff]);
        assert_eq!(masks.writable[0x18..0x1c], [0xe0, 0xff, 0xff, 0xff]);
    }
}
