//! Failures on demand: an operation that shall fail, or take long.

use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use nix::errno::Errno;

use super::fuse::Fuse;
use super::locked;
use super::model;
use crate::platform::Cause;
use crate::{DomId, Sbdf};

/// One operation that fails or takes long.
#[derive(Debug, Clone, Default)]
pub struct Failure {
    /// Which: the name of a method of the platform's traits, for example `reset`, or `config_read`, `config_write`.
    pub operation: String,
    /// Only for this function.
    pub address: Option<Sbdf>,
    /// Only for this domain.
    pub domain: Option<DomId>,
    /// Only for this xenstore node and those below it.
    pub path: Option<String>,
    /// The answer; without one the operation only takes long.
    pub errno: Option<Errno>,
    /// How long it takes; longer than the caller waits is a time-out.
    pub delay: Duration,
    /// How many calls succeed before.
    pub after: u32,
    /// How many calls fail.
    pub times: u32,
}

/// What an operation is about, as far as it is about that.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Subject<'a> {
    pub address: Option<Sbdf>,
    pub domain: Option<DomId>,
    pub path: Option<&'a str>,
    pub limit: Option<Duration>,
}

impl From<Sbdf> for Subject<'_> {
    fn from(address: Sbdf) -> Self {
        Self { address: Some(address), ..Self::default() }
    }
}

impl From<DomId> for Subject<'_> {
    fn from(domain: DomId) -> Self {
        Self { domain: Some(domain), ..Self::default() }
    }
}

impl Failure {
    pub(super) fn described(text: &model::Failure) -> Result<Self, String> {
        Ok(Self {
            operation: text.operation.clone(),
            address: text.address,
            domain: text.domain.map(DomId),
            path: text.path.clone(),
            errno: text.errno.as_deref().map(errno).transpose()?,
            delay: Duration::from_millis(text.delay_ms),
            after: text.after,
            times: text.times,
        })
    }

    fn concerns(&self, operation: &str, subject: &Subject<'_>) -> bool {
        let below = |top: &String| {
            let rest = subject.path.and_then(|path| path.strip_prefix(top.as_str()));
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        self.times > 0
            && self.operation == operation
            && (self.address.is_none() || self.address == subject.address)
            && (self.domain.is_none() || self.domain == subject.domain)
            && self.path.as_ref().is_none_or(below)
    }
}

/// Calls that fail at random, the same ones for the same order of calls.
#[derive(Debug)]
struct Random {
    state: u64,
    one_in: u64,
    failed: u64,
}

impl Random {
    fn fails(&mut self) -> bool {
        // Numerical Recipes' generator; its high bits are good enough.
        self.state = self.state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let fails = (self.state >> 33).is_multiple_of(self.one_in);
        self.failed += u64::from(fails);
        fails
    }
}

/// All failures of one host, as one run of the service meets them.
#[derive(Clone, Default)]
pub(super) struct Failures {
    list: Arc<Mutex<Vec<Failure>>>,
    random: Arc<Mutex<Option<Random>>>,
    /// Whether it meets those at random.
    shaken: bool,
    /// How that run ends.
    pub fuse: Fuse,
}

impl Failures {
    pub fn add(&self, failure: Failure) {
        locked(&self.list).push(failure);
    }

    /// One in so many calls of the services' fails from now on.
    pub fn at_random(&self, seed: u64, one_in: u64) {
        *locked(&self.random) = Some(Random { state: seed, one_in: one_in.max(1), failed: 0 });
    }

    /// Ends that, and returns how many calls failed.
    pub fn end_random(&self) -> u64 {
        locked(&self.random).take().map_or(0, |random| random.failed)
    }

    /// The same failures, for a service that dies when the fuse says so; `shaken`: also those at random.
    pub fn of_a_run(&self, fuse: &Fuse, shaken: bool) -> Self {
        Self { shaken, fuse: fuse.clone(), ..self.clone() }
    }

    /// How many calls shall still fail.
    pub fn pending(&self) -> u32 {
        locked(&self.list).iter().map(|failure| failure.times).sum()
    }

    /// Nothing fails any more.
    pub fn clear(&self) {
        locked(&self.list).clear();
    }

    /// Answers for one call. To be asked before any other lock is taken, because it may wait.
    pub fn check(&self, operation: &str, subject: Subject<'_>) -> Result<(), Cause> {
        self.fuse.look();
        if self.shaken && locked(&self.random).as_mut().is_some_and(Random::fails) {
            return Err(Errno::EIO.into());
        }
        let (errno, delay) = {
            let mut failures = locked(&self.list);
            let Some(failure) = failures.iter_mut().find(|failure| failure.concerns(operation, &subject))
            else {
                return Ok(());
            };
            if failure.after > 0 {
                failure.after -= 1;
                return Ok(());
            }
            failure.times -= 1;
            (failure.errno, failure.delay)
        };
        let limit = subject.limit.unwrap_or(Duration::MAX);
        thread::sleep(delay.min(limit));
        match errno {
            _ if delay > limit => Err(Cause::TimedOut(limit)),
            Some(errno) => Err(errno.into()),
            None => Ok(()),
        }
    }
}

/// The error number of a name.
fn errno(name: &str) -> Result<Errno, String> {
    // Linux on x86 numbers them from 1 to 133.
    let found = (1..=133).map(Errno::from_raw).find(|errno| format!("{errno:?}") == name);
    found.filter(|errno| *errno != Errno::UnknownErrno).ok_or_else(|| format!("'{name}' is no error number"))
}
