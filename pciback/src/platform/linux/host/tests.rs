//! `LinuxHost` on a tree with the layout of sysfs, its values as seen on a dom0 with an 82576.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use tempfile::TempDir;

use super::*;
use crate::config::Access;
use crate::platform::linux::blocking::make_script;

const LIMIT: Duration = Duration::from_secs(30);

struct Tree {
    root: TempDir,
}

impl Tree {
    /// A PF with two of three VFs enabled; the first is bound to igbvf.
    fn new() -> Self {
        let tree = Self { root: tempfile::tempdir().unwrap() };
        for driver in ["igb", "igbvf", "pci-stub"] {
            fs::create_dir_all(tree.path("bus/pci/drivers").join(driver)).unwrap();
        }
        tree.set("bus/pci/drivers_probe", "");
        let pf = tree.function("0000:01:00.0", "0x10c9", "(null)\n");
        fs::write(pf.join("sriov_totalvfs"), "3\n").unwrap();
        fs::write(pf.join("sriov_numvfs"), "2\n").unwrap();
        fs::write(pf.join("sriov_drivers_autoprobe"), "1\n").unwrap();
        fs::create_dir_all(pf.join("net/eth0")).unwrap();
        symlink("../../drivers/igb", pf.join("driver")).unwrap();
        fs::write(tree.path("bus/pci/drivers/igb/unbind"), "").unwrap();
        for (index, name) in ["0000:01:10.0", "0000:01:10.2"].into_iter().enumerate() {
            let vf = tree.function(name, "0x10ca", "");
            symlink("../0000:01:00.0", vf.join("physfn")).unwrap();
            symlink(format!("../{name}"), pf.join(format!("virtfn{index}"))).unwrap();
        }
        tree
    }

    fn function(&self, name: &str, device: &str, driver_override: &str) -> PathBuf {
        let directory = self.path("bus/pci/devices").join(name);
        fs::create_dir_all(&directory).unwrap();
        let resource = "0x00000000fe800000 0x00000000fe81ffff 0x0000000000040200\n".to_owned()
            + &"0x0000000000000000 0x0000000000000000 0x0000000000000000\n".repeat(6);
        for (attribute, text) in [
            ("vendor", "0x8086\n"),
            ("device", &format!("{device}\n")),
            ("subsystem_vendor", "0x8086\n"),
            ("subsystem_device", "0xa03c\n"),
            ("class", "0x020000\n"),
            ("revision", "0x01\n"),
            ("resource", &resource),
            ("driver_override", driver_override),
            ("irq", "16\n"),
            ("numa_node", "-1\n"),
            ("reset", ""),
            ("reset_method", "flr pm\n"),
        ] {
            fs::write(directory.join(attribute), text).unwrap();
        }
        fs::write(directory.join("config"), [0x86; 4096]).unwrap();
        directory
    }

    fn path(&self, path: &str) -> PathBuf {
        self.root.path().join(path)
    }

    fn set(&self, path: &str, text: &str) {
        fs::write(self.path(path), text).unwrap();
    }

    fn get(&self, path: &str) -> String {
        fs::read_to_string(self.path(path)).unwrap()
    }

    fn host(&self) -> LinuxHost {
        LinuxHost::new(self.root.path().to_owned())
    }
}

const PF: Sbdf = Sbdf::from_devfn(0, 1, 0);
const VF: Sbdf = Sbdf::from_devfn(0, 1, 0x80);
const OTHER_VF: Sbdf = Sbdf::from_devfn(0, 1, 0x82);
const ABSENT: Sbdf = Sbdf::from_devfn(0, 2, 0);
const VF_PATH: &str = "bus/pci/devices/0000:01:10.0";

#[test]
fn lists_functions_and_drivers_in_order_without_what_has_no_address() {
    let tree = Tree::new();
    fs::create_dir(tree.path("bus/pci/devices/10000:00:01.0")).unwrap();
    assert_eq!(tree.host().functions().unwrap(), [PF, VF, OTHER_VF]);
    assert_eq!(tree.host().drivers().unwrap(), ["igb", "igbvf", "pci-stub"]);
    let empty = LinuxHost::new(tree.path("nowhere"));
    assert!(matches!(empty.functions().unwrap_err().cause, Cause::Missing));
}

#[test]
fn reads_a_pf_with_its_vfs() {
    let pf = Tree::new().host().function(PF).unwrap();
    assert_eq!((pf.vendor, pf.device, pf.subsystem_vendor, pf.subsystem), (0x8086, 0x10c9, 0x8086, 0xa03c));
    assert_eq!((pf.class, pf.revision, pf.irq), (0x02_0000, 1, 16));
    assert_eq!((pf.total_vfs, pf.num_vfs), (3, 2));
    assert_eq!(pf.virtual_functions, [VF, OTHER_VF]);
    assert_eq!(pf.physical_function, None);
    assert_eq!(pf.driver.as_deref(), Some("igb"));
    assert_eq!(pf.driver_override, None);
    assert_eq!(pf.numa_node, None);
    assert_eq!(pf.reset_methods, ["flr", "pm"]);
    assert_eq!(pf.interfaces, ["eth0"]);
    assert_eq!(pf.resources[0].size, 0x2_0000);
}

#[test]
fn reads_a_vf_and_what_it_lacks() {
    let tree = Tree::new();
    for optional in ["reset", "reset_method", "numa_node", "irq", "driver_override"] {
        fs::remove_file(tree.path(VF_PATH).join(optional)).unwrap();
    }
    let vf = tree.host().function(VF).unwrap();
    assert_eq!(vf.physical_function, Some(PF));
    assert_eq!((vf.total_vfs, vf.num_vfs, vf.irq), (0, 0, 0));
    assert_eq!((vf.driver, vf.driver_override, vf.numa_node), (None, None, None));
    assert!(vf.reset_methods.is_empty() && vf.interfaces.is_empty());
}

#[test]
fn a_kernel_that_does_not_name_reset_methods_uses_the_functions_own_or_else_its_bus() {
    let tree = Tree::new();
    fs::remove_file(tree.path(VF_PATH).join("reset_method")).unwrap();
    let methods = |config: &[(usize, &[u8])]| {
        let mut bytes = vec![0; 256];
        for (offset, values) in config {
            bytes[*offset..offset + values.len()].copy_from_slice(values);
        }
        fs::write(tree.path(VF_PATH).join("config"), bytes).unwrap();
        tree.host().function(VF).unwrap().reset_methods
    };
    let capabilities: (usize, &[u8]) = (6, &[0x10]);
    let pointer: (usize, &[u8]) = (0x34, &[0x40]);
    assert_eq!(methods(&[]), ["bus"]);
    // PCI Express with FLR (Device Capabilities, bit 28), then power management without No_Soft_Reset.
    let express: (usize, &[u8]) = (0x40, &[0x10, 0x80, 0x02, 0, 0, 0, 0, 0x10]);
    assert_eq!(methods(&[capabilities, pointer, express, (0x80, &[0x01, 0, 3, 0, 0, 0])]), ["flr", "pm"]);
    assert_eq!(methods(&[capabilities, pointer, express, (0x80, &[0x01, 0, 3, 0, 8, 0])]), ["flr"]);
    // Advanced Features with TP and FLR.
    assert_eq!(methods(&[capabilities, pointer, (0x40, &[0x13, 0, 6, 3])]), ["af_flr"]);
    // Without the file the kernel cannot reset it.
    fs::remove_file(tree.path(VF_PATH).join("reset")).unwrap();
    assert_eq!(methods(&[capabilities, pointer, express]), [""; 0]);
}

#[test]
fn the_interface_of_a_virtio_function_is_found_below_its_virtio_device() {
    let tree = Tree::new();
    fs::create_dir_all(tree.path(VF_PATH).join("virtio3/net/eth7")).unwrap();
    assert_eq!(tree.host().function(VF).unwrap().interfaces, ["eth7"]);
}

#[test]
fn a_function_that_is_not_there_or_leaves_while_it_is_read_is_missing() {
    let tree = Tree::new();
    assert!(matches!(tree.host().function(ABSENT).unwrap_err().cause, Cause::Missing));
    fs::remove_file(tree.path(VF_PATH).join("device")).unwrap();
    let error = tree.host().function(VF).unwrap_err();
    assert!(matches!(error.cause, Cause::Missing));
    assert_eq!(error.to_string(), "cannot read device of 0000:01:10.0: it does not exist");
}

#[test]
fn the_ports_above_a_function_are_on_the_way_to_its_directory_the_nearest_first() {
    let tree = Tree::new();
    let place = tree.path("devices/pci0000:00/0000:00:02.0/0000:05:00.0/0000:06:00.0");
    fs::create_dir_all(&place).unwrap();
    symlink(&place, tree.path("bus/pci/devices/0000:06:00.0")).unwrap();
    let ports = tree.host().ports_above("06:00.0".parse().unwrap()).unwrap();
    assert_eq!(ports.iter().map(ToString::to_string).collect::<Vec<_>>(), ["0000:05:00.0", "0000:00:02.0"]);
    let missing = tree.host().ports_above("07:00.0".parse().unwrap()).unwrap_err();
    assert!(matches!(missing.cause, Cause::Missing), "{missing}");
}

#[test]
fn malformed_attributes_are_errors_that_name_them() {
    for (attribute, text) in [
        ("vendor", "8086\n"),
        ("device", "0x1ffff\n"),
        ("class", "0x1000000\n"),
        ("revision", ""),
        ("resource", "nonsense\n"),
        ("irq", "-1\n"),
        ("numa_node", "first\n"),
        ("sriov_totalvfs", "70000\n"),
    ] {
        let tree = Tree::new();
        fs::write(tree.path(VF_PATH).join(attribute), text).unwrap();
        let error = tree.host().function(VF).unwrap_err();
        assert!(matches!(error.cause, Cause::Malformed(_)), "{attribute}: {error}");
        assert!(error.to_string().contains(attribute), "{error}");
    }
}

#[test]
fn a_link_that_leads_to_no_function_is_malformed() {
    let tree = Tree::new();
    let link = tree.path(VF_PATH).join("physfn");
    fs::remove_file(&link).unwrap();
    symlink("../elsewhere", &link).unwrap();
    assert!(matches!(tree.host().function(VF).unwrap_err().cause, Cause::Malformed(_)));
}

#[test]
fn an_override_is_set_read_back_and_cleared() {
    let tree = Tree::new();
    let host = tree.host();
    let attribute = format!("{VF_PATH}/driver_override");
    host.set_driver_override(VF, Some("pci-stub")).unwrap();
    assert!(tree.get(&attribute).starts_with("pci-stub\n"));
    assert_eq!(host.function(VF).unwrap().driver_override.as_deref(), Some("pci-stub"));
    tree.set(&attribute, "");
    host.set_driver_override(VF, None).unwrap();
    assert_eq!(tree.get(&attribute), "\n");
    for name in ["", "a b", "a\nb", "(null)", &"x".repeat(100)] {
        let error = host.set_driver_override(VF, Some(name)).unwrap_err();
        assert!(matches!(error.cause, Cause::Malformed(_)), "{name}");
    }
    assert!(matches!(host.set_driver_override(ABSENT, None).unwrap_err().cause, Cause::Missing));
}

#[test]
fn a_function_is_unbound_through_its_driver_and_without_one_nothing_happens() {
    let tree = Tree::new();
    tree.host().unbind(PF, LIMIT).unwrap();
    assert_eq!(tree.get("bus/pci/drivers/igb/unbind"), "0000:01:00.0");
    tree.host().unbind(VF, LIMIT).unwrap();
    assert!(matches!(tree.host().unbind(ABSENT, LIMIT).unwrap_err().cause, Cause::Missing));
}

#[test]
fn pciback_is_told_to_forget_a_slot_where_it_is_loaded() {
    let tree = Tree::new();
    tree.host().forget_slot(VF).unwrap();
    fs::create_dir(tree.path("bus/pci/drivers/pciback")).unwrap();
    tree.set("bus/pci/drivers/pciback/remove_slot", "");
    tree.host().forget_slot(VF).unwrap();
    assert_eq!(tree.get("bus/pci/drivers/pciback/remove_slot"), "0000:01:10.0");
}

#[test]
fn probe_reset_and_numbers_of_vfs_go_to_their_attributes() {
    let tree = Tree::new();
    let host = tree.host();
    host.probe(VF, LIMIT).unwrap();
    assert_eq!(tree.get("bus/pci/drivers_probe"), "0000:01:10.0");
    host.reset(VF, LIMIT).unwrap();
    assert_eq!(tree.get("bus/pci/devices/0000:01:10.0/reset"), "1");
    host.set_vf_autoprobe(PF, false).unwrap();
    assert!(tree.get("bus/pci/devices/0000:01:00.0/sriov_drivers_autoprobe").starts_with('0'));
    tree.set("bus/pci/devices/0000:01:00.0/sriov_numvfs", "");
    host.set_num_vfs(PF, 3, LIMIT).unwrap();
    assert_eq!(tree.get("bus/pci/devices/0000:01:00.0/sriov_numvfs"), "3");
    assert!(matches!(host.set_num_vfs(VF, 1, LIMIT).unwrap_err().cause, Cause::Missing));
}

#[test]
fn a_function_without_a_reset_says_so() {
    let tree = Tree::new();
    fs::remove_file(tree.path(VF_PATH).join("reset")).unwrap();
    assert!(matches!(tree.host().reset(VF, LIMIT).unwrap_err().cause, Cause::Unavailable(_)));
    assert!(matches!(tree.host().reset(ABSENT, LIMIT).unwrap_err().cause, Cause::Missing));
}

#[test]
fn config_space_is_opened_by_address() {
    let tree = Tree::new();
    let config = tree.host().config(VF).unwrap();
    assert_eq!(config.size(), 4096);
    assert_eq!(config.read(Access::new(0, 2).unwrap()).unwrap(), 0x8686);
    assert!(matches!(tree.host().config(ABSENT).err().unwrap().cause, Cause::Missing));
}

/// The kernel shows `driver_override` only when a reset has ended; asking for it would block the asker as long.
#[test]
fn a_function_is_read_without_waiting_while_it_is_reset() {
    let tree = Tree::new();
    let fifo = tree.path("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let program = tree.path("program");
    make_script(&program, &format!("read line < {}; echo 0", fifo.display()));
    let host = tree.host();
    host.set_driver_override(VF, Some("pci-stub")).unwrap();
    let host = host.with_child(program);
    let error = host.reset(VF, Duration::from_millis(50)).unwrap_err();
    assert!(matches!(error.cause, Cause::TimedOut(_)), "{error}");

    // Stands for a blocked read: a fifo without a writer.
    let attribute = tree.path(VF_PATH).join("driver_override");
    fs::remove_file(&attribute).unwrap();
    nix::unistd::mkfifo(&attribute, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert_eq!(host.function(VF).unwrap().driver_override.as_deref(), Some("pci-stub"));
    release(&fifo);
}

fn release(fifo: &Path) {
    fs::write(fifo, "go\n").unwrap();
}

#[test]
fn an_expansion_rom_is_read_up_to_a_limit_and_switched_off_again() {
    let tree = Tree::new();
    let host = tree.host();
    let pf = "0000:01:00.0".parse().unwrap();
    assert_eq!(host.rom(pf, 64).unwrap_err().errno(), Some(Errno::ENOENT));
    let file = tree.path("bus/pci/devices/0000:01:00.0/rom");
    fs::write(&file, [0x55; 100]).unwrap();
    for (most, bytes) in [(64, 64), (100, 100), (1 << 20, 100)] {
        assert_eq!(host.rom(pf, most).unwrap().len(), bytes);
        // The kernel's file takes these words at its beginning.
        assert_eq!(fs::read(&file).unwrap()[..2], *b"0\n");
    }
}
