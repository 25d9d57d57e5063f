//! How long an error takes to be contained, and what a storm of errors costs another guest.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use xpci_tests::Lab;

use super::figures::shown;
use super::report::Report;
use super::scene::{Peer, Scene};

const SOON: Duration = Duration::from_secs(60);
/// A virtio-net that reports errors, behind a root port of its own.
const FUNCTION: &str = "0000:03:00.0";
const POLICY: &str = "/etc/xpci/policies/bench.yaml";

/// Measures while no guest has the function.
pub fn measure(lab: &Lab, scene: &Scene<'_>, rounds: usize, report: &mut Report) -> Result<()> {
    lab.dom0(&format!("modprobe aer_inject && xpci pci-assignable-add {FUNCTION}")).ok()?;
    let contained = (0..=rounds).map(|_| containment(lab)).collect::<Result<Vec<f64>>>()?;
    report.note(format!(
        "error to DMA off, ms               {}",
        shown(contained.get(1..).unwrap_or_default(), 0)
    ));
    lab.push(b"errors: {correctable: log, mask-seconds: 1}\n", POLICY)?;
    lab.dom0(&format!("xpci policy reload && xpci pci-attach theirs {FUNCTION}")).ok()?;
    scene.attach(Peer::Ours)?;
    let mut ratios = Vec::new();
    let mut raised = 0;
    for _ in 0..rounds {
        let quiet = scene.reads_per_second(Peer::Ours)?;
        let (stormy, errors) = during_a_storm(lab, || scene.reads_per_second(Peer::Ours))?;
        ratios.push(stormy / quiet);
        raised += errors;
    }
    scene.detach(Peer::Ours)?;
    lab.dom0(&format!("xpci pci-detach theirs {FUNCTION}")).ok()?;
    report.note(format!(
        "config reads during a storm, ratio {}   ({raised} correctable errors of another guest's function)",
        shown(&ratios, 2)
    ));
    Ok(())
}

/// Milliseconds from a non-fatal error to Bus Master Enable reading 0. Looking at it takes a process, some milliseconds here.
fn containment(lab: &Lab) -> Result<f64> {
    lab.push(b"errors: {non-fatal: quarantine}\n", POLICY)?;
    lab.dom0(&format!("xpci policy reload && xpci pci-attach theirs {FUNCTION}")).ok()?;
    // No driver in the guest: what it would switch on is switched on here.
    lab.dom0(&format!("setpci -s {FUNCTION} 4.w=4:4")).ok()?;
    // struct aer_error_inj: bus, device, function, then Uncorrectable Error Status with Completion Timeout.
    let script = format!(
        "bash -c 'printf \"\\x03\\0\\0\\0\\0\\x40\\0\\0\\0\\0\\0\\0\\0\\0\\0\\0\\0\\0\\0\\0\\0\\0\\0\\0\\0\\0\\0\\0\\0\\0\\0\\0\" > /run/error\n\
         a=$EPOCHREALTIME; cat /run/error > /dev/aer_inject || exit\n\
         while [ $((0x$(setpci -s {FUNCTION} 4.w) & 4)) != 0 ]; do :; done\n\
         b=$EPOCHREALTIME; echo $((${{b/./}} - ${{a/./}}))'"
    );
    let microseconds = lab.dom0(&script).ok()?;
    let microseconds: u32 = microseconds.trim().parse().with_context(|| microseconds.clone())?;
    let quarantined = format!("xpci status | grep '^{FUNCTION}' | grep -qE ' quarantined +-'");
    lab.wait_for("quarantine", SOON, &quarantined)?;
    lab.dom0(&format!("xpci quarantine clear {FUNCTION}")).ok()?;
    Ok(f64::from(microseconds) / 1000.0)
}

/// Does something while hardware reports correctable errors as fast as QEMU's monitor lets it, and says how many.
fn during_a_storm<T>(lab: &Lab, action: impl FnOnce() -> Result<T>) -> Result<(T, u64)> {
    let (over, raised) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        let storm = scope.spawn(|| -> Result<()> {
            while !over.load(Ordering::Relaxed) {
                lab.monitor("pcie_aer_inject_error -c e0 0x1")?;
                raised.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        });
        let done = action();
        over.store(true, Ordering::Relaxed);
        let stormed = storm.join();
        ensure!(stormed.is_ok(), "the storm panicked");
        stormed.unwrap_or(Ok(()))?;
        Ok((done?, raised.load(Ordering::Relaxed)))
    })
}
