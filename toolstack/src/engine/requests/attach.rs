//! Plans of attachments and of their ends.

use std::collections::BTreeMap;

use pciback::platform::HostFunction;
use pciback::policy::{Permission, Reuse, Subject};
use pciback::serve::pv::nodes;
use pciback::{Devfn, DeviceNumber, DomId, FunctionState, Sbdf};

use super::obstacles::{InUse, Refusal, ThreadChecks, attaching, shares_with_others};
use super::{ASSIGNABLE_AGAIN, Message, Plan, Several, dry_run_answer};
use crate::domains::{self, DomainType};
use crate::engine::Engine;
use crate::engine::functions::Records;
use crate::engine::tasks::Course;
use crate::journal::{GuestPlace, Record};
use crate::outcome::{ErrorCode, Failure};
use crate::protocol::{DomainName, Placed, Scope, Success};
use crate::reply::Reply;
use crate::reservations::Change;
use crate::spec::existing;
use crate::transaction::{Kind, PF_STUB, Withdrawal};

/// A requested attachment whose device number is not chosen yet.
#[derive(Debug, Clone, Copy)]
pub struct Wanted {
    pub(in crate::engine) domain: DomId,
    pub(in crate::engine) address: Sbdf,
    pub(in crate::engine) slot: Option<DeviceNumber>,
    pub(in crate::engine) options: AttachOptions,
}

/// The options of an attachment.
#[derive(Debug, Clone, Copy)]
pub struct AttachOptions {
    /// Whether the guest gets the function again whenever it starts.
    pub(in crate::engine) persist: bool,
    /// Whether a function of dom0 is held first, and given back when the guest has released it.
    pub(in crate::engine) managed: bool,
    /// Whether a PV guest that had the function is waited for.
    pub(in crate::engine) reuse: Reuse,
    /// Only report what would be done.
    pub(in crate::engine) dry_run: bool,
}

impl Engine {
    /// Attaches a function to a guest, or reserves it for a guest that does not run.
    pub(super) fn attach_one(
        &mut self,
        domain: DomainName,
        function: Placed,
        options: AttachOptions,
        reply: Reply,
    ) {
        if options.managed && !options.dry_run {
            return self.attach_several(Several { domain, functions: vec![function], options }, reply);
        }
        let Placed { address, slot } = function;
        if let Some(record) = self.attached_already(&domain, address, slot) {
            if options.persist && !options.dry_run {
                self.keep_held(address);
                return self.persistent_context().make_persistent(&record, reply);
            }
            return reply.done(Ok(self.has_it(&record)));
        }
        match domains::find(self.platform.store.as_ref(), &domain) {
            Ok(domain) => self.attach(Wanted { domain, address, slot, options }, reply),
            Err(failure) if options.persist && failure.code == ErrorCode::NotFound => {
                let absent = self.persistent_context().absent_guest(&domain, failure);
                self.reserve_for_absent(absent, function, options, reply);
            }
            Err(failure) => reply.done(Err(failure)),
        }
    }

    /// Attaches a function to a guest that runs, after all obstacles are checked.
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
        let plan = if wanted.options.dry_run { plan.map(Plan::into_dry_run) } else { plan };
        self.carry_out(plan, reply);
    }

    fn plan_attach(&self, wanted: &Wanted) -> Result<Plan, Failure> {
        let Wanted { domain, address, slot, options } = *wanted;
        let place = self.free_place(domain, address, slot, DeviceNumber::all(), &[]);
        let bus = self.has_bus(domain);
        let (place, no_place) = match place {
            Ok(place) => (place, None),
            Err(failure) => (Devfn(0), Some(failure)),
        };
        match self.refused(wanted, bus.err().into_iter().chain(no_place).collect())? {
            Some(refused) => Ok(refused),
            None => {
                let record = self.functions.records().get_or_new(address);
                self.attachment(record, domain, place, options.persist)
            }
        }
    }

    /// A plan that lists the obstacles to an attachment, if there are any; `also`: obstacles that the caller found.
    pub(in crate::engine) fn refused(
        &self,
        wanted: &Wanted,
        also: Vec<Failure>,
    ) -> Result<Option<Plan>, Failure> {
        let (address, domain) = (wanted.address, wanted.domain);
        let function = existing(self.platform.host.as_ref(), address)?;
        self.functions.idle(address)?;
        let state = self.functions.records().state(address);
        let is_to_hold = wanted.options.managed && state == FunctionState::Host;
        let found = match is_to_hold {
            true => self.managed_obstacles(&function, Some(domain), wanted.options.reuse),
            false => self.attach_obstacles(&function, Some(domain), wanted.options.reuse),
        };
        let found = [found, also].concat();
        if found.is_empty() && !is_to_hold {
            return Ok(None);
        }
        let hold = (state == FunctionState::Host && !function.is_bridge()).then_some(InUse::Refused);
        let shares = shares_with_others(state, &function).then_some(Some(domain));
        let action = attaching(address, domain);
        let nothing = match is_to_hold {
            true => dry_run_answer(&format!("{address} is taken from dom0 and attached to domain {domain}")),
            false => Success::Already { message: format!("{action}: nothing prevents it now") },
        };
        let refusal = Refusal { address, action, found };
        Ok(Some(Plan::Check(refusal, ThreadChecks { hold, shares }, nothing)))
    }

    /// Refuses guests without a device model that cannot have a PCI bus of xpci.
    pub(in crate::engine) fn has_bus(&self, domain: DomId) -> Result<(), Failure> {
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

    /// The record of a function that can be attached to a domain now. With [`Reuse::Trusted`], even while a former PV owner may still
    /// reach it.
    pub(in crate::engine) fn attachable(
        &self,
        address: Sbdf,
        domain: DomId,
        reuse: Reuse,
    ) -> Result<Record, Failure> {
        let function = existing(self.platform.host.as_ref(), address)?;
        self.functions.idle(address)?;
        let action = attaching(address, domain);
        Failure::refuse_for(&action, self.attach_obstacles(&function, Some(domain), reuse))?;
        Ok(self.functions.records().get_or_new(address))
    }

    pub(in crate::engine) fn attachment(
        &self,
        mut record: Record,
        domain: DomId,
        devfn: Devfn,
        persist: bool,
    ) -> Result<Plan, Failure> {
        let address = record.address;
        record.guest = Some(GuestPlace { domain, devfn });
        let seen = Sbdf::in_guest(devfn);
        let mut message = format!("{address} is attached to domain {domain}, which sees it at {seen}");
        let change = match persist {
            true => {
                record.managed = false;
                message.push_str(" and gets it again whenever it starts");
                let reservation = self.persistent_context().reservation(address, domain, devfn)?;
                Some(Change::Reserve(Box::new(reservation)))
            }
            false => {
                if record.managed {
                    message.push_str("; it goes back to dom0 when the guest has released it");
                }
                None
            }
        };
        Ok(Plan::Transaction(Course::Forward(Kind::Attach), Box::new(record), message.into(), change))
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

    /// Refuses `action` while a former PV owner may still reach the function, unless that is trusted; `but`: the domain that is to get it.
    pub(super) fn out_of_reach(
        &self,
        address: Sbdf,
        but: Option<DomId>,
        action: &str,
        reuse: Reuse,
    ) -> Result<(), Failure> {
        if reuse == Reuse::Trusted {
            return Ok(());
        }
        let function = existing(self.platform.host.as_ref(), address)?;
        let store = self.platform.store.as_ref();
        let name = |domain| domains::name(store, domain).ok().flatten();
        let subject = Subject::of_host(&function, but.and_then(name));
        if self.policies.merge(&subject).reuse == Reuse::Trusted {
            return Ok(());
        }
        self.files.former_owners.refuse(self.platform.hypervisor.as_ref(), &function, but, action, name)
    }

    /// The guest's device number for the function: the requested one, or the first free one of `order`. `others`: the numbers that the
    /// guest's device model uses.
    pub(in crate::engine) fn free_place(
        &self,
        domain: DomId,
        address: Sbdf,
        slot: Option<DeviceNumber>,
        mut order: impl Iterator<Item = DeviceNumber>,
        others: &[DeviceNumber],
    ) -> Result<Devfn, Failure> {
        let mut taken: BTreeMap<DeviceNumber, String> = BTreeMap::new();
        for slot in others {
            taken.insert(*slot, "an emulated device".to_owned());
        }
        for reservation in self.persistent_context().reserved_in(domain)? {
            if reservation.address != address {
                let kept = format!("{}, which is reserved for it,", reservation.address);
                taken.insert(reservation.devfn.device(), kept);
            }
        }
        for (record, place) in self.functions.records().of(domain) {
            taken.insert(place.devfn.device(), record.address.to_string());
        }
        match slot {
            Some(slot) => match taken.get(&slot) {
                None => Ok(slot.devfn()),
                Some(other) => {
                    Err(Failure::refused(format!("domain {domain} sees {other} at device {slot:x}"))
                        .of(domain)
                        .hint("choose another device number, or give none"))
                }
            },
            None => order.find(|slot| !taken.contains_key(slot)).map(DeviceNumber::devfn).ok_or_else(|| {
                Failure::refused(format!("domain {domain} has 32 devices; its bus has no room")).of(domain)
            }),
        }
    }

    /// Takes a function from a guest, and ends its reservation as `scope` says.
    pub(super) fn detach(
        &mut self,
        domain: &DomainName,
        address: Sbdf,
        withdrawal: Withdrawal,
        scope: Scope,
        reply: Reply,
    ) {
        if scope == Scope::Persistent || self.persistent_context().is_only_reserved(domain, address, scope) {
            return self.forget_reservation(domain, address, reply);
        }
        let plan = self.plan_detach(domain, address, withdrawal, scope);
        self.carry_out(plan, reply);
    }

    fn plan_detach(
        &self,
        name: &DomainName,
        address: Sbdf,
        withdrawal: Withdrawal,
        scope: Scope,
    ) -> Result<Plan, Failure> {
        let domain = domains::find(self.platform.store.as_ref(), name)?;
        self.functions.idle(address)?;
        let record = self.functions.records().get_or_new(address);
        let reservation = self.persistent_context().reservation_of(name, address);
        if record.guest.is_none() && reservation.is_none() {
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
        if withdrawal == Withdrawal::Ask {
            self.may_lose(domain, &record)?;
        }
        let message = Message::from(format!("{address} is detached from domain {domain}{ASSIGNABLE_AGAIN}"));
        let (message, change) = match (reservation, scope) {
            (None, _) if record.managed => {
                (message.and("; it goes back to dom0 as soon as no guest can reach it"), None)
            }
            (None, _) => (message, None),
            (Some(_), Scope::Live) => {
                (message.and("; the guest gets it again the next time it starts"), None)
            }
            (Some(reservation), _) => (message.and_ends(reservation), Some(Change::Forget(address))),
        };
        Ok(Plan::Transaction(Course::Backward(Kind::Detach, withdrawal), Box::new(record), message, change))
    }
}

/// Why no trusted driver in dom0 manages a PF's VFs, in words that follow the PF's address; `None` where one does.
pub(in crate::engine) fn distrusted(records: &Records, pf: &HostFunction) -> Option<String> {
    if let Some(domain) = records.guest(pf.address) {
        return Some(format!("which domain {domain} has"));
    }
    match pf.driver.as_deref() {
        None => Some("which no driver manages (it has no driver)".to_owned()),
        Some(driver @ (PF_STUB | "pci-stub" | "pciback" | "vfio-pci")) => {
            Some(format!("which no driver manages (it has {driver})"))
        }
        Some(_) => None,
    }
}
