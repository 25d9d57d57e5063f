//! Functions of other kinds in HVM guests, on a real Xen: MSI, interrupt lines, I/O BARs, BARs that share a
//! page, a function without function level reset, and errors. P5, P6, E2, T4.
//!
//! The guests (`tests/guests`) have no operating system: what they read and count is what hardware, Xen and xpcid make of it.

mod errors;
mod interrupts;
mod registers;

use anyhow::{Context, Result, ensure};
use xpci_tests::host::{SOON, builder, granted, is_held, start_service, status, xpci, xpci_fails};
use xpci_tests::{BareGuest, Devices, Lab, unless_lost};

/// An 82576 as a whole, with an I/O BAR.
const IGB: &str = "0000:01:00.0";
/// QEMU's device for teaching: conventional PCI, MSI without a mask, an interrupt line, and no reset of its own.
const EDU: &str = "0000:02:00.0";
/// An RTL8139, with 256 bytes of I/O ports and of memory.
const RTL: &str = "0000:03:00.0";
/// Two virtio-net that report errors, `e0` and `e1`.
const VIRTIO: [&str; 2] = ["0000:04:00.0", "0000:05:00.0"];

/// Where they are in the guest.
const IGB_SLOT: u32 = 0x17;
const EDU_SLOT: u32 = 0x18;
const RTL_SLOT: u32 = 0x19;
const VIRTIO_SLOTS: [u32; 2] = [0x1a, 0x1b];

const COMMAND: u32 = 4;
const BAR0: u32 = 0x10;
const INTERRUPT_LINE: u32 = 0x3c;

const POLICY: &str = "match: {vendor: 8086, device: 10c9}\npermit: physical-function\n";
/// The bus reset hits nothing else here: each function is alone below its port.
const SETTINGS: &str = "reset: {methods: [flr, bus]}\n";

#[test]
fn every_kind_of_bar_and_interrupt() -> Result<()> {
    unless_lost(all)
}

fn all() -> Result<()> {
    let devices = Devices::none()
        .device("igb,id=igb0")
        .device("edu,id=edu0")
        .device("rtl8139,id=rtl0,romfile=")
        .device("virtio-net-pci,id=e0,aer=on")
        .device("virtio-net-pci,id=e1,aer=on");
    let lab = builder().devices(devices).hvm_guests().boot()?;
    lab.dom0("modprobe xen-pciback").ok()?;
    lab.push(POLICY.as_bytes(), "/etc/xpci/policies/igb.yaml")?;
    let service = without_a_reset_of_its_own(&lab)?;
    for function in [IGB, RTL, VIRTIO[0], VIRTIO[1]] {
        xpci(&lab, &format!("pci-assignable-add {function}"))?;
    }
    let mut one = BareGuest::create(&lab, "one", &[])?;
    let slots = [IGB_SLOT, EDU_SLOT, RTL_SLOT, VIRTIO_SLOTS[0], VIRTIO_SLOTS[1]];
    for (function, slot) in [IGB, EDU, RTL, VIRTIO[0], VIRTIO[1]].iter().zip(slots) {
        xpci(&lab, &format!("pci-attach one {function}@{slot:x}"))?;
    }
    one.start()?;

    registers::io(&one)?;
    registers::less_than_a_page(&lab, &one)?;
    interrupts::msi(&one)?;
    interrupts::msi_with_a_mask(&one)?;
    interrupts::lines(&lab, &one)?;
    let service = interrupts::survive_the_service(&lab, &one, service)?;

    println!("detached from a running guest, they answer no more, and nothing of them remains in it");
    for (function, slot) in [(IGB, IGB_SLOT), (EDU, EDU_SLOT), (RTL, RTL_SLOT)] {
        xpci(&lab, &format!("pci-detach --force one {function}"))?;
        ensure!(is_held(&lab, function)?, "{function}: {}", status(&lab)?);
        one.tell(&format!("slot {slot:x}"))?;
        ensure!(one.number("r 0 4")? == u32::MAX, "a detached function answers");
    }

    errors::contained(&lab, one)?;
    ensure!(status(&lab)?["problems"].as_array().is_some_and(Vec::is_empty), "{}", status(&lab)?);
    ensure!(service.ended().is_none(), "{}", service.output_so_far());
    Ok(())
}

/// T4: a function that can only be reset with its bus is nobody's until the host's owner allows that.
fn without_a_reset_of_its_own(lab: &Lab) -> Result<xpci_tests::Process> {
    let mut service = start_service(lab)?;
    xpci(lab, &format!("pci-assignable-add {EDU}"))?;
    let paused = BareGuest::create(lab, "zero", &[])?;
    let (exit, said) = xpci_fails(lab, &format!("pci-attach zero {EDU}"))?;
    ensure!(exit == 5 && said.contains("'bus' reset"), "{exit}: {said}");
    ensure!(is_held(lab, EDU)?, "{}", status(lab)?);
    paused.destroy()?;
    service.signal(15)?;
    ensure!(service.wait(SOON)?.code == Some(0), "exit status of a stopped service");
    lab.push(SETTINGS.as_bytes(), "/etc/xpci/xpcid.yaml")?;
    service = start_service(lab)?;
    Ok(service)
}

/// Makes a function the one that is spoken of, with decoding and bus mastering on; its BAR in this register.
fn open(one: &BareGuest<'_>, slot: u32, bar: u32) -> Result<u32> {
    one.tell(&format!("slot {slot:x}"))?;
    one.tell(&format!("w {COMMAND:x} 2 7"))?;
    let register = one.number(&format!("r {bar:x} 4"))?;
    let mask = if register & 1 != 0 { 3 } else { 0xf };
    ensure!(register != u32::MAX && register & !mask != 0, "BAR {bar:x} of {slot:x}: {register:x}");
    Ok(register & !mask)
}

/// What Xen lets a guest use, of one kind.
fn granted_of(lab: &Lab, guest: &BareGuest<'_>, kind: &str) -> Result<String> {
    let lines = granted(lab, guest.domid()?)?;
    lines.into_iter().find(|line| line.contains(kind)).with_context(|| format!("Xen tells of no {kind}"))
}
