//! `xpci hvm`: preparations for HVM guests, without the service.

use std::fs;
use std::path::{Path, PathBuf};

use clap::Subcommand;
use pciback::serve::hvm::mcfg;

use super::{Local, Step};
use crate::outcome::{ErrorCode, Failure};
use crate::protocol::Success;

/// Commands for HVM guests.
#[derive(Debug, Subcommand)]
pub enum Hvm {
    /// Writes the ACPI table (MCFG) by which guests find extended config space, for acpi_firmware="PATH" in xl.cfg.
    AcpiTable {
        /// The file to write.
        path: PathBuf,
    },
}

impl Hvm {
    pub(super) fn step(self) -> Step {
        match self {
            Self::AcpiTable { path } => Step::Local(Local::AcpiTable(path)),
        }
    }
}

pub(super) fn write_acpi_table(path: &Path) -> Result<Success, Failure> {
    let shown = path.display();
    fs::write(path, mcfg())
        .map_err(|error| Failure::new(ErrorCode::Failed, format!("cannot write {shown}: {error}")))?;
    let message = format!("{shown} is written; name it in the guest's xl.cfg: acpi_firmware=\"{shown}\"");
    Ok(Success::Changed { message, warnings: Vec::new(), functions: Vec::new() })
}
