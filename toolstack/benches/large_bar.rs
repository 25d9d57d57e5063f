//! A BAR of 16 GiB in an HVM guest, through the whole service on a simulated host: how long the guest waits when it switches decoding on and
//! off, and how long a restarted service takes to serve the guest.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a benchmark that fails says so by panicking")]

use std::fs;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sys::eventfd::EventFd;
use pciback::platform::sim::{SimHvmGuest, Simulation};
use pciback::policy::PolicySet;
use pciback::serve::hvm::wire::xen::config;
use pciback::{DeviceNumber, DomId, Sbdf};
use toolstack::client;
use toolstack::control;
use toolstack::engine::Engine;
use toolstack::guest_names::GuestNames;
use toolstack::journal::Journal;
use toolstack::protocol::{DomainName, Request};
use toolstack::settings::Settings;

const HOST: &str = r#"
drivers: [pci-stub]
models:
  large:
    reset-methods: [flr]
    bars: {0: "400000000"}
    config: |
      00: 86 80 10 00 00 00 10 00 02 00 00 03 00 00 00 00
      10: 0c 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00
      30: 00 00 00 00 a0 00 00 00 00 00 00 00 00 00 00 00
      a0: 10 00 02 00 20 80 00 10 00 00 00 00 11 04 00 00
      b0: 00 00 11 00 00 00 00 00 00 00 00 00 00 00 00 00
functions:
  - {address: "02:00.0", model: large, bars: {0: "4000000000"}}
"#;
const ADDRESS: Sbdf = Sbdf::from_devfn(0, 2, 0);
const GUEST: DomId = DomId(7);
const SLOT: u8 = 0x1f;
/// Where the guest puts it.
const PLACE: u64 = 0x20_0000_0000;
const LIMIT: Duration = Duration::from_secs(600);

fn main() {
    let directory = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    let simulation = Simulation::from_yaml(HOST).unwrap();
    simulation.create_hvm(GUEST, "win").unwrap();
    let guest = simulation.hvm_guest(GUEST);
    let service = Service::start(&simulation, directory.path());
    service.ask(Request::PciAssignableAdd {
        address: ADDRESS,
        force: false,
        persist: false,
        managed: false,
        dry_run: false,
    });
    service.ask(Request::PciAttach {
        domain: DomainName(GUEST.to_string()),
        address: ADDRESS,
        slot: DeviceNumber::new(SLOT),
        persist: false,
        managed: false,
        trust_former_owner: false,
        dry_run: false,
    });
    for (offset, value) in [(0x10, PLACE as u32), (0x14, (PLACE >> 32) as u32)] {
        write(&guest, offset, 4, value);
    }
    println!("16 GiB    on         off        on again   restarted");
    let [on, off, again] = [2, 0, 2].map(|command| timed(|| write(&guest, 4, 2, command)));
    service.stop();
    let restarted = timed(|| {
        let service = Service::start(&simulation, directory.path());
        guest.begin(&config(SLOT, 0, 2, None)).unwrap().answer(LIMIT).unwrap();
        service.stop();
    });
    println!("          {on:<10.1?} {off:<10.1?} {again:<10.1?} {restarted:.1?}");
}

fn write(guest: &SimHvmGuest, offset: u16, size: u32, value: u32) {
    guest.begin(&config(SLOT, offset, size, Some(value))).unwrap().answer(LIMIT).unwrap();
}

fn timed(work: impl FnOnce()) -> Duration {
    let began = Instant::now();
    work();
    began.elapsed()
}

/// One run of the service.
struct Service {
    settings: Settings,
    stop: Arc<EventFd>,
    thread: JoinHandle<()>,
}

impl Service {
    fn start(simulation: &Simulation, directory: &Path) -> Self {
        let settings = Settings {
            run_directory: directory.join("run"),
            state_directory: directory.join("state"),
            ..Settings::default()
        };
        fs::create_dir_all(settings.run_directory.join("images")).unwrap();
        let platform = simulation.platform("benchmark").unwrap();
        let journal = Journal::open(&settings.state_directory).unwrap();
        let names = GuestNames::new(&platform.store);
        let policies = PolicySet::default();
        let mut engine = Engine::new(platform, settings.clone(), policies, journal, "boot".into()).unwrap();
        engine.recover().unwrap();
        control::listen(&settings.socket(), engine.inbox(), names).unwrap();
        let stop = Arc::new(EventFd::new().unwrap());
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || drop(engine.run(stopped.as_fd()).unwrap()));
        Self { settings, stop, thread }
    }

    fn ask(&self, request: Request) {
        let envelope = client::call(&self.settings.socket(), request.into(), &mut |_| ()).unwrap();
        assert!(envelope.error.is_none(), "{:?}", envelope.error);
    }

    fn stop(self) {
        self.stop.write(1).unwrap();
        self.thread.join().unwrap();
    }
}
