//! Functions that are trusted no more: made harmless in hardware, and trusted again only after a verified reset.

use log::warn;
use pciback::FunctionState;
use pciback::live;

use super::reset::config_failure;
use super::{Context, Finished, Kind, hold, pristine, reset};
use crate::journal::Record;
use crate::outcome::{ErrorCode, Failure};

impl Context<'_> {
    /// Marks a function that no guest has: it goes to nobody until it is cleared.
    pub fn condemn(&self, mut record: Record) -> Finished {
        record.state = FunctionState::Quarantined;
        // Whatever it was condemned for, it is reset before anybody gets it.
        self.fresh.forget(record.address);
        let noted = self.write(&record);
        let off = switch_off(self, &record);
        let named = match off {
            // That says more than what made somebody look.
            Ok(Off::AnotherGuests) => {
                let taken = hold::a_guests(self.platform, record.address).message;
                record.quarantine = Some(format!("while xpci held it, {taken}"));
                self.write(&record)
            }
            _ => Ok(()),
        };
        let outcome = off.map(drop).and(noted).and(named).map(|()| Vec::new());
        Finished { record, outcome }
    }

    /// Undoes once more whatever an attachment may have left, then resets the function: only when that is verified it can be
    /// attached again. On any failure it stays quarantined, for the reason that it was.
    pub fn clear(&self, mut record: Record) -> Finished {
        if record.guest.is_some() {
            let detached = self.backward(Kind::Detach, record);
            if detached.outcome.is_err() {
                return detached;
            }
            record = detached.record;
        }
        let cleared = self.trust_again(&mut record);
        let outcome = cleared.map_err(|failure| {
            Failure { code: ErrorCode::Quarantined, ..failure }
                .on(record.address)
                .hint("the function stays quarantined; see 'xpci status'")
        });
        Finished { record, outcome }
    }

    fn trust_again(&self, record: &mut Record) -> Result<Vec<String>, Failure> {
        let mut warnings = Vec::new();
        if self.left_the_host(record) {
            // What comes to its place is another one.
            record.state = FunctionState::Gone;
        } else {
            warnings.extend(hold::take_driver(self, record)?);
            hold::own(self, record)?;
            warnings.extend(reset::run(self, record)?);
            warnings.extend(pristine::restore(self, record)?);
            record.state = FunctionState::Held;
        }
        record.quarantine = None;
        record.unknown_past = false;
        self.write(record).map(|()| warnings)
    }
}

/// What became of a function that is to do nothing more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Off {
    /// It can do nothing: it is switched off, or is not there.
    Harmless,
    /// A driver of dom0's has it, which goes on.
    Dom0s,
    /// A guest has it through another toolstack, and goes on.
    AnotherGuests,
}

/// Switches bus mastering and all interrupts off and makes sure of it. What answers all ones can do neither. A function of which it cannot be
/// found out whether another toolstack's guest has it is left as it is, and that is an error.
pub(super) fn switch_off(context: &Context<'_>, record: &Record) -> Result<Off, Failure> {
    if context.left_the_host(record) {
        return Ok(Off::Harmless);
    }
    let function = context.platform.host.function(record.address)?;
    if function.driver.is_some() && hold::holder_of(&function).is_none() {
        // A driver of dom0's uses it, perhaps for dom0's own disk: what failed was taking it away.
        return Ok(Off::Dom0s);
    }
    let address = record.address;
    if hold::is_another_toolstacks(context.platform, record)? {
        warn!("{address}: left as it is in hardware: a guest has it through another toolstack");
        return Ok(Off::AnotherGuests);
    }
    live::switch_off(context.platform.host.config(address)?.as_ref())
        .map(|_| Off::Harmless)
        .map_err(|error| config_failure("switch bus mastering and interrupts off in", address, &error))
}
