//! A machine that does not come up, or goes away, is reported by its cause.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use xpci_tests::{Devices, Lab};

/// Far less than the limits within which a dom0 is awaited.
const AT_ONCE: Duration = Duration::from_secs(150);

#[test]
fn a_device_that_qemu_lacks_is_named() -> Result<()> {
    let error = Lab::builder().devices(Devices::none().device("no-such-device")).boot().err();
    let error = format!("{:#}", error.context("it must not boot")?);
    assert!(error.contains("'no-such-device' is not a valid device model name"), "{error}");
    assert!(error.contains("QEMU ended (exit status: 1)"), "{error}");
    Ok(())
}

#[test]
fn a_dom0_that_panics_is_reported_at_once_with_its_console() -> Result<()> {
    let begun = Instant::now();
    let error = Lab::builder().install("/bin/false", "/init").boot().err();
    let error = format!("{:#}", error.context("it must not boot")?);
    assert!(error.contains("Xen or dom0 crashed ("), "{error}");
    assert!(error.contains("Kernel panic - not syncing: Attempted to kill init!"), "{error}");
    assert!(error.contains("(XEN) Hardware Dom0 crashed"), "{error}");
    assert!(begun.elapsed() < AT_ONCE, "only after {:?}", begun.elapsed());
    Ok(())
}

#[test]
fn a_command_that_runs_when_qemu_is_killed_fails_with_that() -> Result<()> {
    let lab = Lab::builder().boot()?;
    let sleeper = lab.spawn("sleep 1000")?;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(lab.qemu_pid()), nix::sys::signal::Signal::SIGKILL)?;
    let error = format!("{:#}", sleeper.wait(AT_ONCE).err().context("it must not end well")?);
    assert!(error.contains("QEMU ended (signal: 9 (SIGKILL))"), "{error}");
    let error = format!("{:#}", lab.dom0("true").ok().err().context("it must not run")?);
    assert!(error.contains("QEMU ended (signal: 9 (SIGKILL))"), "{error}");
    Ok(())
}
