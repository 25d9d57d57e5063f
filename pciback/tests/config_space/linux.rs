//! Masks of fields against those of Linux (`linux/pci_regs.h`, from linux-libc-dev), which were not written from these tables.

use pciback::spec::{self, AnyId, CapabilityId, ExtendedCapabilityId};

const HEADER: &str = "/usr/include/linux/pci_regs.h";

/// The constants whose name begins with a prefix and whose value is a number.
fn constants(header: &str, prefix: &str) -> Vec<(String, u32)> {
    let number = |text: &str| match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => u32::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    };
    let defines = header.lines().filter_map(|line| line.strip_prefix("#define")?.split_once('/'));
    let words = defines.map(|(define, _)| define.split_whitespace().collect::<Vec<_>>());
    words
        .filter(|words| words.len() == 2 && words[0].starts_with(prefix))
        .filter_map(|words| Some((words[0].to_owned(), number(words[1])?)))
        .collect()
}

/// Each constant with this prefix is the mask of one field of this register, but for `others`: values and parts of fields.
fn check(header: &str, prefix: &str, id: AnyId, offset: u16, others: &[&str]) {
    let capability = spec::capability(id).unwrap();
    let grouped = capability.groups.iter().flat_map(|group| group.registers);
    let mut registers = capability.registers.iter().chain(grouped);
    let register = registers.find(|register| register.offset == offset).unwrap();
    let constants = constants(header, prefix);
    assert!(!constants.is_empty(), "{prefix}: nothing in {HEADER}");
    for (name, mask) in constants {
        if others.iter().any(|other| name.starts_with(other)) {
            continue;
        }
        let exact = register.fields.iter().any(|field| field.mask == mask);
        assert!(exact, "{name}: no field of {} is {mask:#x}", register.name);
    }
}

#[test]
fn fields_are_where_linux_has_them() {
    let header = std::fs::read_to_string(HEADER).expect("linux-libc-dev is installed");
    let legacy = AnyId::Legacy;
    let extended = AnyId::Extended;
    let express = legacy(CapabilityId::PCI_EXPRESS);
    let aer = extended(ExtendedCapabilityId::AER);
    let sriov = extended(ExtendedCapabilityId::SR_IOV);
    let power = &["PCI_EXP_SLTCTL_ATTN_IND_", "PCI_EXP_SLTCTL_PWR_"][..];
    let rows: &[(&str, AnyId, u16, &[&str])] = &[
        ("PCI_EXP_FLAGS_", express, 0x02, &[]),
        ("PCI_EXP_DEVCAP_", express, 0x04, &["PCI_EXP_DEVCAP_ATN_", "PCI_EXP_DEVCAP_PWR_IND"]),
        ("PCI_EXP_DEVCTL_", express, 0x08, &["PCI_EXP_DEVCTL_PAYLOAD_", "PCI_EXP_DEVCTL_READRQ_"]),
        ("PCI_EXP_DEVSTA_", express, 0x0a, &[]),
        ("PCI_EXP_LNKCAP_", express, 0x0c, &["PCI_EXP_LNKCAP_SLS_", "PCI_EXP_LNKCAP_ASPM_"]),
        ("PCI_EXP_LNKCTL_", express, 0x10, &["PCI_EXP_LNKCTL_ASPM_"]),
        ("PCI_EXP_LNKSTA_", express, 0x12, &["PCI_EXP_LNKSTA_CLS_", "PCI_EXP_LNKSTA_NLW_"]),
        ("PCI_EXP_SLTCAP_", express, 0x14, &[]),
        ("PCI_EXP_SLTCTL_", express, 0x18, power),
        ("PCI_EXP_SLTSTA_", express, 0x1a, &[]),
        ("PCI_EXP_RTCTL_", express, 0x1c, &[]),
        ("PCI_EXP_RTSTA_", express, 0x20, &[]),
        ("PCI_EXP_DEVCAP2_", express, 0x24, &["PCI_EXP_DEVCAP2_OBFF_MSG", "PCI_EXP_DEVCAP2_OBFF_WAKE"]),
        ("PCI_EXP_DEVCTL2_", express, 0x28, &["PCI_EXP_DEVCTL2_OBFF_"]),
        ("PCI_EXP_LNKCAP2_", express, 0x2c, &["PCI_EXP_LNKCAP2_SLS_"]),
        ("PCI_EXP_LNKCTL2_", express, 0x30, &["PCI_EXP_LNKCTL2_TLS_"]),
        ("PCI_PM_CTRL_", legacy(CapabilityId::POWER_MANAGEMENT), 4, &[]),
        ("PCI_MSI_FLAGS_", legacy(CapabilityId::MSI), 2, &[]),
        ("PCI_MSIX_FLAGS_", legacy(CapabilityId::MSI_X), 2, &["PCI_MSIX_FLAGS_BIRMASK"]),
        ("PCI_X_STATUS_", legacy(CapabilityId::PCI_X), 4, &["PCI_X_STATUS_DEVFN"]),
        ("PCI_CHSWP_", legacy(CapabilityId::COMPACT_PCI_HOT_SWAP), 2, &["PCI_CHSWP_CSR"]),
        ("PCI_ERR_UNC_", aer, 0x04, &["PCI_ERR_UNC_UND"]),
        ("PCI_ERR_UNC_", aer, 0x08, &["PCI_ERR_UNC_UND"]),
        ("PCI_ERR_COR_", aer, 0x10, &["PCI_ERR_COR_STATUS", "PCI_ERR_COR_MASK"]),
        ("PCI_ERR_CAP_", aer, 0x18, &[]),
        ("PCI_ERR_ROOT_CMD_", aer, 0x2c, &[]),
        ("PCI_SRIOV_CTRL_", sriov, 0x08, &[]),
        ("PCI_VC_CAP1_", extended(ExtendedCapabilityId::VIRTUAL_CHANNEL), 0x04, &[]),
        ("PCI_ARI_CTRL_", extended(ExtendedCapabilityId::ARI), 0x06, &[]),
        ("PCI_PRI_CTRL_", extended(ExtendedCapabilityId::PAGE_REQUEST), 0x04, &[]),
        ("PCI_PRI_STATUS_", extended(ExtendedCapabilityId::PAGE_REQUEST), 0x06, &[]),
        ("PCI_PASID_CAP_", extended(ExtendedCapabilityId::PASID), 0x04, &[]),
        ("PCI_PASID_CTRL_", extended(ExtendedCapabilityId::PASID), 0x06, &[]),
        ("PCI_EXP_DPC_CTL_", extended(ExtendedCapabilityId::DPC), 0x06, &["PCI_EXP_DPC_CTL_EN_"]),
        ("PCI_EXP_DPC_STATUS_", extended(ExtendedCapabilityId::DPC), 0x08, &[]),
        ("PCI_L1SS_CAP_", extended(ExtendedCapabilityId::L1_PM_SUBSTATES), 0x04, &[]),
        (
            "PCI_L1SS_CTL1_",
            extended(ExtendedCapabilityId::L1_PM_SUBSTATES),
            0x08,
            &["PCI_L1SS_CTL1_L1_2_MASK", "PCI_L1SS_CTL1_L1SS_MASK"],
        ),
        ("PCI_DOE_CAP_", extended(ExtendedCapabilityId::DOE), 0x04, &[]),
        ("PCI_DOE_CTRL_", extended(ExtendedCapabilityId::DOE), 0x08, &[]),
        ("PCI_DOE_STATUS_", extended(ExtendedCapabilityId::DOE), 0x0c, &[]),
    ];
    for (prefix, id, offset, others) in rows {
        check(&header, prefix, *id, *offset, others);
    }
}
