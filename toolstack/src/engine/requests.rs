//! Requests of clients: checked against the current state before anything is changed.

use pciback::platform::HostFunction;
use pciback::policy::{Permission, Reuse, Subject};
use pciback::serve::pv::nodes;
use pciback::{DomId, FunctionState, Sbdf};

use super::Engine;
use super::functions::Records;
use super::obstacles::{Force, Refusal, ThreadChecks, shares_with_others};
use super::several::Several;
use super::tasks::Course;
use super::unmanaged::STUB;
use crate::domains::{self, DomainType};
use crate::journal::{GuestPlace, Record};
use crate::outcome::{ErrorCode, Failure};
use crate::protocol::{DomainName, Placed, Request, Scope, Success};
use crate::reply::Reply;
use crate::reservations::Change;
use crate::spec::existing;
use crate::transaction::{Kind, Withdrawal, guest_owned, holder_of, refuse_in_use};

/// The plan for a request.
pub(super) enum Plan {
    /// Answer at once.
    Answer(Success),
    /// Start a transaction, with the message for its success, and change the function's reservation before it.
    Transaction(Course, Box<Record>, String, Option<Change>),
    /// Answer with the obstacles, including those that are found on a thread; with the given answer if there are none.
    Check(Refusal, ThreadChecks, Success),
}

impl Plan {
    /// The plan of a dry run: the same checks, without changes.
    pub(super) fn into_dry_run(self) -> Self {
        match self {
            Self::Transaction(_, record, message, _) => {
                let (address, domain) = (record.address, record.guest.map(|guest| guest.domain));
                let action = match domain {
                    Some(domain) => format!("attach {address} to domain {domain}"),
                    None => format!("give {address} back to dom0"),
                };
                let checks = ThreadChecks { hold: None, shares: Some(domain.or(Some(DomId::DOM0))) };
                Self::Check(Refusal { address, action, found: Vec::new() }, checks, dry_run_answer(&message))
            }
            other => other,
        }
    }
}

/// A requested attachment whose device number is not chosen yet.
#[derive(Debug, Clone, Copy)]
pub struct Wanted {
    pub(super) domain: DomId,
    pub(super) address: Sbdf,
    pub(super) slot: Option<u8>,
    pub(super) persist: bool,
    /// Attach even while a PV guest that had the function may still reach it.
    pub(super) trust: bool,
    /// Only report what would be done.
    pub(super) dry_run: bool,
    /// Whether it is held first if dom0 has it.
    pub(super) managed: bool,
}

/// The part of messages that a detached function is assignable again.
const ASSIGNABLE_AGAIN: &str = " and assignable again";

/// The message for a successful transaction. A function that is quarantined, or has left the host, is not assignable again.
fn ended(record: &Record, message: &str) -> String {
    match record.state {
        FunctionState::Held => message.to_owned(),
        state => message.replacen(ASSIGNABLE_AGAIN, &format!("; it is {state}"), 1),
    }
}

/// The answer of a dry run.
fn dry_run_answer(message: &str) -> Success {
    Success::Possible { message: format!("nothing was changed; without --dry-run: {message}") }
}

impl Engine {
    pub(super) fn handle_request(&mut self, request: Request, reply: Reply) {
        let Some((request, reply)) = self.defer(request, reply) else { return };
        let plan = match request {
            Request::List { filter } => return self.list(filter, reply),
            Request::Doctor => return self.examine(reply),
            Request::Show { address } => return self.show_function(address, reply),
            Request::PciAssignableList => return self.assignable_list(reply),
            Request::PciList { domain } => return self.guest_list(&domain, reply),
            Request::VfList { address } => return self.vf_list(address, reply),
            Request::AerStatus { address } => return self.aer_status(address, reply),
            Request::BlastRadius { address } => return self.blast_radius(address, reply),
            Request::AerHistory { address } => self.error_history(address).map(Plan::Answer),
            Request::Events { follow } => return self.events(follow, reply),
            Request::Status => return self.status(reply),
            Request::PciAssignableAdd { address, force, persist, managed, dry_run } => {
                let plan = self.plan_hold(address, force, managed, dry_run);
                if matches!(plan, Ok(Plan::Answer(_))) && !managed && !dry_run {
                    self.keep_held(address);
                }
                if persist && !dry_run {
                    return self.hold_persistently(address, plan, reply);
                }
                plan
            }
            Request::PciAssignableRemove { address, force, trust_former_owner } => self
                .forget_gone(address)
                .unwrap_or_else(|| self.plan_release(address, force, trust_former_owner)),
            Request::PciAttach {
                domain,
                address,
                slot,
                persist,
                managed: true,
                trust_former_owner,
                dry_run: false,
            } => {
                let (functions, trust) = (vec![Placed { address, slot }], trust_former_owner);
                let wanted = Several { domain, functions, persist, managed: true, trust, dry_run: false };
                return self.attach_several(wanted, reply);
            }
            Request::PciAttach {
                domain,
                address,
                slot,
                persist,
                managed,
                trust_former_owner: trust,
                dry_run,
            } => {
                if let Some(record) = self.attached_already(&domain, address, slot) {
                    return match persist && !dry_run {
                        true => {
                            self.keep_held(address);
                            self.make_persistent(&record, reply)
                        }
                        false => reply.done(Ok(self.has_it(&record))),
                    };
                }
                match domains::find(self.platform.store.as_ref(), &domain) {
                    Ok(domain) => {
                        let wanted = Wanted { domain, address, slot, persist, managed, trust, dry_run };
                        return self.attach(wanted, reply);
                    }
                    Err(failure) if persist && failure.code == ErrorCode::NotFound => {
                        let absent = self.absent_guest(&domain, failure);
                        return self.reserve_for_absent(absent, address, (slot, dry_run), reply);
                    }
                    Err(failure) => Err(failure),
                }
            }
            Request::PciAttachAll {
                domain,
                functions,
                persist,
                managed,
                trust_former_owner: trust,
                dry_run,
            } => {
                let wanted = Several { domain, functions, persist, managed, trust, dry_run };
                return self.attach_several(wanted, reply);
            }
            Request::PciDetach { domain, address, force, scope } => {
                if scope == Scope::Persistent || self.is_only_reserved(&domain, address, scope) {
                    return self.forget_reservation(&domain, address, reply);
                }
                self.plan_detach(&domain, address, force, scope)
            }
            Request::PciListPersistent { guest } => return self.reserved_list(guest.as_ref(), reply),
            Request::QuarantineClear { address, trust_former_owner } => {
                return self.clear_quarantine(address, trust_former_owner, reply);
            }
            Request::PolicyShow { address, domain } => return self.show_policy(address, domain, reply),
            Request::PolicyExplain { address, domain } => return self.explain_policy(address, domain, reply),
            Request::PolicyLearn { target } => return self.learned(&target, reply),
            Request::Sync { dry_run } => return self.inventory.compare_for(dry_run, reply),
            Request::DaemonReexec => return self.start_successor(reply),
            Request::PolicyReload => return self.reload_policies(reply),
            Request::VfCreate { address, count, unmanaged } => {
                return self.create_vfs(address, count, unmanaged, reply);
            }
            Request::VfSet { address, settings, persist } => {
                return self.set_network(address, settings, persist, reply);
            }
            Request::VfShow { address } => return self.show_network(address, reply),
            Request::Save { domain } => return self.save(&domain, reply),
            Request::Restore { guest } => return self.restore(guest, reply),
            Request::Restored { guest, functions } => return self.restored(guest, functions, reply),
            Request::VfSetCount { address, count } => return self.set_vf_count(address, count, reply),
            Request::VfDestroy { address } => return self.destroy_vfs(address, reply),
        };
        self.carry_out(plan, reply);
    }

    pub(super) fn carry_out(&mut self, plan: Result<Plan, Failure>, reply: Reply) {
        match plan {
            Err(failure) => reply.done(Err(failure)),
            Ok(Plan::Answer(success)) => reply.done(Ok(success)),
            Ok(Plan::Check(refusal, checks, otherwise)) => {
                self.answer_with_obstacles(refusal, checks, otherwise, reply)
            }
            Ok(Plan::Transaction(course, record, message, change)) => {
                self.start_with(course, *record, change, Some(reply), move |record| ended(record, &message));
            }
        }
    }

    /// Refuses a function that is in a transaction.
    pub(super) fn idle(&self, address: Sbdf) -> Result<(), Failure> {
        if self.functions.is_busy(address) {
            let state = self.functions.records().state(address);
            return Err(Failure::refused(format!("{address} is {state} right now"))
                .on(address)
                .hint("try again"));
        }
        Ok(())
    }

    fn plan_hold(&self, address: Sbdf, force: bool, managed: bool, dry_run: bool) -> Result<Plan, Failure> {
        let function = existing(self.platform.host.as_ref(), address)?;
        self.idle(address)?;
        let record = self.functions.records().get_or_new(address);
        match record.state {
            FunctionState::Held => {
                return Ok(Plan::Answer(Success::Already {
                    message: format!("{address} is assignable already"),
                }));
            }
            FunctionState::Host => {}
            other => return Err(not_in_state(&record, other, "made assignable")),
        }
        let message = format!("{address} is assignable");
        let found = self.holdable(&function);
        if dry_run || !found.is_empty() {
            let hold = (!function.is_bridge()).then_some(Force(force));
            let refusal = Refusal { address, action: format!("make {address} assignable"), found };
            return Ok(Plan::Check(refusal, ThreadChecks { hold, shares: None }, dry_run_answer(&message)));
        }
        let course = if force { Course::ForceHold } else { Course::Forward(Kind::Hold) };
        Ok(Plan::Transaction(course, Box::new(Record { managed, ..record }), message, None))
    }

    /// Obstacles to holding a function that `--force` does not override.
    pub(super) fn holdable(&self, function: &HostFunction) -> Vec<Failure> {
        let address = function.address;
        if function.is_bridge() {
            return vec![
                Failure::refused(format!("{address} is a bridge; bridges stay with the host")).on(address),
            ];
        }
        let mut found = Vec::new();
        if function.num_vfs > 0 {
            let enabled = format!("{address} is a PF with {} VFs enabled", function.num_vfs);
            let hint = "its driver must stay while it has VFs; 'xpci vf destroy' disables them";
            found.push(Failure::refused(enabled).on(address).hint(hint));
        }
        // Checked before the driver is touched: the undo of a failed hold would take the function from a guest of xl.
        if holder_of(function).is_some() && matches!(self.platform.hypervisor.assignable(address), Ok(false))
        {
            found.push(guest_owned(&self.platform, address));
        }
        found
    }

    /// Deletes the record of a function that left the host, where a release has nothing to do.
    fn forget_gone(&mut self, address: Sbdf) -> Option<Result<Plan, Failure>> {
        if self.functions.records().state(address) != FunctionState::Gone || self.functions.is_busy(address) {
            return None;
        }
        if let Err(failure) = self.forget(address) {
            return Some(Err(failure));
        }
        let message = format!("{address} left the host; its record is deleted");
        Some(Ok(Plan::Answer(Success::Changed { message, warnings: Vec::new(), functions: Vec::new() })))
    }

    pub(super) fn plan_release(&mut self, address: Sbdf, force: bool, trust: bool) -> Result<Plan, Failure> {
        self.idle(address)?;
        let record = self.functions.records().get_or_new(address);
        match record.state {
            FunctionState::Host => {
                existing(self.platform.host.as_ref(), address)?;
                Ok(Plan::Answer(Success::Already { message: format!("{address} belongs to dom0 already") }))
            }
            FunctionState::Held => {
                if !force {
                    self.may_be_released(address)?;
                }
                if !trust {
                    self.out_of_reach(address, None, &format!("give {address} back to dom0"))?;
                }
                let driver = record.original_driver.as_deref().unwrap_or("no driver").to_owned();
                let message = format!("{address} belongs to dom0 again, with {driver}");
                Ok(self.release_of(record, message))
            }
            other => Err(not_in_state(&record, other, "given back to dom0")),
        }
    }

    /// Attaches a function to a guest, after all obstacles are checked.
    fn attach(&mut self, wanted: Wanted, reply: Reply) {
        let plan = match domains::kind(self.platform.store.as_ref(), wanted.domain) {
            Ok(DomainType::Hvm) => match self.hvm_attachable(&wanted) {
                Ok(None) => return self.ask_device_model(wanted, reply),
                Ok(Some(refused)) => Ok(refused),
                Err(failure) => Err(failure),
            },
            Ok(_) => self.plan_attach(&wanted),
            Err(error) => Err(error.into()),
        };
        let plan = if wanted.dry_run { plan.map(Plan::into_dry_run) } else { plan };
        self.carry_out(plan, reply);
    }

    fn plan_attach(&self, wanted: &Wanted) -> Result<Plan, Failure> {
        let Wanted { domain, address, slot, persist, .. } = *wanted;
        let place = self.free_place(domain, address, slot, 0..32, &[]);
        let bus = self.has_bus(domain);
        let (place, no_place) = match place {
            Ok(place) => (place, None),
            Err(failure) => (0, Some(failure)),
        };
        match self.refused(wanted, bus.err().into_iter().chain(no_place).collect())? {
            Some(refused) => Ok(refused),
            None => self.attachment(self.functions.records().get_or_new(address), domain, place, persist),
        }
    }

    /// A plan that lists the obstacles to an attachment, if there are any; `also`: obstacles that the caller found.
    pub(super) fn refused(&self, wanted: &Wanted, also: Vec<Failure>) -> Result<Option<Plan>, Failure> {
        let (address, domain) = (wanted.address, wanted.domain);
        let function = existing(self.platform.host.as_ref(), address)?;
        self.idle(address)?;
        let state = self.functions.records().state(address);
        let is_to_hold = wanted.managed && state == FunctionState::Host;
        let found = match is_to_hold {
            true => self.managed_obstacles(&function, Some(domain), wanted.trust),
            false => self.attach_obstacles(&function, Some(domain), wanted.trust),
        };
        let found = [found, also].concat();
        if found.is_empty() && !is_to_hold {
            return Ok(None);
        }
        let hold = (state == FunctionState::Host && !function.is_bridge()).then_some(Force(false));
        let shares = shares_with_others(state, &function).then_some(Some(domain));
        let action = format!("attach {address} to {}", self.called(domain));
        let nothing = match is_to_hold {
            true => dry_run_answer(&format!("{address} is taken from dom0 and attached to domain {domain}")),
            false => Success::Already { message: format!("{action}: nothing prevents it any more") },
        };
        let refusal = Refusal { address, action, found };
        Ok(Some(Plan::Check(refusal, ThreadChecks { hold, shares }, nothing)))
    }

    /// Refuses guests without a device model that cannot have a PCI bus of xpci.
    pub(super) fn has_bus(&self, domain: DomId) -> Result<(), Failure> {
        let store = self.platform.store.as_ref();
        if domains::kind(store, domain)? == DomainType::Pvh {
            return Err(Failure::refused(format!("domain {domain} is a PVH guest, which has no PCI bus"))
                .of(domain)
                .hint("give it type=\"hvm\" or type=\"pv\" in its xl.cfg"));
        }
        if let Some(backend) = nodes::foreign_backend(store, domain)? {
            return Err(Failure::refused(format!(
                "domain {domain} has functions from another backend, {backend}"
            ))
            .of(domain)
            .hint("a guest has one PCI bus: detach those with 'xl pci-detach' first"));
        }
        Ok(())
    }

    /// The record of a function that can be attached to a domain now. With `trust`, even while a former PV owner may still reach it.
    pub(super) fn attachable(&self, address: Sbdf, domain: DomId, trust: bool) -> Result<Record, Failure> {
        let function = existing(self.platform.host.as_ref(), address)?;
        self.idle(address)?;
        let action = format!("attach {address} to domain {domain}");
        Failure::refuse_for(&action, self.attach_obstacles(&function, Some(domain), trust))?;
        Ok(self.functions.records().get_or_new(address))
    }

    pub(super) fn attachment(
        &self,
        mut record: Record,
        domain: DomId,
        devfn: u8,
        persist: bool,
    ) -> Result<Plan, Failure> {
        let address = record.address;
        record.guest = Some(GuestPlace { domain, devfn });
        let seen = Sbdf::from_devfn(0, 0, devfn);
        let mut message = format!("{address} is attached to domain {domain}, which sees it at {seen}");
        let change = match persist {
            true => {
                record.managed = false;
                message.push_str(" and gets it again whenever it starts");
                Some(Change::Reserve(Box::new(self.reservation(address, domain, devfn)?)))
            }
            false => None,
        };
        Ok(Plan::Transaction(Course::Forward(Kind::Attach), Box::new(record), message, change))
    }

    /// Refuses attachments that need a policy's permission: PFs, and VFs whose PF has no trusted driver in dom0.
    pub(super) fn permitted(&self, function: &HostFunction, domain: Option<DomId>) -> Result<(), Failure> {
        let address = function.address;
        let store = self.platform.store.as_ref();
        let name = domain.map_or(Ok(None), |domain| domains::name(store, domain))?;
        let permits = self.policies.merge(&Subject::of_host(function, name)).permits;
        let refused = |text: String, word: &str| {
            let hint = format!(
                "to permit that, write 'permit: [{word}]' in a policy that matches it; then 'xpci policy reload'"
            );
            Err(Failure { domain, ..Failure::refused(text).on(address).hint(hint) })
        };
        if function.total_vfs > 0 && !permits.contains(&Permission::PhysicalFunction) {
            let text = format!("{address} is a PF: a guest that has it controls its VFs");
            return refused(text, "physical-function");
        }
        let Some(pf) = function.physical_function else { return Ok(()) };
        if permits.contains(&Permission::UntrustedVf) {
            return Ok(());
        }
        match distrusted(self.functions.records(), &self.platform.host.function(pf)?) {
            Some(why) => refused(format!("{address} is a VF of {pf}, {why}"), "untrusted-vf"),
            None => Ok(()),
        }
    }

    /// Refuses `action` while a former PV owner may still reach the function; `but`: the domain that is to get it.
    pub(super) fn out_of_reach(
        &self,
        address: Sbdf,
        but: Option<DomId>,
        action: &str,
    ) -> Result<(), Failure> {
        let function = existing(self.platform.host.as_ref(), address)?;
        let store = self.platform.store.as_ref();
        let name = |domain| domains::name(store, domain).ok().flatten();
        let subject = Subject::of_host(&function, but.and_then(name));
        if self.policies.merge(&subject).reuse == Reuse::Trusted {
            return Ok(());
        }
        self.former_owners.refuse(self.platform.hypervisor.as_ref(), &function, but, action, name)
    }

    /// The guest's device number for the function: the requested one, or the first free one of `order`. `others`: the numbers that the
    /// guest's device model uses.
    pub(super) fn free_place(
        &self,
        domain: DomId,
        address: Sbdf,
        slot: Option<u8>,
        mut order: impl Iterator<Item = u8>,
        others: &[u8],
    ) -> Result<u8, Failure> {
        let mut taken: [Option<String>; 32] = [const { None }; 32];
        for slot in others {
            taken[usize::from(slot & 31)] = Some("an emulated device".to_owned());
        }
        for reservation in self.reserved_in(domain)? {
            if reservation.address != address {
                let kept = format!("{}, which is reserved for it,", reservation.address);
                taken[usize::from(reservation.devfn >> 3)] = Some(kept);
            }
        }
        for (record, place) in self.functions.records().of(domain) {
            taken[usize::from(place.devfn >> 3)] = Some(record.address.to_string());
        }
        match slot {
            Some(slot) if slot > 0x1f => {
                Err(Failure::refused(format!("{slot:#x} is not a device number (0 to 1f)")))
            }
            Some(slot) => match &taken[usize::from(slot)] {
                None => Ok(slot << 3),
                Some(other) => {
                    Err(Failure::refused(format!("domain {domain} sees {other} at device {slot:x}"))
                        .of(domain)
                        .hint("choose another device number, or give none"))
                }
            },
            None => order.find(|slot| taken[usize::from(*slot)].is_none()).map(|slot| slot << 3).ok_or_else(
                || {
                    Failure::refused(format!("domain {domain} has 32 devices; its bus has no room"))
                        .of(domain)
                },
            ),
        }
    }

    fn plan_detach(
        &self,
        name: &DomainName,
        address: Sbdf,
        force: bool,
        scope: Scope,
    ) -> Result<Plan, Failure> {
        let domain = domains::find(self.platform.store.as_ref(), name)?;
        self.idle(address)?;
        let record = self.functions.records().get_or_new(address);
        if record.guest.is_none() && self.reservation_of(name, address).is_none() {
            existing(self.platform.host.as_ref(), address)?;
            let message = format!("{address} is attached to no guest; its state is '{}'", record.state);
            return Ok(Plan::Answer(Success::Already { message }));
        }
        if record.guest.map(|guest| guest.domain) != Some(domain) {
            let failure = Failure::not_found(format!("domain {domain} does not have {address}"));
            return Err(failure
                .on(address)
                .of(domain)
                .hint(format!("'xpci pci-list {domain}' shows what it has")));
        }
        if !force {
            self.may_lose(domain)?;
        }
        let withdrawal = if force { Withdrawal::Force } else { Withdrawal::Ask };
        let reservation = self.reservation_of(name, address);
        let (end, change) = match (reservation, scope) {
            (None, _) if record.managed => {
                ("; it goes back to dom0 as soon as no guest can reach it".to_owned(), None)
            }
            (None, _) => (String::new(), None),
            (Some(_), Scope::Live) => {
                ("; the guest gets it again when it starts the next time".to_owned(), None)
            }
            (Some(_), _) => (", and not persistent any more".to_owned(), Some(Change::Forget(address))),
        };
        let message = format!("{address} is detached from domain {domain}{ASSIGNABLE_AGAIN}{end}");
        Ok(Plan::Transaction(Course::Backward(Kind::Detach, withdrawal), Box::new(record), message, change))
    }

    fn clear_quarantine(&mut self, address: Sbdf, trust: bool, reply: Reply) {
        let record = self.functions.records().get_or_new(address);
        if let Err(failure) = self.idle(address) {
            return reply.done(Err(failure));
        }
        if record.state == FunctionState::Host
            && let Err(failure) = existing(self.platform.host.as_ref(), address)
        {
            return reply.done(Err(failure));
        }
        if record.state != FunctionState::Quarantined {
            let message = format!("{address} is not quarantined; its state is '{}'", record.state);
            return reply.done(Ok(Success::Already { message }));
        }
        // A driver of dom0 may have bound to it since.
        if record.guest.is_none()
            && let Err(failure) = refuse_in_use(self.platform.host.as_ref(), address)
        {
            return reply.done(Err(failure));
        }
        // The guest from which the function was taken is a former owner as any other. A guest that still has it loses it in this
        // transaction.
        if !trust
            && existing(self.platform.host.as_ref(), address).is_ok()
            && let Err(failure) =
                self.out_of_reach(address, None, &format!("clear the quarantine of {address}"))
        {
            return reply.done(Err(failure));
        }
        self.start(Course::Clear, record, Some(reply), move |record| {
            format!("{address} is {} again", record.state)
        });
    }
}

pub(super) fn not_in_state(record: &Record, state: FunctionState, wanted: &str) -> Failure {
    let address = record.address;
    let text = match (state, record.guest) {
        (FunctionState::Attached, Some(guest)) if wanted == "attached" => {
            format!("{address} is attached to domain {} already", guest.domain)
        }
        (FunctionState::Attached, Some(guest)) => {
            format!("{address} is attached to domain {}; it cannot be {wanted} meanwhile", guest.domain)
        }
        (_, Some(guest)) => {
            format!("{address} is {state} (domain {}); it cannot be {wanted} now", guest.domain)
        }
        (_, None) => format!("{address} is {state}; it cannot be {wanted} now"),
    };
    let failure = Failure::refused(text);
    let hint = match (state, record.guest) {
        (FunctionState::Attached, Some(guest)) => {
            format!("detach it first: 'xpci pci-detach {} {address}'", guest.domain)
        }
        (FunctionState::Quarantined, _) => {
            format!("see why in 'xpci status', then 'xpci quarantine clear {address}'")
        }
        (FunctionState::Gone, _) => {
            format!("it left the host; 'xpci pci-assignable-remove {address}' forgets it")
        }
        _ => "try again when that has ended".to_owned(),
    };
    failure.on(record.address).hint(hint)
}

/// Why no trusted driver in dom0 manages a PF's VFs, in words that follow the PF's address; `None` where one does.
pub(super) fn distrusted(records: &Records, pf: &HostFunction) -> Option<String> {
    if let Some(domain) = records.guest(pf.address) {
        return Some(format!("which domain {domain} has"));
    }
    match pf.driver.as_deref() {
        None => Some("which no driver manages (it has no driver)".to_owned()),
        Some(driver @ (STUB | "pci-stub" | "pciback" | "vfio-pci")) => {
            Some(format!("which no driver manages (it has {driver})"))
        }
        Some(_) => None,
    }
}
