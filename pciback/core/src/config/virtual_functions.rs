//! SR-IOV for a guest that creates the VFs of its PF (PCI Express 6.0, section 9.3.3). Nothing of the capability is hardware's: the guest
//! says what it wants, and the host decides and does it. The VFs have no BARs in that guest, since they go to other guests.
//!
//! Up to seven VFs are functions 1 to 7 of the PF's own device, which need neither ARI nor another bus. More of them are on a bus of their
//! own, one for each device number that a PF can have: there they meet neither other functions of the guest, which are all on bus 0, nor VFs
//! of another PF. Linux makes such a bus without a bridge when it adds the first VF (`virtfn_add_bus`), as it does for PFs whose hardware
//! places VFs beyond their bus; the root bus that xen-pcifront makes has the numbers 0 to 255, and only bus 0 is scanned for functions.
//! HVM guests have no such bus: the window to extended config space, and what their firmware reports, is bus 0.

use std::ops::Range;

use super::bytes::Bytes;
use super::compile::{Compiler, Family, Known, Place};
use super::filter::{Model, Segment};
use super::list::Capability;
use super::policy::{ByGuest, CapabilityAction, Initial, Policy, Rule, Treatment};
use super::rules::{Row, row};
use super::space::VirtualConfigSpace;
use crate::Devfn;
use crate::spec::{AnyId, CapabilitySpec, ExtendedCapabilityId, Kind, sriov};

/// The most VFs that a guest can create of a PF: a bus has no more functions.
pub const MOST_BY_GUEST: u16 = 256;

/// The most VFs that are functions of their PF's device: what is left of its eight. More VFs are on a bus of their own.
pub const MOST_BESIDE_PF: u16 = 7;

/// VF Device ID as the guest reads it: that of no device, so that no driver of its own binds to a VF that it cannot use.
pub const NO_DRIVERS_ID: u16 = 0xffff;

/// What every PF has to support (section 9.3.3.13): 4 KiB, 8 KiB, 64 KiB, 256 KiB, 1 MiB, 4 MiB.
const PAGE_SIZES: u32 = 0x553;

const ENABLE: &str = "the guest enables VFs; the host creates and removes them in hardware";
const BESIDE: &str = "functions 1 to 7 of the guest's device: hardware's routing is the host's";
const OWN_BUS: &str =
    "a bus of their own in the guest, one beyond the PF's device number: hardware's routing is the host's";
const ONE_BY_ONE: &str = "one after the other: hardware's routing is the host's";
const NO_MORE: &str = "the PF has no more VFs, though a policy gives the guest more";
const BUS_0_ONLY: &str =
    "an HVM guest has its VFs as functions 1 to 7 of the PF's device, though a policy gives it more";

const ROWS: &[Row] = &[
    row(
        sriov::CAPABILITIES,
        u32::MAX,
        Treatment::ZERO,
        "VFs do not migrate by this capability, and need no ARI and no wide tags",
    ),
    row(sriov::CONTROL, (sriov::VF_ENABLE | sriov::VF_MSE) as u32, Treatment::VIRTUAL, ENABLE),
    row(
        sriov::NUM_VFS,
        0xffff,
        Treatment::VIRTUAL,
        "written while VF Enable is 0, carried out when it becomes 1",
    ),
    row(
        sriov::FUNCTION_DEPENDENCY_LINK,
        0xff,
        Treatment::Static,
        "the PF itself: VFs depend on no other function",
    ),
    row(sriov::VF_STRIDE, 0xffff, Treatment::Fixed(1), ONE_BY_ONE),
    row(
        sriov::VF_DEVICE_ID,
        0xffff,
        Treatment::Fixed(NO_DRIVERS_ID as u32),
        "no driver in this guest claims the VFs: other guests use them",
    ),
    row(
        sriov::SUPPORTED_PAGE_SIZES,
        u32::MAX,
        Treatment::Fixed(PAGE_SIZES),
        "the sizes that every PF has; hardware's is the host's decision",
    ),
    row(
        sriov::SYSTEM_PAGE_SIZE,
        u32::MAX,
        Treatment::Virtual(Initial::Value(1)),
        "it places VF BARs, which the host does",
    ),
    no_bar(0),
    no_bar(1),
    no_bar(2),
    no_bar(3),
    no_bar(4),
    no_bar(5),
    row(sriov::VF_MIGRATION_STATE, u32::MAX, Treatment::ZERO, ABSENT),
];

const fn no_bar(index: u16) -> Row {
    row(sriov::VF_BAR0 + 4 * index, u32::MAX, Treatment::ZERO, ABSENT)
}

const KEPT: &str = "its guest has read it: it stays as it is until the guest releases the function";
/// What is not in a row, and what is nothing.
const ABSENT: &str = "nothing of a VF is given to this guest: reads 0";

/// What a guest has said of the VFs of its PF.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuestVfs {
    /// VF Enable.
    pub enabled: bool,
    /// NumVFs as it was written, beyond TotalVFs too.
    pub count: u16,
}

/// First VF Offset of a PF that its guest has at this number, with so many VFs.
fn first_offset(own: Devfn, total: u16) -> u16 {
    match total > MOST_BESIDE_PF {
        true => (u16::from(own.device().get()) + 1) * 0x100 - u16::from(own.0),
        false => 1,
    }
}

impl Policy {
    /// For guests whose only bus is bus 0: there are at most [`MOST_BESIDE_PF`] VFs, however many a policy gives.
    pub fn keep_vfs_beside_pf(&mut self) {
        if let Some(by_guest) = self.virtual_functions.as_mut().filter(|given| given.count > MOST_BESIDE_PF) {
            *by_guest = ByGuest { count: MOST_BESIDE_PF, rule: Rule::built_in(BUS_0_ONLY, "xpci") };
        }
    }
}

impl Compiler<'_> {
    /// What is in force for VFs that the guest creates, if this is the SR-IOV capability of its PF. `action`: what a policy says of the
    /// capability, which hides it all the same. A guest that uses the capability keeps it until it releases the PF.
    pub(super) fn by_guest(
        &self,
        capability: &Capability,
        action: Option<CapabilityAction>,
    ) -> Option<ByGuest> {
        let is_meant =
            capability.id == AnyId::Extended(ExtendedCapabilityId::SR_IOV) && !self.spec.is_virtual();
        if !is_meant || action == Some(CapabilityAction::Hide) {
            return None;
        }
        let waits = || {
            let used = action.is_none() && self.kept.is_some_and(|kept| kept.contains(&capability.offset));
            used.then(|| ByGuest { count: 0, rule: Rule::built_in(KEPT, "xpci") })
        };
        self.policy.virtual_functions.clone().or_else(waits)
    }

    /// Builds the capability for a guest that creates VFs. One that a guest uses keeps the numbers that it has read.
    pub(super) fn virtual_functions(
        &mut self,
        capability: &Capability,
        owner: u16,
        spec: &'static CapabilitySpec,
        by_guest: &ByGuest,
    ) {
        let family = Family {
            base: capability.offset,
            capability: Some(capability.id),
            section: spec.section,
            controls: (Treatment::ZERO, ABSENT),
            events: (Treatment::ZERO, ABSENT),
            rows: ROWS,
            guarded: true,
            owner,
        };
        for register in spec.registers {
            self.register(register, &family);
        }
        let at = |offset: u16| capability.offset.saturating_add(offset);
        let total = self.spec.bytes.word(at(sriov::TOTAL_VFS)).min(by_guest.count);
        let count_rule = match total < by_guest.count {
            true => Rule::built_in(NO_MORE, spec.section),
            false => by_guest.rule.clone(),
        };
        // Where the guest has the PF is not known here: `show_own_number` corrects the offset.
        let place_rule = Rule::built_in(if total > MOST_BESIDE_PF { OWN_BUS } else { BESIDE }, spec.section);
        for (register, value, rule) in [
            (sriov::INITIAL_VFS, total, &count_rule),
            (sriov::TOTAL_VFS, total, &count_rule),
            (sriov::FIRST_VF_OFFSET, first_offset(Devfn(0), total), &place_rule),
        ] {
            let treatment = match self.kept {
                Some(_) => Treatment::Static,
                None => Treatment::Fixed(u32::from(value)),
            };
            let place = self.owned(Place { offset: at(register), width: 2, mask: 0xffff }, owner);
            for (Segment { register, field, .. }, _) in self.pieces(place) {
                let known = Known { kind: Kind::Constant, register, field, guarded: true };
                self.set(place, known, treatment, rule);
            }
        }
        for (register, model) in [(sriov::CONTROL, Model::VfEnable), (sriov::NUM_VFS, Model::NumVfs)] {
            let place = Place { offset: at(register), width: 2, mask: 0xffff };
            if self.owned(place, owner).mask == place.mask {
                self.models.push((place.offset, model));
            }
        }
        for dword in (capability.offset..at(0x40)).step_by(4) {
            // A guest that writes them has not lost anything: the host does what they say.
            self.carried_out_by_host(dword);
        }
    }
}

impl VirtualConfigSpace {
    /// Where its SR-IOV capability is, if its guest creates VFs.
    fn guests_sriov(&self) -> Option<u16> {
        let of_enable = |(_, model): &&(u16, Model)| *model == Model::VfEnable;
        let (control, _) = self.filter().models().iter().find(of_enable)?;
        control.checked_sub(sriov::CONTROL)
    }

    /// What the guest has said of the VFs of its PF; `None`: it creates none.
    pub fn guest_vfs(&self) -> Option<GuestVfs> {
        let at = self.guests_sriov()?;
        Some(GuestVfs {
            enabled: self.own_register(at + sriov::CONTROL, 2) as u16 & sriov::VF_ENABLE != 0,
            count: self.own_register(at + sriov::NUM_VFS, 2) as u16,
        })
    }

    /// The Routing IDs that VFs of its guest have or can have; `own`: its device and function number of the PF. Empty: it creates none.
    pub fn guest_vf_ids(&self, own: Devfn) -> Range<u16> {
        let Some(at) = self.guests_sriov() else { return 0..0 };
        let register = |offset: u16| self.own_register(at + offset, 2) as u16;
        let first = u16::from(own.0).saturating_add(register(sriov::FIRST_VF_OFFSET));
        first..first.saturating_add(register(sriov::TOTAL_VFS))
    }

    /// Whether the guest has enabled a VF with this Routing ID; `own` as above.
    pub fn has_guest_vf(&self, own: Devfn, routing_id: u16) -> bool {
        let ids = self.guest_vf_ids(own);
        let is_enabled = |vfs: GuestVfs| vfs.enabled && routing_id - ids.start < vfs.count;
        ids.contains(&routing_id) && self.guest_vfs().is_some_and(is_enabled)
    }

    /// Shows the guest what depends on its device and function number of the PF: the Function Dependency Link, and where its VFs begin.
    pub fn show_own_number(&mut self, devfn: Devfn) {
        let Some(at) = self.guests_sriov() else { return };
        let offset = first_offset(devfn, self.own_register(at + sriov::TOTAL_VFS, 2) as u16);
        for (register, mask, value) in [
            (at + sriov::FUNCTION_DEPENDENCY_LINK, 0xff, u32::from(devfn.0)),
            (at + sriov::FIRST_VF_OFFSET, 0xffff, u32::from(offset)),
        ] {
            let (dword, shift) = (usize::from(register / 4), 8 * u32::from(register & 3));
            let with_value = |old: u32| old & !(mask << shift) | value << shift;
            let (reset, shadow) = (self.image().reset_value(dword), self.image().shadow(dword));
            self.image_mut().set_reset_value(dword, with_value(reset));
            self.image_mut().set_shadow(dword, with_value(shadow));
        }
    }

    /// The dwords of its SR-IOV capability if VFs of the guest's exist: a reset of the PF that the host emulates leaves them.
    pub(super) fn kept_over_reset(&self) -> Range<usize> {
        match (self.guests_sriov(), self.guest_vfs()) {
            (Some(at), Some(GuestVfs { enabled: true, .. })) => {
                usize::from(at / 4)..usize::from((at + sriov::VF_MIGRATION_STATE) / 4) + 1
            }
            _ => 0..0,
        }
    }

    /// The bits that a write cannot change now: NumVFs while VF Enable is set (PCI Express 6.0, section 9.3.3.7).
    pub(super) fn locked(&self, dword: u16) -> u32 {
        let models = self.filter().models();
        let first = models.partition_point(|(offset, _)| *offset < dword);
        let here = models[first..].iter().take_while(|(offset, _)| *offset < dword + 4);
        let mut locked = 0;
        for (offset, _) in here.filter(|(_, model)| *model == Model::NumVfs) {
            if self.guest_vfs().is_some_and(|vfs| vfs.enabled) {
                locked |= 0xffff << (8 * u32::from(offset & 3));
            }
        }
        locked
    }
}
