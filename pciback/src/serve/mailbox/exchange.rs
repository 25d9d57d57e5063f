//! The mailbox of one function, as its guest uses it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{End, Mailboxes, PfEnd, VfEnd};
use crate::DomId;
use crate::config::{FunctionKind, FunctionSpec, MailboxPeers};
use crate::mailbox::{Direction, Exchanged, InstanceImage, InstanceState, Message, Queues, Request, Status};
use crate::memory::Words;

/// How many messages a guest can send through one function in [`PERIOD`].
pub(super) const MOST_IN_PERIOD: u32 = 100;
pub(super) const PERIOD: Duration = Duration::from_secs(1);

/// The mailbox of one function. It is in the list of all until it is dropped.
#[derive(Debug)]
pub struct FunctionMailbox {
    end: End,
    domain: DomId,
    key: Arc<()>,
    image: InstanceImage,
    state: InstanceState,
    all: Mailboxes,
    /// When the period began, and what was sent in it.
    period: Option<(Instant, u32)>,
}

impl FunctionMailbox {
    /// Opens the mailbox of a function that a guest has. `words`: its file.
    pub fn open(
        all: &Mailboxes,
        spec: &FunctionSpec,
        domain: DomId,
        peers: MailboxPeers,
        words: &Words,
    ) -> Self {
        let (key, address) = (Arc::new(()), spec.address);
        let image = InstanceImage::new(words);
        let mut state = all.lock();
        let end = match spec.kind {
            FunctionKind::Physical => {
                let end = PfEnd { key: Arc::clone(&key), domain, peers, rings: false };
                state.rooms.entry(address).or_default().pf = Some(end);
                End::Pf(address)
            }
            FunctionKind::Virtual { physical_function: pf, index, .. } => {
                let end =
                    VfEnd { key: Arc::clone(&key), address, peers, queues: Queues::new(words), rings: false };
                state.rooms.entry(pf).or_default().vfs.insert(index, end);
                End::Vf(pf, index)
            }
        };
        drop(state);
        let state = image.load();
        Self { end, domain, key, image, state, all: all.clone(), period: None }
    }

    /// What DOE Status and the Read Data Mailbox read.
    pub(in crate::serve) fn shown(&self) -> (u32, u32) {
        (self.state.instance.status(), self.state.instance.data())
    }

    /// A guest's write of a register; returns whether the engine has to be notified of a message. `claim`: what identifies the access to a
    /// service that meets it again after a kill; 0 where nothing does.
    pub(in crate::serve) fn write(
        &mut self,
        (register, value, mask): (u16, u32, u32),
        claim: u32,
        now: Instant,
    ) -> bool {
        if claim != 0 && claim == self.state.claim {
            return false;
        }
        let mut notify = false;
        match self.state.instance.write(register, value, mask) {
            Some(Exchanged::Request(words)) => {
                let (response, is_sent) = self.answer(&words, now);
                self.state.instance.respond(response);
                notify = is_sent;
            }
            Some(Exchanged::Read) => self.finish_receiving(),
            Some(Exchanged::Aborted) => self.state.origin = None,
            None => {}
        }
        self.state.claim = claim;
        self.image.store(&self.state);
        notify
    }

    /// A reset of the function, or the end of its use: whatever was under way is given up, and no message is lost.
    pub(in crate::serve) fn reset(&mut self) {
        let InstanceState { claim, sent, last_vf, .. } = self.state;
        self.state = InstanceState { claim, sent, last_vf, ..InstanceState::default() };
        self.image.store(&self.state);
    }

    fn answer(&mut self, words: &[u32], now: Instant) -> (Option<Vec<u32>>, bool) {
        let response = match Request::parse(words) {
            None => return (None, false),
            Some(Request::Discover(index)) => Request::discovered(index),
            Some(Request::Malformed(sequence)) => Request::sent(Status::Malformed, sequence),
            Some(Request::Receive) => self.receive(),
            Some(Request::Send(message)) => {
                let sequence = message.sequence;
                let (status, notify) = self.send(message, now);
                return (Some(Request::sent(status, sequence)), notify);
            }
        };
        (Some(response), false)
    }

    fn send(&mut self, message: Message, now: Instant) -> (Status, bool) {
        if !self.may_send(now) {
            return (Status::TooMany, false);
        }
        let sent = self.state.sent.checked_add(1).unwrap_or(1);
        let mut all = self.all.lock();
        let status = match self.end {
            End::Pf(pf) => all.send_to_vf(pf, self.domain, sent, &message),
            End::Vf(pf, vf) => all.send_to_pf(pf, sent, &Message { vf, ..message }),
        };
        if status == Status::Done {
            self.state.sent = sent;
        }
        (status, all.report(status))
    }

    fn may_send(&mut self, now: Instant) -> bool {
        let is_over = |(began, _): &(Instant, u32)| now.saturating_duration_since(*began) >= PERIOD;
        let (began, count) = self.period.filter(|period| !is_over(period)).unwrap_or((now, 0));
        self.period = Some((began, count.saturating_add(1)));
        count < MOST_IN_PERIOD
    }

    /// The response with the oldest message, which stays in its queue until the response has been read.
    fn receive(&mut self) -> Vec<u32> {
        let all = self.all.lock();
        let first = match self.end {
            End::Pf(pf) => all.first_for_pf(pf, self.domain, self.state.last_vf),
            End::Vf(pf, vf) => all.first_for_vf(pf, vf),
        };
        drop(all);
        match first {
            Ok((origin, message)) => {
                self.state.origin = Some(origin);
                Request::received(Ok(&message))
            }
            Err(status) => Request::received(Err(status)),
        }
    }

    fn finish_receiving(&mut self) {
        let Some(origin) = self.state.origin.take() else { return };
        self.state.last_vf = origin.vf;
        let (pf, direction) = match self.end {
            End::Pf(pf) => (pf, Direction::ToPf),
            End::Vf(pf, _) => (pf, Direction::ToVf),
        };
        if let Some(vf) = self.all.lock().vf(pf, origin.vf) {
            vf.queues.pop(direction, origin.number);
        }
    }
}

impl Drop for FunctionMailbox {
    fn drop(&mut self) {
        let mut state = self.all.lock();
        let (End::Pf(pf) | End::Vf(pf, _)) = self.end;
        let Some(room) = state.rooms.get_mut(&pf) else { return };
        // Not that of a later attachment.
        let is_this = |key: &Arc<()>| Arc::ptr_eq(key, &self.key);
        match self.end {
            End::Pf(_) => room.pf = room.pf.take().filter(|end| !is_this(&end.key)),
            End::Vf(_, number) => {
                if room.vfs.get(&number).is_some_and(|end| is_this(&end.key)) {
                    room.vfs.remove(&number);
                }
            }
        }
        if room.pf.is_none() && room.vfs.is_empty() {
            state.rooms.remove(&pf);
        }
    }
}

#[cfg(test)]
mod tests;
