//! The same package in Debian 13, whose Xen, systemd and libraries are newer than those of Debian 12, on which it may have been built.

use anyhow::Result;
use xpci_tests::scenes::{Check, Machine, Scene};
use xpci_tests::{Lab, checks};

use super::machine::DEBIAN_13;
use super::{RealDom0, boots};

pub struct Debian13<'a>(RealDom0<'a>);

impl<'a> Scene<'a> for Debian13<'a> {
    const NAME: &'static str = "debian_13";
    const MACHINE: &'static Machine = &DEBIAN_13;

    fn set_up(lab: &'a Lab) -> Result<Self> {
        RealDom0::set_up(lab).map(Self)
    }

    fn checks() -> Vec<Check<Self>> {
        checks![
            installing_the_package_starts_the_service,
            the_doctor_finds_no_fault needs installing_the_package_starts_the_service,
            a_restart_enables_the_vfs_of_the_settings needs installing_the_package_starts_the_service,
            a_reload_by_systemd_puts_policies_in_force needs a_restart_enables_the_vfs_of_the_settings,
            a_guest_uses_a_function_that_it_has_persistently needs a_reload_by_systemd_puts_policies_in_force,
            after_a_boot_nothing_has_failed needs a_guest_uses_a_function_that_it_has_persistently,
            at_boot_the_service_is_ready_after_xen_and_before_guests_start needs after_a_boot_nothing_has_failed,
            a_guest_that_starts_at_boot_has_its_persistent_function needs after_a_boot_nothing_has_failed,
        ]
    }

    fn restore(&mut self) -> Result<()> {
        self.0.restore()
    }
}

fn installing_the_package_starts_the_service(scene: &mut Debian13<'_>) -> Result<()> {
    super::installing_the_package_starts_the_service(&mut scene.0)
}

fn the_doctor_finds_no_fault(scene: &mut Debian13<'_>) -> Result<()> {
    super::the_doctor_finds_no_fault(&mut scene.0)
}

fn a_restart_enables_the_vfs_of_the_settings(scene: &mut Debian13<'_>) -> Result<()> {
    super::a_restart_enables_the_vfs_of_the_settings(&mut scene.0)
}

fn a_reload_by_systemd_puts_policies_in_force(scene: &mut Debian13<'_>) -> Result<()> {
    super::a_reload_by_systemd_puts_policies_in_force(&mut scene.0)
}

fn a_guest_uses_a_function_that_it_has_persistently(scene: &mut Debian13<'_>) -> Result<()> {
    super::a_guest_uses_a_function_that_it_has_persistently(&mut scene.0)
}

fn after_a_boot_nothing_has_failed(scene: &mut Debian13<'_>) -> Result<()> {
    boots::after_a_boot_nothing_has_failed(&mut scene.0)
}

fn at_boot_the_service_is_ready_after_xen_and_before_guests_start(scene: &mut Debian13<'_>) -> Result<()> {
    boots::at_boot_the_service_is_ready_after_xen_and_before_guests_start(&mut scene.0)
}

fn a_guest_that_starts_at_boot_has_its_persistent_function(scene: &mut Debian13<'_>) -> Result<()> {
    boots::a_guest_that_starts_at_boot_has_its_persistent_function(&mut scene.0)
}
