//! S5, S6, S8 on a real dom0: what it uses is not taken from it, what belongs to guests is held as soon as it appears, and a PF that
//! nobody manages has VFs that only a policy gives away.

use anyhow::{Context, Result, ensure};
use xpci_tests::host::{
    PF, SOON, VFS, builder, guest, is_held, known_to_xen, nothing_remains, owner, prepare, start_service,
    status, wait_for_state, xpci, xpci_fails,
};
use xpci_tests::{Devices, Lab};

const DISK: &str = "0000:02:00.0";
const SLOT: &str = "0000:03:00.0";
/// Bytes of the disk: enough for a file system and for swap space.
const DISK_SIZE: u64 = 32 << 20;

#[test]
fn functions_are_taken_from_nobody_who_uses_them_and_given_back_as_they_came() -> Result<()> {
    let disk = tempfile::NamedTempFile::new()?;
    disk.as_file().set_len(DISK_SIZE)?;
    let file = disk.path().to_str().context("a path that is no text")?;
    // As a namespace that controllers share: its block device does not lie below the function.
    let devices = Devices::none()
        .igb("igb0")
        .arg("-device", "nvme-subsys,id=disk-subsys".into())
        .device("nvme,id=disk,serial=disk,subsys=disk-subsys")
        .arg("-blockdev", format!("file,node-name=disk-file,filename={file}"))
        .arg("-device", "nvme-ns,bus=disk,drive=disk-file,shared=on".into())
        .empty_port();
    let lab = builder().udev().devices(devices).boot()?;
    let service = prepare(&lab)?;
    // From here on drivers are loaded as on any host, beside xpcid.
    let _udev = lab.spawn("/usr/lib/systemd/systemd-udevd")?;
    lab.wait_for("udev", SOON, "[ -S /run/udev/control ]")?;

    println!("S8: an interface that is up, and one that is part of a bridge");
    interfaces(&lab)?;

    println!("S8: a mounted file system, and swap space");
    block_devices(&lab)?;

    println!("S6: a PF without a driver");
    unmanaged(&lab)?;

    println!("S1, S8: VFs that somebody else enables, and that policies keep for guests");
    vfs_by_policy(&lab)?;
    ensure!(status(&lab)?["problems"].as_array().is_some_and(Vec::is_empty), "{}", status(&lab)?);

    println!("S8: a hotplugged function that policies keep for guests");
    hotplugged(&lab)?;

    println!("S8: when the service starts, it holds what nobody uses");
    drop(service);
    at_start(&lab)
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

fn interfaces(lab: &Lab) -> Result<()> {
    let name = interface(lab, PF)?;
    refused(lab, "pci-assignable-add 01:00.0", &[&format!("interface {name} is up"), "--force"])?;
    ensure!(driver(lab, PF)? == "igb" && owner(lab, PF)? == "d0", "{}", owner(lab, PF)?);
    lab.dom0(&format!("ip link add br0 type bridge && ip link set {name} master br0 down")).ok()?;
    refused(lab, "pci-assignable-add 01:00.0", &[&format!("interface {name} is part of br0")])?;
    lab.dom0(&format!("ip link set {name} nomaster")).ok()?;
    xpci(lab, "pci-assignable-add 01:00.0")?;
    ensure!(is_held(lab, PF)?, "{}", owner(lab, PF)?);
    xpci(lab, "pci-assignable-remove 01:00.0")?;
    lab.wait_for("its interface", SOON, &format!("[ -d /sys/bus/pci/devices/{PF}/net ]"))?;
    let name = interface(lab, PF)?;
    lab.dom0(&format!("ip link set {name} up")).ok()?;
    let said = xpci(lab, "pci-assignable-add --force 01:00.0")?;
    ensure!(said.contains(&format!("is in use: interface {name} is up")), "{said}");
    xpci(lab, "pci-assignable-remove 01:00.0")?;
    ensure!(driver(lab, PF)? == "igb", "{}", driver(lab, PF)?);
    Ok(())
}

fn block_devices(lab: &Lab) -> Result<()> {
    lab.dom0("modprobe nvme; modprobe crc32c_generic; modprobe ext4").ok()?;
    lab.wait_for("the disk", SOON, "[ -b /dev/nvme0n1 ]")?;
    lab.dom0("mke2fs /dev/nvme0n1 && mkdir -p '/mnt/a disk' && mount -t ext4 /dev/nvme0n1 '/mnt/a disk'")
        .ok()?;
    lab.dom0("echo kept > '/mnt/a disk/file'").ok()?;
    refused(lab, "pci-assignable-add 02:00.0", &["/dev/nvme0n1 is mounted at /mnt/a disk"])?;
    ensure!(driver(lab, DISK)? == "nvme", "{}", driver(lab, DISK)?);
    ensure!(lab.dom0("cat '/mnt/a disk/file'").ok()?.trim() == "kept", "the disk was disturbed");
    lab.dom0("umount '/mnt/a disk' && mkswap /dev/nvme0n1 && swapon /dev/nvme0n1").ok()?;
    refused(lab, "pci-assignable-add 02:00.0", &["/dev/nvme0n1 is swap space"])?;
    lab.dom0("swapoff /dev/nvme0n1").ok()?;
    xpci(lab, "pci-assignable-add 02:00.0")?;
    ensure!(is_held(lab, DISK)?, "{}", owner(lab, DISK)?);
    xpci(lab, "pci-assignable-remove 02:00.0")?;
    ensure!(driver(lab, DISK)? == "nvme", "{}", driver(lab, DISK)?);
    lab.wait_for("the disk again", SOON, "dd if=/dev/nvme0n1 of=/dev/null bs=64k count=1")
}

fn unmanaged(lab: &Lab) -> Result<()> {
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
    xpci(lab, "pci-assignable-remove 01:10.0")?;
    xpci(lab, "vf destroy 01:00.0")?;
    ensure!(driver(lab, PF)?.is_empty() && !known_to_xen(lab, VFS[0])?, "{}", driver(lab, PF)?);
    let left =
        lab.dom0(&format!("cat /sys/bus/pci/devices/{PF}/driver_override; ls /run/xpci/unmanaged")).ok()?;
    ensure!(left.trim() == "(null)", "{left}");
    lab.dom0(&format!("echo {PF} > /sys/bus/pci/drivers/igb/bind")).limit(SOON).ok().map(drop)
}

/// S1: udev has tagged the function, and systemd is asked to start xpcid for it.
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

fn vfs_by_policy(lab: &Lab) -> Result<()> {
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

fn hotplugged(lab: &Lab) -> Result<()> {
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

fn at_start(lab: &Lab) -> Result<()> {
    lab.wait_for("the end of xpcid", SOON, "! pidof xpcid")?;
    let service = start_service(lab)?;
    wait_for_state(lab, SLOT, "held")?;
    lab.wait_for("the end of it", SOON, &format!("xpci status | grep '^{SLOT}' | grep -qE 'pciback$'"))?;
    xpci(lab, "pci-assignable-remove 03:00.0")?;
    lab.wait_for("its interface", SOON, &format!("[ -d /sys/bus/pci/devices/{SLOT}/net ]"))?;
    let name = interface(lab, SLOT)?;
    lab.dom0(&format!("ip link set {name} up")).ok()?;
    drop(service);
    lab.wait_for("the end of xpcid", SOON, "! pidof xpcid")?;
    let _service = start_service(lab)?;
    let said = format!("should be held at once: {SLOT} is in use: interface {name} is up");
    lab.wait_for("the problem", SOON, &format!("xpci status | grep -q '{said}'"))?;
    ensure!(driver(lab, SLOT)? == "e1000e", "{}", driver(lab, SLOT)?);
    Ok(())
}
