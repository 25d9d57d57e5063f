//! Compiling built-in rules and policy into a filter.

use super::bar::{Bar, BarKind};
use super::bytes::Bytes;
use super::error::ConfigError;
use super::filter::{Bits, DWORDS, Deferred, Filter, Model, NamedRegister, RefusedOverride, Segment};
use super::function::{FunctionSpec, GuestRom};
use super::list::{Capability, CapabilityList, ListProblem, MsixFault};
use super::mailbox::{self, MailboxPlace};
use super::policy::{Initial, Policy, Rule, Treatment};
use super::rules::{self, Row};
use super::shape;
use crate::hash::Fnv;
use crate::spec::{AnyId, Kind, Register, header};

pub(super) const CONSTANT: &str = "cannot change: served without asking hardware";
pub(super) const STATUS: &str = "hardware's state: reading it changes nothing";
/// Why writes of 1 stay with the guest.
pub(super) const EVENT: &str =
    "an error or event: the guest clears its own view; the host clears hardware once it has read it";
const TRIGGER: &str = "reads 0; starting it is the host's";
const RESERVED: &str = "reserved: reads 0; writes leave hardware's bits as they are";
const RESERVED_ZERO: &str = "reserved: reads 0; writes carry 0";

/// Bits of Command that are virtual and that the service carries out.
const CARRIED_OUT: u16 = header::COMMAND_IO | header::COMMAND_MEMORY | header::COMMAND_INTERRUPT_DISABLE;

impl Filter {
    /// Compiles the built-in rules with `policy` laid over them.
    pub fn compile(spec: &FunctionSpec, policy: &Policy) -> Result<Self, ConfigError> {
        Self::compile_keeping(spec, policy, None)
    }

    /// The same for a function that a guest is using: it sees the capabilities at the offsets `visible` and no others, whatever the
    /// policy says, because its drivers have walked the list. What the policy would change of that is [`Filter::deferred`].
    pub fn compile_keeping(
        spec: &FunctionSpec,
        policy: &Policy,
        visible: Option<&[u16]>,
    ) -> Result<Self, ConfigError> {
        let address = spec.address;
        if spec.bytes.len() < usize::from(header::SIZE) {
            return Err(ConfigError::TooShort { address, bytes: spec.bytes.len() });
        }
        if spec.bytes.dword(header::COMMAND) == u32::MAX {
            return Err(ConfigError::NoAnswer { address });
        }
        let header_type = spec.bytes.byte(header::HEADER_TYPE) & !header::MULTI_FUNCTION;
        if header_type != 0 {
            return Err(ConfigError::HeaderType { address, header_type });
        }
        let mut compiler = Compiler::new(spec, policy, visible);
        compiler.header();
        compiler.bars();
        compiler.place_mailbox();
        compiler.capabilities();
        compiler.device();
        compiler.links();
        compiler.overrides();
        Ok(compiler.finish())
    }
}

/// Some bits at an offset.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    pub offset: u16,
    pub width: u8,
    pub mask: u32,
}

/// A place with what is known of it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Known {
    pub kind: Kind,
    pub register: Option<u16>,
    /// What the specification calls the bits.
    pub field: Option<&'static str>,
    pub guarded: bool,
}

/// What of a register's capability its rows need.
#[derive(Debug, Clone, Copy)]
pub(super) struct Family<'a> {
    /// Where the capability is; 0 for the header.
    pub base: u16,
    pub capability: Option<AnyId>,
    pub section: &'static str,
    pub controls: (Treatment, &'static str),
    pub events: (Treatment, &'static str),
    pub rows: &'a [Row],
    pub guarded: bool,
    /// The owner that the register's bytes must have.
    pub owner: u16,
}

/// Owner of the header's bytes; capabilities own theirs by their index.
pub(super) const HEADER_OWNER: u16 = u16::MAX;
/// Unknown bytes.
pub(super) const NO_OWNER: u16 = u16::MAX - 1;

pub(super) struct Compiler<'a> {
    pub spec: &'a FunctionSpec,
    pub policy: &'a Policy,
    /// The capabilities that the guest has seen, by offset.
    pub kept: Option<&'a [u16]>,
    pub deferred: Vec<Deferred>,
    pub list: CapabilityList,
    /// Where the MSI-X capability is whose structures have no usable place.
    pub msix_fault: Option<(u16, MsixFault)>,
    pub visible: Vec<bool>,
    pub owners: Vec<u16>,
    pub guarded: Vec<u32>,
    /// Bits that their specification reserves.
    pub reserved: Vec<u32>,
    pub models: Vec<(u16, Model)>,
    pub refused: Vec<RefusedOverride>,
    pub mailbox: Option<MailboxPlace>,
    pub mailbox_refused: Option<&'static str>,
    bits: Box<[Bits; DWORDS]>,
    segments: Vec<Vec<Segment>>,
    rules: Vec<Rule>,
    registers: Vec<NamedRegister>,
}

impl<'a> Compiler<'a> {
    fn new(spec: &'a FunctionSpec, policy: &'a Policy, kept: Option<&'a [u16]>) -> Self {
        let list = CapabilityList::walk(&spec.bytes);
        let msix = shape::msix(&list, &spec.bytes);
        let msix_fault =
            msix.and_then(|msix| Some((msix.offset, shape::msix_fault(&msix, &spec.resources)?)));
        let mut compiler = Self {
            visible: vec![true; list.capabilities.len()],
            spec,
            policy,
            kept,
            deferred: Vec::new(),
            list,
            msix_fault,
            owners: vec![NO_OWNER; DWORDS * 4],
            guarded: vec![0; DWORDS],
            reserved: vec![0; DWORDS],
            models: Vec::new(),
            refused: Vec::new(),
            mailbox: None,
            mailbox_refused: None,
            bits: Box::new([Bits::default(); DWORDS]),
            segments: vec![Vec::new(); DWORDS],
            rules: Vec::new(),
            registers: Vec::new(),
        };
        let (treatment, rule) = &policy.unknown;
        for dword in usize::from(header::SIZE) / 4..spec.bytes.len().min(DWORDS * 4) / 4 {
            let place = Place { offset: 4 * dword as u16, width: 4, mask: u32::MAX };
            let known = Known { kind: Kind::Control, register: None, field: None, guarded: false };
            compiler.set(place, known, *treatment, rule);
        }
        compiler.owners[..usize::from(header::SIZE)].fill(HEADER_OWNER);
        compiler
    }

    fn header(&mut self) {
        let rows = |is_virtual: bool| {
            rules::HEADER
                .iter()
                .filter(move |row| !(is_virtual && row.offset == header::COMMAND))
                .chain(if is_virtual { rules::VF_COMMAND } else { &[] })
        };
        let mut rows: Vec<Row> = rows(self.spec.is_virtual()).copied().collect();
        if !self.spec.has_line() {
            rows.push(rules::NO_LINE);
        }
        let family = Family {
            base: 0,
            capability: None,
            section: rules::HEADER_SECTION,
            controls: (Treatment::ReadOnly, STATUS),
            events: (Treatment::Event, EVENT),
            rows: &rows,
            guarded: true,
            owner: HEADER_OWNER,
        };
        for register in header::REGISTERS {
            self.register(register, &family);
        }
        // A guest that writes them has not lost anything: the service does what they say.
        self.bits[usize::from(header::COMMAND) / 4].masked &= !u32::from(CARRIED_OUT);
    }

    fn bars(&mut self) {
        let bars = Bar::of(self.spec);
        for dword in (header::BAR0..header::BAR0 + 24).step_by(4).chain([header::ROM]) {
            let name =
                if dword == header::ROM { "Expansion ROM Base Address" } else { "Base Address Register" };
            let register = self.name(dword, 4, name, None);
            let known = Known { kind: Kind::Constant, register: Some(register), field: None, guarded: true };
            let reason = match (dword == header::ROM, self.spec.rom) {
                (true, None) => rules::ROM_REASON,
                (true, Some(GuestRom::Copy(_))) => rules::ROM_COPY_REASON,
                (true, Some(GuestRom::OfHost)) => rules::HOST_ROM_REASON,
                (false, _) => "not implemented: reads 0",
            };
            let rule = Rule::built_in(reason, rules::HEADER_SECTION);
            self.set(Place { offset: dword, width: 4, mask: u32::MAX }, known, Treatment::ZERO, &rule);
            let Some((bar, high)) = bars.iter().find_map(|bar| match dword.checked_sub(bar.offset()) {
                Some(0) => Some((bar, false)),
                Some(4) if bar.kind == BarKind::Memory64 => Some((bar, true)),
                _ => None,
            }) else {
                continue;
            };
            if bar.kind == BarKind::Rom {
                self.rom(bar, known, &rule);
                continue;
            }
            let rule = Rule::built_in(rules::BAR_REASON, rules::HEADER_SECTION);
            let mask = (bar.address_mask() >> if high { 32 } else { 0 }) as u32;
            let place = |mask| Place { offset: dword, width: 4, mask };
            self.set(place(!mask), known, Treatment::Static, &rule);
            let known = Known { kind: Kind::Control, ..known };
            self.set(place(mask), known, Treatment::Virtual(Initial::Hardware), &rule);
        }
    }

    fn rom(&mut self, bar: &Bar, known: Known, rule: &Rule) {
        let known = Known { kind: Kind::Control, ..known };
        let place = |mask| Place { offset: header::ROM, width: 4, mask };
        let address = bar.address_mask() as u32;
        match self.spec.rom {
            None => {}
            Some(GuestRom::Copy(_)) => {
                self.set(place(address | header::ROM_ENABLE), known, Treatment::VIRTUAL, rule);
            }
            Some(GuestRom::OfHost) => {
                self.set(place(address), known, Treatment::Virtual(Initial::Hardware), rule);
                let rule = Rule::built_in(rules::HOST_ROM_ENABLE_REASON, rules::HEADER_SECTION);
                self.set(place(header::ROM_ENABLE), known, Treatment::Pass, &rule);
            }
        }
    }

    /// Applies one described register: rows where there are any, else what its fields' kinds say.
    pub(super) fn register(&mut self, register: &Register, family: &Family<'_>) {
        let Place { offset, width, mask } = self.owned(
            Place {
                offset: family.base.saturating_add(register.offset),
                width: register.width,
                mask: full(register.width),
            },
            family.owner,
        );
        if mask == 0 {
            return;
        }
        let index = self.name(offset, width, register.name, family.capability);
        let guarded = family.guarded;
        let known = |kind, field| Known { kind, register: Some(index), field, guarded };
        let mut reserved = mask;
        for field in register.fields {
            let field_mask = field.mask & mask;
            reserved &= !field_mask;
            let (treatment, reason) = match field.kind {
                Kind::Constant => (Treatment::Static, CONSTANT),
                Kind::Status => (Treatment::ReadOnly, STATUS),
                Kind::Rw1c => family.events,
                Kind::RsvdZ => (Treatment::ZERO, RESERVED_ZERO),
                Kind::Control => family.controls,
                Kind::Trigger => (Treatment::ZERO, TRIGGER),
            };
            let rule = Rule::built_in(reason, family.section);
            let place = Place { offset, width, mask: field_mask };
            self.set(place, known(field.kind, Some(field.name)), treatment, &rule);
            if field.kind == Kind::RsvdZ {
                self.reserve(place);
            }
            for row in family.rows.iter().filter(|row| row.offset == register.offset) {
                let rule = Rule::built_in(row.reason, family.section);
                let place = Place { offset, width, mask: row.mask & field_mask };
                self.set(place, known(field.kind, Some(field.name)), row.treatment, &rule);
            }
        }
        let rule = Rule::built_in(RESERVED, family.section);
        let place = Place { offset, width, mask: reserved };
        self.set(place, known(Kind::Constant, None), Treatment::ZERO, &rule);
        self.reserve(place);
    }

    fn reserve(&mut self, place: Place) {
        if let Some(reserved) = self.reserved.get_mut(usize::from(place.offset / 4)) {
            *reserved |= place.mask << (8 * u32::from(place.offset & 3));
        }
    }

    /// The bits of a place whose bytes belong to `owner`.
    pub(super) fn owned(&self, place: Place, owner: u16) -> Place {
        let mut mask = 0;
        for byte in 0..u16::from(place.width) {
            if self.owners.get(usize::from(place.offset + byte)) == Some(&owner) {
                mask |= 0xff << (8 * byte);
            }
        }
        Place { mask: place.mask & mask, ..place }
    }

    pub(super) fn name(
        &mut self,
        offset: u16,
        width: u8,
        name: &'static str,
        capability: Option<AnyId>,
    ) -> u16 {
        self.registers.push(NamedRegister { offset, width, name, capability });
        (self.registers.len() - 1) as u16
    }

    /// Sets the treatment of some bits and replaces the previous one.
    pub(super) fn set(&mut self, place: Place, known: Known, treatment: Treatment, rule: &Rule) {
        let shift = 8 * u32::from(place.offset & 3);
        let (dword, mask) = (usize::from(place.offset / 4), place.mask << shift);
        let (Some(bits), true) = (self.bits.get_mut(dword), mask != 0) else { return };
        let Bits { hw_read, hw_write, shadow_write, zero_merge, events, fixed, value, masked } = bits;
        for plane in [&mut *hw_read, hw_write, shadow_write, zero_merge, events, fixed, value, masked] {
            *plane &= !mask;
        }
        match treatment {
            Treatment::Pass => {
                *hw_read |= mask;
                *hw_write |= mask;
            }
            Treatment::Event => {
                *hw_read |= mask;
                *events |= mask;
            }
            Treatment::ReadOnly => *hw_read |= mask,
            Treatment::Static => {}
            Treatment::Virtual(initial) => {
                *shadow_write |= mask;
                if let Initial::Value(bits) = initial {
                    *fixed |= mask;
                    *value |= bits << shift & mask;
                }
            }
            Treatment::Fixed(bits) => {
                *fixed |= mask;
                *value |= bits << shift & mask;
            }
        }
        if matches!(known.kind, Kind::Rw1c | Kind::RsvdZ | Kind::Trigger) {
            *zero_merge |= mask;
        }
        let writable = matches!(known.kind, Kind::Control | Kind::Trigger | Kind::Rw1c);
        if writable && !matches!(treatment, Treatment::Pass | Treatment::Event) {
            *masked |= mask;
        }
        if known.guarded {
            self.guarded[dword] |= mask;
        }
        let rule = match self.rules.iter().position(|existing| existing == rule) {
            Some(index) => index,
            None => {
                self.rules.push(rule.clone());
                self.rules.len() - 1
            }
        } as u16;
        let treatment = match treatment {
            Treatment::Fixed(bits) => Treatment::Fixed(bits << shift & mask),
            Treatment::Virtual(Initial::Value(bits)) => {
                Treatment::Virtual(Initial::Value(bits << shift & mask))
            }
            other => other,
        };
        let segments = &mut self.segments[dword];
        for segment in segments.iter_mut() {
            segment.mask &= !mask;
        }
        segments.retain(|segment| segment.mask != 0);
        let Known { register, field, .. } = known;
        let segment = Segment { dword: 4 * dword as u16, mask, treatment, rule, register, field };
        match segments.iter_mut().find(|other| Segment { mask, ..**other } == segment) {
            Some(alike) => alike.mask |= mask,
            None => segments.push(segment),
        }
    }

    /// The segments that a place touches, each with its bits within the place and the bits that must not be written back.
    pub(super) fn pieces(&self, place: Place) -> Vec<(Segment, u32)> {
        let dword = usize::from(place.offset / 4);
        let mask = place.mask << (8 * u32::from(place.offset & 3));
        let zero_merge = self.bits[dword].zero_merge;
        let touched = self.segments[dword].iter().filter(|segment| segment.mask & mask != 0);
        touched.map(|segment| (Segment { mask: segment.mask & mask, ..*segment }, zero_merge)).collect()
    }

    /// Writes of the bits of a dword that are the guest's own are no lost ones.
    pub(super) fn carried_out_by_host(&mut self, dword: u16) {
        if let Some(bits) = self.bits.get_mut(usize::from(dword / 4)) {
            bits.masked &= !bits.shadow_write;
        }
    }

    /// Who reads VPD, now that policies have had their say.
    fn vpd(&mut self) {
        let bits = &mut self.bits;
        self.models.retain_mut(|(offset, model)| {
            if *model != Model::VpdRead {
                return true;
            }
            let (dword, shift) = (usize::from(*offset / 4), 8 * u32::from(*offset & 3));
            let (address, data) = (0xffff << shift, bits.get(dword + 1).map_or(0, |data| data.shadow_write));
            if bits[dword].shadow_write & address == address && data == u32::MAX {
                // A guest that writes an address has not lost anything: the host reads what is there.
                bits[dword].masked &= !address;
                return true;
            }
            *model = Model::VpdAddress;
            // A policy that lets the flag through wants writes of VPD.
            bits[dword].hw_write >> shift & 0x8000 == 0
        });
    }

    fn finish(mut self) -> Filter {
        let bytes = &self.spec.bytes;
        let crowding = self.list.crowding(bytes);
        self.list.problems.extend(crowding);
        let fault = self.msix_fault.map(|(at, fault)| ListProblem::Msix { at, fault });
        self.list.problems.extend(fault);
        self.vpd();
        self.models.sort_by_key(|(offset, _)| *offset);
        for segments in &mut self.segments {
            segments.sort_by_key(|segment| segment.mask.trailing_zeros());
        }
        let (visible, list) = (&self.visible, &self.list);
        let seen = |offset| {
            list.capabilities
                .iter()
                .zip(visible)
                .any(|(capability, seen)| capability.offset == offset && *seen)
        };
        let msi = shape::msi(list, bytes).filter(|msi| seen(msi.offset));
        let msix = shape::msix(list, bytes).filter(|msix| seen(msix.offset));
        let layout = layout_hash(self.spec);
        let mut hash = Fnv::new();
        hash.add(layout);
        for bits in self.bits.iter() {
            let Bits { hw_read, hw_write, shadow_write, zero_merge, events, fixed, value, .. } = *bits;
            for plane in [hw_read, hw_write, shadow_write, zero_merge, events, fixed, value] {
                hash.add(u64::from(plane));
            }
        }
        for (offset, model) in &self.models {
            hash.add(u64::from(*offset) << 8 | *model as u64);
        }
        if let Some(MailboxPlace { offset, peers }) = self.mailbox {
            hash.add(u64::from(offset) << 8 | u64::from(peers.guest) << 1 | u64::from(peers.dom0));
        }
        let capabilities: Vec<(Capability, bool)> =
            self.list.capabilities.into_iter().zip(self.visible).collect();
        Filter {
            bits: self.bits,
            guarded: self.guarded,
            size: self.spec.bytes.len().min(DWORDS * 4) as u16,
            layout,
            behaviour: hash.finish(),
            models: self.models,
            segments: self.segments.into_iter().flatten().collect(),
            rules: self.rules,
            registers: self.registers,
            capabilities,
            problems: self.list.problems,
            refused: self.refused,
            deferred: self.deferred,
            msi,
            msix,
            mailbox: self.mailbox,
            mailbox_refused: self.mailbox_refused,
        }
    }
}

impl Filter {
    /// Everything of a function that its filter is compiled from: functions that agree in these bytes, under one policy, can share
    /// one filter. It is the layout and the capabilities, whose lengths and variants stand in them.
    pub fn inputs(spec: &FunctionSpec) -> Vec<u8> {
        let mut inputs = Vec::with_capacity(1024);
        inputs.extend((spec.bytes.len() as u32).to_le_bytes());
        inputs.push(u8::from(spec.is_virtual()));
        inputs.push(u8::from(spec.has_line()));
        inputs.push(match spec.rom {
            None => 0,
            Some(GuestRom::Copy(_)) => 1,
            Some(GuestRom::OfHost) => 2,
        });
        inputs.extend(spec.identity.vendor.to_le_bytes());
        inputs.extend(spec.identity.class.to_le_bytes());
        inputs.push(spec.bytes.byte(header::HEADER_TYPE));
        // A pointer that leads nowhere is a problem only where there is a list.
        inputs.push(spec.bytes.byte(header::STATUS) & header::STATUS_CAPABILITIES as u8);
        inputs.push(spec.bytes.byte(header::CAPABILITIES_POINTER));
        for bar in Bar::of(spec) {
            inputs.push(bar.index);
            inputs.extend(bar.flags().to_le_bytes());
            inputs.extend(bar.address_mask().to_le_bytes());
        }
        let list = CapabilityList::walk(&spec.bytes);
        for capability in &list.capabilities {
            let extent = list.extent(capability, &spec.bytes);
            inputs.extend(capability.offset.to_le_bytes());
            inputs.extend(
                spec.bytes.get(usize::from(extent.start)..usize::from(extent.end)).unwrap_or_default(),
            );
        }
        inputs.extend(mailbox::place(spec, &list).unwrap_or_default().to_le_bytes());
        inputs
    }
}

/// All bits of a width.
pub(super) const fn full(width: u8) -> u32 {
    u32::MAX >> (32 - 8 * width as u32)
}

/// A hash of what of a function decides where its registers are: the same for all VFs of a PF.
pub(super) fn layout_hash(spec: &FunctionSpec) -> u64 {
    let mut hash = Fnv::new();
    hash.add(spec.bytes.len() as u64);
    hash.add(u64::from(spec.is_virtual()));
    let list = CapabilityList::walk(&spec.bytes);
    for capability in &list.capabilities {
        let id = match capability.id {
            AnyId::Legacy(id) => u64::from(id.0),
            AnyId::Extended(id) => 1 << 16 | u64::from(id.0),
        };
        let extent = list.extent(capability, &spec.bytes);
        hash.add(id << 32 | u64::from(extent.start) << 16 | u64::from(extent.end));
    }
    for bar in Bar::of(spec) {
        hash.add(u64::from(bar.index) << 32 | u64::from(bar.flags()));
        hash.add(bar.address_mask());
    }
    hash.finish()
}
