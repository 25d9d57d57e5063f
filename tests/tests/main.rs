//! The lab tests: `cargo test -p xpci-tests --test lab -- WORD` runs the checks with this word in their names.
//!
//! A file is a scene (`tests/scenes`): it names its machine, sets it up once and lists its checks in order.

mod beside_xl;
mod containment;
mod contracts;
mod errors;
mod former_owners;
mod holding;
mod hvm;
mod hvm_devices;
mod lab_smoke;
mod linux_hvm;
mod machines;
mod other_devices;
mod pf_in_a_guest;
mod pf_in_an_hvm_guest;
mod real_dom0;
mod ring;
mod vf;
mod vf_in_a_guest;
mod vf_network;
mod vfs;

use std::process::ExitCode;

use anyhow::Result;
use xpci_tests::scenes;
use xpci_tests::scenes::{Arguments, Machine, run};

/// On Xen 4.17; `make test-long` has the others.
struct Xen417;

impl linux_hvm::Variant for Xen417 {
    const NAME: &'static str = "linux_hvm";
    const MACHINE: &'static Machine = &machines::HOST;
    const LINE: Option<&'static str> = None;
}

type LinuxHvm<'a> = linux_hvm::LinuxHvm<'a, Xen417>;

fn main() -> Result<ExitCode> {
    let arguments = Arguments::read(std::env::args().skip(1))?;
    let scenes = scenes![
        lab_smoke::LabSmoke,
        contracts::Contracts,
        containment::Containment,
        errors::Errors,
        other_devices::OtherDevices,
        vf_network::VfNetwork,
        former_owners::FormerOwners,
        beside_xl::BesideXl,
        vf_in_a_guest::VfInAGuest,
        ring::Ring,
        hvm::Hvm,
        LinuxHvm,
        vfs::Vfs,
        pf_in_a_guest::PfInAGuest,
        pf_in_an_hvm_guest::PfInAnHvmGuest,
        holding::Holding,
        hvm_devices::HvmDevices,
        vf_in_a_guest::newer_xen::NewerXen,
        real_dom0::RealDom0,
        real_dom0::debian_13::Debian13,
    ];
    Ok(if run(&scenes, &arguments)? { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
