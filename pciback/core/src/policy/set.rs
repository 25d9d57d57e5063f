//! Policy files together: which apply to a function, and what they say as one.

use std::collections::BTreeSet;

use super::file::{Holding, Permission, PolicyFile, Profile, RdmPolicy, Reuse};
use super::matching::Subject;
use super::reset::ResetWishes;
use super::rom::RomSource;
use crate::config::Policy;
use crate::fault::ErrorPolicy;

/// Checked policy files, the least specific first.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PolicySet {
    files: Vec<PolicyFile>,
}

/// What a set says of one function.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Merged<'a> {
    /// For the compiler.
    pub policy: Policy,
    /// What they permit.
    pub permits: BTreeSet<Permission>,
    /// What is done about errors.
    pub errors: ErrorPolicy,
    /// When it is taken from dom0.
    pub hold: Holding,
    /// When it may go from a PV guest to another owner.
    pub reuse: Reuse,
    /// How it is reset when its owner changes.
    pub reset: ResetWishes,
    /// What happens where Xen objects to its reserved memory.
    pub rdm: RdmPolicy,
    /// Which expansion ROM a guest finds, and the file that says so.
    pub rom: (RomSource, Option<&'a str>),
    /// The files that apply, the least specific first: a later one wins.
    pub applied: Vec<&'a PolicyFile>,
    /// The others, each with the reason.
    pub passed_over: Vec<(&'a PolicyFile, String)>,
    /// The profile in force, and the file that chose it.
    pub profile: (Profile, Option<&'a str>),
}

impl PolicySet {
    /// Puts files in order: by how closely they match; those that match as closely as each other by their names.
    pub fn new(mut files: Vec<PolicyFile>) -> Self {
        files.sort_by(|a, b| a.matching.order(&b.matching).then_with(|| a.name.cmp(&b.name)));
        Self { files }
    }

    /// The files, the least specific first.
    pub fn files(&self) -> &[PolicyFile] {
        &self.files
    }

    /// What all files that match a function say of it together.
    pub fn merge(&self, subject: &Subject) -> Merged<'_> {
        let mut merged = Merged::nothing();
        for file in &self.files {
            match file.matching.mismatch(subject) {
                None => merged.lay(file),
                Some(reason) => merged.passed_over.push((file, reason)),
            }
        }
        merged
    }

    /// What the files say whether they match or not: for trying one out.
    pub fn all(&self) -> Merged<'_> {
        let mut merged = Merged::nothing();
        self.files.iter().for_each(|file| merged.lay(file));
        merged
    }
}

impl<'a> Merged<'a> {
    fn nothing() -> Self {
        Self {
            policy: Policy::default(),
            permits: BTreeSet::new(),
            errors: ErrorPolicy::default(),
            hold: Holding::default(),
            reuse: Reuse::default(),
            reset: ResetWishes::default(),
            rdm: RdmPolicy::default(),
            rom: (RomSource::default(), None),
            applied: Vec::new(),
            passed_over: Vec::new(),
            profile: (Profile::Passthrough, None),
        }
    }

    fn lay(&mut self, file: &'a PolicyFile) {
        if let Some((profile, rule)) = &file.profile {
            self.profile = (*profile, Some(&file.name));
            self.policy.unknown = (profile.unknown(), rule.clone());
            self.policy.hide_unknown = (*profile == Profile::Hidden).then(|| rule.clone());
        }
        if let Some(unknown) = &file.unknown {
            self.policy.unknown = unknown.clone();
        }
        self.permits.extend(&file.permits);
        self.errors = file.errors.lay_over(self.errors);
        self.hold = file.hold.unwrap_or(self.hold);
        self.reuse = file.reuse.unwrap_or(self.reuse);
        self.reset = file.reset.lay_over(&self.reset);
        self.rdm = file.rdm.unwrap_or(self.rdm);
        if let Some(rom) = &file.rom {
            self.rom = (rom.clone(), Some(&file.name));
        }
        if let Some(by_guest) = &file.virtual_functions {
            self.policy.virtual_functions = Some(by_guest.clone());
        }
        if let Some(mailbox) = &file.mailbox {
            self.policy.mailbox = Some(mailbox.clone());
        }
        self.policy.capabilities.extend(file.capabilities.iter().cloned());
        self.policy.registers.extend(file.registers.iter().cloned());
        self.applied.push(file);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Sbdf;
    use crate::config::{Identity, Treatment};
    use crate::policy::Kind;

    fn subject() -> Subject {
        let identity = Identity { vendor: 0x8086, device: 0x10ca, class: 0x020000, ..Identity::default() };
        Subject { address: Sbdf::from_devfn(0, 1, 0x80), identity, kind: Kind::Virtual, domain: None }
    }

    fn set(files: &[(&str, &str)]) -> PolicySet {
        PolicySet::new(files.iter().map(|(name, text)| PolicyFile::parse(name, text).unwrap()).collect())
    }

    #[test]
    fn the_more_specific_file_wins_whatever_its_name() {
        let set = set(&[
            ("a-device.yaml", "match: {vendor: 8086, device: 10ca}\nunknown: hide\n"),
            ("b-class.yaml", "match: {class: 02}\nprofile: strict\n"),
            ("c-other.yaml", "match: {vendor: 10ec}\nprofile: hidden\n"),
        ]);
        let merged = set.merge(&subject());
        let names: Vec<&str> = merged.applied.iter().map(|file| file.name.as_str()).collect();
        assert_eq!(names, ["b-class.yaml", "a-device.yaml"]);
        assert_eq!(merged.policy.unknown.0, Treatment::ZERO);
        assert_eq!(merged.profile, (Profile::Strict, Some("b-class.yaml")));
        assert_eq!(merged.passed_over[0].1, "its vendor is 8086");
    }

    #[test]
    fn what_any_matching_file_permits_is_permitted() {
        let set = set(&[
            ("a.yaml", "match: {vendor: 8086}\npermit: [untrusted-vf]\n"),
            ("b.yaml", "match: {device: 10ca}\nprofile: strict\n"),
            ("c.yaml", "match: {vendor: 10ec}\npermit: physical-function\n"),
        ]);
        assert_eq!(set.merge(&subject()).permits, BTreeSet::from([Permission::UntrustedVf]));
    }

    #[test]
    fn each_wish_about_errors_is_laid_over_those_of_less_specific_files() {
        use crate::fault::Action;
        let set = set(&[
            ("a.yaml", "match: {vendor: 8086}\nerrors: {fatal: destroy-guest, non-fatal: unplug}\n"),
            ("b.yaml", "match: {vendor: 8086, device: 10ca}\nerrors: {non-fatal: log, answer-seconds: 3}\n"),
        ]);
        let errors = set.merge(&subject()).errors;
        assert_eq!((errors.non_fatal, errors.fatal), (Action::Log, Action::DestroyGuest));
        assert_eq!((errors.answer_seconds, errors.correctable), (3, Action::Log));
        assert_eq!(
            set.merge(&Subject { identity: Identity::default(), ..subject() }).errors,
            ErrorPolicy::default()
        );
    }

    #[test]
    fn the_most_specific_file_that_says_so_decides_when_to_hold() {
        let at_once = ("a.yaml", "match: {vendor: 8086, device: 10ca}\nhold: at-once\n");
        let silent = ("b.yaml", "match: {address: '01:10.0'}\nprofile: strict\n");
        let except = ("c.yaml", "match: {address: '01:10.0'}\nhold: on-request\n");
        assert_eq!(set(&[silent]).merge(&subject()).hold, Holding::OnRequest);
        assert_eq!(set(&[at_once, silent]).merge(&subject()).hold, Holding::AtOnce);
        assert_eq!(set(&[at_once, silent, except]).merge(&subject()).hold, Holding::OnRequest);
    }

    #[test]
    fn each_wish_about_resets_and_reserved_memory_is_laid_over_those_of_less_specific_files() {
        use crate::policy::WithoutReset;
        let merged = |files: &[(&str, &str)]| {
            let set = set(files);
            let merged = set.merge(&subject());
            (merged.reset.methods.clone(), merged.reset.none, merged.rdm)
        };
        assert_eq!(merged(&[]), (None, None, RdmPolicy::Relaxed));
        let vendor =
            ("a.yaml", "match: {vendor: 8086}\nreset: {methods: [bus], none: permit}\nrdm-policy: strict\n");
        let device = ("b.yaml", "match: {vendor: 8086, device: 10ca}\nreset: {none: refuse}\n");
        let bus = Some(vec!["bus".to_owned()]);
        assert_eq!(merged(&[vendor]), (bus.clone(), Some(WithoutReset::Permit), RdmPolicy::Strict));
        assert_eq!(merged(&[vendor, device]), (bus, Some(WithoutReset::Refuse), RdmPolicy::Strict));
    }

    #[test]
    fn files_that_match_as_closely_as_each_other_go_by_name() {
        let set = set(&[("20.yaml", "profile: strict\n"), ("10.yaml", "profile: hidden\n")]);
        assert_eq!(set.merge(&subject()).profile, (Profile::Strict, Some("20.yaml")));
        assert_eq!(set.merge(&subject()).policy.hide_unknown, None);
    }
}
