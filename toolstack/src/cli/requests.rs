//! The requests that a command sends to the service.

use super::functions::Concerned;
use super::{Aer, Command, Functions, PciSpec, Quarantine, SendRequest, Vf};
use crate::outcome::Failure;
use crate::protocol::{DomainName, Placed, Request, Scope};
use crate::target::Target;

impl Command {
    /// The requests, in their order. `ask` is used to request the functions of a device.
    pub(super) fn requests(self, ask: &mut SendRequest<'_>) -> Result<Vec<Request<Target>>, Failure> {
        Ok(match self {
            Self::PciAssignableAdd { functions, force, persist, dry_run } => {
                let managed = false;
                let add = |address| Request::PciAssignableAdd { address, force, persist, managed, dry_run };
                each(functions, Concerned::Every, ask)?.into_iter().map(add).collect()
            }
            Self::PciAssignableRemove { functions, force, trust_former_owner, .. } => {
                let remove = |address| Request::PciAssignableRemove { address, force, trust_former_owner };
                each(functions, Concerned::NotTheHosts, ask)?.into_iter().map(remove).collect()
            }
            Self::PciAttach { domain, places, persist, managed, trust_former_owner, dry_run } => {
                let domain = DomainName(domain);
                vec![match <[_; 1]>::try_from(placed(places, ask)?) {
                    Ok([Placed { address, slot }]) => Request::PciAttach {
                        domain,
                        address,
                        slot,
                        persist,
                        managed,
                        trust_former_owner,
                        dry_run,
                    },
                    Err(functions) => Request::PciAttachAll {
                        domain,
                        functions,
                        persist,
                        managed,
                        trust_former_owner,
                        dry_run,
                    },
                }]
            }
            Self::PciDetach { domain, functions, force, live, persistent } => {
                let scope = scope(live, persistent);
                let detach = |address| {
                    let domain = DomainName(domain.clone());
                    Request::PciDetach { domain, address, force, scope }
                };
                functions.each(Concerned::OfGuest(&domain), ask)?.into_iter().map(detach).collect()
            }
            other => other.request().into_iter().collect(),
        })
    }

    /// The request of a command that sends one, whatever functions the host has.
    fn request(self) -> Option<Request<Target>> {
        Some(match self {
            Self::List(arguments) => Request::List { filter: arguments.filter() },
            Self::Show(function) => Request::Show { address: function.address },
            Self::PciAssignableList { .. } => Request::PciAssignableList,
            Self::PciList { domain, persistent } => match (domain.map(DomainName), persistent) {
                (Some(domain), false) => Request::PciList { domain },
                (guest, _) => Request::PciListPersistent { guest },
            },
            Self::Vf(vf) => vf.request(),
            Self::Aer(Aer::Status { address }) => Request::AerStatus { address },
            Self::Aer(Aer::History(function)) => Request::AerHistory { address: function.address },
            Self::BlastRadius(function) => Request::BlastRadius { address: function.address },
            Self::Sync { dry_run } => Request::Sync { dry_run },
            Self::Events { follow } => Request::Events { follow },
            Self::Status { .. } => Request::Status,
            Self::Doctor => Request::Doctor,
            Self::DaemonReexec => Request::DaemonReexec,
            Self::Quarantine(Quarantine::Clear { address, trust_former_owner }) => {
                Request::QuarantineClear { address, trust_former_owner }
            }
            // They are other steps, or a request for each function.
            Self::Policy(_)
            | Self::Hvm(_)
            | Self::XlConfig { .. }
            | Self::Save(_)
            | Self::Migrate(_)
            | Self::MigrateReceive
            | Self::Restore(_)
            | Self::Mailbox(_)
            | Self::Metrics { .. }
            | Self::Documents { .. }
            | Self::PciAssignableAdd { .. }
            | Self::PciAssignableRemove { .. }
            | Self::PciAttach { .. }
            | Self::PciDetach { .. } => return None,
        })
    }
}

impl Vf {
    fn request(self) -> Request<Target> {
        match self {
            Self::Create { address, count, unmanaged } => Request::VfCreate { address, count, unmanaged },
            Self::SetCount { address, count } => Request::VfSetCount { address, count },
            Self::Destroy { address } => Request::VfDestroy { address },
            Self::List { address } => Request::VfList { address },
            Self::Set(arguments) => arguments.request(),
            Self::Show { address } => Request::VfShow { address },
        }
    }
}

/// What `--live` and `--persistent` choose.
const fn scope(live: bool, persistent: bool) -> Scope {
    match (live, persistent) {
        (true, _) => Scope::Live,
        (_, true) => Scope::Persistent,
        _ => Scope::All,
    }
}

fn each(
    functions: Vec<Functions>,
    concerned: Concerned<'_>,
    ask: &mut SendRequest<'_>,
) -> Result<Vec<Target>, Failure> {
    let lists: Result<Vec<_>, _> = functions.into_iter().map(|one| one.each(concerned, ask)).collect();
    Ok(lists?.concat())
}

/// The functions of an attachment, those of a device each at any device number.
fn placed(places: Vec<PciSpec>, ask: &mut SendRequest<'_>) -> Result<Vec<Placed<Target>>, Failure> {
    let mut functions = Vec::new();
    for PciSpec { functions: named, slot, .. } in places {
        let addresses = named.each(Concerned::Every, ask)?;
        functions.extend(addresses.into_iter().map(|address| Placed { address, slot }));
    }
    Ok(functions)
}
