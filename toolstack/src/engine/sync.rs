//! Bringing sysfs, Xen and xenstore into step: the lists are read, the planner says what to repair, and it is repaired.
//!
//! The planner ([`pciback::inventory`]) is pure. Reading the lists and the repairs that only concern Xen's list happen on a thread
//! of their own; those that concern a guest or a driver are the engine's usual transactions.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use log::info;
use nix::errno::Errno;
use pciback::config::CapabilityList;
use pciback::inventory::{
    Function, HostView, Identity, Intent, Observed, Owner, Place, Plan, Published, Repair, ReportKind, Want,
    Wanted, plan,
};
use pciback::platform::hypervisor::DeviceReport;
use pciback::platform::{HostFunction, PlatformError};
use pciback::pv::nodes;
use pciback::spec::CapabilityId;
use pciback::{DomId, FunctionState, Sbdf};

use super::tasks::{Course, Workshop};
use super::{Engine, Event};
use crate::control::Reply;
use crate::domains::{self, DomainType};
use crate::journal::Record;
use crate::outcome::{ErrorCode, Failure};
use crate::protocol::{Success, SyncView};
use crate::transaction::{Kind, Parting, holder_of};

impl Engine {
    /// Reads the lists, and repairs what they disagree on unless it is only asked for.
    pub(super) fn sync(&self, dry_run: bool, reply: Reply) {
        let (workshop, wanted) = (self.workshop(), self.wanted());
        self.background("sync", move || reply.done(workshop.sync(&wanted, dry_run, &reply)));
    }

    fn wanted(&self) -> Wanted {
        let intent = |record: &Record| {
            let place = record.guest.map(|guest| Place { domain: guest.domain, devfn: guest.devfn });
            let want = match (record.state, place) {
                (FunctionState::Quarantined, place) => Want::Quarantined(place),
                (FunctionState::Gone, _) => Want::Gone,
                (FunctionState::Host, _) => Want::Host,
                (_, Some(place)) => Want::Attached(place),
                (_, None) => Want::Held,
            };
            // Whether it is another device now is told by its incarnation, when the event comes.
            Intent { want, identity: None, msix_prepared: record.msix_prepared }
        };
        Wanted {
            functions: self.records.values().map(|record| (record.address, intent(record))).collect(),
            busy: self.busy.union(&self.busy_pfs).copied().collect(),
        }
    }

    /// One repair that concerns a guest or a driver.
    pub(super) fn repair(&mut self, repair: Repair, reply: Reply) {
        let address = repair.address();
        let record = self.record(address);
        if let Err(failure) = self.idle(address) {
            return reply.done(Err(failure));
        }
        let (course, what) = match repair {
            Repair::Withdraw { .. } => {
                (Course::Backward(Kind::Detach, Parting::Force), "withdrawn from its guest")
            }
            Repair::DetachFromDead { .. } => (Course::Backward(Kind::Detach, Parting::Dead), "held again"),
            Repair::Hold { .. } => (Course::Forward(Kind::Hold), "held again"),
            Repair::Release { .. } => (Course::Backward(Kind::Release, Parting::Dead), "dom0's again"),
            other => return reply.done(self.note_repair(other, record)),
        };
        self.start(course, record, Some(reply), move |record| format!("{}: {what}", record.address));
    }

    /// Repairs of records and nodes.
    fn note_repair(&mut self, repair: Repair, record: Record) -> Result<Success, Failure> {
        let address = record.address;
        let failed =
            |error: &dyn std::fmt::Display| Failure::new(ErrorCode::Failed, error.to_string()).on(address);
        let message = match repair {
            Repair::Quarantine { .. } => {
                self.quarantine(address, "sysfs, Xen and xenstore disagree on who has it");
                format!("{address}: quarantined")
            }
            Repair::MarkGone { .. } => {
                let gone = Record { state: FunctionState::Gone, transaction: None, ..record };
                self.journal.write(&gone).map_err(|error| failed(&error))?;
                self.keep(gone);
                format!("{address}: marked as gone")
            }
            Repair::Forget { .. } => {
                self.forget(address)?;
                format!("{address}: forgotten")
            }
            Repair::RemoveNodes { place, .. } if !self.guests.contains_key(&place.domain) => {
                let store = self.platform.store.as_ref();
                nodes::apply(store, place.domain, &[nodes::NodeChange::RemoveAll])?;
                format!("{address}: its nodes are removed")
            }
            other => {
                return Err(Failure::refused(format!("{other}: not while its guest is served"))
                    .on(address)
                    .hint("detach the function and attach it again"));
            }
        };
        Ok(Success::Already { message })
    }
}

impl Workshop {
    fn sync(&self, wanted: &Wanted, dry_run: bool, reply: &Reply) -> Result<Success, Failure> {
        let plan = plan(&self.observe(wanted)?, wanted);
        if !dry_run {
            self.carry_out(&plan, reply)?;
        }
        let text = plan.to_string().lines().map(str::to_owned).collect();
        Ok(Success::Synced(SyncView { dry_run, text, plan }))
    }

    fn carry_out(&self, plan: &Plan, reply: &Reply) -> Result<(), Failure> {
        for (done, step) in plan.steps.iter().enumerate() {
            let text = step.repair.to_string();
            reply.progress(&text);
            self.carry_out_one(step.repair).map_err(|failure| Failure {
                message: format!(
                    "{text}: {}; {done} of {} repairs were made",
                    failure.message,
                    plan.steps.len()
                ),
                hint: Some("'xpci sync --dry-run' plans anew what is left".to_owned()),
                ..failure
            })?;
            info!("{text}: done");
        }
        Ok(())
    }

    fn carry_out_one(&self, repair: Repair) -> Result<(), Failure> {
        let hypervisor = self.platform.hypervisor.as_ref();
        match repair {
            Repair::ReportToXen { address, kind } => {
                let proximity = self.platform.host.function(address)?.numa_node;
                let (extended, physical_function) = match kind {
                    ReportKind::Plain => (false, None),
                    ReportKind::Extended => (true, None),
                    ReportKind::Virtual { physical_function } => (false, Some(physical_function)),
                };
                Ok(hypervisor.device_add(address, DeviceReport { extended, physical_function, proximity })?)
            }
            // dom0's kernel may have been quicker.
            Repair::RemoveFromXen { address } => match hypervisor.device_remove(address) {
                Err(error) if error.errno() == Some(Errno::ENODEV) => Ok(()),
                other => Ok(other?),
            },
            Repair::ReleaseMsix { address } => Ok(hypervisor.release_msix(address)?),
            other => {
                let limit =
                    self.settings.guest_limit() + self.settings.driver_limit() + Duration::from_secs(10);
                let (reply, answer) = Reply::awaited();
                self.inbox.send(Event::Repair(other, reply));
                answer.wait(limit).map(drop)
            }
        }
    }

    /// What the three lists say.
    fn observe(&self, wanted: &Wanted) -> Result<Observed, Failure> {
        let host = self.platform.host.as_ref();
        let mut observed = Observed { domains: self.domains()?, ..Observed::default() };
        self.published(&mut observed)?;
        self.without_nodes(wanted, &mut observed)?;
        let mut found: BTreeMap<Sbdf, HostFunction> = BTreeMap::new();
        for address in host.functions()? {
            match host.function(address) {
                Ok(function) => drop(found.insert(address, function)),
                Err(error) if error.errno() == Some(Errno::ENOENT) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let recorded =
            wanted.functions.keys().copied().chain(observed.published.iter().map(|entry| entry.address));
        let addresses: BTreeSet<Sbdf> = found.keys().copied().chain(recorded).collect();
        for address in addresses {
            let function = found.get(&address);
            let observation = Function {
                host: function.map(|function| self.view(function)),
                physical_function: function.and_then(|function| function.physical_function),
                xen: self.owner(address)?,
            };
            observed.functions.insert(address, observation);
        }
        Ok(observed)
    }

    /// HVM guests are told of functions by their firmware: what they are to have counts as published.
    fn without_nodes(&self, wanted: &Wanted, observed: &mut Observed) -> Result<(), Failure> {
        for (&address, intent) in &wanted.functions {
            if let Some(place) = intent.place()
                && domains::kind(self.platform.store.as_ref(), place.domain)? == DomainType::Hvm
            {
                observed.published.insert(Published { address, place });
            }
        }
        Ok(())
    }

    fn view(&self, function: &HostFunction) -> HostView {
        let config = self.platform.host.config(function.address).map_err(std::io::Error::other);
        let bytes = config.and_then(|config| config.read_all()).unwrap_or_default();
        let (vendor, device) = (function.vendor, function.device);
        let (subsystem_vendor, subsystem) = (function.subsystem_vendor, function.subsystem);
        let (class, revision) = (function.class, function.revision);
        HostView {
            identity: Identity { vendor, device, subsystem_vendor, subsystem, class, revision, serial: None },
            bridge: function.is_bridge(),
            msix: CapabilityList::walk(&bytes).legacy(CapabilityId::MSI_X).is_some(),
            extended: false,
            virtual_functions: function.virtual_functions.clone(),
            num_vfs: function.num_vfs,
            driver: function.driver.is_some(),
            held: holder_of(function).is_some(),
        }
    }

    fn owner(&self, address: Sbdf) -> Result<Option<Owner>, PlatformError> {
        let hypervisor = self.platform.hypervisor.as_ref();
        if !hypervisor.device_known(address)? {
            return Ok(None);
        }
        Ok(Some(match hypervisor.assignable(address) {
            Ok(true) => Owner::Free,
            Ok(false) => Owner::Guest,
            Err(_) => Owner::Unknown,
        }))
    }

    fn domains(&self) -> Result<BTreeSet<DomId>, PlatformError> {
        let store = self.platform.store.as_ref();
        let mut domains = BTreeSet::new();
        for name in store.list("/local/domain")? {
            if let Ok(number) = name.parse::<u16>()
                && number != 0
                && store.domain_exists(DomId(number))?
            {
                domains.insert(DomId(number));
            }
        }
        Ok(domains)
    }

    fn published(&self, observed: &mut Observed) -> Result<(), PlatformError> {
        let store = self.platform.store.as_ref();
        for name in store.list(nodes::BACKENDS)? {
            let Ok(number) = name.parse::<u16>() else { continue };
            let domain = DomId(number);
            for (index, devfn, _) in nodes::read_backend_functions(store, domain)? {
                let node = store.read(&format!("{}/dev-{index}", nodes::backend_directory(domain)))?;
                let address =
                    node.and_then(|text| String::from_utf8(text).ok()).and_then(|text| text.parse().ok());
                if let Some(address) = address {
                    observed.published.insert(Published { address, place: Place { domain, devfn } });
                }
            }
        }
        Ok(())
    }
}
