//! `xpci doctor`: checks whether dom0 is set up for attaching functions to guests, and what to do if not.
//!
//! The checks use the platform's traits and change nothing. They run in the service; if it cannot be reached, `xpci` itself runs those
//! that do not need it.

mod checks;
#[cfg(test)]
mod tests;

use pciback::platform::linux::{LinuxErrors, LinuxHost, LinuxMachine};
use pciback::platform::{ErrorSource, Host, Machine, Platform, StoreOps, XlQuestion};

use crate::outcome::Failure;
use crate::protocol::{Finding, Verdict};

/// The inputs of the checks.
struct Examined<'a> {
    machine: &'a dyn Machine,
    host: &'a dyn Host,
    errors: &'a dyn ErrorSource,
    /// xenstore, if there is a connection.
    store: Option<&'a dyn StoreOps>,
    /// The output of `xl info`, or why there is none.
    info: Result<String, String>,
    /// The output of `xl dmesg`, or why there is none.
    log: Result<String, String>,
}

impl<'a> Examined<'a> {
    fn new(
        machine: &'a dyn Machine,
        host: &'a dyn Host,
        errors: &'a dyn ErrorSource,
        store: Option<&'a dyn StoreOps>,
    ) -> Self {
        let xl = |question| machine.xl(question).map_err(|error| error.to_string());
        let (info, log) = (xl(XlQuestion::Info), xl(XlQuestion::Log));
        Self { machine, host, errors, store, info, log }
    }

    fn findings(&self) -> Vec<Finding> {
        checks::CHECKS.iter().map(|check| check(self)).collect()
    }
}

/// Runs all checks, in the service.
pub fn examine(platform: &Platform) -> Vec<Finding> {
    let store: &dyn StoreOps = platform.store.as_ref();
    let (machine, host, errors) =
        (platform.machine.as_ref(), platform.host.as_ref(), platform.errors.as_ref());
    Examined::new(machine, host, errors, Some(store)).findings()
}

/// Runs the checks that do not need the service; `unreachable`: why the service cannot be reached.
pub fn examine_alone(unreachable: &Failure) -> Vec<Finding> {
    let (machine, host) = (LinuxMachine::new("/".into()), LinuxHost::new("/sys".into()));
    let errors = LinuxErrors::new("/sys".into());
    let service = Finding::new("service", Verdict::Fault, unreachable.message.clone());
    let service = service.mend(unreachable.hint.clone().unwrap_or_default());
    let mut findings = vec![service];
    findings.extend(Examined::new(&machine, &host, &errors, None).findings());
    findings
}
