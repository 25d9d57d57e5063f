//! Interrupts of HVM guests whose numbers Xen chooses, and a service that is killed while it maps them.

use std::collections::BTreeSet;

use pciback::platform::sim::Vector;
use pciback::platform::{MsiSource, StoreOps};
use pciback::policy::RdmPolicy;
use pciback::{DomId, Sbdf};

use crate::hvm::{Guest, MSIX_CONTROL, SLOT, VENDOR, WIN, attach_at, bound, set_up};
use crate::hvm_events::{ENABLE, assert_ends_well, killed_at_each_change, mapped, with_table};
use crate::world::{Service, World, bdf, wait_until};

const VF: &str = "01:10.0";

/// The entries of a function that are mapped.
fn entries(world: &World, address: Sbdf) -> Vec<u16> {
    let vectors = world.simulation.grants(WIN).vectors;
    let mut entries: Vec<u16> = vectors
        .values()
        .filter(|vector| vector.address == address)
        .filter_map(|vector| vector.entry)
        .collect();
    entries.sort_unstable();
    entries
}

fn messages(guest: &Guest) -> BTreeSet<u32> {
    bound(guest).into_iter().map(|(data, _)| data).collect()
}

/// The guest has written two messages, and enables MSI-X next.
fn begin() -> (World, Guest, Service) {
    let (world, guest, service) = with_table();
    set_up(&guest, 0, 0x41);
    set_up(&guest, 1, 0x42);
    (world, guest, service)
}

#[test]
fn a_service_that_is_killed_anywhere_leaves_no_interrupt_of_xens_choice_mapped_twice() {
    killed_at_each_change(begin, MSIX_CONTROL, ENABLE, 4, |world, guest, service, why| {
        assert_eq!(entries(world, bdf(VF)), [0, 1], "{why}: {:?}", mapped(world));
        assert_eq!(messages(guest), [0x41, 0x42].into(), "{why}");
        assert_ends_well(world, guest, service, bdf(VF), why);
    });
}

/// Its numbers, and the line's that is mapped for the guest, are known to be theirs.
#[test]
fn interrupts_of_the_guests_other_functions_stay_mapped_when_a_killed_service_recovers() {
    let (other, slot) = (bdf("02:00.0"), 9);
    let begin = || {
        let (world, guest, service) = begin();
        service.hold(other).unwrap();
        attach_at(&service, other, slot).unwrap();
        wait_until("the function is served", || guest.read(slot, VENDOR, 2) == 0x1af4);
        (world, guest, service)
    };
    let lines = |world: &World| world.simulation.grants(WIN).lines;
    killed_at_each_change(begin, MSIX_CONTROL, ENABLE, 4, |world, guest, service, why| {
        assert_eq!(lines(world), [11], "{why}");
        service.detach(WIN, other).unwrap();
        assert_ends_well(world, guest, service, bdf(VF), why);
    });
}

/// As QEMU's passthrough does for a function that xl has attached.
fn attach_by_xl(world: &World, domain: DomId, address: Sbdf) -> u32 {
    let xen = world.simulation.platform("xl").unwrap().hypervisor;
    world.simulation.poke(address, 4, &[2]);
    xen.prepare_msix(address).unwrap();
    xen.assign(domain, address, RdmPolicy::Relaxed).unwrap();
    let store = world.simulation.store(DomId::DOM0).unwrap();
    let node = format!("/local/domain/0/backend/pci/{domain}/0/dev-0");
    store.write(&node, address.to_string().as_bytes()).unwrap();
    xen.map_msi(domain, address, MsiSource::MsiX { entry: 0, table: 0 }).unwrap().0
}

#[test]
fn an_interrupt_of_a_function_that_xl_has_attached_is_never_unmapped() {
    let theirs = bdf("03:00.0");
    let begin = || {
        let (world, guest, service) = begin();
        attach_by_xl(&world, WIN, theirs);
        (world, guest, service)
    };
    killed_at_each_change(begin, MSIX_CONTROL, ENABLE, 4, |world, guest, _, why| {
        guest.read(SLOT, VENDOR, 2);
        let vectors = world.simulation.grants(WIN).vectors;
        assert!(vectors.values().any(|known| *known == Vector { address: theirs, entry: Some(0) }), "{why}");
    });
}
