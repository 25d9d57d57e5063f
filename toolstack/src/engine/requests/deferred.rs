//! Requests that wait for the end of a repair. The service starts repairs by itself, so a user cannot know that a function is busy with
//! one.

use std::collections::BTreeMap;

use pciback::Sbdf;

use crate::engine::Engine;
use crate::protocol::Request;
use crate::reply::Reply;

/// Waiting requests, by the function under repair.
#[derive(Default)]
pub(in crate::engine) struct Deferred(BTreeMap<Sbdf, Vec<(Request, Reply)>>);

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
    /// Reserves a function for a repair.
    pub(in crate::engine) fn repair_begins(&mut self, address: Sbdf) {
        self.functions.reserve(address);
        self.requests_wait(address);
    }

    /// Makes requests for a function wait until [`Self::repair_ends`].
    pub(in crate::engine) fn requests_wait(&mut self, address: Sbdf) {
        self.deferred.0.entry(address).or_default();
    }

    /// Ends a repair, or one that was not started, and handles the requests that waited for it, in the order in which they came.
    pub(in crate::engine) fn repair_ends(&mut self, address: Sbdf) {
        self.functions.release(address);
        self.requests_go_on(address);
    }

    /// Handles the requests that waited for a function, if any.
    pub(in crate::engine) fn requests_go_on(&mut self, address: Sbdf) {
        for (request, reply) in self.deferred.0.remove(&address).unwrap_or_default() {
            self.handle_request(request, reply);
        }
    }

    /// Queues a request if a repair of its function runs; returns it otherwise.
    pub(super) fn defer(&mut self, request: Request, reply: Reply) -> Option<(Request, Reply)> {
        let waiting = changed(&request).and_then(|address| self.deferred.0.get_mut(&address));
        let Some(waiting) = waiting else { return Some((request, reply)) };
        waiting.push((request, reply));
        None
    }
}
