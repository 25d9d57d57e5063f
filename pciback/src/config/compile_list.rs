//! Compiling: the capabilities, the links between them, and what a policy lays over them.

use super::bytes::Bytes;
use super::compile::{CONSTANT, Compiler, Family, HEADER_OWNER, Known, NOBODY, Place, STATUS, full};
use super::list::Capability;
use super::planes::{Model, RefusedOverride};
use super::policy::{self, CapabilityAction, Rule, Treatment};
use super::rules::{self, CapabilityRules};
use crate::spec::{self, AnyId, CapabilityId, CapabilitySpec, Kind, express, header, legacy};

const BURIED: &str = "its header stands within another capability: no list can lead to it";
const LINKED: &str = "the list leads only to capabilities that the guest sees";

impl Compiler<'_> {
    pub(super) fn capabilities(&mut self) {
        let capabilities = self.list.capabilities.clone();
        // Guarded capabilities own their bytes first, then known ones: a header that stands within one, on a malformed list, must
        // not open it.
        let rank = |capability: &Capability| match spec::capability(capability.id) {
            Some(_) if rules::rules(capability.id).is_some_and(|rules| rules.guarded) => 0,
            Some(_) => 1,
            None => 2,
        };
        for wanted in 0..=2 {
            for (index, capability) in capabilities.iter().enumerate() {
                if rank(capability) == wanted {
                    for byte in self.list.extent(capability, &self.spec.bytes) {
                        if let Some(owner @ &mut NOBODY) = self.owners.get_mut(usize::from(byte)) {
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
        let policy = self.policy.capabilities.iter().rev().find(|entry| entry.id == capability.id).cloned();
        let known = spec::capability(capability.id).zip(rules::rules(capability.id));
        let owner = index as u16;
        let header =
            Place { offset: capability.offset, width: header_bytes(capability) as u8, mask: u32::MAX };
        let has_header = self.owned(header, owner).mask == full(header.width);
        let hidden = match (&policy, known) {
            // What the guest would find there is the other capability's, id and pointer too.
            _ if !has_header => Some(Rule::built_in(BURIED, "PCI Express 6.0, 7.5.1.1.11 and 7.6.3")),
            (Some(policy), _) if policy.action == CapabilityAction::Hide => Some(policy.rule.clone()),
            (Some(_), _) => None,
            (None, Some((spec, rules))) => rules.hidden.map(|reason| Rule::built_in(reason, spec.section)),
            (None, None) => None,
        };
        if let Some(rule) = hidden {
            self.visible[index] = false;
            self.fill(capability, 0, owner, Kind::Constant, "hidden", Treatment::ZERO, &rule);
            return;
        }
        let guarded = known.is_some_and(|(_, rules)| rules.guarded);
        match (policy, known) {
            (
                Some(policy::CapabilityOverride { action: CapabilityAction::Treat(treatment), rule, .. }),
                _,
            ) if !guarded => {
                let from = header_bytes(capability);
                self.fill(capability, from, owner, Kind::Control, "register", treatment, &rule);
            }
            (_, Some((spec, rules))) => self.known(capability, owner, spec, rules),
            (_, None) => {}
        }
    }

    fn known(
        &mut self,
        capability: &Capability,
        owner: u16,
        spec: &'static CapabilitySpec,
        rules: &'static CapabilityRules,
    ) {
        let (treatment, reason) = match spec.rest {
            Kind::Constant => (Treatment::Static, CONSTANT),
            Kind::Control => rules.controls,
            _ => (Treatment::ReadOnly, STATUS),
        };
        let from = header_bytes(capability);
        let rule = Rule::built_in(reason, spec.section);
        self.fill(capability, from, owner, spec.rest, "further registers", treatment, &rule);
        let family = Family {
            base: capability.offset,
            capability: Some(capability.id),
            section: spec.section,
            controls: rules.controls,
            rows: rules.rows,
            guarded: rules.guarded,
            owner,
        };
        for register in spec.registers {
            self.register(register, &family);
        }
        if capability.id == AnyId::Legacy(CapabilityId::MSI) {
            self.msi(capability, owner, &family);
        }
        self.models(capability, owner);
    }

    /// What follows MSI's Message Control, in its four layouts (PCI Express 6.0, 7.7.1).
    fn msi(&mut self, capability: &Capability, owner: u16, family: &Family<'_>) {
        let control = self.spec.bytes.word(capability.offset + legacy::MESSAGE_CONTROL);
        let wide = control & legacy::MSI_ADDRESS_64 != 0;
        let vectors = 1u32 << (control >> 1 & 7).min(5);
        let one_each = u32::MAX >> (32 - vectors);
        let data = if wide { 0x0c } else { 8 };
        let mut registers = vec![(4, 4, "Message Address", 0xffff_fffc), (data, 2, "Message Data", 0xffff)];
        if wide {
            registers.push((8, 4, "Message Upper Address", u32::MAX));
        }
        if control & legacy::MSI_MASKABLE != 0 {
            registers.push((data + 4, 4, "Mask Bits", one_each));
        }
        // Pending bits and what is reserved: what the capability's bytes were filled with must not be hardware's.
        let reserved =
            Rule::built_in("reserved or never set while Xen programs MSI: reads 0", family.section);
        for dword in (4..0x18).step_by(4) {
            let place = Place { offset: capability.offset + dword, width: 4, mask: u32::MAX };
            let place = self.owned(place, owner);
            let register = self.name(place.offset, 4, "MSI", family.capability);
            let known = Known { kind: Kind::Constant, register: Some(register), guarded: true };
            self.set(place, known, Treatment::ZERO, &reserved);
        }
        let (treatment, reason) = family.controls;
        for (offset, width, name, mask) in registers {
            let place = self.owned(Place { offset: capability.offset + offset, width, mask }, owner);
            let register = self.name(place.offset, width, name, family.capability);
            let known = Known { kind: Kind::Control, register: Some(register), guarded: true };
            self.set(place, known, treatment, &Rule::built_in(reason, family.section));
        }
    }

    fn models(&mut self, capability: &Capability, owner: u16) {
        let bytes = &self.spec.bytes;
        let at = |offset| capability.offset.saturating_add(offset);
        let (offset, model) = match capability.id {
            AnyId::Legacy(CapabilityId::MSI) => (legacy::MESSAGE_CONTROL, Model::MsiControl),
            AnyId::Legacy(CapabilityId::MSI_X) => (legacy::MESSAGE_CONTROL, Model::MsixControl),
            AnyId::Legacy(CapabilityId::POWER_MANAGEMENT) => (legacy::PMCSR, Model::PowerState),
            AnyId::Legacy(CapabilityId::VPD) => (legacy::VPD_ADDRESS, Model::VpdAddress),
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
            _ => return,
        };
        let width = if model == Model::AfControl { 1 } else { 2 };
        let place = Place { offset: at(offset), width, mask: full(width) };
        if self.owned(place, owner).mask == place.mask {
            self.models.push((place.offset, model));
        }
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
        let extent = self.list.extent(capability, &self.spec.bytes);
        let start = extent.start.saturating_add(from);
        for dword in (extent.start..extent.end).step_by(4) {
            let mut place = self.owned(Place { offset: dword, width: 4, mask: u32::MAX }, owner);
            if dword < start {
                place.mask &= u32::MAX.checked_shl(8 * u32::from(start - dword)).unwrap_or(0);
            }
            if place.mask != 0 {
                let register = self.name(dword, 4, name, Some(capability.id));
                self.set(place, Known { kind, register: Some(register), guarded: false }, treatment, rule);
            }
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
        // The head of the extended list is always at 0x100: when that capability is hidden a null one leads on (7.6.2).
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
        let register = self.name(place.offset, place.width, "Capability Header", capability);
        let known = Known { kind: Kind::Constant, register: Some(register), guarded: true };
        self.set(place, known, Treatment::Fixed(value), rule);
    }

    /// Lays the policy's registers over the built-in ones, but for guarded bits.
    pub(super) fn overrides(&mut self) {
        let policy = self.policy;
        for (index, entry) in policy.registers.iter().enumerate() {
            let bases: Vec<u16> = match entry.place {
                policy::Place::Absolute(offset) => vec![offset],
                policy::Place::In(id, offset) => {
                    let list = self.list.capabilities.iter().filter(|capability| capability.id == id);
                    list.map(|capability| capability.offset.saturating_add(offset)).collect()
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
                self.relay(Place { offset, width: entry.width, mask: mask & !guarded }, entry);
            }
        }
    }

    /// Treats bits anew; what hardware does with them stays known.
    fn relay(&mut self, place: Place, entry: &policy::RegisterOverride) {
        let shift = 8 * u32::from(place.offset & 3);
        for (segment_mask, register, zero_merge) in self.pieces(place) {
            for (mask, kind) in
                [(segment_mask & zero_merge, Kind::Rw1c), (segment_mask & !zero_merge, Kind::Control)]
            {
                let piece = Place { mask: mask >> shift & place.mask, ..place };
                self.set(piece, Known { kind, register, guarded: false }, entry.treatment, &entry.rule);
            }
        }
    }
}

/// Bytes of a capability's header.
fn header_bytes(capability: &Capability) -> u16 {
    match capability.id {
        AnyId::Legacy(_) => 2,
        AnyId::Extended(_) => 4,
    }
}
