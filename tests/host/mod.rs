//! What all system tests do with a booted lab: start xpcid, ask Xen who owns what, compare.

pub mod errors;
pub mod events;
pub mod frontend;
pub mod pf;
pub mod state;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::{BareGuest, Builder, Guest, GuestConfig, Lab, Process};

/// What is awaited inside an emulated machine, on a busy host.
pub const SOON: Duration = Duration::from_secs(60);
/// The 82576 and its first VFs in the lab.
pub const PF: &str = "0000:01:00.0";
/// Its VFs.
pub const VFS: [&str; 3] = ["0000:01:10.0", "0000:01:10.2", "0000:01:10.4"];

/// The process number of xpcid, for the shell of dom0. Its children that write to sysfs have the same name; it is the oldest.
pub const SERVICE: &str = "$(pidof xpcid | tr ' ' '\\n' | sort -n | head -n 1)";

/// The policies that are shipped, for tests with their devices.
const POLICIES: [&str; 3] = ["intel-82576-vf.yaml", "nvme.yaml", "virtio.yaml"];

/// A lab with the product installed.
pub fn builder() -> Builder {
    let programs = Lab::builder().program("xpcid", "/usr/sbin/xpcid").program("xpci", "/usr/sbin/xpci");
    let programs =
        programs.install("tests/host/former-owners.yaml", "/usr/share/xpci/policies/lab-former-owners.yaml");
    POLICIES.iter().fold(programs, |lab, policy| {
        lab.install(format!("configs/policies/{policy}"), &format!("/usr/share/xpci/policies/{policy}"))
    })
}

/// Maps the first page of BAR 0 of a function that a guest sees, in a program of the guest's that keeps it: `keep-page`.
pub fn map_bar(guest: &Guest<'_>, function: &str) -> Result<Process> {
    let resource = format!("/sys/bus/pci/devices/{function}/resource");
    guest.wait_for("the function", SOON, &format!("[ -e {resource} ]"))?;
    let line = guest.run(&format!("head -n 1 {resource}")).ok()?;
    let address = line.split_whitespace().next().and_then(|word| word.strip_prefix("0x"));
    let address = address.with_context(|| format!("no BAR in {line:?}"))?;
    let page = guest.converse(&format!("/lab/keep-page {address}"))?;
    page.wait_output("mapped\n", SOON)?;
    Ok(page)
}

/// Starts the service and waits until it listens.
pub fn start_service(lab: &Lab) -> Result<Process> {
    // A predecessor that was killed leaves its socket behind.
    lab.dom0("rm -f /run/xpci/control").ok()?;
    let service = lab.spawn("xpcid")?;
    lab.wait_for("xpcid's control socket", SOON, "[ -S /run/xpci/control ]")?;
    Ok(service)
}

/// The PF up with an address, xen-pciback loaded, the service running.
pub fn prepare(lab: &Lab) -> Result<Process> {
    lab.dom0("modprobe igb && modprobe xen-pciback").ok()?;
    lab.wait_for("the PF's network interface", SOON, &format!("[ -d /sys/bus/pci/devices/{PF}/net ]"))?;
    lab.dom0(
        "ip link set $(pf_interface) up && ip addr add 10.9.9.1/24 dev $(pf_interface)"
            .replace("$(pf_interface)", &format!("$(ls /sys/bus/pci/devices/{PF}/net)"))
            .as_str(),
    )
    .ok()?;
    start_service(lab)
}

/// Sets a VF's MAC address through the PF.
pub fn set_mac(lab: &Lab, index: usize, mac: &str) -> Result<()> {
    lab.dom0(&format!("ip link set $(ls /sys/bus/pci/devices/{PF}/net) vf {index} mac {mac}")).ok().map(drop)
}

/// An `xpci` command that must succeed.
pub fn xpci(lab: &Lab, arguments: &str) -> Result<String> {
    lab.dom0(&format!("xpci {arguments}")).ok()
}

/// An `xpci` command that must fail: its exit status and what it says.
pub fn xpci_fails(lab: &Lab, arguments: &str) -> Result<(i32, String)> {
    let output = lab.dom0(&format!("xpci {arguments}")).run()?;
    ensure!(output.status() != 0, "'xpci {arguments}' succeeded: {}", output.stdout());
    Ok((output.status(), output.stderr()))
}

/// `xpci status` as JSON.
pub fn status(lab: &Lab) -> Result<Value> {
    let text = xpci(lab, "status --json")?;
    let envelope: Value = serde_json::from_str(&text).with_context(|| text.clone())?;
    Ok(envelope["result"].clone())
}

/// The state of one function in `xpci status`; `host` when it is not listed.
pub fn state(lab: &Lab, address: &str) -> Result<String> {
    let status = status(lab)?;
    let functions = status["functions"].as_array().context("no functions in status")?;
    let found = functions.iter().find(|function| function["address"] == address);
    Ok(found.and_then(|function| function["state"].as_str()).unwrap_or("host").to_owned())
}

/// Sends Xen a debug key and returns what it prints for it.
fn debug_key(lab: &Lab, key: &str) -> Result<String> {
    let before = length_of_xens_log(lab)?;
    lab.dom0(&format!("xl debug-keys {key}")).ok()?;
    xens_log_from(lab, before)
}

/// How many bytes Xen's log has. It is never cleared: others look for what Xen said at boot.
pub fn length_of_xens_log(lab: &Lab) -> Result<usize> {
    let text = lab.dom0("xl dmesg | wc -c").ok()?;
    text.trim().parse().with_context(|| format!("Xen's log has {text:?} bytes"))
}

/// What Xen's log has from this byte on.
pub fn xens_log_from(lab: &Lab, start: usize) -> Result<String> {
    lab.dom0(&format!("xl dmesg | tail -c +{}", start + 1)).ok()
}

/// Who owns a function, in Xen's own words: `d0`, `d[IO]` or `DomIO:...`, `d1` and so on.
pub fn owner(lab: &Lab, address: &str) -> Result<String> {
    let report = debug_key(lab, "Q")?;
    // What Xen says of the function at other occasions may stand beside it.
    let listed = format!("{address} - ");
    let rest = report.lines().find_map(|line| line.split_once(&listed)).with_context(|| report.clone())?.1;
    Ok(rest.split_whitespace().next().unwrap_or_default().to_owned())
}

/// Whether a function is in Xen's list.
pub fn known_to_xen(lab: &Lab, address: &str) -> Result<bool> {
    Ok(debug_key(lab, "Q")?.contains(address))
}

/// Waits until a function is in a state, as `xpci status` says, and no guest is named for it any more.
pub fn wait_for_state(lab: &Lab, address: &str, wanted: &str) -> Result<()> {
    let quoted = format!("{address} is {wanted}");
    let shown = match wanted {
        // What is dom0's is not listed.
        "host" => format!("! xpci status | grep -q '^{address}'"),
        _ => format!("xpci status | grep '^{address}' | grep -qE ' {wanted} +-'"),
    };
    lab.wait_for(&quoted, SOON, &shown)
}

/// Whether Xen's quarantine domain owns a function.
pub fn is_held(lab: &Lab, address: &str) -> Result<bool> {
    let owner = owner(lab, address)?.to_lowercase();
    Ok(owner.contains("io"))
}

/// What Xen says a guest may use, besides memory: interrupts, I/O memory and ports, one line each.
pub fn granted(lab: &Lab, domain: u32) -> Result<Vec<String>> {
    let report = debug_key(lab, "q")?;
    let start =
        report.find(&format!("General information for domain {domain}:")).with_context(|| report.clone())?;
    let own = &report[start..];
    let end = own[1..].find("General information for domain").map_or(own.len(), |end| end + 1);
    let kinds = ["Interrupts", "I/O Memory", "I/O Ports"];
    let lines = own[..end].lines().filter(|line| kinds.iter().any(|kind| line.contains(kind)));
    Ok(lines.map(|line| line.trim_start_matches("(XEN)").trim().to_owned()).collect())
}

/// Nothing that xpcid gave a guest, or took from it, is left: memory, ports and interrupts in Xen, nodes, the image, and,
/// while no other guest is connected, mapped pages and event channels.
pub fn nothing_remains(lab: &Lab, guest: &Guest<'_>) -> Result<()> {
    let domain = guest.domid()?;
    for line in granted(lab, domain)? {
        ensure!(line.ends_with("{ }") || line.ends_with("{}"), "domain {domain} keeps {line}");
    }
    let nodes = lab.dom0("xenstore-ls -f /local/domain").ok()?;
    let left: Vec<&str> = nodes
        .lines()
        .filter(|line| {
            line.contains("backend/xpci/") || line.contains(&format!("domain/{domain}/device/pci"))
        })
        .collect();
    ensure!(left.is_empty(), "nodes are left: {left:#?}");
    let descriptors = lab.dom0(&format!("ls -l /proc/{SERVICE}/fd")).ok()?;
    let rings: Vec<&str> = descriptors
        .lines()
        .filter(|line| ["xen/gntdev", "xen/evtchn"].iter().any(|device| line.contains(device)))
        .collect();
    ensure!(rings.is_empty(), "a page is mapped or an event channel bound: {rings:?}");
    let images = lab.dom0("ls /run/xpci/images").ok()?;
    ensure!(images.trim().is_empty(), "images are left: {images}");
    Ok(())
}

/// Starts a guest that can be given functions.
pub fn guest<'a>(lab: &'a Lab, name: &str) -> Result<Guest<'a>> {
    lab.guest(&GuestConfig::pv(name))
}

/// Starts several, which boot side by side.
pub fn guests<'a, const N: usize>(lab: &'a Lab, names: [&str; N]) -> Result<[Guest<'a>; N]> {
    lab.guests(&names.map(GuestConfig::pv))
}

/// Loads igbvf in a guest and gives the interface of its first function an address.
pub fn bring_up(guest: &Guest<'_>, address: &str) -> Result<()> {
    bring_up_at(guest, "0000:00:00.0", address)
}

/// The same for a function that is somewhere else in the guest.
pub fn bring_up_at(guest: &Guest<'_>, function: &str, address: &str) -> Result<()> {
    let device = format!("/sys/bus/pci/devices/{function}");
    guest.wait_for("the function", SOON, &format!("[ -e {device} ]"))?;
    guest.run("modprobe igbvf").ok()?;
    guest.wait_for("its interface", SOON, &format!("[ -d {device}/net ]"))?;
    let interface = format!("$(ls {device}/net)");
    guest.run(&format!("ip addr replace {address}/24 dev {interface} && ip link set {interface} up")).ok()?;
    guest.wait_for("its link", SOON, &format!("[ \"$(cat /sys/class/net/{interface}/carrier)\" = 1 ]"))
}

/// Packets get through from here to there, and back.
pub fn ping(from: &Guest<'_>, to: &str) -> Result<()> {
    from.run(&format!("ping -c 3 -w 20 {to}")).limit(SOON).ok().map(drop)
}

/// Reports an error in a function's name, by the module aer_inject: the kernel believes that the registers say so.
pub fn inject_error(lab: &Lab, address: &str, uncorrectable: u32, correctable: u32) -> Result<()> {
    let bad = || format!("{address} is no address");
    let (bus, rest) =
        address.strip_prefix("0000:").and_then(|rest| rest.split_once(':')).with_context(bad)?;
    let (device, function) = rest.split_once('.').with_context(bad)?;
    let number = |text: &str| u8::from_str_radix(text, 16).with_context(bad);
    // struct aer_error_inj of drivers/pci/pcie/aer_inject.c.
    let mut bytes = vec![number(bus)?, number(device)?, number(function)?, 0];
    for word in [uncorrectable, correctable, 0, 0, 0, 0, 0] {
        bytes.extend(word.to_le_bytes());
    }
    // It takes all of it in one write.
    lab.dom0("dd of=/dev/aer_inject bs=64").input(bytes).ok().map(drop)
}

/// Waits until so many interrupts have come by a vector of a bare guest's, and makes sure that there are not more.
pub fn come(one: &BareGuest<'_>, vector: u32, count: u32) -> Result<()> {
    counts(one, &format!("count {vector:x}"), count)
}

/// Waits until what a bare guest counts, asked for by this order, is so many, and makes sure that it is not more.
fn counts(one: &BareGuest<'_>, order: &str, count: u32) -> Result<()> {
    let end = Instant::now() + SOON;
    loop {
        let found = one.number(order)?;
        if found == count {
            return Ok(());
        }
        ensure!(found < count && Instant::now() < end, "'{order}' says that {found} came, not {count}");
    }
}

/// What a bare guest counts, asked for by this order, when nothing has come during many looks: what has been sent may still be on its way.
/// With `before` it waits until more than that have come. For triggers of which the service takes no part in the way to the guest, while
/// QEMU's 82576 now and then sends a second one.
pub fn settled_count(one: &BareGuest<'_>, order: &str, before: Option<u32>) -> Result<u32> {
    let end = Instant::now() + SOON;
    let (mut last, mut same) = (one.number(order)?, 0);
    while same < 50 || before.is_some_and(|before| last <= before) {
        ensure!(Instant::now() < end, "'{order}' says {last} and does not settle; before it was {before:?}");
        let now = one.number(order)?;
        (last, same) = if now == last { (last, same + 1) } else { (now, 0) };
    }
    Ok(last)
}
