//! A guest whose xen-pcifront does what Linux's does, without a bus to scan.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use pciback::DomId;
use pciback::platform::sim::SimGuest;
use pciback::platform::{Store, StoreOps};
use pciback::serve::pv::nodes::{self, XenbusState};
use pciback::serve::pv::wire::{Command, MSIX_ENTRIES, MsixEntry, Op, frontend};

use crate::world::{LIMIT, World, wait_until};

/// What a guest with a frontend does, until it is dropped.
pub struct Frontend {
    domain: DomId,
    guest: Arc<Mutex<SimGuest>>,
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

/// A request without anything in it.
pub fn op(command: Command, devfn: u32) -> Op {
    let entries = [MsixEntry::default(); MSIX_ENTRIES];
    Op { command, domain: 0, bus: 0, devfn, offset: 0, size: 4, value: 0, info: 0, entries }
}

pub fn read_op(devfn: u32, offset: u32, size: u32) -> Op {
    Op { offset, size, ..op(Command::CONF_READ, devfn) }
}

pub fn write_op(devfn: u32, offset: u32, size: u32, value: u32) -> Op {
    Op { offset, size, value, ..op(Command::CONF_WRITE, devfn) }
}

/// Enables the first `count` entries.
pub fn msix_op(devfn: u32, count: u16) -> Op {
    let mut enable = Op { value: u32::from(count), ..op(Command::ENABLE_MSIX, devfn) };
    for entry in 0..count {
        enable.entries[usize::from(entry)].entry = entry;
    }
    enable
}

/// Writes one of the frontend's nodes.
pub fn publish(guest: &SimGuest, domain: DomId, key: &str, value: impl ToString) {
    let path = format!("{}/{key}", nodes::frontend_directory(domain));
    guest.store().write(&path, value.to_string().as_bytes()).unwrap();
}

/// Waits until our end's state is this one.
pub fn await_backend(guest: &SimGuest, domain: DomId, state: XenbusState) {
    let path = format!("{}/state", nodes::backend_directory(domain));
    let wanted = state.0.to_string();
    guest.wait_for_node(&path, LIMIT, |value| (value == Some(wanted.as_str())).then_some(())).unwrap();
}

/// Asks and waits for the answer.
pub fn ask(guest: &SimGuest, op: &Op) -> (i32, u32, Vec<MsixEntry>) {
    frontend::put_request(guest.page().unwrap(), op);
    guest.notify().unwrap();
    let count = if op.command == Command::ENABLE_MSIX { op.value as usize } else { 0 };
    guest.wait_for_answer(LIMIT, |page| frontend::take_answer(page, count)).unwrap()
}

impl Frontend {
    /// Loads the module in a guest.
    pub fn load(world: &World, domain: DomId) -> Self {
        let guest = Arc::new(Mutex::new(world.simulation.guest(domain).unwrap()));
        let store = world.simulation.store(domain).unwrap();
        let stop = Arc::new(EventFd::new().unwrap());
        let (driven, stopped) = (Arc::clone(&guest), Arc::clone(&stop));
        let thread = thread::spawn(move || {
            for path in [nodes::frontend_directory(domain), nodes::backend_directory(domain)] {
                store.watch(&path, &path).unwrap();
            }
            let mut shares = 0;
            loop {
                let mut fds = [
                    PollFd::new(store.event_fd(), PollFlags::POLLIN),
                    PollFd::new(stopped.as_fd(), PollFlags::POLLIN),
                ];
                poll(&mut fds, PollTimeout::NONE).unwrap();
                if fds[1].revents().is_some_and(|events| !events.is_empty()) {
                    return;
                }
                while store.next_event().unwrap().is_some() {}
                follow(&mut locked(&driven), domain, &mut shares);
            }
        });
        Self { domain, guest, stop, thread: Some(thread) }
    }

    /// Loads the module again in a guest in which it was unloaded.
    pub fn load_again(world: &World, domain: DomId) -> Self {
        publish(&world.simulation.guest(domain).unwrap(), domain, "state", XenbusState::INITIALISING.0);
        Self::load(world, domain)
    }

    pub fn ask(&self, op: &Op) -> (i32, u32, Vec<MsixEntry>) {
        ask(&locked(&self.guest), op)
    }

    /// Sends a request while another vCPU of the guest keeps changing the page.
    pub fn ask_while(&self, op: &Op, change: impl Fn(&[AtomicU32]) + Sync) -> (i32, u32, Vec<MsixEntry>) {
        let guest = locked(&self.guest);
        let (page, answered) = (guest.page().unwrap(), AtomicBool::new(false));
        thread::scope(|scope| {
            scope.spawn(|| {
                while !answered.load(Ordering::Relaxed) {
                    change(page);
                }
            });
            frontend::put_request(page, op);
            guest.notify().unwrap();
            let answer = guest.wait_for_answer(LIMIT, |page| frontend::take_answer(page, 0));
            answered.store(true, Ordering::Relaxed);
            answer.unwrap()
        })
    }

    /// Sends an event without a request.
    pub fn notify(&self) {
        locked(&self.guest).notify().unwrap();
    }

    /// A register's value; the read must succeed.
    pub fn read(&self, devfn: u32, offset: u32, size: u32) -> u32 {
        let (error, value, _) = self.ask(&read_op(devfn, offset, size));
        assert_eq!(error, 0, "read {size} bytes at {offset:#x} of {devfn:#x}");
        value
    }

    /// Puts a request on the page without waiting for its answer.
    pub fn put(&self, op: &Op) {
        let guest = locked(&self.guest);
        frontend::put_request(guest.page().unwrap(), op);
        guest.notify().unwrap();
    }

    /// It follows nothing any more, as a guest that hangs.
    pub fn freeze(&self) {
        self.stop.write(1).unwrap();
        wait_until("the frontend hangs", || self.thread.as_ref().is_none_or(JoinHandle::is_finished));
    }

    /// Its module is removed: it releases its ring and closes.
    pub fn unload(&self) {
        self.freeze();
        let mut guest = locked(&self.guest);
        guest.unshare();
        publish(&guest, self.domain, "state", XenbusState::CLOSED.0);
    }

    /// Whether what was put is answered.
    pub fn has_answer(&self) -> bool {
        locked(&self.guest).page().is_some_and(|page| frontend::take_answer(page, 0).is_some())
    }

    /// Says that it can be notified of errors, as xen-pcifront does.
    pub fn receives_errors(&self) {
        frontend::set_aer_handler(locked(&self.guest).page().unwrap(), true);
    }

    /// Waits until it is notified of an error, and answers: command and state of the link, then the `pci_ers_result_t`.
    pub fn is_notified(&self, command: u32, state: u32, devfn: u32, answer: u32) {
        let guest = locked(&self.guest);
        let told = guest.wait_for_answer(LIMIT, |page| frontend::take_aer(page)).unwrap();
        assert_eq!(told, (command, state, devfn));
        frontend::answer_aer(guest.page().unwrap(), answer);
        guest.notify().unwrap();
    }

    /// The notification of an error that waits for its answer, if one does.
    pub fn notification(&self) -> Option<u32> {
        locked(&self.guest).page().and_then(|page| frontend::take_aer(page)).map(|(command, ..)| command)
    }

    /// Answers a notification.
    pub fn answers(&self, answer: u32) {
        let guest = locked(&self.guest);
        frontend::answer_aer(guest.page().unwrap(), answer);
        guest.notify().unwrap();
    }

    /// Waits until it is notified of an error, and says nothing.
    pub fn ignores(&self) {
        locked(&self.guest).wait_for_answer(LIMIT, |page| frontend::take_aer(page)).unwrap();
    }

    /// Whether both ends are connected.
    pub fn is_connected(&self) -> bool {
        let guest = locked(&self.guest);
        [nodes::frontend_directory(self.domain), nodes::backend_directory(self.domain)]
            .iter()
            .all(|directory| state_of(&guest, directory) == Some(XenbusState::CONNECTED))
    }

    /// Waits for the answer to what was put.
    pub fn take(&self, count: usize) -> (i32, u32, Vec<MsixEntry>) {
        locked(&self.guest).wait_for_answer(LIMIT, |page| frontend::take_answer(page, count)).unwrap()
    }
}

impl Drop for Frontend {
    fn drop(&mut self) {
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn locked(guest: &Mutex<SimGuest>) -> MutexGuard<'_, SimGuest> {
    guest.lock().unwrap_or_else(PoisonError::into_inner)
}

fn state_of(guest: &SimGuest, directory: &str) -> Option<XenbusState> {
    // Where the domain has ended nothing can be read.
    let value = guest.store().read(&format!("{directory}/state")).ok()??;
    Some(XenbusState(std::str::from_utf8(&value).ok()?.parse().ok()?))
}

/// One reaction to the two ends' states, as `pcifront_backend_changed` has them.
fn follow(guest: &mut SimGuest, domain: DomId, shares: &mut u32) {
    let directory = nodes::frontend_directory(domain);
    let (ours, theirs) = (state_of(guest, &directory), state_of(guest, &nodes::backend_directory(domain)));
    let (Some(ours), Some(theirs)) = (ours, theirs) else { return };
    let next = match (ours, theirs) {
        (XenbusState::INITIALISING, XenbusState::INITIALISED) => {
            *shares += 1;
            guest.share(8 + *shares, 20 + *shares).unwrap();
            for (key, value) in [
                ("pci-op-ref", (8 + *shares).to_string()),
                ("event-channel", (20 + *shares).to_string()),
                ("magic", "7".into()),
            ] {
                say(guest, &directory, key, &value);
            }
            XenbusState::INITIALISED
        }
        (XenbusState::INITIALISED | XenbusState::RECONFIGURING, XenbusState::CONNECTED) => {
            XenbusState::CONNECTED
        }
        (XenbusState::CONNECTED, XenbusState::RECONFIGURING) => XenbusState::RECONFIGURING,
        (XenbusState::RECONFIGURING, XenbusState::RECONFIGURED) => XenbusState::CONNECTED,
        (XenbusState::CONNECTED, XenbusState::CLOSING) => {
            guest.unshare();
            XenbusState::CLOSED
        }
        _ => return,
    };
    say(guest, &directory, "state", &next.0.to_string());
}

fn say(guest: &SimGuest, directory: &str, key: &str, value: &str) {
    // The directory may have been removed meanwhile: then a new device comes.
    let _ = guest.store().write(&format!("{directory}/{key}"), value.as_bytes());
}
