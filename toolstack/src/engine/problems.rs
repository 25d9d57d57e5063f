//! Problems for `xpci status`: limited to a readable number, and kept as long as they last.

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use pciback::platform::{Hypervisor, Store};
use pciback::{DomId, Sbdf};

use crate::journal::JournalError;
use crate::outcome::Failure;
use crate::protocol::{Cause, ProblemView, utc_of};

/// The number of problems kept per guest, for those that guests can cause; the last ones.
const MAX_PER_GUEST: usize = 8;
/// The number of problems kept in all.
const MAX_PROBLEMS: usize = 512;

/// One problem.
#[derive(Debug, Clone)]
pub struct Problem {
    text: String,
    cause: Cause,
    since: SystemTime,
    address: Option<Sbdf>,
    domain: Option<DomId>,
    /// Whether a guest can cause it at will.
    of_guest: bool,
    until: Until,
}

/// How a problem ends. It also ends when its domain does.
#[derive(Debug, Clone)]
enum Until {
    /// When the engine cures it.
    Resolved,
    /// When this file no longer exists.
    FileGone(PathBuf),
    /// When Xen no longer has the domain paused.
    Unpaused,
}

impl Problem {
    /// A problem found now.
    pub fn new(cause: Cause, text: impl Into<String>) -> Self {
        let (text, since, until) = (text.into(), SystemTime::now(), Until::Resolved);
        Self { text, cause, since, address: None, domain: None, of_guest: false, until }
    }

    /// A problem from a failure, with the function and the domain that it names.
    pub fn failed(cause: Cause, failure: &Failure) -> Self {
        let (address, domain) = (failure.address, failure.domain);
        Self { address, domain, ..Self::new(cause, failure.to_string()) }
    }

    /// A file that cannot be used. The problem lasts until the file is removed.
    pub fn unusable(error: &JournalError) -> Self {
        let until = Until::FileGone(error.path().to_owned());
        Self { address: error.address(), until, ..Self::new(Cause::StateFiles, error.to_string()) }
    }

    /// A file of a function that could not be written. The problem lasts until another operation on the function succeeds.
    pub fn unwritten(error: &JournalError) -> Self {
        Self { address: error.address(), ..Self::new(Cause::StateFiles, error.to_string()) }
    }

    /// Adds the function.
    pub fn on(self, address: Sbdf) -> Self {
        Self { address: Some(address), ..self }
    }

    /// Adds the domain; the problem ends when the domain does.
    pub fn of(self, domain: DomId) -> Self {
        Self { domain: Some(domain), ..self }
    }

    /// Makes the problem end when Xen no longer has the domain paused.
    pub fn until_unpaused(self) -> Self {
        Self { until: Until::Unpaused, ..self }
    }

    /// Makes the problem end when this file no longer exists.
    pub fn until_gone(self, path: &Path) -> Self {
        Self { until: Until::FileGone(path.to_owned()), ..self }
    }

    fn is_resolved(&self, store: &dyn Store, hypervisor: &dyn Hypervisor) -> bool {
        // If a check fails, the problem stays.
        let gone = self.domain.is_some_and(|domain| matches!(store.domain_exists(domain), Ok(false)));
        gone || match (&self.until, self.domain) {
            (Until::FileGone(path), _) => matches!(path.try_exists(), Ok(false)),
            (Until::Unpaused, Some(domain)) => hypervisor.domain(domain).is_ok_and(|info| !info.paused),
            _ => false,
        }
    }

    /// The view of the problem in the protocol.
    pub fn view(&self) -> ProblemView {
        ProblemView {
            message: self.text.clone(),
            cause: self.cause,
            since: Some(utc_of(self.since)),
            address: self.address,
            domain: self.domain,
        }
    }
}

/// Problems, the oldest first, without duplicates. All of them are also in the log.
#[derive(Debug, Default)]
pub(super) struct Problems(VecDeque<Problem>);

impl Problems {
    /// Adds a problem that no guest can cause.
    pub fn push(&mut self, problem: Problem) {
        self.add(problem);
    }

    /// Adds a problem that a guest can cause at will. The limit is per domain, so that a guest cannot reset it by reconnecting.
    pub fn push_of(&mut self, domain: DomId, text: String) {
        self.add(Problem { of_guest: true, ..Problem::new(Cause::Guest, text).of(domain) });
        let is_its = |problem: &Problem| problem.of_guest && problem.domain == Some(domain);
        if self.0.iter().filter(|problem| is_its(problem)).count() > MAX_PER_GUEST {
            self.remove_first(is_its);
        }
    }

    /// Removes problems of a cause.
    pub fn resolve(&mut self, cause: Cause) {
        self.0.retain(|problem| problem.cause != cause || !matches!(problem.until, Until::Resolved));
    }

    /// Removes problems of one function.
    pub fn resolve_of(&mut self, address: Sbdf, causes: &[Cause]) {
        self.0.retain(|problem| {
            problem.address != Some(address)
                || !causes.contains(&problem.cause)
                || !matches!(problem.until, Until::Resolved)
        });
    }

    /// Removes problems that a guest caused, because it is served again.
    pub fn resolve_guest(&mut self, domain: DomId) {
        self.0.retain(|problem| !problem.of_guest || problem.domain != Some(domain));
    }

    /// Removes problems that ended without an action of the engine.
    pub fn sweep(&mut self, store: &dyn Store, hypervisor: &dyn Hypervisor) {
        self.0.retain(|problem| !problem.is_resolved(store, hypervisor));
    }

    /// All problems that are kept.
    pub fn iter(&self) -> impl Iterator<Item = &Problem> {
        self.0.iter()
    }

    fn add(&mut self, problem: Problem) {
        if self.iter().any(|known| known.text == problem.text) {
            return;
        }
        self.0.push_back(problem);
        if self.0.len() > MAX_PROBLEMS {
            // Problems that guests can cause are dropped first.
            let guests = self.iter().any(|problem| problem.of_guest);
            self.remove_first(|problem| problem.of_guest || !guests);
        }
    }

    fn remove_first(&mut self, which: impl Fn(&Problem) -> bool) {
        if let Some(first) = self.0.iter().position(which) {
            self.0.remove(first);
        }
    }
}

impl Extend<Problem> for Problems {
    fn extend<T: IntoIterator<Item = Problem>>(&mut self, problems: T) {
        problems.into_iter().for_each(|problem| self.push(problem));
    }
}

impl FromIterator<Problem> for Problems {
    fn from_iter<T: IntoIterator<Item = Problem>>(problems: T) -> Self {
        let mut all = Self::default();
        all.extend(problems);
        all
    }
}

/// Deviations of several functions: a reason for each, and since when it exists.
#[derive(Debug, Default)]
pub(super) struct Deviations(BTreeMap<Sbdf, (String, SystemTime)>);

impl Deviations {
    /// Adds a deviation, or changes its reason; its start time stays.
    pub fn insert(&mut self, address: Sbdf, why: String) {
        let since = self.0.get(&address).map_or_else(SystemTime::now, |(_, since)| *since);
        self.0.insert(address, (why, since));
    }

    /// Removes the deviation of a function.
    pub fn remove(&mut self, address: Sbdf) {
        self.0.remove(&address);
    }

    /// Removes all deviations.
    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// The deviations as problems for the status; `text` makes the message.
    pub fn problems(
        &self,
        cause: Cause,
        text: impl Fn(Sbdf, &str) -> String,
    ) -> impl Iterator<Item = Problem> {
        self.0.iter().map(move |(address, (why, since))| Problem {
            since: *since,
            ..Problem::new(cause, text(*address, why)).on(*address)
        })
    }
}

impl Problem {
    /// Sets since when the problem is known.
    pub fn since(self, since: SystemTime) -> Self {
        Self { since, ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn audit_log() -> Problem {
        Problem::new(Cause::StateFiles, "the audit log")
    }

    #[test]
    fn problems_of_a_guest_displace_only_its_own_and_have_no_duplicates() {
        let mut problems = Problems::default();
        problems.push(audit_log());
        problems.push_of(DomId(1), "its ring".into());
        for number in 0..10_000 {
            problems.push_of(DomId(2), format!("trouble {number}"));
            problems.push_of(DomId(1), "its ring".into());
        }
        let kept: Vec<&str> = problems.iter().map(|problem| problem.text.as_str()).collect();
        assert_eq!(kept.len(), 2 + MAX_PER_GUEST);
        assert_eq!((kept[0], kept[1]), ("the audit log", "its ring"));
        assert_eq!(kept.last(), Some(&"trouble 9999"));
    }

    #[test]
    fn problems_of_many_guests_displace_no_others() {
        let mut problems: Problems = [audit_log()].into_iter().collect();
        for domain in 0..1000 {
            problems.push_of(DomId(domain), format!("trouble of {domain}"));
        }
        assert_eq!(
            (problems.iter().count(), problems.iter().next().unwrap().text.as_str()),
            (MAX_PROBLEMS, "the audit log")
        );
    }

    #[test]
    fn only_problems_of_the_cause_and_function_are_resolved() {
        let (one, other) = (Sbdf::from_devfn(0, 1, 0x80), Sbdf::from_devfn(0, 1, 0x82));
        let mut problems: Problems = [
            Problem::new(Cause::Network, "one").on(one),
            Problem::new(Cause::StateFiles, "its file").on(one),
            Problem::new(Cause::Network, "other").on(other),
        ]
        .into_iter()
        .collect();
        problems.resolve_of(one, &[Cause::Network]);
        let left: Vec<&str> = problems.iter().map(|problem| problem.text.as_str()).collect();
        assert_eq!(left, ["its file", "other"]);
    }

    #[test]
    fn a_problem_whose_reason_changes_keeps_its_start_time() {
        let address = Sbdf::from_devfn(0, 1, 0x80);
        let mut lasting = Deviations::default();
        let only = |lasting: &Deviations| {
            let mut all = lasting.problems(Cause::Holding, |address, why| format!("{address}: {why}"));
            all.next().map(|problem| (problem.text, problem.since))
        };
        lasting.insert(address, "a".into());
        let (_, began) = only(&lasting).unwrap();
        lasting.insert(address, "b".into());
        assert_eq!(only(&lasting), Some((format!("{address}: b"), began)));
        lasting.remove(address);
        assert_eq!(only(&lasting), None);
    }
}
