//! HVM guests: their ioreq servers, and the device numbers of their functions.
//!
//! An ioreq server belongs to its domain, not to a process, and outlives a killed service. So its number is noted in the run directory.
//! Before it is created, the servers that already exist are noted as well, so that the next run can identify one whose number could not
//! be noted.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, OpenOptions};
use std::io;
use std::sync::Arc;

use log::{error, info, warn};
use pciback::platform::{BarMemory, Edit, PlatformError, ServerId, SharedMemory};
use pciback::serve::GuestFunction;
use pciback::serve::hvm::{
    self, CONFIG_ADDRESS, CONFIG_PORTS, ConfigPorts, Connection, Device, ECAM_BASE, ECAM_BYTES, Taken,
};
use pciback::serve::pv::Handshake;
use pciback::serve::pv::nodes::pciback_functions;
use pciback::{Devfn, DeviceNumber, DomId};

use super::Event;
use super::guest::Guest;
use crate::domains;
use crate::engine::notes::{Notes, SERVERS, ServerNote, noted_server};
use crate::engine::problems::Problem;
use crate::engine::requests::{Plan, Wanted};
use crate::engine::{self, Engine};
use crate::journal::{GuestPlace, Record};
use crate::outcome::{ErrorCode, Failure};
use crate::protocol::Cause;
use crate::reply::Reply;

/// What an HVM guest has in addition to a [`Guest`].
pub(in crate::engine) struct Hvm {
    server: ServerId,
    taken: Arc<Taken>,
    /// Device and function numbers of the guest's functions.
    pub devices: BTreeSet<Devfn>,
}

impl Hvm {
    pub fn describe(&self) -> String {
        format!("HVM, ioreq server {}", self.server.0)
    }
}

/// A function that an earlier run of the service served.
pub(in crate::engine) struct Resumed {
    pub devfn: Devfn,
    pub function: Box<GuestFunction>,
    pub memory: BTreeMap<u8, Box<dyn BarMemory>>,
}

impl Engine {
    /// Checks an attachment to an HVM guest; the failure lists all obstacles.
    pub(in crate::engine) fn hvm_attachable(&self, wanted: &Wanted) -> Result<Option<Plan>, Failure> {
        let domain = wanted.domain;
        let unnotified = self.has_hotplug(domain).map_err(|failure| {
            failure.hint(
                "shut it down, create it again with 'xl create -p', attach the function, then 'xl unpause'",
            )
        });
        let found = [unnotified, self.can_lose_bars(domain)];
        self.refused(wanted, found.into_iter().filter_map(Result::err).collect())
    }

    /// Refuses running guests without ACPI, which has the hotplug controller.
    fn has_hotplug(&self, domain: DomId) -> Result<(), Failure> {
        if self.platform.hypervisor.domain(domain)?.paused
            || domains::has_acpi(self.platform.store.as_ref(), domain)?
        {
            return Ok(());
        }
        let text = format!(
            "domain {domain} is running without ACPI (acpi=0), over which it would be notified of functions"
        );
        Err(Failure::refused(text).of(domain))
    }

    /// Refuses guests with shadow paging. With Xen 4.17 such a guest was seen to access a BAR after Xen had unmapped it, because the
    /// shadow page tables keep their entries for it.
    pub(in crate::engine) fn can_lose_bars(&self, domain: DomId) -> Result<(), Failure> {
        if !self.platform.hypervisor.domain(domain)?.shadow_paging {
            return Ok(());
        }
        let text = format!(
            "domain {domain} has no hardware-assisted paging: with shadow page tables it would still reach a BAR that it has lost"
        );
        Err(Failure::refused(text)
            .of(domain)
            .hint("remove hap=0 from its xl.cfg and from Xen's command line, and create it again"))
    }

    /// Asks a guest's device model, on a thread because it may take long, which device numbers are in use.
    pub(in crate::engine) fn ask_device_model(&mut self, wanted: Wanted, reply: Reply) {
        let (models, inbox) = (Arc::clone(&self.platform.device_models), self.inbox.clone());
        let work = move || {
            models.slots(wanted.domain).map_err(|error| {
                Failure::from(error)
                    .of(wanted.domain)
                    .hint("is its device model QEMU, in dom0? See /var/log/xen/qemu-dm-NAME.log")
            })
        };
        self.inbox.background(&format!("attach {}", wanted.address), work, move |slots| {
            let event = Event::DeviceModelAsked { wanted, slots: slots.and_then(|slots| slots), reply };
            inbox.send(engine::Event::Guests(event));
        });
    }

    pub(super) fn device_model_asked(
        &mut self,
        wanted: &Wanted,
        slots: Result<Vec<DeviceNumber>, Failure>,
        reply: Reply,
    ) {
        let plan = slots.and_then(|slots| {
            // The state may have changed while the device model was asked.
            let record = self.attachable(wanted.address, wanted.domain, wanted.options.reuse)?;
            // From the highest number down: a device model gives a device that is plugged later the lowest free number.
            let devfn = self.free_place(
                wanted.domain,
                wanted.address,
                wanted.slot,
                DeviceNumber::all().rev(),
                &slots,
            )?;
            self.attachment(record, wanted.domain, devfn, wanted.options.persist)
        });
        let plan = if wanted.options.dry_run { plan.map(Plan::into_dry_run) } else { plan };
        self.carry_out(plan, reply);
    }

    /// Refuses to detach a function from a running HVM guest that cannot be asked to release it: its driver would lose the device
    /// unprepared.
    pub(in crate::engine) fn may_lose(&self, domain: DomId, record: &Record) -> Result<(), Failure> {
        let is_hvm = self.guests.get(domain).is_some_and(|guest| guest.hvm.is_some());
        if !is_hvm || record.announced || self.platform.hypervisor.domain(domain)?.paused {
            return Ok(());
        }
        let unknown = || {
            let text = format!(
                "domain {domain} is running and cannot be asked to release {}: it got it without a placeholder in its device model",
                record.address
            );
            Err(Failure::refused(text).of(domain))
        };
        self.has_hotplug(domain).and_then(|()| unknown()).map_err(|failure| {
            failure.hint("shut it down; or unload the function's driver in it, then detach with --force")
        })
    }

    /// Serves a further function of an HVM guest.
    pub(super) fn serve_hvm(
        &mut self,
        place: GuestPlace,
        mut function: Box<GuestFunction>,
        memory: BTreeMap<u8, Box<dyn BarMemory>>,
    ) -> Result<(), Failure> {
        let domain = place.domain;
        if !self.guests.contains(domain) {
            let server = self.create_server(domain)?;
            self.start_server(domain, server, Arc::default(), BTreeMap::new())?;
        }
        let Some(guest) = self.guests.get_mut(domain) else { return Ok(()) };
        let Some(hvm) = &mut guest.hvm else { return Ok(()) };
        hvm.devices.insert(place.devfn);
        self.functions.handover().reachable.add(function.address());
        let (platform, taken) = (Arc::clone(&self.platform.hvm), Arc::clone(&hvm.taken));
        let device = Device::new(platform, hvm.server, place.devfn.device(), taken, memory);
        let entered = device.enter(&mut function, false);
        // Placed even after a failure, so that the undo of the attachment can withdraw it.
        guest.place(place.devfn, function);
        entered.map_err(|error| Failure::from(error).of(domain))
    }

    /// Creates a server in a domain with a number above all others, because Xen asks the server with the highest number first.
    fn create_server(&self, domain: DomId) -> Result<ServerId, Failure> {
        let hvm = self.platform.hvm.as_ref();
        let others = hvm.servers(domain)?;
        let mut note = ServerNote { others: others.iter().map(|server| server.0).collect(), server: None };
        self.notes().write(domain, &note)?;
        let mut lower = Vec::new();
        let created = loop {
            match hvm.create_server(domain) {
                Ok(server) if others.iter().all(|other| *other < server) => break Ok(server),
                Ok(server) => lower.push(server),
                Err(error) => break Err(error),
            }
        };
        for server in lower {
            hvm.destroy_server(domain, server)?;
        }
        let server = created.map_err(|error| Failure::from(error).of(domain))?;
        note.server = Some(server.0);
        self.notes().write(domain, &note)?;
        Ok(server)
    }

    /// Starts the serving thread for a server.
    fn start_server(
        &mut self,
        domain: DomId,
        server: ServerId,
        taken: Arc<Taken>,
        functions: BTreeMap<Devfn, Box<GuestFunction>>,
    ) -> Result<(), Failure> {
        let hvm = &self.platform.hvm;
        let connected = hvm.connect(domain, server)?;
        hvm.claim_memory(domain, server, ECAM_BASE, ECAM_BYTES, Edit::Add)?;
        let ports = self.config_ports(domain)?;
        hvm.claim_ports(domain, server, CONFIG_ADDRESS, CONFIG_PORTS, Edit::Add)?;
        let inbox = self.inbox.clone();
        let mut guest = Guest::new(Handshake::new(domain));
        guest.hvm =
            Some(Hvm { server, taken: Arc::clone(&taken), devices: functions.keys().copied().collect() });
        let report =
            Box::new(move |report| inbox.send(engine::Event::Guests(Event::Reported(domain, report))));
        let shared = self.has_functions_of_others(domain);
        let (domains, models) = (Arc::clone(&self.platform.hvm), Arc::clone(&self.platform.device_models));
        let connection = Connection { server: connected, ports, taken, domains, models, shared };
        let started = hvm::start(domain, connection, functions, Arc::clone(&guest.counters), report);
        let failed = |error: io::Error| {
            Failure::new(ErrorCode::Failed, format!("cannot start the thread of domain {domain}: {error}"))
                .of(domain)
        };
        guest.server = Some(Arc::new(started.map_err(failed)?));
        self.guests.add(domain, guest);
        info!("domain {domain}: serving it as ioreq server {}", server.0);
        Ok(())
    }

    /// Whether another toolstack has given functions to a guest, or that is unknown.
    fn has_functions_of_others(&self, domain: DomId) -> bool {
        let found = pciback_functions(self.platform.store.as_ref());
        found.map_or(true, |functions| functions.iter().any(|(_, guest)| *guest == domain))
    }

    /// Maps the file with the guest's last write to port CF8, which the next run of the service needs as well.
    fn config_ports(&self, domain: DomId) -> Result<ConfigPorts, Failure> {
        let path = self.ports_notes().path(domain);
        let open = || -> io::Result<ConfigPorts> {
            if let Some(directory) = path.parent() {
                fs::create_dir_all(directory)?;
            }
            let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path)?;
            file.set_len(ConfigPorts::BYTES as u64)?;
            Ok(ConfigPorts::new(SharedMemory::map_file(&file, ConfigPorts::BYTES)?))
        };
        open().map_err(|error| {
            Failure::new(ErrorCode::Failed, format!("map {}: {error}", path.display())).of(domain)
        })
    }

    fn ports_notes(&self) -> Notes {
        Notes::of(&self.settings, "config-ports")
    }

    fn forget_server(&self, domain: DomId) {
        self.notes().remove(domain);
        self.ports_notes().remove(domain);
    }

    /// Takes over an HVM guest from an earlier run.
    pub(in crate::engine) fn resume_hvm(
        &mut self,
        domain: DomId,
        resumed: Vec<Resumed>,
    ) -> Result<(), Failure> {
        let noted = noted_server(&self.settings, domain);
        let present = self.platform.hvm.servers(domain)?;
        let server = match noted.filter(|server| present.contains(server)) {
            Some(server) => server,
            None => {
                self.end_noted_server(domain);
                self.create_server(domain)?
            }
        };
        let taken: Arc<Taken> = Arc::default();
        let mut functions = BTreeMap::new();
        for Resumed { devfn, mut function, memory } in resumed {
            let platform = Arc::clone(&self.platform.hvm);
            let device = Device::new(platform, server, devfn.device(), Arc::clone(&taken), memory);
            if let Err(error) = device.enter(&mut function, true) {
                error!("{}: {error}", function.address());
                let text = format!("{}: {error}", function.address());
                self.problems.push(Problem::new(Cause::Guest, text).on(function.address()).of(domain));
            }
            functions.insert(devfn, function);
        }
        self.start_server(domain, server, taken, functions)
    }

    /// Destroys the server of a guest that has lost its last function.
    pub(super) fn end_server(&self, domain: DomId, hvm: &Hvm) {
        let ended = self.platform.hvm.destroy_server(domain, hvm.server);
        self.note_ended(domain, hvm.server, ended);
        self.forget_server(domain);
    }

    fn note_ended(&self, domain: DomId, server: ServerId, ended: Result<(), PlatformError>) {
        match ended {
            Ok(()) => info!("domain {domain}: ioreq server {} is ended", server.0),
            // Xen destroys the servers of a domain together with it.
            Err(_) if matches!(self.platform.store.domain_exists(domain), Ok(false)) => {}
            Err(error) => warn!("domain {domain}: {error}"),
        }
    }

    /// Destroys servers that an earlier run left in domains that have none of our functions.
    pub(in crate::engine) fn end_stray_servers(&self) {
        let known = |domain: &DomId| self.guests.contains(*domain);
        for domain in self.notes().domains().into_iter().filter(|domain| !known(domain)) {
            self.end_noted_server(domain);
        }
    }

    /// Destroys the server that the note of a domain describes, and removes the note.
    fn end_noted_server(&self, domain: DomId) {
        if let Some(note) = self.notes().read::<ServerNote>(domain) {
            let present = self.platform.hvm.servers(domain).unwrap_or_default();
            let ours = present.into_iter().filter(|server| !note.others.contains(&server.0));
            for server in ours.filter(|server| note.server.is_none_or(|known| known == server.0)) {
                self.note_ended(domain, server, self.platform.hvm.destroy_server(domain, server));
            }
        }
        self.forget_server(domain);
    }

    fn notes(&self) -> Notes {
        Notes::of(&self.settings, SERVERS)
    }
}
