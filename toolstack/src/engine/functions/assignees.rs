//! To which guests the settings (`guests`) assign functions.
//!
//! A name in the settings can mean a serial number, a path or a network interface, so that the answer takes reads of config space and
//! sysfs. Threads read these, and the engine uses what they have noted.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pciback::Sbdf;
use pciback::platform::HostFunction;

use crate::outcome::Failure;

/// A function's incarnation, and the guest to which the settings assign it, by its name there.
type Assignee = (u64, Option<String>);

/// What threads have noted about functions, last.
#[derive(Debug, Clone, Default)]
pub(in crate::engine) struct Assignees(Arc<Mutex<BTreeMap<Sbdf, Assignee>>>);

impl Assignees {
    fn locked(&self) -> MutexGuard<'_, BTreeMap<Sbdf, Assignee>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes the guest to which the settings assign a function; `None`: they assign it to none.
    pub fn note(&self, function: &HostFunction, guest: Option<String>) {
        self.locked().insert(function.address, (function.incarnation, guest));
    }

    /// The guest to which the settings assign a function.
    ///
    /// # Errors
    /// No thread has read the function since it appeared.
    pub fn of(&self, function: &HostFunction) -> Result<Option<String>, Failure> {
        let address = function.address;
        match self.locked().get(&address) {
            Some((incarnation, guest)) if *incarnation == function.incarnation => Ok(guest.clone()),
            _ => Err(Failure::refused(format!("{address} has just appeared")).on(address).hint("try again")),
        }
    }
}

#[cfg(test)]
mod tests {
    use pciback::platform::sim::Simulation;

    use super::*;

    #[test]
    fn what_was_noted_of_one_function_says_nothing_of_another_at_its_address() {
        let host = "drivers: []\nfunctions: [{address: 02:00.0, model: virtio-net}]\n";
        let platform = Simulation::from_yaml(host).unwrap().platform("test").unwrap();
        let function = platform.host.function("02:00.0".parse().unwrap()).unwrap();
        let assignees = Assignees::default();
        assert!(assignees.of(&function).unwrap_err().message.contains("has just appeared"));
        assignees.note(&function, Some("web".to_owned()));
        assert_eq!(assignees.of(&function).unwrap().as_deref(), Some("web"));
        let other = HostFunction { incarnation: function.incarnation + 1, ..function };
        assignees.of(&other).unwrap_err();
    }
}
