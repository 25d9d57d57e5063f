//! Background work for one guest: switching off its functions, and stopping its serving thread.
//!
//! While it runs, the next actions of the guest's handshake wait, because they rely on it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use log::{Level, error};
use pciback::serve::{GuestFunction, Server};
use pciback::{Devfn, DomId, Sbdf};

use super::Event;
use super::guest::Awaited;
use crate::engine::problems::Problem;
use crate::engine::{self, Answer, Engine};
use crate::outcome::{ErrorCode, Failure};
use crate::protocol::Cause;
use crate::transaction::not_released;

/// A function to be taken from its guest.
pub(in crate::engine) enum Removal {
    /// A thread serves it.
    Served(Arc<Server>, Devfn),
    /// No thread serves it.
    Parked(Box<GuestFunction>),
}

impl Removal {
    /// Switches the function off; `None`: its thread does not have it.
    fn finish(self) -> Result<Option<Sbdf>, String> {
        let (address, quiesced) = match self {
            Self::Parked(mut function) => (function.address(), function.quiesce()),
            Self::Served(server, devfn) => match server.take(devfn).map_err(|stuck| stuck.to_string())? {
                Some(taken) => (taken.function.address(), taken.quiesced),
                None => return Ok(None),
            },
        };
        quiesced.map(|()| Some(address)).map_err(|error| error.to_string())
    }
}

/// The result of background work.
pub enum WorkDone {
    /// A function was switched off, or could not be. The answer is for the transaction of an HVM guest, which waits for this.
    SwitchedOff(Devfn, Result<Option<Sbdf>, String>, Option<Answer>),
    /// The functions of a guest whose ring was given up, switched off.
    GaveUpRing(Result<Parked, String>),
    /// A function whose interrupts were restored after its reset.
    Restored(Parked),
}

/// Functions that no thread serves, by device and function number.
pub(in crate::engine) type Parked = BTreeMap<Devfn, Box<GuestFunction>>;

impl Engine {
    fn work(
        &mut self,
        domain: DomId,
        name: &str,
        work: impl FnOnce() -> WorkDone + Send + 'static,
        failed: impl FnOnce(Failure) -> WorkDone + Send + 'static,
    ) {
        let Some(guest) = self.guests.get_mut(domain) else { return };
        guest.working += 1;
        let inbox = self.inbox.clone();
        self.inbox.background(&format!("{name} {domain}"), work, move |done| {
            inbox.send(engine::Event::Guests(Event::WorkDone(domain, done.unwrap_or_else(failed))));
        });
    }

    /// Switches off a function that is withdrawn from its guest. An error returns the answer, because there is nothing to switch off.
    pub(in crate::engine) fn switch_off(
        &mut self,
        domain: DomId,
        devfn: Devfn,
        answer: Option<Answer>,
    ) -> Result<(), Option<Answer>> {
        let Some(guest) = self.guests.get_mut(domain) else { return Err(answer) };
        if let Some(hvm) = &mut guest.hvm {
            hvm.devices.remove(&devfn);
        }
        let removal = match (&guest.server, guest.parked.remove(&devfn)) {
            (_, Some(function)) => Removal::Parked(function),
            (Some(server), None) => Removal::Served(Arc::clone(server), devfn),
            (None, None) => return Err(answer),
        };
        let answer = Arc::new(Mutex::new(answer));
        let otherwise = Arc::clone(&answer);
        let take =
            |answer: &Mutex<Option<Answer>>| answer.lock().unwrap_or_else(PoisonError::into_inner).take();
        self.work(
            domain,
            "switch off",
            move || WorkDone::SwitchedOff(devfn, removal.finish(), take(&answer)),
            move |failure| WorkDone::SwitchedOff(devfn, Err(failure.message), take(&otherwise)),
        );
        Ok(())
    }

    /// Handles the disconnection of a guest's frontend. The next frontend finds the functions as after an attachment, with interrupts and
    /// bus mastering off.
    pub(super) fn give_up_ring(&mut self, domain: DomId) {
        let Some(guest) = self.guests.get_mut(domain) else { return };
        let (server, parked) = (guest.server.take(), std::mem::take(&mut guest.parked));
        if server.is_none() && parked.is_empty() {
            return;
        }
        self.guest_left_ring(domain);
        let work = move || {
            let mut functions = match server.map(|server| server.stop()) {
                Some(Err(stuck)) => return WorkDone::GaveUpRing(Err(stuck.to_string())),
                Some(Ok(functions)) => functions,
                None => BTreeMap::new(),
            };
            functions.extend(parked);
            for function in functions.values_mut() {
                if let Err(problem) = function.quiesce() {
                    error!("{}: switch off for domain {domain}: {problem}", function.address());
                }
            }
            WorkDone::GaveUpRing(Ok(functions))
        };
        self.work(domain, "give up the ring of", work, |failure| WorkDone::GaveUpRing(Err(failure.message)));
    }

    /// Restores a function after its reset, when no thread serves it.
    pub(super) fn restore_parked(&mut self, domain: DomId, devfn: Devfn) {
        let Some(guest) = self.guests.get_mut(domain) else { return };
        if guest.working > 0 {
            guest.later.push(Box::new(move |engine| engine.restore_parked(domain, devfn)));
            return;
        }
        let Some(mut function) = guest.parked.remove(&devfn) else { return };
        let work = move || {
            if let Err(problem) = function.reset_done() {
                error!("{}: restore its interrupts: {problem}", function.address());
            }
            WorkDone::Restored(BTreeMap::from([(devfn, function)]))
        };
        self.work(domain, "restore for", work, |_| WorkDone::Restored(BTreeMap::new()));
    }

    /// Handles the end of background work, and continues with what waited for it.
    pub(super) fn work_done(&mut self, domain: DomId, work_done: WorkDone) {
        let Some(guest) = self.guests.get_mut(domain) else { return };
        guest.working = guest.working.saturating_sub(1);
        match work_done {
            WorkDone::SwitchedOff(devfn, outcome, answer) => {
                self.switched_off(domain, devfn, outcome, answer)
            }
            WorkDone::GaveUpRing(Ok(functions)) => {
                guest.parked.extend(functions);
                guest.log_line(Level::Info, &format!("domain {domain}: its ring is given up"));
            }
            WorkDone::GaveUpRing(Err(why)) => {
                error!("domain {domain}: {why}");
                self.problems.push(Problem::new(Cause::Guest, format!("domain {domain}: {why}")).of(domain));
                self.quarantine_all_of(domain, &format!("its ring was given up, but {why}"));
            }
            WorkDone::Restored(functions) => guest.parked.extend(functions),
        }
        let later = self.guests.get_mut(domain).map(|guest| std::mem::take(&mut guest.later));
        for action in later.unwrap_or_default() {
            action(self);
        }
        self.act(domain, Vec::new());
    }

    /// Quarantines all functions of a guest whose thread does not stop, because the guest may still reach them.
    fn quarantine_all_of(&mut self, domain: DomId, why: &str) {
        let functions: Vec<Sbdf> =
            self.functions.records().of(domain).map(|(record, _)| record.address).collect();
        for address in functions {
            self.quarantine(address, why);
        }
    }

    fn switched_off(
        &mut self,
        domain: DomId,
        devfn: Devfn,
        outcome: Result<Option<Sbdf>, String>,
        answer: Option<Answer>,
    ) {
        let outcome = match outcome {
            Ok(switched) => {
                if let Some(address) = switched {
                    self.functions.handover().reachable.withdrawn(address);
                }
                // If nothing was switched off, the transaction checks what the guest can still reach.
                Ok(None)
            }
            Err(why) => {
                let text = format!("switch off what domain {domain} had at {devfn}: {why}");
                Err(Failure::new(ErrorCode::Failed, text).of(domain))
            }
        };
        match answer {
            Some(answer) => {
                // The server of an HVM guest ends with its last function.
                self.forget_if_idle(domain);
                answer.send(outcome);
            }
            None => self.answer_removed(domain, devfn, outcome),
        }
    }

    /// Answers the transaction that waits for its guest to release a function.
    pub(super) fn answer_removed(
        &mut self,
        domain: DomId,
        devfn: Devfn,
        outcome: Result<Option<String>, Failure>,
    ) {
        self.answer(domain, devfn, |awaited| match awaited {
            Awaited::Release => Some(outcome),
            Awaited::Withdrawing => Some(outcome.map(|_| Some(not_released(domain)))),
            Awaited::Look | Awaited::FirstLook => Some(Err(Failure::new(
                ErrorCode::Failed,
                format!("domain {domain} did not take the function in time"),
            )
            .hint("see the guest's log; 'xpci status' shows the state of its frontend"))),
        });
    }
}
