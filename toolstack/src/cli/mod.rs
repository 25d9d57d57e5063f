//! The command line of `xpci`.

mod documents;
mod explained;
mod hvm;
mod list;
mod metrics;
mod network;
mod paths;
mod place;
mod policy;
mod service;
mod table;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

pub use place::Place;

use crate::VERSION;
use crate::outcome::{ErrorCode, Failure};
use crate::protocol::{DomainName, Placed, Request, Scope};
use crate::settings::DEFAULT_SOCKET;
use crate::target::Target;

pub use hvm::Hvm;
pub use list::ListArguments;
pub use metrics::gather;
pub use network::SetArguments;
pub use policy::{As, ExplainArguments, Local, Policy};
pub use service::{Choice, ServiceArguments};
pub use table::{Look, bulleted, render};

/// Assigns PCI functions to Xen guests.
///
/// Commands are spelled as xl spells them. PCI addresses are hexadecimal, [SSSS:]BB:DD.F, as in '01:10.0'. Wherever a function is named
/// (BDF, PF, VF), 'PF:N' is VF N of a PF, from 0, and NAME a name of the settings or a network interface in dom0: '01:00.0:3', 'eth0:3',
/// 'eth0'.
#[derive(Debug, Parser)]
#[command(name = "xpci", version = VERSION, max_term_width = 110, after_help = EXIT_CODES)]
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

const EXIT_CODES: &str = "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 service not reachable, 4 no such function or domain, \
                          5 refused because of the present state, 6 failed and quarantined.";

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Lists the host's functions: what they are, and who has them.
    List(ListArguments),
    /// Shows all that is known of a function, and everything that keeps it from a guest, with what to do.
    Show(OneFunction),
    /// Lists the functions that can be attached to a guest.
    PciAssignableList {
        /// Shows also what they are, their drivers and what is to be known of them.
        #[arg(short, long)]
        long: bool,
    },
    /// Takes functions from their drivers and holds them for guests.
    PciAssignableAdd {
        /// Changes nothing: only says what would be done, or all that is in the way.
        #[arg(long)]
        dry_run: bool,
        /// Takes them even while something in dom0 uses them: a mounted file system, an interface that is up.
        #[arg(short, long)]
        force: bool,
        /// Persistently: they are held again after a reboot of the host and whenever they appear, also at another address, until
        /// pci-assignable-remove.
        #[arg(long)]
        persist: bool,
        /// The functions; 'any:PF' is the first VF of a PF that is dom0's and has no driver, another one each time.
        #[arg(required = true, value_name = "BDF")]
        addresses: Vec<Target>,
    },
    /// Gives held functions back to dom0 and to the drivers they came from.
    PciAssignableRemove {
        /// Accepted for xl's sake: the driver always gets its function back.
        #[arg(short = 'r')]
        rebind: bool,
        /// Takes them even from guests that have them persistently (pci-attach --persist) and do not run.
        #[arg(short, long)]
        force: bool,
        /// Accepts that a PV guest that had the function, and still exists, may have its BARs mapped.
        #[arg(long)]
        trust_former_owner: bool,
        /// The functions.
        #[arg(required = true, value_name = "BDF")]
        addresses: Vec<Target>,
    },
    /// Gives held functions to a guest: of several, all or none.
    PciAttach {
        /// Changes nothing: only says what would be done, or all that is in the way.
        #[arg(long)]
        dry_run: bool,
        /// Accepts that a PV guest that had the function, and still exists, may have its BARs mapped.
        #[arg(long)]
        trust_former_owner: bool,
        /// Persistently: the guest gets it again whenever it starts, and no other guest gets it meanwhile.
        #[arg(long)]
        persist: bool,
        /// The guest, by name or number; with --persist one that does not run by UUID, or by the name of a guest that has functions
        /// persistently.
        domain: String,
        /// The functions, and for each the device number at which the guest shall see it (hexadecimal, 0-1f). xl's options may follow:
        /// 'BDF@SLOT,permissive=1'; those without effect here are named. 'any:PF' is the first VF of a PF that is assignable and kept for
        /// no guest: the answer says which, and each such command gives another one.
        #[arg(required = true, value_name = "BDF[@SLOT]")]
        places: Vec<Place>,
    },
    /// Takes a function from a guest and holds it again.
    PciDetach {
        /// Does not wait for the guest to let go.
        #[arg(short, long)]
        force: bool,
        /// Until the guest starts again, when it has the function persistently.
        #[arg(long)]
        live: bool,
        /// Leaves it to the guest, but no longer persistently. The guest need not run.
        #[arg(long, conflicts_with_all = ["live", "force"])]
        persistent: bool,
        /// The guest, by name or number; one that does not run also by UUID.
        domain: String,
        /// The function.
        #[arg(value_name = "BDF")]
        address: Target,
    },
    /// Lists the functions of a guest.
    PciList {
        /// Lists what guests have persistently (pci-attach --persist), whether they run or not; without a guest, of all.
        #[arg(long)]
        persistent: bool,
        /// The guest, by name or number; one that does not run also by UUID.
        #[arg(required_unless_present = "persistent")]
        domain: Option<String>,
    },
    /// Enables, disables and lists the VFs of a PF.
    #[command(subcommand)]
    Vf(Vf),
    /// Shows, checks, explains and changes what guests may do with the registers of their functions.
    #[command(subcommand)]
    Policy(Policy),
    /// Prepares HVM guests.
    #[command(subcommand)]
    Hvm(Hvm),
    /// Compares what sysfs, Xen and xenstore say of the host's functions, and repairs what they disagree on.
    Sync {
        /// Only shows what would be done.
        #[arg(long)]
        dry_run: bool,
    },
    /// Shows what is set for errors of functions, which they reported, and what was done about them.
    #[command(subcommand)]
    Aer(Aer),
    /// Shows who is hit when a function fails, and who could veto its recovery.
    BlastRadius(OneFunction),
    /// Shows what happened to functions: errors, what was decided, what came of it, and where they stand.
    Events {
        /// Goes on with each event that comes, until it is interrupted.
        #[arg(long)]
        follow: bool,
    },
    /// Shows the functions and guests that the service manages, and current problems.
    Status {
        /// Exits with 1 while there are problems.
        #[arg(long)]
        check: bool,
    },
    /// Prints the state of the service for Prometheus, in its text format.
    Metrics {
        /// Writes it to this file, for node_exporter's textfile collector. If the service does not answer, the file says xpci_up 0.
        #[arg(long, value_name = "FILE")]
        write: Option<PathBuf>,
    },
    /// Checks how dom0 is set up, and says what to do where something is amiss.
    ///
    /// Exits with 0 if nothing is amiss, with 1 otherwise. Without the service, the checks that need it are left out.
    Doctor,
    /// Deals with functions that a failure made unusable.
    #[command(subcommand)]
    Quarantine(Quarantine),
    /// Writes manual pages and shell completions below a folder, for 'make install'.
    #[command(hide = true)]
    Documents {
        /// The folder that is to be 'share'.
        directory: PathBuf,
    },
}

/// What can be done with VFs.
#[derive(Debug, Subcommand)]
pub enum Vf {
    /// Enables VFs of a PF that has none enabled; no native driver takes them.
    Create {
        /// The PF.
        #[arg(value_name = "PF")]
        address: Target,
        /// How many, from 1 to the PF's total.
        count: u16,
        /// For a PF that has no driver: binds it to pci-pf-stub, which manages nothing, until 'vf destroy'.
        #[arg(long)]
        unmanaged: bool,
    },
    /// Makes a PF have this many VFs; where it has another number, all are disabled first, as the kernel wants it.
    SetCount {
        /// The PF.
        #[arg(value_name = "PF")]
        address: Target,
        /// How many, from 0 to the PF's total.
        count: u16,
    },
    /// Disables all VFs of a PF; refused while a guest has one.
    Destroy {
        /// The PF.
        #[arg(value_name = "PF")]
        address: Target,
    },
    /// Lists VFs.
    List {
        /// Only those of this PF.
        #[arg(value_name = "PF")]
        address: Option<Target>,
    },
    /// Sets network settings of a held or attached VF through its PF, until it goes back to dom0.
    ///
    /// They are in force at once, put in force again at each attach, and what was there before the first 'vf set' comes back
    /// with pci-assignable-remove. A reboot of the host discards them, but for those set with --persist.
    Set(SetArguments),
    /// Shows the network settings of a VF, or of all VFs of a PF: in force, as the PF's driver reports them, and wished.
    Show {
        /// The VF or PF.
        #[arg(value_name = "VF|PF")]
        address: Target,
    },
}

/// What can be asked about errors.
#[derive(Debug, Subcommand)]
pub enum Aer {
    /// Shows the registers that decide over errors, of functions and of everybody above them: as they read, as they are while a
    /// function is assigned, and as they were before.
    Status {
        /// The function; without it, all that the service looks after.
        #[arg(value_name = "BDF")]
        address: Option<Target>,
    },
    /// Shows the last errors of a function, what was decided, the registers then read, and what came of it.
    History(OneFunction),
}

/// What can be done with quarantined functions.
#[derive(Debug, Subcommand)]
pub enum Quarantine {
    /// Resets a quarantined function and, when that is verified, holds it again.
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

/// What is wrong with a command line, and how it is written, without the words around.
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
        None => failure.hint("'xpci help' shows how commands are written"),
    }
}

/// One thing that a command does.
#[derive(Debug)]
pub enum Step {
    /// Asks the service.
    Ask(Request<Target>),
    /// Does it without the service.
    Local(Local),
    /// Gathers metrics, and writes them to a file.
    Metrics(Option<PathBuf>),
}

impl Command {
    /// How its answer is to look.
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

    /// Whether problems that the answer shows are a failure of the command.
    pub const fn is_check(&self) -> bool {
        matches!(self, Self::Status { check: true })
    }

    /// What is to be said of the command line itself, on standard error.
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

    /// What to do, one after the other.
    pub fn steps(self) -> Vec<Step> {
        match self {
            Self::Policy(policy) => vec![policy.step()],
            Self::Hvm(hvm) => vec![hvm.step()],
            Self::Metrics { write } => vec![Step::Metrics(write)],
            Self::Documents { directory } => vec![Step::Local(Local::Documents(directory))],
            other => other.requests().into_iter().map(Step::Ask).collect(),
        }
    }

    /// The requests to send, one after the other.
    fn requests(self) -> Vec<Request<Target>> {
        let one = |request| vec![request];
        match self {
            Self::Policy(_) | Self::Hvm(_) | Self::Metrics { .. } | Self::Documents { .. } => Vec::new(),
            Self::List(arguments) => one(Request::List { filter: arguments.filter() }),
            Self::Show(function) => one(Request::Show { address: function.address }),
            Self::PciAssignableList { .. } => one(Request::PciAssignableList),
            Self::PciAssignableAdd { addresses, force, persist, dry_run } => addresses
                .into_iter()
                .map(|address| Request::PciAssignableAdd { address, force, persist, dry_run })
                .collect(),
            Self::PciAssignableRemove { addresses, force, trust_former_owner, .. } => addresses
                .into_iter()
                .map(|address| Request::PciAssignableRemove { address, force, trust_former_owner })
                .collect(),
            Self::PciAttach { domain, places, persist, trust_former_owner, dry_run } => {
                let domain = DomainName(domain);
                let placed = |Place { address, slot, .. }| Placed { address, slot };
                let mut functions: Vec<_> = places.into_iter().map(placed).collect();
                match (functions.pop(), functions.is_empty()) {
                    (Some(Placed { address, slot }), true) => one(Request::PciAttach {
                        dry_run,
                        domain,
                        address,
                        slot,
                        persist,
                        trust_former_owner,
                    }),
                    (last, _) => {
                        functions.extend(last);
                        one(Request::PciAttachAll { dry_run, domain, functions, persist, trust_former_owner })
                    }
                }
            }
            Self::PciDetach { domain, address, force, live, persistent } => {
                let scope = match (live, persistent) {
                    (true, _) => Scope::Live,
                    (_, true) => Scope::Persistent,
                    _ => Scope::All,
                };
                one(Request::PciDetach { domain: DomainName(domain), address, force, scope })
            }
            Self::PciList { domain, persistent } => match (domain.map(DomainName), persistent) {
                (Some(domain), false) => one(Request::PciList { domain }),
                (guest, _) => one(Request::PciListPersistent { guest }),
            },
            Self::Vf(Vf::Create { address, count, unmanaged }) => {
                one(Request::VfCreate { address, count, unmanaged })
            }
            Self::Vf(Vf::SetCount { address, count }) => one(Request::VfSetCount { address, count }),
            Self::Vf(Vf::Destroy { address }) => one(Request::VfDestroy { address }),
            Self::Vf(Vf::List { address }) => one(Request::VfList { address }),
            Self::Sync { dry_run } => one(Request::Sync { dry_run }),
            Self::Vf(Vf::Set(arguments)) => one(arguments.request()),
            Self::Vf(Vf::Show { address }) => one(Request::VfShow { address }),
            Self::Aer(Aer::Status { address }) => one(Request::AerStatus { address }),
            Self::BlastRadius(function) => one(Request::BlastRadius { address: function.address }),
            Self::Aer(Aer::History(function)) => one(Request::AerHistory { address: function.address }),
            Self::Events { follow } => one(Request::Events { follow }),
            Self::Status { .. } => one(Request::Status),
            Self::Doctor => one(Request::Doctor),
            Self::Quarantine(Quarantine::Clear { address, trust_former_owner }) => {
                one(Request::QuarantineClear { address, trust_former_owner })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn several_functions_become_several_requests() {
        let cli = Cli::try_parse_from(["xpci", "pci-assignable-add", "01:10.0", "01:10.2"]).unwrap();
        assert_eq!(cli.command.requests().len(), 2);
    }

    #[test]
    fn several_functions_for_one_guest_are_one_request() {
        let attach = |functions: &[&str]| {
            let words = ["xpci", "pci-attach", "web"].iter().chain(functions);
            Cli::try_parse_from(words).unwrap().command.requests().remove(0)
        };
        assert_eq!(attach(&["01:00.0@5"]).name(), "pci-attach");
        let Request::PciAttachAll { functions, .. } = attach(&["01:00.0@5", "01:00.1"]) else { panic!() };
        let slots: Vec<_> =
            functions.iter().map(|placed| (placed.address.to_string(), placed.slot)).collect();
        assert_eq!(slots, [("0000:01:00.0".to_owned(), Some(5)), ("0000:01:00.1".to_owned(), None)]);
    }
}
