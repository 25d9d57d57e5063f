//! Requests that wait: a repair that the service makes by itself has their function, for a moment that no user can know of.

use std::collections::BTreeMap;

use pciback::Sbdf;

use super::Engine;
use crate::protocol::Request;
use crate::reply::Reply;

/// What waits, by function under repair.
#[derive(Default)]
pub(super) struct Deferred(BTreeMap<Sbdf, Vec<(Request, Reply)>>);

/// The function that a request would change.
fn changed(request: &Request) -> Option<Sbdf> {
    match request {
        Request::PciAssignableAdd { address, .. }
        | Request::PciAssignableRemove { address, .. }
        | Request::PciAttach { address, .. }
        | Request::PciDetach { address, .. }
        | Request::QuarantineClear { address, .. }
        | Request::VfSet { address, .. } => Some(*address),
        _ => None,
    }
}

impl Engine {
    /// A function is repaired from now on.
    pub(super) fn repair_begins(&mut self, address: Sbdf) {
        self.busy.insert(address);
        self.requests_wait(address);
    }

    /// Requests for a function wait until [`Self::repair_ends`].
    pub(super) fn requests_wait(&mut self, address: Sbdf) {
        self.deferred.0.entry(address).or_default();
    }

    /// Its repair has ended, or was not begun: what waited for that is handled in the order in which it came.
    pub(super) fn repair_ends(&mut self, address: Sbdf) {
        self.busy.remove(&address);
        self.requests_go_on(address);
    }

    /// What waited for a function is handled, if anything did.
    pub(super) fn requests_go_on(&mut self, address: Sbdf) {
        for (request, reply) in self.deferred.0.remove(&address).unwrap_or_default() {
            self.handle_request(request, reply);
        }
    }

    /// Keeps a request until the repair of its function has ended; one that does not have to wait is given back.
    pub(super) fn defer(&mut self, request: Request, reply: Reply) -> Option<(Request, Reply)> {
        let waiting = changed(&request).and_then(|address| self.deferred.0.get_mut(&address));
        let Some(waiting) = waiting else { return Some((request, reply)) };
        waiting.push((request, reply));
        None
    }
}
