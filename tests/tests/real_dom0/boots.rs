//! What a dom0 has when it has booted, without intervention.

use anyhow::{Context, Result, ensure};
use xpci_tests::BareGuest;
use xpci_tests::host::{SOON, VFS, is_held, owner, state, wait_for_state, xpci};

use super::{NAME, RealDom0, bring_the_pf_up, uses_it};

/// The HVM guest, and where it has its function.
const HVM: (&str, &str) = ("firm", "5f6e2a34-0d2b-4f0c-9f5e-3c1d7a9b1e58");
const SLOT: u32 = 6;

/// When a unit began to start and when it had started, in microseconds after dom0's kernel.
fn times(scene: &RealDom0<'_>, unit: &str) -> Result<(u64, u64)> {
    let command =
        format!("systemctl show -P InactiveExitTimestampMonotonic -P ActiveEnterTimestampMonotonic {unit}");
    let said = scene.lab.dom0(&command).ok()?;
    let mut numbers = said.lines().filter_map(|line| line.parse().ok());
    let both = numbers.next().zip(numbers.next());
    both.filter(|(began, _)| *began > 0).with_context(|| format!("{unit} was not started: {said:?}"))
}

pub fn a_function_is_given_persistently_to_an_hvm_guest_that_is_not_there_yet(
    scene: &mut RealDom0<'_>,
) -> Result<()> {
    let (name, uuid) = HVM;
    scene.hvm = Some(BareGuest::at_boot(scene.lab, name, &[&format!("uuid=\"{uuid}\"")])?);
    xpci(scene.lab, &format!("pci-attach --persist {uuid} {}@{SLOT}", VFS[2])).map(drop)
}

/// Guests are shut down by Xen's script, not saved: Xen 4.17 saves no PV guest that has a function in a way that can be restored.
pub fn after_a_boot_nothing_has_failed(scene: &mut RealDom0<'_>) -> Result<()> {
    let lab = scene.lab;
    lab.dom0(&format!(
        "cp /guest/{NAME}.cfg /etc/xen/ && mkdir -p /etc/xen/auto && ln -sf ../{NAME}.cfg /etc/xen/auto/ \
         && sed -i 's/^XENDOMAINS_SAVE=.*/XENDOMAINS_SAVE=/' /etc/default/xendomains"
    ))
    .ok()?;
    // What a guest's kernel runs when it is asked to shut down; the lab's guests have no init system that 'poweroff' could tell.
    let poweroff = "printf '#!/bin/sh\\nexec /bin/poweroff -f\\n' >/sbin/poweroff && chmod +x /sbin/poweroff";
    scene.guest()?.run(poweroff).ok()?;
    lab.reboot()?;
    let failed = lab.dom0("systemctl --failed --no-pager --no-legend --plain").ok()?;
    ensure!(failed.trim().is_empty(), "{failed}");
    Ok(())
}

pub fn at_boot_the_service_is_ready_after_xen_and_before_guests_start(
    scene: &mut RealDom0<'_>,
) -> Result<()> {
    let (_, xen) = times(scene, "xen.service")?;
    let (began, ready) = times(scene, "xpcid.service")?;
    let (guests, _) = times(scene, "xendomains.service")?;
    ensure!(
        xen <= began && ready > 0 && ready <= guests,
        "Xen's services started until {xen} us, xpcid from {began} to {ready} us, guests from {guests} us"
    );
    Ok(())
}

pub fn at_boot_the_vfs_of_the_settings_are_enabled_and_held(scene: &mut RealDom0<'_>) -> Result<()> {
    let lab = scene.lab;
    wait_for_state(lab, VFS[1], "held")?;
    ensure!(is_held(lab, VFS[1])?, "{}", owner(lab, VFS[1])?);
    Ok(())
}

pub fn a_guest_that_starts_at_boot_has_its_persistent_function(scene: &mut RealDom0<'_>) -> Result<()> {
    let lab = scene.lab;
    bring_the_pf_up(lab)?;
    let guest = scene.guest()?;
    guest.reconnect(SOON * 2)?;
    uses_it(guest)?;
    ensure!(state(lab, VFS[0])? == "attached", "{}", state(lab, VFS[0])?);
    Ok(())
}

/// xl lets it run at once; its firmware finds the function.
pub fn an_hvm_guest_that_starts_at_boot_has_its_persistent_function(scene: &mut RealDom0<'_>) -> Result<()> {
    let lab = scene.lab;
    let mut guest = scene.hvm.take().context("the HVM guest was not described")?;
    guest.find()?;
    guest.tell(&format!("slot {SLOT:x}"))?;
    let (id, bar) = (guest.number("r 0 4")?, guest.number("r 10 4")?);
    ensure!(id == 0x10ca_8086 && bar & !0xf != 0, "slot {SLOT:x} has {id:x}, BAR 0 {bar:x}");
    guest.destroy()?;
    wait_for_state(lab, VFS[2], "held")?;
    xpci(lab, &format!("pci-detach --persistent {} {}", HVM.1, VFS[2])).map(drop)
}
