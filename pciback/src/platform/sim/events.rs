//! Who listens to what happens to the simulated host's functions.

use std::collections::VecDeque;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::{Arc, Mutex, Weak};

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::locked;
use crate::platform::{HostEvent, HostEvents};

/// As many events as the kernel's buffer takes; further ones are lost, and that is said once.
const ROOM: usize = 16384;

/// All subscriptions.
#[derive(Default)]
pub(super) struct Listeners {
    queues: Vec<Weak<Queue>>,
    /// No event is sent.
    pub muted: bool,
}

struct Queue {
    events: Mutex<VecDeque<HostEvent>>,
    ready: EventFd,
}

pub(super) struct SimEvents(Arc<Queue>);

impl Listeners {
    pub fn subscribe(&mut self) -> Result<SimEvents, Errno> {
        // Counts down: as many reads as there are events.
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_SEMAPHORE;
        let ready = EventFd::from_value_and_flags(0, flags)?;
        let queue = Arc::new(Queue { events: Mutex::default(), ready });
        self.queues.retain(|queue| queue.strong_count() > 0);
        self.queues.push(Arc::downgrade(&queue));
        Ok(SimEvents(queue))
    }

    pub fn tell(&self, event: HostEvent) {
        if self.muted {
            return;
        }
        for queue in self.queues.iter().filter_map(Weak::upgrade) {
            let mut events = locked(&queue.events);
            let event = if events.len() < ROOM { event } else { HostEvent::Lost };
            if events.back() != Some(&HostEvent::Lost) {
                events.push_back(event);
                // A counter of 64 bits does not overflow.
                let _ = queue.ready.write(1);
            }
        }
    }
}

impl HostEvents for SimEvents {
    fn event_fd(&self) -> BorrowedFd<'_> {
        self.0.ready.as_fd()
    }

    fn next_event(&self) -> Option<HostEvent> {
        let event = locked(&self.0.events).pop_front();
        if event.is_some() {
            let _ = self.0.ready.read();
        }
        event
    }
}
