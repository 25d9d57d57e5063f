//! What guests do with what they have: connect, read, interrupts, more functions and fewer, resets, ends.

use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use pciback::platform::sim::Moment;
use pciback::platform::{StoreOps, sim};
use pciback::serve::pv::nodes;
use pciback::serve::pv::wire::{Command, WireError};
use pciback::{DomId, FunctionState, Sbdf};
use toolstack::outcome::ErrorCode;
use toolstack::protocol::{Request, Scope};

use crate::frontend::{Frontend, msix_op, op, read_op, write_op};
use crate::world::{DB, LIMIT, Service, WEB, World, bdf, name, wait_until};

const VENDOR: u32 = 0;
const COMMAND: u32 = 4;
const BUS_MASTER: u32 = 1 << 2;
/// Device Control of the VFs, whose PCI Express capability lies at 0xa0.
const DEVICE_CONTROL: u32 = 0xa8;
const INITIATE_FLR: u32 = 1 << 15;

/// A guest that uses these functions.
pub fn attached(world: &World, domain: DomId, addresses: &[Sbdf]) -> (Frontend, Service) {
    let frontend = Frontend::load(world, domain);
    let service = world.start();
    for address in addresses {
        service.hold(*address).unwrap();
        service.attach(domain, *address).unwrap();
    }
    // An attachment ends when the function is published; the guest can use it when its handshake has ended.
    for devfn in (0..addresses.len() as u32).map(|slot| slot << 3) {
        wait_until("the guest has its functions", || frontend.ask(&read_op(devfn, VENDOR, 4)).0 == 0);
    }
    (frontend, service)
}

#[test]
fn a_guest_reads_its_vf_with_the_ids_from_the_pf_and_nothing_else_answers() {
    let world = World::new();
    let (frontend, service) = attached(&world, WEB, &[bdf("01:10.0")]);
    assert_eq!(frontend.read(0, VENDOR, 4), 0x10ca_8086);
    for devfn in [1, 8, 255] {
        assert_eq!(frontend.ask(&read_op(devfn, VENDOR, 4)).0, WireError::NoDevice.number(), "{devfn}");
    }
    let guest = &service.status().guests[0];
    assert_eq!((guest.domain, guest.frontend.as_str()), (WEB, "connected"));
    assert!(guest.requests >= 3, "{guest:?}");
}

#[test]
fn every_sixteenth_request_is_counted_by_how_long_it_took() {
    let world = World::new();
    let vf = bdf("01:10.0");
    let (frontend, service) = attached(&world, WEB, &[vf]);
    let slow = |service: &Service| {
        let guest = &service.status().guests[0];
        let is_slow = |bound: Option<u64>| bound.is_none_or(|bound| bound > 25_000);
        let slow = guest.times.buckets.iter().filter(|bucket| is_slow(bucket.up_to_microseconds));
        (slow.map(|bucket| bucket.requests).sum::<u64>(), guest.times.total_nanoseconds)
    };
    let (before, _) = slow(&service);
    world.simulation.fail(sim::Failure {
        operation: "config_read".into(),
        address: Some(vf),
        delay: Duration::from_millis(30),
        times: 1000,
        ..sim::Failure::default()
    });
    for _ in 0..16 {
        frontend.read(0, DEVICE_CONTROL, 4);
    }
    wait_until("one is counted with those that take longer than 25 ms", || slow(&service).0 > before);
    assert!(slow(&service).1 >= 30_000_000);
    wait_until("a sixteenth is counted", || {
        let guest = &service.status().guests[0];
        let counted: u64 = guest.times.buckets.iter().map(|bucket| bucket.requests).sum();
        counted == guest.requests.div_ceil(16)
    });
}

#[test]
fn a_line_shared_by_two_functions_of_a_guest_is_revoked_with_the_second() {
    let (world, [first, second]) = (World::without_vfs(), [bdf("04:00.0"), bdf("05:00.0")]);
    // Nothing in dom0 uses it.
    world.host().unbind(bdf("01:00.0"), LIMIT).unwrap();
    for address in [first, second] {
        world.simulation.plug(&format!("{{address: \"{address}\", model: nvme, irq: 21}}")).unwrap();
    }
    let (_web, service) = attached(&world, WEB, &[first, second]);
    let lines = || world.simulation.grants(WEB).lines;
    let ports_and_frames = |world: &World| world.simulation.grants(WEB).frames.len();
    let both = ports_and_frames(&world);
    assert_eq!(lines(), [21]);
    service.detach(WEB, first).unwrap();
    assert_eq!((lines(), ports_and_frames(&world)), (vec![21], both / 2));
    // A restarted service knows it from its journal.
    service.attach(WEB, first).unwrap();
    service.stop();
    let service = world.start();
    service.detach(WEB, second).unwrap();
    assert_eq!(lines(), [21]);
    service.detach(WEB, first).unwrap();
    assert!(world.simulation.grants(WEB).is_empty());
}

#[test]
fn two_guests_have_a_vf_each_and_do_not_see_the_others() {
    let world = World::new();
    let (web, service) = attached(&world, WEB, &[bdf("01:10.0")]);
    let db = Frontend::load(&world, DB);
    service.hold(bdf("01:10.2")).unwrap();
    service.attach(DB, bdf("01:10.2")).unwrap();
    assert_eq!(web.ask(&msix_op(0, 3)).0, 0);
    assert_eq!(db.ask(&msix_op(0, 2)).0, 0);
    let of = |domain, address: &str| {
        world
            .simulation
            .grants(domain)
            .vectors
            .values()
            .filter(|vector| vector.address == bdf(address))
            .count()
    };
    assert_eq!((of(WEB, "01:10.0"), of(WEB, "01:10.2")), (3, 0));
    assert_eq!((of(DB, "01:10.0"), of(DB, "01:10.2")), (0, 2));
    service.detach(WEB, bdf("01:10.0")).unwrap();
    assert_eq!(db.read(0, VENDOR, 2), 0x8086);
}

#[test]
fn msix_maps_and_unmaps_the_requested_vectors() {
    let world = World::new();
    let (frontend, _service) = attached(&world, WEB, &[bdf("01:10.0")]);
    let (error, _, entries) = frontend.ask(&msix_op(0, 3));
    assert_eq!(error, 0);
    let mapped = world.simulation.grants(WEB).vectors;
    for (index, entry) in entries.iter().enumerate() {
        assert_eq!(mapped[&u32::from(entry.vector)].entry, Some(index as u16));
    }
    assert_ne!(world.simulation.peek(bdf("01:10.0"), 0x73, 1)[0] & 0x80, 0, "MSI-X Enable is set");
    assert_eq!(frontend.ask(&op(Command::DISABLE_MSIX, 0)).0, 0);
    assert!(world.simulation.grants(WEB).vectors.is_empty());
    assert_eq!(world.simulation.peek(bdf("01:10.0"), 0x73, 1)[0] & 0x80, 0, "MSI-X Enable is clear");
    assert_eq!(frontend.ask(&msix_op(0, 4)).0, WireError::Failed.number(), "the table has three entries");
    assert_eq!(frontend.ask(&op(Command::ENABLE_MSI, 0)).0, WireError::Failed.number(), "it has no MSI");
    assert!(world.simulation.grants(WEB).vectors.is_empty());
}

#[test]
fn a_connected_guest_gets_a_second_function_loses_one_and_then_the_last() {
    let world = World::new();
    let (first, second) = (bdf("01:10.0"), bdf("01:10.2"));
    let (frontend, service) = attached(&world, WEB, &[first, second]);
    assert_eq!((frontend.read(0, VENDOR, 2), frontend.read(8, VENDOR, 2)), (0x8086, 0x8086));
    assert_eq!(frontend.ask(&msix_op(8, 3)).0, 0);
    service.detach(WEB, first).unwrap();
    assert_eq!(service.state(first), FunctionState::Held);
    assert_eq!(frontend.ask(&read_op(0, VENDOR, 2)).0, WireError::NoDevice.number());
    assert_eq!(frontend.read(8, VENDOR, 2), 0x8086);
    assert_eq!(world.simulation.grants(WEB).vectors.len(), 3, "the other one's stay");
    service.attach(WEB, first).unwrap();
    assert_eq!(frontend.read(0, VENDOR, 2), 0x8086);
    for address in [first, second] {
        service.detach(WEB, address).unwrap();
    }
    for address in [first, second] {
        world.assert_held(&service, address, "all are detached");
    }
}

#[test]
fn nodes_that_could_not_be_written_are_written_later_in_their_order() {
    let world = World::new();
    let (first, second) = (bdf("01:10.0"), bdf("01:10.2"));
    let (frontend, service) = attached(&world, WEB, &[first, second]);
    // The guest is asked by its nodes to release it.
    world.fail("transaction", None, Errno::EIO, 0);
    service.detach(WEB, second).unwrap();
    let store = world.simulation.platform("test").unwrap().store;
    wait_until("one function is in the guest's nodes", || {
        nodes::read_backend_functions(store.as_ref(), WEB).unwrap().len() == 1
    });
    assert_eq!(world.simulation.pending_failures(), 0);
    assert_eq!(frontend.read(0, VENDOR, 2), 0x8086, "the other one goes on");
}

#[test]
fn a_function_level_reset_reads_all_ones_and_ends_with_the_interrupts_in_place() {
    let world = World::new();
    let (frontend, service) = attached(&world, WEB, &[bdf("01:10.0")]);
    assert_eq!(frontend.ask(&msix_op(0, 3)).0, 0);
    frontend.ask(&write_op(0, COMMAND, 2, BUS_MASTER));
    let before = world.simulation.grants(WEB).vectors;
    let (error, ..) = frontend.ask(&write_op(0, DEVICE_CONTROL, 2, INITIATE_FLR));
    assert_eq!(error, 0);
    wait_until("the function answers again", || frontend.read(0, VENDOR, 2) == 0x8086);
    service.wait_for_state(bdf("01:10.0"), FunctionState::Attached);
    assert_eq!(frontend.read(0, COMMAND, 2) & BUS_MASTER, 0, "the reset clears it");
    assert_eq!(world.simulation.grants(WEB).vectors, before);
    assert_ne!(world.simulation.peek(bdf("01:10.0"), 0x73, 1)[0] & 0x80, 0, "MSI-X Enable is set again");
}

#[test]
fn a_guests_reset_that_a_killed_service_began_is_done_by_the_next_one() {
    for change in 0..6 {
        let world = World::new();
        let (frontend, service) = attached(&world, WEB, &[bdf("01:10.0")]);
        service.fuse.arm(change, Moment::Before);
        frontend.put(&write_op(0, DEVICE_CONTROL, 2, INITIATE_FLR));
        wait_until("it is killed or answers", || frontend.has_answer() || service.fuse.is_blown());
        service.kill();
        let service = world.start();
        frontend.take(0);
        wait_until(&format!("change {change}: the function answers"), || {
            frontend.read(0, VENDOR, 2) == 0x8086
        });
        service.wait_for_state(bdf("01:10.0"), FunctionState::Attached);
    }
}

#[test]
fn a_guests_reset_that_fails_quarantines_once() {
    let world = World::new();
    let address = bdf("01:10.0");
    let (frontend, service) = attached(&world, WEB, &[address]);
    world.fail("reset", Some(address), Errno::ETIMEDOUT, 0);
    frontend.ask(&write_op(0, DEVICE_CONTROL, 2, INITIATE_FLR));
    service.wait_for_state(address, FunctionState::Quarantined);
    world.assert_nothing_granted(&service, address, "its reset failed");
    assert_eq!(service.attach(WEB, address).unwrap_err().code, ErrorCode::Refused);
    service.clear(address).unwrap();
    world.assert_held(&service, address, "after it was cleared");
}

#[test]
fn a_guest_that_is_destroyed_loses_all_and_the_functions_are_held_again() {
    let world = World::new();
    let addresses = [bdf("01:10.0"), bdf("01:10.2")];
    let (frontend, service) = attached(&world, WEB, &addresses);
    assert_eq!(frontend.ask(&msix_op(0, 3)).0, 0);
    world.simulation.destroy(WEB);
    for address in addresses {
        service.wait_for_state(address, FunctionState::Held);
    }
    for address in addresses {
        world.assert_held(&service, address, "its guest has ended");
    }
    service.attach(DB, addresses[0]).unwrap();
}

#[test]
fn a_guest_that_ends_while_the_service_is_down_is_noticed_at_the_start() {
    let world = World::new();
    let (_frontend, service) = attached(&world, WEB, &[bdf("01:10.0")]);
    service.stop();
    world.simulation.destroy(WEB);
    let service = world.start();
    service.wait_for_state(bdf("01:10.0"), FunctionState::Held);
    world.assert_held(&service, bdf("01:10.0"), "its guest has ended");
}

#[test]
fn a_request_that_waits_while_the_service_restarts_is_answered_and_vectors_are_kept() {
    for killed in [false, true] {
        let world = World::new();
        let (frontend, service) = attached(&world, WEB, &[bdf("01:10.0"), bdf("01:10.2")]);
        assert_eq!(frontend.ask(&msix_op(0, 3)).0, 0);
        frontend.ask(&write_op(0, COMMAND, 2, BUS_MASTER));
        let before = world.simulation.grants(WEB).vectors;
        if killed {
            service.kill()
        } else {
            service.stop()
        }
        frontend.put(&read_op(8, VENDOR, 4));
        let service = world.start();
        let (error, value, _) = frontend.take(0);
        assert_eq!((error, value), (0, 0x10ca_8086), "killed: {killed}");
        assert_eq!(world.simulation.grants(WEB).vectors, before);
        assert_eq!(frontend.read(0, COMMAND, 2) & BUS_MASTER, BUS_MASTER, "what it wrote is there still");
        assert_eq!(service.status().guests[0].frontend, "connected");
        assert_eq!(service.problems(), [""; 0]);
        service.detach(WEB, bdf("01:10.0")).unwrap();
        service.detach(WEB, bdf("01:10.2")).unwrap();
        world.assert_held(&service, bdf("01:10.0"), "after a restart");
    }
}

#[test]
fn a_removed_function_reads_all_ones_and_the_others_still_work() {
    let world = World::new();
    let (gone, other) = (bdf("01:10.0"), bdf("01:10.2"));
    let (frontend, service) = attached(&world, WEB, &[gone, other]);
    world.simulation.unplug(gone);
    // What Linux says of a function that it has taken out.
    world.fail("config_read", Some(gone), Errno::ENODEV, 0);
    // Once it is withdrawn, its place on the ring is empty.
    let (error, value, _) = frontend.ask(&read_op(0, COMMAND, 2));
    assert!(error == WireError::NoDevice.number() || (error, value) == (0, 0xffff), "{error}, {value:#x}");
    assert_eq!(frontend.read(8, VENDOR, 2), 0x8086);
    service.wait_for_state(gone, FunctionState::Gone);
    assert!(world.simulation.grants(WEB).vectors.values().all(|vector| vector.address != gone));
    assert_eq!(frontend.read(8, VENDOR, 2), 0x8086);
    service.detach(WEB, other).unwrap();
    world.assert_nothing_granted_but_nodes(other);
    wait_until("its memory is taken back", || world.simulation.grants(WEB).is_empty());
}

#[test]
fn a_slow_guest_gets_more_time_while_it_reads_registers_up_to_a_limit() {
    let world = World::new();
    let (used, new) = (bdf("01:10.0"), bdf("01:10.2"));
    let frontend = Frontend::load(&world, WEB);
    let service = world.start_impatient();
    let limit = Duration::from_secs(1);
    service.hold(used).unwrap();
    service.hold(new).unwrap();
    service.attach(WEB, used).unwrap();
    frontend.freeze();
    let begun = Instant::now();
    let outcome = thread::scope(|scope| {
        let attach = scope.spawn(|| service.attach(WEB, new));
        while !attach.is_finished() {
            frontend.read(0, VENDOR, 2);
        }
        attach.join().unwrap()
    });
    assert_eq!(
        outcome.unwrap_err().message,
        format!("'web' (domain {WEB}) did not take the function in time")
    );
    assert!(begun.elapsed() > 4 * limit, "it was given up after {:?}", begun.elapsed());
}

#[test]
fn invalid_requests_of_a_guest_get_the_protocols_error() {
    let world = World::new();
    let (frontend, service) = attached(&world, WEB, &[bdf("01:10.0")]);
    let (offset, device, failed) = (WireError::InvalidOffset, WireError::NoDevice, WireError::Failed);
    for (request, expected) in [
        (read_op(0, 1, 2), offset),
        (read_op(0, 2, 4), offset),
        (read_op(0, 0, 3), offset),
        (read_op(0, 0, 0), offset),
        (read_op(0, 0, 8), offset),
        (read_op(0, 4096, 1), offset),
        (read_op(0, u32::MAX - 3, 4), offset),
        (write_op(0, 1, 2, 0), offset),
        (write_op(0, 4096, 4, 0), offset),
        (read_op(8, 0, 4), device),
        (read_op(0x100, 0, 4), device),
        (read_op(u32::MAX, 0, 4), device),
        (pciback::serve::pv::wire::Op { bus: 1, ..read_op(0, 0, 4) }, device),
        (pciback::serve::pv::wire::Op { domain: 1, ..read_op(0, 0, 4) }, device),
        (op(Command(6), 0), WireError::NotImplemented),
        (op(Command(u32::MAX), 0), WireError::NotImplemented),
        (msix_op(0, 0), failed),
        (pciback::serve::pv::wire::Op { value: u32::MAX, ..op(Command::ENABLE_MSIX, 0) }, failed),
        (pciback::serve::pv::wire::Op { value: 2, ..op(Command::ENABLE_MSIX, 0) }, failed),
        (op(Command::ENABLE_MSI, 0), failed),
    ] {
        let what = format!("{request:?}").chars().take(110).collect::<String>();
        // `take` gets no entries: the count in the request is invalid.
        frontend.put(&request);
        assert_eq!(frontend.take(0).0, expected.number(), "{what}");
    }
    assert!(world.simulation.grants(WEB).vectors.is_empty());
    assert_eq!(frontend.read(0, VENDOR, 2), 0x8086);
    // Reads of functions that are not there, five of them, are what every bus scan makes.
    assert_eq!(service.status().guests[0].errors, 15);
}

#[test]
fn a_frontend_with_invalid_nodes_is_ignored_until_they_are_valid() {
    use crate::frontend::{ask, await_backend, publish};
    use pciback::serve::pv::nodes::XenbusState;
    let world = World::new();
    let service = world.start_impatient();
    service.hold(bdf("01:10.0")).unwrap();
    service.attach(WEB, bdf("01:10.0")).unwrap();
    let mut guest = world.simulation.guest(WEB).unwrap();
    guest.share(9, 21).unwrap();
    for (grant, port, magic) in [
        ("9", "21", "8"),
        ("0", "21", "7"),
        ("77", "21", "7"),
        ("9", "22", "7"),
        ("9", "0", "7"),
        ("-1", "4294967296", "7"),
        ("", "", ""),
        ("\u{1b}[2J", "21", "7"),
    ] {
        publish(&guest, WEB, "state", XenbusState::INITIALISING.0);
        for (key, value) in [("pci-op-ref", grant), ("event-channel", port), ("magic", magic)] {
            publish(&guest, WEB, key, value);
        }
        publish(&guest, WEB, "state", XenbusState::INITIALISED.0);
        // Answered after everything that the guest wrote was looked at.
        service.status();
        let state = world.simulation.store(DomId::DOM0).unwrap();
        let state = state.read(&format!("{}/state", nodes::backend_directory(WEB))).unwrap();
        assert_eq!(state.as_deref(), Some(&b"3"[..]), "{grant} {port} {magic}");
    }
    publish(&guest, WEB, "state", XenbusState::INITIALISING.0);
    for (key, value) in [("pci-op-ref", "9"), ("event-channel", "21"), ("magic", "7")] {
        publish(&guest, WEB, key, value);
    }
    publish(&guest, WEB, "state", XenbusState::INITIALISED.0);
    await_backend(&guest, WEB, XenbusState::CONNECTED);
    publish(&guest, WEB, "state", XenbusState::CONNECTED.0);
    assert_eq!(ask(&guest, &read_op(0, VENDOR, 4)).1, 0x10ca_8086);
    // Rubbish all over the page, without a request in it, harms no one.
    for word in guest.page().unwrap().iter().skip(1) {
        word.store(u32::MAX, Ordering::Relaxed);
    }
    guest.notify().unwrap();
    assert_eq!(ask(&guest, &read_op(0, VENDOR, 4)).1, 0x10ca_8086);
}

#[test]
fn a_guest_that_never_releases_a_function_loses_it() {
    let world = World::new();
    let service = world.start_impatient();
    service.hold(bdf("01:10.0")).unwrap();
    let frontend = Frontend::load(&world, WEB);
    service.attach(WEB, bdf("01:10.0")).unwrap();
    assert_eq!(frontend.ask(&msix_op(0, 3)).0, 0);
    // It neither crashes nor closes from now on.
    frontend.freeze();
    service.detach(WEB, bdf("01:10.0")).unwrap();
    world.assert_held(&service, bdf("01:10.0"), "it lost it");
}

/// Else each of its accesses takes two seconds, until its driver has given up.
#[test]
fn a_guest_that_is_slow_to_drop_its_device_is_answered_over_a_kill_of_the_service() {
    let world = World::new();
    let (frontend, service) = attached(&world, WEB, &[bdf("01:10.0")]);
    frontend.freeze();
    service
        .call(Request::PciDetach {
            domain: name(WEB),
            address: bdf("01:10.0"),
            force: true,
            scope: Scope::All,
        })
        .unwrap();
    assert_eq!(frontend.ask(&read_op(0, VENDOR, 4)).0, WireError::NoDevice.number());
    service.kill();
    let service = world.start();
    assert_eq!(frontend.ask(&read_op(0, VENDOR, 4)).0, WireError::NoDevice.number());
    frontend.unload();
    let store = world.simulation.store(DomId::DOM0).unwrap();
    wait_until("its nodes are removed", || nodes::read_backend_state(&store, WEB).unwrap().is_none());
    let _again = Frontend::load(&world, WEB);
    service.attach(WEB, bdf("01:10.0")).unwrap();
    assert_eq!(service.state(bdf("01:10.0")), FunctionState::Attached);
}
