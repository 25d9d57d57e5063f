//! The compiled filter of a function: what each bit of its config space is.
//!
//! It partitions the bits. A bit is read from hardware or from the shadow; a write of it goes to hardware, to the shadow
//! or nowhere. It holds no value of a single function, so that functions of one layout share them.

use super::access::EXTENDED_SIZE;
use super::interrupts::{MsiCapability, MsixCapability};
use super::list::{Capability, ListProblem};
use super::mailbox::MailboxPlace;
use super::policy::{Rule, Treatment};
use crate::spec::AnyId;

/// Dwords of the largest config space.
pub(super) const DWORDS: usize = EXTENDED_SIZE as usize / 4;

/// What the filter has for the bits of one dword.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub struct Bits {
    /// Read from hardware; the others come from the shadow.
    pub hw_read: u32,
    /// A guest's write carries them to hardware.
    pub hw_write: u32,
    /// A guest's write stores them in the shadow.
    pub shadow_write: u32,
    /// A write that must carry bits the guest may not write carries these as 0 and not as hardware holds them: RW1C, where
    /// what was read would clear an event, and RsvdZ.
    pub zero_merge: u32,
    /// Of `hw_read`, events that the guest clears in its own view only: the shadow holds a 1 for each that it has cleared and that
    /// hardware still shows.
    pub events: u32,
    /// Shadow bits that begin as in `value`; the others begin as hardware showed them.
    pub fixed: u32,
    /// The bits of `fixed`.
    pub value: u32,
    /// Bits that hardware would let be written, or may, and that a guest's write does not carry there: what is worth counting.
    pub masked: u32,
}

/// A register whose write does more than store bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Model {
    /// Command.
    Command,
    /// MSI's Message Control.
    MsiControl,
    /// MSI-X's Message Control.
    MsixControl,
    /// PMCSR.
    PowerState,
    /// Device Control with function level reset.
    DeviceControl,
    /// Device Control, of which a read request size passes that is neither below the payload size nor above the host's.
    ReadRequestSize,
    /// Link Control, whose power management a guest may switch off and not on.
    LinkControl,
    /// Advanced Features' control with function level reset.
    AfControl,
    /// VPD's address: a write of it as a whole, with the flag 0, has the host read what is there.
    VpdRead,
    /// VPD's address where a policy gives the guest a part of the register in hardware: it passes only as a whole, and with the flag 0.
    VpdAddress,
    /// SR-IOV Control of a PF whose guest creates VFs.
    VfEnable,
    /// NumVFs of such a PF, which can be written while VF Enable is 0.
    NumVfs,
    /// A register of the mailbox's Data Object Exchange.
    DataObject,
}

/// A register of the function that is described.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedRegister {
    /// Where.
    pub offset: u16,
    /// Bytes.
    pub width: u8,
    /// What the specification calls it.
    pub name: &'static str,
    /// The capability that it belongs to; `None` in the header.
    pub capability: Option<AnyId>,
}

/// Bits of one dword that one rule treats alike: how each bit knows its rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// The dword's offset.
    pub dword: u16,
    /// Which of its bits.
    pub mask: u32,
    /// How they are treated; values are in the place of the dword.
    pub treatment: Treatment,
    /// Index in [`Filter::rules`].
    pub rule: u16,
    /// Index in [`Filter::registers`]; `None` for unknown bytes.
    pub register: Option<u16>,
    /// What the specification calls the bits; `None` where it names none, or reserves them.
    pub field: Option<&'static str>,
}

/// What a policy asked for and did not get.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RefusedOverride {
    /// Index in the policy's list of registers.
    pub index: usize,
    /// The offset in config space.
    pub offset: u16,
    /// The bits that are guarded.
    pub mask: u32,
}

/// A capability that the policy would show or hide, but whose visibility a connected guest relies on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deferred {
    /// Which.
    pub capability: Capability,
    /// Whether the policy shows it.
    pub show: bool,
}

/// The compiled filter, shared by all functions with the same layout and policy.
#[derive(Debug, PartialEq, Eq)]
pub struct Filter {
    pub(super) bits: Box<[Bits; DWORDS]>,
    pub(super) guarded: Vec<u32>,
    pub(super) size: u16,
    pub(super) layout: u64,
    pub(super) behaviour: u64,
    pub(super) models: Vec<(u16, Model)>,
    pub(super) segments: Vec<Segment>,
    pub(super) rules: Vec<Rule>,
    pub(super) registers: Vec<NamedRegister>,
    pub(super) capabilities: Vec<(Capability, bool)>,
    pub(super) problems: Vec<ListProblem>,
    pub(super) refused: Vec<RefusedOverride>,
    pub(super) deferred: Vec<Deferred>,
    pub(super) msi: Option<MsiCapability>,
    pub(super) msix: Option<MsixCapability>,
    pub(super) mailbox: Option<MailboxPlace>,
    pub(super) mailbox_refused: Option<&'static str>,
}

impl Filter {
    /// A hash of everything that the filter does: functions with the same hash can share it, and a shadow that was made
    /// for one hash means nothing for another.
    pub fn behaviour_hash(&self) -> u64 {
        self.behaviour
    }

    /// Bytes of config space that the function has.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// What it has for the dword that holds `offset`.
    pub fn bits(&self, offset: u16) -> Bits {
        self.bits[usize::from(offset) / 4 % DWORDS]
    }

    /// The bits of the dword that holds `offset` that no policy can change: the service itself carries out what they control.
    pub fn guarded(&self, offset: u16) -> u32 {
        self.guarded[usize::from(offset) / 4 % DWORDS]
    }

    /// The registers whose writes do more than store bits, by offset.
    pub fn models(&self) -> &[(u16, Model)] {
        &self.models
    }

    /// Which rule treats which bits, by offset. Every bit of the function's config space is in one segment.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// The rules that the segments name.
    pub fn rules(&self) -> &[Rule] {
        &self.rules
    }

    /// The registers that the segments name.
    pub fn registers(&self) -> &[NamedRegister] {
        &self.registers
    }

    /// The capabilities that hardware has, and whether the guest sees each.
    pub fn capabilities(&self) -> &[(Capability, bool)] {
        &self.capabilities
    }

    /// What is wrong with the lists.
    pub fn problems(&self) -> &[ListProblem] {
        &self.problems
    }

    /// What the policy asked for in registers that no policy can change.
    pub fn refused(&self) -> &[RefusedOverride] {
        &self.refused
    }

    /// What waits until the guest has released the function.
    pub fn deferred(&self) -> &[Deferred] {
        &self.deferred
    }

    /// The mailbox that the guest finds, if it has one.
    pub fn mailbox(&self) -> Option<MailboxPlace> {
        self.mailbox
    }

    /// Why the function has not got the mailbox that a policy gives it.
    pub fn mailbox_refused(&self) -> Option<&'static str> {
        self.mailbox_refused
    }

    /// The bytes that this filter takes in memory.
    pub fn memory(&self) -> usize {
        fn of<T>(list: &[T]) -> usize {
            size_of_val(list)
        }
        size_of::<Self>()
            + of(&self.bits[..])
            + of(&self.guarded)
            + of(&self.models)
            + of(&self.segments)
            + of(&self.rules)
            + of(&self.registers)
            + of(&self.capabilities)
    }
}
