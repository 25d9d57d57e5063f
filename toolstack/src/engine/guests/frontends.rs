//! Guests' frontends: reading their xenstore nodes, and carrying out the actions of their handshakes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use log::{Level, error, info, warn};
use pciback::DomId;
use pciback::platform::PlatformError;
use pciback::serve::pv::{self, Action, NodeChange, PAUSE, RingPlace, nodes};

use super::Event;
use super::guest::Awaited;
use crate::engine::{self, Engine};
use crate::outcome::Failure;

/// After this time, node changes that xenstore refused are tried again.
const WRITE_AGAIN: Duration = Duration::from_secs(1);

impl Engine {
    pub(super) fn watch_guest(&self, domain: DomId) -> Result<(), Failure> {
        if !self.guests.contains(domain) {
            let directory = nodes::frontend_directory(domain);
            self.platform.store.watch(&directory, &directory)?;
        }
        Ok(())
    }

    /// Handles a change of a guest's nodes. A new watch fires once as well.
    pub(in crate::engine) fn update_frontend(&mut self, domain: DomId) {
        let view = match nodes::read_frontend(self.platform.store.as_ref(), domain) {
            Ok(view) => view,
            Err(error) => {
                warn!("domain {domain}: {error}");
                return;
            }
        };
        if let Some(guest) = self.guests.get_mut(domain) {
            let actions = guest.handshake.frontend_changed(view);
            self.act(domain, actions);
        }
    }

    /// Carries out the actions of a handshake, in their order.
    pub(in crate::engine) fn act(&mut self, domain: DomId, actions: Vec<Action>) {
        if let Some(guest) = self.guests.get_mut(domain) {
            guest.actions.extend(actions);
        }
        while let Some(action) = self.next_action(domain) {
            match action {
                Action::Nodes(changes) => {
                    if let Err(error) = self.write_nodes(domain, changes) {
                        error!("domain {domain}: {error}; it is tried again");
                        self.problems.push_of(domain, format!("domain {domain}: {error}"));
                        self.give_up_adding(domain, &Failure::from(error).of(domain));
                    }
                }
                Action::Connect(ring) => {
                    let outcome = self.connect(domain, ring);
                    if let Some(guest) = self.guests.get_mut(domain) {
                        // Before the node changes that follow, which announce the connection to the guest.
                        let connected = outcome.is_ok();
                        let next = guest.handshake.ring_connected(outcome);
                        guest.actions.extend(next);
                        if connected {
                            self.problems.resolve_guest(domain);
                            self.runs_again(domain);
                        }
                    }
                }
                Action::Disconnect => self.give_up_ring(domain),
                Action::Added(devfn) => self.answer(domain, devfn, |awaited| match awaited {
                    Awaited::Look | Awaited::FirstLook => Some(Ok(None)),
                    Awaited::Release | Awaited::Withdrawing => None,
                }),
                Action::Waiting(devfn) => self.published(domain, devfn),
                Action::Removed(devfn) => self.removed(domain, devfn),
                Action::Report(text) => {
                    if let Some(guest) = self.guests.get_mut(domain) {
                        guest.log_line(Level::Warn, &format!("domain {domain}: {text}"));
                    }
                }
                Action::AwaitClosed => {
                    let by = Instant::now() + self.settings.guest_limit();
                    if let Some(guest) = self.guests.get_mut(domain) {
                        guest.closed_by = Some(by);
                    }
                }
                Action::NotifyAgain => {
                    if let Err(error) = nodes::tell_again(self.platform.store.as_ref(), domain) {
                        warn!("domain {domain}: {error}");
                    }
                }
                Action::Pause => {
                    if let Some(guest) = self.guests.get_mut(domain) {
                        guest.pause = Some(Instant::now() + PAUSE);
                    }
                }
            }
        }
        self.forget_if_idle(domain);
    }

    /// The next action of the guest's handshake; `None` while background work runs for the guest, because later actions rely on its
    /// result.
    fn next_action(&mut self, domain: DomId) -> Option<Action> {
        let guest = self.guests.get_mut(domain).filter(|guest| guest.working == 0)?;
        guest.actions.pop_front()
    }

    /// Writes changes of a guest's nodes, after earlier ones that failed. The handshake continues as if all had been written.
    fn write_nodes(&mut self, domain: DomId, changes: Vec<NodeChange>) -> Result<(), PlatformError> {
        let Some(guest) = self.guests.get_mut(domain) else {
            return nodes::apply(self.platform.store.as_ref(), domain, &changes);
        };
        guest.unwritten.extend(changes);
        guest.write_again = None;
        let written = nodes::apply(self.platform.store.as_ref(), domain, &guest.unwritten);
        match written {
            Ok(()) => guest.unwritten.clear(),
            Err(_) => guest.write_again = Some(Instant::now() + WRITE_AGAIN),
        }
        written
    }

    /// Retries failed changes of nodes that are due.
    pub(super) fn write_again(&mut self, now: Instant) {
        let due = self
            .guests
            .by_domain
            .iter()
            .filter(|(_, guest)| guest.write_again.is_some_and(|when| when <= now));
        for domain in due.map(|(domain, _)| *domain).collect::<Vec<_>>() {
            if self.write_nodes(domain, Vec::new()).is_ok() {
                info!("domain {domain}: its nodes are as they should be again");
            }
        }
    }

    fn connect(&mut self, domain: DomId, place: RingPlace) -> Result<(), String> {
        let ring = self
            .platform
            .rings
            .connect(domain, place.grant, place.port)
            .map_err(|error| error.to_string())?;
        let inbox = self.inbox.clone();
        let Some(guest) = self.guests.get_mut(domain) else { return Ok(()) };
        let functions = std::mem::take(&mut guest.parked);
        let report =
            Box::new(move |report| inbox.send(engine::Event::Guests(Event::Reported(domain, report))));
        let server = pv::start(domain, ring, functions, Arc::clone(&guest.counters), report);
        guest.server = Some(Arc::new(server.map_err(|error| format!("cannot start its thread: {error}"))?));
        let text =
            format!("domain {domain}: connected to its ring, grant {} and port {}", place.grant, place.port);
        guest.log_line(Level::Info, &text);
        Ok(())
    }

    pub(super) fn disconnect(&mut self, domain: DomId) {
        if let Some(guest) = self.guests.get_mut(domain)
            && let Some(server) = guest.server.take()
        {
            match server.stop() {
                Ok(functions) => {
                    guest.parked = functions;
                    guest.log_line(Level::Info, &format!("domain {domain}: its ring is given up"));
                }
                Err(stuck) => {
                    error!("domain {domain}: {stuck}");
                    self.problems.push_of(domain, format!("domain {domain}: {stuck}"));
                }
            }
        }
    }
}
