//! A simulated host with processes of the service on it.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::eventfd::EventFd;
use pciback::platform::sim::{self, Fuse, Owner, Simulation};
use pciback::platform::{Host, StoreOps};
use pciback::policy::{PolicyFile, PolicySet};
use pciback::serve::ServerReport;
use pciback::serve::pv::nodes;
use pciback::{DomId, FunctionState, Sbdf};
use tempfile::TempDir;
use toolstack::engine::{Containment, Engine, Event, GuestEvent, Inbox};
use toolstack::guest_names::GuestNames;
use toolstack::journal::{Journal, Record};
use toolstack::outcome::Failure;
use toolstack::protocol::{
    Call, DomainName, Envelope, EventView, FunctionView, Happening, Request, Scope, StatusView, Success,
    VERSION,
};
use toolstack::reset_plan::ResetPlan;
use toolstack::settings::{Assigned, Holder, Settings, WantedVfs};
use toolstack::{client, control};

/// Longer than anything a test waits for takes on a busy machine.
pub const LIMIT: Duration = Duration::from_secs(60);
/// A PV guest with passthrough.
pub const WEB: DomId = DomId(1);
/// Another one.
pub const DB: DomId = DomId(2);

pub fn bdf(text: &str) -> Sbdf {
    text.parse().unwrap()
}

/// The warnings of a change that was made.
pub fn warnings(answer: Result<Success, Failure>) -> String {
    match answer.unwrap() {
        Success::Changed { warnings, .. } => warnings.join("; "),
        other => panic!("{other:?}"),
    }
}

/// Waits until a condition holds that no event reports; each look is a request to the service or as costly.
pub fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !holds() {
        assert!(Instant::now() < deadline, "not within {LIMIT:?}: {what}");
        thread::yield_now();
    }
}

fn two_guests() -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/sim/two-guests.yaml")).unwrap()
}

/// The host, and what outlives the service.
pub struct World {
    pub simulation: Simulation,
    directory: PathBuf,
    /// Removes the directory.
    _temporary: Option<TempDir>,
    boot: String,
}

impl World {
    /// Two guests; the PF 01:00.0 with three VFs, 02:00.0 and 03:00.0.
    pub fn new() -> Self {
        let world = Self::without_vfs();
        world.host().set_vf_autoprobe(bdf("01:00.0"), false).unwrap();
        world.host().set_num_vfs(bdf("01:00.0"), 3, LIMIT).unwrap();
        world
    }

    pub fn without_vfs() -> Self {
        Self::on_xen("4.17")
    }

    /// The same, without VFs, on another version of Xen.
    pub fn on_xen(version: &str) -> Self {
        Self::of(&two_guests().replace("xen: 4.17", &format!("xen: {version}")))
    }

    /// A host without VFs, its service's files in a directory that stays.
    pub fn in_directory(directory: &Path, boot: &str) -> Self {
        Self {
            simulation: Simulation::from_yaml(&two_guests()).unwrap(),
            directory: directory.to_owned(),
            _temporary: None,
            boot: boot.to_owned(),
        }
    }

    /// The host that a YAML text describes.
    pub fn of(host: &str) -> Self {
        let simulation = Simulation::from_yaml(host).unwrap();
        // In memory where that can be had: what the disk takes is no matter of these tests.
        let directory = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        let path = directory.path().to_owned();
        Self { simulation, directory: path, _temporary: Some(directory), boot: "this boot".to_owned() }
    }

    /// Makes one of the service's calls fail, after some good ones.
    pub fn fail(&self, operation: &str, address: Option<Sbdf>, errno: Errno, after: u32) {
        // The guests' connections to xenstore stay open.
        let store = ["read", "list", "write", "remove", "transaction", "watch", "unwatch"];
        let domain = store.contains(&operation).then_some(DomId::DOM0);
        let operation = operation.to_owned();
        let failure = sim::Failure {
            operation,
            address,
            domain,
            errno: Some(errno),
            after,
            times: 1,
            ..sim::Failure::default()
        };
        self.simulation.fail(failure);
    }

    pub fn host(&self) -> Arc<dyn Host> {
        self.simulation.platform("test").unwrap().host
    }

    pub fn settings(&self) -> Settings {
        Settings {
            guest_limit_seconds: 10,
            // xen-pciback prepares MSI-X by itself when it takes a function; this one leaves it to the service.
            holder: Holder::PciStub,
            // Its thread would take failures and kills that are meant for others; without it there is none.
            keep_from_libxl: false,
            run_directory: self.directory.join("run"),
            state_directory: self.directory.join("state"),
            policy_directories: vec![self.directory.join("policies")],
            ..Settings::default()
        }
    }

    /// Starts the service.
    pub fn start(&self) -> Service {
        self.start_service_with(self.settings(), &[])
    }

    /// Starts the service with a policy of its own about errors, the text below `errors:`.
    pub fn start_with_errors(&self, errors: &str) -> Service {
        self.start_with(&[&format!("errors: {{{errors}}}\n")])
    }

    /// Starts the service with a limit for what guests may take, in seconds.
    pub fn start_impatient(&self) -> Service {
        self.start_service_with(
            Settings { guest_limit_seconds: 1, start_limit_seconds: 1, ..self.settings() },
            &[],
        )
    }

    /// Starts the service with these methods of reset in its settings.
    pub fn start_with_resets(&self, methods: &[&str]) -> Service {
        let methods = methods.iter().map(|method| (*method).to_owned()).collect();
        self.start_service_with(
            Settings { reset: ResetPlan { methods, ..ResetPlan::default() }, ..self.settings() },
            &[],
        )
    }

    /// Starts the service with libxl shown what it has.
    pub fn start_with_libxl(&self) -> Service {
        self.start_service_with(Settings { keep_from_libxl: true, ..self.settings() }, &[])
    }

    /// Starts the service with VFs in its settings.
    pub fn start_with_vfs(&self, virtual_functions: Vec<WantedVfs>) -> Service {
        self.start_service_with(Settings { virtual_functions, ..self.settings() }, &[])
    }

    /// Starts the service with settings that give functions to a guest.
    pub fn start_with_guest(&self, guest: &str, functions: &[&str]) -> Service {
        let functions = functions.iter().map(|one| Assigned::try_from((*one).to_owned()).unwrap());
        let guests = BTreeMap::from([(guest.to_owned(), functions.collect())]);
        self.start_service_with(Settings { guests, ..self.settings() }, &[])
    }

    /// Starts the service with these policy files besides.
    pub fn start_with(&self, policies: &[&str]) -> Service {
        self.start_service_with(self.settings(), policies)
    }

    fn start_service_with(&self, settings: Settings, more: &[&str]) -> Service {
        let service = self.start_at_once(settings, more);
        // What it does by itself when it starts has ended when it has answered this; it may have been made to fail.
        let _ = service.call(Request::Sync { dry_run: true });
        service
    }

    /// Starts the service with these policy files besides, and does not wait for what it does by itself when it starts.
    pub fn start_at_once(&self, settings: Settings, more: &[&str]) -> Service {
        let fuse = Fuse::default();
        let platform = self.simulation.platform_with("test", &fuse).unwrap();
        fs::create_dir_all(settings.run_directory.join("images")).unwrap();
        let journal = Journal::open(&settings.state_directory).unwrap();
        let socket = settings.socket();
        // Some tests attach the NVMe controller, which is a PF; most give functions from one running PV guest to the next.
        let permit = "permit: [physical-function]\nreuse: trusted\n";
        let permit = PolicyFile::parse("permit.yaml", permit).unwrap();
        let more = more.iter().map(|text| PolicyFile::parse("more.yaml", text).unwrap());
        let policies = PolicySet::new(more.chain([permit]).collect());
        let names = GuestNames::new(&platform.store);
        let mut engine = Engine::new(platform, settings, policies, journal, self.boot.clone()).unwrap();
        engine.recover().unwrap();
        let inbox = engine.inbox();
        control::listen(&socket, inbox.clone(), names).unwrap();
        let stop = Arc::new(EventFd::new().unwrap());
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || drop(engine.run(stopped.as_fd()).unwrap()));
        Service { socket, stop, fuse, inbox, thread: Some(thread) }
    }

    /// What the journal has of a function.
    pub fn record(&self, address: Sbdf) -> Option<Record> {
        let journal = Journal::open(&self.settings().state_directory).unwrap();
        let (records, errors) = journal.read_all().unwrap();
        assert!(errors.is_empty(), "{errors:?}");
        records.into_iter().find(|record| record.address == address)
    }

    /// Nothing of a function is a guest's, or anywhere but with the quarantine domain.
    pub fn assert_held(&self, service: &Service, address: Sbdf, why: &str) {
        self.assert_nothing_granted(service, address, why);
        assert_eq!(service.state(address), FunctionState::Held, "{why}: {:?}", service.view(address));
        assert_eq!(self.simulation.owner(address), Some(Owner::Quarantine), "{why}");
        assert_eq!(self.host().function(address).unwrap().driver.as_deref(), Some("pci-stub"), "{why}");
        let record = self.record(address).unwrap();
        assert_eq!(
            (record.state, record.guest, record.transaction.as_ref()),
            (FunctionState::Held, None, None),
            "{why}"
        );
        assert!(
            record.grants.is_empty() && !record.msix_prepared && record.quarantine.is_none(),
            "{why}: {record:?}"
        );
    }

    /// No guest can do anything with it, but one has other functions.
    pub fn assert_nothing_granted_but_nodes(&self, address: Sbdf) {
        assert!(!matches!(self.simulation.owner(address), Some(Owner::Guest(_))));
        let vectors = self.simulation.grants(WEB).vectors;
        assert!(vectors.values().all(|vector| vector.address != address), "{vectors:?}");
        assert!(!self.simulation.msix_prepared(address));
    }

    /// No guest can do anything with it.
    pub fn assert_nothing_granted(&self, service: &Service, address: Sbdf, why: &str) {
        // The engine answers when it has done all that came before.
        service.status();
        for domain in [WEB, DB] {
            assert_ne!(self.simulation.owner(address), Some(Owner::Guest(domain)), "{why}");
            let grants = self.simulation.grants(domain);
            assert!(grants.is_empty(), "{why}: {grants:?}");
            // A ring is given up beside the engine, so that no guest delays it, and its nodes are removed after that.
            wait_until(&format!("{why}: its ring is unmapped"), || {
                self.simulation.connected_rings(domain) == 0
            });
            wait_until(&format!("{why}: its nodes are removed"), || self.has_no_nodes(domain));
        }
        assert!(!self.simulation.msix_prepared(address), "{why}: its table is guarded still");
        let image = self.settings().run_directory.join("images").join(address.to_string());
        assert!(!image.exists(), "{why}: its image is left");
        let command = self.simulation.peek(address, 4, 1)[0];
        assert_eq!(command & 1 << 2, 0, "{why}: bus mastering is on");
    }

    fn has_no_nodes(&self, domain: DomId) -> bool {
        let store = self.simulation.store(DomId::DOM0).unwrap();
        [nodes::backend_directory(domain), nodes::frontend_directory(domain)]
            .iter()
            .all(|path| store.read(path).unwrap().is_none())
    }

    /// dom0 owns it, as if it had never been held.
    pub fn assert_host(&self, service: &Service, address: Sbdf, driver: Option<&str>, why: &str) {
        assert_eq!(service.state(address), FunctionState::Host, "{why}: {:?}", service.view(address));
        assert_eq!(self.simulation.owner(address), Some(Owner::Host), "{why}");
        let function = self.host().function(address).unwrap();
        assert_eq!(
            (function.driver.as_deref(), function.driver_override.as_deref()),
            (driver, None),
            "{why}"
        );
        assert_eq!(self.record(address), None, "{why}");
    }
}

/// One run of the service; it stops when it is dropped.
pub struct Service {
    socket: PathBuf,
    stop: Arc<EventFd>,
    /// How it may be killed.
    pub fuse: Fuse,
    inbox: Inbox,
    thread: Option<JoinHandle<()>>,
}

/// A client with a connection of its own.
#[derive(Clone)]
pub struct Operator(PathBuf);

impl Operator {
    pub fn call(&self, request: Request) -> Result<Success, Failure> {
        call(&self.0, request)
    }
}

impl Service {
    pub fn operator(&self) -> Operator {
        Operator(self.socket.clone())
    }

    pub fn call(&self, request: Request) -> Result<Success, Failure> {
        call(&self.socket, request)
    }

    pub fn hold(&self, address: Sbdf) -> Result<Success, Failure> {
        self.call(Request::PciAssignableAdd {
            address,
            force: false,
            persist: false,
            managed: false,
            dry_run: false,
        })
    }

    pub fn release(&self, address: Sbdf) -> Result<Success, Failure> {
        self.call(Request::PciAssignableRemove { address, force: false, trust_former_owner: false })
    }

    pub fn attach(&self, domain: DomId, address: Sbdf) -> Result<Success, Failure> {
        self.call(attachment(domain, address))
    }

    pub fn detach(&self, domain: DomId, address: Sbdf) -> Result<Success, Failure> {
        self.detach_only(domain, address, Scope::All)
    }

    /// Attaches persistently.
    pub fn persist(&self, domain: DomId, address: Sbdf) -> Result<Success, Failure> {
        self.call(Request::PciAttach {
            domain: name(domain),
            address,
            slot: None,
            persist: true,
            managed: false,
            trust_former_owner: false,
            dry_run: false,
        })
    }

    pub fn detach_only(&self, domain: DomId, address: Sbdf, scope: Scope) -> Result<Success, Failure> {
        self.call(Request::PciDetach { domain: name(domain), address, force: false, scope })
    }

    /// What happened to a function as far as errors are concerned.
    pub fn error_history(&self, address: Sbdf) -> Vec<EventView> {
        match self.call(Request::AerHistory { address }) {
            Ok(Success::Events { events }) => events,
            other => panic!("history: {other:?}"),
        }
    }

    /// Waits until something of a function's history is as it should be, and returns that.
    pub fn wait_for_event<T>(
        &self,
        address: Sbdf,
        what: &str,
        wanted: impl Fn(&Happening) -> Option<T>,
    ) -> T {
        let mut found = None;
        wait_until(&format!("{address}: {what}"), || {
            found = self.error_history(address).iter().rev().find_map(|event| wanted(&event.what));
            found.is_some()
        });
        found.unwrap()
    }

    /// Follows events for as long as `heard` wants more; what comes is given to it.
    pub fn follow(&self, mut heard: impl FnMut(&EventView) -> bool + Send + 'static) -> JoinHandle<()> {
        let socket = self.socket.clone();
        thread::spawn(move || {
            let mut stream = UnixStream::connect(socket).unwrap();
            stream.set_read_timeout(Some(LIMIT)).unwrap();
            let call = Call { version: VERSION, id: 7, request: Request::Events { follow: true } };
            writeln!(stream, "{}", serde_json::to_string(&call).unwrap()).unwrap();
            for line in BufReader::new(stream).lines() {
                let envelope: Envelope = serde_json::from_str(&line.unwrap()).unwrap();
                assert_eq!((envelope.id, envelope.ok), (7, None));
                if !heard(&envelope.event.unwrap()) {
                    return;
                }
            }
        })
    }

    pub fn clear(&self, address: Sbdf) -> Result<Success, Failure> {
        self.call(Request::QuarantineClear { address, trust_former_owner: false })
    }

    /// Has the engine handle an event.
    pub fn send(&self, event: Event) {
        self.inbox.send(event);
    }

    /// Decides as the error policies do.
    pub fn contain(&self, address: Sbdf, containment: Containment) {
        self.inbox.contain(address, containment, "the test distrusts it");
    }

    /// Reports as a guest's serving thread does.
    pub fn report(&self, domain: DomId, report: ServerReport) {
        self.inbox.send(Event::Guests(GuestEvent::Reported(domain, report)));
    }

    pub fn status(&self) -> StatusView {
        match self.call(Request::Status) {
            Ok(Success::Status(status)) => status,
            other => panic!("status: {other:?}"),
        }
    }

    /// What is wrong now, as text.
    pub fn problems(&self) -> Vec<String> {
        self.status().problems.into_iter().map(|problem| problem.message).collect()
    }

    pub fn view(&self, address: Sbdf) -> Option<FunctionView> {
        self.status().functions.into_iter().find(|view| view.address == address)
    }

    pub fn state(&self, address: Sbdf) -> FunctionState {
        self.view(address).map_or(FunctionState::Host, |view| view.state)
    }

    /// The same of a service that may have been killed.
    pub fn is_in_state(&self, address: Sbdf, state: FunctionState) -> bool {
        let Ok(Success::Status(status)) = self.call(Request::Status) else { return false };
        status.functions.iter().any(|view| view.address == address && view.state == state)
    }

    pub fn wait_for_state(&self, address: Sbdf, state: FunctionState) {
        wait_until(&format!("{address} is {state}"), || self.state(address) == state);
    }

    /// Ends as on SIGTERM: guests keep their functions.
    pub fn stop(mut self) {
        self.stop.write(1).unwrap();
        self.thread.take().unwrap().join().unwrap();
    }

    /// Ends as on SIGKILL: when this returns, no thread of it is left that could change anything.
    pub fn kill(mut self) {
        self.fuse.blow();
        self.stop.write(1).unwrap();
        // It may have died of itself.
        let _ = self.thread.take().unwrap().join();
        wait_until("the last thread of the killed service ends", || !self.fuse.is_used());
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            let _ = self.stop.write(1);
            let _ = thread.join();
        }
    }
}

/// The usual request to attach a function.
pub fn attachment(domain: DomId, address: Sbdf) -> Request {
    Request::PciAttach {
        domain: name(domain),
        address,
        slot: None,
        persist: false,
        managed: false,
        trust_former_owner: false,
        dry_run: false,
    }
}

pub fn dry_run(service: &Service, domain: DomId, address: Sbdf) -> Result<Success, Failure> {
    service.call(Request::PciAttach {
        domain: name(domain),
        address,
        slot: None,
        persist: false,
        managed: false,
        trust_former_owner: false,
        dry_run: true,
    })
}

pub fn name(domain: DomId) -> DomainName {
    DomainName(domain.to_string())
}

fn call(socket: &Path, request: Request) -> Result<Success, Failure> {
    let envelope = client::call(socket, request.into(), &mut |_| ())?;
    match (envelope.result, envelope.error) {
        (Some(success), None) => Ok(success),
        (_, Some(failure)) => Err(failure),
        (None, None) => panic!("an answer says nothing"),
    }
}
