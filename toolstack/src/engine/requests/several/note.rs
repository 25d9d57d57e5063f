//! Notes about domains to which several functions are being attached, and what is undone for the notes of a killed earlier run.

use log::{error, info};
use pciback::{DomId, FunctionState, Sbdf, Uuid};
use serde::{Deserialize, Serialize};

use super::Several;
use crate::engine::Engine;
use crate::engine::notes::Notes;
use crate::engine::problems::Problem;
use crate::engine::tasks::Course;
use crate::outcome::Failure;
use crate::protocol::{Cause, Placed};
use crate::settings::Settings;
use crate::transaction::{Kind, Withdrawal};

/// The folder in the run directory with the notes.
const ATTACHING: &str = "attaching";

/// The note about a domain to which several functions are being attached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Note {
    /// The domain's guest; earlier versions did not note it.
    #[serde(default)]
    guest: Option<Uuid>,
    functions: Vec<Noted>,
}

/// A function of the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Noted {
    address: Sbdf,
    /// Whether the guest had it persistently before.
    reserved: bool,
    /// Whether it was attached before; earlier versions noted only the other functions.
    #[serde(default)]
    attached: bool,
}

impl Engine {
    /// Writes the note about a domain to which functions are about to be attached.
    pub(super) fn note_several(&self, notes: &Notes, domain: DomId, wanted: &Several) -> Result<(), Failure> {
        if notes.path(domain).exists() {
            let text = format!("domain {domain} gets several functions by another command right now");
            return Err(Failure::refused(text).of(domain).hint("try again"));
        }
        let noted = |function: &Placed| Noted {
            address: function.address,
            reserved: self.files.reservations.get(function.address).is_some(),
            attached: self.functions.records().state(function.address) == FunctionState::Attached,
        };
        let guest = self.platform.hypervisor.domain(domain)?.uuid;
        notes.write(
            domain,
            &Note { guest: Some(guest), functions: wanted.functions.iter().map(noted).collect() },
        )
    }

    /// Undoes what a killed earlier run had done for an unfinished request. A function whose attachment was under way is held again by its
    /// own transaction; no reservation may bring it back.
    pub(in crate::engine) fn undo_several(&mut self) {
        let notes = notes(&self.settings);
        for domain in notes.domains() {
            let Some(Note { guest, functions }) = notes.read::<Note>(domain) else {
                notes.remove(domain);
                continue;
            };
            for Noted { address, reserved, attached } in functions.into_iter().rev() {
                if !reserved {
                    self.forget_unfinished(address, guest);
                }
                let record = self.functions.records().get_or_new(address);
                let is_theirs = record.guest.is_some_and(|guest| guest.domain == domain);
                let is_busy = self.functions.is_busy(address);
                if attached || is_busy || record.state != FunctionState::Attached || !is_theirs {
                    continue;
                }
                info!(
                    "{address}: the previous xpcid ended before all functions of domain {domain} were attached; undoing that"
                );
                self.start(Course::Backward(Kind::Detach, Withdrawal::Ask), record, None, |record| {
                    format!("{}: it is {} again", record.address, record.state)
                });
            }
            notes.remove(domain);
        }
    }

    /// Removes the reservation that an unfinished request made for a guest.
    fn forget_unfinished(&mut self, address: Sbdf, guest: Option<Uuid>) {
        let Some(reservation) = self.files.reservations.get(address) else { return };
        if guest.is_some_and(|guest| guest != reservation.guest) {
            return;
        }
        info!("{address}: forgetting that {} has it persistently", reservation.who());
        if let Err(failure) = self.files.reservations.forget(address) {
            error!("{address}: {failure}");
            self.problems.push(Problem::failed(Cause::StateFiles, &failure).on(address));
        }
    }
}

/// The notes.
pub(super) fn notes(settings: &Settings) -> Notes {
    Notes::of(settings, ATTACHING)
}
