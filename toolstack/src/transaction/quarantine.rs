//! Functions that are trusted no more: made harmless in hardware, and trusted again only after a verified reset.

use log::warn;
use pciback::FunctionState;
use pciback::live;
use pciback::serve::pv::nodes;

use super::reset::config_failure;
use super::{Context, Finished, Kind, hold, pristine, reset};
use crate::journal::Record;
use crate::outcome::{ErrorCode, Failure};

impl Context<'_> {
    /// Marks a function that no guest has: it goes to nobody until it is cleared.
    pub fn condemn(&self, mut record: Record) -> Finished {
        // What the journal knows to be held, and a guest owns, another toolstack has given to that guest.
        let theirs = record.state == FunctionState::Held
            && hold::is_another_toolstacks(self.platform, &record).unwrap_or(false);
        record.state = FunctionState::Quarantined;
        let noted = self.write(&record);
        let off = match theirs {
            true => {
                left_alone(&record);
                Ok(())
            }
            false => switch_off(self, &record),
        };
        let outcome = off.and(noted).map(|()| Vec::new());
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
        self.write(record).map(|()| warnings)
    }
}

/// Switches bus mastering and all interrupts off and makes sure of it. What answers all ones can do neither.
pub(super) fn switch_off(context: &Context<'_>, record: &Record) -> Result<(), Failure> {
    if context.left_the_host(record) {
        return Ok(());
    }
    let function = context.platform.host.function(record.address)?;
    if function.driver.is_some() && hold::holder_of(&function).is_none() {
        // A driver of dom0's uses it, perhaps for dom0's own disk: what failed was taking it away.
        return Ok(());
    }
    let address = record.address;
    if record.guest.is_none() && nodes::pciback_guest(context.platform.store.as_ref(), address)?.is_some() {
        left_alone(record);
        return Ok(());
    }
    live::switch_off(context.platform.host.config(address)?.as_ref())
        .map(drop)
        .map_err(|error| config_failure("switch bus mastering and interrupts off in", address, &error))
}

fn left_alone(record: &Record) {
    warn!("{}: left as it is in hardware: a guest has it through another toolstack", record.address);
}
