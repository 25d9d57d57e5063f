//! Quarantined functions: switched off in hardware, and trusted again only after a verified reset.

use log::warn;
use pciback::FunctionState;
use pciback::live;

use super::reset::config_failure;
use super::{Context, Finished, Kind, hold, pristine, reset};
use crate::journal::Record;
use crate::outcome::{ErrorCode, Failure};

impl Context<'_> {
    /// Quarantines a function that no guest has.
    pub fn quarantine(&self, mut record: Record) -> Finished {
        record.state = FunctionState::Quarantined;
        // Whatever the reason, the function is reset before it gets another owner.
        self.fresh.forget(record.address);
        let noted = self.write(&record);
        let off = switch_off(self, &record);
        let named = match off {
            // This explains more than the error that led to the quarantine.
            Ok(Off::OtherToolstack) => {
                let taken = hold::guest_owned(self.platform, record.address).message;
                record.quarantine = Some(format!("while xpci held it, {taken}"));
                self.write(&record)
            }
            _ => Ok(()),
        };
        let outcome = off.map(drop).and(noted).and(named).map(|()| Vec::new());
        Finished { record, outcome }
    }

    /// Undoes again everything that an attachment may have left, then resets the function. It can be attached again only after the reset
    /// is verified. After a failure it stays quarantined, for the old reason.
    pub fn clear(&self, mut record: Record) -> Finished {
        if record.guest.is_some() {
            let detached = self.backward(Kind::Detach, record);
            if detached.outcome.is_err() {
                return detached;
            }
            record = detached.record;
        }
        match self.trust_again(&mut record) {
            Ok(warnings) => {
                let trusted = Record { quarantine: None, unknown_past: false, ..record.clone() };
                match self.write(&trusted) {
                    Ok(()) => Finished { record: trusted, outcome: Ok(warnings) },
                    Err(failure) => still_quarantined(record, failure),
                }
            }
            Err(failure) => still_quarantined(record, failure),
        }
    }

    fn trust_again(&self, record: &mut Record) -> Result<Vec<String>, Failure> {
        let mut warnings = Vec::new();
        if self.left_the_host(record) {
            // A function that appears at its address is another one.
            record.state = FunctionState::Gone;
        } else {
            warnings.extend(hold::take_driver(self, record)?);
            hold::own(self, record)?;
            warnings.extend(reset::run(self, record)?);
            warnings.extend(pristine::restore(self, record)?);
            record.state = FunctionState::Held;
        }
        Ok(warnings)
    }
}

/// The result of a failed clearing: the function stays quarantined.
fn still_quarantined(mut record: Record, failure: Failure) -> Finished {
    record.state = FunctionState::Quarantined;
    let failure = Failure { code: ErrorCode::Quarantined, ..failure }
        .on(record.address)
        .hint("the function stays quarantined; see 'xpci status'");
    Finished { record, outcome: Err(failure) }
}

/// The result of switching off a function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Off {
    /// It is switched off, or is not in the host.
    Harmless,
    /// A driver of dom0 uses it; it was not changed.
    UsedByDom0,
    /// A guest uses it through another toolstack; it was not changed.
    OtherToolstack,
}

/// Switches off bus mastering and all interrupts, and verifies that. A function that answers all ones counts as switched off. If it
/// cannot be determined whether another toolstack has attached the function, it is not changed, and that is an error.
pub(super) fn switch_off(context: &Context<'_>, record: &Record) -> Result<Off, Failure> {
    if context.left_the_host(record) {
        return Ok(Off::Harmless);
    }
    let function = context.platform.host.function(record.address)?;
    if function.driver.is_some() && !hold::is_held(&function) {
        // What failed was taking the function from its driver, which may serve dom0's own disk.
        return Ok(Off::UsedByDom0);
    }
    let address = record.address;
    if hold::is_owned_by_other_toolstack(context.platform, record)? {
        warn!("{address}: not changed in hardware: a guest has it through another toolstack");
        return Ok(Off::OtherToolstack);
    }
    live::switch_off(context.platform.host.config(address)?.as_ref())
        .map(|_| Off::Harmless)
        .map_err(|error| config_failure("switch bus mastering and interrupts off in", address, &error))
}
