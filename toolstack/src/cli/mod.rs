//! The command line of `xpci`.

mod documents;
mod explained;
mod functions;
mod hvm;
mod list;
mod mailbox;
mod metrics;
mod moving;
mod network;
mod paths;
mod pci_spec;
mod policy;
mod requests;
mod service;
mod table;
mod texts;
mod typed;
mod xl_config;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

pub use functions::{Functions, SendRequest};
pub use pci_spec::PciSpec;

use crate::VERSION;
use crate::outcome::{ErrorCode, Failure};
use crate::protocol::Request;
use crate::settings::DEFAULT_SOCKET;
use crate::target::Target;

pub use hvm::Hvm;
pub use list::ListArguments;
pub use mailbox::Mailbox;
pub use metrics::gather;
pub use moving::Moving;
use moving::{MigrateArguments, RestoreArguments, SaveArguments};
pub use network::SetArguments;
pub use policy::{As, ExplainArguments, Local, Policy};
pub use service::{Choice, ServiceArguments};
pub use table::{Look, bulleted, nothing_listed, printable, render};
pub use typed::typed;

/// Assigns PCI functions to Xen guests.
///
/// Commands follow the syntax of xl. A function (BDF, PF, VF) is given by its address, hexadecimal, [SSSS:]BB:DD.F, as in '01:10.0'; by
/// a name of the settings; by the name of its network interface in dom0; or as 'PF:N', VF N of a PF, from 0: 'eth0', 'eth0:3',
/// '01:00.0:3'. A guest is given by its name or its domain number.
#[derive(Debug, Parser)]
#[command(name = "xpci", version = VERSION, max_term_width = 110)]
#[command(after_help = texts::EXIT_CODES, after_long_help = texts::GENERAL)]
pub struct Cli {
    /// Prints the answer as one JSON object.
    #[arg(long, global = true)]
    pub json: bool,
    /// The service's control socket.
    #[arg(long, global = true, value_name = "PATH", default_value = DEFAULT_SOCKET, env = "XPCI_SOCKET")]
    pub socket: PathBuf,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Lists the host's functions and who has them.
    #[command(after_long_help = texts::LIST)]
    List(ListArguments),
    /// Shows the properties of a function, and everything that prevents attaching it, with what to do.
    Show(OneFunction),
    /// Lists the functions that can be attached to a guest.
    PciAssignableList {
        /// Shows their ids, states and drivers too.
        #[arg(short, long)]
        long: bool,
    },
    /// Takes functions from their drivers and holds them for guests.
    ///
    /// A held function is bound to xen-pciback (or pci-stub), and Xen's quarantine domain owns it.
    PciAssignableAdd {
        /// Changes nothing: shows what would be done, or everything that prevents it.
        #[arg(long)]
        dry_run: bool,
        /// Takes them even if dom0 uses them, for example as a mounted file system or an interface that is up.
        #[arg(short, long)]
        force: bool,
        /// Makes it persistent: they are held again after a reboot of the host and whenever they appear, also at another address, until
        /// pci-assignable-remove.
        #[arg(long)]
        persist: bool,
        /// The functions; 'any:PF' is the first VF of a PF that belongs to dom0 and has no driver, another one each time;
        /// 'BB:DD.*' is all functions of a device.
        #[arg(required = true, value_name = "BDF")]
        functions: Vec<Functions>,
    },
    /// Returns held functions to dom0 and to the drivers that they had.
    PciAssignableRemove {
        /// Has no effect, for compatibility with xl: functions always return to their drivers.
        #[arg(short = 'r')]
        rebind: bool,
        /// Also functions that are persistent for a guest (pci-attach --persist); ends that.
        #[arg(short, long)]
        force: bool,
        /// Accepts that a PV guest that had the function, and still exists, may have its BARs mapped.
        #[arg(long)]
        trust_former_owner: bool,
        /// The functions; 'BB:DD.*' is those of a device that are held.
        #[arg(required = true, value_name = "BDF")]
        functions: Vec<Functions>,
    },
    /// Gives held functions to a guest: all of them, or changes nothing.
    #[command(after_long_help = texts::ATTACH)]
    PciAttach {
        /// Changes nothing: shows what would be done, or everything that prevents it.
        #[arg(long)]
        dry_run: bool,
        /// Accepts that a PV guest that had the function, and still exists, may have its BARs mapped.
        #[arg(long)]
        trust_former_owner: bool,
        /// Makes it persistent: the guest gets it again each time it starts, and no other guest gets it meanwhile.
        #[arg(long)]
        persist: bool,
        /// Takes functions that dom0 has from their drivers first, and gives these back when the guest has released them. A PV guest can
        /// reach what it had until it ends: a function goes back then.
        #[arg(long, conflicts_with = "persist")]
        managed: bool,
        /// The guest, by name or number. With --persist, a guest that does not run is given by its UUID, or by its name if it has
        /// other persistent functions.
        domain: String,
        /// The functions, each with the device number at which the guest sees it (hexadecimal, 0-1f). Options of xl may follow, as in
        /// 'BDF@SLOT,permissive=1'. 'any:PF' is the first VF of a PF that is assignable and reserved for no guest: the answer names it, and
        /// each such command gives another one. 'BB:DD.*' is all functions of a device.
        #[arg(required = true, value_name = "BDF[@SLOT]")]
        places: Vec<PciSpec>,
    },
    /// Takes a function from a guest and holds it again.
    ///
    /// A guest that does not release it in time (guest-limit-seconds in the settings) loses it.
    PciDetach {
        /// Does not ask the guest to release it.
        #[arg(short, long)]
        force: bool,
        /// Keeps it persistent: the guest gets it again the next time it starts.
        #[arg(long)]
        live: bool,
        /// Only ends that it is persistent; a guest that runs keeps it until it ends.
        #[arg(long, conflicts_with_all = ["live", "force"])]
        persistent: bool,
        /// The guest, by name or number; one that does not run, also by UUID.
        domain: String,
        /// The function; 'BB:DD.*' is those of a device that this guest has.
        #[arg(value_name = "BDF")]
        functions: Functions,
    },
    /// Lists the functions of a guest.
    PciList {
        /// Lists persistent functions (pci-attach --persist), whether the guests run or not; without DOMAIN, of all guests.
        #[arg(long)]
        persistent: bool,
        /// The guest, by name or number; one that does not run, also by UUID.
        #[arg(required_unless_present = "persistent")]
        domain: Option<String>,
    },
    /// Saves a PV guest with 'xl save', without its functions, which are reserved for it until it is restored.
    #[command(after_long_help = texts::SAVE)]
    Save(SaveArguments),
    /// Restores a guest with 'xl restore' and gives it the functions that it was saved with, or equal ones, before it runs on.
    #[command(after_long_help = texts::RESTORE)]
    Restore(RestoreArguments),
    /// Moves a PV guest to another host, where it gets functions equal to those that it has here.
    #[command(after_long_help = texts::MIGRATE)]
    Migrate(MigrateArguments),
    /// Receives a guest from 'xpci migrate' on another host, which runs this command over ssh.
    MigrateReceive,
    /// Enables, disables and lists the VFs of a PF.
    #[command(subcommand)]
    Vf(Vf),
    /// Exchanges messages with guests that have VFs.
    #[command(subcommand)]
    Mailbox(Mailbox),
    /// Shows, checks and explains what guests may do with the registers of their functions.
    #[command(subcommand)]
    Policy(Policy),
    /// Prepares HVM guests.
    #[command(subcommand)]
    Hvm(Hvm),
    /// Prints settings of xpcid for the functions that an xl configuration file gives its guest with pci = [...].
    XlConfig {
        /// The file, as 'xl create' takes it.
        file: PathBuf,
    },
    /// Compares the host's functions in sysfs, Xen and xenstore, and repairs differences.
    Sync {
        /// Changes nothing: shows what would be repaired.
        #[arg(long)]
        dry_run: bool,
    },
    /// Shows how errors of functions are reported, and the last errors.
    #[command(subcommand)]
    Aer(Aer),
    /// Shows which functions and guests a failure of a function affects, and which drivers can veto recovery.
    BlastRadius(OneFunction),
    /// Shows the last events: errors, decisions, outcomes, changes of state, of VFs and of policies.
    Events {
        /// Continues with each new event until interrupted, also when xpcid restarts; with --json, one object a line.
        #[arg(long)]
        follow: bool,
    },
    /// Shows the functions and guests that the service manages, and current problems.
    #[command(after_long_help = texts::STATUS)]
    Status {
        /// Exits with 1 while there are problems.
        #[arg(long)]
        check: bool,
    },
    /// Prints metrics of the service in Prometheus' text format.
    Metrics {
        /// Writes them to this file, for node_exporter's textfile collector. If the service does not answer, the file contains
        /// 'xpci_up 0' alone.
        #[arg(long, value_name = "FILE")]
        write: Option<PathBuf>,
    },
    /// Checks dom0's configuration, and shows how to correct what is wrong.
    ///
    /// Exits with 0 if nothing is wrong, otherwise with 1. Without the service, the checks that need it are left out.
    Doctor,
    /// Starts the installed xpcid in place of the running one, for example after an upgrade.
    ///
    /// The running one serves its guests until the new one is ready, and goes on if the new one cannot start. Settings of its systemd unit
    /// come into force with 'systemctl restart xpcid' only.
    DaemonReexec,
    /// Clears the quarantine of functions.
    #[command(subcommand)]
    Quarantine(Quarantine),
    /// Writes manual pages and shell completions below a folder, for 'make install'.
    #[command(hide = true)]
    Documents {
        /// The folder 'share'.
        directory: PathBuf,
    },
}

/// Commands for VFs.
#[derive(Debug, Subcommand)]
pub enum Vf {
    /// Enables VFs of a PF that has none enabled. No native driver binds to them.
    Create {
        /// The PF.
        #[arg(value_name = "PF")]
        address: Target,
        /// The number of VFs, from 1 to the PF's total.
        count: u16,
        /// For a PF without a driver: binds it to pci-pf-stub, which does not manage VFs, until 'vf destroy'.
        #[arg(long)]
        unmanaged: bool,
    },
    /// Sets the number of VFs of a PF. To change it, the kernel requires that all VFs are disabled first.
    SetCount {
        /// The PF.
        #[arg(value_name = "PF")]
        address: Target,
        /// The number of VFs, from 0 to the PF's total.
        count: u16,
    },
    /// Disables all VFs of a PF. Refused while one is held or a guest has one.
    Destroy {
        /// The PF.
        #[arg(value_name = "PF")]
        address: Target,
    },
    /// Lists VFs.
    List {
        /// The PF; without it, the VFs of all PFs.
        #[arg(value_name = "PF")]
        address: Option<Target>,
    },
    /// Sets network settings of a held or attached VF through the driver of its PF.
    ///
    /// They apply at once and again at each attach. pci-assignable-remove restores the settings from before the first 'vf set'. A reboot of
    /// the host discards them, except those set with --persist.
    Set(SetArguments),
    /// Shows the network settings of a VF, or of all VFs of a PF: those in force, as the PF's driver reports them, and those requested.
    ///
    /// Of a PF, also what the registers of its SR-IOV capability have now, and which guest has each VF.
    Show {
        /// The VF or PF.
        #[arg(value_name = "VF|PF")]
        address: Target,
    },
}

/// Commands for errors.
#[derive(Debug, Subcommand)]
pub enum Aer {
    /// Shows the registers that control error reporting, of functions and of all ports above them: their present values, the values
    /// while a function is assigned, and the values before.
    Status {
        /// The function; without it, all functions that the service manages.
        #[arg(value_name = "BDF")]
        address: Option<Target>,
    },
    /// Shows the last errors of a function with the decision, the registers read then, and the outcome.
    History(OneFunction),
}

/// Commands for quarantined functions.
#[derive(Debug, Subcommand)]
pub enum Quarantine {
    /// Resets a quarantined function, verifies the reset, and holds the function again.
    Clear {
        /// Accepts that a PV guest that had the function, and still exists, may have its BARs mapped.
        #[arg(long)]
        trust_former_owner: bool,
        /// The function.
        #[arg(value_name = "BDF")]
        address: Target,
    },
}

/// One function.
#[derive(Debug, Args)]
pub struct OneFunction {
    /// The function.
    #[arg(value_name = "BDF")]
    pub address: Target,
}

/// A failure from clap's error: its message and the usage line.
pub fn usage(error: &clap::Error) -> Failure {
    let text = error.to_string();
    let mut paragraphs =
        text.split("\n\n").map(|paragraph| paragraph.split_whitespace().collect::<Vec<_>>().join(" "));
    let first = paragraphs.next().unwrap_or_default();
    let message = match error.kind() {
        clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => "a command is missing".to_owned(),
        _ => first.strip_prefix("error: ").unwrap_or(&first).to_owned(),
    };
    let failure = Failure::new(ErrorCode::Usage, message);
    match paragraphs.find_map(|paragraph| paragraph.strip_prefix("Usage: ").map(str::to_owned)) {
        Some(usage) => failure.hint(usage),
        None => failure.hint("'xpci help' shows the syntax"),
    }
}

/// One step of a command.
#[derive(Debug)]
pub enum Step {
    /// Sends a request to the service.
    Ask(Request<Target>),
    /// Runs without the service.
    Local(Local),
    /// Sends a request for messages to the service again and again, until interrupted.
    FollowMessages(Request<Target>),
    /// Sends requests to the service, and runs xl.
    Moving(Moving),
    /// Reads metrics, and writes them to a file.
    Metrics(Option<PathBuf>),
}

impl Command {
    /// The format of the answer.
    pub fn look(&self) -> Look {
        let width = std::env::var("COLUMNS").ok().and_then(|columns| columns.parse().ok());
        let width = width.or_else(|| terminal_size::terminal_size().map(|(width, _)| width.0.into()));
        let mut look = Look { width: width.filter(|width| *width > 0), ..Look::default() };
        match self {
            Self::List(arguments) => look.tree = arguments.tree,
            Self::PciAssignableList { long } => look.addresses_only = !long,
            _ => {}
        }
        look
    }

    /// Whether problems in the answer count as a failure of the command.
    pub const fn is_check(&self) -> bool {
        matches!(self, Self::Status { check: true })
    }

    /// Blocks interrupts for a command that must not be interrupted between its steps.
    ///
    /// # Errors
    /// Blocking the signals failed.
    pub fn block_interrupts(&self) -> Result<(), Failure> {
        match self {
            Self::Save(_) | Self::Restore(_) | Self::Migrate(_) | Self::MigrateReceive => {
                moving::block_interrupts()
            }
            _ => Ok(()),
        }
    }

    /// Notes about the command line itself, for standard error.
    pub fn notes(&self) -> Vec<&'static str> {
        match self {
            Self::PciAttach { places, .. } => {
                let mut notes: Vec<_> = places.iter().flat_map(|place| place.notes.iter().copied()).collect();
                notes.dedup();
                notes
            }
            _ => Vec::new(),
        }
    }

    /// The steps of the command, in their order. `ask` is used to request the functions of a device.
    pub fn steps(self, ask: &mut SendRequest<'_>) -> Result<Vec<Step>, Failure> {
        Ok(match self {
            Self::Policy(policy) => vec![policy.step()],
            Self::Hvm(hvm) => vec![hvm.step()],
            Self::Mailbox(mailbox) => vec![mailbox.step()?],
            Self::Save(arguments) => vec![Step::Moving(Moving::Save(arguments))],
            Self::Restore(arguments) => vec![Step::Moving(Moving::Restore(arguments))],
            Self::Migrate(arguments) => vec![Step::Moving(Moving::Migrate(arguments))],
            Self::MigrateReceive => vec![Step::Moving(Moving::Receive)],
            Self::Metrics { write } => vec![Step::Metrics(write)],
            Self::XlConfig { file } => vec![Step::Local(Local::XlConfig(file))],
            Self::Documents { directory } => vec![Step::Local(Local::Documents(directory))],
            other => other.requests(ask)?.into_iter().map(Step::Ask).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use pciback::DeviceNumber;

    use super::*;
    use crate::protocol::Success;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    /// For tests without a device, in which no request is sent.
    fn alone(request: Request<Target>) -> Result<Success, Failure> {
        panic!("{request:?}")
    }

    #[test]
    fn several_functions_become_several_requests() {
        let cli = Cli::try_parse_from(["xpci", "pci-assignable-add", "01:10.0", "01:10.2"]).unwrap();
        assert_eq!(cli.command.requests(&mut alone).unwrap().len(), 2);
    }

    #[test]
    fn several_functions_for_one_guest_are_one_request() {
        let attach = |functions: &[&str]| {
            let words = ["xpci", "pci-attach", "web"].iter().chain(functions);
            Cli::try_parse_from(words).unwrap().command.requests(&mut alone).unwrap().remove(0)
        };
        assert_eq!(attach(&["01:00.0@5"]).name(), "pci-attach");
        let Request::PciAttachAll { functions, .. } = attach(&["01:00.0@5", "01:00.1"]) else { panic!() };
        let slots: Vec<_> =
            functions.iter().map(|placed| (placed.address.to_string(), placed.slot)).collect();
        assert_eq!(
            slots,
            [("0000:01:00.0".to_owned(), DeviceNumber::new(5)), ("0000:01:00.1".to_owned(), None)]
        );
    }
}
