//! With a guest connected: the shipped policy in force, learning from the guest's own driver, reload under traffic.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use xpci_tests::host::{SOON, VFS, ping, xpci, xpci_fails};
use xpci_tests::{Guest, Lab, Process};

use super::VfInAGuest;

/// Where the administrator's own policies are.
const OWN: &str = "/etc/xpci/policies/learned.yaml";

/// A register of the VF that is in no capability; QEMU lets it be written.
const UNKNOWN: &str = "40.l";

/// What Linux and igbvf write and the filter keeps from hardware, each with what is lost by it.
const HARMLESS: &[(&str, u32, &str)] = &[
    ("Command", 0xffff, "SERR, parity and INTx are the host's; a VF hardwires them to 0 anyway"),
    ("Base Address Register", u32::MAX, "Linux sizes each BAR once; hardware keeps the host's addresses"),
    ("Interrupt Line", 0xff, "a note of the guest's for itself"),
    ("Message Control", 0xffff, "Xen programs MSI-X: the guest enables it by its protocol's own request"),
    (
        "Device Control",
        0x010f,
        "errors are reported to the host; a VF has the tags of its PF (PCI Express 6.0, 9.3.5.4)",
    ),
];

pub fn the_shipped_policy_of_the_82576s_vfs_applies(scene: &mut VfInAGuest<'_>) -> Result<()> {
    let lab = scene.lab;
    scene.one_uses_it()?;
    let shown = xpci(lab, "policy show --for 01:10.0")?;
    ensure!(
        shown.lines().any(|line| line.starts_with("yes") && line.contains("intel-82576-vf.yaml")),
        "the shipped policy applies: {shown}"
    );
    ensure!(shown.contains("profile strict"), "{shown}");
    let explained = xpci(lab, "policy explain 01:10.0")?;
    ensure!(explained.contains("[70] MSI-X (msi-x)"), "{explained}");
    Ok(())
}

pub fn an_ignored_write_is_learned_proposed_and_put_in_force_under_traffic(
    scene: &mut VfInAGuest<'_>,
) -> Result<()> {
    scene.one_uses_it()?;
    let (lab, one) = (scene.lab, &scene.one);
    let load = under_traffic(one)?;
    one.run(&format!("setpci -s 00:00.0 {UNKNOWN}=12345678")).ok()?;
    ensure!(unknown(lab)? == 0, "the strict profile keeps it from hardware: {:#x}", unknown(lab)?);
    let learned = json(lab, "policy learn 01:10.0")?;
    let addition = learned["functions"][0]["addition"].as_str().context("no addition")?.to_owned();
    ensure!(addition.contains("- {at: 0x40, width: 4, mask: 0x12345678, action: pass}"), "{addition}");
    lab.push(addition.as_bytes(), OWN)?;
    xpci(lab, &format!("policy check {OWN}"))?;
    let reloaded = json(lab, "policy reload")?;
    ensure!(reloaded["functions"][0]["changed"] == true, "{reloaded}");
    ensure!(unknown(lab)? == 0, "what the guest wrote before is not replayed");
    one.run(&format!("setpci -s 00:00.0 {UNKNOWN}=ffffffff")).ok()?;
    ensure!(unknown(lab)? == 0x1234_5678, "the bits that it asked for, and no others: {:#x}", unknown(lab)?);
    one.run(&format!("setpci -s 00:00.0 {UNKNOWN}=0")).ok()?;
    without_own(lab)?;
    went_on(one, load)
}

pub fn a_policy_with_mistakes_changes_nothing(scene: &mut VfInAGuest<'_>) -> Result<()> {
    scene.one_uses_it()?;
    let (lab, one) = (scene.lab, &scene.one);
    let load = under_traffic(one)?;
    lab.push(b"match: {vendor: 8086}\nprofil: hidden\n", "/etc/xpci/policies/bad.yaml")?;
    let (status, said) = xpci_fails(lab, "policy reload")?;
    ensure!(
        status == 5 && said.contains("bad.yaml:2:1:") && said.contains("did you mean 'profile'"),
        "{said}"
    );
    lab.dom0("rm /etc/xpci/policies/bad.yaml").ok()?;
    went_on(one, load)
}

pub fn what_the_guest_has_seen_stays_until_detach(scene: &mut VfInAGuest<'_>) -> Result<()> {
    scene.one_uses_it()?;
    let (lab, one) = (scene.lab, &scene.one);
    let load = under_traffic(one)?;
    lab.push(b"match: {address: 01:10.0}\ncapabilities: {msi-x: hide, aer: hide}\n", OWN)?;
    let reloaded = json(lab, "policy reload")?;
    let deferred = reloaded["functions"][0]["deferred"].as_array().map_or(0, Vec::len);
    ensure!(deferred == 2, "{reloaded}");
    ensure!(one.run("lspci -s 00:00.0 -v").ok()?.contains("MSI-X: Enable+"), "the guest's list is as it was");
    without_own(lab)?;
    went_on(one, load)
}

fn without_own(lab: &Lab) -> Result<()> {
    lab.dom0(&format!("rm {OWN}")).ok()?;
    xpci(lab, "policy reload").map(drop)
}

/// Traffic that ends when a packet gets no answer.
fn under_traffic(one: &Guest<'_>) -> Result<Process> {
    one.spawn("while ping -c 1 -w 5 10.9.9.1 >/dev/null; do :; done")
}

fn went_on(one: &Guest<'_>, load: Process) -> Result<()> {
    ensure!(load.ended().is_none(), "the guest's traffic stopped");
    drop(load);
    ping(one, "10.9.9.1")
}

/// The 82576 VF's stock driver runs with no masked write that matters.
pub fn igbvf_loses_no_write_that_matters(scene: &mut VfInAGuest<'_>) -> Result<()> {
    let lab = scene.lab;
    scene.one_uses_it()?;
    let learned = json(lab, "policy learn one")?;
    let registers = learned["functions"][0]["registers"].as_array().context("no registers")?;
    for register in registers {
        let name = register["name"].as_str().unwrap_or_default();
        let lost = register["kept"].as_u64().unwrap_or(0) | register["dropped"].as_u64().unwrap_or(0);
        println!("  masked: {register}");
        let harmless = |(known, bits, _): &(&str, u32, &str)| *known == name && lost & !u64::from(*bits) == 0;
        ensure!(HARMLESS.iter().any(harmless), "a masked write that may matter: {register}");
    }
    Ok(())
}

/// The unknown register, as hardware holds it.
fn unknown(lab: &Lab) -> Result<u32> {
    let text = lab.dom0(&format!("setpci -s {} {UNKNOWN}", VFS[0])).limit(SOON).ok()?;
    u32::from_str_radix(text.trim(), 16).with_context(|| text.clone())
}

fn json(lab: &Lab, arguments: &str) -> Result<Value> {
    let text = xpci(lab, &format!("{arguments} --json"))?;
    let envelope: Value = serde_json::from_str(&text).with_context(|| text.clone())?;
    Ok(envelope["result"].clone())
}
