//! Interrupts that a bare guest takes as events.

use anyhow::{Result, ensure};

use crate::BareGuest;

/// `XENFEAT_hvm_pirqs` (xen/include/public/features.h).
const HVM_PIRQS: u32 = 1 << 10;

/// Gets the guest ready for events; whether Xen offers it to take interrupts as such.
pub fn offers_pirqs(one: &BareGuest<'_>) -> Result<bool> {
    let features = one.number("xen")?;
    ensure!(features != 0, "Xen does not answer the guest's hypercalls");
    Ok(features & HVM_PIRQS != 0)
}

/// A number that Xen has answered.
pub fn xen(one: &BareGuest<'_>, order: &str) -> Result<u32> {
    let answer = one.number(order)?;
    ensure!(answer < 0xffff_f000, "Xen answers {} to '{order}'", answer.cast_signed());
    Ok(answer)
}

/// Address, upper address and data of a message that names a physical interrupt, as Linux composes it: delivery mode ExtINT.
pub fn message(pirq: u32) -> [u32; 3] {
    [0xfee0_0000 | (pirq & 0xff) << 12, pirq & !0xff, 0x700]
}

/// How many have come by a port.
pub fn events(one: &BareGuest<'_>, port: u32) -> Result<u32> {
    one.number(&format!("events {port:x}"))
}

/// Waits until an event has come by a port since `before` were counted, and no more come.
pub fn arrives_again(one: &BareGuest<'_>, port: u32, before: u32) -> Result<()> {
    super::settled_count(one, &format!("events {port:x}"), Some(before)).map(drop)
}

/// Waits until so many events have come by a port, and makes sure that there are not more.
pub fn arrives(one: &BareGuest<'_>, port: u32, count: u32) -> Result<()> {
    super::counts(one, &format!("events {port:x}"), count)
}
