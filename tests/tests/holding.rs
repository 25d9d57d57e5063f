//! On a real dom0: what it uses is not taken from it, what belongs to guests is held as soon as it appears, and a PF that
//! nobody manages has VFs that only a policy gives away.

use std::fs;

use anyhow::{Context, Result, ensure};
use xpci_tests::host::state::{keep_running, kill_and_start, no_problems};
use xpci_tests::host::{
    PF, SOON, VFS, builder, guest, is_held, known_to_xen, nothing_remains, owner, prepare, state,
    wait_for_state, xpci, xpci_fails,
};
use xpci_tests::scenes::{Check, Machine, Scene};
use xpci_tests::{Builder, Devices, Lab, Process, checks, scratch};

use crate::machines::clean;

const DISK: &str = "0000:02:00.0";
const SLOT: &str = "0000:03:00.0";
/// Bytes of the disk: enough for a file system and for swap space.
const DISK_SIZE: u64 = 32 << 20;

static UDEV: Machine = Machine { name: "udev", builder: with_udev, clean, end: None };

/// With udev, a disk that is written to, and a port for hotplug.
fn with_udev() -> Result<Builder> {
    let disk = scratch("holding.disk")?;
    fs::File::create(&disk)?.set_len(DISK_SIZE)?;
    let file = disk.to_str().context("a path that is no text")?;
    // As a namespace that controllers share: its block device does not lie below the function.
    let devices = Devices::none()
        .igb("igb0")
        .arg("-device", "nvme-subsys,id=disk-subsys".into())
        .device("nvme,id=disk,serial=disk,subsys=disk-subsys")
        .arg("-blockdev", format!("file,node-name=disk-file,filename={file}"))
        .arg("-device", "nvme-ns,bus=disk,drive=disk-file,shared=on".into())
        .empty_port();
    Ok(builder().udev().devices(devices))
}

pub struct Holding<'a> {
    lab: &'a Lab,
    service: Process,
    _udev: Process,
}

impl<'a> Scene<'a> for Holding<'a> {
    const NAME: &'static str = "holding";
    const MACHINE: &'static Machine = &UDEV;

    fn set_up(lab: &'a Lab) -> Result<Self> {
        let service = prepare(lab)?;
        // From here on drivers are loaded as on any host, beside xpcid.
        let _udev = lab.spawn("/usr/lib/systemd/systemd-udevd")?;
        lab.wait_for("udev", SOON, "[ -S /run/udev/control ]")?;
        lab.dom0("modprobe nvme; modprobe crc32c_generic; modprobe ext4").ok()?;
        lab.wait_for("the disk", SOON, "[ -b /dev/nvme0n1 ]")?;
        Ok(Self { lab, service, _udev })
    }

    fn checks() -> Vec<Check<Self>> {
        checks![
            an_interface_that_is_up_is_not_taken,
            an_interface_of_a_bridge_is_not_taken,
            an_interface_that_is_down_is_taken_and_given_back,
            with_force_an_interface_that_is_up_is_taken,
            a_mounted_file_system_is_not_taken,
            swap_space_is_not_taken,
            a_disk_that_nobody_uses_is_taken_and_given_back,
            vfs_of_a_pf_without_a_driver_need_consent_and_pci_pf_stub,
            an_untrusted_vf_needs_a_policy_that_permits_it needs vfs_of_a_pf_without_a_driver_need_consent_and_pci_pf_stub,
            destroyed_vfs_leave_the_pf_without_a_driver needs vfs_of_a_pf_without_a_driver_need_consent_and_pci_pf_stub,
            vfs_that_policies_keep_are_held_as_soon_as_they_appear,
            the_service_knows_of_no_problem,
            a_hotplugged_function_that_policies_keep_is_held,
            a_service_that_starts_holds_what_nobody_uses needs a_hotplugged_function_that_policies_keep_is_held,
            a_service_that_starts_leaves_what_is_used_and_says_so needs a_service_that_starts_holds_what_nobody_uses,
        ]
    }

    fn restore(&mut self) -> Result<()> {
        let lab = self.lab;
        keep_running(lab, &mut self.service)?;
        lab.dom0("umount '/mnt/a disk'; swapoff /dev/nvme0n1; rm -rf /etc/xpci/policies; xpci policy reload")
            .ok()?;
        xpci(lab, "vf set-count 01:00.0 0")?;
        for function in [PF, DISK] {
            if state(lab, function)? != "host" {
                xpci(lab, &format!("pci-assignable-remove {function}"))?;
            }
        }
        has_igb(lab)
    }
}

/// The PF has its native driver.
fn has_igb(lab: &Lab) -> Result<()> {
    if driver(lab, PF)? != "igb" {
        let path = format!("/sys/bus/pci/devices/{PF}");
        lab.dom0(&format!(
            "[ ! -e {path}/driver ] || echo {PF} > {path}/driver/unbind; echo > {path}/driver_override; \
             echo {PF} > /sys/bus/pci/drivers/igb/bind"
        ))
        .limit(SOON)
        .ok()?;
    }
    lab.wait_for("the PF's interface", SOON, &format!("[ -d /sys/bus/pci/devices/{PF}/net ]"))
}

/// The PF's interface, alone and up.
fn interface_up(lab: &Lab) -> Result<String> {
    let name = interface(lab, PF)?;
    lab.dom0(&format!("ip link set {name} nomaster; ip link set {name} up")).ok()?;
    Ok(name)
}

fn driver(lab: &Lab, function: &str) -> Result<String> {
    let link = format!("/sys/bus/pci/devices/{function}/driver");
    Ok(lab.dom0(&format!("[ ! -e {link} ] || basename $(readlink {link})")).ok()?.trim().to_owned())
}

/// `xpci` refuses with exit code 5 and says these words.
fn refused(lab: &Lab, arguments: &str, words: &[&str]) -> Result<()> {
    let (exit, said) = xpci_fails(lab, arguments)?;
    ensure!(exit == 5 && words.iter().all(|word| said.contains(word)), "{exit}: {said}");
    Ok(())
}

fn interface(lab: &Lab, function: &str) -> Result<String> {
    Ok(lab.dom0(&format!("ls /sys/bus/pci/devices/{function}/net")).ok()?.trim().to_owned())
}

fn an_interface_that_is_up_is_not_taken(scene: &mut Holding<'_>) -> Result<()> {
    let lab = scene.lab;
    let name = interface_up(lab)?;
    refused(lab, "pci-assignable-add 01:00.0", &[&format!("interface {name} is up"), "--force"])?;
    ensure!(driver(lab, PF)? == "igb" && owner(lab, PF)? == "d0", "{}", owner(lab, PF)?);
    Ok(())
}

fn an_interface_of_a_bridge_is_not_taken(scene: &mut Holding<'_>) -> Result<()> {
    let lab = scene.lab;
    let name = interface(lab, PF)?;
    lab.dom0(&format!("ip link add br0 type bridge && ip link set {name} master br0 down")).ok()?;
    refused(lab, "pci-assignable-add 01:00.0", &[&format!("interface {name} is part of br0")])?;
    lab.dom0(&format!("ip link set {name} nomaster")).ok().map(drop)
}

fn an_interface_that_is_down_is_taken_and_given_back(scene: &mut Holding<'_>) -> Result<()> {
    let lab = scene.lab;
    let name = interface(lab, PF)?;
    lab.dom0(&format!("ip link set {name} nomaster; ip link set {name} down")).ok()?;
    xpci(lab, "pci-assignable-add 01:00.0")?;
    ensure!(is_held(lab, PF)?, "{}", owner(lab, PF)?);
    xpci(lab, "pci-assignable-remove 01:00.0")?;
    lab.wait_for("its interface", SOON, &format!("[ -d /sys/bus/pci/devices/{PF}/net ]"))
}

fn with_force_an_interface_that_is_up_is_taken(scene: &mut Holding<'_>) -> Result<()> {
    let lab = scene.lab;
    let name = interface_up(lab)?;
    let said = xpci(lab, "pci-assignable-add --force 01:00.0")?;
    ensure!(said.contains(&format!("is in use: interface {name} is up")), "{said}");
    xpci(lab, "pci-assignable-remove 01:00.0")?;
    ensure!(driver(lab, PF)? == "igb", "{}", driver(lab, PF)?);
    Ok(())
}

fn a_mounted_file_system_is_not_taken(scene: &mut Holding<'_>) -> Result<()> {
    let lab = scene.lab;
    lab.dom0("mke2fs /dev/nvme0n1 && mkdir -p '/mnt/a disk' && mount -t ext4 /dev/nvme0n1 '/mnt/a disk'")
        .ok()?;
    lab.dom0("echo kept > '/mnt/a disk/file'").ok()?;
    refused(lab, "pci-assignable-add 02:00.0", &["/dev/nvme0n1 is mounted at /mnt/a disk"])?;
    ensure!(driver(lab, DISK)? == "nvme", "{}", driver(lab, DISK)?);
    ensure!(lab.dom0("cat '/mnt/a disk/file'").ok()?.trim() == "kept", "the disk was disturbed");
    lab.dom0("umount '/mnt/a disk'").ok().map(drop)
}

fn swap_space_is_not_taken(scene: &mut Holding<'_>) -> Result<()> {
    let lab = scene.lab;
    lab.dom0("mkswap /dev/nvme0n1 && swapon /dev/nvme0n1").ok()?;
    refused(lab, "pci-assignable-add 02:00.0", &["/dev/nvme0n1 is swap space"])?;
    lab.dom0("swapoff /dev/nvme0n1").ok().map(drop)
}

fn a_disk_that_nobody_uses_is_taken_and_given_back(scene: &mut Holding<'_>) -> Result<()> {
    let lab = scene.lab;
    xpci(lab, "pci-assignable-add 02:00.0")?;
    ensure!(is_held(lab, DISK)?, "{}", owner(lab, DISK)?);
    xpci(lab, "pci-assignable-remove 02:00.0")?;
    ensure!(driver(lab, DISK)? == "nvme", "{}", driver(lab, DISK)?);
    lab.wait_for("the disk again", SOON, "dd if=/dev/nvme0n1 of=/dev/null bs=64k count=1")
}

fn vfs_of_a_pf_without_a_driver_need_consent_and_pci_pf_stub(scene: &mut Holding<'_>) -> Result<()> {
    let lab = scene.lab;
    lab.dom0(&format!("echo {PF} > /sys/bus/pci/devices/{PF}/driver/unbind")).limit(SOON).ok()?;
    refused(lab, "vf create 01:00.0 2", &["has no driver", "--unmanaged"])?;
    refused(lab, "vf create --unmanaged 01:00.0 2", &["modprobe pci-pf-stub"])?;
    lab.dom0("modprobe pci-pf-stub").ok()?;
    xpci(lab, "vf create --unmanaged 01:00.0 2")?;
    ensure!(driver(lab, PF)? == "pci-pf-stub", "{}", driver(lab, PF)?);
    let listed = xpci(lab, "vf list 01:00.0")?;
    ensure!(
        listed.lines().skip(1).all(|line| line.contains("untrusted: of a PF which no driver manages")),
        "{listed}"
    );
    ensure!(listed.lines().count() == 3 && known_to_xen(lab, VFS[1])?, "{listed}");
    Ok(())
}

fn an_untrusted_vf_needs_a_policy_that_permits_it(scene: &mut Holding<'_>) -> Result<()> {
    let lab = scene.lab;
    let one = guest(lab, "one")?;
    xpci(lab, "pci-assignable-add 01:10.0")?;
    refused(
        lab,
        "pci-attach one 01:10.0",
        &["no driver manages (it has pci-pf-stub)", "permit: [untrusted-vf]"],
    )?;
    ensure!(is_held(lab, VFS[0])?, "{}", owner(lab, VFS[0])?);
    let permit = "match: {vendor: 8086, device: 10ca}\npermit: untrusted-vf\n";
    lab.push(permit.as_bytes(), "/etc/xpci/policies/vf.yaml")?;
    xpci(lab, "policy reload")?;
    xpci(lab, "pci-attach one 01:10.0")?;
    one.wait_for("the VF", SOON, "grep -q 0x10ca /sys/bus/pci/devices/0000:00:00.0/device")?;
    xpci(lab, "pci-detach one 01:10.0")?;
    nothing_remains(lab, &one)?;
    xpci(lab, "pci-assignable-remove 01:10.0").map(drop)
}

fn destroyed_vfs_leave_the_pf_without_a_driver(scene: &mut Holding<'_>) -> Result<()> {
    let lab = scene.lab;
    xpci(lab, "vf destroy 01:00.0")?;
    ensure!(driver(lab, PF)?.is_empty() && !known_to_xen(lab, VFS[0])?, "{}", driver(lab, PF)?);
    let left =
        lab.dom0(&format!("cat /sys/bus/pci/devices/{PF}/driver_override; ls /run/xpci/unmanaged")).ok()?;
    ensure!(left.trim() == "(null)", "{left}");
    has_igb(lab)
}

/// udev has tagged the function, and systemd is asked to start xpcid for it.
fn starts_the_service(lab: &Lab, function: &str) -> Result<()> {
    let properties = format!("udevadm info --query=property /sys/bus/pci/devices/{function}");
    lab.wait_for(
        "udev's rules",
        SOON,
        &format!("{properties} | grep '^TAGS=' | grep ':systemd:' | grep -q ':xpci:'"),
    )?;
    let properties = lab.dom0(&properties).ok()?;
    ensure!(properties.lines().any(|line| line == "SYSTEMD_WANTS=xpcid.service"), "{properties}");
    Ok(())
}

fn vfs_that_policies_keep_are_held_as_soon_as_they_appear(scene: &mut Holding<'_>) -> Result<()> {
    let lab = scene.lab;
    has_igb(lab)?;
    let keep = "match: {vendor: 8086, device: 10ca, function: virtual}\nhold: at-once\n";
    lab.push(keep.as_bytes(), "/etc/xpci/policies/vf.yaml")?;
    xpci(lab, "policy reload")?;
    lab.dom0(&format!("echo 2 > /sys/bus/pci/devices/{PF}/sriov_numvfs")).limit(SOON).ok()?;
    for vf in &VFS[..2] {
        wait_for_state(lab, vf, "held")?;
        lab.wait_for("the holding driver", SOON, &format!("[ -e /sys/bus/pci/drivers/pciback/{vf} ]"))?;
        lab.wait_for("the end of it", SOON, &format!("xpci status | grep '^{vf}' | grep -qE 'pciback$'"))?;
        ensure!(is_held(lab, vf)?, "{vf}: {}", owner(lab, vf)?);
        starts_the_service(lab, vf)?;
    }
    lab.wait_for("the VFs' driver, which udev loads", SOON, "[ -d /sys/bus/pci/drivers/igbvf ]")?;
    xpci(lab, &format!("pci-assignable-remove {} {}", VFS[0], VFS[1]))?;
    for vf in &VFS[..2] {
        ensure!(driver(lab, vf)? == "igbvf" && owner(lab, vf)? == "d0", "{vf}: {}", driver(lab, vf)?);
    }
    xpci(lab, "vf destroy 01:00.0").map(drop)
}

fn the_service_knows_of_no_problem(scene: &mut Holding<'_>) -> Result<()> {
    no_problems(scene.lab)
}

fn a_hotplugged_function_that_policies_keep_is_held(scene: &mut Holding<'_>) -> Result<()> {
    let lab = scene.lab;
    let keep = "match: {vendor: 8086, device: 10d3}\nhold: at-once\n";
    lab.push(keep.as_bytes(), "/etc/xpci/policies/nic.yaml")?;
    xpci(lab, "policy reload")?;
    lab.monitor("device_add e1000e,id=e9,bus=rp3")?;
    wait_for_state(lab, SLOT, "held")?;
    lab.wait_for("the end of it", SOON, &format!("xpci status | grep '^{SLOT}' | grep -qE 'pciback$'"))?;
    ensure!(is_held(lab, SLOT)?, "{}", owner(lab, SLOT)?);
    starts_the_service(lab, SLOT)?;
    lab.wait_for("its driver, which udev loads", SOON, "[ -d /sys/bus/pci/drivers/e1000e ]")?;
    let log = lab.dom0("dmesg").ok()?;
    println!(
        "   the kernel's native driver {} it first",
        if log.contains("e1000e 0000:03:00.0") { "saw" } else { "never saw" }
    );
    xpci(lab, "pci-assignable-remove 03:00.0")?;
    ensure!(driver(lab, SLOT)? == "e1000e" && owner(lab, SLOT)? == "d0", "{}", driver(lab, SLOT)?);
    wait_for_state(lab, SLOT, "host")
}

fn a_service_that_starts_holds_what_nobody_uses(scene: &mut Holding<'_>) -> Result<()> {
    kill_and_start(scene.lab, &mut scene.service)?;
    let lab = scene.lab;
    wait_for_state(lab, SLOT, "held")?;
    lab.wait_for("the end of it", SOON, &format!("xpci status | grep '^{SLOT}' | grep -qE 'pciback$'"))?;
    xpci(lab, "pci-assignable-remove 03:00.0")?;
    lab.wait_for("its interface", SOON, &format!("[ -d /sys/bus/pci/devices/{SLOT}/net ]"))
}

fn a_service_that_starts_leaves_what_is_used_and_says_so(scene: &mut Holding<'_>) -> Result<()> {
    let name = interface(scene.lab, SLOT)?;
    scene.lab.dom0(&format!("ip link set {name} up")).ok()?;
    kill_and_start(scene.lab, &mut scene.service)?;
    let lab = scene.lab;
    let said = format!("is to be held at once: {SLOT} is in use: interface {name} is up");
    lab.wait_for("the problem", SOON, &format!("xpci status | grep -q '{said}'"))?;
    ensure!(driver(lab, SLOT)? == "e1000e", "{}", driver(lab, SLOT)?);
    Ok(())
}
