//! The lab's promises about itself.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use xpci_tests::{GuestConfig, Lab, XenVersion};

const SOON: Duration = Duration::from_secs(60);

#[test]
fn xen_4_17_boots_and_everything_answers() -> Result<()> {
    everything_answers(XenVersion::V4_17)
}

#[test]
fn xen_4_20_boots_and_everything_answers() -> Result<()> {
    everything_answers(XenVersion::V4_20)
}

fn everything_answers(version: XenVersion) -> Result<()> {
    let lab = Lab::builder().xen(version).boot()?;
    let info = lab.dom0("xl info").ok()?;
    let minor = version.name().trim_start_matches("4.");
    assert!(info.lines().any(|l| l.starts_with("xen_minor") && l.ends_with(minor)), "{info}");
    assert!(info.contains("pv_directio"), "{info}");

    let output = lab.dom0("echo out; echo err >&2; exit 7").run()?;
    assert_eq!((output.status(), output.stdout().as_str(), output.stderr().as_str()), (7, "out\n", "err\n"));
    assert_eq!(lab.dom0("kill -9 $$").run()?.status(), 137);
    let late =
        lab.dom0("echo begun; sleep 1000").limit(Duration::from_secs(1)).run().expect_err("it must fail");
    assert!(format!("{late:#}").contains("begun"), "{late:#}");
    let bytes: Vec<u8> = (0..200_000u32).map(|i| ((i * 31) >> 3) as u8).collect();
    lab.push(&bytes, "/tmp/there/file")?;
    assert!(lab.pull("/tmp/there/file")? == bytes);

    let daemon = lab.spawn("sh -c 'echo ready; cat /dev/zero >/dev/null'")?;
    daemon.wait_output("ready", SOON)?;
    daemon.signal(15)?;
    assert_eq!(daemon.wait(SOON)?.signal, Some(15));

    println!("{}", lab.dom0("lspci").ok()?);
    for (driver, pf) in [("igb", "01:00.0"), ("nvme", "03:00.0")] {
        lab.dom0(&format!("modprobe {driver}")).ok()?;
        lab.wait_for("the PF's driver", SOON, &format!("[ -e /sys/bus/pci/drivers/{driver}/0000:{pf} ]"))?;
        lab.dom0(&format!("echo 2 > /sys/bus/pci/devices/0000:{pf}/sriov_numvfs")).ok()?;
        lab.wait_for("its VFs", SOON, &format!("[ -e /sys/bus/pci/devices/0000:{pf}/virtfn1 ]"))?;
    }

    assert!(lab.monitor("info version")?.starts_with("10") || !lab.monitor("info version")?.is_empty());
    assert!(lab.monitor("nonsense").is_err());
    lab.monitor("device_del e0")?;
    lab.wait_event("DEVICE_DELETED", SOON)?;
    lab.wait_for("the removal in dom0", SOON, "[ ! -e /sys/bus/pci/devices/0000:02:00.0 ]")
}

#[test]
fn two_guests_run_commands_and_survive_a_reboot() -> Result<()> {
    let lab = Lab::builder().boot()?;
    let one = lab.guest(&GuestConfig::pv("one"))?;
    let two = lab.guest(&GuestConfig::pv("two"))?;
    let output = one.run("echo out; echo err >&2; exit 5").run()?;
    assert_eq!((output.status(), output.stdout().as_str(), output.stderr().as_str()), (5, "out\n", "err\n"));
    // Kernel messages in between corrupt nothing, and large output is intact.
    let noise = two.spawn("while :; do echo noise >/dev/kmsg; usleep 20000; done")?;
    let begun = std::time::Instant::now();
    let text =
        two.run("for i in $(seq 1500); do echo \"line $i of a long output of fifty KB\"; done").ok()?;
    println!("{} bytes in {:?}", text.len(), begun.elapsed());
    assert_eq!(text.lines().count(), 1500);
    assert!(text.lines().enumerate().all(|(i, l)| l.starts_with(&format!("line {} of", i + 1))));
    drop(noise);
    let begun = std::time::Instant::now();
    assert_eq!(two.run("yes 0123456789abcdef | head -c 100000").ok()?.len(), 100_000);
    println!("100 KB in {:?}; dom0: {}", begun.elapsed(), lab.dom0("top -b -n 1 | head -n 15").ok()?);
    let old = one.domid()?;
    lab.dom0("xl reboot -F one").ok()?;
    assert_ne!(one.wait_rebooted(Duration::from_secs(240))?, old);
    assert_eq!(one.run("echo again").ok()?, "again\n");
    lab.dom0("xl destroy two").ok()?;
    println!("dom0: {}", lab.dom0("top -b -n 1 | head -n 15").ok()?);
    let error = two.run("true").run().expect_err("it must fail");
    assert!(format!("{error:#}").contains("console closed"), "{error:#}");
    Ok(())
}

#[test]
fn a_panic_leaves_logs_and_no_qemu() -> Result<()> {
    let lab = Lab::builder().boot()?;
    let (pid, logs, folder) = (lab.qemu_pid(), lab.logs().to_owned(), lab.folder().to_owned());
    assert!(Path::new(&format!("/proc/{pid}")).exists());
    let panicked = std::thread::spawn(move || {
        let _lab = lab;
        panic!("on purpose");
    });
    assert!(panicked.join().is_err());
    assert!(!Path::new(&format!("/proc/{pid}")).exists(), "QEMU is still there");
    assert!(!folder.exists());
    for (log, text) in
        [("console.log", "Xen version"), ("xl-dmesg.log", "(XEN)"), ("dom0-dmesg.log", "Linux version")]
    {
        assert!(std::fs::read_to_string(logs.join(log))?.contains(text), "{log}");
    }
    Ok(())
}
