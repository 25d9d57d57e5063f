//! VFs that the guest with their PF creates (policy `virtual-functions`).
//!
//! What the guest wants is in the image of the PF, what there is in sysfs: no other record is needed, and a service that was killed between
//! any two steps goes on from both. One change of a PF's VFs runs at a time; a guest that changes its mind meanwhile is looked at again at
//! its end. VFs that go are first taken from their guests and released, then the PF's driver removes them.
//!
//! [`GuestVfs`] decides what comes next, and `for_guests` carries it out.

use std::collections::{BTreeMap, BTreeSet};

use pciback::config::MOST_BESIDE_PF;
use pciback::platform::Platform;
use pciback::policy::{PolicySet, Subject};
use pciback::serve::{GuestFunction, VfRequests};
use pciback::{FunctionState, Sbdf};

use crate::domains::{self, DomainType};
use crate::engine::Answer;
use crate::engine::functions::Functions;
use crate::journal::Record;
use crate::outcome::{ErrorCode, Failure};
use crate::transaction::PF_STUB;

/// The PFs whose guests create VFs.
#[derive(Default)]
pub(super) struct GuestVfs(BTreeMap<Sbdf, Pf>);

#[derive(Default)]
struct Pf {
    /// The guest's requests; `None` after it has lost the PF.
    requests: Option<VfRequests>,
    /// The number of the request that was looked at last.
    number: u64,
    /// What is being done.
    change: Option<Change>,
    /// The VF that could not be taken from its guest for the last request.
    blocked: Option<Sbdf>,
    /// The guest asked for a reset of the PF while VFs are there that it has not enabled.
    reset: bool,
    /// Transactions that wait until the PF has no VFs, to take it from its guest.
    leaving: Vec<Answer>,
    /// Those that wait only for the end of the change.
    awaiting: Vec<Answer>,
}

/// A change of the VFs of a PF.
enum Change {
    /// These are taken from their guests and released, before the driver removes all.
    Clearing(BTreeSet<Sbdf>),
    /// The PF's driver creates or removes VFs.
    Driver,
}

/// What decisions about VFs of guests look at.
pub(super) struct Context<'a> {
    pub platform: &'a Platform,
    pub functions: &'a Functions,
    pub policies: &'a PolicySet,
}

/// What the engine does next, in this order.
#[derive(Debug)]
pub(super) enum Effect {
    /// A VF stays that was created for an earlier domain of the guest with its PF: the PF's driver has started again since.
    Keep(Sbdf),
    /// The guest of a PF has said what it wants: VFs of its earlier domain do not stay for longer.
    Asked(Sbdf),
    /// The driver of a PF creates VFs.
    Create(Sbdf, u16),
    /// The driver of a PF removes its VFs.
    Remove(Sbdf),
    /// A VF of dom0 is held, so that no driver of dom0 gets it.
    Hold(Sbdf),
    /// A VF is taken from its guest.
    Take(Box<Record>),
    /// A held VF is released.
    Release(Box<Record>),
    /// A PF does not get the VFs that its guest asks for.
    Refused(Sbdf, Failure),
    /// A PF has the VFs that its guest wants.
    Settled(Sbdf),
    /// The reset of a PF for which its guest waits.
    Reset(Sbdf),
    /// The guest's view of a PF is reset, for a reset that would remove VFs that stay.
    ResetView(Sbdf),
}

impl GuestVfs {
    /// A function is served from now on.
    pub fn note_requests(&mut self, function: &GuestFunction) {
        if let Some(requests) = function.vf_requests() {
            self.0.entry(function.address()).or_default().requests = Some(requests);
        }
    }

    /// The PFs whose guests may have asked for VFs.
    pub fn pfs(&self) -> Vec<Sbdf> {
        self.0.keys().copied().collect()
    }

    /// A PF is about to be taken from its guest: its VFs go first.
    pub fn leaves(&mut self, pf: Sbdf, answer: Answer, context: &Context<'_>) -> Vec<Effect> {
        self.0.entry(pf).or_default().leaving.push(answer);
        self.wanted(pf, context)
    }

    /// A PF is about to be taken from its guest, and its VFs may stay: what is being done to them ends first.
    pub fn await_change(&mut self, pf: Sbdf, answer: Answer) {
        match self.0.get_mut(&pf).filter(|pf| pf.change.is_some()) {
            Some(pf) => pf.awaiting.push(answer),
            None => answer.send(Ok(None)),
        }
    }

    /// Whether VFs are there, or are being changed, that a reset of a PF would remove.
    pub fn prevent_reset(&self, address: Sbdf, context: &Context<'_>) -> bool {
        let vfs = || context.platform.host.function(address).map_or(0, |function| function.num_vfs);
        self.0.get(&address).is_some_and(|pf| pf.change.is_some() || vfs() > 0)
    }

    /// The guest of a PF waits for a reset that VFs prevent. It is done when they are gone; where they stay, the guest does not wait.
    pub fn reset_waits(&mut self, address: Sbdf, context: &Context<'_>) -> Vec<Effect> {
        if let Some(pf) = self.0.get_mut(&address) {
            pf.reset = true;
        }
        // Another one than the service may be removing or creating them: then there is nothing to be done here.
        let present =
            context.platform.host.function(address).is_ok_and(|pf| !pf.virtual_functions.is_empty());
        let mut effects = if present { self.wanted(address, context) } else { Vec::new() };
        effects.extend(self.vfs_stay(address));
        effects
    }

    /// Where no change is under way: ends a reset that waits for VFs to go, and what waits for the end of a change.
    fn vfs_stay(&mut self, address: Sbdf) -> Option<Effect> {
        let pf = self.0.get_mut(&address).filter(|pf| pf.change.is_none())?;
        pf.awaiting.drain(..).for_each(|answer| answer.send(Ok(None)));
        std::mem::take(&mut pf.reset).then_some(Effect::ResetView(address))
    }

    /// Brings the VFs of a PF to what its guest wants: to none, if it has lost the PF.
    pub fn wanted(&mut self, address: Sbdf, context: &Context<'_>) -> Vec<Effect> {
        let Some(pf) = self.0.get_mut(&address).filter(|pf| pf.change.is_none()) else { return Vec::new() };
        let leaving = !pf.leaving.is_empty();
        let (number, wanted) = match &pf.requests {
            Some(requests) => requests.take(),
            None => (0, 0),
        };
        let keeps_vfs = context.functions.records().get(address).is_some_and(|record| record.keeps_vfs);
        if number == 0 && !leaving && keeps_vfs {
            // The guest starts again, and its driver has not asked yet.
            return Vec::new();
        }
        pf.number = number;
        let wanted = if leaving { 0 } else { wanted };
        let present = context.platform.host.function(address);
        let present = present.map(|function| function.virtual_functions).unwrap_or_default();
        // Before what ends `keeps_vfs`: a service that is killed in between looks at them once more.
        let kept = present.iter().filter(|_| keeps_vfs && !leaving && present.len() == usize::from(wanted));
        let mut effects: Vec<Effect> = kept.map(|vf| Effect::Keep(*vf)).collect();
        effects.push(Effect::Asked(address));
        effects.extend(if present.len() == usize::from(wanted) {
            self.settled(address, wanted).into_iter().chain(present.into_iter().map(Effect::Hold)).collect()
        } else if let Err(failure) = may_create(address, wanted, context) {
            self.refused(address, failure, context)
        } else if present.is_empty() {
            pf.change = Some(Change::Driver);
            vec![Effect::Create(address, wanted)]
        } else {
            pf.change = Some(Change::Clearing(present.into_iter().collect()));
            self.clear(address, context)
        });
        effects
    }

    /// The driver of a PF has created or removed VFs, or failed to.
    pub fn changed(
        &mut self,
        address: Sbdf,
        outcome: Result<(), Failure>,
        context: &Context<'_>,
    ) -> Vec<Effect> {
        if let Some(pf) = self.0.get_mut(&address) {
            pf.change = None;
        }
        let mut effects = match outcome {
            Ok(()) => self.wanted(address, context),
            Err(failure) => self.refused(address, failure, context),
        };
        effects.extend(self.vfs_stay(address));
        effects
    }

    /// A transaction of a function has ended.
    pub fn go_on(&mut self, vf: Sbdf, context: &Context<'_>) -> Vec<Effect> {
        let clears = |pf: &Pf| matches!(&pf.change, Some(Change::Clearing(vfs)) if vfs.contains(&vf));
        if let Some(pf) = self.0.iter().find(|(_, pf)| clears(pf)).map(|(address, _)| *address) {
            return self.clear(pf, context);
        }
        // Its quarantine may have been cleared.
        let blocked = |(_, pf): &(&Sbdf, &mut Pf)| pf.blocked == Some(vf) && !has_quarantined(vf, context);
        let Some((address, pf)) = self.0.iter_mut().find(blocked) else { return Vec::new() };
        let address = *address;
        pf.blocked = None;
        self.wanted(address, context)
    }

    fn refused(&mut self, address: Sbdf, failure: Failure, context: &Context<'_>) -> Vec<Effect> {
        let mut effects = vec![Effect::Refused(address, failure.clone())];
        let Some(pf) = self.0.get_mut(&address) else { return effects };
        // What waits for the PF has to say that it still has VFs.
        for answer in std::mem::take(&mut pf.leaving) {
            answer.send(Err(failure.clone()));
        }
        let number = pf.number;
        let asked_again = pf.requests.as_ref().is_some_and(|requests| {
            requests.answer(number, false);
            requests.take().0 != number
        });
        // The same request is not tried again: its guest learns that it failed, and may ask again.
        if asked_again {
            effects.extend(self.wanted(address, context));
        }
        effects.extend(self.vfs_stay(address));
        effects
    }

    /// The PF has as many VFs as its guest wants.
    fn settled(&mut self, address: Sbdf, wanted: u16) -> Vec<Effect> {
        let Some(pf) = self.0.get_mut(&address) else { return Vec::new() };
        if let Some(requests) = &pf.requests {
            requests.answer(pf.number, true);
        }
        for answer in std::mem::take(&mut pf.leaving) {
            pf.requests = None;
            answer.send(Ok(None));
        }
        let reset = if wanted == 0 { Effect::Reset(address) } else { Effect::ResetView(address) };
        let reset = std::mem::take(&mut pf.reset).then_some(reset);
        [Effect::Settled(address)].into_iter().chain(reset).collect()
    }

    /// Takes VFs from their guests and releases them; when none is left, the driver removes them.
    fn clear(&mut self, address: Sbdf, context: &Context<'_>) -> Vec<Effect> {
        let Some(pf) = self.0.get_mut(&address) else { return Vec::new() };
        let Some(Change::Clearing(vfs)) = &pf.change else { return Vec::new() };
        let (mut effects, mut waits) = (Vec::new(), false);
        for vf in vfs {
            if context.functions.is_busy(*vf) {
                waits = true;
                continue;
            }
            let record = context.functions.records().get_or_new(*vf);
            match (record.state, record.guest) {
                (FunctionState::Quarantined, Some(_)) => {
                    let text = format!(
                        "{vf} cannot be taken from its guest, see its quarantine; VFs stay until that is cleared"
                    );
                    let failure = Failure::new(ErrorCode::Quarantined, text).on(*vf);
                    (pf.change, pf.blocked) = (None, Some(*vf));
                    effects.extend(self.refused(address, failure, context));
                    return effects;
                }
                (_, Some(_)) => effects.push(Effect::Take(Box::new(record))),
                (FunctionState::Held, None) => effects.push(Effect::Release(Box::new(record))),
                // It is dom0's, or quarantined without a guest.
                _ => {}
            }
        }
        if !waits && effects.is_empty() {
            pf.change = Some(Change::Driver);
            effects.push(Effect::Remove(address));
        }
        effects
    }
}

/// Whether a guest has a function that is quarantined.
fn has_quarantined(address: Sbdf, context: &Context<'_>) -> bool {
    let record = context.functions.records().get(address);
    record.is_some_and(|record| record.state == FunctionState::Quarantined && record.guest.is_some())
}

/// Refuses more VFs than a policy gives the guest, and those of a PF that another driver holds.
fn may_create(address: Sbdf, wanted: u16, context: &Context<'_>) -> Result<(), Failure> {
    if wanted == 0 {
        return Ok(());
    }
    let refused = |text: String| Failure::refused(text).on(address);
    let record = context.functions.records().get_or_new(address);
    let Some(guest) = record.guest.filter(|_| record.state == FunctionState::Attached) else {
        return Err(refused(format!("{address} is {}", record.state)));
    };
    let function = context.platform.host.function(address)?;
    let name = domains::name(context.platform.store.as_ref(), guest.domain)?;
    let merged = context.policies.merge(&Subject::of_host(&function, name));
    let limit = merged.policy.virtual_functions.map_or(0, |by_guest| by_guest.count);
    let refuses = |why: &str| {
        let text = format!("domain {} asks for {wanted} VFs, and {why}", guest.domain);
        Err(refused(text).of(guest.domain))
    };
    if wanted > limit {
        return refuses(&format!("policies give it {limit}"));
    }
    if wanted > MOST_BESIDE_PF
        && domains::kind(context.platform.store.as_ref(), guest.domain)? == DomainType::Hvm
    {
        return refuses(&format!(
            "an HVM guest can have {MOST_BESIDE_PF}, which are functions of the PF's device"
        ));
    }
    if function.driver.as_deref() != Some(PF_STUB) {
        let text = format!(
            "{address} is held by {}, which cannot create VFs",
            function.driver.as_deref().unwrap_or("no driver")
        );
        return Err(refused(text).hint(format!(
            "detach it, then 'xpci pci-assignable-remove {address}' and 'xpci pci-assignable-add {address}': {PF_STUB} holds it then"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use pciback::DomId;
    use pciback::platform::sim::Simulation;

    use super::*;
    use crate::engine::{Event, Inbox, tasks};
    use crate::journal::GuestPlace;

    const HOST: &str = include_str!("../../../../configs/sim/two-guests.yaml");
    const LIMIT: Duration = Duration::from_secs(60);

    fn record(address: Sbdf, state: FunctionState, guest: Option<DomId>) -> Record {
        let guest = guest.map(|domain| GuestPlace { domain, devfn: pciback::Devfn(0) });
        Record { state, guest, ..Record::new(address, "boot") }
    }

    #[test]
    fn vfs_that_a_quarantine_kept_are_removed_when_it_is_cleared() {
        let pf: Sbdf = "01:00.0".parse().unwrap();
        let platform = Simulation::from_yaml(HOST).unwrap().platform("test").unwrap();
        platform.host.set_num_vfs(pf, 2, LIMIT).unwrap();
        let vf = platform.host.function(pf).unwrap().virtual_functions[0];
        let (mut functions, policies) = (Functions::new("boot".to_owned()), PolicySet::default());
        functions.keep(record(vf, FunctionState::Quarantined, Some(DomId(1))));
        let mut guests = GuestVfs::default();
        guests.0.insert(pf, Pf::default());
        let context = Context { platform: &platform, functions: &functions, policies: &policies };
        let effects = guests.wanted(pf, &context);
        assert!(matches!(effects[..], [Effect::Asked(_), Effect::Refused(..)]), "{effects:?}");
        assert!(guests.go_on(vf, &context).is_empty(), "it is quarantined still");

        functions.forget(vf);
        let context = Context { platform: &platform, functions: &functions, policies: &policies };
        let effects = guests.go_on(vf, &context);
        assert!(matches!(effects[..], [Effect::Asked(_), Effect::Remove(_)]), "{effects:?}");
    }

    #[test]
    fn vfs_are_taken_from_guests_and_released_before_the_driver_removes_them() {
        let pf: Sbdf = "01:00.0".parse().unwrap();
        let platform = Simulation::from_yaml(HOST).unwrap().platform("test").unwrap();
        platform.host.set_num_vfs(pf, 2, LIMIT).unwrap();
        let vfs = platform.host.function(pf).unwrap().virtual_functions;
        let (mut functions, policies) = (Functions::new("boot".to_owned()), PolicySet::default());
        functions.keep(record(vfs[0], FunctionState::Attached, Some(DomId(1))));
        functions.keep(record(vfs[1], FunctionState::Held, None));
        let (inbox, events) = Inbox::new().unwrap();
        let answered = inbox.ask(|answer| Event::Tasks(tasks::Event::RemoveVfs(pf, answer)));
        let Ok(Event::Tasks(tasks::Event::RemoveVfs(_, answer))) = events.try_recv() else { panic!() };

        let mut guests = GuestVfs::default();
        let context = Context { platform: &platform, functions: &functions, policies: &policies };
        let effects = guests.leaves(pf, answer, &context);
        assert!(
            matches!(&effects[..], [Effect::Asked(_), Effect::Take(taken), Effect::Release(released)]
                if taken.address == vfs[0] && released.address == vfs[1]),
            "{effects:?}"
        );

        vfs.iter().for_each(|vf| functions.forget(*vf));
        let context = Context { platform: &platform, functions: &functions, policies: &policies };
        assert!(matches!(guests.go_on(vfs[1], &context)[..], [Effect::Remove(_)]));
        assert!(guests.go_on(vfs[0], &context).is_empty(), "its driver removes them already");
        platform.host.set_num_vfs(pf, 0, LIMIT).unwrap();
        let effects = guests.changed(pf, Ok(()), &context);
        assert!(matches!(effects[..], [Effect::Asked(_), Effect::Settled(_)]), "{effects:?}");
        assert_eq!(answered.recv_timeout(LIMIT).unwrap(), Ok(None));
    }
}
