//! A dom0 as its administrator has it: Debian with systemd and Xen's own scripts, the product installed from its package. The service is
//! started by systemd throughout, never by the harness.

mod boots;
pub mod debian_13;
mod machine;
mod restarts;
mod sandbox;

use anyhow::{Context, Result, ensure};
use xpci_tests::host::{PF, SOON, VFS, wait_for_state, xpci};
use xpci_tests::scenes::{Check, Machine, Scene};
use xpci_tests::{BareGuest, Guest, GuestConfig, Lab, checks};

use boots::{
    a_function_is_given_persistently_to_an_hvm_guest_that_is_not_there_yet,
    a_guest_that_starts_at_boot_has_its_persistent_function, after_a_boot_nothing_has_failed,
    an_hvm_guest_that_starts_at_boot_has_its_persistent_function,
    at_boot_the_service_is_ready_after_xen_and_before_guests_start,
    at_boot_the_vfs_of_the_settings_are_enabled_and_held,
};
use machine::REAL_DOM0;
use restarts::{
    a_guest_notices_nothing_of_an_upgrade, a_guest_notices_nothing_of_five_kills_in_a_row,
    a_purge_leaves_nothing, a_removal_is_refused_while_a_guest_has_a_function,
    a_restart_does_not_load_the_kernel_module_again, a_service_that_hangs_is_restarted_by_the_watchdog,
};
use sandbox::{
    a_member_of_the_status_group_sees_the_status_and_changes_nothing, systemd_rates_the_service_below_4,
    the_service_sees_a_mount_made_after_its_start, the_service_sees_a_process_that_has_a_device_open,
};

/// That guest's persistent function, and what it is known by.
const UUID: &str = "6d1c7d0e-5a0b-4c52-9a3e-0c4fbb6f0001";
const NAME: &str = "auto";
const MAC: &str = "52:54:00:aa:bb:01";
const ADDRESS: &str = "10.9.9.11";

pub struct RealDom0<'a> {
    lab: &'a Lab,
    guest: Option<Guest<'a>>,
    hvm: Option<BareGuest<'a>>,
}

impl<'a> Scene<'a> for RealDom0<'a> {
    const NAME: &'static str = "real_dom0";
    const MACHINE: &'static Machine = &REAL_DOM0;

    fn set_up(lab: &'a Lab) -> Result<Self> {
        Ok(Self { lab, guest: None, hvm: None })
    }

    fn checks() -> Vec<Check<Self>> {
        checks![
            installing_the_package_starts_the_service,
            the_doctor_finds_no_fault needs installing_the_package_starts_the_service,
            systemd_rates_the_service_below_4 needs installing_the_package_starts_the_service,
            the_service_sees_a_mount_made_after_its_start needs installing_the_package_starts_the_service,
            the_service_sees_a_process_that_has_a_device_open needs installing_the_package_starts_the_service,
            a_member_of_the_status_group_sees_the_status_and_changes_nothing needs installing_the_package_starts_the_service,
            a_restart_enables_the_vfs_of_the_settings needs installing_the_package_starts_the_service,
            a_reload_by_systemd_puts_policies_in_force needs a_restart_enables_the_vfs_of_the_settings,
            a_guest_uses_a_function_that_it_has_persistently needs a_reload_by_systemd_puts_policies_in_force,
            a_function_is_given_persistently_to_an_hvm_guest_that_is_not_there_yet needs a_reload_by_systemd_puts_policies_in_force,
            after_a_boot_nothing_has_failed needs a_guest_uses_a_function_that_it_has_persistently,
            at_boot_the_service_is_ready_after_xen_and_before_guests_start needs after_a_boot_nothing_has_failed,
            at_boot_the_vfs_of_the_settings_are_enabled_and_held needs after_a_boot_nothing_has_failed,
            a_guest_that_starts_at_boot_has_its_persistent_function needs after_a_boot_nothing_has_failed,
            an_hvm_guest_that_starts_at_boot_has_its_persistent_function needs a_function_is_given_persistently_to_an_hvm_guest_that_is_not_there_yet & after_a_boot_nothing_has_failed,
            a_guest_notices_nothing_of_an_upgrade needs a_guest_that_starts_at_boot_has_its_persistent_function,
            a_guest_notices_nothing_of_five_kills_in_a_row needs a_guest_that_starts_at_boot_has_its_persistent_function,
            a_restart_does_not_load_the_kernel_module_again needs a_guest_notices_nothing_of_five_kills_in_a_row,
            a_service_that_hangs_is_restarted_by_the_watchdog needs installing_the_package_starts_the_service,
            a_removal_is_refused_while_a_guest_has_a_function needs a_guest_that_starts_at_boot_has_its_persistent_function,
            a_purge_leaves_nothing needs installing_the_package_starts_the_service,
        ]
    }

    fn restore(&mut self) -> Result<()> {
        self.lab.dom0("systemctl revert xpcid; systemctl start xpcid").run().map(drop)
    }
}

impl<'a> RealDom0<'a> {
    fn guest(&self) -> Result<&Guest<'a>> {
        self.guest.as_ref().context("the guest was not started")
    }
}

/// Waits until systemd knows that the service is ready.
fn wait_for_the_service(lab: &Lab) -> Result<()> {
    lab.wait_for("xpcid to be ready", SOON, "systemctl is-active xpcid").with_context(|| {
        lab.dom0("systemctl status xpcid --no-pager")
            .run()
            .map_or_else(|e| format!("{e:#}"), |said| said.stdout())
    })
}

/// The PF is up, for its VFs' traffic; a driver that udev loads makes its interface.
fn bring_the_pf_up(lab: &Lab) -> Result<()> {
    lab.wait_for("the PF's network interface", SOON, &format!("[ -d /sys/bus/pci/devices/{PF}/net ]"))?;
    let interface = format!("$(ls /sys/bus/pci/devices/{PF}/net)");
    lab.dom0(&format!("ip link set {interface} up && ip addr add 10.9.9.1/24 dev {interface}")).ok().map(drop)
}

fn installing_the_package_starts_the_service(scene: &mut RealDom0<'_>) -> Result<()> {
    let lab = scene.lab;
    lab.dom0("dpkg -i /lab/xpci.deb").limit(SOON * 2).ok()?;
    wait_for_the_service(lab)?;
    let enabled = lab.dom0("systemctl is-enabled xpcid").ok()?;
    ensure!(enabled == "enabled\n", "{enabled}");
    xpci(lab, "status").map(drop)
}

fn the_doctor_finds_no_fault(scene: &mut RealDom0<'_>) -> Result<()> {
    let said = scene.lab.dom0("xpci doctor; true").ok()?;
    ensure!(said.lines().any(|line| line.starts_with("good")), "{said}");
    let bad: Vec<&str> = said.lines().filter(|line| line.starts_with("FAULT")).collect();
    ensure!(bad.is_empty(), "{said}");
    Ok(())
}

fn a_restart_enables_the_vfs_of_the_settings(scene: &mut RealDom0<'_>) -> Result<()> {
    let lab = scene.lab;
    let settings = format!(
        "virtual-functions:\n  - {{pf: \"{PF}\", count: 3, network: {{spoof-check: true}}, vfs: {{0: {{mac: \"{MAC}\"}}}}}}\n"
    );
    lab.push(settings.as_bytes(), "/etc/xpci/xpcid.yaml.d/vfs.yaml")?;
    lab.dom0("systemctl restart xpcid").limit(SOON).ok()?;
    lab.wait_for("the VFs", SOON, &format!("[ -e /sys/bus/pci/devices/{} ]", VFS[2]))
}

fn a_reload_by_systemd_puts_policies_in_force(scene: &mut RealDom0<'_>) -> Result<()> {
    let lab = scene.lab;
    let policy = "match: {vendor: 8086, device: 10ca, function: virtual}\nhold: at-once\n";
    lab.push(policy.as_bytes(), "/etc/xpci/policies/vfs.yaml")?;
    lab.dom0("systemctl reload xpcid").ok()?;
    VFS.iter().try_for_each(|vf| wait_for_state(lab, vf, "held"))
}

fn a_guest_uses_a_function_that_it_has_persistently(scene: &mut RealDom0<'_>) -> Result<()> {
    let lab = scene.lab;
    bring_the_pf_up(lab)?;
    let guest = lab.guest(&GuestConfig::pv(NAME).line(&format!("uuid=\"{UUID}\"")))?;
    xpci(lab, &format!("pci-attach --persist {NAME} {}", VFS[0]))?;
    scene.guest = Some(guest);
    uses_it(scene.guest()?)
}

/// The guest's own driver has the function, with the address of the settings, and packets get through.
fn uses_it(guest: &Guest<'_>) -> Result<()> {
    xpci_tests::host::bring_up(guest, ADDRESS)?;
    let mac = guest.run("cat /sys/bus/pci/devices/0000:00:00.0/net/*/address").ok()?;
    ensure!(mac.trim() == MAC, "its MAC address is {mac}");
    xpci_tests::host::ping(guest, "10.9.9.1")
}
