//! Verified resets: a function gets another owner only after one.

use std::time::{Duration, Instant};

use log::warn;
use nix::errno::Errno;
use pciback::Sbdf;
use pciback::config::{Access, ConfigSpace};
use pciback::live::{self, Canary, PlacedBar, Switch};
use pciback::platform::{Host, HostFunction, Platform, ResetReach};
use pciback::policy::{PolicySet, Subject};
use pciback::spec::header;

use super::{Context, Kind, together};
use crate::journal::{Progress, Record};
use crate::outcome::{ErrorCode, Failure};
use crate::reset_plan::{ResetCheck, ResetPlan};

/// Command and Status together.
const COMMAND_AND_STATUS: Access = Access::fixed::<{ header::COMMAND }, 4>();

/// The reset plan for a function: the settings, overridden by its policies. Policies for a guest's name do not apply, because the guest
/// may have ended.
pub fn plan_for(settings: &ResetPlan, policies: &PolicySet, function: &HostFunction) -> ResetPlan {
    let wishes = policies.merge(&Subject::of_host(function, None)).reset;
    let permit_none = wishes.permits_none();
    let mut plan = ResetPlan { permit_none, together: wishes.wants_together(), ..settings.clone() };
    if let Some(methods) = wishes.methods {
        plan.methods = methods;
    }
    plan
}

/// Resets a function and verifies the reset. If it cannot be reset and the plan permits that, it is only made quiet, and a warning is
/// returned.
pub fn reset_and_verify(
    platform: &Platform,
    plan: &ResetPlan,
    function: &HostFunction,
) -> Result<Option<String>, Failure> {
    reset_in_this_way(platform, plan, function, way(platform.host.as_ref(), plan, function)?)
}

fn reset_in_this_way(
    platform: &Platform,
    plan: &ResetPlan,
    function: &HostFunction,
    way: Way,
) -> Result<Option<String>, Failure> {
    let (host, address) = (platform.host.as_ref(), function.address);
    // Before the reset, because Linux saves the header and restores it afterwards.
    let config = host.config(address)?;
    let quiet = live::clear_bus_master(config.as_ref()).and_then(|()| live::disable_rom(config.as_ref()));
    quiet.map_err(|error| config_failure("quiesce", address, &error))?;
    let unreset = (way == Way::Without).then(|| {
        format!(
            "{address} gets a new owner without a reset, as a policy permits: it may contain data of the last owner, and firmware that \
             the last owner loaded keeps running"
        )
    });
    let canary = match &unreset {
        None => Canary::set(host.config(address)?.as_ref())
            .map_err(|error| config_failure("mark a register before the reset of", address, &error))?,
        Some(_) => None,
    };
    let reset = match &unreset {
        None => host.reset(address, Duration::from_secs(plan.limit_seconds)),
        Some(warning) => {
            warn!("{warning}");
            Ok(())
        }
    };
    let config = host.config(address)?;
    let limit = Duration::from_secs(plan.answer_seconds);
    let verified =
        reset.map_err(Failure::from).and_then(|()| verify_all(config.as_ref(), plan, canary, address, limit));
    clear_mark(canary, config.as_ref(), address);
    verified?;
    place_bars(config.as_ref(), function)?;
    let untold = match (&unreset, function.reset_methods.first()) {
        (Some(_), _) => None,
        (None, Some(method)) if method == BUS => tell_xen(platform, address, ResetReach::Bus),
        (None, _) => tell_xen(platform, address, ResetReach::Function),
    };
    // INTx stays disabled until a guest handles it. A driver of dom0 enables it itself. Not all hardware implements Interrupt Disable.
    live::set_intx(config.as_ref(), Switch::Off)
        .map(|_| unreset.or(untold))
        .map_err(|error| config_failure("disable INTx of", address, &error))
}

/// Tells Xen of a reset that was verified, once BARs are in place again. What Xen has cached concerns neither the guests of this service nor
/// what the reset has cleared, so that a failure is only a warning.
pub(super) fn tell_xen(platform: &Platform, address: Sbdf, reach: ResetReach) -> Option<String> {
    match platform.hypervisor.note_reset(address, reach) {
        Ok(_) => None,
        // What it does not know it has not cached.
        Err(error) if error.errno() == Some(Errno::ENODEV) => None,
        Err(error) => {
            let text = format!(
                "{address} was reset, but Xen may still have cached its registers from before: {error}"
            );
            warn!("{text}");
            Some(text)
        }
    }
}

/// Takes back the mark that a reset was verified by.
pub(super) fn clear_mark(canary: Option<Canary>, config: &dyn ConfigSpace, address: Sbdf) {
    if let Some(Err(error)) = canary.map(|canary| canary.remove(config)) {
        warn!("{address}: clear the mark that the reset left: {error}");
    }
}

/// Restores the BAR addresses that Linux assigned, if a reset of the link had cleared them earlier: Linux's save and restore around its
/// reset then kept the cleared values.
pub(super) fn place_bars(config: &dyn ConfigSpace, function: &HostFunction) -> Result<(), Failure> {
    let address = function.address;
    let lost = live::place_bars(config, &PlacedBar::of_host(function)).map_err(|error| {
        config_failure("restore the BARs of", address, &error)
            .hint("remove the function from Linux and rescan its bus, or power-cycle the device")
    })?;
    if !lost.is_empty() {
        warn!("{address}: restored {} BAR registers that a reset of its link has cleared", lost.len());
    }
    Ok(())
}

/// How a function is reset for another owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// By Linux, without affecting other functions.
    Alone,
    /// By the service, together with all functions on its bus.
    Together,
    /// Not at all.
    Without,
}

/// How a plan resets a function; an error if no way is possible.
pub(super) fn way(host: &dyn Host, plan: &ResetPlan, function: &HostFunction) -> Result<Way, Failure> {
    let address = function.address;
    let alone = match function.reset_methods.first() {
        Some(method) => Some(refuse_alone(host, plan, address, method)?),
        None => None,
    };
    let has_bridge = || Ok::<bool, Failure>(!host.ports_above(address)?.is_empty());
    match alone {
        Some(None) => return Ok(Way::Alone),
        _ if plan.together && has_bridge()? => return Ok(Way::Together),
        Some(Some(refusal)) => return Err(refusal),
        None if plan.permit_none => return Ok(Way::Without),
        None => {}
    }
    let together = match has_bridge()? {
        true => {
            "to reset all functions on its bus together, write 'reset: {together: true}' in a policy that matches them; "
        }
        false => "",
    };
    let hint = format!(
        "{together}to permit guests to get it without a reset, write 'reset: {{none: permit}}' in a policy that matches it; then 'xpci policy reload'"
    );
    Err(Failure::refused(format!("reset {address}: Linux has no way to reset it alone"))
        .on(address)
        .hint(hint))
}

/// Why the reset method that Linux offers cannot be used, if so.
fn refuse_alone(
    host: &dyn Host,
    plan: &ResetPlan,
    address: Sbdf,
    method: &str,
) -> Result<Option<Failure>, Failure> {
    let refused = |text: String, hint: String| Ok(Some(Failure::refused(text).on(address).hint(hint)));
    if !plan.methods.iter().any(|accepted| accepted == method) {
        return refused(
            format!(
                "reset {address}: Linux offers '{method}' first, accepted are: {}",
                plan.methods.join(", ")
            ),
            format!(
                "to accept '{method}', write 'reset: {{methods: [{method}]}}' in a policy that matches it, or in xpcid.yaml for all \
                 functions"
            ),
        );
    }
    if method == BUS {
        // Linux offers a bus reset only for the only function on the bus, but another one may have appeared since it checked.
        let others: Vec<Sbdf> =
            host.functions()?.into_iter().filter(|other| share_a_bus(*other, address)).collect();
        if !others.is_empty() {
            let named: Vec<String> = others.iter().map(ToString::to_string).collect();
            return refused(
                format!("reset {address}: a reset of its bus would hit {}", named.join(", ")),
                "a policy that matches all of them says 'reset: {together: true}', or remove those from Linux".to_owned(),
            );
        }
    }
    Ok(None)
}

/// The method that resets everything on the function's bus.
const BUS: &str = "bus";

fn share_a_bus(other: Sbdf, address: Sbdf) -> bool {
    other != address && (other.segment(), other.bus()) == (address.segment(), address.bus())
}

/// Verifies a reset by all checks of the plan.
pub(super) fn verify_all(
    config: &dyn ConfigSpace,
    plan: &ResetPlan,
    canary: Option<Canary>,
    address: Sbdf,
    limit: Duration,
) -> Result<(), Failure> {
    plan.checks.iter().try_for_each(|check| verify(config, *check, canary, address, limit))
}

fn verify(
    config: &dyn ConfigSpace,
    check: ResetCheck,
    canary: Option<Canary>,
    address: Sbdf,
    limit: Duration,
) -> Result<(), Failure> {
    let deadline = Instant::now() + limit;
    loop {
        let holds = match (check, canary) {
            (ResetCheck::Answers, _) => config.read(COMMAND_AND_STATUS).map(|value| value != u32::MAX),
            (ResetCheck::Cleared, Some(canary)) => canary.is_cleared(config),
            (ResetCheck::Cleared, None) => Ok(true),
        };
        if holds.map_err(|error| config_failure("verify the reset of", address, &error))? {
            return Ok(());
        }
        if Instant::now() >= deadline {
            let why = match check {
                ResetCheck::Answers => "it still answers all ones",
                ResetCheck::Cleared => "a register still has its earlier value",
            };
            return Err(Failure::new(ErrorCode::Failed, format!("reset {address}: {why} after {limit:?}"))
                .on(address)
                .hint("the device may need a power cycle"));
        }
        // No event signals the end of a reset; the specification has software poll config space (section 2.3.1, RRS).
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub(super) fn config_failure(action: &str, address: Sbdf, error: &std::io::Error) -> Failure {
    Failure::new(ErrorCode::Failed, format!("{action} {address}: config access: {error}")).on(address)
}

pub(super) fn run(context: &Context<'_>, record: &mut Record) -> Result<Option<String>, Failure> {
    if context.left_the_host(record) {
        return Ok(None);
    }
    (context.progress)(&format!("resetting {}", record.address));
    let function = context.platform.host.function(record.address)?;
    record.keeps_vfs = function.num_vfs > 0;
    if record.keeps_vfs {
        return keep_vfs(context, record, &function);
    }
    let plan = plan_for(&context.settings.reset, context.policies, &function);
    let way = way(context.platform.host.as_ref(), &plan, &function)?;
    if way != Way::Together {
        return reset_in_this_way(context.platform, &plan, &function, way);
    }
    match record.transaction.as_ref() {
        Some(Progress { kind: Kind::Attach, undoing: false, .. }) => {
            together::prepare(context, record, &plan, &function)
        }
        _ => together::restore(context, record, &plan, &function),
    }
}

/// A PF whose VFs other guests have is not reset for the guest that created them, which starts again: that would take the VFs from them.
/// No other guest, and not dom0, gets the PF before its VFs are gone.
fn keep_vfs(
    context: &Context<'_>,
    record: &Record,
    function: &HostFunction,
) -> Result<Option<String>, Failure> {
    let (address, vfs) = (record.address, function.num_vfs);
    if !context.serving.keeps_vfs(record) {
        let text =
            format!("reset {address}: it has {vfs} VFs, which the reset would remove under their guests");
        let hint = format!("detach and release them, then 'xpci vf destroy {address}'");
        return Err(Failure::refused(text).on(address).hint(hint));
    }
    let quiet = live::clear_bus_master(context.platform.host.config(address)?.as_ref());
    quiet.map_err(|error| config_failure("quiesce", address, &error))?;
    Ok(Some(format!(
        "{address} is not reset: other guests use its {vfs} VFs, which stay for the guest that created them"
    )))
}
