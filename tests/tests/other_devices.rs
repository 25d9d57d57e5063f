//! Functions of other kinds in a PV guest: an NVMe controller, and virtio-net with MSI-X and without. No device is named in
//! xpci's code; these have real Command bits, other BARs, an I/O or no MSI-X capability, and an interrupt line. P1, P2, S8.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use xpci_tests::host::{
    SOON, builder, guest, is_held, nothing_remains, owner, start_service, xpci, xpci_fails,
};
use xpci_tests::{Devices, Guest, Lab};

const VIRTIO_MSIX: &str = "0000:02:00.0";
const NVME: &str = "0000:03:00.0";
const VIRTIO_INTX: &str = "0000:04:00.0";

#[test]
fn nvme_and_virtio_net() -> Result<()> {
    let devices = Devices::default().device("virtio-net-pci,id=e1,vectors=0");
    let lab = builder().devices(devices).boot()?;
    lab.dom0("modprobe xen-pciback && modprobe nvme").ok()?;
    lab.wait_for("the disk in dom0", SOON, "[ -b /dev/nvme0n1 ]")?;
    // The NVMe controller is a PF: without a policy it is refused (S5).
    let permit = "match: {class: '010802', function: physical}\npermit: physical-function\n";
    let _service = start_service(&lab)?;
    let before: Vec<String> = [VIRTIO_MSIX, NVME, VIRTIO_INTX]
        .iter()
        .map(|function| driver(&lab, function))
        .collect::<Result<_>>()?;
    let one = guest(&lab, "one")?;
    xpci(&lab, &format!("pci-assignable-add {VIRTIO_MSIX} {NVME} {VIRTIO_INTX}"))?;
    let (exit, said) = xpci_fails(&lab, &format!("pci-attach one {NVME}"))?;
    ensure!(
        exit == 5 && said.contains("is a PF") && said.contains("permit: [physical-function]"),
        "{exit}: {said}"
    );
    lab.push(permit.as_bytes(), "/etc/xpci/policies/nvme-pf.yaml")?;
    xpci(&lab, "policy reload")?;
    for (slot, function) in [VIRTIO_MSIX, NVME, VIRTIO_INTX].iter().enumerate() {
        xpci(&lab, &format!("pci-attach one {function}@{slot}"))?;
        ensure!(owner(&lab, function)? == format!("d{}", one.domid()?), "{}", owner(&lab, function)?);
    }

    println!("the guest's nvme reads its disk, by DMA and MSI-X");
    one.run("modprobe nvme").ok()?;
    one.wait_for("the disk", SOON, "[ -b /dev/nvme0n1 ]")?;
    one.run("dd if=/dev/nvme0n1 of=/dev/null bs=64k count=16").limit(SOON).ok()?;
    ensure!(interrupts(&one, "nvme0")? > 0, "the disk sent no interrupt");

    println!("virtio-net hears of its link by MSI-X, another one by its interrupt line");
    one.run("modprobe virtio_pci; modprobe virtio_net").ok()?;
    for (id, slot, kind) in [("e0", 0, "pcifront-msi-x"), ("e1", 2, "xen-pirq")] {
        link_changes_are_heard(&lab, &one, id, slot, kind).with_context(|| id.to_owned())?;
    }

    println!("back to dom0, each to the driver it came from");
    one.run("modprobe -r nvme").ok()?;
    for function in [VIRTIO_MSIX, NVME, VIRTIO_INTX] {
        xpci(&lab, &format!("pci-detach one {function}"))?;
        ensure!(is_held(&lab, function)?, "{function}: {}", owner(&lab, function)?);
    }
    nothing_remains(&lab, &one)?;
    xpci(&lab, &format!("pci-assignable-remove {VIRTIO_MSIX} {NVME} {VIRTIO_INTX}"))?;
    for (function, before) in [VIRTIO_MSIX, NVME, VIRTIO_INTX].iter().zip(before) {
        ensure!(
            driver(&lab, function)? == before,
            "{function}: {} instead of {before}",
            driver(&lab, function)?
        );
        ensure!(owner(&lab, function)? == "d0", "{}", owner(&lab, function)?);
    }
    lab.wait_for("the disk in dom0 again", SOON, "dd if=/dev/nvme0n1 of=/dev/null bs=64k count=1")
}

fn driver(lab: &Lab, function: &str) -> Result<String> {
    lab.dom0(&format!("basename $(readlink /sys/bus/pci/devices/{function}/driver)")).ok()
}

/// How many interrupts a guest has counted in the lines that name this.
fn interrupts(guest: &Guest<'_>, name: &str) -> Result<u64> {
    let text = guest.run("cat /proc/interrupts").ok()?;
    let count = |line: &str| line.split_whitespace().nth(1).and_then(|count| count.parse::<u64>().ok());
    Ok(text.lines().filter(|line| line.contains(name)).filter_map(count).sum())
}

/// The device tells its driver by an interrupt that its link goes down and comes up.
fn link_changes_are_heard(lab: &Lab, guest: &Guest<'_>, id: &str, slot: u8, kind: &str) -> Result<()> {
    let function = format!("/sys/bus/pci/devices/0000:00:{slot:02x}.0");
    let interface = format!("$(ls {function}/virtio*/net)");
    guest.wait_for("its interface", SOON, &format!("ls {function}/virtio*/net"))?;
    guest.run(&format!("ip link set {interface} up")).ok()?;
    let carrier = |up: u8| format!("[ \"$(cat /sys/class/net/{interface}/carrier)\" = {up} ]");
    let before = interrupts(guest, kind)?;
    for (state, up) in [("off", 0), ("on", 1)] {
        lab.monitor(&format!("set_link {id} {state}"))?;
        guest.wait_for("its link to change", Duration::from_secs(30), &carrier(up))?;
    }
    ensure!(interrupts(guest, kind)? > before, "no interrupt of kind {kind}");
    Ok(())
}
