//! Writes `pciback/tests/dumps/qemu-*.txt`: the config space of every PCI device that QEMU can make and that has a shape of
//! its own, as `lspci -xxxx` shows it in the lab's dom0.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use xpci_tests::{Devices, Lab};

mod devices;

const SOON: Duration = Duration::from_secs(120);

fn main() -> Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../pciback/tests/dumps");
    fs::create_dir_all(&folder)?;
    let mut written = 0;
    for (name, devices) in [("express", devices::express()), ("conventional", devices::conventional())] {
        let dumps = capture(name, devices).with_context(|| format!("capturing the {name} machine"))?;
        written += dumps.len();
        for (id, dump) in dumps {
            fs::write(folder.join(format!("qemu-{id}.txt")), dump)?;
        }
    }
    println!("dumps: {written} files in {}", folder.display());
    Ok(())
}

/// The dump of each function that has a name, by name.
fn capture(name: &str, devices: Devices) -> Result<BTreeMap<String, String>> {
    let lab = Lab::builder().name(&format!("dumps-{name}")).devices(devices).boot()?;
    let mut names = BTreeMap::new();
    for bus in lab.qmp("query-pci", &json!({}))?.as_array().context("QEMU lists no buses")? {
        collect(&bus["devices"], &mut names)?;
    }
    if names.values().any(|id| id == "igb") {
        virtual_functions(&lab, &mut names)?;
    }
    let text = lab.dom0("lspci -D -nn -xxxx").limit(SOON).ok()?;
    let mut dumps = BTreeMap::new();
    for dump in text.split("\n\n").map(str::trim).filter(|dump| !dump.is_empty()) {
        let address = dump.split(' ').next().unwrap_or_default();
        if let Some(id) = names.remove(address) {
            dumps.insert(id, format!("{dump}\n"));
        }
    }
    ensure!(names.is_empty(), "dom0 does not see {names:?}:\n{}", lab.dom0("lspci -D -nn").ok()?);
    Ok(dumps)
}

/// Which device is at which address, as QEMU knows them by their ids.
fn collect(devices: &Value, names: &mut BTreeMap<String, String>) -> Result<()> {
    for device in devices.as_array().into_iter().flatten() {
        let number = |key: &str| device[key].as_u64().with_context(|| format!("no {key} in {device}"));
        let address =
            format!("0000:{:02x}:{:02x}.{:x}", number("bus")?, number("slot")?, number("function")?);
        let id = device["qdev_id"].as_str().unwrap_or_default();
        let id = match (id, address.as_str()) {
            // The machine's own devices have no id; the lab's own have one that says nothing here.
            (_, "0000:00:00.0") => "host-bridge",
            (_, "0000:00:1f.0") => "lpc",
            (_, "0000:00:1f.2") => "ahci",
            (_, "0000:00:1f.3") => "smbus",
            ("lab-serial", _) => "virtio-serial",
            (id, _) => id,
        };
        // Ports that only carry a device are all alike.
        if !id.is_empty() && !id.starts_with("rp") {
            names.insert(address, id.to_owned());
        }
        collect(&device["pci_bridge"]["devices"], names)?;
    }
    Ok(())
}

/// Makes VFs of both devices that can have some, and names the first of each.
fn virtual_functions(lab: &Lab, names: &mut BTreeMap<String, String>) -> Result<()> {
    lab.dom0("modprobe igb; modprobe nvme").ok()?;
    for (pf, vf) in [("igb", "igbvf"), ("nvme", "nvme-vf")] {
        let address = names.iter().find(|(_, id)| *id == pf).context("no such device")?.0;
        let folder = format!("/sys/bus/pci/devices/{address}");
        lab.wait_for("the PF's driver", SOON, &format!("[ -e {folder}/driver ]"))?;
        lab.dom0(&format!("echo 2 >{folder}/sriov_numvfs")).limit(SOON).ok()?;
        let virtual_function = lab.dom0(&format!("basename $(readlink {folder}/virtfn0)")).ok()?;
        names.insert(virtual_function.trim().to_owned(), vf.to_owned());
    }
    Ok(())
}
