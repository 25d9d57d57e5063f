//! VFs that the guest with a PF creates: what it asks for, and what it finds where they would be.
//!
//! Linux's `pci_iov_add_virtfn` takes a VF's vendor and device from the PF, and reads class, header type and subsystem of the first one, in
//! this order. Its first reads wait for the host, which may need a second or more to create many VFs; a header type that reads all ones makes
//! Linux undo what it began, and a class does not: the class can be answered before the VFs are there. Vendor and device read all ones, as on
//! hardware (PCI Express 6.0, section 9.3.4.1.1), so that a scan of the bus passes over VFs. The rest is a header without capabilities and
//! BARs: other guests use the VFs.
//!
//! How long a read waits is a matter of how requests come: see `pv` and `hvm`.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sys::eventfd::EventFd;

use super::function::GuestFunction;
use super::roster::Roster;
use crate::config::Access;
use crate::spec::header;

/// How many reads may wait for one request: the class of the first VF, and its header type.
const WAITS: u8 = 2;
/// Class and revision of a VF: of no defined class (PCI Code and ID Assignment 1.16, section 1), so that no driver binds by class.
const CLASS: u32 = 0xff00_0000;

/// What a guest asks for, shared by its serving thread and the engine.
#[derive(Debug, Clone, Default)]
pub struct VfRequests(Arc<(Mutex<Requests>, Condvar)>);

#[derive(Debug, Default)]
struct Requests {
    /// How many VFs the guest wants; 0: none.
    wanted: u16,
    /// Which request that is.
    number: u64,
    state: State,
    /// How many reads have waited for it in vain.
    waited: u8,
    /// The engine was notified and has not looked yet.
    reported: bool,
    /// What wakes the serving thread, which may sleep while reads wait.
    wake: Option<Arc<EventFd>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum State {
    #[default]
    Done,
    UnderWay,
    /// It failed, or the guest has waited for long enough.
    Failed,
}

impl VfRequests {
    fn lock(&self) -> MutexGuard<'_, Requests> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest wants this many VFs; returns whether the engine has to be notified. One that changes its mind again and again is one report
    /// until the engine has looked.
    fn ask(&self, wanted: u16) -> bool {
        let mut requests = self.lock();
        requests.wanted = wanted;
        requests.number += 1;
        requests.state = if wanted == 0 { State::Done } else { State::UnderWay };
        requests.waited = 0;
        !std::mem::replace(&mut requests.reported, true)
    }

    /// The number of the latest request, and how many VFs it is for.
    pub fn take(&self) -> (u64, u16) {
        let mut requests = self.lock();
        requests.reported = false;
        (requests.number, requests.wanted)
    }

    /// A request has been carried out, or could not be. Ignored if the guest has made another one since.
    pub fn answer(&self, number: u64, done: bool) {
        let mut requests = self.lock();
        if requests.number == number {
            requests.state = if done { State::Done } else { State::Failed };
            self.0.1.notify_all();
            if let Some(wake) = &requests.wake {
                // A thread that cannot be woken any more is as awake as can be.
                let _ = wake.write(1);
            }
        }
    }

    /// From now on this wakes the thread that serves the PF.
    pub(super) fn set_wake(&self, wake: &Arc<EventFd>) {
        self.lock().wake = Some(Arc::clone(wake));
    }

    /// Waits until the host has created the VFs or has failed to, at most so long.
    fn wait(&self, limit: Duration) {
        let under_way = |requests: &mut Requests| requests.state == State::UnderWay;
        let waited = self.0.1.wait_timeout_while(self.lock(), limit, under_way);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    /// Whether the VFs are there, for a read that has waited or has not.
    fn state(&self, patience: Patience) -> State {
        let mut requests = self.lock();
        if requests.state == State::UnderWay && patience == Patience::Over {
            requests.waited += 1;
            if requests.waited >= WAITS {
                requests.state = State::Failed;
            }
        }
        requests.state
    }
}

/// Whether a read of a VF may still wait for the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Patience {
    Left,
    Over,
}

impl Roster {
    /// The PF whose VF the guest finds at this Routing ID.
    pub(super) fn pf_of_vf(&self, routing_id: u16) -> Option<&GuestFunction> {
        let mut functions = self.functions.iter();
        let found = functions.find(|(own, function)| function.space.has_guest_vf(**own, routing_id));
        found.map(|(_, function)| function.as_ref())
    }
}

impl GuestFunction {
    /// The requests of a guest that creates VFs of this PF; `None`: it does not.
    pub fn vf_requests(&self) -> Option<VfRequests> {
        self.space.guest_vfs().map(|_| self.vfs.clone())
    }

    /// The guest has changed VF Enable; returns whether the engine has to be notified.
    pub(super) fn ask_for_vfs(&self) -> bool {
        self.space.guest_vfs().is_some_and(|vfs| self.vfs.ask(if vfs.enabled { vfs.count } else { 0 }))
    }

    /// Whether the guest has VFs enabled, which a reset of their PF would take from other guests.
    pub(super) fn has_vfs(&self) -> bool {
        self.space.guest_vfs().is_some_and(|vfs| vfs.enabled && vfs.count > 0)
    }

    /// What the guest reads of a VF of this PF; `None`: the host is creating it, and the read has to wait.
    pub(super) fn read_vf(&self, access: Access, patience: Patience) -> Option<u32> {
        let dword = match access.dword() {
            header::VENDOR_ID => u32::MAX,
            _ if self.is_silent() => u32::MAX,
            register => match (self.vfs.state(patience), register) {
                (State::UnderWay, _) if patience == Patience::Left => return None,
                (State::Failed, _) => u32::MAX,
                (_, header::REVISION_ID) => CLASS,
                (State::UnderWay, _) => u32::MAX,
                (State::Done, header::SUBSYSTEM_VENDOR_ID) => {
                    self.space.own_register(header::SUBSYSTEM_VENDOR_ID, 4)
                }
                (State::Done, _) => 0,
            },
        };
        Some(dword >> access.shift() & access.width().mask())
    }

    /// The same for a thread that does nothing else while the host creates the VF, at most so long.
    pub(super) fn read_vf_within(&self, access: Access, limit: Duration) -> u32 {
        let waited = || {
            self.vfs.wait(limit);
            self.read_vf(access, Patience::Over)
        };
        self.read_vf(access, Patience::Left).or_else(waited).unwrap_or(access.width().mask())
    }
}
