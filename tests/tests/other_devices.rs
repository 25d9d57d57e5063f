//! Functions of other kinds in a PV guest: an NVMe controller, and virtio-net with MSI-X and without. No device is named in
//! xpci's code; these have real Command bits, other BARs, an I/O or no MSI-X capability, and an interrupt line.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use xpci_tests::host::state::{keep_running, make_held};
use xpci_tests::host::{
    SOON, guest, is_held, map_bar, nothing_remains, owner, start_service, state, xpci, xpci_fails,
};
use xpci_tests::scenes::{Check, Machine, Scene};
use xpci_tests::{Guest, Lab, Process, checks};

use crate::machines::{HOST, WITHOUT_MSIX};

const VIRTIO_MSIX: &str = "0000:02:00.0";
const NVME: &str = "0000:03:00.0";
const VIRTIO_INTX: &str = WITHOUT_MSIX;
/// The NVMe controller is a PF: without a policy it is refused.
const PERMIT: &str = "match: {class: '010802', function: physical}\npermit: physical-function\n";

/// Where its guest sees the NVMe controller.
const IN_GUEST: &str = "0000:00:01.0";
/// The controller's register Version (NVM Express Base Specification, section 3.1.4), in hexadecimal.
const NVME_VERSION: &str = "8";
/// How often it is read.
const READS: usize = 2000;

const FUNCTIONS: [&str; 3] = [VIRTIO_MSIX, NVME, VIRTIO_INTX];

pub struct OtherDevices<'a> {
    lab: &'a Lab,
    service: Process,
    one: Guest<'a>,
    /// The drivers that they came from.
    before: Vec<String>,
    /// The NVMe controller's config space when its first guest got it.
    found: Option<Found>,
}

/// A config space when a guest got the function.
struct Found {
    host: String,
    guest: String,
}

impl Found {
    fn read(scene: &OtherDevices<'_>) -> Result<Self> {
        let one = &scene.one;
        one.wait_for("the NVMe controller", SOON, &format!("[ -e /sys/bus/pci/devices/{IN_GUEST}/config ]"))?;
        Ok(Self { host: scene.lab.dom0(&dump(NVME)).ok()?, guest: one.run(&dump(IN_GUEST)).ok()? })
    }
}

impl<'a> Scene<'a> for OtherDevices<'a> {
    const NAME: &'static str = "other_devices";
    const MACHINE: &'static Machine = &HOST;

    fn set_up(lab: &'a Lab) -> Result<Self> {
        lab.dom0("modprobe xen-pciback && modprobe nvme").ok()?;
        lab.wait_for("the disk in dom0", SOON, "[ -b /dev/nvme0n1 ]")?;
        let service = start_service(lab)?;
        let before = FUNCTIONS.iter().map(|function| driver(lab, function)).collect::<Result<_>>()?;
        let one = guest(lab, "one")?;
        xpci(lab, &format!("pci-assignable-add {VIRTIO_MSIX} {NVME} {VIRTIO_INTX}"))?;
        Ok(Self { lab, service, one, before, found: None })
    }

    fn checks() -> Vec<Check<Self>> {
        checks![
            a_pv_guests_kernel_reads_the_devices_rom_and_the_next_owner_finds_it_off,
            a_pf_is_refused_until_a_policy_permits_it,
            a_guest_drops_what_was_taken_by_force_and_finds_another_function_in_its_place needs a_pf_is_refused_until_a_policy_permits_it,
            three_functions_are_attached_to_one_guest needs a_pf_is_refused_until_a_policy_permits_it,
            nvme_reads_its_disk_by_dma_and_msix needs three_functions_are_attached_to_one_guest,
            a_guest_that_switches_decoding_off_in_a_loop_harms_no_read_of_its_bar needs nvme_reads_its_disk_by_dma_and_msix,
            the_next_owner_finds_the_registers_as_the_first_one_did needs nvme_reads_its_disk_by_dma_and_msix,
            virtio_net_hears_of_its_link_by_msix needs three_functions_are_attached_to_one_guest,
            virtio_net_hears_of_its_link_by_its_interrupt_line needs three_functions_are_attached_to_one_guest,
            detached_functions_leave_nothing_in_the_guest,
            functions_go_back_to_the_drivers_they_came_from,
            a_managed_device_is_used_by_a_guest_and_goes_back_with_its_detach needs functions_go_back_to_the_drivers_they_came_from,
        ]
    }

    fn restore(&mut self) -> Result<()> {
        keep_running(self.lab, &mut self.service)
    }
}

fn a_pf_is_refused_until_a_policy_permits_it(scene: &mut OtherDevices<'_>) -> Result<()> {
    let lab = scene.lab;
    let (exit, said) = xpci_fails(lab, &format!("pci-attach one {NVME}"))?;
    ensure!(
        exit == 5 && said.contains("is a PF") && said.contains("permit: [physical-function]"),
        "{exit}: {said}"
    );
    lab.push(PERMIT.as_bytes(), "/etc/xpci/policies/nvme-pf.yaml")?;
    xpci(lab, "policy reload").map(drop)
}

/// Linux's scan passes over a place where it still has a device.
fn a_guest_drops_what_was_taken_by_force_and_finds_another_function_in_its_place(
    scene: &mut OtherDevices<'_>,
) -> Result<()> {
    let (lab, one) = (scene.lab, &scene.one);
    FUNCTIONS.iter().try_for_each(|function| make_held(lab, function))?;
    xpci(lab, &format!("pci-attach one {VIRTIO_MSIX}@0 {VIRTIO_INTX}@1"))?;
    let identity = |function: &str| {
        format!("cat /sys/bus/pci/devices/{function}/vendor /sys/bus/pci/devices/{function}/device")
    };
    let of = |function: &str| lab.dom0(&identity(function)).ok();
    one.wait_for("the function", SOON, &format!("[ -e /sys/bus/pci/devices/{IN_GUEST}/config ]"))?;
    let first = one.run(&identity(IN_GUEST)).ok()?;
    ensure!(first == of(VIRTIO_INTX)?, "{first}");
    xpci(lab, &format!("pci-detach --force one {VIRTIO_INTX}"))?;
    xpci(lab, &format!("pci-attach one {NVME}@1"))?;
    let second = one.run(&identity(IN_GUEST)).ok()?;
    ensure!(second == of(NVME)?, "the guest has {second} in place of what it had before: {first}");
    xpci(lab, &format!("pci-detach one {NVME}"))?;
    xpci(lab, &format!("pci-detach one {VIRTIO_MSIX}")).map(drop)
}

fn three_functions_are_attached_to_one_guest(scene: &mut OtherDevices<'_>) -> Result<()> {
    let owned = format!("d{}", scene.one.domid()?);
    for (slot, function) in FUNCTIONS.iter().enumerate() {
        xpci(scene.lab, &format!("pci-attach one {function}@{slot}"))?;
        ensure!(owner(scene.lab, function)? == owned, "{}", owner(scene.lab, function)?);
    }
    scene.found = Some(Found::read(scene)?);
    Ok(())
}

fn nvme_reads_its_disk_by_dma_and_msix(scene: &mut OtherDevices<'_>) -> Result<()> {
    let one = &scene.one;
    one.run("modprobe nvme").ok()?;
    one.wait_for("the disk", SOON, "[ -b /dev/nvme0n1 ]")?;
    one.run("dd if=/dev/nvme0n1 of=/dev/null bs=64k count=16").limit(SOON).ok()?;
    ensure!(interrupts(one, "nvme0")? > 0, "the disk sent no interrupt");
    Ok(())
}

/// With decoding off, a read of the BAR would end in an Unsupported Request, which some hosts take for fatal (XSA-120, XSA-126).
fn a_guest_that_switches_decoding_off_in_a_loop_harms_no_read_of_its_bar(
    scene: &mut OtherDevices<'_>,
) -> Result<()> {
    let (lab, one) = (scene.lab, &scene.one);
    one.run("modprobe -r nvme").ok()?;
    let page = map_bar(one, IN_GUEST)?;
    let errors = "dmesg | grep -cE 'AER|MCE|Machine check|NMI'; true";
    let before = lab.dom0(errors).ok()?;
    let switching = one.spawn("while setpci -s 0:1.0 COMMAND=0:2; do :; done")?;
    one.wait_for(
        "decoding to read as off",
        SOON,
        "[ $(($(setpci -s 0:1.0 COMMAND | sed s/^/0x/) & 2)) = 0 ]",
    )?;
    page.write(format!("{NVME_VERSION}\n").repeat(READS).as_bytes())?;
    page.wait_for(SOON, |output| output.lines().count() > READS)?;
    switching.signal(nix::libc::SIGKILL)?;
    page.close_stdin()?;
    let read: BTreeSet<String> = page.output_so_far().lines().skip(1).map(str::to_owned).collect();
    ensure!(read.len() == 1 && !read.contains("ffffffff"), "{read:?}");
    ensure!(lab.dom0(errors).ok()? == before, "dom0's kernel reports errors: {}", lab.dom0("dmesg").ok()?);
    // The driver switches it on again.
    one.run("modprobe nvme").ok()?;
    one.wait_for("the disk", SOON, "[ -b /dev/nvme0n1 ]")
}

/// Prints all bytes of a function's config space in hexadecimal.
fn dump(function: &str) -> String {
    format!("od -A x -t x1 -v /sys/bus/pci/devices/{function}/config")
}

/// A guest writes the complement of what it reads to all registers of the header and of the capabilities.
fn the_next_owner_finds_the_registers_as_the_first_one_did(scene: &mut OtherDevices<'_>) -> Result<()> {
    let (lab, one) = (scene.lab, &scene.one);
    one.run("modprobe -r nvme").ok()?;
    one.run(
        "write() { setpci -s 0:1.0 $1.l=$(printf %x $((0x$(setpci -s 0:1.0 $1.l) ^ 0xffffffff))); }; \
         for offset in $(seq 0 4 60); do write $(printf %x $offset); done; \
         for capability in CAP_EXP+8 CAP_EXP+10 CAP_EXP+28 CAP_EXP+30 CAP_PM+4 CAP_MSIX+0 CAP_MSIX+4; do write $capability; done",
    )
    .limit(SOON)
    .ok()?;
    let changed = one.run(&dump(IN_GUEST)).ok()?;
    let found = scene.found.as_ref().context("the first owner's config space was not read")?;
    ensure!(changed != found.guest, "the guest's writes changed nothing that it can see");
    xpci(lab, &format!("pci-detach one {NVME}"))?;
    xpci(lab, &format!("pci-attach one {NVME}@1"))?;
    let now = Found::read(scene)?;
    ensure!(now.host == found.host, "the host had before:\n{}\nand now:\n{}", found.host, now.host);
    ensure!(
        now.guest == found.guest,
        "the first owner found:\n{}\nthe next one:\n{}",
        found.guest,
        now.guest
    );
    Ok(())
}

fn virtio_net_hears_of_its_link_by_msix(scene: &mut OtherDevices<'_>) -> Result<()> {
    link_changes_are_heard(scene.lab, &scene.one, "e0", 0, "pcifront-msi-x")
}

fn virtio_net_hears_of_its_link_by_its_interrupt_line(scene: &mut OtherDevices<'_>) -> Result<()> {
    link_changes_are_heard(scene.lab, &scene.one, "e1", 2, "xen-pirq")
}

/// Linux in the guest reads the ROM as dom0's Linux did. The guest leaves the ROM's decoder on.
fn a_pv_guests_kernel_reads_the_devices_rom_and_the_next_owner_finds_it_off(
    scene: &mut OtherDevices<'_>,
) -> Result<()> {
    let (lab, one) = (scene.lab, &scene.one);
    let policy = "/etc/xpci/policies/rom.yaml";
    let read = |function: &str| {
        let file = format!("/sys/bus/pci/devices/{function}/rom");
        format!(
            "echo 1 > {file} && cat {file} > /tmp/rom && echo 0 > {file} && wc -c < /tmp/rom && md5sum /tmp/rom"
        )
    };
    let register = |function: &str| format!("setpci -s {function} ROM_ADDRESS.l");
    make_held(lab, VIRTIO_MSIX)?;
    let expected = lab.dom0(&read(VIRTIO_MSIX)).ok()?;
    ensure!(lab.pull("/tmp/rom")?.starts_with(&[0x55, 0xaa]), "the device has no ROM: {expected}");
    let before = lab.dom0(&register(VIRTIO_MSIX)).ok()?;
    lab.push(format!("match: {{address: '{VIRTIO_MSIX}'}}\nrom: device\n").as_bytes(), policy)?;
    xpci(lab, "policy reload")?;
    xpci(lab, &format!("pci-attach one {VIRTIO_MSIX}@0"))?;
    let in_guest = "0000:00:00.0";
    one.wait_for("the ROM", SOON, &format!("[ -e /sys/bus/pci/devices/{in_guest}/rom ]"))?;
    let found = one.run(&read(in_guest)).limit(SOON).ok()?;
    ensure!(found == expected, "the guest read {found}, dom0 {expected}");
    let address = u32::from_str_radix(one.run(&register(in_guest)).ok()?.trim(), 16)?;
    let enabled = format!("{:08x}", address | 1);
    one.run(&format!("{}={enabled}", register(in_guest))).ok()?;
    let hardware = lab.dom0(&register(VIRTIO_MSIX)).ok()?;
    ensure!(hardware.trim() == enabled, "hardware has {hardware}, the guest wrote {enabled}");
    println!("  {} bytes at {address:#x}", found.lines().next().unwrap_or_default());
    xpci(lab, &format!("pci-detach one {VIRTIO_MSIX}"))?;
    let after = lab.dom0(&register(VIRTIO_MSIX)).ok()?;
    ensure!(address != 0 && after == before, "the register was {before} and is {after}");
    lab.dom0(&format!("rm -f {policy}")).ok()?;
    xpci(lab, "policy reload").map(drop)
}

fn detached_functions_leave_nothing_in_the_guest(scene: &mut OtherDevices<'_>) -> Result<()> {
    let lab = scene.lab;
    scene.one.run("modprobe -r nvme").ok()?;
    for function in FUNCTIONS {
        if state(lab, function)? == "attached" {
            xpci(lab, &format!("pci-detach one {function}"))?;
        }
        ensure!(is_held(lab, function)?, "{function}: {}", owner(lab, function)?);
    }
    nothing_remains(lab, &scene.one)
}

fn functions_go_back_to_the_drivers_they_came_from(scene: &mut OtherDevices<'_>) -> Result<()> {
    let lab = scene.lab;
    FUNCTIONS.iter().try_for_each(|function| make_held(lab, function))?;
    xpci(lab, &format!("pci-assignable-remove {VIRTIO_MSIX} {NVME} {VIRTIO_INTX}"))?;
    for (function, before) in FUNCTIONS.iter().zip(&scene.before) {
        let now = driver(lab, function)?;
        ensure!(now == *before, "{function}: {now} instead of {before}");
        ensure!(owner(lab, function)? == "d0", "{}", owner(lab, function)?);
    }
    lab.wait_for("the disk in dom0 again", SOON, "dd if=/dev/nvme0n1 of=/dev/null bs=64k count=1")
}

/// Named as all functions of its device. The stock drivers of the guest and of dom0 read the disk.
fn a_managed_device_is_used_by_a_guest_and_goes_back_with_its_detach(
    scene: &mut OtherDevices<'_>,
) -> Result<()> {
    let (lab, one) = (scene.lab, &scene.one);
    let device = NVME.strip_suffix(".0").unwrap_or(NVME);
    let before = driver(lab, NVME)?;
    xpci(lab, &format!("pci-attach --managed one '{device}.*'"))?;
    one.run("modprobe nvme").ok()?;
    one.wait_for("the disk", SOON, "[ -b /dev/nvme0n1 ]")?;
    one.run("dd if=/dev/nvme0n1 of=/dev/null bs=64k count=1 && modprobe -r nvme").limit(SOON).ok()?;
    xpci(lab, &format!("pci-detach one '{device}.*'"))?;
    lab.wait_for("the disk in dom0 again", SOON, "dd if=/dev/nvme0n1 of=/dev/null bs=64k count=1")?;
    ensure!(driver(lab, NVME)? == before && owner(lab, NVME)? == "d0", "{}", owner(lab, NVME)?);
    nothing_remains(lab, one)
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
    guest.run("modprobe virtio_pci && modprobe virtio_net").ok()?;
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
