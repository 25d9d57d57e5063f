//! Classes of faults that Xen's and QEMU's passthrough has had, each shown not to be here. The numbers are those of Xen's security
//! advisories.
//!
//! Others show: pages, lines and groups that are shared (461) in `sharing`, reserved memory that is shared in `reserved_memory`; that
//! hardware is switched off before a guest loses a function (302, 306) in `quarantine`; what a PV guest keeps mapped in `former_owners`;
//! a request page with anything on it and a ring whose events never end in the serving thread's own tests.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use log::{Level, LevelFilter, Log, Metadata};
use pciback::platform::{StoreOps, sim};
use pciback::serve::ServerReport;
use pciback::serve::hvm::wire::xen::{config, memory};
use pciback::serve::pv::nodes;
use pciback::serve::pv::nodes::XenbusState;
use pciback::serve::pv::wire::{Command, MsixEntry, WireError};
use pciback::{DomId, FunctionState, Sbdf};

use crate::errors::VF;
use crate::frontend::{Frontend, msix_op, op, read_op, write_op};
use crate::hvm::{BAR3, MSIX_CONTROL, SLOT, TABLE, VENDOR, bound, set_up};
use crate::world::{DB, LIMIT, WEB, World, bdf, wait_until};
use crate::{errors, guests, hvm};

const COMMAND: u32 = 4;
const MEMORY_AND_IO: u8 = 0b11;
const BUS_MASTER: u32 = 1 << 2;
/// The 82576 as a whole: I/O ports, MSI and MSI-X.
const PF: &str = "01:00.0";

fn config_space(world: &World, address: Sbdf) -> Vec<u8> {
    (0..4096).step_by(256).flat_map(|offset| world.simulation.peek(address, offset, 256)).collect()
}

/// Where a capability of the first 256 bytes is.
fn capability(bytes: &[u8], id: u8) -> usize {
    let mut at = usize::from(bytes[0x34]);
    while at != 0 {
        if bytes[at] == id {
            return at;
        }
        at = usize::from(bytes[at + 1]);
    }
    panic!("no capability {id:#x}");
}

/// Lines of the log that name a domain which only one test has.
struct Lines(AtomicUsize);

const TALKATIVE: DomId = DomId(4311);
static LINES: Lines = Lines(AtomicUsize::new(0));

impl Log for Lines {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= Level::Info
    }

    fn log(&self, record: &log::Record<'_>) {
        if self.enabled(record.metadata()) && record.args().to_string().contains("domain 4311") {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn flush(&self) {}
}

/// 43, 130: what a guest causes is logged without limit.
#[test]
fn log_flood_of_a_guest_that_keeps_reconnecting_is_limited() {
    const CONNECTIONS: usize = 300;
    // The burst of one guest, and what attach and the first connection say.
    const MOST: usize = 250;
    log::set_logger(&LINES).unwrap();
    log::set_max_level(LevelFilter::Info);
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/sim/two-guests.yaml");
    let host = fs::read_to_string(path).unwrap().replace("{id: 1, name: web", "{id: 4311, name: web");
    let (world, address) = (World::of(&host), bdf("02:00.0"));
    let service = world.start();
    service.hold(address).unwrap();
    service.attach(TALKATIVE, address).unwrap();
    let (store, state) = (
        world.simulation.store(TALKATIVE).unwrap(),
        format!("{}/state", nodes::frontend_directory(TALKATIVE)),
    );
    for connection in 0..CONNECTIONS {
        store.write(&state, XenbusState::INITIALISING.0.to_string().as_bytes()).unwrap();
        let frontend = Frontend::load(&world, TALKATIVE);
        wait_until(&format!("connection {connection}"), || frontend.is_connected());
        frontend.unload();
    }
    let lines = LINES.0.load(Ordering::Relaxed);
    assert!((1..MOST).contains(&lines), "{lines} lines for {CONNECTIONS} connections");
}

/// 349: watch events of one guest keep the backend from everybody else.
#[test]
fn watch_flood_of_a_guest_delays_no_other_request() {
    let world = World::new();
    let (_frontend, service) = errors::attached(&world, "");
    // A look at the guest takes xenstored a while; thousands of them take minutes.
    world.simulation.fail(sim::Failure {
        operation: "read".into(),
        domain: Some(DomId::DOM0),
        path: Some(nodes::frontend_directory(WEB)),
        delay: Duration::from_millis(50),
        times: u32::MAX,
        ..sim::Failure::default()
    });
    let store = world.simulation.store(WEB).unwrap();
    let noise = format!("{}/noise", nodes::frontend_directory(WEB));
    for number in 0..5000u32 {
        store.write(&noise, number.to_string().as_bytes()).unwrap();
    }
    let begun = Instant::now();
    assert_eq!(service.state(bdf(VF)), FunctionState::Attached);
    assert!(begun.elapsed() < LIMIT, "{:?} for an answer", begun.elapsed());
    world.simulation.forget_failures();
}

/// 43, 130, in the status instead of the log.
#[test]
fn status_flood_of_a_guest_whose_ring_keeps_failing_is_limited() {
    let world = World::new();
    let (_frontend, service) = errors::attached(&world, "");
    for number in 0..10_000 {
        service.report(WEB, ServerReport::Failed(format!("its ring, connection {number}")));
    }
    let problems = service.problems();
    assert!((1..=8).contains(&problems.len()), "{} problems", problems.len());
    assert!(problems.iter().any(|problem| problem.contains("connection 9999")), "{problems:?}");
    world.simulation.destroy(WEB);
    assert_eq!(service.problems(), [""; 0], "its problems end with the guest");
}

/// 120, 126: a guest switches off decoding, and the host's access to the device ends in an error of the platform's.
#[test]
fn decoding_that_a_guest_switches_off_stays_on_in_hardware() {
    let world = World::without_vfs();
    let (frontend, _service) = guests::attached(&world, WEB, &[bdf(PF)]);
    let decodes = || world.simulation.peek(bdf(PF), 4, 1)[0] & MEMORY_AND_IO;
    let before = decodes();
    assert_ne!(before, 0);
    for value in [3, 0] {
        assert_eq!(frontend.ask(&write_op(0, COMMAND, 2, value)).0, 0);
        assert_eq!((frontend.read(0, COMMAND, 2) & 3, decodes()), (value, before));
    }
}

/// 124, 131: unknown registers let a guest do the unexpected.
#[test]
fn unknown_registers_are_not_written_where_the_policy_is_strict() {
    const HOST: &str = r#"
drivers: [pci-stub]
models:
  card:
    size: 4096
    reset-methods: [flr]
    bars: {0: 1000}
    writable: {"f0": ffffffff, "800": ffffffff}
    config: |
      00: 86 80 d3 10 00 00 10 00 00 00 00 02 00 00 00 00
      30: 00 00 00 00 a0 00 00 00 00 00 00 00 00 00 00 00
      a0: 10 00 02 00 00 00 00 10 00 00 00 00 11 04 00 00
functions:
  - {address: "02:00.0", model: card}
domains:
  - {id: 1, name: web, type: pv, passthrough: true}
  - {id: 2, name: db, type: pv, passthrough: true}
"#;
    let (world, card) = (World::of(HOST), bdf("02:00.0"));
    let frontend = Frontend::load(&world, WEB);
    let service = world.start_with(&["profile: strict\n"]);
    service.hold(card).unwrap();
    service.attach(WEB, card).unwrap();
    wait_until("the guest has its function", || frontend.ask(&read_op(0, 0, 4)).0 == 0);
    let before = config_space(&world, card);
    for offset in (0x40..0x1000).step_by(4).filter(|offset| !(0xa0..0xdc).contains(offset)) {
        assert_eq!(frontend.ask(&write_op(0, offset, 4, u32::MAX)).0, 0, "{offset:#x}");
    }
    assert_eq!(config_space(&world, card), before);
    for beyond in [0x1000, 0xffff_fffc] {
        assert_eq!(frontend.ask(&write_op(0, beyond, 4, u32::MAX)).0, WireError::InvalidOffset.number());
    }
}

/// 128, 129, 337: a guest writes MSI's address, data, masks or Enable itself.
#[test]
fn msi_registers_are_not_written_by_a_guests_config_writes() {
    let world = World::without_vfs();
    let (frontend, _service) = guests::attached(&world, WEB, &[bdf(PF)]);
    let before = config_space(&world, bdf(PF));
    for (id, bytes) in [(0x05, 0x18), (0x11, 0x0c)] {
        let start = capability(&before, id);
        for offset in (start..start + bytes).step_by(4) {
            for (at, size) in [(offset, 4), (offset + 2, 2)] {
                frontend.ask(&write_op(0, at as u32, size, u32::MAX));
            }
        }
        let now = config_space(&world, bdf(PF));
        assert_eq!(now[start..start + bytes], before[start..start + bytes], "capability {id:#x}");
    }
    assert!(world.simulation.grants(WEB).vectors.is_empty());
}

/// 155: a field of the shared page is checked, and read once more when it is used.
#[test]
fn fields_that_change_while_a_request_is_read_reach_only_what_was_checked() {
    // Words of the page (`struct xen_pci_op` behind the flags).
    const OFFSET: usize = 6;
    const SIZE: usize = 7;
    const VALUE: usize = 8;
    let world = World::new();
    let (frontend, service) = guests::attached(&world, WEB, &[bdf(VF)]);
    let before = config_space(&world, bdf(VF));
    for _ in 0..300 {
        let flip = |page: &[AtomicU32]| {
            for (offset, size) in [(COMMAND, 2), (0x1_0004, 2), (0xffff_fffc, 4), (COMMAND, 0x8000_0000)] {
                page[OFFSET].store(offset, Ordering::Relaxed);
                page[SIZE].store(size, Ordering::Relaxed);
            }
        };
        let answer = frontend.ask_while(&write_op(0, COMMAND, 2, BUS_MASTER), flip);
        assert!([0, WireError::InvalidOffset.number()].contains(&answer.0), "{answer:?}");
        let counts = |page: &[AtomicU32]| {
            for count in [2, 129, u32::MAX] {
                page[VALUE].store(count, Ordering::Relaxed);
            }
        };
        frontend.ask_while(&msix_op(0, 2), counts);
        assert!(world.simulation.grants(WEB).vectors.len() <= 3);
        frontend.ask(&op(Command::DISABLE_MSIX, 0));
    }
    let now = config_space(&world, bdf(VF));
    let changed: BTreeSet<usize> =
        (0..before.len()).filter(|at| before[*at] != now[*at]).map(|at| at & !1).collect();
    assert!(changed.is_subset(&BTreeSet::from([COMMAND as usize])), "{changed:x?}");
    assert_eq!(service.state(bdf(VF)), FunctionState::Attached);
}

/// 157: a list of MSI-X entries that is longer than the table, or names entries that are not there.
#[test]
fn msix_lists_that_are_too_long_or_have_invalid_entries_map_nothing() {
    let world = World::new();
    let (frontend, service) = guests::attached(&world, WEB, &[bdf(VF)]);
    let list = |entries: &[u16], count: u32| {
        let mut request = msix_op(0, 0);
        request.value = count;
        for (place, entry) in request.entries.iter_mut().zip(entries) {
            *place = MsixEntry { vector: 0, entry: *entry };
        }
        request
    };
    for (entries, count) in [
        (&[0, 1, 2, 3][..], 4),
        (&[3], 1),
        (&[0xffff], 1),
        (&[1, 1], 2),
        (&[], 0),
        (&[], 129),
        (&[], u32::MAX),
    ] {
        frontend.put(&list(entries, count));
        assert_eq!(frontend.take(0).0, WireError::Failed.number(), "{entries:?}, {count}");
        assert!(world.simulation.grants(WEB).vectors.is_empty(), "{entries:?}, {count}");
    }
    assert_eq!(frontend.ask(&msix_op(0, 3)).0, 0);
    assert_eq!(service.state(bdf(VF)), FunctionState::Attached);
}

/// 164: an access behind the last entry of the MSI-X table.
#[test]
fn tables_end_with_their_last_entry() {
    let (world, guest, _service) = hvm::attached();
    guest.write(BAR3, 4, TABLE as u32);
    guest.write(MSIX_CONTROL, 2, 0x8000);
    // The VF has three.
    for entry in [3, 4, 127, 254] {
        set_up(&guest, entry, 0x41);
        assert_eq!((bound(&guest), world.simulation.grants(hvm::WIN).vectors.len()), (vec![], 0), "{entry}");
    }
    guest.ask(&memory(TABLE + 0xff8, 8, Some(u64::MAX)));
    set_up(&guest, 2, 0x42);
    assert_eq!(bound(&guest), [(0x42, TABLE)]);
}

/// 166, 262, 276: a device model's request page with sizes and addresses that no vCPU sends.
#[test]
fn ioreq_requests_that_make_no_sense_are_answered_and_change_nothing() {
    let (world, guest, service) = hvm::attached();
    let before = config_space(&world, bdf(VF));
    for size in [0, 3, 5, 9, 0x8000_0000, u32::MAX] {
        let request = config(SLOT, 4, size, Some(u32::MAX));
        guest.ask(&request);
    }
    for offset in [0xfd, 0xff, 0x1fe, 0xffff] {
        guest.ask(&config(SLOT, offset, 4, Some(u32::MAX)));
    }
    assert_eq!(guest.read(SLOT, VENDOR, 4), 0x10ca_8086);
    assert_eq!(config_space(&world, bdf(VF)), before);
    assert_eq!(service.state(bdf(VF)), FunctionState::Attached);
}

/// 238: a slot or a function number that is not the guest's.
#[test]
fn slots_without_a_function_of_the_guest_do_not_answer() {
    let world = World::new();
    let (frontend, _service) = guests::attached(&world, WEB, &[bdf(VF)]);
    let before = config_space(&world, bdf("01:10.2"));
    for devfn in [1, 7, 8, 0x80, 0xff, 0x100, 0x180, u32::MAX] {
        for command in [Command::CONF_READ, Command::CONF_WRITE, Command::ENABLE_MSIX, Command::ENABLE_MSI] {
            let answer = frontend.ask(&op(command, devfn));
            assert_eq!(answer.0, WireError::NoDevice.number(), "{command:?} of {devfn:#x}");
        }
    }
    for (domain, bus) in [(1, 0), (0, 1), (u32::MAX, u32::MAX)] {
        let mut elsewhere = read_op(0, 0, 4);
        (elsewhere.domain, elsewhere.bus) = (domain, bus);
        assert_eq!(frontend.ask(&elsewhere).0, WireError::NoDevice.number(), "{domain:x}:{bus:x}");
    }
    assert_eq!(config_space(&world, bdf("01:10.2")), before);
}

/// 332, 391: events without end from one guest.
#[test]
fn event_storm_of_a_guest_delays_no_other_request() {
    let world = World::new();
    let (web, service) = guests::attached(&world, WEB, &[bdf(VF)]);
    let db = Frontend::load(&world, DB);
    service.hold(bdf("01:10.2")).unwrap();
    service.attach(DB, bdf("01:10.2")).unwrap();
    wait_until("the other guest has its function", || db.ask(&read_op(0, 0, 4)).0 == 0);
    let calm = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !calm.load(Ordering::Relaxed) {
                web.notify();
            }
        });
        for _ in 0..100 {
            assert_eq!(db.read(0, 0, 2), 0x8086);
        }
        let detached = service.detach(WEB, bdf(VF));
        calm.store(true, Ordering::Relaxed);
        detached.unwrap();
    });
    assert_eq!(service.state(bdf(VF)), FunctionState::Held);
    assert_eq!(db.read(0, 0, 2), 0x8086);
}

/// 476: something of a function stays with the guest that has lost it.
#[test]
fn leftovers_there_are_none_after_ten_attachments() {
    let world = World::new();
    let (frontend, service) = guests::attached(&world, WEB, &[bdf("01:10.0")]);
    for turn in 0..10 {
        assert_eq!(frontend.ask(&msix_op(0, 3)).0, 0, "turn {turn}");
        frontend.ask(&write_op(0, COMMAND, 2, BUS_MASTER));
        service.detach(WEB, bdf("01:10.0")).unwrap();
        world.assert_held(&service, bdf("01:10.0"), &format!("turn {turn}"));
        service.attach(WEB, bdf("01:10.0")).unwrap();
    }
}
