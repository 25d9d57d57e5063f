//! Requests of a PV guest: they come on the page that it shares (pciif), one at a time.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use log::warn;

use super::interrupts;
use super::wire::{self, Command, Op, OpAnswer, WireError};
use crate::config::Access;
use crate::fault::AerAnswer;
use crate::platform::{PlatformError, Ring};
use crate::serve::worker::{RequestSource, Turn};
use crate::serve::{Counters, GuestFunction, NotNotified, Notification, Roster, Server, ServerReport};
use crate::{Devfn, DomId};

/// How long a read of a VF that the host is creating waits. Linux's frontend gives up after two seconds.
const VF_LIMIT: Duration = Duration::from_millis(1700);

/// Starts to serve a PV guest over its connected ring; `functions` by device and function number. A request that has waited since is
/// answered first. Reports go to `report`, which must not block.
pub fn start(
    domain: DomId,
    ring: Box<dyn Ring>,
    functions: BTreeMap<Devfn, Box<GuestFunction>>,
    counters: Arc<Counters>,
    report: Box<dyn Fn(ServerReport) + Send>,
) -> io::Result<Server> {
    Server::start(domain, RingRequests::new(domain, ring), functions, counters, report)
}

/// The requests on a ring.
pub(super) struct RingRequests {
    domain: DomId,
    ring: Box<dyn Ring>,
    /// The claim of the last request.
    token: u32,
}

/// Claims that a previous process left on the page or in a record must not be used again soon.
fn first_token() -> u32 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    now.as_nanos() as u32
}

impl RequestSource for RingRequests {
    fn recover(&mut self, roster: &mut Roster) {
        interrupts::recover_interrupted(roster);
    }

    fn serve(&mut self, roster: &mut Roster) -> Turn {
        let Some(op) = wire::take_request(self.ring.page()) else { return Turn::Idle };
        if roster.take_orders() {
            return Turn::Stopped;
        }
        self.answer(roster, op);
        Turn::Busy
    }

    fn event_fd(&self) -> BorrowedFd<'_> {
        self.ring.event_fd()
    }

    fn take_events(&mut self) -> Result<(), PlatformError> {
        // There is at most one: until it is taken its port is masked.
        self.ring.take_event().map(drop)
    }

    fn tell(&mut self, notification: &Notification, function: &mut GuestFunction) -> Result<(), NotNotified> {
        if !wire::has_aer_handler(self.ring.page()) {
            return Err(NotNotified::NoHandler);
        }
        let Notification { devfn, conversation, .. } = *notification;
        let (request, state) = (conversation.recovery.asks(), conversation.recovery.state());
        // A driver that is told twice of an error is taken down twice, and one that resumes twice is started twice.
        if !(notification.resumed && wire::was_aer_put(self.ring.page(), devfn, request)) {
            // In this order: whoever finds the note sees by the page whether the request was put there, too.
            wire::clear_aer(self.ring.page());
            function.note_conversation(Some(conversation));
            wire::put_aer(self.ring.page(), devfn, request, state);
        }
        // Also for a request that is there: an earlier process may have been killed before the event. One too many does nothing.
        self.ring.notify().map_err(|error| {
            warn!("domain {}: tell it of an error: {error}", self.domain);
            self.withdraw();
            NotNotified::Unreachable
        })
    }

    fn take_answer(&mut self) -> Option<Result<AerAnswer, u32>> {
        wire::take_aer_answer(self.ring.page())
    }

    fn withdraw(&mut self) {
        wire::withdraw_aer(self.ring.page());
    }
}

impl RingRequests {
    pub fn new(domain: DomId, ring: Box<dyn Ring>) -> Self {
        Self { domain, ring, token: first_token() }
    }

    /// Carries out a request that was taken from the page, and answers it.
    pub fn answer(&mut self, roster: &mut Roster, mut op: Op) {
        let taken = roster.counters.taken();
        if op.info == 0 {
            self.token = self.token.wrapping_add(1).max(1);
            op.info = self.token;
            wire::claim(self.ring.page(), op.info);
        }
        let op = &op;
        let routing_id = routing_id(op);
        let devfn = routing_id.and_then(|id| u8::try_from(id).ok()).map(Devfn);
        let mut demand = None;
        let mut attachment = None;
        let answer = match devfn.and_then(|devfn| roster.functions.get_mut(&devfn)) {
            Some(function) => {
                attachment = Some(function.attachment());
                let (answer, wanted) = function.execute(op);
                demand = wanted;
                answer
            }
            None => routing_id
                .and_then(|id| of_vf(roster, id, op))
                .unwrap_or_else(|| OpAnswer::failed(WireError::NoDevice)),
        };
        // The frontend gives up after two seconds; an answer that comes later must not reach its next request.
        if wire::claimed(self.ring.page(), op.info) {
            wire::put_answer(self.ring.page(), &answer);
            if let Err(error) = self.ring.notify() {
                warn!("domain {}: {error}", roster.domain);
            }
        }
        let took = taken.map(|taken| taken.elapsed());
        let mut trouble = None;
        if let Some(function) = devfn.and_then(|devfn| roster.functions.get_mut(&devfn)) {
            function.sent(op);
            trouble = function.take_trouble();
        }
        let failed = answer.error != WireError::Success && !is_scan(op, answer.error);
        roster.counters.answered(failed, took);
        if failed {
            complain(roster, op, answer.error, trouble);
        }
        roster.tell(demand, attachment);
    }
}

/// Bus, device and function number of a request; `None` where no function of the guest can be. What the service attaches is on bus 0.
fn routing_id(op: &Op) -> Option<u16> {
    let (bus, devfn) = (u8::try_from(op.bus).ok()?, u8::try_from(op.devfn).ok()?);
    (op.domain == 0).then(|| u16::from_be_bytes([bus, devfn]))
}

/// Answers for a VF that the guest has created. Writes of it change nothing.
fn of_vf(roster: &Roster, routing_id: u16, op: &Op) -> Option<OpAnswer> {
    let access = Access::new(op.offset, op.size).ok()?;
    let pf = roster.pf_of_vf(routing_id)?;
    match op.command {
        Command::CONF_READ => Some(OpAnswer::value(pf.read_vf_within(access, VF_LIMIT))),
        Command::CONF_WRITE => Some(OpAnswer::value(op.value)),
        _ => None,
    }
}

/// Whether a guest only asked which functions there are: a bus scan reads every device number.
fn is_scan(op: &Op, error: WireError) -> bool {
    error == WireError::NoDevice && op.command == Command::CONF_READ
}

fn complain(roster: &Roster, op: &Op, error: WireError, trouble: Option<String>) {
    if let Some(unsaid) = roster.counters.may_complain() {
        let (command, devfn, offset, size) = (op.command.0, op.devfn, op.offset, op.size);
        let trouble = trouble.map(|text| format!(" ({text})")).unwrap_or_default();
        warn!(
            "domain {}: request {command} on {:x}:{:x}:{devfn:x} at {offset:#x}, {size} bytes: {error:?}{trouble}; {unsaid} more of its \
             requests failed since the last such line",
            roster.domain, op.domain, op.bus
        );
    }
}

#[cfg(test)]
mod tests;
