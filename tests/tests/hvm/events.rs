//! MSI-X of the VF as Linux takes it where Xen offers `XENFEAT_hvm_pirqs`: the bare guest names physical interrupts in its messages, binds
//! them as event channels, and never touches the masks in the table.

use anyhow::{Context, Result, ensure};
use xpci_tests::BareGuest;
use xpci_tests::host::events::{arrives, arrives_again, events, message, offers_pirqs, xen};
use xpci_tests::host::state::kill_and_start;

use super::Hvm;
use super::interrupts::{self, ENABLE_CAUSE, SET_CAUSE, settled_count};

const CONTROL: u32 = 0x72;
const ENABLE: u32 = 0x8000;
const ALL_MASKED: u32 = 0xc000;

/// What the guest has set up.
#[derive(Clone, Copy)]
struct SetUp {
    registers: u32,
    table: u32,
    pirqs: [u32; 2],
}

/// Enables MSI-X in Linux's order: all masked, two messages, not masked as a whole.
fn enable(one: &BareGuest<'_>, set_up: SetUp) -> Result<()> {
    one.tell(&format!("w {CONTROL:x} 2 {ALL_MASKED:x}"))?;
    for (entry, pirq) in [set_up.table, set_up.table + 0x10].into_iter().zip(set_up.pirqs) {
        for (at, value) in [0, 4, 8].into_iter().zip(message(pirq)) {
            one.tell(&format!("n {:x} 4 {value:x}", entry + at))?;
        }
    }
    one.tell(&format!("w {CONTROL:x} 2 {ENABLE:x}")).map(drop)
}

fn bind(one: &BareGuest<'_>, set_up: SetUp) -> Result<[u32; 2]> {
    Ok([xen(one, &format!("bind {:x}", set_up.pirqs[0]))?, xen(one, &format!("bind {:x}", set_up.pirqs[1]))?])
}

/// Has the function send the interrupt of an entry, which comes by its port. Nothing of the service's takes part in that, and QEMU's
/// 82576 now and then sends a second one.
fn comes(one: &BareGuest<'_>, set_up: SetUp, entry: usize, port: u32) -> Result<()> {
    let before = events(one, port)?;
    trigger(one, set_up, entry)?;
    arrives_again(one, port, before)
}

fn trigger(one: &BareGuest<'_>, set_up: SetUp, entry: usize) -> Result<()> {
    one.tell(&format!("n {:x} 4 {:x}", set_up.registers + SET_CAUSE, 1 << entry)).map(drop)
}

/// The VF with its BARs placed and MSI-X disabled, all vectors masked as after a reset, and two free numbers.
fn begin(one: &BareGuest<'_>) -> Result<SetUp> {
    let (registers, table) = interrupts::set_up(one)?;
    one.tell(&format!("w {CONTROL:x} 2 0"))?;
    for entry in [table, table + 0x10] {
        one.tell(&format!("n {:x} 4 1", entry + 0xc))?;
    }
    one.tell(&format!("n {:x} 4 3", registers + ENABLE_CAUSE))?;
    ensure!(offers_pirqs(one)?, "Xen offers no physical interrupts");
    let pirqs = [xen(one, "pirq")?, xen(one, "pirq")?];
    ensure!(pirqs[0] != pirqs[1], "one number twice: {pirqs:x?}");
    Ok(SetUp { registers, table, pirqs })
}

/// Two vectors, masks of event channels, channels that are closed and bound again, MSI-X disabled and enabled again.
pub fn msix_comes_as_events_where_messages_name_interrupts(scene: &mut Hvm<'_>) -> Result<()> {
    two_vectors(scene.one()?)
}

/// The same, of a guest whose VF is at the first place.
pub fn two_vectors(one: &BareGuest<'_>) -> Result<()> {
    let set_up = begin(one)?;
    enable(one, set_up)?;
    let ports = bind(one, set_up)?;
    for (entry, port) in ports.into_iter().enumerate() {
        comes(one, set_up, entry, port).with_context(|| format!("entry {entry}"))?;
    }
    println!("  masked, closed and bound again");
    one.tell(&format!("emask {:x}", ports[0]))?;
    let before = events(one, ports[0])?;
    trigger(one, set_up, 0)?;
    comes(one, set_up, 1, ports[1])?;
    ensure!(events(one, ports[0])? == before, "it comes through its mask");
    xen(one, &format!("eunmask {:x}", ports[0]))?;
    arrives(one, ports[0], before + 1)?;
    for port in ports {
        xen(one, &format!("close {port:x}"))?;
    }
    let ports = bind(one, set_up)?;
    comes(one, set_up, 1, ports[1])?;
    comes(one, set_up, 0, ports[0])?;
    println!("  disabled, and enabled with the numbers the other way round");
    for port in ports {
        xen(one, &format!("close {port:x}"))?;
    }
    one.tell(&format!("w {CONTROL:x} 2 0"))?;
    let turned = SetUp { pirqs: [set_up.pirqs[1], set_up.pirqs[0]], ..set_up };
    enable(one, turned)?;
    let ports = bind(one, turned)?;
    comes(one, turned, 0, ports[0])?;
    comes(one, turned, 1, ports[1])?;
    for port in ports {
        xen(one, &format!("close {port:x}"))?;
    }
    println!("  by vectors again");
    interrupts::set_up(one)?;
    settled_count(one)?;
    interrupts::again(one)
}

/// Killed and started again between any two steps; interrupts that are set up keep working.
pub fn events_of_msix_survive_the_service(scene: &mut Hvm<'_>) -> Result<()> {
    let set_up = begin(scene.one()?)?;
    kill_and_start(scene.lab, &mut scene.service)?;
    enable(scene.one()?, set_up)?;
    kill_and_start(scene.lab, &mut scene.service)?;
    let ports = bind(scene.one()?, set_up)?;
    comes(scene.one()?, set_up, 0, ports[0])?;
    kill_and_start(scene.lab, &mut scene.service)?;
    let one = scene.one()?;
    comes(one, set_up, 0, ports[0])?;
    comes(one, set_up, 1, ports[1])?;
    for port in ports {
        xen(one, &format!("close {port:x}"))?;
    }
    kill_and_start(scene.lab, &mut scene.service)?;
    let one = scene.one()?;
    let ports = bind(one, set_up)?;
    comes(one, set_up, 0, ports[0])?;
    for port in ports {
        xen(one, &format!("close {port:x}"))?;
    }
    one.tell(&format!("w {CONTROL:x} 2 0")).map(drop)
}
