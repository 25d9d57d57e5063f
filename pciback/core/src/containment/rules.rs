//! What is set on the path of an assigned function, and why. Rows of data, no code.
//!
//! Sections are those of PCI Express 6.0.

use super::{RegisterPlace, Role, Row};
use crate::spec::{aer, express, header};

/// Every port above, and PFs.
const PATH: &[Role] = &[Role::Physical, Role::Port, Role::RootPort];
/// Every port above.
const PORTS: &[Role] = &[Role::Port, Role::RootPort];
/// The root port alone.
const ROOT: &[Role] = &[Role::RootPort];

/// Errors that software can make a function report by what it requests from the function: by address (Completion Timeout,
/// Completer Abort, Unsupported Request, ACS Violation and the kinds of blocking), or by the answer that it lets it give
/// (Unexpected Completion, Poisoned TLP).
pub const PROVOKABLE: u32 = 1 << 12 | 1 << 14 | 1 << 15 | 1 << 16 | 1 << 20 | 1 << 21 | 0x0f80_0000 | 1 << 31;
/// Correctable Error Mask: Advisory Non-Fatal Error.
const ADVISORY: u32 = 1 << 13;

/// The table, in the order in which they are set: how errors are treated before they are reported.
pub const ROWS: &[Row] = &[
    Row {
        name: "Root Control",
        section: "7.5.3.12",
        place: RegisterPlace::Express(express::ROOT_CONTROL),
        width: 2,
        roles: ROOT,
        mask: 0x0007,
        wanted: 0,
        write_zero: 0,
        busy: 0,
        os_only: true,
        must_hold: true,
        reason: "no System Error: the platform would raise NMI or SMI and take the host down; AER's interrupt is enough",
    },
    Row {
        name: "Uncorrectable Error Severity",
        section: "7.8.4.4",
        place: RegisterPlace::Aer(aer::UNCORRECTABLE_SEVERITY),
        width: 4,
        roles: PATH,
        mask: PROVOKABLE,
        wanted: 0,
        write_zero: 0,
        busy: 0,
        os_only: true,
        must_hold: true,
        reason: "what a guest can provoke is non-fatal: a fatal error resets the link, and with it the PF and all its VFs",
    },
    Row {
        name: "Uncorrectable Error Mask",
        section: "7.8.4.3",
        place: RegisterPlace::Aer(aer::UNCORRECTABLE_MASK),
        width: 4,
        roles: PATH,
        mask: PROVOKABLE,
        wanted: 0,
        write_zero: 0,
        busy: 0,
        os_only: true,
        must_hold: true,
        reason: "what a guest can provoke is reported, or it would go unnoticed",
    },
    Row {
        name: "Correctable Error Mask",
        section: "7.8.4.6",
        place: RegisterPlace::Aer(aer::CORRECTABLE_MASK),
        width: 4,
        roles: PATH,
        mask: ADVISORY,
        wanted: 0,
        write_zero: 0,
        busy: 0,
        os_only: true,
        must_hold: false,
        reason: "Advisory Non-Fatal Errors, as most that a guest provokes become when they are non-fatal (6.2.3.2.4), are reported",
    },
    Row {
        name: "Root Error Command",
        section: "7.8.4.9",
        place: RegisterPlace::Aer(aer::ROOT_ERROR_COMMAND),
        width: 4,
        roles: ROOT,
        mask: 0x0000_0007,
        wanted: 0x0000_0007,
        write_zero: 0,
        busy: 0,
        os_only: true,
        must_hold: false,
        reason: "the root port interrupts for each error message that arrives",
    },
    Row {
        name: "Device Control",
        section: "7.5.3.4",
        place: RegisterPlace::Express(express::DEVICE_CONTROL),
        width: 2,
        roles: PATH,
        mask: 0x000f,
        wanted: 0x000f,
        // Initiate Function Level Reset always reads 0.
        write_zero: 0,
        busy: 0,
        os_only: true,
        must_hold: false,
        reason: "correctable, non-fatal, fatal errors and Unsupported Requests are reported",
    },
    Row {
        name: "Bridge Control",
        section: "7.5.1.3.13",
        place: RegisterPlace::Header(header::BRIDGE_CONTROL),
        width: 2,
        roles: PORTS,
        mask: 1 << 1,
        wanted: 1 << 1,
        // Discard Timer Status is cleared by writing 1.
        write_zero: 1 << 10,
        // Secondary Bus Reset: to write it back would hold the bus in reset.
        busy: 1 << 6,
        os_only: false,
        must_hold: false,
        reason: "SERR# Enable: the port passes error messages from below on to the root port",
    },
    Row {
        name: "Command",
        section: "7.5.1.1.3",
        place: RegisterPlace::Header(header::COMMAND),
        width: 2,
        roles: PATH,
        mask: header::COMMAND_SERR as u32,
        wanted: header::COMMAND_SERR as u32,
        write_zero: 0,
        busy: 0,
        os_only: false,
        must_hold: false,
        reason: "SERR# Enable: uncorrectable errors are reported, and ports pass them on, whatever a guest or driver has switched off",
    },
];
