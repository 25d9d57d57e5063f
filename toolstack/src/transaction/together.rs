//! Functions that cannot be reset alone: they are reset together, by the secondary bus reset of the bridge above.
//!
//! Such a reset affects all functions below that bridge, and neither the bridge nor anything else. It is done while all of them are held
//! and no guest has one. Afterwards each of them is fresh: it can be attached without another reset, to the same guest as the others. A
//! function that a guest gives back while it has others of them cannot be reset yet; when the last one comes back, all are reset.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use log::info;
use pciback::config::ConfigSpace;
use pciback::containment::radius::Bridge;
use pciback::live::{self, Canary, KeptRegisters, Switch};
use pciback::platform::{Host, HostFunction, Platform, ResetReach};
use pciback::policy::{PolicySet, Subject};
use pciback::{DomId, Sbdf};

use super::hold::{holder_of, is_guest_owned};
use super::reset::{Way, clear_mark, config_failure, place_bars, plan_for, tell_xen, verify_all, way};
use super::{Context, guest_of};
use crate::journal::{Journal, Owner, Record};
use crate::outcome::{Failure, few};
use crate::reset_plan::ResetPlan;

/// The number of functions on a bus that a message names.
const SHOWN: usize = 4;

/// The functions that were reset with their bus and have had no owner since. A restart of the service forgets them, so that they are
/// reset again.
#[derive(Debug, Clone, Default)]
pub struct Fresh {
    /// The fresh functions, with their incarnation.
    known: Arc<Mutex<BTreeMap<Sbdf, u64>>>,
    /// Functions that their guests have lost and that wait for a reset of their bus. Until the detaching transaction ends, the record of
    /// such a function still names the guest.
    waiting: Arc<Mutex<BTreeSet<Sbdf>>>,
    /// Held while a bus is reset, and while it is checked whether it may be.
    turn: Arc<Mutex<()>>,
}

impl Fresh {
    fn known(&self) -> MutexGuard<'_, BTreeMap<Sbdf, u64>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn waiting(&self) -> MutexGuard<'_, BTreeSet<Sbdf>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn has(&self, function: &HostFunction) -> bool {
        self.known().get(&function.address) == Some(&function.incarnation)
    }

    /// Forgets a function that gets, or has had, another owner.
    pub(super) fn forget(&self, address: Sbdf) {
        self.known().remove(&address);
        self.waiting().remove(&address);
    }

    /// Waits for the end of a bus reset that is under way. A change of owner that was noted in the journal before is seen by all later
    /// resets.
    pub(super) fn wait(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The inputs of the check whether a bus may be reset.
#[derive(Clone, Copy)]
pub struct Buses<'a> {
    /// The host.
    pub platform: &'a Platform,
    /// The journal, with the owners of functions.
    pub journal: &'a Journal,
    /// The fresh functions.
    pub fresh: &'a Fresh,
}

impl<'a> Context<'a> {
    pub(super) fn buses(&self) -> Buses<'a> {
        Buses { platform: self.platform, journal: self.journal, fresh: self.fresh }
    }
}

/// A bridge and all functions below it.
struct Bus {
    bridge: Sbdf,
    functions: Vec<HostFunction>,
}

impl Bus {
    fn of(host: &dyn Host, address: Sbdf) -> Result<Self, Failure> {
        let Some(bridge) = host.ports_above(address)?.first().copied() else {
            let text = format!("reset {address}: there is no bridge above it, whose bus could be reset");
            return Err(Failure::refused(text).on(address));
        };
        let bytes = host.config(bridge)?.read_all();
        let bytes = bytes.map_err(|error| config_failure("read the bus numbers of", bridge, &error))?;
        let below = Bridge::read(bridge, &bytes);
        if !below.covers(address) {
            let text = format!(
                "reset {address}: the bridge {bridge} above it does not answer, or has other buses below"
            );
            return Err(Failure::refused(text).on(address));
        }
        // A function that leaves meanwhile is not reset.
        let functions = host.functions()?.into_iter().filter(|other| below.covers(*other));
        Ok(Self { bridge, functions: functions.filter_map(|other| host.function(other).ok()).collect() })
    }

    fn others(&self, address: Sbdf) -> impl Iterator<Item = &HostFunction> {
        self.functions.iter().filter(move |other| other.address != address)
    }
}

/// Other functions on a bus that prevent its reset.
#[derive(Default)]
struct Taken {
    /// Functions that this service has attached to a guest.
    guests: Vec<(Sbdf, DomId)>,
    /// Functions of dom0 or of another toolstack, as text.
    others: Vec<String>,
}

impl Taken {
    /// Whether no owner other than this guest has functions there.
    fn only_by(&self, domain: Option<DomId>) -> bool {
        self.others.is_empty() && self.guests.iter().all(|(_, guest)| Some(*guest) == domain)
    }

    fn refusal(&self, address: Sbdf, bridge: Sbdf) -> Result<(), Failure> {
        let guests = self.guests.iter().map(|(other, domain)| format!("{other} (domain {domain}'s)"));
        let named: Vec<String> = guests.chain(self.others.iter().cloned()).collect();
        if named.is_empty() {
            return Ok(());
        }
        let text =
            format!("reset {address}: a reset of the bus below {bridge} would hit {}", few(&named, SHOWN));
        let hint = match self.others.is_empty() {
            true => {
                "detach those first; then all of them go to the same guest in one command: 'xpci pci-attach GUEST BDF BDF'"
            }
            false => {
                "hold all functions on this bus with 'xpci pci-assignable-add'; then all of them go to the same guest in one command: 'xpci \
                 pci-attach GUEST BDF BDF'"
            }
        };
        Err(Failure::refused(text).on(address).hint(hint))
    }
}

impl Buses<'_> {
    /// The bus of a function, and what prevents its reset.
    fn around(&self, address: Sbdf) -> Result<(Bus, Taken), Failure> {
        let bus = Bus::of(self.platform.host.as_ref(), address)?;
        let taken = self.taken(&bus, address)?;
        Ok((bus, taken))
    }

    fn taken(&self, bus: &Bus, address: Sbdf) -> Result<Taken, Failure> {
        let owners = self.journal.owners().clone();
        let mut taken = Taken::default();
        for other in bus.others(address) {
            let name = other.address;
            if other.is_bridge() {
                taken.others.push(format!("{name} (a bridge)"));
                continue;
            }
            match owners.get(&name) {
                Some(Owner::Domain(_)) if self.fresh.waiting().contains(&name) => {}
                Some(Owner::Domain(domain)) if *domain != DomId::DOM0 => taken.guests.push((name, *domain)),
                Some(Owner::Held | Owner::Quarantined) if holder_of(other).is_some() => {
                    if is_guest_owned(self.platform, name)? {
                        taken.others.push(format!("{name} (a guest's, through another toolstack)"));
                    }
                }
                _ => match other.driver.as_deref() {
                    Some(driver) => taken.others.push(format!("{name} (dom0's, with {driver})")),
                    None => taken.others.push(format!("{name} (dom0's, without a driver)")),
                },
            }
        }
        Ok(taken)
    }

    /// Refuses a function that cannot be reset, before anything is changed. `domain`: who is to get it, if that is known.
    pub fn refuse_unresettable(
        &self,
        plan: &ResetPlan,
        function: &HostFunction,
        domain: Option<DomId>,
    ) -> Result<(), Failure> {
        let host = self.platform.host.as_ref();
        if way(host, plan, function)? != Way::Together {
            return Ok(());
        }
        let (bus, taken) = self.around(function.address)?;
        if taken.only_by(domain) && self.fresh.has(function) {
            return Ok(());
        }
        self.refuse_bus(&bus, &taken, function.address)
    }

    /// Refuses to reset a bus.
    fn refuse_bus(&self, bus: &Bus, taken: &Taken, address: Sbdf) -> Result<(), Failure> {
        taken.refusal(address, bus.bridge)?;
        let host = self.platform.host.as_ref();
        match live::notifies_of_removal(host.config(bus.bridge)?.as_ref()) {
            Ok(false) => Ok(()),
            Ok(true) => {
                let text = format!(
                    "reset {}: {} is a hot-plug slot: the kernel would treat a reset of its bus as the removal of its devices",
                    address, bus.bridge
                );
                Err(Failure::refused(text)
                    .on(address)
                    .hint("start dom0 with pcie_ports=compat, or use another slot"))
            }
            Err(error) => Err(config_failure("read Slot Control of", bus.bridge, &error)),
        }
    }
}

/// Refuses to give a function back to dom0 if functions of a guest need it for the reset of their bus, or if a guest has had it and it
/// cannot be reset now.
pub(super) fn refuse_release(
    buses: &Buses<'_>,
    policies: &PolicySet,
    record: &Record,
) -> Result<(), Failure> {
    let address = record.address;
    let host = buses.platform.host.as_ref();
    if host.ports_above(address)?.is_empty() {
        return Ok(());
    }
    let Ok(bus) = Bus::of(host, address) else { return Ok(()) };
    let mut taken = buses.taken(&bus, address)?;
    let due =
        record.unreset && !bus.functions.iter().any(|own| own.address == address && buses.fresh.has(own));
    if !due {
        taken.others.clear();
        taken.guests.retain(|(other, _)| {
            let function = bus.functions.iter().find(|function| function.address == *other);
            function.is_some_and(|function| {
                policies.merge(&Subject::of_host(function, None)).reset.wants_together()
                    && function.reset_methods.is_empty()
            })
        });
    }
    taken.refusal(address, bus.bridge)
}

/// Before a function goes back to dom0: resets it if a guest has had it.
pub(super) fn before_release(context: &Context<'_>, record: &mut Record) -> Result<(), Failure> {
    let _turn = context.fresh.wait();
    let left = context.left_the_host(record);
    if !left && record.unreset {
        let function = context.platform.host.function(record.address)?;
        if !context.fresh.has(&function) {
            let plan = plan_for(&context.settings.reset, context.policies, &function);
            reset_bus(context, &plan, &function)?;
        }
        record.unreset = false;
    }
    context.fresh.forget(record.address);
    Ok(())
}

/// Before a guest gets a function.
pub(super) fn prepare(
    context: &Context<'_>,
    record: &mut Record,
    plan: &ResetPlan,
    function: &HostFunction,
) -> Result<Option<String>, Failure> {
    let _turn = context.fresh.wait();
    let address = function.address;
    let (_, taken) = context.buses().around(address)?;
    if !(context.fresh.has(function) && taken.only_by(Some(guest_of(record)?))) {
        reset_bus(context, plan, function)?;
    }
    // From here on the function is the guest's.
    context.fresh.forget(address);
    record.unreset = false;
    Ok(None)
}

/// After a guest has had a function, or before a quarantine ends.
pub(super) fn restore(
    context: &Context<'_>,
    record: &mut Record,
    plan: &ResetPlan,
    function: &HostFunction,
) -> Result<Option<String>, Failure> {
    let _turn = context.fresh.wait();
    let address = function.address;
    let (_, taken) = context.buses().around(address)?;
    let domain = record.guest.map(|guest| guest.domain);
    if domain.is_none() || taken.guests.is_empty() || !taken.only_by(domain) {
        reset_bus(context, plan, function)?;
        record.unreset = false;
        return Ok(None);
    }
    make_quiet(context.platform.host.config(address)?.as_ref(), address)?;
    record.unreset = true;
    context.write(record)?;
    // From here on, the transaction of the guest's last function may reset this one.
    context.fresh.waiting().insert(address);
    let others: Vec<String> = taken.guests.iter().map(|(other, _)| other.to_string()).collect();
    Ok(Some(format!(
        "{address} is not reset yet: its bus is reset when the guest has given back {}, too; until then it cannot be attached or go back to dom0",
        few(&others, SHOWN)
    )))
}

fn make_quiet(config: &dyn ConfigSpace, address: Sbdf) -> Result<(), Failure> {
    live::switch_off(config)
        .map(drop)
        .map_err(|error| config_failure("switch bus mastering and interrupts off in", address, &error))
}

/// A function before the reset of its bus: it is quiet, its registers are noted, and a register is marked.
struct Marked<'a> {
    function: &'a HostFunction,
    config: Box<dyn ConfigSpace>,
    kept: KeptRegisters,
    canary: Option<Canary>,
}

impl<'a> Marked<'a> {
    fn new(host: &dyn Host, function: &'a HostFunction) -> Result<Self, Failure> {
        let address = function.address;
        let config = host.config(address)?;
        make_quiet(config.as_ref(), address)?;
        let kept = KeptRegisters::read(config.as_ref())
            .map_err(|error| config_failure("note the registers before the reset of", address, &error))?;
        let canary = Canary::set(config.as_ref())
            .map_err(|error| config_failure("mark a register before the reset of", address, &error))?;
        Ok(Self { function, config, kept, canary })
    }

    /// Takes back the mark that the reset was verified by.
    fn clear(&self) {
        clear_mark(self.canary, self.config.as_ref(), self.function.address);
    }
}

/// Resets all functions on the bus of one, verifies each, and restores their registers. The caller holds the lock of [`Fresh::wait`].
fn reset_bus(context: &Context<'_>, plan: &ResetPlan, function: &HostFunction) -> Result<(), Failure> {
    let (host, address) = (context.platform.host.as_ref(), function.address);
    let buses = context.buses();
    // Owners may have changed since the check of the caller.
    let (bus, taken) = buses.around(address)?;
    buses.refuse_bus(&bus, &taken, address)?;
    info!("{address}: resetting all {} functions below {}", bus.functions.len(), bus.bridge);
    let mut marked: Vec<Marked<'_>> = Vec::new();
    for function in &bus.functions {
        context.fresh.known().remove(&function.address);
        match Marked::new(host, function) {
            Ok(function) => marked.push(function),
            Err(failure) => {
                // Without a reset that would clear them, the marks are removed.
                marked.iter().for_each(Marked::clear);
                return Err(failure);
            }
        }
    }
    let bridge = host.config(bus.bridge)?;
    let reset = live::reset_secondary_bus(bridge.as_ref())
        .map_err(|error| config_failure("reset the bus below", bus.bridge, &error).on(address));
    let limit = Duration::from_secs(plan.answer_seconds);
    let mut outcome = reset;
    for one in marked {
        let Marked { function, config, kept, canary } = &one;
        // A failure of one function does not prevent the restoration of the others.
        let verified = verify_all(config.as_ref(), plan, *canary, function.address, limit);
        let put_back = kept
            .write_back(config.as_ref())
            .map_err(|error| config_failure("restore the registers of", function.address, &error))
            .and_then(|()| place_bars(config.as_ref(), function));
        if verified.is_ok() && put_back.is_ok() {
            tell_xen(context.platform, function.address, ResetReach::Bus);
        }
        let silenced = live::set_intx(config.as_ref(), Switch::Off)
            .map(drop)
            .map_err(|error| config_failure("disable INTx of", function.address, &error));
        one.clear();
        let done = verified.and(put_back).and(silenced);
        if done.is_ok() && outcome.is_ok() {
            context.fresh.known().insert(function.address, function.incarnation);
        }
        outcome = outcome.and(done);
    }
    if outcome.is_err() {
        // After a partial failure no function counts as reset.
        for function in &bus.functions {
            context.fresh.known().remove(&function.address);
        }
    }
    outcome
}
