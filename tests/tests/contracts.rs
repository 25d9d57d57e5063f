//! The contracts that the simulated platform keeps in `cargo test -p pciback` hold on a real Xen too.

use anyhow::{Result, ensure};
use xpci_tests::host::{PF, SOON, VFS};
use xpci_tests::scenes::{Check, Machine, Scene};
use xpci_tests::{GuestConfig, Lab, checks};

use crate::machines::HOST;

pub struct Contracts<'a> {
    lab: &'a Lab,
    open: u32,
    plain: u32,
}

impl<'a> Scene<'a> for Contracts<'a> {
    const NAME: &'static str = "contracts";
    const MACHINE: &'static Machine = &HOST;

    fn set_up(lab: &'a Lab) -> Result<Self> {
        lab.dom0("modprobe igb && modprobe pci-stub").ok()?;
        lab.dom0(&format!("echo 2 > /sys/bus/pci/devices/{PF}/sriov_numvfs")).ok()?;
        let vf = VFS[0];
        lab.wait_for("the VF", SOON, &format!("[ -e /sys/bus/pci/devices/{vf} ]"))?;
        lab.dom0(&format!(
            "echo pci-stub > /sys/bus/pci/devices/{vf}/driver_override && echo {vf} > /sys/bus/pci/drivers_probe"
        ))
        .ok()?;
        let [open, plain] =
            lab.guests(&[GuestConfig::pv("open"), GuestConfig::pv("plain").passthrough(false)])?;
        let (open, plain) = (open.domid()?, plain.domid()?);
        Ok(Self { lab, open, plain })
    }

    fn checks() -> Vec<Check<Self>> {
        checks![a_real_xen_keeps_the_contracts_of_the_simulated_one]
    }

    fn restore(&mut self) -> Result<()> {
        Ok(())
    }
}

fn a_real_xen_keeps_the_contracts_of_the_simulated_one(scene: &mut Contracts<'_>) -> Result<()> {
    let (vf, open, plain) = (VFS[0], scene.open, scene.plain);
    let command = format!(
        "contract --platform xen --pf {PF} --vf {vf} --guest {open} --plain-guest {plain} --holder pci-stub --whole-pf"
    );
    let output = scene.lab.dom0(&command).limit(SOON * 2).run()?;
    println!("{}", output.stdout());
    ensure!(output.status() == 0, "{}", output.stdout());
    ensure!(!output.stdout().contains("SKIP"), "every contract is asked: {}", output.stdout());
    Ok(())
}
