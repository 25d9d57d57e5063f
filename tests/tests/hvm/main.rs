//! VFs of the 82576 in HVM guests, served by xpcid's ioreq server beside QEMU, on a real Xen: P5, P6, T2, T3.
//!
//! The guest (`tests/guests`) has no operating system and knows nothing of PCI but the ways to config space; expected values come
//! from the registers' written meaning (`pciback/tests/config_space/{oracle,meaning}.rs`), none from the library.

mod interrupts;
#[path = "../../../pciback/tests/config_space/meaning.rs"]
#[expect(dead_code, reason = "the composed devices of the library's tests have more registers than this VF")]
mod meaning;
#[path = "../../../pciback/tests/config_space/oracle.rs"]
#[expect(dead_code, reason = "the composed devices of the library's tests have more registers than this VF")]
mod oracle;
mod persist;
mod sweeps;
#[path = "../ring/vf.rs"]
#[expect(dead_code, reason = "the ring's test has more of it")]
mod vf;

use anyhow::{Context, Result, ensure};
use xpci_tests::host::{
    PF, SOON, VFS, builder, granted, guest, is_held, prepare, set_mac, start_service, state, status, xpci,
    xpci_fails,
};
use xpci_tests::{BareGuest, Lab, unless_lost};

use vf::Model;

/// Where the first function goes: device models take the low numbers.
const SLOT: u32 = 0x1f;
/// Where the second one is put.
const SECOND: u32 = 5;
const ECAM: u32 = 0xfe00_0000;
const BAR0: u32 = 0x10;
const BAR3: u32 = 0x1c;
/// The VF's status register in BAR 0: the state of the link, as the PF has it.
const STATUS: u32 = 8;

#[test]
fn two_functions_in_a_guest() -> Result<()> {
    unless_lost(all)
}

fn all() -> Result<()> {
    let lab = builder().hvm_guests().boot()?;
    // The oracle knows the built-in rules.
    lab.dom0("rm -r /usr/share/xpci/policies").ok()?;
    let mut service = prepare(&lab)?;
    xpci(&lab, &format!("vf create {PF} 3"))?;
    let writable = vf::writable(&lab, VFS[2])?;
    // Without an address the PF's driver refuses its VF what the mailbox asks for.
    set_mac(&lab, 0, "52:54:00:aa:bb:01")?;
    xpci(&lab, "pci-assignable-add 01:10.0 01:10.2 01:10.4")?;
    let mut model = Model::new(vf::config(&lab, VFS[0])?, writable, host_placed_nothing(&lab)?);
    xpci(&lab, "hvm acpi-table /guest/mcfg.bin")?;
    let mut one = BareGuest::create(&lab, "one", &["acpi_firmware=\"/guest/mcfg.bin\"", "vcpus=2"])?;

    println!("a paused guest gets functions, where QEMU has no device");
    xpci(&lab, "pci-attach one 01:10.0")?;
    let (exit, said) = xpci_fails(&lab, "pci-attach one 01:10.2@1")?;
    ensure!(exit == 5 && said.contains("an emulated device"), "{said}");
    let (exit, said) = xpci_fails(&lab, "pci-attach one 01:10.2@1f")?;
    ensure!(exit == 5 && said.contains(VFS[0]), "{said}");
    xpci(&lab, "pci-attach one 01:10.2@5")?;
    let said = xpci(&lab, "sync --dry-run")?;
    ensure!(!said.contains("01:10"), "sync would change something: {said}");
    one.start()?;

    println!("P6: the firmware has found and placed them, beside QEMU's devices");
    for (slot, id) in [(0, 0x1237_8086), (SLOT, 0x10ca_8086), (SECOND, 0x10ca_8086), (9, u32::MAX)] {
        one.tell(&format!("slot {slot:x}"))?;
        ensure!(one.number("r 0 4")? == id, "slot {slot:x} has {}", one.tell("r 0 4")?);
    }
    bars(&lab, &one)?;

    println!("P5: extended config space through the window that ACPI announces");
    extended(&one)?;

    println!("the same filter, whatever kind of guest");
    one.tell(&format!("slot {SECOND:x}"))?;
    same_as_pv(&lab, &one)?;

    println!("every offset at every width, aligned or not, both ways, against the oracle");
    one.tell(&format!("slot {SLOT:x}"))?;
    sweeps::settle(&one, &mut model)?;
    sweeps::all(&lab, VFS[0], &one, &mut model)?;

    println!("MSI-X: the VF's own interrupt, masked and pending");
    interrupts::msix(&lab, &one)?;

    println!("T3: the service is killed three times while the guest reads; it notices nothing");
    one.tell(&format!("slot {SLOT:x}"))?;
    for round in 0..3 {
        let reads = one.begin(&["loop 800".to_owned()])?;
        ensure!(reads.come() == 0, "round {round}: over before the service was killed");
        service.signal(9)?;
        service.wait(SOON)?;
        service = start_service(&lab)?;
        let differences = reads.answers(SOON * 2)?;
        ensure!(differences == ["0"], "round {round}: {differences:?} reads differed");
        ensure!(one.tell("same")? == "0", "round {round}: both ways differ");
    }
    one.tell("o cf8 4 8000f8a8")?;
    service.signal(9)?;
    service.wait(SOON)?;
    service = start_service(&lab)?;
    ensure!(one.number("i cf8 4")? == 0x8000_f8a8, "port CF8 has {}", one.tell("i cf8 4")?);
    interrupts::again(&one)?;
    let found = status(&lab)?;
    ensure!(found["problems"].as_array().is_some_and(Vec::is_empty), "{found}");

    println!("a running guest neither gets nor loses functions unawares");
    let (exit, said) = xpci_fails(&lab, "pci-attach one 01:10.4")?;
    ensure!(exit == 5 && said.contains("xl create -p"), "{said}");
    let (exit, said) = xpci_fails(&lab, "pci-detach one 01:10.2")?;
    ensure!(exit == 5 && said.contains("--force"), "{said}");
    xpci(&lab, "pci-detach --force one 01:10.2")?;
    ensure!(is_held(&lab, VFS[1])?, "{}", status(&lab)?);
    one.tell(&format!("slot {SECOND:x}"))?;
    ensure!(one.number("r 0 4")? == u32::MAX, "a detached function answers");

    println!("P4: a function level reset that the guest asks for");
    reset(&lab, &one)?;

    println!("the guest is destroyed");
    one.destroy()?;
    lab.wait_for(
        "the function to be held again",
        SOON,
        &format!("xpci pci-assignable-list | grep -q {}", VFS[0]),
    )?;
    ensure!(is_held(&lab, VFS[0])? && state(&lab, VFS[0])? == "held", "{}", status(&lab)?);
    lab.wait_for("the domain's end", SOON, "! xl list one")?;
    lab.dom0("[ -z \"$(ls /run/xpci/ioreq-servers)\" ] && [ -z \"$(ls /run/xpci/images)\" ]").ok()?;

    println!("a paused guest loses what it got, and nothing remains in it");
    let two = BareGuest::create(&lab, "two", &[])?;
    xpci(&lab, "pci-attach two 01:10.0@7")?;
    xpci(&lab, "pci-detach two 01:10.0")?;
    for line in granted(&lab, two.domid()?)? {
        let own = line.contains("I/O Memory") || line.contains("Interrupts");
        ensure!(!own || line.ends_with("{ }") || line.ends_with("{}"), "it keeps {line}");
    }
    lab.dom0("[ -z \"$(ls /run/xpci/ioreq-servers)\" ] && [ -z \"$(ls /run/xpci/images)\" ]").ok()?;
    two.destroy()?;

    println!("a guest that has a function for good finds it again in its next domain");
    persist::created_again(&lab)?;
    let found = status(&lab)?;
    ensure!(found["problems"].as_array().is_some_and(Vec::is_empty), "{found}");
    ensure!(service.ended().is_none(), "{}", service.output_so_far());
    Ok(())
}

/// The sizes of the BARs: an HVM guest begins without addresses.
fn host_placed_nothing(lab: &Lab) -> Result<[(u64, u64); 2]> {
    Ok(vf::bars(lab, VFS[0])?.map(|(_, size)| (0, size)))
}

/// Both functions decode where the firmware put them; one that is moved answers at the new place only.
fn bars(lab: &Lab, one: &BareGuest<'_>) -> Result<()> {
    let mut placed = Vec::new();
    for slot in [SLOT, SECOND] {
        one.tell(&format!("slot {slot:x}"))?;
        for bar in [BAR0, BAR3] {
            let register = one.number(&format!("r {bar:x} 4"))?;
            ensure!(register & 0xf == 0xc && register > 0xe000_0000, "BAR {bar:x} of {slot:x}: {register:x}");
            placed.push(register & !0xf);
        }
    }
    let all: std::collections::BTreeSet<u32> = placed.iter().copied().collect();
    ensure!(all.len() == 4, "{placed:x?}");
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
    // The table of MSI-X is the service's: masked at first, and it keeps messages. Beside it the function's own registers answer.
    ensure!(one.number(&format!("m {:x} 4", placed[1] + 0xc))? == 1, "vector 0 is not masked");
    one.tell(&format!("n {:x} 4 fee00000", placed[1] + 0x10))?;
    ensure!(one.number(&format!("m {:x} 4", placed[1] + 0x10))? == 0xfee0_0000, "a message is lost");
    let other = one.number(&format!("m {:x} 4", placed[1] + 0x1000))?;
    ensure!(other != u32::MAX, "the page behind the table: {other:x}");
    let said = lab.dom0("xl debug-keys q; xl dmesg | tail -3").ok()?;
    ensure!(!said.is_empty(), "Xen says nothing");
    Ok(())
}

/// The window shows our functions as CF8 does, with the capabilities that CF8 cannot reach; of others nothing.
fn extended(one: &BareGuest<'_>) -> Result<()> {
    one.tell(&format!("ecam {ECAM:x}"))?;
    for slot in [SLOT, SECOND] {
        one.tell(&format!("slot {slot:x}"))?;
        ensure!(one.tell("same")? == "0", "both ways differ");
        // AER, then ARI.
        ensure!(one.number("e 100 4")? == 0x1501_0001, "{}", one.tell("e 100 4")?);
        ensure!(one.number("e 150 2")? == 0x000e, "{}", one.tell("e 150 4")?);
    }
    one.tell("slot 2")?;
    ensure!(one.number("e 0 4")? == u32::MAX, "a device of QEMU's answers there");
    Ok(())
}

/// Until it has ended everything reads all ones; then config space is as at first, and nothing is mapped.
fn reset(lab: &Lab, one: &BareGuest<'_>) -> Result<()> {
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
fn same_as_pv(lab: &Lab, one: &BareGuest<'_>) -> Result<()> {
    let pv = guest(lab, "pv")?;
    xpci(lab, "pci-attach pv 01:10.4")?;
    pv.wait_for("the function", SOON, "[ -e /sys/bus/pci/devices/0000:00:00.0 ]")?;
    let text = pv.run("od -An -v -tx1 /sys/bus/pci/devices/0000:00:00.0/config | tr -d ' \\n'").ok()?;
    let seen_by_pv = bytes(text.trim())?;
    lab.dom0("xl dmesg -c >/dev/null").ok()?;
    ensure!(seen_by_pv.len() == 4096, "{} bytes", seen_by_pv.len());
    // Linux in the PV guest sets up Device Control, whose bits are each guest's own or pass.
    one.tell(&format!("w a8 2 {:02x}{:02x}", seen_by_pv[0xa9] & 0x7f, seen_by_pv[0xa8]))?;
    one.tell("edump 4")?;
    let log = lab.dom0("xl dmesg").ok()?;
    let rows = log.lines().filter_map(|line| line.strip_prefix("(d1) ")).map(str::trim);
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
