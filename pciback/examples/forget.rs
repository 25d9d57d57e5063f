//! `forget BDF`: makes Xen forget a function behind everybody's back, as a tool gone wrong would. For tests of `xpci sync`.

#![expect(clippy::print_stderr, reason = "a tool for tests says what went wrong")]

use std::process::ExitCode;

use pciback::Sbdf;
use pciback::platform::{linux, xen};

fn main() -> ExitCode {
    if let Some(code) = linux::blocking::run_if_child() {
        return code;
    }
    let Some(address) = std::env::args().nth(1).and_then(|text| text.parse::<Sbdf>().ok()) else {
        eprintln!("usage: forget BDF");
        return ExitCode::from(2);
    };
    match xen::open().and_then(|platform| platform.hypervisor.device_remove(address)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("forget: {error}");
            ExitCode::FAILURE
        }
    }
}
