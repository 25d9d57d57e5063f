//! The command line of `xpcid`.

use std::path::PathBuf;
use std::str::FromStr;

use clap::Parser;

use crate::VERSION;

/// Serves PCI functions to Xen guests.
#[derive(Debug, Parser)]
#[command(name = "xpcid", version = VERSION, max_term_width = 110)]
pub struct ServiceArguments {
    /// The host: 'xen' (this dom0), or 'sim:FILE', a simulated host that a YAML file describes.
    #[arg(long, default_value = "xen")]
    pub platform: Choice,
    /// The settings; without it, /etc/xpci/xpcid.yaml if that exists.
    #[arg(long, value_name = "FILE")]
    pub settings: Option<PathBuf>,
    /// Replaces run-directory of the settings.
    #[arg(long, value_name = "DIRECTORY")]
    pub run_directory: Option<PathBuf>,
    /// Replaces state-directory of the settings.
    #[arg(long, value_name = "DIRECTORY")]
    pub state_directory: Option<PathBuf>,
    /// Replaces policy-directories of the settings; may be given several times.
    #[arg(long = "policies", value_name = "DIRECTORY")]
    pub policy_directories: Vec<PathBuf>,
    /// Only checks the settings and the policies. Exits with 1 if there is a mistake, and names the first one of the settings or all
    /// of the policies.
    #[arg(long)]
    pub check: bool,
    /// Takes over from the process at the other end of standard input; see 'xpci daemon-reexec'.
    #[arg(long, hide = true)]
    pub successor: bool,
}

/// The platform to run on.
#[derive(Debug, Clone)]
pub enum Choice {
    /// This dom0.
    Xen,
    /// A simulated host that this file describes.
    Simulation(PathBuf),
}

impl FromStr for Choice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "xen" => Ok(Self::Xen),
            Some(("sim", file)) if !file.is_empty() => Ok(Self::Simulation(file.into())),
            _ => Err("must be 'xen' or 'sim:FILE'".to_owned()),
        }
    }
}
