//! Resets of functions while their guests have them.

use std::sync::Arc;

use log::{Level, info, warn};
use pciback::platform::Host;
use pciback::serve::{Attachment, Server};
use pciback::{Devfn, Sbdf};

use super::Event;
use crate::engine::{self, Engine};
use crate::journal::Record;
use crate::outcome::{ErrorCode, Failure};
use crate::reset_plan::ResetPlan;
use crate::transaction::{plan_for, reapply_network, renew_path, reset_and_verify};

impl Engine {
    /// Resets a function at the request of its guest, on a background thread.
    pub(in crate::engine) fn reset_for_guest(&mut self, address: Sbdf) {
        self.reset_under_guest(address, None);
    }

    /// Resets a function while its guest has it. `server` is the serving thread that gets an order first, if the guest did not request
    /// the reset.
    pub(in crate::engine) fn reset_under_guest(
        &mut self,
        address: Sbdf,
        server: Option<(Arc<Server>, Devfn)>,
    ) {
        let Some(attachment) = self.functions.attachment(address) else {
            warn!("{address}: not reset, because no guest has it any more");
            return;
        };
        if self.vfs_prevent_reset(address, server.is_none()) {
            return;
        }
        let Some(record) = self.functions.begin_reset(address) else { return };
        let (network, incarnation) = (record.network, record.incarnation);
        let context = self.task_context();
        let (inbox, resets) = (self.inbox.clone(), self.functions.handover().resets.clone());
        let work = move || {
            is_same_device(context.platform.host.as_ref(), address, incarnation)?;
            take_before_reset(server)?;
            let function = context.platform.host.function(address)?;
            // The guest asked for a reset of this function: one that reaches other functions, or none, must not count as one.
            let plan = ResetPlan {
                together: false,
                permit_none: false,
                ..plan_for(&context.settings.reset, &context.policies, &function)
            };
            reset_and_verify(&context.platform, &plan, &function)
                .and_then(|_| renew_path(&context.platform, &context.files.ledger, address))
                .and_then(|()| reapply_network(&context.platform, address, network.as_ref()))
        };
        self.inbox.background(&format!("reset {address}"), work, move |outcome| {
            resets.end(address);
            let event = Event::ResetEnded(attachment, outcome.and_then(|outcome| outcome));
            inbox.send(engine::Event::Guests(event));
        });
    }

    pub(in crate::engine) fn reset_ended(&mut self, attachment: Attachment, outcome: Result<(), Failure>) {
        let address = attachment.address();
        if !self.functions.is_current(attachment) {
            info!("{address}: the reset for a guest that no longer has it has ended");
            return;
        }
        let Some(record) = self.functions.end_reset(address) else { return };
        let done = outcome.is_ok();
        if done
            && let Some(place) = record.guest
            && let Some(guest) = self.guests.get_mut(place.domain)
        {
            guest.log_line(Level::Info, &format!("{address}: reset for its guest"));
        }
        self.end_silence(&record, done);
        if let Err(failure) = outcome {
            self.quarantine(address, &format!("its reset under its guest failed: {failure}"));
        }
        self.reset_for_error_ended(address, done);
    }

    /// Hardware is not reset, but what the guest sees of the function is.
    pub(in crate::engine) fn end_reset_of_view(&mut self, address: Sbdf) {
        if let Some(record) = self.functions.records().get(address).cloned() {
            self.end_silence(&record, true);
        }
        self.reset_for_error_ended(address, true);
    }

    /// Has a function answer its guest again after a reset, or never if that failed.
    fn end_silence(&mut self, record: &Record, done: bool) {
        let Some(place) = record.guest else { return };
        let Some(guest) = self.guests.get(place.domain) else { return };
        match &guest.server {
            Some(server) => server.reset_ended(place.devfn, done),
            None if done => self.restore_parked(place.domain, place.devfn),
            None => {}
        }
    }
}

/// Takes a function from a guest whose thread serves it, until its reset has ended.
fn take_before_reset(server: Option<(Arc<Server>, Devfn)>) -> Result<(), Failure> {
    let Some((server, devfn)) = server else { return Ok(()) };
    let begun = server.begin_reset(devfn).map_err(|stuck| stuck.to_string());
    begun.and_then(|begun| begun.unwrap_or(Ok(())).map_err(|error| error.to_string())).map_err(|why| {
        Failure::new(ErrorCode::Failed, format!("take it from its guest before a reset: {why}"))
    })
}

/// Refuses the reset if another device has taken the function's address.
fn is_same_device(host: &dyn Host, address: Sbdf, incarnation: u64) -> Result<(), Failure> {
    if incarnation != 0 && host.function(address)?.incarnation != incarnation {
        let text = format!("{address} was replaced by another function before it was reset");
        return Err(Failure::new(ErrorCode::Failed, text).on(address));
    }
    Ok(())
}
