//! Adds the names of guests to texts for people: `domain 5` becomes `'web' (domain 5)`.
//!
//! Commands in hints name the guest, too: `'xpci pci-detach 5 ...'` becomes `'xpci pci-detach web ...'`.
//!
//! Most of the service, and all errors of Xen and the kernel, identify guests by domain id. Names are added when an answer is sent, so
//! that every text has them, and to events when they happen.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::{Arc, Weak};

use pciback::DomId;
use pciback::platform::Store;

use crate::domains;
use crate::outcome::Failure;
use crate::protocol::{EventView, Success};

const DOMAIN: &str = "domain ";
/// The beginnings of commands in hints that take a guest by its name as well as by its number.
const COMMANDS: [&str; 7] = [
    "xpci pci-attach ",
    "xpci pci-detach ",
    "xpci pci-list ",
    "xpci save -c ",
    "xl unpause ",
    "xl destroy ",
    "xl pci-detach ",
];

/// The source of names: xenstore, as long as the service is connected to it.
#[derive(Clone)]
pub struct GuestNames(Weak<dyn Store>);

impl GuestNames {
    /// The names in this xenstore.
    pub fn new(store: &Arc<dyn Store>) -> Self {
        Self(Arc::downgrade(store))
    }

    /// A lookup for one answer.
    pub(crate) fn lookup(&self) -> Lookup<'_> {
        Lookup { names: self, found: HashMap::new() }
    }
}

/// The names found for one answer, so that each guest is looked up once.
pub(crate) struct Lookup<'a> {
    names: &'a GuestNames,
    found: HashMap<DomId, Option<String>>,
}

/// The name of a domain in texts.
struct Called {
    name: String,
    /// The domain id, if it is shown next to the name.
    number: Option<DomId>,
}

impl Lookup<'_> {
    /// Adds the names of guests to an outcome.
    pub fn name_all(&mut self, outcome: &mut Result<Success, Failure>) {
        let texts = match outcome {
            Ok(success) => {
                for (domain, name) in success.guests_mut() {
                    *name = domain.and_then(|domain| self.name(domain));
                }
                success.texts_mut()
            }
            Err(failure) => failure.texts_mut(),
        };
        for text in texts {
            self.name_in(text);
        }
    }

    /// Adds the name of the guest to an event.
    pub fn name_event(&mut self, event: &mut EventView) {
        event.domain_name = event.domain.and_then(|domain| self.name(domain));
        event.texts_mut().into_iter().for_each(|text| self.name_in(text));
    }

    /// Adds the names of guests to a text. `(domain 5)` follows a name already and is not changed; `(domain 5's)` is the owner of a
    /// function.
    pub fn name_in(&mut self, text: &mut String) {
        let mut named = String::with_capacity(text.len());
        let mut rest = text.as_str();
        while let Some(at) = rest.find(DOMAIN) {
            let (before, after) = rest.split_at(at);
            named.push_str(before);
            let digits = after[DOMAIN.len()..].bytes().take_while(u8::is_ascii_digit).count();
            let end = DOMAIN.len() + digits;
            // In quotes, it is a name or what somebody typed.
            let is_word = !named.ends_with(|last: char| last.is_alphanumeric() || last == '\'')
                && !after[end..].starts_with(|next: char| next.is_alphanumeric());
            let domain = after[DOMAIN.len()..end].parse().ok().filter(|_| is_word).map(DomId);
            let owned = after[end..].strip_prefix("'s)");
            rest = &after[end..];
            match (domain.and_then(|domain| self.called(domain)), named.ends_with('('), owned) {
                (Some(Called { name, number }), false, _) => {
                    named.push_str(&name);
                    named.push_str(&number.map(|number| format!(" (domain {number})")).unwrap_or_default());
                }
                (Some(Called { name, number: Some(number) }), true, Some(left)) => {
                    let _ = write!(named, "{name}, domain {number})");
                    rest = left;
                }
                _ => named.push_str(&after[..end]),
            }
        }
        named.push_str(rest);
        *text = self.in_commands(named);
    }

    /// Replaces numbers of domains in commands by names that need no quotes in a shell and are no numbers themselves.
    fn in_commands(&mut self, text: String) -> String {
        COMMANDS.iter().fold(text, |text, command| {
            let mut parts = text.split(command);
            let mut named = parts.next().unwrap_or_default().to_owned();
            for part in parts {
                let digits = part.bytes().take_while(u8::is_ascii_digit).count();
                let (number, rest) = part.split_at(digits);
                let is_word = rest.starts_with([' ', '\'']);
                let domain = number.parse().ok().filter(|_| is_word).map(DomId);
                let name = domain.and_then(|domain| self.name(domain)).filter(|name| is_plain(name));
                named.push_str(command);
                named.push_str(name.as_deref().unwrap_or(number));
                named.push_str(rest);
            }
            named
        })
    }

    fn called(&mut self, domain: DomId) -> Option<Called> {
        if domain == DomId::IO {
            return Some(Called { name: "Xen's quarantine domain".to_owned(), number: None });
        }
        let name = self.name(domain).filter(|_| domain != DomId::DOM0)?;
        Some(Called { name: format!("'{name}'"), number: Some(domain) })
    }

    /// The name of a domain; `None`, for example, if it has ended.
    fn name(&mut self, domain: DomId) -> Option<String> {
        let store = &self.names.0;
        let look = || domains::name(store.upgrade()?.as_ref(), domain).ok().flatten();
        self.found.entry(domain).or_insert_with(look).clone()
    }
}

/// Whether a name is one word for every shell, and cannot be taken for the number of a domain or for an option.
fn is_plain(name: &str) -> bool {
    name.starts_with(|first: char| first.is_ascii_alphabetic())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
}

#[cfg(test)]
mod tests {
    use pciback::platform::sim::Simulation;

    use super::*;

    #[test]
    fn guests_that_run_are_named_once_and_the_rest_stays() {
        let host = "{drivers: [], functions: [], domains: [{id: 1, name: web}, {id: 12, name: db}, {id: 13, name: \"a; reboot\"}]}";
        let platform = Simulation::from_yaml(host).unwrap().platform("test").unwrap();
        let names = GuestNames::new(&platform.store);
        for (text, expected) in [
            ("domain 1 has it", "'web' (domain 1) has it"),
            ("wait for domain 12", "wait for 'db' (domain 12)"),
            ("domain 1, domain 12: gone", "'web' (domain 1), 'db' (domain 12): gone"),
            ("'web' (domain 1) has it", "'web' (domain 1) has it"),
            ("01:00.1 (domain 1's), 01:00.2 (domain 7's)", "01:00.1 ('web', domain 1), 01:00.2 (domain 7's)"),
            ("domain 7 is gone", "domain 7 is gone"),
            ("domain 0 is the host", "domain 0 is the host"),
            ("to domain 32753: EPERM", "to Xen's quarantine domain: EPERM"),
            ("subdomain 1, domain 1x, domain  1, domain", "subdomain 1, domain 1x, domain  1, domain"),
            ("domain 99999", "domain 99999"),
            ("there is no domain 'domain 1'", "there is no domain 'domain 1'"),
            ("'xpci pci-detach 1 01:10.0'", "'xpci pci-detach web 01:10.0'"),
            ("'xl unpause 12' first", "'xl unpause db' first"),
            ("'xpci pci-list 13' shows", "'xpci pci-list 13' shows"),
            ("'xpci pci-list 7', 'xl destroy 1x'", "'xpci pci-list 7', 'xl destroy 1x'"),
            ("", ""),
        ] {
            let mut named = text.to_owned();
            names.lookup().name_in(&mut named);
            assert_eq!(named, expected);
        }
    }
}
