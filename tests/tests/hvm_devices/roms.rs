//! Expansion ROMs, which a guest is given copies of.

use anyhow::{Context, Result, ensure};
use xpci_tests::BareGuest;
use xpci_tests::host::state::make_held;
use xpci_tests::host::xpci;

use super::{COMMAND, HvmDevices, VIRTIO, VIRTIO_SLOTS};
use crate::machines::destroy_guests;

const ROM: u32 = 0x30;
const POLICY: &str = "/etc/xpci/policies/rom.yaml";

/// hvmloader places it, and what the guest reads of it, by single accesses and by string instructions, is what dom0 reads of the device.
pub fn firmware_and_guest_find_a_copy_of_the_devices_rom(scene: &mut HvmDevices<'_>) -> Result<()> {
    let (lab, function, slot) = (scene.lab, VIRTIO[0], VIRTIO_SLOTS[0]);
    scene.one = None;
    destroy_guests(lab)?;
    make_held(lab, function)?;
    let file = format!("/sys/bus/pci/devices/{function}/rom");
    lab.dom0(&format!("echo 1 > {file} && cat {file} > /tmp/rom && echo 0 > {file}")).ok()?;
    let rom = lab.pull("/tmp/rom")?;
    ensure!(rom.starts_with(&[0x55, 0xaa]), "the device has no ROM: {} bytes", rom.len());
    lab.push(format!("match: {{address: '{function}'}}\nrom: device\n").as_bytes(), POLICY)?;
    xpci(lab, "policy reload")?;

    let mut one = BareGuest::create(lab, "one", &[])?;
    xpci(lab, &format!("pci-attach one {function}@{slot:x}"))?;
    one.start()?;
    one.tell(&format!("slot {slot:x}"))?;
    let place = one.number(&format!("r {ROM:x} 4"))?;
    let size = rom.len().next_power_of_two() as u32;
    ensure!(place != 0 && place & (size - 1) & !1 == 0, "the firmware has put it at {place:#x}");
    let place = place & !1;
    one.tell(&format!("w {COMMAND:x} 2 0"))?;
    one.tell(&format!("w {ROM:x} 4 fffff800"))?;
    let mask = one.number(&format!("r {ROM:x} 4"))?;
    ensure!(mask == !(size - 1), "its size: {mask:x}, in dom0 {size:x}");
    one.tell(&format!("w {ROM:x} 4 {:x}", place | 1))?;
    let read = |at: usize, size: u32| one.number(&format!("m {:x} {size}", place as usize + at));
    ensure!(read(0, 2)? == 0xffff, "it answers though memory space is off");
    one.tell(&format!("w {COMMAND:x} 2 2"))?;
    ensure!(read(0, 2)? == 0xaa55, "it begins with {:x}", read(0, 2)?);
    let data = read(0x18, 2)? as usize;
    let dword = |at: usize| -> Result<u32> {
        let bytes = rom.get(at..at + 4).context("the ROM ends")?;
        Ok(u32::from_le_bytes(bytes.try_into()?))
    };
    ensure!(read(data, 4)? == u32::from_le_bytes(*b"PCIR"), "PCIR at {data:#x}: {:x}", read(data, 4)?);
    ensure!(read(data + 4, 4)? == dword(data + 4)?, "its ids: {:x}", read(data + 4, 4)?);
    let sum = |count: usize| (0..count).try_fold(0u32, |sum, at| Ok(sum.wrapping_add(dword(4 * at)?)));
    let dwords = rom.len() / 4;
    for count in [1, dwords] {
        let (copied, expected): (u32, Result<u32>) =
            (one.number(&format!("copy {place:x} {count:x}"))?, sum(count));
        ensure!(
            copied == expected?,
            "{count} dwords copied by a string instruction: their sum is {copied:x}"
        );
    }
    one.tell(&format!("n {place:x} 4 0"))?;
    ensure!(read(0, 2)? == 0xaa55, "it was written");
    println!("  {} bytes at {place:#x} are those of the device", rom.len());
    one.destroy()?;
    lab.dom0(&format!("rm -f {POLICY}")).ok()?;
    xpci(lab, "policy reload").map(drop)
}
