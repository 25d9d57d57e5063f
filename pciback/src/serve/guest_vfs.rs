//! VFs that the guest with a PF creates: what it asks for, and what it finds where they would be.
//!
//! Linux's `pci_iov_add_virtfn` takes a VF's vendor and device from the PF, and reads class, header type and subsystem of the first one, in
//! this order. Its first reads wait for the host, which may need a second or more to create many VFs; a header type that reads all ones makes
//! Linux undo what it began, and a class does not: the class can be answered before the VFs are there. Vendor and device read all ones, as on
//! hardware (PCI Express 6.0, section 9.3.4.1.1), so that a scan of the bus passes over VFs. The rest is a header without capabilities and
//! BARs: other guests use the VFs.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::function::GuestFunction;
use crate::Devfn;
use crate::config::Access;
use crate::spec::header;

/// How long a read of a VF waits for the host. Linux's frontend gives up after two seconds.
const LIMIT: Duration = Duration::from_millis(1700);
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
        }
    }

    /// Whether the VFs are there. Who asks while they are being created waits for the host.
    fn state(&self) -> State {
        let deadline = Instant::now() + LIMIT;
        let mut requests = self.lock();
        while requests.state == State::UnderWay {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                requests.waited += 1;
                if requests.waited >= WAITS {
                    requests.state = State::Failed;
                }
                break;
            }
            requests = self.0.1.wait_timeout(requests, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        requests.state
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

    /// What the guest, which has this PF as `own`, reads of its VF with this Routing ID; `None`: it has no such VF.
    pub(super) fn read_vf(&self, own: Devfn, routing_id: u16, access: Access) -> Option<u32> {
        if !self.space.has_guest_vf(own, routing_id) {
            return None;
        }
        let dword = match access.dword() {
            header::VENDOR_ID => u32::MAX,
            _ if self.is_silent() => u32::MAX,
            register => match (self.vfs.state(), register) {
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
}
