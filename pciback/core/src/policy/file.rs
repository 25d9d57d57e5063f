//! One policy file: read, checked as a whole, and turned into what the filter is compiled from.

use super::diagnostic::{Diagnostic, Diagnostics};
use super::errors;
use super::mailbox;
use super::matching::{ClassPrefix, Kind, Match};
use super::names::{self, hexadecimal};
use super::read::{self, KeyWord, key};
use super::reset::{self, ResetWishes};
use super::rom::{self, RomSource};
use super::rules;
use super::virtual_functions;
use super::yaml::{self, Node};
use crate::Sbdf;
use crate::config::{ByGuest, CapabilityOverride, MailboxWish, RegisterOverride, Rule, Selector, Treatment};
use crate::fault::ErrorWishes;

/// A named set of defaults for unknown registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Profile {
    /// Unknown registers pass both ways.
    Passthrough,
    /// Unknown registers are read-only.
    Strict,
    /// Unknown registers read 0 and drop writes; unknown capabilities are taken out of their list.
    Hidden,
}

impl Profile {
    /// The words of a policy file.
    pub const WORDS: &[(&str, Self)] =
        &[("passthrough", Self::Passthrough), ("strict", Self::Strict), ("hidden", Self::Hidden)];

    /// The word of a policy file.
    pub fn word(self) -> &'static str {
        match self {
            Self::Passthrough => "passthrough",
            Self::Strict => "strict",
            Self::Hidden => "hidden",
        }
    }

    pub(super) const fn unknown(self) -> Treatment {
        match self {
            Self::Passthrough => Treatment::Pass,
            Self::Strict => Treatment::ReadOnly,
            Self::Hidden => Treatment::ZERO,
        }
    }
}

/// What is refused to guests unless a policy permits it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Permission {
    /// A PF with SR-IOV: its owner controls its VFs.
    PhysicalFunction,
    /// A VF whose PF is attached to a guest or has no driver in dom0: nothing on the host supervises the VF.
    UntrustedVf,
    /// A function with a BAR in a page of memory that also holds registers of another owner's function: its guest reaches those.
    SharedPage,
    /// The interrupt line of a function where another owner uses it: each of them can keep it asserted.
    SharedLine,
    /// A function that the IOMMU cannot keep apart from another owner's: each of them may reach the other by DMA.
    SharedGroup,
}

impl Permission {
    /// The words of a policy file.
    pub const WORDS: &[(&str, Self)] = &[
        ("physical-function", Self::PhysicalFunction),
        ("untrusted-vf", Self::UntrustedVf),
        ("shared-page", Self::SharedPage),
        ("shared-line", Self::SharedLine),
        ("shared-group", Self::SharedGroup),
    ];

    /// The word of a policy file.
    pub fn word(self) -> &'static str {
        match self {
            Self::PhysicalFunction => "physical-function",
            Self::UntrustedVf => "untrusted-vf",
            Self::SharedPage => "shared-page",
            Self::SharedLine => "shared-line",
            Self::SharedGroup => "shared-group",
        }
    }
}

/// When a function is taken from dom0 for guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Holding {
    /// Only on a command.
    #[default]
    OnRequest,
    /// As soon as it appears, and when the service starts.
    AtOnce,
}

impl Holding {
    /// The words of a policy file.
    pub const WORDS: &[(&str, Self)] = &[("on-request", Self::OnRequest), ("at-once", Self::AtOnce)];

    /// The word of a policy file.
    pub fn word(self) -> &'static str {
        match self {
            Self::OnRequest => "on-request",
            Self::AtOnce => "at-once",
        }
    }
}

/// When a function that a PV guest had may go to another owner, which that guest may still reach.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Reuse {
    /// When the domain of that guest has ended.
    #[default]
    AfterShutdown,
    /// At once: the guest is trusted not to keep its BARs mapped.
    Trusted,
}

impl Reuse {
    /// The words of a policy file.
    pub const WORDS: &[(&str, Self)] = &[("after-shutdown", Self::AfterShutdown), ("trusted", Self::Trusted)];
}

/// What happens to a function whose reserved memory (RMRR of the ACPI table DMAR) Xen would refuse to expose: other functions have it
/// too, or the guest has something else at its addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum RdmPolicy {
    /// It is refused.
    Strict,
    /// A guest gets it all the same.
    #[default]
    Relaxed,
}

impl RdmPolicy {
    /// The words of a policy file.
    pub const WORDS: &[(&str, Self)] = &[("strict", Self::Strict), ("relaxed", Self::Relaxed)];

    /// The word of a policy file.
    pub fn word(self) -> &'static str {
        match self {
            Self::Strict => "strict",
            Self::Relaxed => "relaxed",
        }
    }
}

pub(super) const KEYS: &[KeyWord] = &[
    key("description", "What the file is for, in a sentence."),
    key("match", "Which functions it is for: all keys must hold. Without it, every function."),
    key(
        "permit",
        "What is given to guests although it is refused otherwise: physical-function, untrusted-vf, shared-page, shared-line, shared-group.",
    ),
    key("hold", "When it is taken from dom0 for guests: on-request, or at-once when it appears."),
    key(
        "reuse",
        "When it may go from a PV guest, which may keep its BARs mapped, to another owner: after-shutdown of that guest, or trusted: at once.",
    ),
    key("reset", "How it is reset when it changes hands."),
    key(
        "rdm-policy",
        "Whether a guest gets it although its reserved memory (RMRR) is shared with other functions or collides with the guest's memory: strict, or relaxed with a warning.",
    ),
    key(
        "rom",
        "Which expansion ROM a guest finds: hide (none), device (the device's; for an HVM guest a copy), or the absolute path of a file with one \
         (HVM guests only).",
    ),
    key("virtual-functions", "Whether the guest that gets the PF creates its VFs, and how many at most."),
    key(
        "mailbox",
        "With whom the guest of a VF or PF can exchange messages through a Data Object Exchange: guest, dom0, both in a list, or off. Between \
         a VF and its PF; dom0 is on the side of a PF that no guest has.",
    ),
    key("profile", "What happens to unknown registers: a named set of defaults."),
    key("unknown", "What happens to unknown registers, whatever the profile says."),
    key("capabilities", "By capability: what the guest sees of it and may write."),
    key("registers", "Single registers, by their offset in config space."),
    key("errors", "What is done about errors that the function reports."),
];

pub(super) const MATCH_KEYS: &[KeyWord] = &[
    key("vendor", "Vendor ID, hexadecimal; several in a list."),
    key("device", "Device ID, hexadecimal; for a VF the VF Device ID of its PF."),
    key("subsystem-vendor", "Subsystem Vendor ID, hexadecimal."),
    key("subsystem-device", "Subsystem ID, hexadecimal."),
    key("class", "Class code: 2, 4 or 6 hexadecimal digits (base class, subclass, programming interface)."),
    key("function", "Physical or virtual functions."),
    key("address", "Where the function is on the host: [SSSS:]BB:DD.F."),
    key("domain", "The name of the guest that gets the function."),
];

/// One checked policy file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PolicyFile {
    /// Its name, as it was given.
    pub name: String,
    /// What it is for.
    pub description: Option<String>,
    /// Which functions it is for.
    pub matching: Match,
    /// What it permits.
    pub permits: Vec<Permission>,
    /// When it is taken from dom0, where it says so.
    pub hold: Option<Holding>,
    /// When it may go from a PV guest to another owner, where it says so.
    pub reuse: Option<Reuse>,
    /// How it is reset.
    pub reset: ResetWishes,
    /// What happens where Xen objects to its reserved memory, where it says so.
    pub rdm: Option<RdmPolicy>,
    /// Which expansion ROM a guest finds, where it says so.
    pub rom: Option<RomSource>,
    /// The VFs that a guest creates, where it says so.
    pub virtual_functions: Option<ByGuest>,
    /// The mailbox of the function, where it says so.
    pub mailbox: Option<MailboxWish>,
    /// The profile, where it names one.
    pub profile: Option<(Profile, Rule)>,
    /// What happens to unknown registers, where it says so.
    pub unknown: Option<(Treatment, Rule)>,
    /// Capabilities as a whole.
    pub capabilities: Vec<CapabilityOverride>,
    /// Single registers.
    pub registers: Vec<RegisterOverride>,
    /// What is done about errors.
    pub errors: ErrorWishes,
}

impl PolicyFile {
    /// Reads a file. `name` is what messages and rules call it. Every mistake is reported, in the order of lines.
    pub fn parse(name: &str, text: &str) -> Result<Self, Vec<Diagnostic>> {
        let mut diagnostics = Diagnostics::new(name);
        let mut file = Self {
            name: name.to_owned(),
            description: None,
            matching: Match::default(),
            permits: Vec::new(),
            hold: None,
            reuse: None,
            reset: ResetWishes::default(),
            rdm: None,
            rom: None,
            virtual_functions: None,
            mailbox: None,
            profile: None,
            unknown: None,
            capabilities: Vec::new(),
            registers: Vec::new(),
            errors: ErrorWishes::default(),
        };
        if let Some(root) = yaml::parse(text, &mut diagnostics) {
            let entries = read::entries(&root, "a policy", KEYS, &mut diagnostics);
            for (key, node) in &entries {
                file.entry(key, node, &mut diagnostics);
            }
            if let Some((_, node)) = entries.iter().find(|(key, _)| *key == "hold") {
                file.check_holding(node, &mut diagnostics);
            }
            for (key, node) in &entries {
                file.check_domain(key, node, &mut diagnostics);
            }
        }
        if diagnostics.is_empty() { Ok(file) } else { Err(diagnostics.into_list()) }
    }

    /// A file for all functions of the host is a mistake, and a function that appears belongs to no guest yet.
    fn check_holding(&self, node: &Node, diagnostics: &mut Diagnostics) {
        if self.hold == Some(Holding::AtOnce) && self.matching == Match::default() {
            diagnostics
                .say(node.at, "'hold: at-once' needs a 'match' that says for which functions".to_owned());
        }
        if self.hold == Some(Holding::AtOnce) && !self.matching.domain.is_empty() {
            let text = "'hold: at-once' cannot depend on 'domain': no guest has the function then";
            diagnostics.say(node.at, text.to_owned());
        }
    }

    /// What is needed when no guest has the function cannot depend on the guest.
    fn check_domain(&self, key: &str, node: &Node, diagnostics: &mut Diagnostics) {
        let why = match key {
            "reset" => "it is needed, too, when that guest has ended",
            "virtual-functions" => "the PF is bound to the driver that creates VFs before a guest has it",
            _ => return,
        };
        if !self.matching.domain.is_empty() {
            diagnostics.say(node.at, format!("'{key}' cannot depend on 'domain': {why}"));
        }
    }

    fn entry(&mut self, key: &str, node: &Node, diagnostics: &mut Diagnostics) {
        let file = self.name.as_str();
        match key {
            "description" => self.description = read::text(node, "a description", diagnostics),
            "match" => self.matching = matching(node, diagnostics),
            "permit" => {
                let items = read::items(node).iter();
                self.permits = items
                    .filter_map(|item| read::choice(item, "permission", Permission::WORDS, diagnostics))
                    .collect();
            }
            "hold" => {
                self.hold = read::choice(node, "time to hold", Holding::WORDS, diagnostics);
            }
            "reuse" => self.reuse = read::choice(node, "time to reuse", Reuse::WORDS, diagnostics),
            "reset" => self.reset = reset::reset(node, diagnostics),
            "rdm-policy" => self.rdm = read::choice(node, "rdm-policy", RdmPolicy::WORDS, diagnostics),
            "virtual-functions" => {
                self.virtual_functions = virtual_functions::read(node, file, diagnostics);
            }
            "mailbox" => self.mailbox = mailbox::read(node, file, diagnostics),
            "rom" => self.rom = rom::rom(node, diagnostics),
            "profile" => {
                let profile = read::choice(node, "profile", Profile::WORDS, diagnostics);
                self.profile = profile.map(|profile| {
                    let reason = format!("unknown registers: profile {}", profile.word());
                    (profile, rules::rule(Some(reason), file, node.at))
                });
            }
            "unknown" => self.unknown = rules::unknown(node, file, diagnostics),
            "capabilities" => {
                let mut known: Vec<(Selector, &str)> = Vec::new();
                for (name, node) in read::mapping(node, "'capabilities'", diagnostics).unwrap_or_default() {
                    if let Some(which) = names::selector(&name.text) {
                        let other = known.iter().find(|(other, word)| *other == which && *word != name.text);
                        if let Some((_, word)) = other {
                            let text = format!("'{}' is the same capability as '{word}' above", name.text);
                            diagnostics.say(name.at, text);
                        }
                        known.push((which, &name.text));
                    }
                    let (whole, registers) = rules::capability(name, node, file, diagnostics);
                    self.capabilities.extend(whole);
                    self.registers.extend(registers);
                }
            }
            "errors" => self.errors = errors::errors(node, diagnostics),
            _ => self.registers.extend(rules::registers(node, None, file, diagnostics)),
        }
    }
}

fn matching(node: &Node, diagnostics: &mut Diagnostics) -> Match {
    let mut matching = Match::default();
    for (key, node) in read::entries(node, "'match'", MATCH_KEYS, diagnostics) {
        let mut ids = |what: &str| {
            read::list(
                node,
                what,
                "one to four hexadecimal digits are expected, as in 8086",
                hexadecimal,
                diagnostics,
            )
        };
        match key {
            "vendor" => matching.vendor = ids("vendor id"),
            "device" => matching.device = ids("device id"),
            "subsystem-vendor" => matching.subsystem_vendor = ids("subsystem vendor id"),
            "subsystem-device" => matching.subsystem_device = ids("subsystem id"),
            "class" => {
                let expected = "2, 4 or 6 hexadecimal digits are expected, as in 0200";
                matching.class = read::list(node, "class", expected, ClassPrefix::parse, diagnostics);
            }
            "function" => {
                matching.function = read::choice(node, "kind of function", Kind::WORDS, diagnostics)
            }
            "address" => {
                let expected = "[SSSS:]BB:DD.F is expected, as in 0000:01:10.0";
                matching.address =
                    read::list(node, "address", expected, |text| text.parse::<Sbdf>().ok(), diagnostics);
            }
            _ => {
                let is_name = |text: &str| (text.len() <= 255).then(|| text.to_owned());
                matching.domain = read::list(
                    node,
                    "domain",
                    "a name of at most 255 bytes is expected",
                    is_name,
                    diagnostics,
                );
            }
        }
    }
    matching
}

#[cfg(test)]
mod tests;
