//! Errors of functions that guests have, on a real Xen: raised in hardware by QEMU on a virtio-net behind a root port of its own, and
//! by Linux's aer_inject on a VF of the 82576, whose driver recovers.
//!
//! A second guest's VF and the PF exchange packets from beginning to end, and lose none of note.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use xpci_tests::host::errors::{decision, history, raise, wait_for_history};
use xpci_tests::host::state::{keep_running, make_attached, make_held, make_used, no_problems, stop};
use xpci_tests::host::{
    PF, SERVICE, SOON, VFS, bring_up, guests, inject_error, is_held, owner, ping, prepare, set_mac,
    start_service, state, status, wait_for_state, xpci, xpci_fails,
};
use xpci_tests::scenes::{Check, Machine, Scene};
use xpci_tests::{Guest, GuestConfig, Lab, Process, checks};

use crate::machines::HOST;

/// The virtio-net that reports errors.
const VIRTIO: &str = "0000:02:00.0";
/// Uncorrectable Error Status: Completion Timeout.
const COMPLETION_TIMEOUT: u32 = 1 << 14;
/// Where a policy of the test lies.
const POLICY: &str = "/etc/xpci/policies/errors.yaml";
const TRACING: &str = "/sys/kernel/tracing/instances";
/// How long guests may take for an answer here, in seconds.
const ANSWER: u64 = 3;

pub struct Errors<'a> {
    lab: &'a Lab,
    service: Process,
    one: Guest<'a>,
    two: Guest<'a>,
    _follower: Process,
}

impl<'a> Scene<'a> for Errors<'a> {
    const NAME: &'static str = "errors";
    const MACHINE: &'static Machine = &HOST;

    fn set_up(lab: &'a Lab) -> Result<Self> {
        let service = prepare(lab)?;
        lab.dom0("modprobe aer_inject").ok()?;
        xpci(lab, &format!("vf create {PF} 3"))?;
        for (index, mac) in ["52:54:00:aa:bb:01", "52:54:00:aa:bb:02"].iter().enumerate() {
            set_mac(lab, index, mac)?;
        }
        xpci(lab, &format!("pci-assignable-add {} {} {VIRTIO}", VFS[0], VFS[1]))?;
        let [one, two] = guests(lab, ["one", "two"])?;
        xpci(lab, "pci-attach one 01:10.0@0")?;
        xpci(lab, "pci-attach two 01:10.2@0")?;
        bring_up(&one, "10.9.9.11")?;
        bring_up(&two, "10.9.9.12")?;
        policy(lab, "")?;
        let _follower = lab.spawn("xpci events --follow --json")?;
        lab.dom0("sh -c 'ping -i 0.5 -q 10.9.9.12 > /run/pings 2>&1 & echo $! > /run/pings.pid'").ok()?;
        Ok(Self { lab, service, one, two, _follower })
    }

    fn checks() -> Vec<Check<Self>> {
        checks![
            a_guest_that_is_told_asks_for_a_reset_and_recovers,
            a_silent_guest_is_contained_in_time,
            a_quarantined_vf_comes_back_only_when_it_is_cleared needs a_silent_guest_is_contained_in_time,
            a_guest_that_knows_nothing_of_errors_loses_its_function,
            reset_leaves_the_guest_its_function,
            unplug_takes_the_function_from_its_guest,
            log_leaves_the_function_alone,
            pause_guest_pauses_it,
            destroy_guest_destroys_it_and_its_function_is_held_again,
            correctable_errors_in_masses_are_masked_and_summed_up,
            a_fatal_error_quarantines_what_the_guest_had,
            an_error_while_the_service_is_dead_is_found_by_its_successor,
            the_second_guest_and_the_pf_never_noticed,
            the_service_knows_of_no_problem,
            a_stopped_service_leaves_no_tracing_instance,
        ]
    }

    fn restore(&mut self) -> Result<()> {
        let lab = self.lab;
        keep_running(lab, &mut self.service)?;
        policy(lab, "")?;
        lab.dom0("! xl list one | grep -qE ' --p--- ' || xl unpause one").ok()?;
        make_held(lab, VIRTIO)?;
        make_used(lab, &self.one, VFS[0], "10.9.9.11")?;
        ping(&self.one, "10.9.9.1")
    }
}

fn an_error_while_the_service_is_dead_is_found_by_its_successor(scene: &mut Errors<'_>) -> Result<()> {
    let lab = scene.lab;
    scene.service.signal(9)?;
    scene.service.wait(SOON)?;
    inject_error(lab, VFS[0], 0, 1 << 6)?;
    scene.service = start_service(lab)?;
    wait_for_history(lab, VFS[0], "correctable error of .* Bad TLP; log", 1)?;
    ping(&scene.one, "10.9.9.1")
}

fn the_second_guest_and_the_pf_never_noticed(scene: &mut Errors<'_>) -> Result<()> {
    let (lab, two) = (scene.lab, &scene.two);
    ping(two, "10.9.9.1")?;
    let pings =
        lab.dom0("pid=$(cat /run/pings.pid); kill -INT $pid; while [ -e /proc/$pid ]; do usleep 100000; done; cat /run/pings");
    let pings = pings.ok()?;
    let (sent, received) = counted(&pings).with_context(|| pings.clone())?;
    ensure!(sent > 30 && received + 3 >= sent, "{pings}");
    ensure!(state(lab, VFS[1])? == "attached", "{}", status(lab)?);
    ensure!(!two.run("dmesg").ok()?.contains("pciback not responding"), "the second guest noticed");
    Ok(())
}

fn the_service_knows_of_no_problem(scene: &mut Errors<'_>) -> Result<()> {
    no_problems(scene.lab)
}

fn a_stopped_service_leaves_no_tracing_instance(scene: &mut Errors<'_>) -> Result<()> {
    stop(&scene.service)?;
    scene
        .lab
        .dom0(&format!("[ -d {TRACING} ] && [ ! -e {TRACING}/xpci ]"))
        .ok()
        .context("the tracing instance stays")
        .map(drop)
}

/// Puts a policy about errors in force.
fn policy(lab: &Lab, wishes: &str) -> Result<()> {
    let text = format!("errors: {{answer-seconds: {ANSWER}{wishes}}}\n");
    lab.push(text.as_bytes(), POLICY)?;
    xpci(lab, "policy reload").map(drop)
}

fn counted(pings: &str) -> Option<(u32, u32)> {
    let line = pings.lines().find(|line| line.contains("packets transmitted"))?;
    let mut numbers = line.split(", ").filter_map(|part| part.split(' ').next()?.parse().ok());
    Some((numbers.next()?, numbers.next()?))
}

fn links_up(guest: &Guest<'_>) -> Result<usize> {
    Ok(guest.run("dmesg").ok()?.matches("Link is Up").count())
}

fn a_guest_that_is_told_asks_for_a_reset_and_recovers(scene: &mut Errors<'_>) -> Result<()> {
    let (lab, one) = (scene.lab, &scene.one);
    let before = links_up(one)?;
    inject_error(lab, VFS[0], COMPLETION_TIMEOUT, 0)?;
    wait_for_history(lab, VFS[0], "has recovered", 1)?;
    let decision = decision(lab, VFS[0])?;
    ensure!(
        decision["action"] == "tell-guest" && decision["errors"][0] == "Completion Timeout",
        "{decision}"
    );
    ensure!(decision["domain"] == one.domid()? && decision["detection"] == "event", "{decision}");
    let registers = history(lab, VFS[0])?.into_iter().find(|event| event["event"] == "registers");
    let registers = registers.context("no registers")?["registers"].clone();
    ensure!(registers.to_string().contains("Uncorrectable Error Severity"), "{registers}");
    // igbvf stopped, was reset, and began again.
    one.wait_for(
        "its driver to begin again",
        SOON,
        &format!("[ $(dmesg | grep -c 'Link is Up') -gt {before} ]"),
    )?;
    ping(one, "10.9.9.1")?;
    ensure!(state(lab, VFS[0])? == "attached", "{}", status(lab)?);
    ensure!(
        one.run("setpci -s 00:00.0 4.w").ok()?.trim().ends_with(['4', '6', '7']),
        "bus mastering is on again"
    );
    Ok(())
}

fn a_silent_guest_is_contained_in_time(scene: &mut Errors<'_>) -> Result<()> {
    let lab = scene.lab;
    lab.dom0("xl pause one").ok()?;
    let begun = Instant::now();
    inject_error(lab, VFS[0], COMPLETION_TIMEOUT, 0)?;
    // Bus mastering goes first.
    lab.wait_for("its DMA to be off", SOON, &format!("[ $(( 0x$(setpci -s {} 4.w) & 4 )) = 0 ]", VFS[0]))?;
    let took = begun.elapsed();
    println!("DMA of a silent guest's VF is off after {took:?}, {ANSWER} s of which it had to answer");
    ensure!(took < Duration::from_secs(ANSWER + 15), "{took:?}");
    wait_for_history(lab, VFS[0], "did not answer in time; quarantine", 1)?;
    wait_for_state(lab, VFS[0], "quarantined")?;
    ensure!(is_held(lab, VFS[0])?, "{}", owner(lab, VFS[0])?);
    lab.dom0("xl unpause one").ok().map(drop)
}

fn a_quarantined_vf_comes_back_only_when_it_is_cleared(scene: &mut Errors<'_>) -> Result<()> {
    let (lab, one) = (scene.lab, &scene.one);
    let (exit, said) = xpci_fails(lab, "pci-attach one 01:10.0@0")?;
    ensure!(exit == 5 && said.contains("quarantine clear"), "{exit}: {said}");
    one.run("modprobe -r igbvf").ok()?;
    xpci(lab, "quarantine clear 01:10.0")?;
    xpci(lab, "pci-attach one 01:10.0@0")?;
    bring_up(one, "10.9.9.11")?;
    ping(one, "10.9.9.1")
}

/// Attaches the virtio-net, raises a non-fatal error in hardware, and returns the decision.
fn hardware_error(lab: &Lab, wishes: &str, error: &str) -> Result<Value> {
    policy(lab, wishes)?;
    if state(lab, VIRTIO)? == "quarantined" {
        xpci(lab, &format!("quarantine clear {VIRTIO}"))?;
    }
    if state(lab, VIRTIO)? == "held" {
        xpci(lab, &format!("pci-attach one {VIRTIO}@1"))?;
    }
    raise(lab, "e0", VIRTIO, error)
}

fn a_guest_that_knows_nothing_of_errors_loses_its_function(scene: &mut Errors<'_>) -> Result<()> {
    let (lab, one) = (scene.lab, &scene.one);
    // Linux's virtio-pci knows nothing of errors; the function is attached to no guest here, which is equivalent.
    let told = hardware_error(lab, "", "COMP_TIME")?;
    ensure!(told["action"] == "tell-guest" && told["severity"] == "non-fatal", "{told}");
    wait_for_history(lab, VIRTIO, "has no error handlers, or there is no driver; quarantine", 1)?;
    wait_for_state(lab, VIRTIO, "quarantined")?;
    ensure!(is_held(lab, VIRTIO)?, "{}", owner(lab, VIRTIO)?);
    let command = lab.dom0(&format!("setpci -s {VIRTIO} 4.w")).ok()?;
    ensure!(u16::from_str_radix(command.trim(), 16)? & 4 == 0, "bus mastering: {command}");
    one.wait_for("its going", SOON, "[ ! -e /sys/bus/pci/devices/0000:00:01.0 ]")
}

fn reset_leaves_the_guest_its_function(scene: &mut Errors<'_>) -> Result<()> {
    let (lab, one) = (scene.lab, &scene.one);
    let reset = hardware_error(lab, ", non-fatal: reset", "COMP_TIME")?;
    ensure!(reset["action"] == "reset", "{reset}");
    wait_for_history(lab, VIRTIO, "it was reset; its guest keeps it", 1)?;
    ensure!(state(lab, VIRTIO)? == "attached", "{}", status(lab)?);
    ensure!(one.run("setpci -s 00:01.0 0.l").ok()?.trim() == "10411af4", "the guest has it");
    Ok(())
}

fn unplug_takes_the_function_from_its_guest(scene: &mut Errors<'_>) -> Result<()> {
    let (lab, one) = (scene.lab, &scene.one);
    let unplugged = hardware_error(lab, ", non-fatal: unplug", "COMP_TIME")?;
    ensure!(unplugged["action"] == "unplug", "{unplugged}");
    wait_for_state(lab, VIRTIO, "held")?;
    one.wait_for("its going", SOON, "[ ! -e /sys/bus/pci/devices/0000:00:01.0 ]")
}

fn log_leaves_the_function_alone(scene: &mut Errors<'_>) -> Result<()> {
    let lab = scene.lab;
    let logged = hardware_error(lab, ", non-fatal: log", "COMP_TIME")?;
    ensure!(logged["action"] == "log" && state(lab, VIRTIO)? == "attached", "{logged}");
    Ok(())
}

fn pause_guest_pauses_it(scene: &mut Errors<'_>) -> Result<()> {
    let (lab, one) = (scene.lab, &scene.one);
    let paused = hardware_error(lab, ", non-fatal: pause-guest", "COMP_TIME")?;
    ensure!(paused["action"] == "pause-guest", "{paused}");
    lab.wait_for("the guest to be paused", SOON, "xl list one | grep -qE ' --p--- '")?;
    ensure!(state(lab, VIRTIO)? == "attached", "{}", status(lab)?);
    lab.dom0("xl unpause one").ok()?;
    ping(one, "10.9.9.1")
}

fn destroy_guest_destroys_it_and_its_function_is_held_again(scene: &mut Errors<'_>) -> Result<()> {
    let lab = scene.lab;
    // Another guest: the first one is needed.
    let doomed = lab.guest(&GuestConfig::pv("doomed"))?;
    policy(lab, "")?;
    make_held(lab, VIRTIO)?;
    xpci(lab, &format!("pci-attach doomed {VIRTIO}@1"))?;
    doomed.wait_for("the function", SOON, "[ -e /sys/bus/pci/devices/0000:00:01.0 ]")?;
    let nodes = format!("/local/domain/{}", doomed.domid()?);
    let destroyed = hardware_error(lab, ", non-fatal: destroy-guest", "COMP_TIME")?;
    ensure!(destroyed["action"] == "destroy-guest", "{destroyed}");
    lab.wait_for("the guest to be gone", SOON, &format!("! xl list doomed && ! xenstore-read {nodes}"))?;
    wait_for_state(lab, VIRTIO, "held")?;
    ensure!(is_held(lab, VIRTIO)?, "{}", owner(lab, VIRTIO)?);
    Ok(())
}

/// CPU time of the service so far, in ticks of 10 ms.
fn ticks(lab: &Lab) -> Result<u64> {
    let stat = lab.dom0(&format!("cat /proc/{SERVICE}/stat")).ok()?;
    ensure!(stat.contains("(xpcid)"), "no process of xpcid: {stat}");
    let fields: Vec<u64> = stat.split_whitespace().filter_map(|field| field.parse().ok()).collect();
    // Without the program's name and the state, the thirteenth and fourteenth field are the 11th and 12th number.
    Ok(fields.get(11).context("no user time")? + fields.get(12).context("no system time")?)
}

fn correctable_errors_in_masses_are_masked_and_summed_up(scene: &mut Errors<'_>) -> Result<()> {
    const ERRORS: u32 = 10_000;
    let lab = scene.lab;
    policy(lab, ", mask-seconds: 5")?;
    make_attached(lab, &scene.one, VIRTIO, Some(1))?;
    let mask = || -> Result<u32> {
        let text = lab.dom0(&format!("setpci -s {VIRTIO} ECAP_AER+14.l")).ok()?;
        Ok(u32::from_str_radix(text.trim(), 16)?)
    };
    let (before, ticks_before) = (mask()?, ticks(lab)?);
    let lines = |lab: &Lab| -> Result<u32> {
        Ok(lab.dom0("wc -l < /var/lib/xpci/errors.jsonl").ok()?.trim().parse()?)
    };
    let lines_before = lines(lab)?;
    let begun = Instant::now();
    for _ in 0..ERRORS {
        lab.monitor("pcie_aer_inject_error -c e0 0x1")?;
    }
    let took = begun.elapsed();
    wait_for_history(lab, VIRTIO, "correctable errors are masked at", 1)?;
    let (ticks, lines) = (ticks(lab)? - ticks_before, lines(lab)? - lines_before);
    println!(
        "{ERRORS} correctable errors in {took:?}: {lines} lines of the audit log, {} ms of CPU",
        ticks * 10
    );
    // One line for each second, and one for each masking and unmasking.
    ensure!(u64::from(lines) < 20 + 3 * took.as_secs(), "{lines} lines in {took:?}");
    ensure!(ticks * 10 < 2000 + took.as_millis() as u64 / 2, "{ticks} ticks in {took:?}");
    lab.wait_for(
        "correctable errors to be heard again",
        SOON,
        &format!("[ $((0x$(setpci -s {VIRTIO} ECAP_AER+14.l))) = {before} ]"),
    )?;
    ensure!(state(lab, VIRTIO)? == "attached", "{}", status(lab)?);
    Ok(())
}

/// The kernel resets the link, which does not succeed here; the guest's function is quarantined during that.
fn a_fatal_error_quarantines_what_the_guest_had(scene: &mut Errors<'_>) -> Result<()> {
    let (lab, one) = (scene.lab, &scene.one);
    let fatal = hardware_error(lab, "", "DLP")?;
    ensure!(fatal["severity"] == "fatal" && fatal["action"] == "quarantine", "{fatal}");
    wait_for_state(lab, VIRTIO, "quarantined")?;
    one.wait_for("its going", SOON, "[ ! -e /sys/bus/pci/devices/0000:00:01.0 ]")?;
    ping(one, "10.9.9.1")?;
    xpci(lab, &format!("quarantine clear {VIRTIO}"))?;
    ensure!(state(lab, VIRTIO)? == "held", "{}", status(lab)?);
    Ok(())
}
