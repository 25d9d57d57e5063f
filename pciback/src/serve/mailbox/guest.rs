//! The mailbox in the config space of a guest's function.

use std::time::Instant;

use super::FunctionMailbox;
use crate::serve::GuestFunction;

impl GuestFunction {
    /// Gives it a mailbox.
    pub fn set_mailbox(&mut self, mailbox: FunctionMailbox) {
        self.mailbox = Some(mailbox);
        self.show_mailbox();
    }

    pub(in crate::serve) fn show_mailbox(&mut self) {
        if let Some(mailbox) = &self.mailbox {
            let (status, data) = mailbox.shown();
            self.space.show_data_object(status, data);
        }
    }

    /// The guest has written a register of its mailbox; returns whether the engine has to be notified of a message.
    pub(in crate::serve) fn write_mailbox(&mut self, offset: u16, value: u32, mask: u32) -> bool {
        let Some((mailbox, place)) = self.mailbox.as_mut().zip(self.space.filter().mailbox()) else {
            return false;
        };
        let claim = self.space.image().request().map_or(0, |request| request.info);
        let write = (offset.saturating_sub(place.offset), value, mask);
        let notify = mailbox.write(write, claim, Instant::now());
        self.show_mailbox();
        notify
    }

    pub(in crate::serve) fn reset_mailbox(&mut self) {
        if let Some(mailbox) = &mut self.mailbox {
            mailbox.reset();
            self.show_mailbox();
        }
    }
}
