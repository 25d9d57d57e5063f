//! Functions that running guests have persistently and that are not attached to them.

use std::collections::{BTreeMap, BTreeSet};
use std::time::SystemTime;

use pciback::{DomId, Sbdf};

use crate::engine::problems::Problem;
use crate::protocol::Cause;

/// A function that is missing in its guest.
struct MissingFunction {
    domain: DomId,
    /// Whether it is being attached.
    under_way: bool,
    /// Why the last attempt failed; `None` before the first one.
    why: Option<String>,
    /// When it failed first.
    since: Option<SystemTime>,
}

/// The missing functions.
#[derive(Default)]
pub(super) struct Missing(BTreeMap<Sbdf, MissingFunction>);

impl Missing {
    /// Adds a function that a domain is to get; `false`: the domain waits for it already.
    pub fn add(&mut self, address: Sbdf, domain: DomId) -> bool {
        if self.domain(address) == Some(domain) {
            return false;
        }
        self.0.insert(address, MissingFunction { domain, under_way: false, why: None, since: None });
        true
    }

    /// The domain that is to get a function.
    pub fn domain(&self, address: Sbdf) -> Option<DomId> {
        self.0.get(&address).map(|missing| missing.domain)
    }

    /// Removes a function; returns the domain that was to get it.
    pub fn remove(&mut self, address: Sbdf) -> Option<DomId> {
        self.0.remove(&address).map(|missing| missing.domain)
    }

    /// Removes the functions of domains that have ended.
    pub fn keep_those_of(&mut self, present: &BTreeSet<DomId>) {
        self.0.retain(|_, missing| present.contains(&missing.domain));
    }

    /// An attempt is made: an earlier failure no longer counts. Returns the domain, unless an attempt is under way.
    pub fn try_again(&mut self, address: Sbdf) -> Option<DomId> {
        let missing = self.0.get_mut(&address)?;
        missing.why = None;
        (!missing.under_way).then_some(missing.domain)
    }

    /// The attempt goes on in a transaction.
    pub fn begin(&mut self, address: Sbdf) {
        if let Some(missing) = self.0.get_mut(&address) {
            missing.under_way = true;
        }
    }

    /// Whether a function is being attached.
    pub fn is_under_way(&self, address: Sbdf) -> bool {
        self.0.get(&address).is_some_and(|missing| missing.under_way)
    }

    /// The attempt failed. Returns the domain.
    pub fn failed(&mut self, address: Sbdf, why: String) -> Option<DomId> {
        let missing = self.0.get_mut(&address)?;
        missing.under_way = false;
        missing.why = Some(why);
        missing.since = missing.since.or_else(|| Some(SystemTime::now()));
        Some(missing.domain)
    }

    /// Functions whose last attempt failed, of one domain or of all.
    pub fn all_failed(&self, of: Option<DomId>) -> Vec<Sbdf> {
        let failed = self.0.iter().filter(|(_, missing)| {
            missing.why.is_some() && !missing.under_way && of.is_none_or(|domain| domain == missing.domain)
        });
        failed.map(|(address, _)| *address).collect()
    }

    /// Functions of a domain for which no attempt was made.
    pub fn untried(&self, domain: DomId) -> Vec<Sbdf> {
        let untried = self
            .0
            .iter()
            .filter(|(_, missing)| missing.domain == domain && missing.why.is_none() && !missing.under_way);
        untried.map(|(address, _)| *address).collect()
    }

    /// Whether a domain may still get one of its missing functions.
    pub fn is_waited_for(&self, by: DomId) -> bool {
        self.0.values().any(|missing| missing.domain == by && (missing.under_way || missing.why.is_none()))
    }

    /// Whether a domain has missing functions.
    pub fn is_in(&self, domain: DomId) -> bool {
        self.0.values().any(|missing| missing.domain == domain)
    }

    /// Functions that could not be attached, as problems for `xpci status`.
    pub fn problems(&self) -> impl Iterator<Item = Problem> {
        self.0.iter().filter_map(|(address, missing)| {
            let (why, domain) = (missing.why.as_ref()?, missing.domain);
            let text = format!("{address} is missing in domain {domain}, which has it persistently: {why}");
            let since = missing.since.unwrap_or_else(SystemTime::now);
            Some(Problem::new(Cause::Persistent, text).on(*address).of(domain).since(since))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_function_is_waited_for_until_an_attempt_fails_and_again_from_the_next_one() {
        let (mut missing, address, domain) = (Missing::default(), Sbdf::from_devfn(0, 1, 0x80), DomId(3));
        assert!(missing.add(address, domain));
        assert!(!missing.add(address, domain), "it is known");
        assert!(missing.is_waited_for(domain));
        missing.failed(address, "it is busy".to_owned());
        assert!(!missing.is_waited_for(domain) && missing.is_in(domain));
        assert_eq!(missing.all_failed(None), [address]);
        assert_eq!(missing.problems().count(), 1);
        assert_eq!(missing.try_again(address), Some(domain));
        assert!(missing.is_waited_for(domain));
        missing.begin(address);
        assert_eq!(missing.try_again(address), None, "an attempt is under way");
    }
}
