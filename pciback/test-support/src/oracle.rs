//! What a guest should see, byte by byte and bit by bit, written from the meaning of registers and not from the tables.
//!
//! It knows nothing of the library: the library's own tests and those of real frontends in the lab use it.

/// What one byte is to a guest. Bits in no mask are constant.
#[derive(Debug, Clone, Copy, Default)]
struct Cell {
    /// Bits that show hardware.
    shown: u8,
    /// Bits that a write takes to hardware.
    passed: u8,
    /// Of these, bits that go to hardware only as 0.
    falling: u8,
    /// Bits that are the guest's own.
    own: u8,
    /// Bits that hardware sets, and that a guest's write of 1 clears for the guest and not for hardware.
    events: u8,
    /// Of these, those that the guest has cleared since hardware set them.
    cleared: u8,
    /// What the guest reads in bits that do not show hardware.
    value: u8,
}

/// A model of one function. It has hardware of its own, so that both can be compared after each write.
pub struct Oracle {
    cells: Vec<Cell>,
    /// What hardware holds.
    pub bytes: Vec<u8>,
    writable: Vec<u8>,
    cleared_by_one: Vec<u8>,
    /// Where VPD's address is.
    vpd: Option<usize>,
    /// The address in VPD that the last write asked the host for.
    pub vpd_asked: Option<u16>,
    /// Where Device Control is, and the sizes of payload and read requests that the host set, as their fields have them.
    sizes: Option<(usize, u8, u8)>,
    /// Bytes and bits that start a function level reset.
    resets: Vec<(usize, u8)>,
    /// Where a bit locks other bytes while it is 1: its byte, the bit, and the first and the number of these bytes.
    lock: Option<(usize, u8, usize, usize)>,
}

impl Oracle {
    /// For hardware with these bytes, of which these bits can be written and these are cleared by ones. Everything from 0x40 on
    /// passes; the header is constant 0 until it is said what it is.
    pub fn new(bytes: Vec<u8>, writable: Vec<u8>, cleared_by_one: Vec<u8>) -> Self {
        let mut cells = vec![Cell { shown: 0xff, passed: 0xff, ..Cell::default() }; bytes.len()];
        cells[..0x40].fill(Cell::default());
        Self {
            cells,
            bytes,
            writable,
            cleared_by_one,
            vpd: None,
            vpd_asked: None,
            sizes: None,
            resets: Vec::new(),
            lock: None,
        }
    }

    fn each(
        &mut self,
        at: usize,
        length: usize,
        bits: u64,
        change: impl Fn(&mut Cell, u8, usize),
    ) -> &mut Self {
        assert!(length <= 8 || bits == 0, "{length} bytes at {at:#x} have more bits than a mask");
        for index in 0..length {
            change(&mut self.cells[at + index], bits.checked_shr(8 * index as u32).unwrap_or(0) as u8, index);
        }
        self
    }

    /// The guest always reads these bytes.
    pub fn constant(&mut self, at: usize, bytes: &[u8]) -> &mut Self {
        self.each(at, bytes.len(), 0, |cell, _, index| {
            *cell = Cell { value: bytes[index], ..Cell::default() }
        })
    }

    /// Always as hardware was at first.
    pub fn frozen(&mut self, at: usize, length: usize) -> &mut Self {
        let bytes = self.bytes[at..at + length].to_vec();
        self.constant(at, &bytes)
    }

    /// All bits always read 0.
    pub fn zero(&mut self, at: usize, length: usize) -> &mut Self {
        self.constant(at, &vec![0; length])
    }

    /// These bits are the guest's own and begin as `value`; the others stay as they are.
    pub fn own(&mut self, at: usize, length: usize, bits: u64, value: u64) -> &mut Self {
        self.each(at, length, bits, |cell, bits, index| {
            let begin = (value >> (8 * index)) as u8;
            cell.shown &= !bits;
            cell.passed &= !bits;
            cell.own |= bits;
            cell.value = cell.value & !bits | begin & bits;
        })
    }

    /// These bits are the guest's own and begin as hardware was at first.
    pub fn kept(&mut self, at: usize, length: usize, bits: u64) -> &mut Self {
        let value = self.at_first(at, length);
        self.own(at, length, bits, value)
    }

    /// These bits always read as hardware was at first.
    pub fn frozen_bits(&mut self, at: usize, length: usize, bits: u64) -> &mut Self {
        let value = self.at_first(at, length);
        self.own(at, length, bits, value).each(at, length, bits, |cell, bits, _| cell.own &= !bits)
    }

    fn at_first(&self, at: usize, length: usize) -> u64 {
        self.bytes[at..at + length].iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
    }

    /// These bits are hardware's, both ways (clearing events by ones included).
    pub fn hardware(&mut self, at: usize, length: usize, bits: u64) -> &mut Self {
        self.each(at, length, bits, |cell, bits, _| {
            cell.shown |= bits;
            cell.passed |= bits;
            cell.own &= !bits;
            cell.value &= !bits;
        })
    }

    /// These bits report events of hardware, and the guest clears its own view of them.
    pub fn events(&mut self, at: usize, length: usize, bits: u64) -> &mut Self {
        self.shown(at, length, bits).each(at, length, bits, |cell, bits, _| cell.events |= bits)
    }

    /// These bits are hardware's and can be cleared, not set.
    pub fn falling(&mut self, at: usize, length: usize, bits: u64) -> &mut Self {
        self.hardware(at, length, bits).each(at, length, bits, |cell, bits, _| cell.falling |= bits)
    }

    /// These bits of the guest's own cannot be written after all.
    pub fn never(&mut self, at: usize, length: usize, bits: u64) -> &mut Self {
        self.each(at, length, bits, |cell, bits, _| cell.own &= !bits)
    }

    /// These bits show hardware and cannot be written.
    pub fn shown(&mut self, at: usize, length: usize, bits: u64) -> &mut Self {
        self.each(at, length, bits, |cell, bits, _| {
            cell.shown |= bits;
            cell.passed &= !bits;
            cell.own &= !bits;
            cell.value &= !bits;
        })
    }

    /// These constant bits read 1.
    pub fn one(&mut self, at: usize, bits: u8) -> &mut Self {
        self.cells[at].value |= bits;
        self
    }

    /// Vital product data: the registers are the guest's own, and the host reads what a whole address without the flag asks for.
    pub fn vpd(&mut self, at: usize) -> &mut Self {
        self.own(at + 2, 6, u64::MAX, 0);
        self.vpd = Some(at + 2);
        self
    }

    /// The host has read what was asked for: the flag is 1.
    pub fn vpd_read(&mut self, data: u32) {
        let Some(vpd) = self.vpd else { return };
        self.cells[vpd + 1].value |= 0x80;
        for (cell, byte) in self.cells[vpd + 2..].iter_mut().zip(data.to_le_bytes()) {
            cell.value = byte;
        }
    }

    /// Device Control: a size of read requests between the host's payload size and the host's own reaches hardware.
    pub fn sizes(&mut self, at: usize) -> &mut Self {
        self.sizes = Some((at, self.bytes[at] >> 5, self.bytes[at + 1] >> 4 & 7));
        self
    }

    /// A 1 in this bit starts a function level reset.
    pub fn reset_bit(&mut self, at: usize, bit: u8) -> &mut Self {
        self.resets.push((at, bit));
        self
    }

    /// While this bit of the guest's own is 1, bytes of its own cannot be written.
    pub fn lock(&mut self, at: usize, bit: u8, first: usize, length: usize) -> &mut Self {
        self.lock = Some((at, bit, first, length));
        self
    }

    /// What the guest reads; all ones behind the end.
    pub fn read(&self, at: usize, length: usize) -> u32 {
        let mut value = 0;
        for index in (0..length).rev() {
            let byte = match self.cells.get(at + index) {
                Some(cell) => {
                    let hardware = self.bytes[at + index] & !(cell.cleared & cell.events);
                    hardware & cell.shown | cell.value & !cell.shown
                }
                None => 0xff,
            };
            value = value << 8 | u32::from(byte);
        }
        value
    }

    /// Writes; `true` when the guest asked for a function level reset.
    pub fn write(&mut self, at: usize, length: usize, value: u32) -> bool {
        let written = value.to_le_bytes();
        let mut reset = false;
        let locked = match self.lock {
            Some((at, bit, first, length)) if self.cells[at].value & bit != 0 => first..first + length,
            _ => 0..0,
        };
        for (at, byte) in (at..at + length).zip(written) {
            let Some(cell) = self.cells.get_mut(at) else { return false };
            let own = if locked.contains(&at) { 0 } else { cell.own };
            cell.value = cell.value & !own | byte & own;
            // What hardware does not show the guest cannot clear; what hardware shows no more is forgotten.
            cell.cleared = (cell.cleared | byte & cell.events) & self.bytes[at];
            let events = cell.passed & self.cleared_by_one[at] & byte;
            let stored = cell.passed & self.writable[at] & !(cell.falling & byte);
            self.bytes[at] = self.bytes[at] & !events & !stored | byte & stored;
            reset |= self.resets.iter().any(|(place, bit)| *place == at && byte & bit != 0);
        }
        if let Some((control, payload, request)) = self.sizes
            && (at..at + length).contains(&(control + 1))
        {
            let wanted = written[control + 1 - at] >> 4 & 7;
            let byte = &mut self.bytes[control + 1];
            if (payload..=request).contains(&wanted) {
                let field = 0x70 & self.writable[control + 1];
                *byte = *byte & !field | wanted << 4 & field;
            }
        }
        let whole = |vpd: &usize| at <= *vpd && *vpd + 2 <= at + length;
        let address = self.vpd.filter(whole).map(|vpd| (value >> (8 * (vpd - at))) as u16);
        // VPD is addressed in dwords.
        self.vpd_asked = address.filter(|address| *address < 0x8000).map(|address| address / 4 * 4);
        reset
    }
}
