//! A VF of the 82576 in a stock Linux that is an HVM guest: Debian's own kernel with its igbvf, served by xpcid.

use std::marker::PhantomData;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use xpci_tests::host::state::{keep_running, kill_and_start, make_attached, make_held, no_problems};
use xpci_tests::host::{PF, SOON, VFS, bring_up_at, guest, owner, ping, prepare, set_mac, xpci};
use xpci_tests::scenes::{Check, Machine, Scene};
use xpci_tests::{BareGuest, Guest, GuestConfig, Lab, Process, checks};

/// Through decompression, the firmware's tables and all drivers, under an emulated Xen.
const BOOT_LIMIT: Duration = Duration::from_secs(400);
/// How many interrupts a guest sends itself, in some twenty seconds: more than without the corrections.
const INTERRUPTS: u32 = 200_000;
const INTERRUPTS_LIMIT: Duration = Duration::from_secs(200);
/// Where the VF is in its guest.
const SLOT: u32 = 5;
const FUNCTION: &str = "0000:00:05.0";
const DEVICE: &str = "/sys/bus/pci/devices/0000:00:05.0";
const ADDRESS: &str = "10.9.9.11";
const DOM0: &str = "10.9.9.1";
const MAC: &str = "52:54:00:aa:bb:01";

/// Where the guest runs, and what its xl.cfg has besides.
pub trait Variant {
    const NAME: &'static str;
    const MACHINE: &'static Machine;
    const LINE: Option<&'static str>;
}

pub struct LinuxHvm<'a, V> {
    lab: &'a Lab,
    service: Process,
    linux: Option<Guest<'a>>,
    variant: PhantomData<V>,
}

impl<'a, V: Variant> Scene<'a> for LinuxHvm<'a, V> {
    const NAME: &'static str = V::NAME;
    const MACHINE: &'static Machine = V::MACHINE;

    fn set_up(lab: &'a Lab) -> Result<Self> {
        let service = prepare(lab)?;
        xpci(lab, &format!("vf create {PF} 2"))?;
        set_mac(lab, 0, MAC)?;
        xpci(lab, "pci-assignable-add 01:10.0 01:10.2")?;
        xpci(lab, "hvm acpi-table /guest/mcfg.bin")?;
        Ok(Self { lab, service, linux: None, variant: PhantomData })
    }

    fn checks() -> Vec<Check<Self>> {
        checks![
            a_guest_reads_from_cr2_what_it_wrote,
            a_guest_has_each_interrupt_once_while_the_memory_map_changes,
            a_stock_linux_boots_with_its_vf,
            it_reads_what_a_pv_guest_reads needs a_stock_linux_boots_with_its_vf,
            extended_config_space_is_there_by_the_acpi_table needs a_stock_linux_boots_with_its_vf,
            the_stock_driver_uses_the_vf_with_its_mac_traffic_and_interrupts needs a_stock_linux_boots_with_its_vf,
            a_killed_service_is_not_noticed_under_traffic
                needs the_stock_driver_uses_the_vf_with_its_mac_traffic_and_interrupts,
            a_reset_through_sysfs_leaves_a_usable_vf
                needs the_stock_driver_uses_the_vf_with_its_mac_traffic_and_interrupts,
            another_vf_comes_while_it_runs_is_used_and_let_go_twice
                needs the_stock_driver_uses_the_vf_with_its_mac_traffic_and_interrupts,
            the_service_knows_of_no_problem,
        ]
    }

    /// The guest is booted again by the check that shows it, so only the service and the VF of other guests come back here.
    fn restore(&mut self) -> Result<()> {
        keep_running(self.lab, &mut self.service)?;
        self.lab.dom0("for name in bare pv; do xl domid $name && xl destroy $name; done; true").ok()?;
        make_held(self.lab, VFS[1])
    }
}

impl<'a, V> LinuxHvm<'a, V> {
    fn linux(&self) -> Result<&Guest<'a>> {
        self.linux.as_ref().context("the guest is gone")
    }
}

/// The smallest case of what keeps Linux from booting under QEMU's own emulation, which takes a guest's read of CR2 for one of CR0.
fn a_guest_reads_from_cr2_what_it_wrote<V: Variant>(scene: &mut LinuxHvm<'_, V>) -> Result<()> {
    let mut bare = BareGuest::create(scene.lab, "bare", &[])?;
    bare.start()?;
    let read = bare.number("cr2 12345678")?;
    ensure!(read == 0x1234_5678, "it reads {read:x}");
    bare.destroy()
}

/// What else the emulator must do right: each change of the machine's memory map stops its processors, which then look addresses up anew.
fn a_guest_has_each_interrupt_once_while_the_memory_map_changes<V: Variant>(
    scene: &mut LinuxHvm<'_, V>,
) -> Result<()> {
    const DECODING: &str = "setpci -s 02:00.0 COMMAND";
    let mut bare = BareGuest::create(scene.lab, "bare", &[])?;
    bare.start()?;
    let changes = scene.lab.spawn(&format!("sh -c 'while {DECODING}=2:2 && {DECODING}=0:2; do :; done'"))?;
    let came = bare.begin(&[format!("ipi 41 {INTERRUPTS:x}")])?.answers(INTERRUPTS_LIMIT)?;
    ensure!(changes.ended().is_none(), "{}", changes.output_so_far());
    changes.signal(9)?;
    changes.wait(SOON)?;
    ensure!(came == [format!("{INTERRUPTS:x}")], "{came:?} of {INTERRUPTS:x} came");
    let again = bare.number("twice")?;
    ensure!(again == 0, "{again} were delivered twice");
    bare.destroy()
}

fn a_stock_linux_boots_with_its_vf<V: Variant>(scene: &mut LinuxHvm<'_, V>) -> Result<()> {
    let lab = scene.lab;
    let config = GuestConfig::hvm("linux").line("acpi_firmware=\"/guest/mcfg.bin\"");
    let config = V::LINE.into_iter().fold(config, |config, line| config.line(line));
    let linux = lab.paused_guest(&config)?;
    xpci(lab, &format!("pci-attach linux 01:10.0@{SLOT:x}"))?;
    linux.unpause(BOOT_LIMIT)?;
    ensure!(owner(lab, VFS[0])? == format!("d{}", linux.domid()?), "{}", owner(lab, VFS[0])?);
    let id = linux.run(&format!("cat {DEVICE}/vendor {DEVICE}/device")).ok()?;
    ensure!(id.split_whitespace().eq(["0x8086", "0x10ca"]), "{id}");
    scene.linux = Some(linux);
    Ok(())
}

/// Another VF of the same PF in a PV guest, before any driver has it: lspci says the same of both, but for what is each guest's own.
fn it_reads_what_a_pv_guest_reads<V: Variant>(scene: &mut LinuxHvm<'_, V>) -> Result<()> {
    let lab = scene.lab;
    let pv = guest(lab, "pv")?;
    make_attached(lab, &pv, VFS[1], Some(SLOT))?;
    pv.wait_for("the function", SOON, &format!("[ -e {DEVICE} ]"))?;
    let by_pv = described(&pv, FUNCTION)?;
    let by_hvm = described(scene.linux()?, FUNCTION)?;
    ensure!(by_pv == by_hvm, "PV:\n{}\nHVM:\n{}", by_pv.join("\n"), by_hvm.join("\n"));
    xpci(lab, "pci-detach pv 01:10.2")?;
    lab.dom0("xl destroy pv").ok().map(drop)
}

/// What lspci says of a function, without the places of its BARs and interrupts, and what each system switches on or adds.
fn described(guest: &Guest<'_>, function: &str) -> Result<Vec<String>> {
    const OWN: [&str; 9] = [
        "Control:",
        "Status:",
        "Latency:",
        "Interrupt:",
        "NUMA node:",
        "Region ",
        "Physical Slot:",
        "Kernel ",
        // Which errors are reported: Linux asks its firmware for that.
        "DevCtl:",
    ];
    let text = guest.run(&format!("lspci -vvv -s {function}")).ok()?;
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    Ok(lines.filter(|line| OWN.iter().all(|own| !line.starts_with(own))).map(str::to_owned).collect())
}

fn extended_config_space_is_there_by_the_acpi_table<V: Variant>(scene: &mut LinuxHvm<'_, V>) -> Result<()> {
    let linux = scene.linux()?;
    let size = linux.run(&format!("stat -c %s {DEVICE}/config")).ok()?;
    ensure!(size.trim() == "4096", "{size}");
    // AER, then ARI.
    for (at, header) in [("100", "15010001"), ("150", "0001000e")] {
        let read = linux.run(&format!("setpci -s {FUNCTION} {at}.l")).ok()?;
        ensure!(read.trim().ends_with(&header[4..]), "at {at}: {read}");
    }
    Ok(())
}

fn the_stock_driver_uses_the_vf_with_its_mac_traffic_and_interrupts<V: Variant>(
    scene: &mut LinuxHvm<'_, V>,
) -> Result<()> {
    let linux = scene.linux()?;
    bring_up_at(linux, FUNCTION, ADDRESS)?;
    let mac = linux.run(&format!("cat {DEVICE}/net/*/address")).ok()?;
    ensure!(mac.trim() == MAC, "MAC {mac}");
    ping(linux, DOM0)?;
    scene.lab.dom0(&format!("ping -c 3 -w 20 {ADDRESS}")).limit(SOON).ok()?;
    let before = interrupts(linux)?;
    ping(linux, DOM0)?;
    let after = interrupts(linux)?;
    ensure!(before.len() == 3 && after.iter().sum::<u64>() > before.iter().sum(), "{before:?}, {after:?}");
    Ok(())
}

/// How often each vector of the VF has interrupted the guest, as its kernel counts.
fn interrupts(linux: &Guest<'_>) -> Result<Vec<u64>> {
    let text = linux.run(&format!("grep -w \"$(ls {DEVICE}/net)\" /proc/interrupts")).ok()?;
    let counted = |line: &str| line.split_whitespace().nth(1).and_then(|count| count.parse().ok());
    text.lines().map(|line| counted(line).with_context(|| text.clone())).collect()
}

fn a_killed_service_is_not_noticed_under_traffic<V: Variant>(scene: &mut LinuxHvm<'_, V>) -> Result<()> {
    let traffic = scene.linux()?.spawn(&format!("exec ping -i 0.2 {DOM0}"))?;
    for round in 0..3 {
        kill_and_start(scene.lab, &mut scene.service)?;
        ping(scene.linux()?, DOM0).with_context(|| format!("round {round}"))?;
        ensure!(traffic.ended().is_none(), "round {round}: {}", traffic.output_so_far());
    }
    traffic.signal(2)?;
    traffic.wait(SOON)?;
    // One may have been on its way at the end.
    let said = traffic.output_so_far();
    let answered: Vec<usize> =
        said.split("seq=").skip(1).filter_map(|rest| rest.split(' ').next()?.parse().ok()).collect();
    ensure!(answered.len() > 10 && answered.iter().copied().eq(0..answered.len()), "{said}");
    Ok(())
}

fn a_reset_through_sysfs_leaves_a_usable_vf<V: Variant>(scene: &mut LinuxHvm<'_, V>) -> Result<()> {
    let linux = scene.linux()?;
    linux.run("modprobe -r igbvf").ok()?;
    let method = linux.run(&format!("cat {DEVICE}/reset_method")).ok()?;
    ensure!(method.split_whitespace().next() == Some("flr"), "{method}");
    linux.run(&format!("echo 1 > {DEVICE}/reset")).limit(SOON).ok()?;
    bring_up_at(linux, FUNCTION, ADDRESS)?;
    ping(linux, DOM0)
}

/// Linux's own hotplug driver finds the function, places its BARs, and ejects it when it is asked to; igbvf uses it in between.
fn another_vf_comes_while_it_runs_is_used_and_let_go_twice<V: Variant>(
    scene: &mut LinuxHvm<'_, V>,
) -> Result<()> {
    const FUNCTION: &str = "0000:00:1e.0";
    let (lab, linux) = (scene.lab, scene.linux()?);
    let there = format!("[ -e /sys/bus/pci/devices/{FUNCTION} ]");
    make_held(lab, VFS[1])?;
    set_mac(lab, 1, "52:54:00:aa:bb:02")?;
    for _ in 0..2 {
        xpci(lab, "pci-attach linux 01:10.2@1e")?;
        linux.wait_for("the function", SOON, &there)?;
        bring_up_at(linux, FUNCTION, "10.9.9.12")?;
        ping(linux, &format!("-I $(ls /sys/bus/pci/devices/{FUNCTION}/net) {DOM0}"))?;
        let said = xpci(lab, "pci-detach linux 01:10.2")?;
        ensure!(!said.contains("in time"), "{said}");
        linux.wait_for("the function to be gone", SOON, &format!("! {there}"))?;
    }
    // The VF from before it ran was not disturbed.
    ping(linux, DOM0)
}

fn the_service_knows_of_no_problem<V: Variant>(scene: &mut LinuxHvm<'_, V>) -> Result<()> {
    no_problems(scene.lab)
}
