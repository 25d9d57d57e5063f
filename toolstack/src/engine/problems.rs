//! What was found wrong outside any one function, for `xpci status`: as much of it as somebody can read.

use std::collections::VecDeque;

use pciback::DomId;

/// How many are kept of those that one guest causes; the last ones.
const OF_A_GUEST: usize = 8;
/// How many are kept in all.
const IN_ALL: usize = 512;

/// Problems, the oldest first. None stands there twice. All of them are in the log.
#[derive(Debug, Default)]
pub(super) struct Problems(VecDeque<(Option<DomId>, String)>);

impl Problems {
    /// Adds one that no guest can cause.
    pub fn push(&mut self, text: String) {
        self.add(None, text);
    }

    /// Adds one that a guest may cause as often as it likes. What was kept of it before counts, however often it has connected since.
    pub fn push_of(&mut self, domain: DomId, text: String) {
        self.add(Some(domain), text);
        let own = self.0.iter().filter(|(cause, _)| *cause == Some(domain)).count();
        if own > OF_A_GUEST {
            self.remove_first(|cause| cause == Some(domain));
        }
    }

    /// All that are kept.
    pub fn iter(&self) -> impl Iterator<Item = &String> {
        self.0.iter().map(|(_, text)| text)
    }

    fn add(&mut self, cause: Option<DomId>, text: String) {
        if self.iter().any(|known| *known == text) {
            return;
        }
        self.0.push_back((cause, text));
        if self.0.len() > IN_ALL {
            // What guests cause goes before what nobody else tells of.
            let guests = self.0.iter().any(|(cause, _)| cause.is_some());
            self.remove_first(|cause| cause.is_some() || !guests);
        }
    }

    fn remove_first(&mut self, which: impl Fn(Option<DomId>) -> bool) {
        if let Some(first) = self.0.iter().position(|(cause, _)| which(*cause)) {
            self.0.remove(first);
        }
    }
}

impl Extend<String> for Problems {
    fn extend<T: IntoIterator<Item = String>>(&mut self, problems: T) {
        problems.into_iter().for_each(|text| self.push(text));
    }
}

impl FromIterator<String> for Problems {
    fn from_iter<T: IntoIterator<Item = String>>(problems: T) -> Self {
        let mut all = Self::default();
        all.extend(problems);
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_pushes_out_its_own_problems_only_and_none_stands_there_twice() {
        let mut problems = Problems::default();
        problems.push("the audit log".into());
        problems.push_of(DomId(1), "its ring".into());
        for number in 0..10_000 {
            problems.push_of(DomId(2), format!("trouble {number}"));
            problems.push_of(DomId(1), "its ring".into());
        }
        let kept: Vec<&String> = problems.iter().collect();
        assert_eq!(kept.len(), 2 + OF_A_GUEST);
        assert_eq!((kept[0].as_str(), kept[1].as_str()), ("the audit log", "its ring"));
        assert_eq!(problems.iter().last().unwrap(), "trouble 9999");
    }

    #[test]
    fn many_guests_push_out_nothing_else_either() {
        let mut problems: Problems = ["the audit log".to_owned()].into_iter().collect();
        for domain in 0..1000 {
            problems.push_of(DomId(domain), format!("trouble of {domain}"));
        }
        assert_eq!(
            (problems.iter().count(), problems.iter().next().unwrap().as_str()),
            (IN_ALL, "the audit log")
        );
    }
}
