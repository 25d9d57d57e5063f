//! What a policy can say about bits of config space.

use std::borrow::Cow;
use std::fmt;

use super::bytes::Bytes;
use crate::spec::{AnyId, CapabilityId};

/// What a shadow bit is before the guest writes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Initial {
    /// What hardware showed when the filter was built.
    Hardware,
    /// These bits, in place (not shifted to bit 0 of their field).
    Value(u32),
}

/// What the guest sees in a bit and what its writes do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Treatment {
    /// Reads and writes reach hardware.
    Pass,
    /// For what hardware sets and a written 1 clears: reads show hardware, but 0 once the guest has written 1, until the host has cleared
    /// hardware's bit. The guest's writes do not reach hardware.
    Event,
    /// Reads reach hardware, writes are dropped.
    ReadOnly,
    /// Reads show what hardware showed when the filter was built, writes are dropped: for what cannot change.
    Static,
    /// The guest reads what it wrote; hardware sees nothing.
    Virtual(Initial),
    /// Reads show these bits (in place), writes are dropped.
    Fixed(u32),
}

impl Treatment {
    /// Reads 0, drops writes.
    pub const ZERO: Self = Self::Fixed(0);
    /// Virtual, 0 at first.
    pub const VIRTUAL: Self = Self::Virtual(Initial::Value(0));
}

impl fmt::Display for Treatment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pass => f.write_str("pass"),
            Self::Event => f.write_str("event"),
            Self::ReadOnly => f.write_str("read-only"),
            Self::Static => f.write_str("static"),
            Self::Virtual(Initial::Hardware) => f.write_str("virtual"),
            Self::Virtual(Initial::Value(value)) => write!(f, "virtual from {value:#x}"),
            Self::Fixed(value) => write!(f, "fixed {value:#x}"),
        }
    }
}

/// Where a rule stands.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Origin {
    /// Built in, following this section of a specification.
    BuiltIn {
        /// The section.
        section: &'static str,
    },
    /// A line of a policy file.
    Policy {
        /// The file.
        file: String,
        /// The line, from 1.
        line: u32,
    },
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BuiltIn { section } => f.write_str(section),
            Self::Policy { file, line } => write!(f, "{file}:{line}"),
        }
    }
}

/// Why a bit is treated as it is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Rule {
    /// The reason, for people.
    pub reason: Cow<'static, str>,
    /// Who says so.
    pub origin: Origin,
}

impl Rule {
    /// A built-in rule.
    pub const fn built_in(reason: &'static str, section: &'static str) -> Self {
        Self { reason: Cow::Borrowed(reason), origin: Origin::BuiltIn { section } }
    }
}

/// What to do with a capability as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CapabilityAction {
    /// As built in, but visible even where the default hides it.
    Show,
    /// Taken out of its list; its bytes read 0 and drop writes.
    Hide,
    /// All its registers are treated alike, but for its header.
    Treat(Treatment),
}

/// Which vendor's capability is meant, where one id serves all vendors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum VendorPart {
    /// Vendor-Specific Extended with this VSEC ID (PCI Express 6.0, section 7.9.5).
    Vsec(u16),
    /// Designated Vendor-Specific Extended of this vendor, with this DVSEC ID (PCI Express 6.0, section 7.9.6).
    Dvsec {
        /// DVSEC Vendor ID.
        vendor: u16,
        /// DVSEC ID.
        id: u16,
    },
}

/// The capabilities that a policy means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Selector {
    /// Their id and list.
    pub id: AnyId,
    /// Only those of one vendor.
    pub part: Option<VendorPart>,
}

impl From<AnyId> for Selector {
    fn from(id: AnyId) -> Self {
        Self { id, part: None }
    }
}

impl Selector {
    /// Whether the capability with this id, at this offset of a config space, is meant.
    pub(super) fn selects(&self, id: AnyId, offset: u16, bytes: &[u8]) -> bool {
        let at = |further: u16| bytes.word(offset.saturating_add(further));
        id == self.id
            && match self.part {
                None => true,
                Some(VendorPart::Vsec(id)) => at(4) == id,
                Some(VendorPart::Dvsec { vendor, id }) => at(4) == vendor && at(8) == id,
            }
    }
}

/// A policy's word on some capabilities.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct CapabilityOverride {
    /// Which.
    pub which: Selector,
    /// What.
    pub action: CapabilityAction,
    /// Why.
    pub rule: Rule,
}

/// Where bits are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Place {
    /// At this offset of config space.
    Absolute(u16),
    /// At this offset of each of these capabilities.
    In(Selector, u16),
}

/// A policy's word on some bits.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RegisterOverride {
    /// The register.
    pub place: Place,
    /// Its width in bytes: 1, 2 or 4.
    pub width: u8,
    /// The bits of the register that are meant.
    pub mask: u32,
    /// How; values are relative to the register.
    pub treatment: Treatment,
    /// Why.
    pub rule: Rule,
}

/// The VFs that the guest with a PF creates.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ByGuest {
    /// How many at most, 1-[`super::MOST_BY_GUEST`]: TotalVFs as the guest reads it.
    pub count: u16,
    /// Why.
    pub rule: Rule,
}

/// Who may be on the other side of a function's mailbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub struct MailboxPeers {
    /// Guests: for a VF the one that has its PF, for a PF those that have its VFs.
    pub guest: bool,
    /// dom0, for a VF whose PF no guest has.
    pub dom0: bool,
}

/// A mailbox that a policy gives a function.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct MailboxWish {
    /// With whom.
    pub peers: MailboxPeers,
    /// Why.
    pub rule: Rule,
}

/// What is laid over the built-in rules. Later overrides win over earlier ones; guarded registers (BARs, Command, MSI, MSI-X,
/// interrupt line and pin, headers of capabilities) keep their built-in treatment in any case.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Policy {
    /// Unknown bytes: gaps, unknown and vendor-specific capabilities.
    pub unknown: (Treatment, Rule),
    /// Why unknown capabilities are taken out of the list; `None` where guests see them.
    pub hide_unknown: Option<Rule>,
    /// Capabilities as a whole.
    pub capabilities: Vec<CapabilityOverride>,
    /// Single registers.
    pub registers: Vec<RegisterOverride>,
    /// VFs that the guest creates, if it gets a PF.
    pub virtual_functions: Option<ByGuest>,
    /// The mailbox that the function has in its guest.
    pub mailbox: Option<MailboxWish>,
}

impl Policy {
    /// For guests that place BARs by themselves: the capability holds the host's addresses, which mean nothing to them. This
    /// overrides all else that the policy says of it.
    pub fn hide_enhanced_allocation(&mut self) {
        self.capabilities.push(CapabilityOverride {
            which: AnyId::Legacy(CapabilityId::ENHANCED_ALLOCATION).into(),
            action: CapabilityAction::Hide,
            rule: Rule::built_in(
                "it has the host's addresses, and an HVM guest has its own",
                "PCI Express 6.0, 7.8.5",
            ),
        });
    }
}

impl Default for Policy {
    /// The profile `passthrough`: unknown registers pass, both ways.
    fn default() -> Self {
        let rule = Rule::built_in("unknown registers pass: the guest's driver may need them", "xpci");
        Self {
            unknown: (Treatment::Pass, rule),
            hide_unknown: None,
            capabilities: Vec::new(),
            registers: Vec::new(),
            virtual_functions: None,
            mailbox: None,
        }
    }
}
