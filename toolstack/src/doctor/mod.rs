//! `xpci doctor`: whether a dom0 is set up so that functions can be given to guests, and what to do where it is not.
//!
//! Each check looks through the platform's traits and changes nothing. The service makes them; where it cannot be reached, `xpci` makes
//! those that need no service itself.

mod checks;
#[cfg(test)]
mod tests;

use pciback::platform::linux::{LinuxErrors, LinuxHost, LinuxMachine};
use pciback::platform::{ErrorSource, Host, Machine, Platform, StoreOps, XlQuestion};

use crate::outcome::Failure;
use crate::protocol::{Finding, Verdict};

/// What the checks look at.
struct Examined<'a> {
    machine: &'a dyn Machine,
    host: &'a dyn Host,
    errors: &'a dyn ErrorSource,
    /// xenstore, where there is a connection.
    store: Option<&'a dyn StoreOps>,
    /// What `xl info` prints, or why it does not.
    info: Result<String, String>,
    /// What `xl dmesg` prints, likewise.
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

/// Makes all checks on the service's host.
pub fn examine(platform: &Platform) -> Vec<Finding> {
    let store: &dyn StoreOps = platform.store.as_ref();
    let (machine, host, errors) =
        (platform.machine.as_ref(), platform.host.as_ref(), platform.errors.as_ref());
    Examined::new(machine, host, errors, Some(store)).findings()
}

/// Makes the checks that need no service, on this host; `unreachable`: why the service does not make them.
pub fn examine_alone(unreachable: &Failure) -> Vec<Finding> {
    let (machine, host) = (LinuxMachine::new("/".into()), LinuxHost::new("/sys".into()));
    let errors = LinuxErrors::new("/sys".into());
    let service = Finding::new("service", Verdict::Fault, unreachable.message.clone());
    let service = service.mend(unreachable.hint.clone().unwrap_or_default());
    let mut findings = vec![service];
    findings.extend(Examined::new(&machine, &host, &errors, None).findings());
    findings
}
