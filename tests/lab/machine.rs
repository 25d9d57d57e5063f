//! The machine that QEMU makes, and the traps it has to avoid.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::agent::PORT_NAME;
use crate::image::Images;
use crate::patched;

/// Less than 3 GiB: else the firmware puts VF BARs above 4 GiB, and QEMU truncates those to 32 bits.
const MEMORY_MIB: u32 = 2750;

/// The PCI devices of a machine, each behind a root port of its own: the Nth device added is in slot N.
#[derive(Debug, Clone)]
pub struct Devices {
    args: Vec<String>,
    ports: u32,
}

impl Default for Devices {
    /// An igb (`igb0`, 01:00.0), a virtio-net that reports errors (`e0`, 02:00.0), an NVMe with VFs (`nvme0`, 03:00.0).
    fn default() -> Self {
        Self::none().igb("igb0").device("virtio-net-pci,id=e0,aer=on").nvme("nvme0", 4)
    }
}

impl Devices {
    /// A machine without any.
    pub fn none() -> Self {
        Self { args: Vec::new(), ports: 0 }
    }

    /// Adds a root port `rpN` and behind it this device, in QEMU's words.
    #[must_use]
    pub fn device(mut self, device: &str) -> Self {
        let port = self.port();
        self.arg("-device", format!("{device},bus={port}"))
    }

    /// Adds an empty root port, for hotplug.
    #[must_use]
    pub fn empty_port(mut self) -> Self {
        self.port();
        self
    }

    /// Adds an Intel 82576 with up to 7 VFs, on a network of its own.
    #[must_use]
    pub fn igb(self, id: &str) -> Self {
        self.arg("-netdev", format!("user,id={id}-net,restrict=on"))
            .device(&format!("igb,id={id},netdev={id}-net"))
    }

    /// Adds an NVMe controller with this many VFs and a small namespace. Each VF needs two queues and one vector.
    #[must_use]
    pub fn nvme(self, id: &str, vfs: u16) -> Self {
        let (queues, vectors) = (vfs * 2, vfs);
        let controller = format!(
            "nvme,id={id},serial={id},subsys={id}-subsys,sriov_max_vfs={vfs},sriov_vq_flexible={queues},\
             sriov_vi_flexible={vectors},max_ioqpairs={},msix_qsize={}",
            queues + 2,
            vectors + 2
        );
        self.arg("-device", format!("nvme-subsys,id={id}-subsys"))
            .device(&controller)
            .arg("-blockdev", format!("null-co,node-name={id}-disk,size=16777216,read-zeroes=on"))
            .arg("-device", format!("nvme-ns,bus={id},drive={id}-disk,shared=on"))
    }

    fn port(&mut self) -> String {
        self.ports += 1;
        let n = self.ports;
        self.args.extend(["-device".into(), format!("pcie-root-port,id=rp{n},chassis={n},slot={n}")]);
        format!("rp{n}")
    }

    /// Any other option of QEMU.
    #[must_use]
    pub fn arg(mut self, option: &str, value: String) -> Self {
        self.args.extend([option.to_owned(), value]);
        self
    }
}

/// The QEMU that makes a machine.
#[derive(Debug)]
pub struct Emulator {
    program: OsString,
}

/// Names another QEMU than the host's, for all machines.
const OWN: &str = "XPCI_LAB_QEMU";

impl Emulator {
    /// The host's, or the one that the environment names.
    pub fn of_the_host() -> Self {
        Self { program: own().unwrap_or_else(|| "qemu-system-x86_64".into()) }
    }

    /// The one with corrections, or the one that the environment names.
    pub fn corrected() -> Result<Self> {
        let program = own().map_or_else(|| patched::qemu().map(PathBuf::into_os_string), Ok)?;
        Ok(Self { program })
    }
}

fn own() -> Option<OsString> {
    std::env::var_os(OWN).filter(|path| !path.is_empty())
}

/// `-cpu EPYC` makes Xen fault. Without XSAVE (and so AVX) and FSGSBASE Xen switches the older, simpler register state: with them, programs
/// in dom0 and guests crashed now and then (seen: shells that faulted at their thread's own data, a kernel that failed to decompress).
/// Linux as an HVM guest dies when it switches to page tables of five levels, and when it executes RDTSCP, whose interception QEMU reports
/// as that of RDTSC.
const CPU: &str = "max,xsave=off,fsgsbase=off,la57=off,rdtscp=off";

/// QEMU, ready to start. Its sockets and the initramfs are in `folder`. `root` is the image of dom0's root file system, if it has one: such a
/// machine can be rebooted, and what it writes is in a file of QEMU's own that ends with it.
pub fn command(
    emulator: &Emulator,
    images: &Images,
    root: Option<&Path>,
    devices: &Devices,
    folder: &Path,
) -> Result<Command> {
    let (folder, kernel) = (text(folder)?, text(&images.kernel)?);
    ensure!(
        !format!("{folder}{kernel}").contains([',', ' ']),
        "QEMU cannot take commas or blanks in {folder}, {kernel}"
    );
    let mut qemu = Command::new(&emulator.program);
    qemu.args(["-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", CPU, "-smp", "2"]);
    qemu.args(["-m", &MEMORY_MIB.to_string(), "-display", "none", "-nodefaults", "-serial", "stdio"]);
    match root {
        Some(root) => {
            let image = text(root)?;
            ensure!(!image.contains(','), "QEMU cannot take commas in {image}");
            qemu.args(["-drive", &format!("if=none,id=root,format=raw,snapshot=on,file={image}")]);
            qemu.args(["-device", "virtio-blk-pci,drive=root,addr=1d.0"]);
        }
        None => _ = qemu.arg("-no-reboot"),
    }
    qemu.args(["-qmp", &format!("unix:{folder}/qmp,server=on,wait=off")]);
    qemu.arg("-kernel").arg(&images.hypervisor);
    qemu.args([
        "-initrd",
        &format!("{kernel} console=hvc0 rdinit=/init loglevel=5 log_buf_len=4M,{folder}/dom0.cpio"),
    ]);
    // With x2apic, interrupts reach the wrong CPU. Both logs keep what Xen and dom0's kernel say when they boot, however much
    // comes later.
    qemu.args([
        "-append",
        "console=com1 com1=115200,8n1 conring_size=1m dom0_mem=1200M,max:1200M noreboot loglvl=all guest_loglvl=all x2apic=0",
    ]);
    qemu.args(["-device", "intel-iommu,intremap=on"]);
    qemu.args(["-device", "virtio-serial-pci,id=lab-serial,addr=1e.0"]);
    qemu.args(["-chardev", &format!("socket,id=lab,path={folder}/agent,server=on,wait=off")]);
    qemu.args(["-device", &format!("virtserialport,chardev=lab,name={PORT_NAME}")]);
    qemu.args(&devices.args);
    Ok(qemu)
}

/// Fails where QEMU is absent or lacks the device `igb`.
pub fn check_qemu(emulator: &Emulator) -> Result<()> {
    let hint = "the lab needs QEMU 8.0 or newer with the device `igb`; `make deps` installs it";
    let output = Command::new(&emulator.program).args(["-device", "igb,help"]).output().context(hint)?;
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    ensure!(describes_igb(&said), "{hint}; the one found says: {}", said.trim());
    Ok(())
}

/// Whether this answer to `-device igb,help` describes the device. QEMU's exit status does not show it: it is 0 without the device too.
fn describes_igb(answer: &str) -> bool {
    answer.lines().any(|line| line == "igb options:")
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))
}

#[cfg(test)]
mod tests {
    use super::describes_igb;

    #[test]
    fn qemu_10_describes_igb() {
        assert!(describes_igb(include_str!("../setup/recorded/qemu-10.0.txt")));
    }

    #[test]
    fn qemu_7_2_does_not_know_igb() {
        assert!(!describes_igb(include_str!("../setup/recorded/qemu-7.2.txt")));
    }
}
