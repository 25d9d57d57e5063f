//! The mailbox's capability: a Data Object Exchange (PCI Express 6.0, section 7.9.24) that hardware does not have, in a gap of the
//! function's extended config space and last in its list.

use super::bytes::Bytes;
use super::compile::{Compiler, Known, Place, full};
use super::filter::{Deferred, Model};
use super::function::FunctionSpec;
use super::list::{Capability, CapabilityList};
use super::policy::{MailboxPeers, Rule, Treatment};
use super::rules;
use super::space::VirtualConfigSpace;
use crate::spec::{self, AnyId, CapabilityId, ExtendedCapabilityId, Kind, doe, header};

const DOE: AnyId = AnyId::Extended(ExtendedCapabilityId::DOE);
const KEPT: &str = "its guest has read it: it stays as it is until the guest releases the function";

/// Where a guest finds the mailbox of a function, and who may be on the other side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MailboxPlace {
    /// The offset of the capability.
    pub offset: u16,
    /// With whom; nobody if the policy that gave it was taken back.
    pub peers: MailboxPeers,
}

/// Where the capability can be: bytes of extended config space that no capability has and that read 0, as high as possible, or the head of
/// the list where that is empty. An error: why the function cannot have it.
pub(super) fn place(spec: &FunctionSpec, list: &CapabilityList) -> Result<u16, &'static str> {
    if !spec.is_virtual() && list.extended(ExtendedCapabilityId::SR_IOV).is_none() {
        return Err("it is neither a VF nor a PF");
    }
    if list.legacy(CapabilityId::PCI_EXPRESS).is_none() || spec.bytes.len() < 4096 {
        return Err("it has no extended config space");
    }
    let is_extended = |capability: &&Capability| matches!(capability.id, AnyId::Extended(_));
    let taken: Vec<_> =
        list.capabilities.iter().filter(is_extended).map(|one| list.extent(one, &spec.bytes)).collect();
    let device = rules::device_rules(&spec.identity).flat_map(|rules| rules.registers);
    let named: Vec<u16> = device.map(|(_, _, row)| row.offset & !3).collect();
    let is_free = |at: &u16| {
        let end = at + doe::LENGTH;
        (*at..end).step_by(4).all(|dword| spec.bytes.dword(dword) == 0 && !named.contains(&dword))
            && taken.iter().all(|extent| extent.end <= *at || end <= extent.start)
    };
    let candidates: Vec<u16> = match taken.is_empty() {
        true => vec![header::EXTENDED],
        false => (header::EXTENDED..=4096 - doe::LENGTH).step_by(4).rev().collect(),
    };
    candidates.into_iter().find(is_free).ok_or("its extended config space has no gap for the capability")
}

impl Compiler<'_> {
    /// Adds the mailbox's capability to the list, if a policy gives one. What a guest has seen of that stays.
    pub(super) fn place_mailbox(&mut self) {
        let wish = self.policy.mailbox.as_ref().map(|wish| wish.peers);
        let wish = wish.filter(|peers| *peers != MailboxPeers::default());
        let is_hardwares = |offset: &u16| self.list.capabilities.iter().any(|one| one.offset == *offset);
        let seen = self.kept.and_then(|kept| {
            kept.iter().copied().find(|offset| *offset >= header::EXTENDED && !is_hardwares(offset))
        });
        let one = |offset| Capability { offset, id: DOE, version: 1, next: 0 };
        let offset = match (self.kept, seen, wish) {
            (_, Some(offset), wish) => {
                if wish.is_none() {
                    self.deferred.push(Deferred { capability: one(offset), show: false });
                }
                offset
            }
            (_, None, None) => return,
            (kept, None, Some(_)) => match place(self.spec, &self.list) {
                Ok(offset) if kept.is_none() => offset,
                Ok(offset) => return self.deferred.push(Deferred { capability: one(offset), show: true }),
                Err(why) => {
                    self.mailbox_refused = Some(why);
                    return;
                }
            },
        };
        self.mailbox = Some(MailboxPlace { offset, peers: wish.unwrap_or_default() });
        self.list.capabilities.push(one(offset));
        self.visible.push(true);
    }

    /// Its registers read what [`VirtualConfigSpace::show_data_object`] shows, 0 at first; writes go to the service.
    pub(super) fn mailbox_registers(&mut self, capability: &Capability, owner: u16) {
        let Some(spec) = spec::capability(DOE) else { return };
        let wish = self.policy.mailbox.as_ref();
        let rule = wish.map_or_else(|| Rule::built_in(KEPT, "xpci"), |wish| wish.rule.clone());
        for register in spec.registers {
            let offset = capability.offset.saturating_add(register.offset);
            let place =
                self.owned(Place { offset, width: register.width, mask: full(register.width) }, owner);
            let index = self.name(offset, register.width, register.name, Some(DOE));
            let known = Known { kind: Kind::Constant, register: Some(index), field: None, guarded: true };
            self.set(place, known, Treatment::ZERO, &rule);
            let is_written = matches!(register.offset, doe::CONTROL | doe::WRITE_DATA | doe::READ_DATA);
            if is_written && place.mask == full(register.width) {
                self.models.push((offset, Model::DataObject));
            }
        }
    }
}

impl VirtualConfigSpace {
    /// Shows the guest DOE Status and the dword in the Read Data Mailbox.
    pub fn show_data_object(&mut self, status: u32, data: u32) {
        let Some(mailbox) = self.filter().mailbox() else { return };
        for (register, value) in [(doe::STATUS, status), (doe::READ_DATA, data)] {
            self.image_mut().set_shadow(usize::from((mailbox.offset + register) / 4), value);
        }
    }
}
