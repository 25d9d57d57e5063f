//! A frontend of our own in a PV guest drives the ring of a VF that a real xpcid serves on a real Xen; every answer is compared
//! with the naive oracle of the library's own tests, over what dom0 reads of the VF. P2, P3, P5, P8, S3.
//!
//! The frontend (`tests/frontend`) knows nothing of PCI. Expected answers come from the registers' written meaning
//! (`pciback/tests/config_space/{oracle,meaning}.rs`), none from the library.

mod accesses;
#[path = "../../../pciback/tests/config_space/meaning.rs"]
#[expect(dead_code, reason = "the composed devices of the library's tests have more registers than this VF")]
mod meaning;
mod nonsense;
#[path = "../../../pciback/tests/config_space/oracle.rs"]
#[expect(dead_code, reason = "the composed devices of the library's tests have more registers than this VF")]
mod oracle;
mod script;
mod vf;

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use xpci_tests::host::{
    PF, SOON, VFS, bring_up, builder, guest, nothing_remains, ping, prepare, set_mac, status, xpci,
};
use xpci_tests::{Guest, Lab, Process};

use nonsense::Scene;
use script::{Frontend, Step};
use vf::Model;

const VF: &str = VFS[0];
/// What the service says when it has reset the VF for its guest.
const RESET: &str = "0000:01:10.0: reset for its guest";

#[test]
fn a_frontend_of_our_own() -> Result<()> {
    let lab = builder().guest_program("frontend").boot()?;
    // The oracle knows the built-in rules.
    lab.dom0("rm -r /usr/share/xpci/policies").ok()?;
    let service = prepare(&lab)?;
    xpci(&lab, &format!("vf create {PF} 3"))?;
    let writable = vf::writable(&lab, VFS[2])?;
    set_mac(&lab, 1, "52:54:00:aa:bb:02")?;
    xpci(&lab, "pci-assignable-add 01:10.0 01:10.2")?;
    let one = guest(&lab, "one")?;
    one.run("modprobe -r xen-pcifront && modprobe xen-gntalloc && modprobe xen-evtchn").ok()?;
    let two = guest(&lab, "two")?;
    xpci(&lab, "pci-attach one 01:10.0")?;
    xpci(&lab, "pci-attach two 01:10.2")?;
    bring_up(&two, "10.9.9.12")?;
    let pf = vf::config(&lab, PF)?;
    let mut model = Model::new(vf::config(&lab, VF)?, writable, vf::bars(&lab, VF)?);

    println!("nonsense in xenstore");
    let begun = Instant::now();
    let scene = Scene { liar: &one, other: &two, service: &service };
    let domain = one.domid()?;
    let console = lab.dom0(&format!("xenstore-read /local/domain/{domain}/console/port")).ok()?;
    nonsense::nodes(&scene, domain, console.trim())?;
    nonsense::states(&scene)?;
    nonsense::pages(&scene)?;
    nonsense::deaths(&scene)?;
    println!("  {:.1} s", begun.elapsed().as_secs_f32());
    model.compare(&lab, VF, "all that nonsense")?;

    println!("every offset at every width");
    let begun = Instant::now();
    accesses::read_all(&one, &mut model, "reads")?;
    accesses::write_all(&lab, VF, &one, &mut model)?;
    accesses::single_bits(&lab, VF, &one, &mut model)?;
    accesses::size_bars(&lab, VF, &one, &mut model)?;
    accesses::invalid(&lab, VF, &one, &mut model)?;
    accesses::read_all(&one, &mut model, "reads after all writes")?;

    println!("interrupts, and a reset that the guest asks for");
    interrupts(&lab, &one)?;
    reset(&lab, &service, &one, &mut model)?;
    accesses::read_all(&one, &mut model, "reads after the reset")?;
    println!("  {:.1} s", begun.elapsed().as_secs_f32());

    println!("nothing of it reached the PF, the other guest or the service");
    let now = vf::config(&lab, PF)?;
    let changed = pf.iter().zip(&now).position(|(before, now)| before != now);
    ensure!(changed.is_none(), "the PF's config space changed at {changed:x?}");
    ping(&two, "10.9.9.1")?;
    ensure!(service.ended().is_none(), "{}", service.output_so_far());
    ensure!(status(&lab)?["problems"].as_array().is_some_and(Vec::is_empty), "{}", status(&lab)?);

    println!("a guest that removes its directory has no device until it is attached again");
    let mut frontend = Frontend::start(&one)?;
    frontend.connect()?;
    frontend.insist("gone .", "ok")?;
    frontend.steps(&[Step::Await(3)])?;
    xpci(&lab, "pci-detach one 01:10.0")?;
    xpci(&lab, "pci-attach one 01:10.0")?;
    frontend.connect()?;
    frontend.insist("r 0 4", "0 10ca8086")?;
    frontend.leave()?;
    xpci(&lab, "pci-detach one 01:10.0")?;
    xpci(&lab, "pci-detach two 01:10.2")?;
    nothing_remains(&lab, &one)
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
fn reset(lab: &Lab, service: &Process, guest: &Guest<'_>, model: &mut Model) -> Result<()> {
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
        let heard = service.output_so_far().matches(RESET).count();
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
        let end = Instant::now() + SOON;
        while service.output_so_far().matches(RESET).count() == heard
            || frontend.tell("r 0 4")? != MEANWHILE[0].2
        {
            ensure!(Instant::now() < end, "the reset does not end");
        }
    }
    ensure!(seen == MEANWHILE.len(), "of the answers during a reset only {seen} were seen");
    frontend.insist("w c 4 22222222\nw 10 4 0\nw a8 2 8000", "0 22222222\n0 0\n0 8000")?;
    let end = Instant::now() + SOON;
    while frontend.tell("r 0 4")? != MEANWHILE[0].2 {
        ensure!(Instant::now() < end, "the reset does not end");
    }
    model.reset(vf::config(lab, VF)?)?;
    frontend.leave()
}
