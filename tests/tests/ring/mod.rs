//! A frontend of our own in a PV guest drives the ring of a VF that a real xpcid serves on a real Xen; every answer is compared
//! with the naive oracle of the library's own tests, over what dom0 reads of the VF.
//!
//! The frontend (`tests/frontend`) knows nothing of PCI. Expected answers come from the registers' written meaning
//! (`pciback/test-support/src/{oracle,meaning}.rs`), none from the library.

mod accesses;
mod nonsense;
mod script;

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use xpci_tests::host::frontend::Step;
use xpci_tests::host::state::{keep_running, make_held, no_problems};
use xpci_tests::host::{PF, SOON, VFS, bring_up, guests, nothing_remains, ping, prepare, set_mac, xpci};
use xpci_tests::scenes::{Check, Machine, Scene};
use xpci_tests::{Guest, Lab, Process, checks};

use crate::machines::{HOST, without_policies};
use crate::vf::{self, Model};
use nonsense::{
    a_page_full_of_nonsense_is_answered_by_what_is_in_it, frontends_that_die_leave_the_function_switched_off,
    nodes_with_nonsense_lead_to_a_line_in_the_log, states_that_do_not_follow_from_one_another_are_survived,
};
use script::Frontend;

const VF: &str = VFS[0];

pub struct Ring<'a> {
    lab: &'a Lab,
    service: Process,
    /// With the frontend of our own.
    one: Guest<'a>,
    /// With Linux's.
    two: Guest<'a>,
    /// Config space of the PF as it was.
    pf: Vec<u8>,
    writable: Vec<u8>,
    model: Model,
}

impl<'a> Scene<'a> for Ring<'a> {
    const NAME: &'static str = "ring";
    const MACHINE: &'static Machine = &HOST;

    fn set_up(lab: &'a Lab) -> Result<Self> {
        // The oracle knows the built-in rules.
        without_policies(lab)?;
        let service = prepare(lab)?;
        xpci(lab, &format!("vf create {PF} 3"))?;
        let writable = vf::writable(lab, VFS[2])?;
        set_mac(lab, 1, "52:54:00:aa:bb:02")?;
        xpci(lab, "pci-assignable-add 01:10.0 01:10.2")?;
        let [one, two] = guests(lab, ["one", "two"])?;
        one.run("modprobe -r xen-pcifront && modprobe xen-gntalloc && modprobe xen-evtchn").ok()?;
        xpci(lab, "pci-attach one 01:10.0")?;
        xpci(lab, "pci-attach two 01:10.2")?;
        bring_up(&two, "10.9.9.12")?;
        let pf = vf::config(lab, PF)?;
        let model = Model::new(vf::config(lab, VF)?, writable.clone(), vf::bars(lab, VF)?);
        Ok(Self { lab, service, one, two, pf, writable, model })
    }

    fn checks() -> Vec<Check<Self>> {
        checks![
            nodes_with_nonsense_lead_to_a_line_in_the_log,
            states_that_do_not_follow_from_one_another_are_survived,
            a_page_full_of_nonsense_is_answered_by_what_is_in_it,
            frontends_that_die_leave_the_function_switched_off,
            every_offset_reads_as_the_oracle_says,
            every_write_at_every_offset_does_what_the_oracle_says,
            single_bits_do_what_the_oracle_says,
            bars_are_sized_in_any_order,
            requests_that_make_no_sense_are_refused,
            msix_is_enabled_and_disabled_by_requests,
            a_function_reads_all_ones_while_it_is_reset_and_as_at_first_afterwards,
            nothing_reached_the_pf_or_the_other_guest,
            a_guest_that_removes_its_directory_has_no_device_until_it_is_attached_again,
            detached_functions_leave_nothing_in_the_guest,
        ]
    }

    /// The VF is attached again, and the oracle starts from its state then.
    fn restore(&mut self) -> Result<()> {
        let lab = self.lab;
        keep_running(lab, &mut self.service)?;
        // A frontend that a check left behind holds the page and the port.
        self.one.run("pidof frontend >/dev/null && kill -9 $(pidof frontend); true").ok()?;
        make_held(lab, VF)?;
        xpci(lab, "pci-attach one 01:10.0")?;
        self.model = Model::new(vf::config(lab, VF)?, self.writable.clone(), vf::bars(lab, VF)?);
        Ok(())
    }
}

impl Ring<'_> {
    /// The service is alive and serves the other guest.
    fn others_are_served(&self) -> Result<()> {
        ensure!(self.service.ended().is_none(), "the service ended: {}", self.service.output_so_far());
        let identity = self.two.run("setpci -s 00:00.0 0.l 4.l >/tmp/read && head -n 1 /tmp/read").ok()?;
        ensure!(identity.trim() == "10ca8086", "the other guest reads {identity}");
        Ok(())
    }

    /// The frontend that has lied starts again and is served.
    fn is_forgiven(&self, frontend: &mut Frontend) -> Result<()> {
        frontend.connect()?;
        frontend.insist(nonsense::IDENTITY, nonsense::VF)?;
        self.others_are_served()
    }
}

fn every_offset_reads_as_the_oracle_says(scene: &mut Ring<'_>) -> Result<()> {
    scene.model.compare(scene.lab, VF, "all that nonsense")?;
    accesses::read_all(&scene.one, &mut scene.model, "reads")
}

fn every_write_at_every_offset_does_what_the_oracle_says(scene: &mut Ring<'_>) -> Result<()> {
    accesses::write_all(scene.lab, VF, &scene.one, &mut scene.model)
}

fn single_bits_do_what_the_oracle_says(scene: &mut Ring<'_>) -> Result<()> {
    accesses::single_bits(scene.lab, VF, &scene.one, &mut scene.model)
}

fn bars_are_sized_in_any_order(scene: &mut Ring<'_>) -> Result<()> {
    accesses::size_bars(scene.lab, VF, &scene.one, &mut scene.model)
}

fn requests_that_make_no_sense_are_refused(scene: &mut Ring<'_>) -> Result<()> {
    accesses::invalid(scene.lab, VF, &scene.one, &mut scene.model)?;
    accesses::read_all(&scene.one, &mut scene.model, "reads after all writes")
}

fn msix_is_enabled_and_disabled_by_requests(scene: &mut Ring<'_>) -> Result<()> {
    interrupts(scene.lab, &scene.one)
}

fn a_function_reads_all_ones_while_it_is_reset_and_as_at_first_afterwards(
    scene: &mut Ring<'_>,
) -> Result<()> {
    reset(scene.lab, &scene.one, &mut scene.model)?;
    accesses::read_all(&scene.one, &mut scene.model, "reads after the reset")
}

fn nothing_reached_the_pf_or_the_other_guest(scene: &mut Ring<'_>) -> Result<()> {
    let now = vf::config(scene.lab, PF)?;
    let changed = scene.pf.iter().zip(&now).position(|(before, now)| before != now);
    ensure!(changed.is_none(), "the PF's config space changed at {changed:x?}");
    ping(&scene.two, "10.9.9.1")?;
    ensure!(scene.service.ended().is_none(), "{}", scene.service.output_so_far());
    no_problems(scene.lab)
}

fn a_guest_that_removes_its_directory_has_no_device_until_it_is_attached_again(
    scene: &mut Ring<'_>,
) -> Result<()> {
    let lab = scene.lab;
    let mut frontend = Frontend::start(&scene.one)?;
    frontend.connect()?;
    frontend.insist("gone .", "ok")?;
    frontend.steps(&[Step::Await(3)])?;
    xpci(lab, "pci-detach one 01:10.0")?;
    xpci(lab, "pci-attach one 01:10.0")?;
    frontend.connect()?;
    frontend.insist("r 0 4", "0 10ca8086")?;
    frontend.leave()
}

fn detached_functions_leave_nothing_in_the_guest(scene: &mut Ring<'_>) -> Result<()> {
    let lab = scene.lab;
    xpci(lab, "pci-detach one 01:10.0")?;
    xpci(lab, "pci-detach two 01:10.2")?;
    nothing_remains(lab, &scene.one)
}

/// MSI-X as requests enable and disable it: what the guest reads of it, and hardware.
fn interrupts(lab: &Lab, guest: &Guest<'_>) -> Result<()> {
    let mut frontend = Frontend::start(guest)?;
    frontend.connect()?;
    for entries in ["0 1 2", "2 0", "1"] {
        let count = entries.split(' ').count();
        let answer = frontend.tell(&format!("op 4 0 0 0 0 0 {count} 0 {entries}\nr 72 2"))?;
        let (enabled, control) = answer.split_once('\n').context("one answer")?;
        let mut vectors: Vec<&str> =
            enabled.strip_prefix("0 0 ").context(answer.clone())?.split(' ').collect();
        vectors.sort_unstable();
        vectors.dedup();
        ensure!(vectors.len() == count && !vectors.contains(&"0"), "vectors of {entries}: {enabled}");
        ensure!(control == "0 8002" && vf::config(lab, VF)?[0x73] & 0x80 != 0, "enabled reads {control}");
    }
    let disabled = frontend.tell("op 5 0 0 0 0 0 0 0\nr 72 2")?;
    ensure!(disabled == "0 0\n0 2" && vf::config(lab, VF)?[0x73] & 0x80 == 0, "disabled: {disabled}");
    frontend.leave()
}

/// Until the reset has ended everything reads all ones and no write arrives; then it is as at first.
fn reset(lab: &Lab, guest: &Guest<'_>, model: &mut Model) -> Result<()> {
    // Order, answer while it is reset, answer after that.
    const MEANWHILE: [(&str, &str, &str); 7] = [
        ("r 0 4", "0 ffffffff", "0 10ca8086"),
        ("w c 4 11111111", "0 11111111", "0 11111111"),
        ("r 34 1", "0 ff", "0 70"),
        ("r 1000 4", "-2 ffffffff", "-2 ffffffff"),
        ("op 5 0 0 0 0 0 0 0", "-5 ffffffff", "0 0"),
        ("op 6 0 0 0 0 0 0 0", "-5 ffffffff", "-4 ffffffff"),
        ("op 0 0 0 1 0 4 0 0", "-1 ffffffff", "-1 ffffffff"),
    ];
    let mut frontend = Frontend::start(guest)?;
    frontend.connect()?;
    let mut seen = 0;
    for _ in 0..5 {
        frontend.insist("w 3c 1 55\nr 3c 1", "0 55\n0 55")?;
        let orders = MEANWHILE.map(|(order, ..)| order).join("\n");
        let answers = frontend.tell(&format!("w a8 2 8000\n{orders}"))?;
        let answers: Vec<&str> = answers.lines().collect();
        ensure!(answers.len() == 8 && answers[0] == "0 8000", "{answers:?}");
        // On a busy host the guest may be asleep while it happens.
        let (mut ended, mut during) = (false, 0);
        for (answer, (order, while_reset, after)) in answers[1..].iter().zip(MEANWHILE) {
            let fits = if !ended && *answer == while_reset { while_reset } else { after };
            ensure!(*answer == fits, "{order}, among {answers:?}");
            ended |= fits != while_reset;
            during += usize::from(!ended);
        }
        seen = seen.max(during);
        end_of_reset(&mut frontend)?;
    }
    ensure!(seen == MEANWHILE.len(), "of the answers during a reset only {seen} were seen");
    frontend.insist("w c 4 22222222\nw 10 4 0\nw 3c 1 55\nw a8 2 8000", "0 22222222\n0 0\n0 55\n0 8000")?;
    end_of_reset(&mut frontend)?;
    model.reset(vf::config(lab, VF)?)?;
    frontend.leave()
}

/// Waits until Interrupt Line, which had been written, reads as at first: the guest may have slept through the reset. The log tells
/// nothing of it, because a guest's share of the log is limited, and this one has had its share.
fn end_of_reset(frontend: &mut Frontend) -> Result<()> {
    let end = Instant::now() + SOON;
    loop {
        let now = frontend.tell("r 3c 1")?;
        if now == "0 0" {
            return Ok(());
        }
        ensure!(Instant::now() < end, "Interrupt Line reads {now} and not 0: the reset does not end");
    }
}
