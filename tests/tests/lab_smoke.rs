//! The lab's promises about itself.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use xpci_tests::host::SOON;
use xpci_tests::scenes::{Check, Machine, Scene};
use xpci_tests::{Guest, GuestConfig, Lab, checks};

use crate::machines::{HOST, REMOVABLE, REMOVABLE_DEVICE};

/// On Xen 4.17; `vf_in_a_guest::newer_xen` asks the same of Xen 4.20.
pub struct LabSmoke<'a> {
    lab: &'a Lab,
    one: Guest<'a>,
    two: Guest<'a>,
}

impl<'a> Scene<'a> for LabSmoke<'a> {
    const NAME: &'static str = "lab_smoke";
    const MACHINE: &'static Machine = &HOST;

    fn set_up(lab: &'a Lab) -> Result<Self> {
        let [one, two] = lab.guests(&["one", "two"].map(GuestConfig::pv))?;
        Ok(Self { lab, one, two })
    }

    fn checks() -> Vec<Check<Self>> {
        checks![
            xen_4_17_tells_its_version_and_passes_devices_through,
            dom0_runs_commands_and_tells_how_they_ended,
            dom0_takes_and_gives_files,
            vfs_appear_in_dom0,
            a_device_is_pulled_out_and_put_back,
            a_guest_runs_commands_and_tells_how_they_ended,
            large_output_is_intact_under_kernel_messages,
            a_guest_is_found_again_after_its_reboot,
            a_guest_that_ends_fails_its_commands,
        ]
    }

    fn restore(&mut self) -> Result<()> {
        self.lab.dom0("true").ok().map(drop)
    }
}

fn xen_4_17_tells_its_version_and_passes_devices_through(scene: &mut LabSmoke<'_>) -> Result<()> {
    version(scene.lab)
}

fn dom0_runs_commands_and_tells_how_they_ended(scene: &mut LabSmoke<'_>) -> Result<()> {
    commands(scene.lab)
}

fn dom0_takes_and_gives_files(scene: &mut LabSmoke<'_>) -> Result<()> {
    files(scene.lab)
}

fn vfs_appear_in_dom0(scene: &mut LabSmoke<'_>) -> Result<()> {
    vfs(scene.lab)
}

fn a_device_is_pulled_out_and_put_back(scene: &mut LabSmoke<'_>) -> Result<()> {
    hotplug(scene.lab)
}

fn a_guest_runs_commands_and_tells_how_they_ended(scene: &mut LabSmoke<'_>) -> Result<()> {
    let output = scene.one.run("echo out; echo err >&2; exit 5").run()?;
    let found = (output.status(), output.stdout(), output.stderr());
    ensure!(found == (5, "out\n".into(), "err\n".into()), "{found:?}");
    Ok(())
}

fn large_output_is_intact_under_kernel_messages(scene: &mut LabSmoke<'_>) -> Result<()> {
    let two = &scene.two;
    let noise = two.spawn("while :; do echo noise >/dev/kmsg; usleep 20000; done")?;
    let text =
        two.run("for i in $(seq 1500); do echo \"line $i of a long output of fifty KB\"; done").ok()?;
    ensure!(text.lines().count() == 1500, "{} lines", text.lines().count());
    let wrong = text.lines().enumerate().find(|(i, line)| !line.starts_with(&format!("line {} of", i + 1)));
    ensure!(wrong.is_none(), "{wrong:?}");
    drop(noise);
    let length = two.run("yes 0123456789abcdef | head -c 100000").ok()?.len();
    ensure!(length == 100_000, "{length} bytes");
    Ok(())
}

fn a_guest_is_found_again_after_its_reboot(scene: &mut LabSmoke<'_>) -> Result<()> {
    let old = scene.one.domid()?;
    scene.lab.dom0("xl reboot -F one").ok()?;
    let new = scene.one.wait_rebooted(Duration::from_secs(240))?;
    ensure!(new != old, "domain {new} as before");
    let said = scene.one.run("echo again").ok()?;
    ensure!(said == "again\n", "{said:?}");
    Ok(())
}

fn a_guest_that_ends_fails_its_commands(scene: &mut LabSmoke<'_>) -> Result<()> {
    scene.lab.dom0("xl destroy two").ok()?;
    let error = scene.two.run("true").run().err().context("a command ran in a guest that is gone")?;
    ensure!(format!("{error:#}").contains("console closed"), "{error:#}");
    Ok(())
}

/// `xl info` shows the Xen that was asked for.
pub fn version(lab: &Lab) -> Result<()> {
    let info = lab.dom0("xl info").ok()?;
    let minor = lab.version().name().trim_start_matches("4.");
    ensure!(info.lines().any(|l| l.starts_with("xen_minor") && l.ends_with(minor)), "{info}");
    ensure!(info.contains("pv_directio"), "{info}");
    Ok(())
}

/// Exit status, signal, limit, and commands in the background.
pub fn commands(lab: &Lab) -> Result<()> {
    let output = lab.dom0("echo out; echo err >&2; exit 7").run()?;
    let found = (output.status(), output.stdout(), output.stderr());
    ensure!(found == (7, "out\n".into(), "err\n".into()), "{found:?}");
    ensure!(lab.dom0("kill -9 $$").run()?.status() == 137, "a signal is 128 and its number");
    let late = lab.dom0("echo begun; sleep 1000").limit(Duration::from_secs(1)).run();
    let late = late.err().context("a limit that has passed must fail")?;
    ensure!(format!("{late:#}").contains("begun"), "{late:#}");
    let daemon = lab.spawn("sh -c 'echo ready; cat /dev/zero >/dev/null'")?;
    daemon.wait_output("ready", SOON)?;
    daemon.signal(15)?;
    let signal = daemon.wait(SOON)?.signal;
    ensure!(signal == Some(15), "{signal:?}");
    Ok(())
}

/// Files get there and back as they are.
pub fn files(lab: &Lab) -> Result<()> {
    let bytes: Vec<u8> = (0..200_000u32).map(|i| ((i * 31) >> 3) as u8).collect();
    lab.push(&bytes, "/tmp/there/file")?;
    ensure!(lab.pull("/tmp/there/file")? == bytes, "a file is not as it was");
    Ok(())
}

/// Of both controllers that have some.
pub fn vfs(lab: &Lab) -> Result<()> {
    for (driver, pf) in [("igb", "01:00.0"), ("nvme", "03:00.0")] {
        lab.dom0(&format!("modprobe {driver}")).ok()?;
        lab.wait_for("the PF's driver", SOON, &format!("[ -e /sys/bus/pci/drivers/{driver}/0000:{pf} ]"))?;
        lab.dom0(&format!("echo 2 > /sys/bus/pci/devices/0000:{pf}/sriov_numvfs")).ok()?;
        lab.wait_for("its VFs", SOON, &format!("[ -e /sys/bus/pci/devices/0000:{pf}/virtfn1 ]"))?;
        lab.dom0(&format!("echo 0 > /sys/bus/pci/devices/0000:{pf}/sriov_numvfs")).ok()?;
    }
    Ok(())
}

/// QEMU's monitor answers and complains; what it pulls out leaves dom0, and comes back.
pub fn hotplug(lab: &Lab) -> Result<()> {
    ensure!(!lab.monitor("info version")?.is_empty(), "QEMU has no version");
    ensure!(lab.monitor("nonsense").is_err(), "QEMU knows nonsense");
    lab.monitor("device_del e2")?;
    lab.wait_event("DEVICE_DELETED", SOON)?;
    lab.wait_for("the removal in dom0", SOON, &format!("[ ! -e /sys/bus/pci/devices/{REMOVABLE} ]"))?;
    lab.monitor(&format!("device_add {REMOVABLE_DEVICE}"))?;
    lab.wait_for("its return to dom0", SOON, &format!("[ -e /sys/bus/pci/devices/{REMOVABLE} ]"))
}

/// A panic while a machine runs ends QEMU and keeps the logs: the last thing that a machine is good for.
pub fn a_panic_leaves_logs_and_no_qemu(lab: Lab) -> Result<()> {
    let (pid, logs, folder) = (lab.qemu_pid(), lab.logs().to_owned(), lab.folder().to_owned());
    ensure!(Path::new(&format!("/proc/{pid}")).exists(), "QEMU does not run");
    let panicked = std::thread::spawn(move || {
        let _lab = lab;
        // Unwinds as a panic does, without its message.
        std::panic::resume_unwind(Box::new("on purpose"));
    });
    ensure!(panicked.join().is_err(), "it did not panic");
    ensure!(!Path::new(&format!("/proc/{pid}")).exists(), "QEMU is still there");
    ensure!(!folder.exists(), "{} is still there", folder.display());
    for (log, text) in
        [("console.log", "Xen version"), ("xl-dmesg.log", "(XEN)"), ("dom0-dmesg.log", "Linux version")]
    {
        let found = std::fs::read_to_string(logs.join(log)).with_context(|| log.to_owned())?;
        ensure!(found.contains(text), "{log} has no {text:?}");
    }
    Ok(())
}
