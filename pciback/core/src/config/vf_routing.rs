//! Where a PF's VFs will be, and whether requests for them get there.

use thiserror::Error;

use super::bytes::Bytes;
use super::list::CapabilityList;
use crate::Sbdf;
use crate::spec::{CapabilityId, ExtendedCapabilityId, express, header, sriov};

/// What a PF's SR-IOV capability says of its VFs' Routing IDs (PCI Express 6.0, section 9.2.1.2). It may say something else when
/// NumVFs or ARI Capable Hierarchy change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VfRouting {
    pf: Sbdf,
    first_offset: u16,
    stride: u16,
    ari_hierarchy: bool,
}

/// The bridge right above a function, as its config space describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortAbove {
    address: Sbdf,
    secondary: u8,
    subordinate: u8,
    /// Requests for other devices than 0 on its secondary bus end here, unless ARI Forwarding is on: a Root Port or a switch's
    /// Downstream Port (PCI Express 6.0, section 7.3.1).
    one_device: bool,
    ari_supported: bool,
    ari_forwarding: bool,
}

/// Why VFs cannot be where the PF's SR-IOV capability puts them.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Unroutable {
    /// The capability puts VFs onto each other, or onto the PF.
    #[error(
        "{pf} gives its VFs no addresses of their own: First VF Offset is {first_offset}, VF Stride is {stride}"
    )]
    NoAddresses {
        /// The PF.
        pf: Sbdf,
        /// First VF Offset.
        first_offset: u16,
        /// VF Stride.
        stride: u16,
    },
    /// They do not fit behind the bridge.
    #[error(
        "{count} VFs of {pf} need the buses {:02x} to {last_bus:02x} (First VF Offset {first_offset}, VF Stride {stride}), but the \
         bridge above it, {port}, leads to {secondary:02x} to {subordinate:02x} only; {fit} VFs fit",
        pf.bus()
    )]
    Buses {
        /// The PF.
        pf: Sbdf,
        /// How many VFs were asked for.
        count: u16,
        /// The bus of the last of them, beyond ff where it is on no bus.
        last_bus: u32,
        /// First VF Offset.
        first_offset: u16,
        /// VF Stride.
        stride: u16,
        /// The bridge.
        port: Sbdf,
        /// Its Secondary Bus Number.
        secondary: u8,
        /// Its Subordinate Bus Number.
        subordinate: u8,
        /// How many VFs have an address that it leads to.
        fit: u16,
    },
    /// The segment ends before they do.
    #[error("{count} VFs of {pf} reach beyond bus ff (First VF Offset {first_offset}, VF Stride {stride})")]
    Segment {
        /// The PF.
        pf: Sbdf,
        /// How many VFs were asked for.
        count: u16,
        /// First VF Offset.
        first_offset: u16,
        /// VF Stride.
        stride: u16,
    },
    /// Their function numbers need ARI.
    #[error(
        "the VF at {vf} is reached only with ARI Forwarding (Device Control 2, bit 5) on the port above, {port}, which {}; \
         ARI Capable Hierarchy of {pf} is {}",
        if *supported { "has it off" } else { "does not support it" },
        if *ari_hierarchy { "set" } else { "clear" }
    )]
    Ari {
        /// The PF.
        pf: Sbdf,
        /// The first VF that would not be reached.
        vf: Sbdf,
        /// The port.
        port: Sbdf,
        /// Whether it could forward.
        supported: bool,
        /// Whether the PF has it enabled.
        ari_hierarchy: bool,
    },
}

impl VfRouting {
    /// Reads a PF's config space; `None` where it has no SR-IOV capability.
    pub fn of(pf: Sbdf, bytes: &[u8]) -> Option<Self> {
        let capability = CapabilityList::walk(bytes).extended(ExtendedCapabilityId::SR_IOV)?.offset;
        Some(Self {
            pf,
            first_offset: bytes.word(capability + sriov::FIRST_VF_OFFSET),
            stride: bytes.word(capability + sriov::VF_STRIDE),
            ari_hierarchy: bytes.word(capability + sriov::CONTROL) & sriov::ARI_CAPABLE_HIERARCHY != 0,
        })
    }

    /// The address of a VF, counted from 0; `None` beyond the end of the segment.
    pub fn address(&self, index: u16) -> Option<Sbdf> {
        self.pf.offset_by(self.distance(index))
    }

    fn distance(&self, index: u16) -> u32 {
        u32::from(self.first_offset) + u32::from(index) * u32::from(self.stride)
    }

    /// Whether requests reach this many VFs, 1 or more, through the bridge above the PF; on a root bus it is unknown which buses
    /// there are.
    pub fn check(&self, count: u16, above: Option<&PortAbove>) -> Result<(), Unroutable> {
        let Self { pf, first_offset, stride, ari_hierarchy } = *self;
        if first_offset == 0 || (stride == 0 && count > 1) {
            return Err(Unroutable::NoAddresses { pf, first_offset, stride });
        }
        let segment_end = || Unroutable::Segment { pf, count, first_offset, stride };
        let Some(port) = above else {
            return self.address(count.saturating_sub(1)).map(drop).ok_or_else(segment_end);
        };
        let bus = |index: u16| u32::from(pf.bus()) + ((u32::from(pf.devfn().0) + self.distance(index)) >> 8);
        let last_bus = bus(count.saturating_sub(1));
        if last_bus > u32::from(port.subordinate) {
            let fit = (0..count).take_while(|index| bus(*index) <= u32::from(port.subordinate));
            return Err(Unroutable::Buses {
                pf,
                count,
                last_bus,
                first_offset,
                stride,
                port: port.address,
                secondary: port.secondary,
                subordinate: port.subordinate,
                fit: fit.count() as u16,
            });
        }
        if port.one_device && !port.ari_forwarding {
            let unreached = |vf: &Sbdf| vf.bus() == port.secondary && vf.device().get() > 0;
            if let Some(vf) = (0..count).filter_map(|index| self.address(index)).find(unreached) {
                let (supported, port) = (port.ari_supported, port.address);
                return Err(Unroutable::Ari { pf, vf, port, supported, ari_hierarchy });
            }
        }
        Ok(())
    }
}

impl PortAbove {
    /// Reads a bridge's config space.
    pub fn of(address: Sbdf, bytes: &[u8]) -> Self {
        let express = CapabilityList::walk(bytes).legacy(CapabilityId::PCI_EXPRESS).map(|found| found.offset);
        let register = |offset: u16| express.map_or(0, |at| bytes.dword(at + offset));
        let port_type = register(0) >> 20 & 0xf;
        Self {
            address,
            secondary: bytes.byte(header::SECONDARY_BUS),
            subordinate: bytes.byte(header::SUBORDINATE_BUS),
            one_device: matches!(port_type, express::ROOT_PORT | express::DOWNSTREAM_PORT),
            ari_supported: register(express::DEVICE_CAPABILITIES_2) & express::ARI_FORWARDING != 0,
            ari_forwarding: register(express::DEVICE_CONTROL_2) & express::ARI_FORWARDING != 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PF: Sbdf = Sbdf::from_devfn(0, 1, 0);
    const PORT: PortAbove = PortAbove {
        address: Sbdf::from_devfn(0, 0, 0x10),
        secondary: 1,
        subordinate: 1,
        one_device: true,
        ari_supported: true,
        ari_forwarding: true,
    };

    fn routing(first_offset: u16, stride: u16) -> VfRouting {
        VfRouting { pf: PF, first_offset, stride, ari_hierarchy: true }
    }

    fn refusal(routing: VfRouting, count: u16, port: &PortAbove) -> String {
        routing.check(count, Some(port)).unwrap_err().to_string()
    }

    #[test]
    fn what_fits_behind_the_port_passes_to_the_last_function_of_the_last_bus() {
        assert_eq!(routing(128, 2).check(7, Some(&PORT)), Ok(()));
        assert_eq!(routing(1, 1).check(255, Some(&PORT)), Ok(()));
        assert_eq!(routing(1, 1).check(511, Some(&PortAbove { subordinate: 2, ..PORT })), Ok(()));
    }

    #[test]
    fn vfs_beyond_the_ports_buses_are_refused_with_the_numbers() {
        assert_eq!(
            refusal(routing(1, 1), 256, &PORT),
            "256 VFs of 0000:01:00.0 need the buses 01 to 02 (First VF Offset 1, VF Stride 1), but the bridge above it, \
             0000:00:02.0, leads to 01 to 01 only; 255 VFs fit"
        );
        let far = refusal(routing(0x180, 2), 1, &PORT);
        assert!(far.contains("buses 01 to 02") && far.ends_with("0 VFs fit"), "{far}");
        // Beyond the segment: no bus at all.
        let last = PortAbove { subordinate: 0xff, ..PORT };
        let beyond = refusal(routing(0xff00, 0x100), 3, &last);
        assert!(beyond.contains("buses 01 to 102"), "{beyond}");
        assert!(beyond.ends_with("0 VFs fit"), "{beyond}");
    }

    #[test]
    fn without_a_bridge_only_the_segment_ends() {
        assert_eq!(routing(1, 1).check(300, None), Ok(()));
        let beyond = routing(0xfe00, 1).check(257, None).unwrap_err().to_string();
        assert_eq!(
            beyond,
            "257 VFs of 0000:01:00.0 reach beyond bus ff (First VF Offset 65024, VF Stride 1)"
        );
    }

    #[test]
    fn vfs_with_a_device_number_need_ari_forwarding_those_on_further_buses_do_not() {
        let off = PortAbove { ari_forwarding: false, subordinate: 2, ..PORT };
        assert_eq!(
            refusal(routing(128, 2), 3, &off),
            "the VF at 0000:01:10.0 is reached only with ARI Forwarding (Device Control 2, bit 5) on the port above, \
             0000:00:02.0, which has it off; ARI Capable Hierarchy of 0000:01:00.0 is set"
        );
        let never = refusal(routing(1, 1), 8, &PortAbove { ari_supported: false, ..off });
        assert!(never.contains("0000:01:01.0") && never.contains("does not support it"), "{never}");
        assert_eq!(routing(1, 1).check(7, Some(&off)), Ok(()), "functions 1 to 7 of device 0");
        assert_eq!(routing(256, 1).check(7, Some(&off)), Ok(()), "on the next bus");
        assert_eq!(routing(128, 2).check(3, Some(&PortAbove { one_device: false, ..off })), Ok(()));
    }

    #[test]
    fn addresses_that_are_none_are_refused() {
        assert!(refusal(routing(0, 1), 1, &PORT).contains("First VF Offset is 0, VF Stride is 1"));
        assert!(refusal(routing(1, 0), 2, &PORT).contains("VF Stride is 0"));
        assert_eq!(routing(1, 0).check(1, Some(&PORT)), Ok(()));
    }

    #[test]
    fn config_space_is_read_as_the_specification_lays_it_out() {
        let mut pf = vec![0; 4096];
        pf[0x100..0x104].copy_from_slice(&0x0001_0010u32.to_le_bytes());
        pf[0x108] = 0x10;
        pf[0x114..0x118].copy_from_slice(&[0x80, 0, 2, 0]);
        assert_eq!(VfRouting::of(PF, &pf), Some(routing(128, 2)));
        assert_eq!(VfRouting::of(PF, &[0; 256]), None);
        let mut port = vec![0; 256];
        (port[6], port[0x34]) = (0x10, 0x40);
        (port[0x19], port[0x1a]) = (1, 1);
        port[0x40..0x44].copy_from_slice(&[0x10, 0, 0x42, 0]);
        (port[0x64], port[0x68]) = (0x20, 0x20);
        assert_eq!(PortAbove::of(PORT.address, &port), PORT);
    }
}
