//! Functions of other kinds in HVM guests, on a real Xen: MSI, interrupt lines, I/O BARs, BARs that share a
//! page, a function without function level reset, and errors.
//!
//! The guests (`tests/guests`) have no operating system: what they read and count is what hardware, Xen and xpcid make of it.

mod errors;
mod events;
mod interrupts;
mod registers;
mod roms;

use anyhow::{Context, Result, ensure};
use xpci_tests::host::state::{keep_running, make_held, no_problems, stop};
use xpci_tests::host::{SOON, builder, granted, is_held, start_service, status, xpci, xpci_fails};
use xpci_tests::scenes::{Check, Machine, Scene};
use xpci_tests::{BareGuest, Builder, Devices, Lab, Process, checks};

use crate::machines::{clean, destroy_guests};
use errors::{
    a_fatal_error_quarantines_the_function, a_guest_that_cannot_be_told_loses_its_function,
    destroy_guest_destroys_it_and_its_function_is_held_again, pause_guest_pauses_it,
    reset_lets_the_function_begin_anew_in_its_guest, unplug_takes_the_function_from_its_guest,
    what_was_quarantined_comes_back_only_when_it_is_cleared,
};
use events::{
    msi_comes_as_an_event_where_its_message_names_an_interrupt, msi_whose_mask_is_left_set_comes_as_an_event,
};
use interrupts::{
    an_asserted_line_interrupts_until_the_function_is_told,
    messages_and_lines_come_while_the_service_is_dead_and_afterwards,
    msi_comes_by_the_vector_that_its_message_names, msi_that_is_masked_waits_and_comes_once,
};
use registers::{
    an_io_bar_is_where_the_guest_puts_it, each_access_to_a_bar_of_less_than_a_page_reaches_its_function,
};

use roms::firmware_and_guest_find_a_copy_of_the_devices_rom;

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
const SETTINGS_FILE: &str = "/etc/xpci/xpcid.yaml";
const SETTINGS: &str = "reset: {methods: [flr, bus]}\n";

static DEVICES: Machine = Machine { name: "hvm-devices", builder: devices, clean, end: None };

fn devices() -> Result<Builder> {
    let devices = Devices::none()
        .device("igb,id=igb0")
        .device("edu,id=edu0")
        .device("rtl8139,id=rtl0,romfile=")
        .device("virtio-net-pci,id=e0,aer=on")
        .device("virtio-net-pci,id=e1,aer=on");
    Ok(builder().devices(devices).hvm_guests())
}

pub struct HvmDevices<'a> {
    lab: &'a Lab,
    service: Process,
    one: Option<BareGuest<'a>>,
}

impl<'a> Scene<'a> for HvmDevices<'a> {
    const NAME: &'static str = "hvm_devices";
    const MACHINE: &'static Machine = &DEVICES;

    fn set_up(lab: &'a Lab) -> Result<Self> {
        lab.dom0("modprobe xen-pciback").ok()?;
        lab.push(POLICY.as_bytes(), "/etc/xpci/policies/igb.yaml")?;
        Ok(Self { lab, service: start_service(lab)?, one: None })
    }

    fn checks() -> Vec<Check<Self>> {
        checks![
            a_function_without_a_reset_of_its_own_is_refused_until_the_settings_allow_that_of_its_bus,
            functions_of_every_kind_are_attached_to_a_paused_guest,
            an_io_bar_is_where_the_guest_puts_it,
            each_access_to_a_bar_of_less_than_a_page_reaches_its_function,
            msi_comes_by_the_vector_that_its_message_names,
            msi_that_is_masked_waits_and_comes_once,
            msi_comes_as_an_event_where_its_message_names_an_interrupt,
            msi_whose_mask_is_left_set_comes_as_an_event,
            an_asserted_line_interrupts_until_the_function_is_told,
            messages_and_lines_come_while_the_service_is_dead_and_afterwards,
            detached_from_a_running_guest_functions_answer_no_more,
            reset_lets_the_function_begin_anew_in_its_guest,
            pause_guest_pauses_it,
            a_guest_that_cannot_be_told_loses_its_function,
            a_fatal_error_quarantines_the_function,
            what_was_quarantined_comes_back_only_when_it_is_cleared needs a_fatal_error_quarantines_the_function,
            unplug_takes_the_function_from_its_guest,
            destroy_guest_destroys_it_and_its_function_is_held_again,
            firmware_and_guest_find_a_copy_of_the_devices_rom,
            all_is_well_at_the_end,
        ]
    }

    /// A guest like the first one, with all functions.
    fn restore(&mut self) -> Result<()> {
        let lab = self.lab;
        keep_running(lab, &mut self.service)?;
        self.one = None;
        destroy_guests(lab)?;
        lab.dom0(&format!("rm -f {}", errors::POLICY)).ok()?;
        xpci(lab, "policy reload")?;
        self.begins_anew()
    }
}

impl<'a> HvmDevices<'a> {
    /// The guest that most checks are about.
    fn one(&self) -> Result<&BareGuest<'a>> {
        self.one.as_ref().context("the bare guest is gone")
    }

    /// The guest is created with all functions, and started.
    fn begins_anew(&mut self) -> Result<()> {
        let lab = self.lab;
        if let Some(one) = self.one.take() {
            one.destroy()?;
        }
        self.bus_resets_are_allowed()?;
        let functions = [IGB, EDU, RTL, VIRTIO[0], VIRTIO[1]];
        functions.iter().try_for_each(|function| make_held(lab, function))?;
        let mut one = BareGuest::create(lab, "one", &[])?;
        let slots = [IGB_SLOT, EDU_SLOT, RTL_SLOT, VIRTIO_SLOTS[0], VIRTIO_SLOTS[1]];
        for (function, slot) in functions.iter().zip(slots) {
            xpci(lab, &format!("pci-attach one {function}@{slot:x}"))?;
        }
        one.start()?;
        self.one = Some(one);
        Ok(())
    }

    fn bus_resets_are_allowed(&mut self) -> Result<()> {
        let lab = self.lab;
        if lab.dom0(&format!("test -e {SETTINGS_FILE}")).run()?.status() == 0 {
            return Ok(());
        }
        stop(&self.service)?;
        lab.push(SETTINGS.as_bytes(), SETTINGS_FILE)?;
        self.service = start_service(lab)?;
        Ok(())
    }
}

/// No guest gets it until the settings allow that reset.
fn a_function_without_a_reset_of_its_own_is_refused_until_the_settings_allow_that_of_its_bus(
    scene: &mut HvmDevices<'_>,
) -> Result<()> {
    let lab = scene.lab;
    xpci(lab, &format!("pci-assignable-add {EDU}"))?;
    let paused = BareGuest::create(lab, "zero", &[])?;
    let (exit, said) = xpci_fails(lab, &format!("pci-attach zero {EDU}"))?;
    ensure!(exit == 5 && said.contains("reset: {methods: [bus]}"), "{exit}: {said}");
    ensure!(is_held(lab, EDU)?, "{}", status(lab)?);
    scene.bus_resets_are_allowed()?;
    xpci(lab, &format!("pci-attach zero {EDU}"))?;
    paused.destroy()?;
    lab.wait_for("the function to be held", SOON, "xpci pci-assignable-list | grep -q 02:00.0")
}

fn functions_of_every_kind_are_attached_to_a_paused_guest(scene: &mut HvmDevices<'_>) -> Result<()> {
    scene.begins_anew()?;
    for slot in [IGB_SLOT, EDU_SLOT, RTL_SLOT, VIRTIO_SLOTS[0], VIRTIO_SLOTS[1]] {
        let one = scene.one()?;
        one.tell(&format!("slot {slot:x}"))?;
        ensure!(one.number("r 0 4")? != u32::MAX, "nothing answers at {slot:x}");
    }
    Ok(())
}

fn detached_from_a_running_guest_functions_answer_no_more(scene: &mut HvmDevices<'_>) -> Result<()> {
    let (lab, one) = (scene.lab, scene.one()?);
    for (function, slot) in [(IGB, IGB_SLOT), (EDU, EDU_SLOT), (RTL, RTL_SLOT)] {
        xpci(lab, &format!("pci-detach --force one {function}"))?;
        ensure!(is_held(lab, function)?, "{function}: {}", status(lab)?);
        one.tell(&format!("slot {slot:x}"))?;
        ensure!(one.number("r 0 4")? == u32::MAX, "a detached function answers");
    }
    Ok(())
}

fn all_is_well_at_the_end(scene: &mut HvmDevices<'_>) -> Result<()> {
    no_problems(scene.lab)?;
    ensure!(scene.service.ended().is_none(), "{}", scene.service.output_so_far());
    Ok(())
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
