//! Capability lists as one would follow them with a pencil: an oracle that shares no code with xpci.

/// Both lists of a config space: offset and id, the legacy one first.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Lists {
    pub legacy: Vec<(usize, u8)>,
    pub extended: Vec<(usize, u16)>,
}

fn dword(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// Follows both lists; what is wrong with one is the error.
pub fn follow(bytes: &[u8]) -> Result<Lists, String> {
    let mut lists = Lists::default();
    let end = bytes.len().min(256);
    let mut at = if bytes[6] & 0x10 != 0 { usize::from(bytes[0x34]) } else { 0 };
    while at != 0 {
        if !at.is_multiple_of(4)
            || at < 0x40
            || at + 4 > end
            || lists.legacy.iter().any(|(seen, _)| *seen == at)
        {
            return Err(format!("the legacy list leads to {at:#x}: {lists:x?}"));
        }
        lists.legacy.push((at, bytes[at]));
        at = usize::from(bytes[at + 1]);
    }
    if bytes.len() < 0x104 || matches!(dword(bytes, 0x100), 0 | u32::MAX) {
        return Ok(lists);
    }
    let mut at = 0x100usize;
    while at != 0 {
        if !at.is_multiple_of(4)
            || at < 0x100
            || at + 4 > bytes.len()
            || lists.extended.iter().any(|(seen, _)| *seen == at)
        {
            return Err(format!("the extended list leads to {at:#x}: {lists:x?}"));
        }
        let header = dword(bytes, at);
        lists.extended.push((at, header as u16));
        at = (header >> 20) as usize;
    }
    Ok(lists)
}

/// As [`follow`], but as far as a list can be followed, with low bits of pointers ignored: for hardware's lists.
pub fn follow_far(bytes: &[u8]) -> Lists {
    let mut lists = Lists::default();
    let end = bytes.len().min(256);
    let mut at = if bytes[6] & 0x10 != 0 { usize::from(bytes[0x34] & 0xfc) } else { 0 };
    while at >= 0x40 && at + 4 <= end && bytes[at] != 0xff && lists.legacy.iter().all(|(seen, _)| *seen != at)
    {
        lists.legacy.push((at, bytes[at]));
        at = usize::from(bytes[at + 1] & 0xfc);
    }
    let mut at = 0x100usize;
    while at >= 0x100
        && at + 4 <= bytes.len()
        && dword(bytes, at) != u32::MAX
        && lists.extended.iter().all(|(seen, _)| *seen != at)
    {
        let header = dword(bytes, at);
        if header == 0 && at == 0x100 {
            break;
        }
        lists.extended.push((at, header as u16));
        at = (header >> 20) as usize & !3;
    }
    lists
}

/// The bits that no guest's write may change on hardware, a byte each, whatever the lists look like.
pub fn guarded(bytes: &[u8]) -> Vec<u8> {
    let mut guarded = vec![0; bytes.len()];
    let mut guard = |from: usize, to: usize, mask: u8| {
        for byte in guarded.iter_mut().take(to).skip(from) {
            *byte |= mask;
        }
    };
    // Command but for bus mastering; class, BARs, subsystem, ROM, pointer, interrupt line. Status is the guest's to
    // clear.
    guard(0x00, 0x04, 0xff);
    guard(0x04, 0x05, 0xfb);
    guard(0x05, 0x06, 0xff);
    guard(0x08, 0x40, 0xff);
    let lists = follow_far(bytes);
    for (at, id) in &lists.legacy {
        match id {
            0x05 => {
                let control = bytes[at + 2];
                let length =
                    0x0a + usize::from(control & 0x80 != 0) * 4 + usize::from(bytes[at + 3] & 1) * 10;
                guard(at + 2, (at + length).min(256), 0xff);
            }
            0x11 => guard(at + 2, (at + 12).min(256), 0xff),
            _ => {}
        }
    }
    guarded
}

/// As [`guarded`], and the bits of other capabilities that are the host's. Only for lists without overlaps: the registers of
/// two capabilities at one place have no meaning that could be kept.
pub fn guarded_well_formed(bytes: &[u8]) -> Vec<u8> {
    let mut guarded = guarded(bytes);
    let mut guard = |from: usize, to: usize, mask: u8| {
        for byte in guarded.iter_mut().take(to).skip(from) {
            *byte |= mask;
        }
    };
    let lists = follow_far(bytes);
    for (at, id) in &lists.legacy {
        match id {
            // Power state and PME enable.
            0x01 => {
                guard(at + 4, at + 5, 0x03);
                guard(at + 5, at + 6, 0x01);
            }
            // VPD whole: the host reads it.
            0x03 => guard(at + 2, at + 8, 0xff),
            // Device Control but for relaxed ordering and no snoop, Link Control.
            0x10 => {
                guard(at + 8, at + 9, 0xef);
                guard(at + 9, at + 10, 0xf7);
                guard(at + 0x10, at + 0x12, 0xff);
            }
            0x13 => guard(at + 4, at + 5, 0xff),
            _ => {}
        }
    }
    for (at, id) in &lists.extended {
        match id {
            // SR-IOV whole, the controls of ACS, ATS, page requests and PASID, masks and severities of errors.
            0x10 => guard(at + 4, at + 0x40, 0xff),
            0x0d | 0x0f | 0x1b => guard(at + 6, at + 8, 0xff),
            0x13 => guard(at + 4, at + 6, 0xff),
            0x01 => {
                guard(at + 8, at + 0x10, 0xff);
                guard(at + 0x14, at + 0x18, 0xff);
            }
            0x15 | 0x24 => guard(at + 4, at + 0x0c, 0xff),
            _ => {}
        }
    }
    guarded
}
