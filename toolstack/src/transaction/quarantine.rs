//! Functions that are trusted no more: made harmless in hardware, and trusted again only after a verified reset.

use std::io;

use pciback::FunctionState;
use pciback::config::{Access, CapabilityList, ConfigSpace};
use pciback::spec::{CapabilityId, header};

use super::{Context, Finished, Kind, hold, reset};
use crate::journal::Record;
use crate::outcome::{ErrorCode, Failure};

const BUS_MASTER: u32 = 1 << 2;
/// Command: Interrupt Disable (PCI Express 6.0, section 7.5.1.1.3).
const INTERRUPT_DISABLE: u32 = 1 << 10;
/// Message Control of MSI: MSI Enable (section 7.7.1.2).
const MSI_ENABLE: u32 = 1 << 0;
/// Message Control of MSI-X: MSI-X Enable (section 7.7.2.2).
const MSIX_ENABLE: u32 = 1 << 15;

impl Context<'_> {
    /// Marks a function that no guest has: it goes to nobody until it is cleared.
    pub fn condemn(&self, mut record: Record) -> Finished {
        record.state = FunctionState::Quarantined;
        let noted = self.write(&record);
        let outcome = switch_off(self, &record).and(noted).map(|()| Vec::new());
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
            reset::run(self, record)?;
            change(self, record, "switch INTx on again", &|config, _| {
                set(config, header::COMMAND, INTERRUPT_DISABLE, 0)
            })?;
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
    change(context, record, "switch bus mastering and interrupts off", &|config, list| {
        // Bus mastering first: without it no message is sent, and nothing reaches memory.
        set(config, header::COMMAND, BUS_MASTER, INTERRUPT_DISABLE)?;
        let mut left = read(config, header::COMMAND)? & BUS_MASTER != 0;
        for (id, enable) in [(CapabilityId::MSI, MSI_ENABLE), (CapabilityId::MSI_X, MSIX_ENABLE)] {
            if let Some(capability) = list.legacy(id) {
                let control = capability.offset + 2;
                set(config, control, enable, 0)?;
                left |= read(config, control)? & enable != 0;
            }
        }
        // Interrupt Disable may be hardwired to 0 where there is no pin, as in VFs; it is not asked for.
        match left {
            true => Err(io::Error::other("the bits stay set")),
            false => Ok(()),
        }
    })
}

type Change<'a> = &'a dyn Fn(&dyn ConfigSpace, &CapabilityList) -> io::Result<()>;

/// Changes registers of a function that answers.
fn change(context: &Context<'_>, record: &Record, action: &str, change: Change<'_>) -> Result<(), Failure> {
    let address = record.address;
    let config = context.platform.host.config(address)?;
    let changed = config.read_all().and_then(|bytes| {
        let answers = bytes.iter().any(|byte| *byte != 0xff);
        if answers { change(config.as_ref(), &CapabilityList::walk(&bytes)) } else { Ok(()) }
    });
    changed.map_err(|error| {
        Failure::new(ErrorCode::Failed, format!("{action} in {address}: {error}")).on(address)
    })
}

fn word(offset: u16) -> io::Result<Access> {
    // Two bytes: Xen takes no other write to a control word of MSI or MSI-X.
    Access::new(offset.into(), 2).map_err(io::Error::other)
}

fn read(config: &dyn ConfigSpace, offset: u16) -> io::Result<u32> {
    match config.read(word(offset)?)? {
        // It stopped answering on the way.
        0xffff => Ok(0),
        value => Ok(value),
    }
}

fn set(config: &dyn ConfigSpace, offset: u16, clear: u32, set: u32) -> io::Result<()> {
    let access = word(offset)?;
    let before = config.read(access)?;
    let wanted = before & !clear | set;
    if before == 0xffff || wanted == before {
        return Ok(());
    }
    config.write(access, wanted)
}
