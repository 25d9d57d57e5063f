//! The lab tests that `make test` has no time for, `make test-long`: `cargo test -p xpci-tests --test long -- WORD`.

mod kills;
#[path = "../tests/linux_hvm.rs"]
mod linux_hvm;

use std::process::ExitCode;

use anyhow::Result;
use xpci_tests::host::builder;
use xpci_tests::scenes::{Arguments, Machine, run};
use xpci_tests::{XenVersion, scenes};

static NEWER_XEN: Machine = Machine {
    name: "newer-xen",
    builder: || Ok(builder().xen(XenVersion::V4_20).hvm_guests()),
    clean: |_| Ok(()),
    end: None,
};

/// Xen 4.20 as it is: Linux takes MSI by vectors there.
struct ByVectors;

impl linux_hvm::Variant for ByVectors {
    const NAME: &'static str = "linux_hvm_newer_xen";
    const MACHINE: &'static Machine = &NEWER_XEN;
    const LINE: Option<&'static str> = None;
}

type LinuxByVectors<'a> = linux_hvm::LinuxHvm<'a, ByVectors>;

/// Xen 4.20 where it offers the guest interrupts as events.
struct ByEvents;

impl linux_hvm::Variant for ByEvents {
    const NAME: &'static str = "linux_hvm_newer_xen_by_events";
    const MACHINE: &'static Machine = &NEWER_XEN_AGAIN;
    const LINE: Option<&'static str> = Some("hvm_pirq=1");
}

type LinuxByEvents<'a> = linux_hvm::LinuxHvm<'a, ByEvents>;

static NEWER_XEN_AGAIN: Machine = Machine { name: "newer-xen-by-events", ..NEWER_XEN };

fn main() -> Result<ExitCode> {
    let arguments = Arguments::read(std::env::args().skip(1))?;
    let scenes = scenes![LinuxByVectors, LinuxByEvents, kills::Kills];
    Ok(if run(&scenes, &arguments)? { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
