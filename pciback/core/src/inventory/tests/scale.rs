//! 4,096 VFs across 64 PFs, and what planning for them takes.

use std::time::Instant;

use super::super::*;
use super::model::{Device, Hardware, Sight, World};
use crate::{Devfn, DomId, Sbdf};

const PFS: u8 = 64;
const VFS: u8 = 64;
const GUESTS: u16 = 100;

/// Numbers that are the same in every run.
struct Random(u64);

impl Random {
    fn one_in(&mut self, chances: u64) -> bool {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (self.0 >> 33).is_multiple_of(chances)
    }
}

/// Everything as it should be: a third of the VFs dom0's, a third held, a third attached.
fn world() -> World {
    let mut world = World::new(Sight::Exact, (1..=GUESTS).map(DomId).collect());
    for bus in 0..PFS {
        let pf = Sbdf::from_devfn(0, bus, 0);
        add(&mut world, pf, None);
        for index in 0..VFS {
            let vf = Sbdf::from_devfn(0, bus, 0x80 + index);
            world.relate(vf, pf);
            let number = u16::from(bus) * u16::from(VFS) + u16::from(index);
            // 100 guests with 14 functions each at most.
            let place = GuestPlace {
                domain: DomId(1 + number / 3 % GUESTS),
                devfn: Devfn((number / 3 / GUESTS) as u8),
            };
            add(
                &mut world,
                vf,
                [None, Some(Want::Held), Some(Want::Attached(place))][usize::from(number % 3)],
            );
        }
    }
    world
}

fn add(world: &mut World, address: Sbdf, want: Option<Want>) {
    let owner = match want {
        None => Owner::Host,
        Some(Want::Attached(place)) => Owner::Domain(place.domain),
        Some(_) => Owner::Quarantine,
    };
    let held = want.is_some();
    let identity = Identity::default();
    let hardware = Hardware { identity, bridge: false, msix: true, extended: false, driver: true, held };
    world.hardware.insert(address, hardware);
    world.xen.insert(address, Device { owner, prepared: false, mapped: false });
    if let Some(want) = want {
        let intent = Intent { want, identity: Some(identity), msix_prepared: false };
        world.wanted.functions.insert(address, intent);
    }
    if let Some(place) = world.place(address) {
        world.nodes.insert(Published { address, place });
    }
}

/// Bytes of what is in the lists and the plan, without what the maps and the allocator add.
fn bytes(observed: &Observed, plan: &Plan) -> (usize, usize) {
    let vfs = |function: &Function| function.host.as_ref().map_or(0, |host| host.virtual_functions.len());
    let vfs: usize = observed.functions.values().map(vfs).sum();
    let lists = observed.functions.len() * size_of::<(Sbdf, Function)>()
        + vfs * size_of::<Sbdf>()
        + observed.published.len() * size_of::<Published>();
    (lists, plan.steps.len() * size_of::<Step>() + plan.left.len() * size_of::<Left>())
}

/// Plans, says what that took, carries it out, and sees that it was enough.
fn settle(mut world: World, what: &str) -> World {
    let observed = world.observe();
    let began = Instant::now();
    let plan = plan(&observed, &world.wanted);
    let took = began.elapsed();
    let (lists, steps) = bytes(&observed, &plan);
    println!(
        "{what}: {} functions, {} steps planned in {took:?}; the lists hold {} KiB, the plan {} KiB",
        observed.functions.len(),
        plan.steps.len(),
        lists / 1024,
        steps / 1024
    );
    for step in &plan.steps {
        world.carry_out(step.repair).unwrap_or_else(|refusal| panic!("{step}\n  {refusal}"));
    }
    let next = world.plan();
    assert!(next.is_empty(), "{next}");
    world
}

/// At the size of a large host.
#[test]
fn an_inventory_of_64_pfs_with_64_vfs_each_settles_after_anything() {
    let mut random = Random(4096);
    let mut world = settle(world(), "agreement");
    assert!(world.plan().is_empty());

    let addresses: Vec<Sbdf> = world.hardware.keys().copied().collect();
    for address in &addresses {
        if random.one_in(10) {
            world.xen.get_mut(address).unwrap().owner = Owner::Host;
        }
        if random.one_in(10) {
            world.hardware.get_mut(address).unwrap().held = false;
        }
        if random.one_in(10) {
            world.hardware.get_mut(address).unwrap().identity.device = 0xbad;
        }
        if random.one_in(10) && world.vfs(*address).next().is_none() {
            world.xen.remove(address);
        }
    }
    world.alive.retain(|_| !random.one_in(10));
    let mut world = settle(world, "a tenth of everything wrong");

    world.hardware.clear();
    let mut world = settle(world, "every card pulled out");
    assert!(world.xen.is_empty() && world.nodes.is_empty());

    let fresh = self::world();
    (world.hardware, world.alive) = (fresh.hardware, fresh.alive);
    let world = settle(world, "every card back");
    assert_eq!(world.xen.len(), addresses.len());
}
