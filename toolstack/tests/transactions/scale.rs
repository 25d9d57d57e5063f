//! 4,096 VFs of 64 PFs through the whole service while its calls fail at random and functions vanish: in the end each function has
//! one owner, sets of VFs are whole, and what failed is said.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use pciback::platform::sim::Owner;
use pciback::{DomId, FunctionState, Sbdf};
use toolstack::outcome::{ErrorCode, Failure};
use toolstack::protocol::{FunctionView, Request, StatusView, Success};

use crate::frontend::Frontend;
use crate::world::{Service, World, wait_until};

const PFS: u8 = 64;
const VFS: u16 = 64;
const GUESTS: u16 = 8;
/// Clients that work at the same time.
const CLIENTS: u8 = 8;
/// One call in so many fails; a hold makes about 15, an attach about 60.
const ONE_IN: u64 = 400;
const LIMIT: Duration = Duration::from_secs(60);

fn pf(number: u8) -> Sbdf {
    Sbdf::from_devfn(0, number, 0)
}

fn vf(number: u8, index: u16) -> Sbdf {
    Sbdf::from_devfn(0, number, 1 + index as u8)
}

fn guest(number: u8) -> DomId {
    DomId(1 + u16::from(number) % GUESTS)
}

fn host() -> String {
    let mut text = "drivers: [i40e, iavf, pci-stub]\nfunctions:\n".to_owned();
    for number in 0..PFS {
        let _ =
            writeln!(text, "  - {{address: '{}', model: many-vfs, interfaces: [eth{number}]}}", pf(number));
    }
    text.push_str("domains:\n");
    for id in 1..=GUESTS {
        let _ = writeln!(text, "  - {{id: {id}, name: guest{id}, type: pv, passthrough: true}}");
    }
    text
}

/// Does something for each PF, some at a time.
fn for_each_pf(work: impl Fn(u8) + Sync) {
    thread::scope(|scope| {
        for client in 0..CLIENTS {
            let work = &work;
            scope.spawn(move || (client..PFS).step_by(usize::from(CLIENTS)).for_each(work));
        }
    });
}

/// The most memory that this process had, in KiB.
fn peak_memory() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches("kB").trim().parse().unwrap()
}

/// Counts outcomes, prints how long each part took.
struct Report {
    failed: AtomicUsize,
    began: Instant,
}

impl Report {
    /// A failure must say what kind of failure it is, and nothing else may happen than what failures lead to.
    fn take(&self, outcome: &Result<Success, Failure>) {
        let Err(failure) = outcome else { return };
        let said = [ErrorCode::Failed, ErrorCode::Quarantined, ErrorCode::Refused, ErrorCode::NotFound];
        assert!(said.contains(&failure.code) && !failure.message.is_empty(), "{failure:?}");

        self.failed.fetch_add(1, Ordering::Relaxed);
    }

    fn part(&mut self, what: &str) {
        let failed = self.failed.swap(0, Ordering::Relaxed);
        println!(
            "{what}: {:.2?}, {failed} requests failed, {} MiB",
            self.began.elapsed(),
            peak_memory() / 1024
        );
        self.began = Instant::now();
    }
}

/// Nothing is under way any more: comparing once more changes nothing.
fn settle(service: &Service) -> StatusView {
    let mut last = service.status();
    wait_until("nothing is under way", || {
        let synced = service.call(Request::Sync { dry_run: false });
        let before = std::mem::replace(&mut last, service.status());
        let under_way = [FunctionState::Attaching, FunctionState::Detaching, FunctionState::Resetting];
        synced.is_ok()
            && last.functions == before.functions
            && last.functions.iter().all(|view| {
                let quiet = view.note.is_none() || view.state == FunctionState::Quarantined;
                quiet && !under_way.contains(&view.state)
            })
    });
    last
}

/// sysfs, Xen and the service say the same of each function.
fn assert_in_step(world: &World, status: &StatusView) {
    let (host, owners) = (world.host(), world.simulation.owners());
    let present = host.functions().unwrap();
    assert_eq!(owners.keys().copied().collect::<Vec<_>>(), present, "Xen's list is sysfs's");
    let records: BTreeMap<Sbdf, &FunctionView> =
        status.functions.iter().map(|view| (view.address, view)).collect();
    for address in present {
        let driver = host.function(address).unwrap().driver;
        let (owner, record) = (owners[&address], records.get(&address));
        match record.map_or(FunctionState::Host, |record| record.state) {
            FunctionState::Host => assert_eq!(owner, Owner::Host, "{address}: {record:?}"),
            FunctionState::Held => {
                assert_eq!((owner, driver.as_deref()), (Owner::Quarantine, Some("pci-stub")), "{address}");
            }
            FunctionState::Attached => {
                assert_eq!(Some(owner), record.unwrap().domain.map(Owner::Guest), "{address}");
            }
            FunctionState::Quarantined => {
                let said = format!("{address} is quarantined: ");
                assert!(
                    status.problems.iter().any(|problem| problem.message.starts_with(&said)),
                    "{address}"
                );
            }
            other => panic!("{address} is {other}: {record:?}"),
        }
    }
    for number in 0..PFS {
        let function = host.function(pf(number)).unwrap();
        assert!([0, VFS / 2, VFS].contains(&function.num_vfs), "{}: {} VFs", pf(number), function.num_vfs);
    }
}

#[test]
fn all_4096_vfs_of_64_pfs_appear_fail_and_leave_with_consistent_lists() {
    let world = World::of(&host());
    let frontends: Vec<Frontend> = (1..=GUESTS).map(|id| Frontend::load(&world, DomId(id))).collect();
    let service = world.start();
    let mut report = Report { failed: AtomicUsize::default(), began: Instant::now() };
    world.simulation.fail_at_random(4096, ONE_IN);

    for_each_pf(|number| {
        // Not 'vf create': where taking back what came up only in part failed, there are some already.
        let create = Request::VfSetCount { address: pf(number), count: VFS };
        wait_until("its VFs are there", || {
            let outcome = service.call(create.clone());
            report.take(&outcome);
            outcome.is_ok()
        });
    });
    report.part("4,096 VFs created");
    for_each_pf(|number| {
        (0..VFS).for_each(|index| report.take(&service.hold(vf(number, index))));
    });
    report.part("held");
    // An attach reads all of a config space, a thousand calls.
    let failed = world.simulation.end_random_failures();
    world.simulation.fail_at_random(4097, 50 * ONE_IN);
    for_each_pf(|number| report.take(&service.attach(guest(number), vf(number, 0))));
    report.part("one of each PF attached");

    let failed = failed + world.simulation.end_random_failures();
    world.simulation.fail_at_random(4098, ONE_IN);

    // A quarter of the cards is treated badly, each in another way.
    for_each_pf(|number| match number % 16 {
        0 => (0..8).for_each(|index| world.simulation.unplug(vf(number, index))),
        1 => world.simulation.unplug(pf(number)),
        2 => world.simulation.while_events_are_lost(|| world.simulation.unplug(vf(number, 9))),
        3 => {
            (0..VFS).for_each(|index| report.take(&service.release(vf(number, index))));
            report.take(&service.call(Request::VfSetCount { address: pf(number), count: VFS / 2 }));
        }
        4 => drop(world.host().set_num_vfs(pf(number), 0, LIMIT)),
        5 => report.take(&service.detach(guest(number), vf(number, 0))),
        _ => {}
    });
    report.part("a quarter of the cards treated badly");
    let failed = failed + world.simulation.end_random_failures();
    println!("{failed} calls failed");
    assert!(failed > 50, "hardly anything was tried");
    for number in (0..PFS).filter(|number| number % 16 == 1) {
        let text = format!("{{address: '{}', model: many-vfs}}", pf(number));
        world.simulation.plug(&text).unwrap();
    }
    let status = settle(&service);
    report.part("settled");
    assert_in_step(&world, &status);

    // Everything can be made whole and taken down.
    for_each_pf(|number| {
        let of_this = |view: &&FunctionView| view.address.bus() == number;
        for view in status.functions.iter().filter(of_this) {
            let address = view.address;
            match (view.state, view.domain) {
                (FunctionState::Quarantined, _) => drop(service.clear(address).unwrap()),
                (FunctionState::Attached, Some(domain)) => drop(service.detach(domain, address).unwrap()),
                _ => {}
            }
            service.release(address).unwrap();
        }
        service.call(Request::VfDestroy { address: pf(number) }).unwrap();
    });
    report.part("taken down");
    let status = settle(&service);
    assert_in_step(&world, &status);
    assert_eq!((status.functions.len(), world.simulation.owners().len()), (0, usize::from(PFS)));
    assert!((1..=GUESTS).all(|id| world.simulation.grants(DomId(id)).is_empty()));
    drop(frontends);
}
