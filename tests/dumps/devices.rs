//! The two machines whose devices are captured. A device's id is the name of its file.

use xpci_tests::Devices;

/// Options of QEMU, with their values.
type Options = &'static [(&'static str, &'static str)];
/// Id, QEMU's words for the device, what it needs besides.
type Device = (&'static str, &'static str, Options);

/// PCI Express devices.
const EXPRESS: &[Device] = &[
    ("e1000e", "e1000e,netdev=n0", &[("-netdev", "user,id=n0,restrict=on")]),
    ("vmxnet3", "vmxnet3,netdev=n1", &[("-netdev", "user,id=n1,restrict=on")]),
    (
        "virtio-net-aer-ats",
        "virtio-net-pci,netdev=n2,aer=on,ats=on",
        &[("-netdev", "user,id=n2,restrict=on")],
    ),
    ("virtio-net-no-msix", "virtio-net-pci,netdev=n3,vectors=0", &[("-netdev", "user,id=n3,restrict=on")]),
    ("virtio-blk", "virtio-blk-pci,drive=d0", &[("-blockdev", "null-co,node-name=d0,size=1048576")]),
    ("virtio-scsi", "virtio-scsi-pci-non-transitional", &[]),
    ("virtio-rng", "virtio-rng-pci,aer=on", &[]),
    ("virtio-balloon-transitional", "virtio-balloon-pci-transitional", &[]),
    ("virtio-gpu", "virtio-gpu-pci", &[]),
    ("virtio-tablet", "virtio-tablet-pci", &[]),
    ("virtio-crypto", "virtio-crypto-pci,cryptodev=c0", &[("-object", "cryptodev-backend-builtin,id=c0")]),
    ("virtio-sound", "virtio-sound-pci,audiodev=a0", &[("-audiodev", "none,id=a0")]),
    ("qemu-xhci", "qemu-xhci", &[]),
    ("nec-usb-xhci", "nec-usb-xhci", &[]),
    ("megasas-gen2", "megasas-gen2", &[]),
    ("pvscsi", "pvscsi", &[]),
    ("edu", "edu", &[]),
    ("bochs-display", "bochs-display", &[]),
    ("pcie-pci-bridge", "pcie-pci-bridge", &[]),
    ("x3130-upstream", "x3130-upstream", &[]),
    ("ufs", "ufs", &[]),
    ("nvme-plain", "nvme,serial=plain", &[]),
];

/// Conventional PCI devices.
const CONVENTIONAL: &[Device] = &[
    ("e1000", "e1000,netdev=n0", &[("-netdev", "user,id=n0,restrict=on")]),
    ("rtl8139", "rtl8139,netdev=n1", &[("-netdev", "user,id=n1,restrict=on")]),
    ("ne2k-pci", "ne2k_pci,netdev=n2", &[("-netdev", "user,id=n2,restrict=on")]),
    ("pcnet", "pcnet,netdev=n3", &[("-netdev", "user,id=n3,restrict=on")]),
    ("i82559er", "i82559er,netdev=n4", &[("-netdev", "user,id=n4,restrict=on")]),
    ("tulip", "tulip,netdev=n5", &[("-netdev", "user,id=n5,restrict=on")]),
    ("piix3-usb-uhci", "piix3-usb-uhci", &[]),
    ("ich9-usb-ehci1", "ich9-usb-ehci1", &[]),
    ("ich9-usb-uhci1", "ich9-usb-uhci1", &[]),
    ("pci-ohci", "pci-ohci", &[]),
    ("ich9-ahci", "ich9-ahci", &[]),
    ("piix3-ide", "piix3-ide", &[]),
    ("lsi53c895a", "lsi53c895a", &[]),
    ("lsi53c810", "lsi53c810", &[]),
    ("megasas", "megasas", &[]),
    ("mptsas1068", "mptsas1068", &[]),
    ("am53c974", "am53c974", &[]),
    ("dc390", "dc390", &[]),
    ("intel-hda", "intel-hda", &[]),
    ("ich9-intel-hda", "ich9-intel-hda", &[]),
    ("ac97", "AC97,audiodev=a0", &[("-audiodev", "none,id=a0")]),
    ("es1370", "ES1370,audiodev=a1", &[("-audiodev", "none,id=a1")]),
    ("sdhci-pci", "sdhci-pci", &[]),
    ("pci-testdev", "pci-testdev", &[]),
    ("ivshmem-plain", "ivshmem-plain,memdev=m0", &[("-object", "memory-backend-ram,id=m0,size=1M,share=on")]),
    ("i6300esb", "i6300esb", &[]),
    ("tpci200", "tpci200", &[]),
    ("pvpanic-pci", "pvpanic-pci", &[]),
    ("pci-bridge", "pci-bridge,chassis_nr=77", &[]),
    ("pci-serial", "pci-serial,chardev=s0", &[("-chardev", "null,id=s0")]),
    ("virtio-rng-conventional", "virtio-rng-pci-transitional", &[]),
];

/// Adds root port `rpN`; N from 16 on, as the first ones are [`Devices`]' own. Ports share device numbers: there are only 32 on
/// the root bus.
fn port(devices: Devices, n: usize) -> Devices {
    let (device, function) = (1 + n / 8, n % 8);
    let port =
        format!("pcie-root-port,id=rp{n},chassis={n},slot={n},multifunction=on,addr={device:x}.{function}");
    devices.arg("-device", port)
}

fn with(devices: Devices, extra: &[(&str, &str)]) -> Devices {
    extra.iter().fold(devices, |devices, (option, value)| devices.arg(option, (*value).to_owned()))
}

/// What speaks PCI Express, with a switch and CXL.
pub fn express() -> Devices {
    let mut devices = with(Devices::none().igb("igb").nvme("nvme", 4), &[("-machine", "cxl=on")]);
    for (index, (id, device, needs)) in EXPRESS.iter().enumerate() {
        devices = port(with(devices, needs), index + 16)
            .arg("-device", format!("{device},id={id},bus=rp{}", index + 16));
    }
    with(
        devices,
        &[
            ("-device", "pcie-root-port,id=pcie-root-port,chassis=100,slot=100,addr=10.0"),
            ("-device", "ioh3420,id=ioh3420,chassis=101,slot=101,addr=11.0"),
            ("-device", "xio3130-downstream,id=xio3130-downstream,bus=x3130-upstream,chassis=102,slot=102"),
            ("-device", "vmware-svga,id=vmware-svga,bus=pcie.0"),
            ("-device", "pxb-cxl,id=rp-cxl,bus_nr=128,bus=pcie.0,addr=12.0"),
            ("-device", "cxl-rp,id=cxl-rp,bus=rp-cxl,chassis=103,slot=103,port=0"),
            ("-object", "memory-backend-ram,id=cxl-memory,size=256M,share=on"),
            ("-device", "cxl-type3,id=cxl-type3,bus=cxl-rp,volatile-memdev=cxl-memory,sn=0x1234"),
        ],
    )
}

/// Conventional PCI, all on one bus.
pub fn conventional() -> Devices {
    let mut devices = with(
        port(Devices::none(), 16),
        &[
            ("-device", "pcie-pci-bridge,id=rp-bus,bus=rp16"),
            ("-device", "i82801b11-bridge,id=i82801b11-bridge"),
        ],
    );
    for (index, (id, device, needs)) in CONVENTIONAL.iter().enumerate() {
        devices =
            with(devices, needs).arg("-device", format!("{device},id={id},bus=rp-bus,addr={:x}", index + 1));
    }
    // Graphics are used to the root bus's windows. QEMU has one VGA core for `VGA` and `vmware-svga`: each is in a machine of
    // its own.
    with(devices, &[("-device", "VGA,id=vga,bus=pcie.0"), ("-device", "cirrus-vga,id=cirrus-vga,bus=pcie.0")])
}
