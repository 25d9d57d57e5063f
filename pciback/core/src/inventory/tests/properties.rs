//! From any lists: one plan leads to agreement, by steps that Xen accepts, and touches nothing else.

use proptest::prelude::*;

use super::super::*;
use super::model::{Sight, World};
use super::worlds::world;
use crate::Sbdf;

/// Carries out a plan; fails at the first step that Xen or the host would not survive.
fn carry_out(world: &mut World, steps: &[Step]) -> Result<(), TestCaseError> {
    for step in steps {
        if let Err(refusal) = world.carry_out(step.repair) {
            return Err(TestCaseError::fail(format!("{step}\n  {refusal}")));
        }
    }
    Ok(())
}

fn same<T: PartialEq>(now: Option<&T>, before: Option<&T>) -> bool {
    now == before
}

/// What is still wrong, by the meaning of the lists alone.
fn disagreements(world: &World, before: &World) -> Vec<String> {
    let mut wrong = Vec::new();
    for address in before.addresses() {
        if world.is_busy(address) {
            let unchanged = same(world.hardware.get(&address), before.hardware.get(&address))
                && same(world.xen.get(&address), before.xen.get(&address))
                && same(world.record(address), before.record(address))
                && world
                    .nodes
                    .iter()
                    .filter(|node| node.address == address)
                    .eq(before.nodes.iter().filter(|node| node.address == address));
            if !unchanged {
                wrong.push(format!("{address}: changed under a transaction"));
            }
            continue;
        }
        if let Some(why) = xens_list(world, address) {
            wrong.push(format!("{address}: {why}"));
        }
        if let Some(why) = nodes(world, address) {
            wrong.push(format!("{address}: {why}"));
        }
        if let Some(why) = record(world, address) {
            wrong.push(format!("{address}: {why}"));
        }
        if let Some(why) = untouched(world, before, address) {
            wrong.push(format!("{address}: {why}"));
        }
    }
    wrong
}

fn xens_list(world: &World, address: Sbdf) -> Option<&'static str> {
    let known = |address: &Sbdf| world.xen.contains_key(address);
    let there = |address: &Sbdf| world.hardware.contains_key(address);
    match (there(&address), known(&address), world.pf(address)) {
        (true, true, _) | (false, false, _) => None,
        (true, false, None) => Some("Xen does not know it"),
        (true, false, Some(pf)) => (there(&pf) && known(&pf)).then_some("Xen does not know this VF"),
        (false, true, None) => {
            (!world.vfs(address).any(|vf| known(&vf))).then_some("Xen knows what is not there")
        }
        (false, true, Some(pf)) => known(&pf).then_some("Xen knows a VF that is not there"),
    }
}

fn nodes(world: &World, address: Sbdf) -> Option<&'static str> {
    let published: Vec<_> = world.nodes.iter().filter(|node| node.address == address).collect();
    let place = world.place(address);
    let attached = matches!(world.record(address), Some(Intent { want: Want::Attached(_), .. }));
    match published[..] {
        [] if attached => Some("its guest cannot find it"),
        [] => None,
        [node] if Some(node.place) == place => None,
        _ => Some("nodes that nobody wants"),
    }
}

fn record(world: &World, address: Sbdf) -> Option<&'static str> {
    let record = world.record(address)?;
    let hardware = world.hardware.get(&address);
    let owner = world.xen.get(&address).map(|device| device.owner);
    let replaced = hardware.zip(record.identity).is_some_and(|(now, then)| !now.identity.may_be(&then));
    if let Some(place) = record.place() {
        let owned =
            owner == Some(Owner::Domain(place.domain)) || (owner.is_some() && world.sight == Sight::Blind);
        return match hardware {
            _ if !world.alive.contains(&place.domain) => Some("its guest has ended"),
            None => Some("a guest has what is not there"),
            Some(_) if replaced => Some("a guest has another device"),
            Some(_) if !owned => Some("its guest does not own it"),
            Some(hardware) if hardware.driver && !hardware.held => Some("a driver has it too"),
            Some(_) => None,
        };
    }
    match (record.want, hardware) {
        (Want::Gone, Some(_)) => Some("gone, and there"),
        (Want::Held, None) => Some("held, and not there"),
        (Want::Held, Some(_)) if replaced => Some("another device is held"),
        (Want::Held, Some(hardware)) => {
            let dying = matches!(owner, Some(Owner::Domain(domain)) if !world.alive.contains(&domain));
            let vfs = world.vfs(address).any(|vf| world.hardware.contains_key(&vf));
            let held = hardware.held && (owner == Some(Owner::Quarantine) || world.sight != Sight::Exact);
            let excused = owner.is_none() || dying || (vfs && !hardware.held) || world.sight == Sight::Blind;
            (!held && !excused).then_some("not held")
        }
        _ => None,
    }
}

/// Of functions without a record and without nodes of ours only Xen's list is repaired.
fn untouched(world: &World, before: &World, address: Sbdf) -> Option<&'static str> {
    let ours = before.record(address).is_some() || before.nodes.iter().any(|node| node.address == address);
    if ours {
        return None;
    }
    let owner = |world: &World| world.xen.get(&address).map(|device| device.owner);
    let kept = owner(before).is_none_or(|was| owner(world).is_none_or(|is| is == was));
    let bound = world.hardware.get(&address) == before.hardware.get(&address);
    (!kept || !bound || world.record(address).is_some()).then_some("nobody asked for a change")
}

/// VFs leave their guests before their PF does.
fn families_leave_in_order(world: &World, plan: &Plan) -> Result<(), TestCaseError> {
    let leaving: Vec<Sbdf> = plan
        .steps
        .iter()
        .filter(|step| matches!(step.repair, Repair::Withdraw { .. } | Repair::DetachFromDead { .. }))
        .map(|step| step.repair.address())
        .collect();
    for (index, address) in leaving.iter().enumerate() {
        let late = leaving[index..].iter().find(|later| world.pf(**later) == Some(*address));
        prop_assert!(late.is_none(), "{address} before its VF {late:?}");
    }
    Ok(())
}

fn distrusted(world: &World, plan: &Plan) -> Result<(), TestCaseError> {
    for step in &plan.steps {
        if let Repair::Quarantine { address } = step.repair {
            let want = world.record(address).map(|record| record.want);
            prop_assert!(matches!(want, Some(Want::Quarantined(_))), "{address}: {want:?}");
        }
    }
    Ok(())
}

fn agrees(world: &World, before: &World) -> Result<(), TestCaseError> {
    let next = world.plan();
    prop_assert!(next.is_empty(), "planned again:\n{next}");
    let wrong = disagreements(world, before);
    prop_assert!(wrong.is_empty(), "{wrong:#?}");
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4096, ..ProptestConfig::default() })]

    #[test]
    fn one_plan_leads_from_any_lists_to_agreement(before in world()) {
        let plan = before.plan();
        families_leave_in_order(&before, &plan)?;
        let mut world = before.clone();
        let outcome = carry_out(&mut world, &plan.steps).and_then(|()| agrees(&world, &before));
        outcome.map_err(|error| TestCaseError::fail(format!("{error}\nThe plan:\n{plan}")))?;
    }

    #[test]
    fn a_plan_that_was_cut_short_is_made_good_by_the_next_and_no_distrust_is_forgotten(before in world(), part in 0.0..1.0f64) {
        let plan = before.plan();
        let (done, _) = plan.steps.split_at((plan.steps.len() as f64 * part) as usize);
        let mut world = before.clone();
        carry_out(&mut world, done)?;
        let next = world.plan();
        let outcome = carry_out(&mut world, &next.steps)
            .and_then(|()| agrees(&world, &before))
            .and_then(|()| distrusted(&world, &plan));
        let text = |steps: &[Step]| steps.iter().map(|step| format!("{step}\n")).collect::<String>();
        outcome.map_err(|error| {
            TestCaseError::fail(format!("{error}\nDone:\n{}Then:\n{next}", text(done)))
        })?;
    }
}
