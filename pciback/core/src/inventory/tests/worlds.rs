//! Hosts of all kinds, with lists that disagree in every way.

use proptest::prelude::*;

use super::super::*;
use super::model::{Device, Hardware, Sight, World};
use crate::{Devfn, DomId, Sbdf};

const ALIVE: [DomId; 2] = [DomId(1), DomId(2)];
/// Xen still has the domain, which is being destroyed.
const ENDING: DomId = DomId(3);

/// What is random of one function.
#[derive(Debug, Clone)]
struct Seed {
    there: bool,
    known: bool,
    /// The owner in Xen: 0 dom0, 1 the quarantine domain, 2 the guest of the record, then domains.
    owner: u8,
    driver: u8,
    replaced: bool,
    bridge: bool,
    msix: bool,
    extended: bool,
    prepared: (bool, bool),
    want: u8,
    guest: u8,
    /// Nodes for the guest of the record, for it at another place, for another guest.
    nodes: (bool, bool, bool),
    mapped: bool,
    busy: bool,
}

fn seed() -> impl Strategy<Value = Seed> {
    let often = || prop::bool::weighted(0.8);
    let rarely = || prop::bool::weighted(0.1);
    let hardware = (often(), 0..3u8, rarely(), rarely(), any::<bool>(), any::<bool>());
    let xen = (often(), 0..6u8, (any::<bool>(), any::<bool>()), any::<bool>());
    let service = (0..8u8, 0..3u8, (often(), rarely(), rarely()), rarely());
    (hardware, xen, service).prop_map(|(hardware, xen, service)| {
        let (there, driver, replaced, bridge, msix, extended) = hardware;
        let (known, owner, prepared, mapped) = xen;
        let (want, guest, nodes, busy) = service;
        Seed {
            there,
            known,
            owner,
            driver,
            replaced,
            bridge,
            msix,
            extended,
            prepared,
            want,
            guest,
            nodes,
            mapped,
            busy,
        }
    })
}

/// Up to four slots, each with one function or with a PF and up to four VFs.
pub fn world() -> impl Strategy<Value = World> {
    let slot = (seed(), prop::collection::vec(seed(), 0..5));
    let sight = prop_oneof![3 => Just(Sight::Exact), 2 => Just(Sight::Assignable), 1 => Just(Sight::Blind)];
    (sight, prop::collection::vec(slot, 1..5)).prop_map(|(sight, slots)| {
        let mut world = World::new(sight, ALIVE.into());
        for (slot, (pf, vfs)) in slots.iter().enumerate() {
            // One PF behind its VFs' addresses: the order of addresses is not the order of families.
            let bus = slot as u8 + 1;
            let address = Sbdf::from_devfn(0, bus, if slot == 1 { 0xf0 } else { 0 });
            place(&mut world, address, pf);
            for (index, vf) in vfs.iter().enumerate() {
                let address_of_vf = Sbdf::from_devfn(0, bus, 0x80 + index as u8);
                world.relate(address_of_vf, address);
                place(&mut world, address_of_vf, &Seed { bridge: false, ..vf.clone() });
            }
        }
        world
    })
}

fn place(world: &mut World, address: Sbdf, seed: &Seed) {
    let recorded = Identity { vendor: 0x8086, device: 0x10ca, ..Identity::default() };
    let domain = [ALIVE[0], ALIVE[1], ENDING][usize::from(seed.guest)];
    // No two functions share a place.
    let devfn = address.bus() << 5 | address.function() | if world.pf(address).is_some() { 8 } else { 0 };
    let place = GuestPlace { domain, devfn: Devfn(devfn) };
    let want = match seed.want {
        0 | 1 => None,
        2 => Some(Want::Held),
        3 => Some(Want::Quarantined(None)),
        4 => Some(Want::Quarantined(Some(place))),
        5 => Some([Want::Gone, Want::Host][usize::from(seed.guest) % 2]),
        _ => Some(Want::Attached(place)),
    };
    if let Some(want) = want {
        let intent = Intent { want, identity: Some(recorded), msix_prepared: seed.prepared.0 };
        world.wanted.functions.insert(address, intent);
    }
    if seed.there {
        let identity = if seed.replaced { Identity { device: 0xbad, ..recorded } } else { recorded };
        world.hardware.insert(
            address,
            Hardware {
                identity,
                bridge: seed.bridge,
                msix: seed.msix,
                extended: seed.extended,
                driver: seed.driver > 0,
                held: seed.driver > 1,
            },
        );
    }
    let given = world.place(address).is_some();
    if seed.known {
        let owner = match seed.owner {
            0 => Owner::Host,
            1 => Owner::Quarantine,
            2 | 3 => Owner::Domain(domain),
            // Where Xen only reports that some guest owns it, it cannot be known that it is another one.
            _ if given && world.sight != Sight::Exact => Owner::Domain(domain),
            4 => Owner::Domain(ALIVE[0]),
            _ => Owner::Domain(ENDING),
        };
        let prepared = seed.prepared.1 && seed.msix;
        let mapped = prepared && seed.mapped && matches!(owner, Owner::Domain(_));
        world.xen.insert(address, Device { owner, prepared, mapped });
    }
    let elsewhere = GuestPlace { domain, devfn: Devfn(devfn | 16) };
    let other = GuestPlace { domain: ALIVE[1], devfn: Devfn(devfn | 16) };
    // Nodes are made for functions that are given, and seldom are left over.
    let (own, moved, foreign) = seed.nodes;
    let own = own && (given || seed.replaced || seed.want == 0);
    for (there, place) in [(own, place), (moved, elsewhere), (foreign, other)] {
        if there {
            world.nodes.insert(Published { address, place });
        }
    }
    if seed.busy {
        world.wanted.busy.insert(address);
    }
}
