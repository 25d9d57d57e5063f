//! Who uses a function, from trees with the layout of sysfs and procfs, their values as seen on a dom0.

use std::os::unix::fs::symlink;

use tempfile::TempDir;

use super::*;
use crate::platform::Host as _;
use crate::platform::linux::LinuxHost;

const ADDRESS: Sbdf = Sbdf::from_devfn(0, 3, 0);
const DEVICE: &str = "devices/pci0000:00/0000:00:04.0/0000:03:00.0";
const OTHER: &str = "devices/pci0000:00/0000:00:04.0/0000:03:00.1";

struct Tree(TempDir);

impl Tree {
    /// One function with this driver, behind a root port.
    fn new(driver: &str) -> Self {
        let tree = Self(tempfile::tempdir().unwrap());
        for function in [DEVICE, OTHER] {
            tree.directory(&format!("sys/{function}"));
        }
        tree.directory("sys/bus/pci/devices");
        symlink(tree.path(&format!("sys/{DEVICE}")), tree.path("sys/bus/pci/devices/0000:03:00.0")).unwrap();
        symlink(format!("../../bus/pci/drivers/{driver}"), tree.path(&format!("sys/{DEVICE}/driver")))
            .unwrap();
        tree.file("proc/self/mountinfo", "");
        tree.file("proc/swaps", "Filename\tType\tSize\tUsed\tPriority\n");
        tree
    }

    fn path(&self, path: &str) -> PathBuf {
        self.0.path().join(path)
    }

    fn directory(&self, path: &str) {
        fs::create_dir_all(self.path(path)).unwrap();
    }

    fn file(&self, path: &str, text: &str) {
        fs::create_dir_all(self.path(path).parent().unwrap()).unwrap();
        fs::write(self.path(path), text).unwrap();
    }

    /// A device in a class, `path` below `sys`, with its number.
    fn member(&self, class: &str, path: &str, number: &str) {
        self.directory(&format!("sys/{path}"));
        if !number.is_empty() {
            self.file(&format!("sys/{path}/dev"), &format!("{number}\n"));
        }
        let name = Path::new(path).file_name().unwrap().to_str().unwrap();
        self.directory(&format!("sys/class/{class}"));
        symlink(format!("../../{path}"), self.path(&format!("sys/class/{class}/{name}"))).unwrap();
    }

    fn host(&self) -> LinuxHost {
        LinuxHost::new(self.path("sys")).with_processes(self.path("proc")).with_device_files(self.path("dev"))
    }

    fn uses(&self) -> Vec<String> {
        self.host().uses(ADDRESS).unwrap().iter().map(ToString::to_string).collect()
    }
}

#[test]
fn mounts_swap_and_what_is_made_of_its_partitions_are_named() {
    let tree = Tree::new("ahci");
    for (name, number) in [("sda", "8:0"), ("sda/sda1", "8:1"), ("sda/sda2", "8:2"), ("sda/sda3", "8:3")] {
        tree.member("block", &format!("{DEVICE}/ata1/host0/block/{name}"), number);
    }
    tree.member("block", &format!("{OTHER}/ata2/host1/block/sdb"), "8:16");
    tree.member("block", "devices/virtual/block/dm-0", "254:0");
    tree.file("sys/devices/virtual/block/dm-0/dm/name", "vg-root\n");
    assert_eq!(tree.uses(), [""; 0], "nobody uses it yet");
    tree.directory(&format!("sys/{DEVICE}/ata1/host0/block/sda/sda3/holders/dm-0"));
    tree.file(
        "proc/self/mountinfo",
        "22 1 8:1 / /my\\040disk rw,noatime shared:1 - ext4 /dev/root rw\n\
         23 1 8:16 / /other rw - ext4 /dev/sdb rw\n\
         24 1 0:40 /@ /btrfs rw shared:7 - btrfs /dev/sda rw\n\
         25 1 254:0 / / rw - ext4 /dev/mapper/vg-root rw\n\
         nonsense\n",
    );
    tree.file(
        "proc/swaps",
        "Filename Type Size Used Priority\n/dev/sda2 partition 1 0 -2\n/dev/sdb partition 1 0 -2\n",
    );
    assert_eq!(
        tree.uses(),
        [
            "/dev/sda3 is part of dm-0 (vg-root)",
            "/dev/sda1 is mounted at /my disk",
            "/dev/sda is mounted at /btrfs",
            "/dev/sda2 is swap space",
        ]
    );
}

#[test]
fn a_shared_nvme_namespace_is_used_through_each_controller_that_leads_to_it() {
    let tree = Tree::new("nvme");
    tree.directory(&format!("sys/{DEVICE}/nvme/nvme1/nvme0c1n1"));
    tree.member("block", "devices/virtual/nvme-subsystem/nvme-subsys0/nvme0n1", "259:1");
    tree.member("block", "devices/virtual/nvme-subsystem/nvme-subsys0/nvme0n1/nvme0n1p1", "259:2");
    tree.member("block", "devices/virtual/nvme-subsystem/nvme-subsys0/nvme0n2", "259:3");
    tree.file(
        "proc/self/mountinfo",
        "22 1 259:2 / /srv rw - ext4 /dev/nvme0n1p1 rw\n23 1 259:3 / /not rw - ext4 /dev/nvme0n2 rw\n",
    );
    assert_eq!(tree.uses(), ["/dev/nvme0n1p1 is mounted at /srv"]);
    for (name, namespace) in
        [("nvme12c3n4", Some("nvme12n4")), ("nvme0n1", None), ("nvmec1n1", None), ("hwmon3", None)]
    {
        assert_eq!(shared_namespace(name).as_deref(), namespace, "{name}");
    }
}

#[test]
fn a_guests_disk_is_a_use_and_names_the_guest() {
    let tree = Tree::new("ahci");
    tree.member("block", &format!("{DEVICE}/host0/block/sda"), "8:160");
    tree.file("sys/bus/xen-backend/devices/vbd-7-51712/physical_device", "8:a0\n");
    tree.file("sys/bus/xen-backend/devices/vbd-8-51712/physical_device", "8:b0\n");
    tree.file("sys/bus/xen-backend/devices/vif-9-0/mode", "ro\n");
    assert_eq!(tree.uses(), ["/dev/sda is a disk of domain 7"]);
}

#[test]
fn interfaces_that_are_up_or_part_of_something_are_named_those_that_are_down_are_not() {
    let tree = Tree::new("virtio-pci");
    tree.file("sys/class/net/bonding_masters", "bond0\n");
    for (path, flags) in
        [("virtio0/net/eth0", "0x1003"), ("virtio0/net/eth1", "0x1002"), ("net/eth2", "0x1002")]
    {
        tree.member("net", &format!("{DEVICE}/{path}"), "");
        tree.file(&format!("sys/{DEVICE}/{path}/flags"), &format!("{flags}\n"));
    }
    symlink("../../br0", tree.path(&format!("sys/{DEVICE}/virtio0/net/eth0/master"))).unwrap();
    symlink("../../bond0", tree.path(&format!("sys/{DEVICE}/net/eth2/master"))).unwrap();
    assert_eq!(tree.uses(), ["interface eth0 is up and part of br0", "interface eth2 is part of bond0"]);
}

#[test]
fn a_block_device_that_is_opened_exclusively_is_in_use_and_named_once() {
    let tree = Tree::new("ahci");
    for (name, number) in [("sda", "8:0"), ("sda/sda1", "8:1"), ("sda/sda2", "8:2"), ("sdb", "8:16")] {
        tree.member("block", &format!("{DEVICE}/ata1/host0/block/{name}"), number);
    }
    let (root, processes, directory) =
        (tree.path("sys"), tree.path("proc"), tree.path(&format!("sys/{DEVICE}")));
    let uses = |claimed: &[&str]| -> Vec<String> {
        let is_claimed = |name: &str| Ok(claimed.contains(&name));
        let users = Users {
            root: &root,
            processes: &processes,
            directory: &directory,
            address: ADDRESS,
            is_claimed: &is_claimed,
        };
        users.find(Some("ahci")).unwrap().iter().map(ToString::to_string).collect()
    };
    let exclusively = |device| {
        format!("{device} is opened exclusively (a ZFS pool, a file system of several devices, a program)")
    };
    assert_eq!(uses(&[]), [""; 0]);
    assert_eq!(uses(&["sdb"]), [exclusively("/dev/sdb")]);
    // The kernel answers so for the disk, too.
    assert_eq!(uses(&["sda", "sda2"]), [exclusively("/dev/sda2")]);
    tree.file("proc/self/mountinfo", "22 1 8:1 / /srv rw - ext4 /dev/sda1 rw\n");
    assert_eq!(uses(&["sda", "sda1"]), ["/dev/sda1 is mounted at /srv"]);
    assert_eq!(
        uses(&["sda", "sda1", "sda2"]),
        [exclusively("/dev/sda2"), "/dev/sda1 is mounted at /srv".to_owned()]
            .iter()
            .rev()
            .cloned()
            .collect::<Vec<_>>()
    );
}

#[test]
fn what_cannot_be_opened_at_all_is_not_claimed_and_other_failures_are_reported() {
    let directory = tempfile::tempdir().unwrap();
    assert!(!is_claimed(&directory.path().join("absent")).unwrap());
    fs::write(directory.path().join("file"), "").unwrap();
    assert!(!is_claimed(&directory.path().join("file")).unwrap());
    assert!(is_claimed(&directory.path().join("file/below")).is_err());
}

#[test]
fn a_process_that_has_a_device_file_of_the_function_open_is_named() {
    let tree = Tree::new("nvme");
    for (class, number, place, name) in [
        ("char", "241:0", format!("{DEVICE}/nvme/nvme0"), "nvme0"),
        ("block", "259:0", format!("{DEVICE}/nvme/nvme0/nvme0n1"), "nvme0n1"),
        ("char", "241:1", format!("{OTHER}/nvme/nvme1"), "nvme1"),
    ] {
        tree.file(&format!("sys/{place}/uevent"), &format!("MAJOR=1\nDEVNAME={name}\n"));
        tree.directory(&format!("sys/dev/{class}"));
        symlink(format!("../../{place}"), tree.path(&format!("sys/dev/{class}/{number}"))).unwrap();
    }
    for (pid, open, name) in
        [(41, "/dev/nvme0", "smartd"), (42, "/dev/nvme1", "other"), (43, "/dev/nvme0n1", "qemu")]
    {
        tree.directory(&format!("proc/{pid}/fd"));
        symlink(open, tree.path(&format!("proc/{pid}/fd/3"))).unwrap();
        tree.file(&format!("proc/{pid}/comm"), &format!("{name}\n"));
    }
    let mut uses = tree.uses();
    uses.sort();
    assert_eq!(uses, ["process 41 (smartd) has /dev/nvme0 open", "process 43 (qemu) has /dev/nvme0n1 open"]);
}

#[test]
fn a_process_that_drives_it_is_named() {
    let tree = Tree::new("vfio-pci");
    symlink("../../../kernel/iommu_groups/12", tree.path(&format!("sys/{DEVICE}/iommu_group"))).unwrap();
    tree.directory("proc/41/fd");
    symlink("/dev/vfio/12", tree.path("proc/41/fd/9")).unwrap();
    tree.file("proc/41/comm", "qemu-system-x86\n");
    tree.directory("proc/42/fd");
    symlink("/dev/vfio/13", tree.path("proc/42/fd/9")).unwrap();
    assert_eq!(tree.uses(), ["process 41 (qemu-system-x86) has /dev/vfio/12 open"]);
}

#[test]
fn without_a_driver_nobody_uses_it() {
    let tree = Tree::new("igb");
    tree.member("net", &format!("{DEVICE}/net/eth0"), "");
    tree.file(&format!("sys/{DEVICE}/net/eth0/flags"), "0x1003\n");
    assert_eq!(tree.uses().len(), 1);
    fs::remove_file(tree.path(&format!("sys/{DEVICE}/driver"))).unwrap();
    assert_eq!(tree.uses(), [""; 0]);
}

#[test]
fn the_ports_above_are_read_from_the_path_of_the_device() {
    let tree = Tree::new("nvme");
    assert_eq!(tree.host().ports_above(ADDRESS).unwrap(), [Sbdf::from_devfn(0, 0, 0x20)]);
    let absent = tree.host().ports_above(Sbdf::from_devfn(0, 9, 0)).unwrap_err();
    assert!(matches!(absent.cause, Cause::Missing), "{absent}");
}
