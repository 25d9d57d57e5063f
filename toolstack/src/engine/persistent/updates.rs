//! Changes of reservations that clients ask for, apart from those that a transaction makes. They are written on threads, because each is
//! synced to the disk.

use pciback::Sbdf;

use super::{Context, Effect, Persistent};
use crate::journal::Record;
use crate::outcome::Failure;
use crate::protocol::{DomainName, Success};
use crate::reply::Reply;
use crate::reservations::Reservation;

/// The answer that something was changed.
pub(super) fn changed(message: String) -> Success {
    Success::Changed { message, warnings: Vec::new(), functions: Vec::new() }
}

impl Context<'_> {
    /// Makes an existing attachment persistent.
    pub fn make_persistent(&self, record: &Record, reply: Reply) {
        let Some(place) = record.guest else { return };
        let (address, domain) = (record.address, place.domain);
        let wanted = match self.reservation(address, domain, place.devfn) {
            Ok(wanted) => wanted,
            Err(failure) => return reply.done(Err(failure)),
        };
        let known = self.files.reservations.get(address);
        let is_same = |known: &Reservation| {
            known.saved.is_none() && known.guest == wanted.guest && known.devfn == wanted.devfn
        };
        if known.as_ref().is_some_and(is_same) {
            let message =
                format!("domain {domain} has {address} already, and gets it again whenever it starts");
            return reply.done(Ok(Success::Already { message }));
        }
        let (reservations, boot) = (self.files.reservations.clone(), self.boot.to_owned());
        self.inbox.run("persist", move || {
            let message = format!("domain {domain} has {address}, and gets it again whenever it starts");
            let kept = reservations.give(wanted, &boot, domain);
            reply.done(kept.map(|()| changed(message)));
        });
    }

    /// Writes a reservation for a guest that does not run, which gets the function when it starts.
    pub fn reserve(&self, wanted: Reservation, dry_run: bool, reply: Reply) {
        let (address, seen) = (wanted.address, Sbdf::in_guest(wanted.devfn));
        let message =
            format!("{address} is reserved for {}, which sees it at {seen} when it starts", wanted.who());
        if self.files.reservations.get(address).as_ref() == Some(&wanted) {
            return reply.done(Ok(Success::Already { message }));
        }
        if dry_run {
            let message = format!("nothing was changed; without --dry-run: {message}");
            return reply.done(Ok(Success::Possible { message }));
        }
        let reservations = self.files.reservations.clone();
        self.inbox.run("persist", move || {
            reply.done(reservations.keep(wanted).map(|()| changed(message)));
        });
    }
}

impl Persistent {
    /// Removes a function from those that the guest has persistently.
    pub(super) fn forget(&mut self, guest: &DomainName, address: Sbdf, reply: Reply, context: &Context<'_>) {
        let Some(reservation) = context.reservation_of(guest, address) else {
            let shown: String = guest.0.chars().take(64).collect();
            let text = format!("{address} is not persistent for a guest '{shown}'");
            let hint = "'xpci pci-list --persistent' shows what is";
            return reply.done(Err(Failure::not_found(text).on(address).hint(hint)));
        };
        self.stop_waiting_for(address, context);
        self.effects.push(Effect::Forget(Box::new(reservation), reply));
    }

    /// The reservation of a function that goes back to dom0: it ends with that, and its guest no longer waits for the function.
    pub(super) fn ends(&mut self, address: Sbdf, context: &Context<'_>) -> Option<Reservation> {
        let reservation = context.reserved(address)?;
        self.stop_waiting_for(address, context);
        Some(reservation)
    }
}
