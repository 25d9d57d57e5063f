//! Errors in the lab: raised in hardware that QEMU makes, and what the service decided about them.

use anyhow::{Context, Result};
use serde_json::Value;

use super::{SOON, xpci};
use crate::Lab;

/// What happened to a function, the oldest first.
pub fn history(lab: &Lab, address: &str) -> Result<Vec<Value>> {
    let text = xpci(lab, &format!("aer history {address} --json"))?;
    let envelope: Value = serde_json::from_str(&text).with_context(|| text.clone())?;
    Ok(envelope["result"]["events"].as_array().context("no events")?.clone())
}

/// Waits until something in a function's history says this for the `count`th time.
pub fn wait_for_history(lab: &Lab, address: &str, said: &str, count: usize) -> Result<()> {
    let shown = format!("[ $(xpci aer history {address} | grep -c '{said}') -ge {count} ]");
    lab.wait_for(&format!("'{said}' in the history of {address}"), SOON, &shown)
        .with_context(|| xpci(lab, &format!("aer history {address}")).unwrap_or_default())
}

/// The last decision about a function.
pub fn decision(lab: &Lab, address: &str) -> Result<Value> {
    let events = history(lab, address)?;
    let last = events.into_iter().rev().find(|event| event["event"] == "error");
    last.with_context(|| format!("no error of {address}"))
}

/// Raises an error in hardware, of the device with this id and in QEMU's words, and returns the decision about it.
pub fn raise(lab: &Lab, id: &str, address: &str, error: &str) -> Result<Value> {
    let decisions = history(lab, address)?.iter().filter(|event| event["event"] == "error").count();
    lab.monitor(&format!("pcie_aer_inject_error {id} {error}"))?;
    let shown = format!("[ $(xpci aer history {address} | grep -c 'error of') -gt {decisions} ]");
    lab.wait_for("a decision", SOON, &shown)?;
    decision(lab, address)
}
