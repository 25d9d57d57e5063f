//! The header. All of it is guarded: policies leave it alone.

use super::{Row, row};
use crate::config::policy::{Initial, Treatment};
use crate::spec::header;

/// Where the header is specified.
pub const SECTION: &str = "PCI Express 6.0, 7.5.1";

/// Why BARs are virtual.
pub const BAR_REASON: &str =
    "virtual: the guest sees and sizes the BAR but cannot move what the host has placed and granted";
/// Why the expansion ROM is hidden.
pub const ROM_REASON: &str = "not given: reads 0, as if there were none; decoding it on hardware can switch off BARs (PCI 3.0, 6.2.5.2)";

/// Why the address of the function's own ROM is virtual.
pub const HOST_ROM_REASON: &str =
    "virtual: the guest sees and sizes the device's ROM, which policy gives it, but cannot move it";
/// Why its enable bit is not.
pub const HOST_ROM_ENABLE_REASON: &str = "policy gives the guest the device's ROM: it switches the ROM's decoder; on some devices BARs \
                                          do not answer meanwhile (PCI 3.0, 6.2.5.2)";
/// Why the BAR of the guest's copy is virtual.
pub const ROM_COPY_REASON: &str =
    "virtual: the guest places and enables a copy of the ROM, which policy gives it; hardware's stays off";

/// The header of every function, the BARs excepted.
pub const HEADER: &[Row] = &[
    row(
        header::COMMAND,
        0x0003,
        Treatment::VIRTUAL,
        "hardware decodes as long as the guest may reach the BARs: an access to one that does not would be an error of the host's",
    ),
    row(header::COMMAND, 0x0004, Treatment::Pass, "the driver switches bus mastering of its own function"),
    row(
        header::COMMAND,
        0x0140,
        Treatment::Virtual(Initial::Hardware),
        "whether errors are reported is the host's decision: SERR is pinned on",
    ),
    row(
        header::COMMAND,
        0x0400,
        Treatment::VIRTUAL,
        "hardware has it set when the guest sets it, and whenever INTx could reach only the host",
    ),
    row(
        header::COMMAND,
        0x02b8,
        Treatment::Virtual(Initial::Hardware),
        "bus timing of conventional PCI is the host's; PCI Express hardwires it to 0",
    ),
    row(
        header::CACHE_LINE_SIZE,
        0xff,
        Treatment::Virtual(Initial::Hardware),
        "the host's bus setup; without effect on PCI Express",
    ),
    row(0x0d, 0xff, Treatment::Virtual(Initial::Hardware), "the host's bus setup"),
    row(
        header::HEADER_TYPE,
        0xff,
        Treatment::ZERO,
        "type 0 and never multi-function: a guest gets functions singly",
    ),
    row(header::BIST, 0xcf, Treatment::ZERO, "a self test may disturb the bus for two seconds"),
    row(0x28, 0xffff_ffff, Treatment::ZERO, "points into BARs of CardBus cards; reserved in PCI Express"),
    row(
        header::INTERRUPT_LINE,
        0xff,
        Treatment::Virtual(Initial::Hardware),
        "a note for software; it begins as the number that a PV guest binds",
    ),
];

/// The pin of a function whose guest has no interrupt line of it.
pub const NO_LINE: Row = row(
    header::INTERRUPT_PIN,
    0xff,
    Treatment::ZERO,
    "the guest is given no interrupt line: INTx would not be delivered",
);

/// What a VF's Command is instead (PCI Express 6.0, section 9.3.4.1.3): hardware hardwires all but Bus Master Enable to 0, and
/// decodes memory by VF MSE of the PF.
pub const VF_COMMAND: &[Row] = &[
    row(header::COMMAND, 0x0004, Treatment::Pass, "the driver switches bus mastering of its own function"),
    row(
        header::COMMAND,
        0x0002,
        Treatment::Fixed(0x0002),
        "a VF decodes memory while the PF's VF MSE is set, which the host does: it reads as on",
    ),
    row(header::COMMAND, 0x07f9, Treatment::ZERO, "a VF hardwires these bits to 0"),
];
