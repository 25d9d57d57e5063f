//! What a guest reads of a VF through xpcid, compared with what it reads through the kernel's xen-pciback.

use anyhow::{Context, Result, ensure};
use xpci_tests::host::{SOON, guest};
use xpci_tests::{Guest, Lab};

/// What `lspci -vvv -xxxx` says.
pub struct Dump {
    bytes: Vec<u8>,
    text: Vec<String>,
}

/// Bytes that our policy answers otherwise than xen-pciback, each with its reason.
const DIFFERENCES: &[(std::ops::Range<usize>, &str)] = &[
    (0x04..0x06, "Command: a VF's Memory Space Enable reads 1, xen-pciback shows what the guest last wrote"),
    (0x3c..0x3d, "Interrupt Line: a virtual register, 0 until the guest writes it; xen-pciback shows dom0's"),
    (0xa8..0xaa, "Device Control: the guest's own value is kept for it; xen-pciback drops its write"),
];

/// Lines of the text that follow from these bytes.
const DIFFERENT_LINES: &[&str] = &[
    "Control:",
    "Interrupt:",
    "DevCtl:",
    "RlxdOrd",
    "MaxPayload",
    "Latency: 0",
    "Kernel",
    "NUMA",
    "Physical Slot",
];

/// Reads the guest's first function before any driver touched it.
pub fn read(guest: &Guest<'_>) -> Result<Dump> {
    guest.wait_for("the function", SOON, "ls /sys/bus/pci/devices | grep .")?;
    let output = guest.run("lspci -vvv -xxxx").limit(SOON).ok()?;
    let mut bytes = Vec::new();
    let mut text = Vec::new();
    for line in output.lines() {
        let row = line.split_once(": ").filter(|(offset, _)| u16::from_str_radix(offset, 16).is_ok());
        match row {
            Some((_, row)) => {
                for byte in row.split_whitespace() {
                    bytes.push(u8::from_str_radix(byte, 16).with_context(|| line.to_owned())?);
                }
            }
            None => text.push(line.trim().to_owned()),
        }
    }
    ensure!(bytes.len() == 4096, "{} bytes of config space:\n{output}", bytes.len());
    Ok(Dump { bytes, text })
}

/// The same through xl and xen-pciback, for the same VF.
pub fn through_pciback(lab: &Lab, vf: &str) -> Result<Dump> {
    lab.dom0(&format!("xl pci-assignable-add {vf}")).ok()?;
    let peer = guest(lab, "peer")?;
    lab.dom0(&format!("xl pci-attach peer {vf}")).limit(SOON).ok()?;
    let dump = read(&peer)?;
    lab.dom0(&format!("xl pci-detach peer {vf}")).limit(SOON).ok()?;
    lab.dom0("xl destroy peer").ok()?;
    lab.dom0(&format!("xl pci-assignable-remove {vf}")).ok()?;
    Ok(dump)
}

/// They are the same except where our policy says otherwise.
pub fn compare(theirs: &Dump, ours: &Dump) -> Result<()> {
    let listed = |offset: usize| DIFFERENCES.iter().any(|(range, _)| range.contains(&offset));
    for (offset, (their, our)) in theirs.bytes.iter().zip(&ours.bytes).enumerate() {
        ensure!(
            their == our || listed(offset),
            "offset {offset:#x}: xen-pciback {their:#04x}, xpcid {our:#04x}"
        );
    }
    ensure!(ours.bytes[..4] == [0x86, 0x80, 0xca, 0x10], "identity from the PF: {:02x?}", &ours.bytes[..4]);
    ensure!(ours.bytes[4] & 2 == 2, "Memory Space Enable of a VF reads 1");
    let comparable = |dump: &Dump| -> Vec<String> {
        let own = |line: &&String| !DIFFERENT_LINES.iter().any(|start| line.starts_with(start));
        // "disabled" is how lspci shows that Memory Space Enable reads 0.
        dump.text.iter().filter(own).map(|line| line.replace(" [disabled]", "")).collect()
    };
    let (theirs, ours) = (comparable(theirs), comparable(ours));
    let only = |these: &[String], those: &[String]| -> Vec<String> {
        these.iter().filter(|line| !those.contains(line)).cloned().collect()
    };
    let (only_theirs, only_ours) = (only(&theirs, &ours), only(&ours, &theirs));
    ensure!(
        theirs == ours,
        "lspci -vvv differs: xen-pciback alone {only_theirs:#?}, xpcid alone {only_ours:#?}"
    );
    ensure!(
        ours.iter().any(|line| line.contains("[100 v1] Advanced Error Reporting")),
        "extended capabilities"
    );
    Ok(())
}
