//! Bringing functions and the service to a known state, from any state that a failed check left.

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::{SOON, bring_up, start_service, status, xpci};
use crate::{Guest, Lab, Process};

/// Steps from any state to any other.
const STEPS: usize = 6;

/// Starts the service unless it runs.
pub fn keep_running(lab: &Lab, service: &mut Process) -> Result<()> {
    if service.ended().is_some() {
        *service = start_service(lab)?;
    }
    Ok(())
}

/// Stops the service in an orderly way.
pub fn stop(service: &Process) -> Result<()> {
    service.signal(15)?;
    ensure!(service.wait(SOON)?.code == Some(0), "exit status of a stopped service");
    Ok(())
}

/// Kills the service and starts it again.
pub fn kill_and_start(lab: &Lab, service: &mut Process) -> Result<()> {
    service.signal(9)?;
    service.wait(SOON)?;
    *service = start_service(lab)?;
    Ok(())
}

/// The service knows of no problem.
pub fn no_problems(lab: &Lab) -> Result<()> {
    let status = status(lab)?;
    ensure!(status["problems"].as_array().is_some_and(Vec::is_empty), "{status}");
    Ok(())
}

/// Makes a function held and attached to no guest, from any state.
pub fn make_held(lab: &Lab, address: &str) -> Result<()> {
    for _ in 0..STEPS {
        let (state, domain) = whose(lab, address)?;
        match (state.as_str(), domain) {
            ("held", _) => return Ok(()),
            ("attached", Some(domain)) => xpci(lab, &format!("pci-detach --force {domain} {address}"))?,
            ("host", _) => xpci(lab, &format!("pci-assignable-add {address}"))?,
            ("quarantined", _) => xpci(lab, &format!("quarantine clear {address}"))?,
            ("gone", _) => xpci(lab, &format!("pci-assignable-remove {address}"))?,
            (state, _) => settled(lab, address, state)?,
        };
    }
    bail!("{address} is not held after {STEPS} steps: {}", status(lab)?)
}

/// Gives a guest a function, at a slot if that matters, unless it is attached already.
pub fn make_attached(lab: &Lab, guest: &Guest<'_>, address: &str, slot: Option<u32>) -> Result<()> {
    let domain = guest.domid()?;
    if whose(lab, address)? == ("attached".to_owned(), Some(u64::from(domain))) {
        return Ok(());
    }
    make_held(lab, address)?;
    let place = slot.map(|slot| format!("@{slot:x}")).unwrap_or_default();
    xpci(lab, &format!("pci-attach {domain} {address}{place}")).map(drop)
}

/// Gives a guest a VF as its first function, and has its driver up with this address.
pub fn make_used(lab: &Lab, guest: &Guest<'_>, vf: &str, address: &str) -> Result<()> {
    make_attached(lab, guest, vf, None)?;
    let up = "cat /sys/bus/pci/devices/0000:00:00.0/net/*/carrier | grep -q 1";
    if guest.run(&format!("{up} && ip addr | grep -q ' {address}/'")).run()?.status() != 0 {
        guest.run("modprobe -r igbvf").ok()?;
        bring_up(guest, address)?;
    }
    Ok(())
}

/// The state of a function, and the guest that it is named for.
fn whose(lab: &Lab, address: &str) -> Result<(String, Option<u64>)> {
    let status = status(lab)?;
    let functions = status["functions"].as_array().context("no functions in status")?;
    let found = functions.iter().find(|function| function["address"] == address);
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let state = found.and_then(|function| text(&function["state"])).unwrap_or_else(|| "host".to_owned());
    Ok((state, found.and_then(|function| function["domain"].as_u64())))
}

/// Waits for the end of a state that does not last.
fn settled(lab: &Lab, address: &str, passing: &str) -> Result<String> {
    let gone = format!("! xpci status | grep '^{address}' | grep -qw '{passing}'");
    lab.wait_for(&format!("{address} to be {passing} no more"), SOON, &gone).map(|()| String::new())
}
