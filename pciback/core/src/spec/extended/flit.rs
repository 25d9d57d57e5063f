//! Flit mode: its log, its measurements and the injection of errors.

use super::extended;
use crate::spec::register::{
    Field, Kind, Length, Register, WHOLE, constant, control, each, fields, register, rw1c, status, trigger,
};
use crate::spec::{CapabilitySpec, ExtendedCapabilityId};

/// What PCI Express says of them.
pub const CAPABILITIES: &[CapabilitySpec] = &[
    extended(
        ExtendedCapabilityId::FLIT_LOGGING,
        "PCI Express 6.0, 7.7.8",
        Length::Fixed(0x3c),
        Kind::Status,
        LOGGING,
    )
    .with(&[each(
        0x1c,
        2,
        &[register(0, 2, "FBER Measurement Status, lane", &[status(0xffff, "Correctable Counter")])],
    )]),
    extended(
        ExtendedCapabilityId::FLIT_PERFORMANCE,
        "PCI Express 6.0, 7.8.12",
        Length::Fixed(0x24),
        Kind::Status,
        &[
            register(0x04, 4, "Flit Performance Measurement Capability", &[constant(0xffff_ffff, WHOLE)]),
            register(0x08, 4, "Flit Performance Measurement Control", &[control(0xffff_ffff, WHOLE)]),
            register(0x0c, 4, "Flit Performance Measurement Status", &[status(0xffff_ffff, WHOLE)]),
        ],
    )
    .with(&[each(
        0x10,
        4,
        &[register(0, 4, "LTSSM Performance Measurement Status", &[status(0xffff_ffff, WHOLE)])],
    )]),
    extended(
        ExtendedCapabilityId::FLIT_ERROR_INJECTION,
        "PCI Express 6.0, 7.8.13",
        Length::Fixed(0x24),
        Kind::Control,
        ERROR_INJECTION,
    ),
    extended(
        ExtendedCapabilityId::NOP_FLIT,
        "PCI Express 6.3, 7.8.14",
        Length::Fixed(0x14),
        Kind::Status,
        &[
            register(0x04, 4, "NOP Flit Capabilities", &[constant(0xffff_ffff, WHOLE)]),
            register(0x08, 4, "NOP Flit Control 1", &[control(0xffff_ffff, WHOLE)]),
            register(0x0c, 4, "NOP Flit Control 2", &[control(0xffff_ffff, WHOLE)]),
            register(0x10, 4, "NOP Flit Status", &[status(0xffff_ffff, WHOLE)]),
        ],
    ),
];

const LOGGING: &[Register] = &[
    register(
        0x04,
        4,
        "Flit Error Log 1",
        &[
            rw1c(1 << 0, "Flit Error Log Valid"),
            status(0x0000_000e, "Flit Error Link Width"),
            status(0x0000_00f0, "Flit Offset from the Last Logged Flit in Error"),
            status(0x0000_1f00, "Consecutive Flit Error after the Last Flit Error"),
            status(1 << 13, "More Entries for Flit Error Log Register are Valid"),
            status(1 << 14, "Unrecognized Flit"),
            status(1 << 15, "FEC Uncorrectable Error in Flit"),
            status(0x00ff_0000, "Syndrome Parity for ECC Group 0"),
            status(0xff00_0000, "Syndrome Check for ECC Group 0"),
        ],
    ),
    register(
        0x08,
        4,
        "Flit Error Log 2",
        &[
            status(0x0000_00ff, "Syndrome Parity for ECC Group 1"),
            status(0x0000_ff00, "Syndrome Check for ECC Group 1"),
            status(0x00ff_0000, "Syndrome Parity for ECC Group 2"),
            status(0xff00_0000, "Syndrome Check for ECC Group 2"),
        ],
    ),
    register(
        0x0c,
        2,
        "Flit Error Counter Control",
        &[
            control(1 << 0, "Flit Error Counter Enable"),
            control(1 << 1, "Flit Error Counter Interrupt Enable"),
            control(0x000c, "Events to Count"),
            control(0x0ff0, "Trigger Event on Error Count"),
        ],
    ),
    register(
        0x0e,
        2,
        "Flit Error Counter Status",
        &[
            status(0x0007, "Link Width when Error Counter Started"),
            rw1c(1 << 3, "Interrupt Generated based on Trigger Event Count"),
            status(0xff00, "Flit Error Counter"),
        ],
    ),
    register(
        0x10,
        4,
        "FBER Measurement Control",
        &[
            control(1 << 0, "FBER Measurement Enable"),
            trigger(1 << 1, "Clear FBER Counters"),
            control(0x0000_000c, "Granularity of per-Lane Error Reported"),
        ],
    ),
    register(0x14, 4, "FBER Measurement Status 1", &[status(0xffff_ffff, "Flit Counter")]),
    register(0x18, 4, "FBER Measurement Status 2", &[status(0x0000_ffff, "Invalid Flit Counter")]),
];

const ERROR_INJECTION: &[Register] = &[
    register(0x04, 4, "Flit Error Injection Capability", &[]),
    register(
        0x08,
        4,
        "Flit Error Injection Control 1",
        &[
            control(1 << 0, "Flit Error Injection Enable"),
            control(1 << 1, "Inject Errors on Transmitted Flits"),
            control(1 << 2, "Inject Errors on Received Flits"),
            control(0x0000_0fc0, "Flit Error Injection Enable by Data Rate"),
            control(0x001f_0000, "Number of Errors Injected"),
            control(0x1fe0_0000, "Spacing Between Injected Errors"),
            control(0x6000_0000, "Injection on Flit Type"),
        ],
    ),
    register(
        0x0c,
        4,
        "Flit Error Injection Control 2",
        &[
            control(0x0000_0007, "Consecutive Error Injection"),
            control(0x0000_0018, "Error Type Being Injected"),
            control(0x0000_0fe0, "Error Offset within Flit"),
            control(0x000f_f000, "Error Magnitude"),
        ],
    ),
    register(
        0x10,
        4,
        "Flit Error Injection Status",
        &[
            status(0x0000_0003, "Flit Error Tx Injection Status"),
            status(0x0000_000c, "Flit Error Rx Injection Status"),
        ],
    ),
    register(0x14, 4, "Ordered Set Error Injection Control 1", ORDERED_SET_CONTROL),
    register(
        0x18,
        4,
        "Ordered Set Error Injection Control 2",
        &[
            control(0x0000_ffff, "Error Injection Bytes"),
            control(0xffff_0000, "Lane Number for Error Injection"),
        ],
    ),
    register(0x1c, 4, "Ordered Set Error Tx Injection Status", ORDERED_SET_STATUS),
    register(0x20, 4, "Ordered Set Error Rx Injection Status", ORDERED_SET_STATUS),
];

const ORDERED_SET_CONTROL: &[Field] = &[
    control(1 << 0, "Ordered Set Error Injection Enable"),
    control(1 << 1, "Inject Errors on Transmitted Ordered Sets"),
    control(1 << 2, "Inject Errors on Received Ordered Sets"),
    control(0x0000_00f8, "Number of Errors Injected"),
    control(0x0000_ff00, "Spacing Between Injected Errors"),
    control(1 << 16, "Inject Error on TS0"),
    control(1 << 17, "Inject Error on TS1"),
    control(1 << 18, "Inject Error on TS2"),
    control(1 << 19, "Inject Error on SKP"),
    control(1 << 20, "Inject Error on EIEOS"),
    control(1 << 21, "Inject Error on EIOS"),
    control(1 << 22, "Inject Error on SDS"),
    control(1 << 23, "Inject Error in Polling"),
    control(1 << 24, "Inject Error in Configuration"),
    control(1 << 25, "Inject Error in L0"),
    control(1 << 26, "Inject Error in Recovery without Equalization"),
    control(1 << 27, "Inject Error in Equalization Phase 0 and 1"),
    control(1 << 28, "Inject Error in Equalization Phase 2"),
    control(1 << 29, "Inject Error in Equalization Phase 3"),
];

const ORDERED_SET_STATUS: &[Field] = &fields::<14, 14>(
    Kind::Status,
    [
        (0x0000_0003, "TS0"),
        (0x0000_000c, "TS1"),
        (0x0000_0030, "TS2"),
        (0x0000_00c0, "SKP"),
        (0x0000_0300, "EIEOS"),
        (0x0000_0c00, "EIOS"),
        (0x0000_3000, "SDS"),
        (0x0000_c000, "Polling"),
        (0x0003_0000, "Configuration"),
        (0x000c_0000, "L0"),
        (0x0030_0000, "Recovery without Equalization"),
        (0x00c0_0000, "Equalization Phase 0 and 1"),
        (0x0300_0000, "Equalization Phase 2"),
        (0x0c00_0000, "Equalization Phase 3"),
    ],
);
