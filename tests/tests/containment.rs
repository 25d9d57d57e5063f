//! What is set on the path of assigned functions, on a real Xen with hardware that QEMU makes: as wanted while one is assigned,
//! whatever its guest writes and whatever happens to the service; as before once the last one has left.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use xpci_tests::host::state::{keep_running, kill_and_start, make_attached, make_held, no_problems};
use xpci_tests::host::{PF, SOON, VFS, guest, prepare, xpci};
use xpci_tests::scenes::{Check, Machine, Scene};
use xpci_tests::{Guest, Lab, Process, checks};

use crate::machines::HOST;

/// The virtio-net with AER, behind a root port of its own.
const VIRTIO: &str = "0000:02:00.0";
/// Poisoned TLP, Completion Timeout, Completer Abort, Unexpected Completion, Unsupported Request, ACS Violation.
const PROVOKABLE: u32 = 1 << 12 | 1 << 14 | 1 << 15 | 1 << 16 | 1 << 20 | 1 << 21;
/// Data Link Protocol Error: damage of the link, which stays fatal.
const LINK: u32 = 1 << 4;

/// Registers by function and name, as setpci reads them.
type Registers = BTreeMap<(String, String), u32>;

pub struct Containment<'a> {
    lab: &'a Lab,
    service: Process,
    one: Guest<'a>,
    port: String,
    igb_port: String,
    /// As they were before anything was assigned.
    untouched: Registers,
}

impl<'a> Scene<'a> for Containment<'a> {
    const NAME: &'static str = "containment";
    const MACHINE: &'static Machine = &HOST;

    /// A firmware that had its own ideas.
    fn set_up(lab: &'a Lab) -> Result<Self> {
        let service = prepare(lab)?;
        xpci(lab, &format!("vf create {PF} 3"))?;
        xpci(lab, &format!("pci-assignable-add {} {} {VIRTIO}", VFS[0], VFS[1]))?;
        let one = guest(lab, "one")?;
        let (port, igb_port) = (root_port(lab, VIRTIO)?, root_port(lab, VFS[0])?);
        lab.dom0(&format!(
            "setpci -s {port} CAP_EXP+1c.w=0007 ECAP_AER+8.l=00100000 ECAP_AER+c.l=00477030 && \
             setpci -s {VIRTIO} CAP_EXP+8.w=0:f ECAP_AER+c.l=00467030"
        ))
        .ok()?;
        let untouched = registers(lab, &[VIRTIO, VFS[0]])?;
        ensure!(of(&untouched, &port, "Root Control")? & 7 == 7, "{untouched:?}");
        Ok(Self { lab, service, one, port, igb_port, untouched })
    }

    fn checks() -> Vec<Check<Self>> {
        checks![
            the_path_of_an_attached_function_is_set,
            what_the_guest_writes_does_not_reach_its_path,
            detaching_puts_the_path_back,
            a_port_of_two_functions_is_put_back_after_the_last_over_crashes_of_the_service,
            a_sibling_that_pci_stub_holds_may_veto_recovery,
            a_sibling_that_xen_pciback_holds_may_not,
            the_service_knows_of_no_problem,
        ]
    }

    fn restore(&mut self) -> Result<()> {
        keep_running(self.lab, &mut self.service)?;
        [VIRTIO, VFS[0], VFS[1]].iter().try_for_each(|function| make_held(self.lab, function))
    }
}

fn the_path_of_an_attached_function_is_set(scene: &mut Containment<'_>) -> Result<()> {
    let lab = scene.lab;
    let said = xpci(lab, &format!("pci-attach one {VIRTIO}@0"))?;
    println!("{said}{}", xpci(lab, &format!("aer status {VIRTIO}"))?);
    let set = registers(lab, &[VIRTIO, VFS[0]])?;
    wanted(&set, &scene.port, true)?;
    wanted(&set, VIRTIO, false)
}

fn what_the_guest_writes_does_not_reach_its_path(scene: &mut Containment<'_>) -> Result<()> {
    let (lab, one) = (scene.lab, &scene.one);
    make_attached(lab, one, VIRTIO, Some(0))?;
    let set = registers(lab, &[VIRTIO, VFS[0]])?;
    one.wait_for("the function", SOON, "[ -e /sys/bus/pci/devices/0000:00:00.0 ]")?;
    guest_writes(lab, one)?;
    let now = registers(lab, &[VIRTIO, VFS[0]])?;
    ensure!(now == set, "before: {set:#x?}, now: {now:#x?}");
    Ok(())
}

fn detaching_puts_the_path_back(scene: &mut Containment<'_>) -> Result<()> {
    make_attached(scene.lab, &scene.one, VIRTIO, Some(0))?;
    xpci(scene.lab, &format!("pci-detach one {VIRTIO}"))?;
    scene.is_untouched()
}

fn a_port_of_two_functions_is_put_back_after_the_last_over_crashes_of_the_service(
    scene: &mut Containment<'_>,
) -> Result<()> {
    let lab = scene.lab;
    xpci(lab, &format!("pci-attach one {}", VFS[0]))?;
    wanted(&registers(lab, &[VFS[0]])?, &scene.igb_port, true)?;
    kill_and_start(lab, &mut scene.service)?;
    println!("{}", xpci(lab, &format!("pci-attach one {}", VFS[1]))?);
    xpci(lab, &format!("pci-detach one {}", VFS[0]))?;
    wanted(&registers(lab, &[VFS[0]])?, &scene.igb_port, true)?;
    kill_and_start(lab, &mut scene.service)?;
    xpci(lab, &format!("pci-detach one {}", VFS[1]))?;
    scene.is_untouched()
}

fn a_sibling_that_pci_stub_holds_may_veto_recovery(scene: &mut Containment<'_>) -> Result<()> {
    let stubbed = blast_radius_with(scene.lab, "pci-stub")?;
    println!("{}", xpci(scene.lab, &format!("blast-radius {}", VFS[0]))?);
    ensure!(addresses(&stubbed["link"]) == [PF, VFS[1], VFS[2]], "{stubbed}");
    ensure!(addresses(&stubbed["vetoes"]) == [VFS[2]], "{stubbed}");
    Ok(())
}

fn a_sibling_that_xen_pciback_holds_may_not(scene: &mut Containment<'_>) -> Result<()> {
    let held = blast_radius_with(scene.lab, "pciback")?;
    ensure!(addresses(&held["link"]) == [PF, VFS[1], VFS[2]], "{held}");
    ensure!(addresses(&held["vetoes"]).is_empty(), "{held}");
    ensure!(addresses(&held["iommu-group"]).is_empty(), "Linux switches ACS on under Xen: {held}");
    Ok(())
}

fn the_service_knows_of_no_problem(scene: &mut Containment<'_>) -> Result<()> {
    ensure!(scene.service.ended().is_none(), "{}", scene.service.output_so_far());
    no_problems(scene.lab)
}

impl Containment<'_> {
    /// The registers are as they were before anything was assigned.
    fn is_untouched(&self) -> Result<()> {
        let now = registers(self.lab, &[VIRTIO, VFS[0]])?;
        ensure!(now == self.untouched, "before: {:#x?}, now: {now:#x?}", self.untouched);
        Ok(())
    }
}

fn json(lab: &Lab, arguments: &str) -> Result<Value> {
    let text = xpci(lab, &format!("{arguments} --json"))?;
    let envelope: Value = serde_json::from_str(&text).with_context(|| text.clone())?;
    Ok(envelope["result"].clone())
}

/// The members of a function's path, from the root port down.
fn members(lab: &Lab, address: &str) -> Result<Vec<Value>> {
    let status = json(lab, &format!("aer status {address}"))?;
    let path = &status["functions"][0];
    ensure!(path["aer-owner"] == "linux", "the lab's platform grants AER to Linux: {path}");
    Ok(path["members"].as_array().context("no members")?.clone())
}

fn root_port(lab: &Lab, address: &str) -> Result<String> {
    Ok(members(lab, address)?[0]["address"].as_str().context("no address")?.to_owned())
}

/// What is decided about on the paths of these functions, read by setpci. Of Command, what is not decided changes with use.
fn registers(lab: &Lab, functions: &[&str]) -> Result<Registers> {
    let mut found = Registers::new();
    for function in functions {
        for member in members(lab, function)? {
            let address = member["address"].as_str().context("no address")?;
            for register in member["registers"].as_array().context("no registers")? {
                let name = register["name"].as_str().context("no name")?.to_owned();
                let width = if register["width"] == 2 { "w" } else { "l" };
                let at = register["offset"].as_u64().context("no offset")?;
                let text = lab.dom0(&format!("setpci -s {address} {at:x}.{width}")).ok()?;
                let value = u32::from_str_radix(text.trim(), 16).with_context(|| text.clone())?;
                let value = if name == "Command" { value & 0x0140 } else { value };
                found.insert((address.to_owned(), name), value);
            }
        }
    }
    Ok(found)
}

fn of(registers: &Registers, address: &str, name: &str) -> Result<u32> {
    let found = registers.get(&(address.to_owned(), name.to_owned()));
    found.copied().with_context(|| format!("{name} of {address} is not among {registers:?}"))
}

/// What is promised of a port, or of a function that is none.
fn wanted(registers: &Registers, address: &str, is_port: bool) -> Result<()> {
    let of = |name| of(registers, address, name);
    let severity = of("Uncorrectable Error Severity")?;
    ensure!(severity & PROVOKABLE == 0 && severity & LINK != 0, "severity of {address}: {severity:#x}");
    let masks = (of("Uncorrectable Error Mask")? & PROVOKABLE, of("Correctable Error Mask")? & 1 << 13);
    ensure!(masks == (0, 0), "masks of {address}: {masks:x?}");
    ensure!(of("Command")? & 0x100 != 0, "SERR of {address}");
    ensure!(of("Device Control")? & 0xf == 0xf, "error reporting of {address}");
    if is_port {
        ensure!(of("Bridge Control")? & 2 != 0, "forwarding of {address}");
        ensure!(of("Root Control")? & 7 == 0, "system errors of {address}");
        ensure!(of("Root Error Command")? & 7 == 7, "the interrupts of {address}");
    }
    Ok(())
}

/// The guest tries to switch all of it off, and to make everything fatal.
fn guest_writes(lab: &Lab, guest: &Guest<'_>) -> Result<()> {
    let path = members(lab, VIRTIO)?;
    let function = path.last().context("no members")?;
    for register in function["registers"].as_array().context("no registers")? {
        let (at, width) = (register["offset"].as_u64(), register["width"].as_u64());
        let (at, width) = at.zip(width).context("no place")?;
        for byte in ["\\377", "\\000"] {
            // Decoding stays on, or the guest's kernel might miss it.
            let bytes =
                if register["name"] == "Command" { "\\006\\000" } else { &byte.repeat(width as usize) };
            guest
                .run(&format!(
                    "printf '{bytes}' | dd of=/sys/bus/pci/devices/0000:00:00.0/config bs={width} seek={} conv=notrunc",
                    at / width
                ))
                .ok()?;
        }
    }
    Ok(())
}

/// Who is hit when a VF fails one of whose siblings this driver has.
fn blast_radius_with(lab: &Lab, driver: &str) -> Result<Value> {
    let path = format!("/sys/bus/pci/devices/{}", VFS[2]);
    let bound = lab
        .dom0(&format!(
            "modprobe pci-stub; [ ! -e {path}/driver ] || echo {0} > {path}/driver/unbind; \
             echo {driver} > {path}/driver_override; echo {0} > /sys/bus/pci/drivers_probe; \
             readlink {path}/driver",
            VFS[2]
        ))
        .ok()?;
    ensure!(bound.trim().ends_with(driver), "{bound}");
    json(lab, &format!("blast-radius {}", VFS[0]))
}

fn addresses(view: &Value) -> Vec<String> {
    let sharers = view.as_array().map(Vec::as_slice).unwrap_or_default();
    sharers.iter().filter_map(|sharer| sharer["address"].as_str().map(str::to_owned)).collect()
}
