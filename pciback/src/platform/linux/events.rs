//! The kernel's events about PCI functions.

use std::os::fd::{AsFd as _, BorrowedFd};

use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt};
use udev::{EventType, MonitorBuilder};

use crate::platform::{HostEvent, HostEvents, PlatformError, Result};

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

/// A subscription. Events can be lost when they are not taken for long, which [`HostEvent::Lost`] reports.
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
}

impl HostEvents for PciEvents {
    fn event_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn next_event(&self) -> Option<HostEvent> {
        loop {
            Errno::clear();
            let Some(event) = self.socket.iter().next() else {
                // libudev says "nothing" and leaves the reason in errno; a full buffer is reported once.
                return (Errno::last() == Errno::ENOBUFS).then_some(HostEvent::Lost);
            };
            // Functions of segments above ffff have names that are no addresses: Xen cannot assign them.
            let Some(address) = event.sysname().to_str().and_then(|name| name.parse().ok()) else { continue };
            return Some(match event.event_type() {
                EventType::Add => HostEvent::Added(address),
                EventType::Remove => HostEvent::Removed(address),
                _ => HostEvent::Changed(address),
            });
        }
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
