//! Compiling: the capabilities, the links between them, and what a policy lays over them.

use super::bytes::Bytes;
use super::compile::{CONSTANT, Compiler, Family, HEADER_OWNER, Known, NO_OWNER, Place, STATUS, full};
use super::filter::{Deferred, Model, RefusedOverride, Segment};
use super::list::Capability;
use super::policy::{self, CapabilityAction, Rule, Treatment};
use super::rules::{self, CapabilityRules};
use crate::spec::{
    self, AnyId, CapabilityId, CapabilitySpec, Count, ExtendedCapabilityId, Group, Kind, Stride, express,
    header, legacy,
};

const NO_PLACE: &str = "its table and its pending bits have no usable place";
const BURIED: &str = "its header stands within another capability: no list can lead to it";
const LINKED: &str = "the list leads only to capabilities that the guest sees";

/// The CXL Consortium as DVSEC Vendor ID.
const CXL: u16 = 0x1e98;
const CXL_REASON: &str = "memory ranges, caches and resets of CXL are the host's";
/// Where a vendor's registers begin in a Designated Vendor-Specific capability (PCI Express 6.0, section 7.9.6).
const DVSEC_REGISTERS: u16 = 0x0a;

impl Compiler<'_> {
    pub(super) fn capabilities(&mut self) {
        let capabilities = self.list.capabilities.clone();
        // Guarded capabilities own their bytes first, then known ones: a header that stands within one, on a malformed list, must
        // not open it.
        let rank = |capability: &Capability| match spec::capability(capability.id) {
            Some(_) if rules::is_guarded(capability.id) => 0,
            Some(spec) if spec.is_specified() => 1,
            _ => 2,
        };
        for wanted in 0..=2 {
            for (index, capability) in capabilities.iter().enumerate() {
                if rank(capability) == wanted {
                    for byte in self.list.extent(capability, &self.spec.bytes) {
                        if let Some(owner @ &mut NO_OWNER) = self.owners.get_mut(usize::from(byte)) {
                            *owner = index as u16;
                        }
                    }
                }
            }
        }
        for (index, capability) in capabilities.iter().enumerate() {
            self.capability(index, capability);
        }
    }

    fn capability(&mut self, index: usize, capability: &Capability) {
        if self.mailbox.is_some_and(|mailbox| mailbox.offset == capability.offset) {
            return self.mailbox_registers(capability, index as u16);
        }
        let bytes = &self.spec.bytes;
        let meant = |which: &policy::Selector| which.selects(capability.id, capability.offset, bytes);
        let policy = self.policy.capabilities.iter().rev().find(|entry| meant(&entry.which)).cloned();
        let known = spec::capability(capability.id).zip(rules::rules(capability.id));
        let owner = index as u16;
        let header =
            Place { offset: capability.offset, width: header_bytes(capability) as u8, mask: u32::MAX };
        let has_header = self.owned(header, owner).mask == full(header.width);
        let action = policy.as_ref().map(|policy| policy.action);
        let by_guest = self.by_guest(capability, action);
        let hidden = match (&policy, known) {
            _ if self.policy.virtual_functions.is_some() && by_guest.is_some() => None,
            (Some(policy), _) if policy.action == CapabilityAction::Hide => Some(policy.rule.clone()),
            (Some(_), _) => None,
            (None, Some((spec, rules))) => {
                let reason = rules.hidden.or_else(|| self.is_faulty_msix(capability).then_some(NO_PLACE));
                let hidden = reason.map(|reason| Rule::built_in(reason, spec.section));
                // Only the vendor knows what is there.
                hidden.or_else(|| self.policy.hide_unknown.clone().filter(|_| spec.rest.is_none()))
            }
            (None, None) => self.policy.hide_unknown.clone(),
        };
        let hidden = if has_header {
            self.keep_visibility(capability, hidden)
        } else {
            // What the guest would find there is the other capability's, id and pointer too, whatever it has seen.
            Some(Rule::built_in(BURIED, "PCI Express 6.0, 7.5.1.1.11 and 7.6.3"))
        };
        if let Some(rule) = hidden {
            self.visible[index] = false;
            self.fill(capability, 0, owner, Kind::Constant, "hidden", Treatment::ZERO, &rule);
            self.guard_hidden(capability, owner);
            return;
        }
        if let (Some(by_guest), Some((spec, _))) = (&by_guest, known) {
            self.virtual_functions(capability, owner, spec, by_guest);
            return;
        }
        if let Some((spec, rules)) = known {
            self.known(capability, owner, spec, rules);
        }
        if let Some(policy::CapabilityOverride { action: CapabilityAction::Treat(treatment), rule, .. }) =
            policy
        {
            match known {
                Some((_, rules)) if rules.guarded => {}
                Some(_) => self.treat(capability, owner, treatment, &rule),
                None => {
                    let from = header_bytes(capability);
                    self.fill(capability, from, owner, Kind::Control, "register", treatment, &rule);
                }
            }
        }
    }

    fn is_faulty_msix(&self, capability: &Capability) -> bool {
        self.msix_fault.is_some_and(|(at, _)| at == capability.offset)
    }

    /// What is behind a hidden capability is hardware's all the same: what no policy opens of a visible one stays closed.
    fn guard_hidden(&mut self, capability: &Capability, owner: u16) {
        if rules::is_guarded(capability.id) {
            for place in self.dwords(capability, 0, owner) {
                self.guarded[usize::from(place.offset / 4)] |= place.mask;
            }
        }
        if let Some((place, model)) = self.carried_out(capability)
            && self.owned(place, owner).mask == place.mask
        {
            self.guard_reset(place, model);
        }
    }

    /// The registers of known devices, where no capability has them.
    pub(super) fn device(&mut self) {
        if self.spec.is_virtual() {
            return;
        }
        for rules in rules::device_rules(&self.spec.identity) {
            let mut named = None;
            for (name, width, row) in rules.registers {
                let whole = Place { offset: row.offset, width: *width, mask: full(*width) };
                let inside = usize::from(row.offset) + usize::from(*width) <= self.spec.bytes.len();
                if !inside || self.owned(whole, NO_OWNER).mask != whole.mask {
                    continue;
                }
                let register = match named {
                    Some((offset, register)) if offset == row.offset => register,
                    _ => {
                        let register = self.name(row.offset, *width, name, None);
                        let (treatment, rule) = &self.policy.unknown;
                        self.set(whole, control(register), *treatment, rule);
                        register
                    }
                };
                named = Some((row.offset, register));
                let rule = Rule::built_in(row.reason, rules.section);
                self.set(Place { mask: row.mask, ..whole }, control(register), row.treatment, &rule);
            }
        }
    }

    /// A guest that uses the function continues to see the same capabilities.
    fn keep_visibility(&mut self, capability: &Capability, hidden: Option<Rule>) -> Option<Rule> {
        let Some(kept) = self.kept else { return hidden };
        let seen = kept.contains(&capability.offset);
        if seen != hidden.is_none() {
            self.deferred.push(Deferred { capability: *capability, show: hidden.is_none() });
        }
        let waits = || Rule::built_in("its guest has not seen it: it appears with the next attach", "xpci");
        if seen { None } else { Some(hidden.unwrap_or_else(waits)) }
    }

    /// Treats the registers of a known capability alike, but for its header and what is guarded or reserved.
    fn treat(&mut self, capability: &Capability, owner: u16, treatment: Treatment, rule: &Rule) {
        for mut place in self.dwords(capability, header_bytes(capability), owner) {
            let dword = usize::from(place.offset / 4);
            place.mask &= !self.guarded[dword] & !self.reserved[dword];
            self.relay(place, treatment, rule);
        }
    }

    /// The dwords of a capability, each with the bits from its byte `from` on that are its own.
    fn dwords(&self, capability: &Capability, from: u16, owner: u16) -> Vec<Place> {
        let extent = self.list.extent(capability, &self.spec.bytes);
        let start = extent.start.saturating_add(from);
        let dwords = extent.step_by(4).map(|offset| {
            let place = self.owned(Place { offset, width: 4, mask: u32::MAX }, owner);
            let before = 8 * u32::from(start.saturating_sub(offset));
            Place { mask: place.mask & u32::MAX.checked_shl(before).unwrap_or(0), ..place }
        });
        dwords.filter(|place| place.mask != 0).collect()
    }

    fn known(
        &mut self,
        capability: &Capability,
        owner: u16,
        spec: &'static CapabilitySpec,
        rules: &'static CapabilityRules,
    ) {
        // What only its vendor knows stays as the policy treats unknown bytes.
        if let Some(rest) = spec.rest {
            let (treatment, reason) = match rest {
                Kind::Constant => (Treatment::Static, CONSTANT),
                Kind::Control => rules.controls,
                _ => (Treatment::ReadOnly, STATUS),
            };
            let rule = Rule::built_in(reason, spec.section);
            let from = header_bytes(capability);
            self.fill(capability, from, owner, rest, "further registers", treatment, &rule);
        }
        let family = Family {
            base: capability.offset,
            capability: Some(capability.id),
            section: spec.section,
            controls: rules.controls,
            events: rules.events,
            rows: rules.rows,
            guarded: rules.guarded,
            owner,
        };
        for register in spec.registers {
            self.register(register, &family);
        }
        let end = self.list.extent(capability, &self.spec.bytes).end;
        self.groups(spec.groups, &family, end);
        if capability.id == AnyId::Legacy(CapabilityId::MSI) {
            self.msi(capability, owner, &family);
        }
        if capability.id == AnyId::Extended(ExtendedCapabilityId::DVSEC)
            && self.spec.bytes.word(capability.offset.saturating_add(4)) == CXL
        {
            let rule = Rule::built_in(CXL_REASON, "Compute Express Link 3.1, 8.1.3");
            let (kind, treatment) = (Kind::Control, Treatment::ReadOnly);
            self.fill(capability, DVSEC_REGISTERS, owner, kind, "CXL register", treatment, &rule);
        }
        self.models(capability, owner);
    }

    /// Groups of registers, as often as the capability says and no further than to its end.
    fn groups(&mut self, groups: &[Group], family: &Family<'_>, end: u16) {
        let mut next = family.base;
        for group in groups {
            let mut at = group.first.map_or(next, |first| family.base.saturating_add(first));
            for _ in 0..self.count(&group.count, family.base, at, end) {
                if at >= end {
                    break;
                }
                let stride = self.stride(group.stride, at);
                let limit = if stride == 0 { end } else { end.min(at.saturating_add(stride)) };
                // Rows name registers by where they are in the capability, which repeated ones are not.
                let rows = if at == family.base { family.rows } else { &[] };
                let one = Family { base: at, rows, ..*family };
                for register in group.registers {
                    if at.saturating_add(register.offset) < limit {
                        self.register(register, &one);
                    }
                }
                self.groups(group.groups, &one, limit);
                at = at.saturating_add(stride);
            }
            next = at;
        }
    }

    fn count(&self, count: &Count, base: u16, first: u16, end: u16) -> u16 {
        let dword = |at: u16| self.spec.bytes.dword(base.saturating_add(at));
        match *count {
            Count::ToEnd => end.saturating_sub(first),
            Count::When { at, mask, value } => u16::from(dword(at) & mask == value),
            Count::Field { at, given, .. } if given != 0 && dword(at) & given == 0 => 0,
            Count::Field { at, shift, mask, more, .. } => ((dword(at) >> shift) as u16 & mask) + more,
        }
    }

    fn stride(&self, stride: Stride, at: u16) -> u16 {
        match stride {
            Stride::Fixed(bytes) => bytes,
            Stride::Own { base, unit, mask } => base + unit * (self.spec.bytes.dword(at) as u16 & mask),
        }
    }

    /// What of MSI (PCI Express 6.0, 7.7.1) is not offered: extended data, vectors beyond the first; and what hardware
    /// alone knows, which vectors are pending.
    fn msi(&mut self, capability: &Capability, owner: u16, family: &Family<'_>) {
        let control = self.spec.bytes.word(capability.offset + legacy::MESSAGE_CONTROL);
        let data = if control & legacy::MSI_ADDRESS_64 != 0 { 0x0c } else { 8 };
        // One vector is delivered, however many hardware has.
        let one_each = 1;
        let absent = if control & legacy::MSI_MASKABLE != 0 { u32::MAX } else { 0 };
        let no_vector = "reserved: the guest has no such vector";
        for (offset, mask, kind, treatment, reason) in [
            (data, 0xffff_0000, Kind::Constant, Treatment::ZERO, "extended message data is not offered"),
            (data + 4, absent & !one_each, Kind::Constant, Treatment::ZERO, no_vector),
            (data + 8, absent & !one_each, Kind::Constant, Treatment::ZERO, no_vector),
            (
                data + 8,
                absent & one_each,
                Kind::Status,
                Treatment::ReadOnly,
                "hardware's: what waits behind a mask",
            ),
        ] {
            let place = self.owned(Place { offset: capability.offset + offset, width: 4, mask }, owner);
            let rule = Rule::built_in(reason, family.section);
            for (Segment { mask, register, field, .. }, _) in self.pieces(place) {
                let known = Known { kind, register, field, guarded: true };
                self.set(Place { mask, ..place }, known, treatment, &rule);
            }
        }
    }

    fn models(&mut self, capability: &Capability, owner: u16) {
        let at = |offset| capability.offset.saturating_add(offset);
        if capability.id == AnyId::Legacy(CapabilityId::PCI_EXPRESS) {
            for (register, model) in [
                (express::DEVICE_CONTROL, Model::ReadRequestSize),
                (express::LINK_CONTROL, Model::LinkControl),
            ] {
                let place = Place { offset: at(register), width: 2, mask: 0xffff };
                if self.owned(place, owner).mask == place.mask {
                    self.models.push((place.offset, model));
                }
            }
        }
        let Some((place, model)) = self.carried_out(capability) else { return };
        if self.owned(place, owner).mask == place.mask {
            self.models.push((place.offset, model));
        }
        self.guard_reset(place, model);
    }

    /// The register of a capability whose writes the service carries out.
    fn carried_out(&self, capability: &Capability) -> Option<(Place, Model)> {
        let bytes = &self.spec.bytes;
        let at = |offset| capability.offset.saturating_add(offset);
        let (offset, model) = match capability.id {
            AnyId::Legacy(CapabilityId::MSI) => (legacy::MESSAGE_CONTROL, Model::MsiControl),
            AnyId::Legacy(CapabilityId::MSI_X) => (legacy::MESSAGE_CONTROL, Model::MsixControl),
            AnyId::Legacy(CapabilityId::POWER_MANAGEMENT) => (legacy::PMCSR, Model::PowerState),
            AnyId::Legacy(CapabilityId::VPD) => (legacy::VPD_ADDRESS, Model::VpdRead),
            AnyId::Legacy(CapabilityId::PCI_EXPRESS)
                if bytes.dword(at(express::DEVICE_CAPABILITIES)) & express::FLR_CAPABLE != 0 =>
            {
                (express::DEVICE_CONTROL, Model::DeviceControl)
            }
            AnyId::Legacy(CapabilityId::ADVANCED_FEATURES)
                if bytes.byte(at(legacy::AF_CAPABILITIES)) & legacy::AF_FLR_CAPABLE != 0 =>
            {
                (legacy::AF_CONTROL, Model::AfControl)
            }
            _ => return None,
        };
        let width = if model == Model::AfControl { 1 } else { 2 };
        Some((Place { offset: at(offset), width, mask: full(width) }, model))
    }

    /// The host carries out the guest's resets: no policy lets the bit through to hardware.
    fn guard_reset(&mut self, place: Place, model: Model) {
        let reset = match model {
            Model::DeviceControl => u32::from(express::INITIATE_FLR),
            Model::AfControl => 1,
            _ => return,
        };
        self.guarded[usize::from(place.offset / 4)] |= reset << (8 * u32::from(place.offset & 3));
    }

    /// Treats all bytes of a capability from `from` on alike.
    #[expect(clippy::too_many_arguments, reason = "each is one column of a row")]
    fn fill(
        &mut self,
        capability: &Capability,
        from: u16,
        owner: u16,
        kind: Kind,
        name: &'static str,
        treatment: Treatment,
        rule: &Rule,
    ) {
        for place in self.dwords(capability, from, owner) {
            let register = self.name(place.offset, 4, name, Some(capability.id));
            let known = Known { kind, register: Some(register), field: None, guarded: false };
            self.set(place, known, treatment, rule);
        }
    }

    /// Links the capabilities that the guest sees, and only those.
    pub(super) fn links(&mut self) {
        self.models.push((header::COMMAND, Model::Command));
        let rule = Rule::built_in(LINKED, "PCI Express 6.0, 7.5.1.1.11 and 7.6.3");
        let mut lists: [Vec<(u16, Capability)>; 2] = [Vec::new(), Vec::new()];
        for (index, capability) in self.list.capabilities.iter().enumerate() {
            if self.visible[index] {
                let list = usize::from(matches!(capability.id, AnyId::Extended(_)));
                lists[list].push((index as u16, *capability));
            }
        }
        let [legacy, extended] = lists;
        let first = legacy.first().map_or(0, |(_, capability)| capability.offset);
        let pointer = Place { offset: header::CAPABILITIES_POINTER, width: 1, mask: 0xff };
        self.link(pointer, HEADER_OWNER, u32::from(first), &rule);
        let has_list = if first == 0 { 0 } else { u32::from(header::STATUS_CAPABILITIES) };
        let mask = u32::from(header::STATUS_CAPABILITIES);
        self.link(Place { offset: header::STATUS, width: 2, mask }, HEADER_OWNER, has_list, &rule);
        for (position, (owner, capability)) in legacy.iter().enumerate() {
            let next = legacy.get(position + 1).map_or(0, |(_, next)| next.offset);
            let AnyId::Legacy(id) = capability.id else { continue };
            let place = Place { offset: capability.offset, width: 2, mask: 0xffff };
            self.link(place, *owner, u32::from(id.0) | u32::from(next) << 8, &rule);
        }
        for (position, (owner, capability)) in extended.iter().enumerate() {
            let next = extended.get(position + 1).map_or(0, |(_, next)| next.offset);
            let AnyId::Extended(id) = capability.id else { continue };
            let value = u32::from(id.0) | u32::from(capability.version) << 16 | u32::from(next) << 20;
            self.link(Place { offset: capability.offset, width: 4, mask: u32::MAX }, *owner, value, &rule);
        }
        // The head of the extended list is always at 0x100: when that capability is hidden a null one leads on (7.6.1).
        let head = self.list.capabilities.iter().position(|capability| capability.offset == header::EXTENDED);
        if let Some(head) = head.filter(|head| !self.visible[*head]) {
            let next = extended.first().map_or(0, |(_, next)| next.offset);
            let place = Place { offset: header::EXTENDED, width: 4, mask: u32::MAX };
            self.link(place, head as u16, u32::from(next) << 20, &rule);
        }
    }

    fn link(&mut self, place: Place, owner: u16, value: u32, rule: &Rule) {
        let place = self.owned(place, owner);
        let capability = self.list.capabilities.get(usize::from(owner)).map(|capability| capability.id);
        let named = self.pieces(place).first().map(|(segment, _)| *segment);
        let named = named.filter(|_| owner == HEADER_OWNER);
        let register = match named.and_then(|segment| segment.register) {
            Some(register) => register,
            None => self.name(place.offset, place.width, "Capability Header", capability),
        };
        let field = named.and_then(|segment| segment.field);
        let known = Known { kind: Kind::Constant, register: Some(register), field, guarded: true };
        self.set(place, known, Treatment::Fixed(value), rule);
    }

    /// Lays the policy's registers over the built-in ones, but for guarded bits.
    pub(super) fn overrides(&mut self) {
        let policy = self.policy;
        for (index, entry) in policy.registers.iter().enumerate() {
            let bases: Vec<u16> = match entry.place {
                policy::Place::Absolute(offset) => vec![offset],
                policy::Place::In(which, offset) => {
                    let bytes = &self.spec.bytes;
                    let list = self.list.capabilities.iter();
                    list.filter(|capability| which.selects(capability.id, capability.offset, bytes))
                        .map(|capability| capability.offset.saturating_add(offset))
                        .collect()
                }
            };
            for offset in bases {
                let inside = usize::from(offset) + usize::from(entry.width) <= self.spec.bytes.len();
                if !inside || !matches!(entry.width, 1 | 2 | 4) || offset % u16::from(entry.width) != 0 {
                    self.refused.push(RefusedOverride { index, offset, mask: entry.mask });
                    continue;
                }
                let mask = entry.mask & full(entry.width);
                let guarded = self.guarded[usize::from(offset / 4)] >> (8 * u32::from(offset & 3)) & mask;
                if guarded != 0 {
                    self.refused.push(RefusedOverride { index, offset, mask: guarded });
                }
                let place = Place { offset, width: entry.width, mask: mask & !guarded };
                self.relay(place, entry.treatment, &entry.rule);
            }
        }
    }

    /// Replaces the treatment of bits; what hardware does with them stays known.
    fn relay(&mut self, place: Place, treatment: Treatment, rule: &Rule) {
        let shift = 8 * u32::from(place.offset & 3);
        if treatment == Treatment::Pass && place.mask << shift & u32::from(express::LINK_POWER) != 0 {
            // A policy lets the guest set them, too.
            let dword = place.offset & !3;
            self.models.retain(|model| *model != (dword, Model::LinkControl));
        }
        for (Segment { mask: piece, register, field, .. }, zero_merge) in self.pieces(place) {
            for (mask, kind) in [(piece & zero_merge, Kind::Rw1c), (piece & !zero_merge, Kind::Control)] {
                let piece = Place { mask: mask >> shift & place.mask, ..place };
                let known = Known { kind, register, field, guarded: false };
                self.set(piece, known, treatment, rule);
            }
        }
    }
}

/// Bits of a register that its device's vendor describes.
fn control(register: u16) -> Known {
    Known { kind: Kind::Control, register: Some(register), field: None, guarded: false }
}

/// Bytes of a capability's header.
fn header_bytes(capability: &Capability) -> u16 {
    match capability.id {
        AnyId::Legacy(_) => 2,
        AnyId::Extended(_) => 4,
    }
}
