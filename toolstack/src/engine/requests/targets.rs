//! Resolves the functions that clients name to addresses, before a request is handled.

use pciback::policy::Reuse;
use pciback::{FunctionState, Sbdf};

use super::obstacles::reuse_with;
use crate::domains;
use crate::engine::tasks::TaskContext;
use crate::engine::{Engine, Event};
use crate::names;
use crate::outcome::{ErrorCode, Failure};
use crate::protocol::{DomainName, Request};
use crate::reply::Reply;
use crate::reservations::Reservation;
use crate::spec::existing;
use crate::target::{Parent, Target};

fn needed_for(request: &Request<Target>, context: &TaskContext) -> Needed {
    let all_read = context.handover.recognition.has_ended();
    match request {
        Request::PciAttach { persist: true, .. } => Needed::Its,
        Request::PciAttach { .. } | Request::PciAttachAll { .. } | Request::PciAssignableRemove { .. }
            if context.needs_devices() =>
        {
            Needed::Its
        }
        // Otherwise the reservation of another device might end.
        Request::PciDetach { .. } if !all_read => Needed::Its,
        Request::PciListPersistent { .. }
        | Request::Save { .. }
        | Request::Restore { .. }
        | Request::Restored { .. }
        | Request::Migrate { .. }
        | Request::MigrateReceive { .. }
        | Request::MigrateEnd { .. }
            if !all_read =>
        {
            Needed::All
        }
        _ => Needed::None,
    }
}

/// Whether all functions of a request are addresses, or any VF of a PF given by its address.
fn is_found(request: &Request<Target>) -> bool {
    let found = request.clone().map(|target| match target {
        Target::Any(Parent::At(pf)) => Ok(pf),
        other => other.address().ok_or(()),
    });
    found.is_ok()
}

/// Which devices must be known before the engine decides about a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Needed {
    None,
    /// Those of its functions, and to which guests the settings assign them.
    Its,
    /// Those of all functions.
    All,
}

impl Engine {
    /// Handles a request of a client. A background thread resolves names that need a scan of the host, looks up what the engine has to
    /// know of the functions, and sends the request again with their addresses.
    pub(in crate::engine) fn handle_call(&mut self, request: Request<Target>, reply: Reply) {
        let context = self.task_context();
        let needed = needed_for(&request, &context);
        if is_found(&request) && needed == Needed::None {
            return self.handle_found(request, reply);
        }
        self.background("find", move || {
            let (host, settings) = (context.platform.host.as_ref(), &context.settings);
            let find = |target| {
                let found = names::find(host, &settings.names, &target)?;
                if needed == Needed::Its {
                    context.look_up_for_request(&found)?;
                }
                Ok(found)
            };
            let read = match needed {
                Needed::All => context.all_devices_read("what guests have persistently"),
                Needed::Its | Needed::None => Ok(()),
            };
            match read.and_then(|()| request.map(find)) {
                Ok(request) => context.inbox.send(Event::Found { request, reply }),
                Err(failure) => reply.done(Err(failure)),
            }
        });
    }

    /// Handles a request with the addresses of its functions.
    pub(in crate::engine) fn handle_found(&mut self, request: Request<Target>, reply: Reply) {
        match self.choose_each(request) {
            Ok(request) => self.handle_request(request, reply),
            Err(failure) => reply.done(Err(failure)),
        }
    }

    /// Chooses VFs for a request that takes any of a PF, a different one each time.
    fn choose_each(&self, request: Request<Target>) -> Result<Request, Failure> {
        let (wanted, mut taken) = (request.clone(), Vec::new());
        // Those that are named themselves are not chosen.
        let Ok(_) = request.clone().map(|target| {
            taken.extend(target.address());
            Ok::<_, std::convert::Infallible>(target)
        });
        request.map(|target| match target {
            Target::Any(Parent::At(pf)) => {
                let chosen = self.choose(&wanted, pf, &taken)?;
                taken.push(chosen);
                Ok(chosen)
            }
            other => other.address().ok_or_else(|| Failure::not_found(format!("{other} was not found"))),
        })
    }

    /// Chooses a free VF of a PF for a request that takes any: the first in order, none of `taken`. The engine handles no other request
    /// in between, so the VF stays free; of several for a guest, another request can take one, and then none is attached.
    fn choose(&self, request: &Request<Target>, pf: Sbdf, taken: &[Sbdf]) -> Result<Sbdf, Failure> {
        match request {
            Request::PciAssignableAdd { .. } => {
                let host = self.platform.host.as_ref();
                let free = |vf: &Sbdf| host.function(*vf).is_ok_and(|vf| vf.driver.is_none());
                self.vfs_in(pf, FunctionState::Host)?.into_iter().find(free).ok_or_else(|| {
                    let text = format!("no VF of {pf} belongs to dom0 and has no driver");
                    Failure::refused(text)
                        .on(pf)
                        .hint("'xpci vf list' shows them; 'xpci vf create' enables more")
                })
            }
            Request::PciAttach { domain, trust_former_owner: trust, .. }
            | Request::PciAttachAll { domain, trust_former_owner: trust, .. } => {
                self.free_vf(pf, domain, reuse_with(*trust), taken)
            }
            other => {
                let text = format!("any:{pf} means any free VF, but {} needs a certain one", other.name());
                Err(Failure::new(ErrorCode::Usage, text)
                    .on(pf)
                    .hint("name it by its address or as PF:N; 'xpci vf list' shows them"))
            }
        }
    }

    /// The VFs of a PF that are in the given state and in no transaction.
    fn vfs_in(&self, pf: Sbdf, state: FunctionState) -> Result<Vec<Sbdf>, Failure> {
        let function = existing(self.platform.host.as_ref(), pf)?;
        if function.total_vfs == 0 {
            return Err(Failure::refused(format!("{pf} is not a PF: it has no VFs to choose from")).on(pf));
        }
        let vfs = function.virtual_functions.into_iter();
        Ok(vfs
            .filter(|vf| self.functions.records().state(*vf) == state && !self.functions.is_busy(*vf))
            .collect())
    }

    /// The first VF of a PF, but none of `taken`, that can be attached to the guest now. With [`Reuse::Trusted`], also one that a PV
    /// guest that had it can still reach.
    pub(in crate::engine) fn free_vf(
        &self,
        pf: Sbdf,
        guest: &DomainName,
        reuse: Reuse,
        taken: &[Sbdf],
    ) -> Result<Sbdf, Failure> {
        let mut why = None;
        for vf in self.vfs_in(pf, FunctionState::Held)?.into_iter().filter(|vf| !taken.contains(vf)) {
            match self.obstacle_for(vf, guest, reuse) {
                None => return Ok(vf),
                Some(failure) => drop(why.get_or_insert(failure)),
            }
        }
        let text = format!("no VF of {pf} is free");
        Err(match why {
            Some(why) => Failure { message: format!("{text}: {}", why.message), ..why },
            None => {
                let hint = format!(
                    "'xpci pci-assignable-add any:{pf}' makes one assignable; 'xpci vf create' enables VFs"
                );
                Failure::refused(format!("{text}: none is assignable and unreserved")).on(pf).hint(hint)
            }
        })
    }

    /// Why a held function cannot be given to a guest that takes any VF. A reserved function is not free, even for the guest that it is
    /// reserved for.
    fn obstacle_for(&self, vf: Sbdf, guest: &DomainName, reuse: Reuse) -> Option<Failure> {
        if let Some(kept) = self.files.reservations.get(vf) {
            return Some(Failure::refused(kept_for(&kept)).on(vf).hint(how_to_forget(&kept)));
        }
        let domain = domains::find(self.platform.store.as_ref(), guest).ok();
        let function = match existing(self.platform.host.as_ref(), vf) {
            Ok(function) => function,
            Err(failure) => return Some(failure),
        };
        match self.persistent_context().assigned_to(&function) {
            Ok(None) => self.attach_obstacles(&function, domain, reuse).into_iter().next(),
            Ok(Some(_)) => {
                Some(Failure::refused(format!("{vf} is reserved for a guest by the settings")).on(vf))
            }
            Err(failure) => Some(failure),
        }
    }
}

/// The message that a function is reserved for another guest.
pub(in crate::engine) fn kept_for(reservation: &Reservation) -> String {
    let why = match reservation.saved {
        Some(_) => "which was saved with it",
        None => "for which it is persistent",
    };
    format!("{} is reserved for {}, {why}", reservation.address, reservation.who())
}

/// The hint with the command that removes the reservation.
pub(in crate::engine) fn how_to_forget(reservation: &Reservation) -> String {
    let (guest, address) = (reservation.called(), reservation.address);
    format!("'xpci pci-detach --persistent {guest} {address}' ends that")
}
