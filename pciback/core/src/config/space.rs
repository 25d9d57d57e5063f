//! The virtual config space of one function.

use std::io;
use std::sync::Arc;

use super::access::{Access, ConfigSpace};
use super::bar::{Bar, BarKind};
use super::bytes::Bytes;
use super::compile::layout_hash;
use super::error::ConfigError;
use super::filter::{DWORDS, Filter, Model};
use super::function::FunctionSpec;
use super::image::FunctionImage;
use super::interrupts::{MsiCapability, MsixCapability};
use super::masked::MaskedWrites;
use crate::spec::{express, header, legacy, sriov};

/// What a write asks for beyond the bits it stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SideEffect {
    /// The guest asked for a function level reset. The host carries it out, then calls [`VirtualConfigSpace::reset`].
    FunctionLevelReset,
    /// Bits of Command changed, as the guest sees them.
    Command {
        /// Which.
        changed: u16,
        /// The bits of the register that the access covered, after it.
        value: u16,
    },
    /// The guest wrote MSI's Message Control. PV guests enable by protocol requests: nothing to do for them.
    MsiControl {
        /// The virtual register.
        value: u16,
    },
    /// The guest wrote MSI-X's Message Control. PV guests enable by protocol requests: nothing to do for them.
    MsixControl {
        /// The virtual register.
        value: u16,
    },
    /// The guest changed the power state it sees; hardware stays in D0.
    PowerState {
        /// 0-3: D0 to D3hot.
        state: u8,
    },
    /// The guest changed VF Enable of its PF; [`VirtualConfigSpace::guest_vfs`] says how many VFs it wants. The host creates or removes
    /// them.
    VfEnable,
    /// The guest wrote a register of the mailbox's Data Object Exchange. What it reads there next is said by
    /// [`VirtualConfigSpace::show_data_object`].
    DataObject {
        /// Where, in config space.
        offset: u16,
        /// What.
        value: u32,
        /// The bits that the access covered.
        mask: u32,
    },
    /// The guest wants a dword of VPD. The host reads it, then calls [`VirtualConfigSpace::show_vpd`].
    VpdRead {
        /// Where the capability's address register is.
        register: u16,
        /// Where the dword is in VPD, a multiple of 4.
        address: u16,
    },
}

/// The virtual config space of one function, for one guest.
#[derive(Debug)]
pub struct VirtualConfigSpace {
    filter: Arc<Filter>,
    image: FunctionImage,
    bars: Vec<Bar>,
    is_virtual: bool,
    masked: MaskedWrites,
}

/// A guest's write, seen from the dword that it falls into.
#[derive(Clone, Copy)]
struct Write {
    dword: u16,
    /// The bits that the guest wrote.
    mask: u32,
    value: u32,
}

impl Write {
    /// The part of it that falls into a register of this dword: its bits and mask from bit 0 on. `None` where it misses it.
    fn part(&self, offset: u16, width: u32) -> Option<(u32, u32)> {
        if offset & !3 != self.dword {
            return None;
        }
        let shift = 8 * u32::from(offset & 3);
        let mask = self.mask >> shift & (u32::MAX >> (32 - 8 * width));
        (mask != 0).then_some((self.value >> shift & mask, mask))
    }
}

impl VirtualConfigSpace {
    /// Starts for a new guest: overwrites the image.
    pub fn create(
        spec: &FunctionSpec,
        filter: Arc<Filter>,
        mut image: FunctionImage,
    ) -> Result<Self, ConfigError> {
        Self::check_layout(spec, &filter)?;
        let bars = Bar::of(spec);
        image.begin(spec.address, filter.layout)?;
        for (dword, hardware) in shown_by_hardware(spec, &bars).into_iter().enumerate() {
            let bits = filter.bits[dword];
            let value = (hardware & !bits.fixed | bits.value) & !bits.hw_read;
            image.set_reset_value(dword, value);
            image.set_shadow(dword, value);
            image.set_hardware_bits(dword, bits.hw_read);
        }
        image.complete();
        Ok(Self { filter, image, bars, is_virtual: spec.is_virtual(), masked: MaskedWrites::default() })
    }

    /// Makes it that of an HVM guest, whose firmware places the BARs and routes the line: both begin as 0, and are that again after
    /// a reset.
    pub fn unplace(&mut self) {
        let at = |offset: u16| usize::from(offset / 4);
        let mut masks = vec![(at(header::INTERRUPT_LINE), 0xff)];
        for bar in &self.bars {
            let mask = bar.address_mask();
            masks.push((at(bar.offset()), mask as u32));
            if bar.kind == BarKind::Memory64 {
                masks.push((at(bar.offset()) + 1, (mask >> 32) as u32));
            }
        }
        for (dword, mask) in masks {
            self.image.set_reset_value(dword, self.image.reset_value(dword) & !mask);
            self.image.set_shadow(dword, self.image.shadow(dword) & !mask);
        }
    }

    /// What the guest wrote into a BAR's register, or pair of registers.
    pub fn bar_register(&self, bar: &Bar) -> u64 {
        let dword = usize::from(bar.offset() / 4);
        let high = if bar.kind == BarKind::Memory64 { self.image.shadow(dword + 1) } else { 0 };
        u64::from(self.image.shadow(dword)) | u64::from(high) << 32
    }

    /// Takes over the image of a previous process of the service. An image of another version, boot, domain, function or layout,
    /// and one that holds impossible values, is an error. The filter may be another than that run's: see
    /// [`Self::replace_filter`].
    pub fn resume(
        spec: &FunctionSpec,
        filter: Arc<Filter>,
        image: FunctionImage,
        hw: &dyn ConfigSpace,
    ) -> Result<Self, ConfigError> {
        Self::check_layout(spec, &filter)?;
        image.check(spec.address, filter.layout)?;
        let (bars, is_virtual) = (Bar::of(spec), spec.is_virtual());
        let mut space = Self { bars, is_virtual, filter, image, masked: MaskedWrites::default() };
        space.adopt(hw).map_err(|source| ConfigError::Read { address: spec.address, source })?;
        Ok(space)
    }

    /// Puts another filter of the same function in force, between two accesses. Bits that were hardware's and become virtual
    /// begin as hardware shows them now; bits that were virtual and become hardware's show hardware, and what the guest wrote
    /// before never reaches it. When hardware cannot be read the old filter stays.
    pub fn replace_filter(&mut self, filter: Arc<Filter>, hw: &dyn ConfigSpace) -> io::Result<()> {
        if filter.layout != self.filter.layout {
            return Err(io::Error::other("the filter is for a function of another layout"));
        }
        let old = std::mem::replace(&mut self.filter, filter);
        let adopted = self.adopt(hw);
        if adopted.is_err() {
            self.filter = old;
        }
        adopted
    }

    /// Brings the image from the filter that it was written for to the one in force. Killed at any point, the next process does
    /// the same again with the same result.
    fn adopt(&mut self, hw: &dyn ConfigSpace) -> io::Result<()> {
        // Everything is read first: an error changes nothing.
        let mut seeds = Vec::new();
        for dword in 0..usize::from(self.filter.size) / 4 {
            let bits = self.filter.bits[dword];
            let to_shadow = self.image.hardware_bits(dword) & !bits.hw_read;
            // A guest that an earlier version served has its function switched on.
            let fixed = if dword == usize::from(header::COMMAND) / 4 { 0 } else { bits.fixed };
            if to_shadow & !fixed != 0 && !self.image.resetting() {
                let access = Access::new(4 * dword as u32, 4).map_err(io::Error::other)?;
                seeds.push((dword, to_shadow, hw.read(access)?));
            }
        }
        for (dword, to_shadow, hardware) in seeds {
            let seeded = |old: u32| old & !to_shadow | hardware & to_shadow;
            self.image.set_reset_value(dword, seeded(self.image.reset_value(dword)));
            self.image.set_shadow(dword, seeded(self.image.shadow(dword)));
        }
        // Bits that no guest can change are corrected: a damaged file must not open or move anything.
        for dword in 0..DWORDS {
            let bits = self.filter.bits[dword];
            let reset = (self.image.reset_value(dword) & !bits.fixed | bits.value) & !bits.hw_read;
            // What the guest has cleared of events stays cleared; bits that were no events before say nothing of that.
            let cleared = bits.events & self.image.hardware_bits(dword);
            let shadow = self.image.shadow(dword) & (bits.shadow_write | cleared)
                | reset & !bits.shadow_write & !bits.events;
            self.image.set_hardware_bits(dword, bits.hw_read);
            self.image.set_reset_value(dword, reset);
            self.image.set_shadow(dword, shadow);
        }
        Ok(())
    }

    fn check_layout(spec: &FunctionSpec, filter: &Filter) -> Result<(), ConfigError> {
        let function = layout_hash(spec);
        if filter.layout == function {
            return Ok(());
        }
        Err(ConfigError::LayoutMismatch { address: spec.address, filter: filter.layout, function })
    }

    /// What the guest reads. All ones while the function is being reset, and behind the end of its config space.
    pub fn read(&self, access: Access, hw: &dyn ConfigSpace) -> io::Result<u32> {
        if access.offset() >= self.filter.size || self.image.resetting() {
            return Ok(access.width().mask());
        }
        let dword = usize::from(access.dword() / 4);
        let (shift, mask) = (access.shift(), access.width().mask());
        let bits = self.filter.bits[dword];
        let from_hardware = bits.hw_read >> shift & mask;
        let shadow = self.image.shadow(dword) >> shift & mask;
        if from_hardware == 0 {
            return Ok(shadow);
        }
        let hardware = hw.read(access)?;
        let cleared = shadow & bits.events >> shift;
        if cleared & !hardware != 0 {
            // Hardware has been cleared, too: the next such event is a new one.
            self.image.clear_shadow_bits(dword, (cleared & !hardware) << shift);
        }
        Ok(hardware & from_hardware & !cleared | shadow & !from_hardware)
    }

    /// Carries out a guest's write: at most one read and one write of hardware, both of the guest's own width. Dropped while the
    /// function is being reset, and behind the end of its config space. When hardware fails nothing is stored.
    pub fn write(
        &mut self,
        access: Access,
        value: u32,
        hw: &dyn ConfigSpace,
    ) -> io::Result<Option<SideEffect>> {
        if access.offset() >= self.filter.size || self.image.resetting() {
            return Ok(None);
        }
        let shift = access.shift();
        let write = Write {
            dword: access.dword(),
            mask: access.width().mask() << shift,
            value: (value & access.width().mask()) << shift,
        };
        let index = usize::from(write.dword / 4);
        let bits = self.filter.bits[index];
        let to_hardware = (bits.hw_write | self.in_range(&write)) & write.mask & !self.withheld(&write);
        let cleared = self.image.shadow(index) & bits.events;
        let mut before = self.image.shadow(index) & !bits.events;
        let stored = bits.shadow_write & !self.locked(write.dword);
        let mut after = before & !(stored & write.mask) | write.value & stored;
        let clears_nothing = to_hardware & !bits.zero_merge == 0 && write.value & to_hardware == 0;
        let merged = write.mask & !to_hardware & !bits.zero_merge;
        let reaches = to_hardware != 0 && !clears_nothing;
        // Whether a write to bits that show hardware would change anything, only hardware knows.
        let masked = write.mask & !to_hardware & (bits.masked | bits.hw_write);
        let compared = masked & bits.hw_read & !bits.zero_merge;
        // The guest clears what hardware shows now, and nothing that comes later.
        let clearing = write.value & bits.events;
        let current = match reaches && merged != 0 || compared != 0 || clearing != 0 {
            true => hw.read(access)? << shift,
            false => 0,
        };
        if reaches {
            hw.write(access, (write.value & to_hardware | current & merged) >> shift)?;
            // What the guest sees of a register that was merged, before and after: `hw_read` bits are 0 in the shadow.
            before |= current & bits.hw_read;
            after |= (current & bits.hw_read & !to_hardware) | write.value & to_hardware;
        }
        let shown = (self.image.shadow(index) & !bits.events | current & bits.hw_read)
            & !(bits.hw_read & bits.zero_merge);
        let lost = masked & (write.value ^ shown);
        if lost != 0 {
            self.masked.note(write.dword, lost & bits.shadow_write, lost & !bits.shadow_write, write.value);
        }
        let cleared = match clearing != 0 {
            true => cleared & !write.mask | current & (cleared | clearing) & write.mask & bits.events,
            false => cleared,
        };
        if bits.shadow_write & write.mask != 0 || clearing != 0 {
            self.image.set_shadow(index, after & !bits.hw_read | cleared);
        }
        let models = &self.filter.models;
        let first = models.partition_point(|(offset, _)| *offset < write.dword);
        let here = models[first..].iter().take_while(|(offset, _)| *offset < write.dword + 4);
        Ok(here.filter_map(|(offset, model)| side_effect(*offset, *model, &write, before, after)).next())
    }

    /// Bits that pass only under a condition which this write does not meet. Power management of the link is switched off and
    /// never on (PCI Express 6.0, section 7.5.3.7). A VPD address passes when it is written as a whole
    /// and its flag is 0: a part of it would leave the flag as hardware holds it, which may start a write (PCI Express 6.0,
    /// section 7.9.18.2).
    fn withheld(&self, write: &Write) -> u32 {
        let mut withheld = 0;
        for (offset, model) in &self.filter.models {
            if *model == Model::LinkControl
                && let Some((value, mask)) = write.part(*offset, 2)
            {
                let set = value & mask & u32::from(express::LINK_POWER);
                withheld |= set << (8 * u32::from(*offset & 3));
            }
            if *model == Model::VpdAddress
                && let Some((value, mask)) = write.part(*offset, 2)
                && (mask != 0xffff || value & 0x8000 != 0)
            {
                withheld |= 0xffff << (8 * u32::from(*offset & 3));
            }
        }
        withheld
    }

    /// Bits of the guest's own that hardware gets, too, because of their value: Max_Read_Request_Size, where it is not above what the host
    /// set, and not below the Max_Payload_Size that the host set (PCI Express 6.0, section 7.5.3.4). Smaller requests harm no other function.
    fn in_range(&self, write: &Write) -> u32 {
        let mut passing = 0;
        for (offset, model) in &self.filter.models {
            let Some((value, mask)) = write.part(*offset, 2) else { continue };
            let field = u32::from(express::READ_REQUEST_SIZE);
            let sizes = field | u32::from(express::PAYLOAD_SIZE);
            let (index, shift) = (usize::from(*offset / 4), 8 * u32::from(*offset & 3));
            let bits = self.filter.bits[index];
            // A value that a policy gives says nothing of the host's.
            let own = (bits.shadow_write & !bits.fixed) >> shift;
            if *model != Model::ReadRequestSize || mask & field != field || own & sizes != sizes {
                continue;
            }
            let host = self.image.reset_value(index) >> shift;
            let payload = (host & u32::from(express::PAYLOAD_SIZE)) >> 5;
            let range = payload..=(host & field) >> 12;
            if range.contains(&((value & field) >> 12)) {
                passing |= field << shift;
            }
        }
        passing
    }

    /// The function's MSI capability, where it has one that the guest sees.
    pub fn msi(&self) -> Option<MsiCapability> {
        self.filter.msi
    }

    /// The function's MSI-X capability, where it has one that the guest sees.
    pub fn msix(&self) -> Option<MsixCapability> {
        self.filter.msix
    }

    /// The function's BARs, on the host.
    pub fn bars(&self) -> &[Bar] {
        &self.bars
    }

    /// Whether it is a VF: its BARs and Memory Space Enable are its PF's.
    pub fn is_virtual_function(&self) -> bool {
        self.is_virtual
    }

    /// Shows the guest a dword of VPD that it asked for, by the address register at this offset.
    pub fn show_vpd(&mut self, register: u16, data: u32) {
        if !self.filter.models.contains(&(register, Model::VpdRead)) {
            return;
        }
        let (dword, flag) = (usize::from(register / 4), 0x8000 << (8 * u32::from(register & 3)));
        self.image.set_shadow(dword + 1, data);
        self.image.set_shadow(dword, self.image.shadow(dword) | flag);
    }

    /// The host has read and cleared the events of hardware: what hardware shows from now on is new to the guest.
    pub fn events_cleared(&mut self) {
        for dword in 0..DWORDS {
            let events = self.filter.bits[dword].events;
            if events != 0 {
                self.image.clear_shadow_bits(dword, events);
            }
        }
    }

    /// What the guest reads of a register but for the bits that show hardware, which are 0.
    pub fn own_register(&self, offset: u16, bytes: u16) -> u32 {
        let dword = usize::from(offset) / 4;
        let own = self.image.shadow(dword) & !self.filter.bits[dword % DWORDS].events;
        let shifted = own >> (8 * u32::from(offset & 3));
        shifted & (u32::MAX >> (32 - 8 * u32::from(bytes.clamp(1, 4))))
    }

    /// Shows the guest that hardware did not take its Interrupt Disable.
    pub fn clear_interrupt_disable(&mut self) {
        let index = usize::from(header::COMMAND / 4);
        let bit = u32::from(header::COMMAND_INTERRUPT_DISABLE) & self.filter.bits[index].shadow_write;
        self.image.set_shadow(index, self.image.shadow(index) & !bit);
    }

    /// Sets what the guest reads as MSI Enable, after its protocol request was carried out.
    pub fn set_msi_enabled(&mut self, enabled: bool) {
        if let Some(msi) = self.filter.msi {
            self.set_control(msi.offset, legacy::MSI_ENABLE, enabled);
        }
    }

    /// Sets what the guest reads as MSI-X Enable, after its protocol request was carried out.
    pub fn set_msix_enabled(&mut self, enabled: bool) {
        if let Some(msix) = self.filter.msix {
            self.set_control(msix.offset, legacy::MSIX_ENABLE, enabled);
        }
    }

    fn set_control(&mut self, capability: u16, bit: u16, on: bool) {
        let offset = capability + legacy::MESSAGE_CONTROL;
        let bit = u32::from(bit) << (8 * u32::from(offset & 3));
        let index = usize::from(offset / 4);
        let bit = bit & self.filter.bits[index].shadow_write;
        let old = self.image.shadow(index);
        self.image.set_shadow(index, if on { old | bit } else { old & !bit });
    }

    /// What a function level reset does to what the guest sees: every virtual register is again as it was when the guest got the
    /// function. That includes BARs and interrupt line, which hardware would clear: the host restores its own after the
    /// reset, and a guest that does not restore them still finds the addresses it may map. VFs that the guest has created stay, and
    /// with them what their PF's SR-IOV capability says: other guests use them.
    pub fn reset(&mut self) {
        let kept = self.kept_over_reset();
        for dword in (0..DWORDS).filter(|dword| !kept.contains(dword)) {
            self.image.set_shadow(dword, self.image.reset_value(dword));
        }
    }

    /// What of the guest's writes did not reach hardware.
    pub fn masked_writes(&self) -> &MaskedWrites {
        &self.masked
    }

    /// The image: vectors, requests, the reset flag.
    pub fn image(&self) -> &FunctionImage {
        &self.image
    }

    /// The image, to note vectors and requests in.
    pub fn image_mut(&mut self) -> &mut FunctionImage {
        &mut self.image
    }

    /// The filter.
    pub fn filter(&self) -> &Arc<Filter> {
        &self.filter
    }
}

/// What a write to a register with a model asks for; `before` and `after` are the dword as the guest sees it.
fn side_effect(offset: u16, model: Model, write: &Write, before: u32, after: u32) -> Option<SideEffect> {
    let shift = 8 * u32::from(offset & 3);
    let width = match model {
        Model::AfControl => 1,
        Model::DataObject => 4,
        _ => 2,
    };
    let (value, mask) = write.part(offset, width)?;
    let (before, after) = ((before >> shift) as u16, (after >> shift) as u16);
    match model {
        Model::Command => {
            let changed = (before ^ after) & mask as u16;
            (changed != 0).then_some(SideEffect::Command { changed, value: after & mask as u16 })
        }
        Model::MsiControl => Some(SideEffect::MsiControl { value: after }),
        Model::MsixControl => Some(SideEffect::MsixControl { value: after }),
        Model::PowerState => {
            let state = (after & 3) as u8;
            ((before ^ after) & 3 != 0).then_some(SideEffect::PowerState { state })
        }
        Model::DeviceControl => {
            (value & u32::from(express::INITIATE_FLR) != 0).then_some(SideEffect::FunctionLevelReset)
        }
        Model::AfControl => (value & 1 != 0).then_some(SideEffect::FunctionLevelReset),
        Model::VpdRead => (mask == 0xffff && value & 0x8000 == 0)
            .then_some(SideEffect::VpdRead { register: offset, address: value as u16 & 0x7ffc }),
        Model::VfEnable => {
            let changed = (before ^ after) & mask as u16 & sriov::VF_ENABLE;
            (changed != 0).then_some(SideEffect::VfEnable)
        }
        Model::DataObject => Some(SideEffect::DataObject { offset, value, mask }),
        Model::VpdAddress | Model::LinkControl | Model::ReadRequestSize | Model::NumVfs => None,
    }
}

/// The function's dwords as its guest should find them where no rule says otherwise: what hardware shows, with the identity of a
/// VF, the host's addresses in the BARs, and the number of the interrupt line.
fn shown_by_hardware(spec: &FunctionSpec, bars: &[Bar]) -> [u32; DWORDS] {
    let mut dwords = [0; DWORDS];
    for (dword, bytes) in dwords.iter_mut().zip(spec.bytes.chunks_exact(4)) {
        *dword = bytes.dword(0);
    }
    let identity = &spec.identity;
    let at = |offset: u16| usize::from(offset / 4);
    dwords[at(header::VENDOR_ID)] = u32::from(identity.vendor) | u32::from(identity.device) << 16;
    dwords[at(header::REVISION_ID)] = u32::from(identity.revision) | identity.class << 8;
    dwords[at(header::SUBSYSTEM_VENDOR_ID)] =
        u32::from(identity.subsystem_vendor) | u32::from(identity.subsystem) << 16;
    dwords[at(header::BAR0)..at(header::BAR0) + 6].fill(0);
    dwords[at(header::ROM)] = 0;
    for bar in bars {
        let initial = bar.initial();
        dwords[at(bar.offset())] = initial as u32;
        if bar.kind == BarKind::Memory64 {
            dwords[at(bar.offset()) + 1] = (initial >> 32) as u32;
        }
    }
    // A line that does not fit the register is unknown to the guest (PCI 3.0, 6.2.4).
    let line = u8::try_from(spec.gsi).unwrap_or(0xff);
    let interrupt = &mut dwords[at(header::INTERRUPT_LINE)];
    *interrupt = *interrupt & !0xff | u32::from(line);
    dwords
}
