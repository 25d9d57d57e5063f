//! The lab tests for which a QEMU of the lab's own is built first, `make test-long`: `cargo test -p xpci-tests --test long -- WORD`.

mod kills;
mod linux_hvm;

use std::process::ExitCode;

use anyhow::Result;
use xpci_tests::scenes;
use xpci_tests::scenes::{Arguments, run};

fn main() -> Result<ExitCode> {
    let arguments = Arguments::read(std::env::args().skip(1))?;
    let scenes = scenes![linux_hvm::LinuxHvm, kills::Kills];
    Ok(if run(&scenes, &arguments)? { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
