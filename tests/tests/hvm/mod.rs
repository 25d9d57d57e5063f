//! VFs of the 82576 in HVM guests, served by xpcid's ioreq server beside QEMU, on a real Xen.
//!
//! The guest (`tests/guests`) has no operating system and knows nothing of PCI but the ways to config space; expected values come
//! from the registers' written meaning (`pciback/test-support/src/{oracle,meaning}.rs`), none from the library.

pub mod events;
mod hotplug;
mod interrupts;
mod persist;
mod sweeps;

use anyhow::{Context, Result, ensure};
use xpci_tests::host::state::{keep_running, kill_and_start, make_held, no_problems};
use xpci_tests::host::{
    PF, SOON, VFS, granted, guest, is_held, length_of_xens_log, prepare, set_mac, state, status,
    xens_log_from, xpci, xpci_fails,
};
use xpci_tests::scenes::{Check, Machine, Scene};
use xpci_tests::{BareGuest, Lab, Process, checks};

use crate::machines::{HOST, destroy_guests, without_policies};
use crate::vf::{self, Model};
use events::{events_of_msix_survive_the_service, msix_comes_as_events_where_messages_name_interrupts};
use hotplug::{
    a_device_number_that_qemu_uses_meanwhile_is_refused,
    a_function_from_before_the_guest_ran_is_ejected_likewise,
    a_function_taken_by_force_leaves_no_device_behind,
    a_function_that_came_stays_over_a_killed_service_and_is_ejected,
    a_function_that_came_while_the_guest_ran_works,
    a_guest_that_does_not_eject_a_function_loses_it_after_the_limit,
    a_running_guest_is_notified_of_a_function_and_finds_it, a_running_guest_without_acpi_is_refused,
    a_service_that_is_killed_while_the_guest_is_asked_takes_the_function_at_its_next_start,
    another_one_comes_to_its_place, the_guest_keeps_it_until_it_has_ejected_it,
};
use interrupts::{
    a_masked_function_waits_likewise, a_masked_vector_waits_and_its_pending_bit_shows_that,
    a_vector_stays_masked_over_disabling_and_enabling,
    an_interrupt_that_a_killed_service_did_not_note_is_unmapped_by_the_next,
    the_vfs_mailbox_interrupts_the_guest,
};
use persist::{
    a_guest_that_resets_itself_has_its_persistent_function, the_next_domain_has_its_persistent_function,
};

/// Where the first function goes: device models take the low numbers.
const SLOT: u32 = 0x1f;
/// Where the second one is put.
const SECOND: u32 = 5;
const ECAM: u32 = 0xfe00_0000;
const INTERRUPT_LINE: u32 = 0x3c;
const BAR0: u32 = 0x10;
const BAR3: u32 = 0x1c;
/// The VF's status register in BAR 0: the state of the link, as the PF has it.
const STATUS: u32 = 8;

pub struct Hvm<'a> {
    lab: &'a Lab,
    service: Process,
    one: Option<BareGuest<'a>>,
    writable: Vec<u8>,
    model: Model,
}

impl<'a> Scene<'a> for Hvm<'a> {
    const NAME: &'static str = "hvm";
    const MACHINE: &'static Machine = &HOST;

    fn set_up(lab: &'a Lab) -> Result<Self> {
        // The oracle knows the built-in rules.
        without_policies(lab)?;
        let service = prepare(lab)?;
        xpci(lab, &format!("vf create {PF} 3"))?;
        let writable = vf::writable(lab, VFS[2])?;
        // Without an address the PF's driver refuses its VF what the mailbox asks for.
        set_mac(lab, 0, "52:54:00:aa:bb:01")?;
        xpci(lab, "pci-assignable-add 01:10.0 01:10.2 01:10.4")?;
        let model = Model::new(vf::config(lab, VFS[0])?, writable.clone(), host_placed_nothing(lab)?);
        xpci(lab, "hvm acpi-table /guest/mcfg.bin")?;
        Ok(Self { lab, service, one: None, writable, model })
    }

    fn checks() -> Vec<Check<Self>> {
        checks![
            a_paused_guest_gets_functions_where_qemu_has_no_device,
            a_guest_with_shadow_page_tables_gets_no_function,
            the_firmware_finds_and_places_them_beside_qemus_devices,
            bars_decode_where_they_are_put_and_nowhere_else,
            the_msix_table_is_the_services,
            the_acpi_window_shows_extended_config_space_of_our_functions_alone,
            qemus_functions_answer_in_the_acpi_window_as_at_port_cfc,
            an_hvm_and_a_pv_guest_read_the_same,
            every_access_does_what_the_oracle_says_both_ways,
            the_vfs_mailbox_interrupts_the_guest,
            a_masked_vector_waits_and_its_pending_bit_shows_that needs the_vfs_mailbox_interrupts_the_guest,
            a_masked_function_waits_likewise needs the_vfs_mailbox_interrupts_the_guest,
            a_vector_stays_masked_over_disabling_and_enabling needs the_vfs_mailbox_interrupts_the_guest,
            an_interrupt_that_a_killed_service_did_not_note_is_unmapped_by_the_next needs the_vfs_mailbox_interrupts_the_guest,
            a_guest_that_reads_notices_no_killed_service,
            port_cf8_survives_the_service,
            msix_works_on_under_the_services_successor needs the_vfs_mailbox_interrupts_the_guest,
            msix_comes_as_events_where_messages_name_interrupts,
            events_of_msix_survive_the_service needs msix_comes_as_events_where_messages_name_interrupts,
            the_service_knows_of_no_problem,
            a_running_guest_is_notified_of_a_function_and_finds_it,
            a_function_that_came_while_the_guest_ran_works needs a_running_guest_is_notified_of_a_function_and_finds_it,
            the_guest_keeps_it_until_it_has_ejected_it needs a_function_that_came_while_the_guest_ran_works,
            another_one_comes_to_its_place,
            a_function_from_before_the_guest_ran_is_ejected_likewise,
            a_guest_that_does_not_eject_a_function_loses_it_after_the_limit,
            a_function_taken_by_force_leaves_no_device_behind,
            a_service_that_is_killed_while_the_guest_is_asked_takes_the_function_at_its_next_start,
            a_function_that_came_stays_over_a_killed_service_and_is_ejected,
            a_device_number_that_qemu_uses_meanwhile_is_refused,
            a_running_guest_without_acpi_is_refused,
            a_function_is_reset_when_the_guest_asks_for_it,
            the_function_of_a_destroyed_guest_is_held_again,
            a_paused_guest_loses_what_it_got_and_nothing_remains,
            the_next_domain_has_its_persistent_function,
            a_guest_that_resets_itself_has_its_persistent_function needs the_next_domain_has_its_persistent_function,
            all_is_well_at_the_end,
        ]
    }

    /// A guest like the first one, with both functions and a model of what it begins with.
    fn restore(&mut self) -> Result<()> {
        let lab = self.lab;
        keep_running(lab, &mut self.service)?;
        self.one = None;
        destroy_guests(lab)?;
        // It is attached persistently to no guest when no check had come so far.
        _ = lab.dom0(&format!("xpci pci-detach --persistent {} 01:10.0", persist::UUID)).run()?;
        for vf in VFS {
            make_held(lab, vf)?;
        }
        self.begins_anew()
    }
}

impl<'a> Hvm<'a> {
    /// The guest that most checks are about.
    fn one(&self) -> Result<&BareGuest<'a>> {
        self.one.as_ref().context("the bare guest is gone")
    }

    fn created(&self) -> Result<BareGuest<'a>> {
        BareGuest::create(self.lab, "one", &["acpi_firmware=\"/guest/mcfg.bin\"", "vcpus=2"])
    }

    /// The guest is created, with both functions, and started.
    fn begins_anew(&mut self) -> Result<()> {
        let one = self.created()?;
        xpci(self.lab, "pci-attach one 01:10.0")?;
        xpci(self.lab, "pci-attach one 01:10.2@5")?;
        self.starts(one)
    }

    /// A guest that has its functions is started; the model is that of its first one, as it is after the reset of its attachment.
    fn starts(&mut self, mut one: BareGuest<'a>) -> Result<()> {
        one.start()?;
        self.model =
            Model::new(vf::config(self.lab, VFS[0])?, self.writable.clone(), host_placed_nothing(self.lab)?);
        self.one = Some(one);
        Ok(())
    }
}

fn a_paused_guest_gets_functions_where_qemu_has_no_device(scene: &mut Hvm<'_>) -> Result<()> {
    let lab = scene.lab;
    let one = scene.created()?;
    xpci(lab, "pci-attach one 01:10.0")?;
    let (exit, said) = xpci_fails(lab, "pci-attach one 01:10.2@1")?;
    ensure!(exit == 5 && said.contains("an emulated device"), "{said}");
    let (exit, said) = xpci_fails(lab, "pci-attach one 01:10.2@1f")?;
    ensure!(exit == 5 && said.contains(VFS[0]), "{said}");
    xpci(lab, "pci-attach one 01:10.2@5")?;
    let said = xpci(lab, "sync --dry-run")?;
    ensure!(!said.contains("01:10"), "sync would change something: {said}");
    scene.starts(one)
}

/// Without the refusal it reads a BAR's registers after the function is taken from it.
fn a_guest_with_shadow_page_tables_gets_no_function(scene: &mut Hvm<'_>) -> Result<()> {
    let guest = BareGuest::create(scene.lab, "shadow", &["hap=0"])?;
    let (exit, said) = xpci_fails(scene.lab, "pci-attach shadow 01:10.4")?;
    ensure!(exit == 5 && said.contains("hardware-assisted paging"), "{said}");
    guest.destroy()
}

fn the_firmware_finds_and_places_them_beside_qemus_devices(scene: &mut Hvm<'_>) -> Result<()> {
    let one = scene.one()?;
    for (slot, id) in [(0, 0x1237_8086), (SLOT, 0x10ca_8086), (SECOND, 0x10ca_8086), (9, u32::MAX)] {
        one.tell(&format!("slot {slot:x}"))?;
        ensure!(one.number("r 0 4")? == id, "slot {slot:x} has {}", one.tell("r 0 4")?);
    }
    let placed = placed(one)?;
    let all: std::collections::BTreeSet<u32> = placed.iter().copied().collect();
    ensure!(all.len() == 4, "{placed:x?}");
    Ok(())
}

fn every_access_does_what_the_oracle_says_both_ways(scene: &mut Hvm<'_>) -> Result<()> {
    let one = scene.one.as_ref().context("the bare guest is gone")?;
    one.tell(&format!("ecam {ECAM:x}"))?;
    one.tell(&format!("slot {SLOT:x}"))?;
    sweeps::settle(one, &mut scene.model)?;
    sweeps::all(scene.lab, VFS[0], one, &mut scene.model)
}

fn a_guest_that_reads_notices_no_killed_service(scene: &mut Hvm<'_>) -> Result<()> {
    let one = scene.one.as_ref().context("the bare guest is gone")?;
    one.tell(&format!("slot {SLOT:x}"))?;
    one.tell(&format!("ecam {ECAM:x}"))?;
    for round in 0..3 {
        let reads = one.begin(&["loop 800".to_owned()])?;
        ensure!(reads.come() == 0, "round {round}: over before the service was killed");
        kill_and_start(scene.lab, &mut scene.service)?;
        let differences = reads.answers(SOON * 2)?;
        ensure!(differences == ["0"], "round {round}: {differences:?} reads differed");
        ensure!(one.tell("same")? == "0", "round {round}: both ways differ");
    }
    Ok(())
}

fn port_cf8_survives_the_service(scene: &mut Hvm<'_>) -> Result<()> {
    let one = scene.one.as_ref().context("the bare guest is gone")?;
    one.tell("o cf8 4 8000f8a8")?;
    kill_and_start(scene.lab, &mut scene.service)?;
    ensure!(one.number("i cf8 4")? == 0x8000_f8a8, "port CF8 has {}", one.tell("i cf8 4")?);
    Ok(())
}

fn msix_works_on_under_the_services_successor(scene: &mut Hvm<'_>) -> Result<()> {
    interrupts::set_up(scene.one()?)?;
    kill_and_start(scene.lab, &mut scene.service)?;
    interrupts::again(scene.one()?)
}

fn the_service_knows_of_no_problem(scene: &mut Hvm<'_>) -> Result<()> {
    no_problems(scene.lab)
}

fn the_function_of_a_destroyed_guest_is_held_again(scene: &mut Hvm<'_>) -> Result<()> {
    let lab = scene.lab;
    scene.one.take().context("the bare guest is gone")?.destroy()?;
    let held = format!("xpci pci-assignable-list | grep -q {}", VFS[0]);
    lab.wait_for("the function to be held again", SOON, &held)?;
    ensure!(is_held(lab, VFS[0])? && state(lab, VFS[0])? == "held", "{}", status(lab)?);
    lab.wait_for("the domain's end", SOON, "! xl list one")?;
    nothing_is_kept(lab)
}

/// The service keeps neither notes of its ioreq servers nor images.
fn nothing_is_kept(lab: &Lab) -> Result<()> {
    lab.dom0("[ -z \"$(ls /run/xpci/ioreq-servers)\" ] && [ -z \"$(ls /run/xpci/images)\" ]").ok().map(drop)
}

fn a_paused_guest_loses_what_it_got_and_nothing_remains(scene: &mut Hvm<'_>) -> Result<()> {
    let lab = scene.lab;
    scene.one.take().map_or(Ok(()), BareGuest::destroy)?;
    make_held(lab, VFS[0])?;
    make_held(lab, VFS[1])?;
    let two = BareGuest::create(lab, "two", &[])?;
    xpci(lab, "pci-attach two 01:10.0@7")?;
    xpci(lab, "pci-detach two 01:10.0")?;
    for line in granted(lab, two.domid()?)? {
        let own = line.contains("I/O Memory") || line.contains("Interrupts");
        ensure!(!own || line.ends_with("{ }") || line.ends_with("{}"), "it keeps {line}");
    }
    nothing_is_kept(lab)?;
    two.destroy()
}

fn all_is_well_at_the_end(scene: &mut Hvm<'_>) -> Result<()> {
    ensure!(scene.service.ended().is_none(), "{}", scene.service.output_so_far());
    no_problems(scene.lab)
}

/// The sizes of the BARs: an HVM guest begins without addresses.
fn host_placed_nothing(lab: &Lab) -> Result<[(u64, u64); 2]> {
    Ok(vf::bars(lab, VFS[0])?.map(|(_, size)| (0, size)))
}

/// Where the firmware put BAR 0 and BAR 3 of both functions.
fn placed(one: &BareGuest<'_>) -> Result<Vec<u32>> {
    let mut placed = Vec::new();
    for slot in [SLOT, SECOND] {
        one.tell(&format!("slot {slot:x}"))?;
        for bar in [BAR0, BAR3] {
            let register = one.number(&format!("r {bar:x} 4"))?;
            ensure!(register & 0xf == 0xc && register > 0xe000_0000, "BAR {bar:x} of {slot:x}: {register:x}");
            placed.push(register & !0xf);
        }
    }
    Ok(placed)
}

fn bars_decode_where_they_are_put_and_nowhere_else(scene: &mut Hvm<'_>) -> Result<()> {
    let one = scene.one()?;
    let placed = placed(one)?;
    one.tell(&format!("slot {SLOT:x}"))?;
    let status = |at: u32| one.number(&format!("m {:x} 4", at + STATUS));
    let first = status(placed[0])?;
    // Link up, full duplex, 1000 Mbit/s.
    ensure!(first != u32::MAX && first & 2 != 0, "status {first:x}");
    let elsewhere = 0xf7f0_0000u32;
    one.tell(&format!("w {BAR0:x} 4 {elsewhere:x}"))?;
    ensure!(status(elsewhere)? == first, "{:x} at the new place", status(elsewhere)?);
    ensure!(status(placed[0])? == u32::MAX, "the old place answers");
    // Sizing maps nothing anywhere, and memory of the guest's own is never replaced.
    one.tell("n 1000000 4 12345678")?;
    one.tell(&format!("w {BAR0:x} 4 ffffffff"))?;
    ensure!(status(elsewhere)? == u32::MAX, "a BAR that is sized decodes");
    one.tell(&format!("w {BAR0:x} 4 1000000"))?;
    ensure!(one.number("m 1000000 4")? == 0x1234_5678, "the guest's memory is gone");
    one.tell(&format!("w {BAR0:x} 4 {:x}", placed[0]))?;
    ensure!(status(placed[0])? == first, "after moving back");
    Ok(())
}

/// Masked at first, and it keeps messages. Beside it the function's own registers answer.
fn the_msix_table_is_the_services(scene: &mut Hvm<'_>) -> Result<()> {
    let one = scene.one()?;
    let table = placed(one)?[1];
    one.tell(&format!("slot {SLOT:x}"))?;
    ensure!(one.number(&format!("m {:x} 4", table + 0xc))? == 1, "vector 0 is not masked");
    one.tell(&format!("n {:x} 4 fee00000", table + 0x10))?;
    ensure!(one.number(&format!("m {:x} 4", table + 0x10))? == 0xfee0_0000, "a message is lost");
    let other = one.number(&format!("m {:x} 4", table + 0x1000))?;
    ensure!(other != u32::MAX, "the page behind the table: {other:x}");
    Ok(())
}

/// The window shows our functions as CF8 does, with the capabilities that CF8 cannot reach; of others nothing more than CF8.
fn the_acpi_window_shows_extended_config_space_of_our_functions_alone(scene: &mut Hvm<'_>) -> Result<()> {
    let one = scene.one()?;
    one.tell(&format!("ecam {ECAM:x}"))?;
    for slot in [SLOT, SECOND] {
        one.tell(&format!("slot {slot:x}"))?;
        ensure!(one.tell("same")? == "0", "both ways differ");
        // AER, then ARI.
        ensure!(one.number("e 100 4")? == 0x1501_0001, "{}", one.tell("e 100 4")?);
        ensure!(one.number("e 150 2")? == 0x000e, "{}", one.tell("e 150 4")?);
    }
    one.tell("slot 2")?;
    ensure!(one.number("e 100 4")? == u32::MAX, "{}", one.tell("e 100 4")?);
    Ok(())
}

/// Host bridge, ISA bridge with its functions, Xen's platform device; a register that is written; and device numbers without a device. What
/// the guest has selected by port CF8 stays selected.
fn qemus_functions_answer_in_the_acpi_window_as_at_port_cfc(scene: &mut Hvm<'_>) -> Result<()> {
    let one = scene.one()?;
    one.tell(&format!("ecam {ECAM:x}"))?;
    one.tell("slot 0")?;
    let host_bridge = one.number("r 0 4")?;
    ensure!(host_bridge & 0xffff == 0x8086, "the host bridge is {host_bridge:x} at port CFC");
    for slot in 0..4u32 {
        one.tell(&format!("slot {slot:x}"))?;
        for function in 0..8u32 {
            one.tell(&format!("o cf8 4 {:x}", 0x8000_0000 | slot << 11 | function << 8))?;
            let by_ports = one.number("i cfc 4")?;
            let by_window = one.number(&format!("e {:x} 4", function << 12))?;
            ensure!(by_window == by_ports, "{slot:x}.{function:x}: {by_window:x}, not {by_ports:x}");
            ensure!(one.number("i cfc 4")? == by_ports, "{slot:x}.{function:x} is not selected any more");
        }
    }
    // Interrupt Line is software's to write.
    one.tell("slot 2")?;
    let line = one.number(&format!("r {INTERRUPT_LINE:x} 1"))?;
    one.tell(&format!("f {INTERRUPT_LINE:x} 1 {:x}", line ^ 1))?;
    ensure!(one.number(&format!("r {INTERRUPT_LINE:x} 1"))? == line ^ 1, "a write in the window is lost");
    one.tell(&format!("f {INTERRUPT_LINE:x} 1 {line:x}"))?;
    println!("  nothing is selected in QEMU, where port CFC leads while the guest has selected nothing");
    one.tell("o cf8 4 0")?;
    ensure!(one.number("i cfc 4")? == u32::MAX, "port CFC reaches {}", one.tell("i cfc 4")?);
    Ok(())
}

/// Until it has ended everything reads all ones; then config space is as at first, and nothing is mapped.
fn a_function_is_reset_when_the_guest_asks_for_it(scene: &mut Hvm<'_>) -> Result<()> {
    let (lab, one) = (scene.lab, scene.one()?);
    one.tell(&format!("slot {SLOT:x}"))?;
    let bar = one.number(&format!("r {BAR0:x} 4"))?;
    one.tell("w a8 2 8000")?;
    lab.wait_for("the state after the reset", SOON, "xpci status | grep 01:10.0 | grep -q attached")?;
    let end = std::time::Instant::now() + SOON;
    while one.number("r 0 4")? != 0x10ca_8086 {
        ensure!(std::time::Instant::now() < end, "the reset does not end");
    }
    ensure!(one.number(&format!("r {BAR0:x} 4"))? == 0xc, "BAR 0 {}", one.tell(&format!("r {BAR0:x} 4"))?);
    ensure!(one.number("r 72 2")? & 0x8000 == 0, "MSI-X is enabled");
    ensure!(one.number(&format!("m {:x} 4", (bar & !0xf) + STATUS))? == u32::MAX, "BAR 0 is still mapped");
    one.tell(&format!("w {BAR0:x} 4 {bar:x}"))?;
    ensure!(
        one.number(&format!("m {:x} 4", (bar & !0xf) + STATUS))? != u32::MAX,
        "BAR 0 is not mapped again"
    );
    Ok(())
}

/// Two VFs of one PF under one policy, in an HVM and in a PV guest, are the same byte by byte but for what is each guest's own: where
/// its BARs are, whether it is master of the bus, and the notes of its system on cache lines and interrupt lines.
fn an_hvm_and_a_pv_guest_read_the_same(scene: &mut Hvm<'_>) -> Result<()> {
    let (lab, one) = (scene.lab, scene.one()?);
    one.tell(&format!("ecam {ECAM:x}"))?;
    one.tell(&format!("slot {SECOND:x}"))?;
    let pv = guest(lab, "pv")?;
    xpci(lab, "pci-attach pv 01:10.4")?;
    pv.wait_for("the function", SOON, "[ -e /sys/bus/pci/devices/0000:00:00.0 ]")?;
    let text = pv.run("od -An -v -tx1 /sys/bus/pci/devices/0000:00:00.0/config | tr -d ' \\n'").ok()?;
    let seen_by_pv = bytes(text.trim())?;
    let before = length_of_xens_log(lab)?;
    ensure!(seen_by_pv.len() == 4096, "{} bytes", seen_by_pv.len());
    // Linux in the PV guest sets up Device Control, whose bits are each guest's own or pass.
    one.tell(&format!("w a8 2 {:02x}{:02x}", seen_by_pv[0xa9] & 0x7f, seen_by_pv[0xa8]))?;
    one.tell("edump 4")?;
    let log = xens_log_from(lab, before)?;
    let mark = format!("(d{}) ", one.domid()?);
    let rows = log.lines().filter_map(|line| line.strip_prefix(mark.as_str())).map(str::trim);
    let text: String = rows.filter(|row| row.len() == 64).collect();
    let seen_by_hvm = bytes(&text)?;
    ensure!(seen_by_hvm.len() == 4096, "{} bytes", seen_by_hvm.len());
    let own = |at: usize| matches!(at, 0x04 | 0x0c | 0x10..0x28 | 0x3c);
    let differ: Vec<_> = (0..4096)
        .filter(|at| !own(*at) && seen_by_pv[*at] != seen_by_hvm[*at])
        .map(|at| format!("at {at:#x}: PV {:#04x}, HVM {:#04x}", seen_by_pv[at], seen_by_hvm[at]))
        .collect();
    ensure!(differ.is_empty(), "{}", differ.join("; "));
    xpci(lab, "pci-detach pv 01:10.4")?;
    lab.dom0("xl destroy pv").ok().map(drop)
}

fn bytes(text: &str) -> Result<Vec<u8>> {
    (0..text.len() / 2)
        .map(|at| u8::from_str_radix(&text[2 * at..2 * at + 2], 16).with_context(|| text.to_owned()))
        .collect()
}
