//! The kernel's events about PCI functions.

use std::os::fd::{AsFd as _, BorrowedFd};

use nix::sys::socket::{setsockopt, sockopt};
use udev::{EventType, MonitorBuilder};

use crate::Sbdf;
use crate::platform::{PlatformError, Result};

/// Room for the events of some thousand VFs that appear at once.
const BUFFER_BYTES: usize = 4 << 20;

/// Who sends the events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The kernel itself, at once.
    Kernel,
    /// udev, after its rules for the function have run, with their tags.
    Udev,
}

/// What happened to a function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// It appeared.
    Add,
    /// It left.
    Remove,
    /// A driver took it.
    Bind,
    /// Its driver left it.
    Unbind,
    /// Something else about it changed.
    Change,
}

/// One event of one function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PciEvent {
    /// What happened.
    pub action: Action,
    /// To which function.
    pub address: Sbdf,
}

/// A subscription. Events can be lost when nobody takes them for long: they say when to look, not what is there.
pub struct PciEvents {
    socket: udev::MonitorSocket,
}

impl PciEvents {
    /// Subscribes; only events from now on are delivered.
    pub fn open(source: Source) -> Result<Self> {
        let error =
            |cause: std::io::Error| PlatformError::new("subscribe to", "the kernel's PCI events", cause);
        let builder = match source {
            Source::Kernel => MonitorBuilder::new_kernel(),
            Source::Udev => MonitorBuilder::new(),
        };
        let socket =
            builder.and_then(|b| b.match_subsystem("pci")).and_then(MonitorBuilder::listen).map_err(error)?;
        // The default buffer holds about a hundred events. Without the right to enlarge it the subscription still works.
        if let Err(errno) = setsockopt(&socket, sockopt::RcvBufForce, &BUFFER_BYTES) {
            log::debug!("enlarge the buffer for PCI events: {errno}");
        }
        Ok(Self { socket })
    }

    /// Readable when `next_event` has something.
    pub fn event_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// The next event, without waiting. Events of other kinds, or without an address, are passed over.
    pub fn next_event(&self) -> Option<PciEvent> {
        self.socket.iter().find_map(|event| {
            let action = match event.event_type() {
                EventType::Add => Action::Add,
                EventType::Remove => Action::Remove,
                EventType::Bind => Action::Bind,
                EventType::Unbind => Action::Unbind,
                EventType::Change => Action::Change,
                EventType::Unknown => return None,
            };
            let address = event.sysname().to_str()?.parse().ok()?;
            Some(PciEvent { action, address })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_subscription_without_events_does_not_wait() {
        // Sandboxes may forbid the socket; what matters is that nothing blocks or panics.
        if let Ok(events) = PciEvents::open(Source::Kernel) {
            assert_eq!(events.next_event(), None);
        }
    }
}
