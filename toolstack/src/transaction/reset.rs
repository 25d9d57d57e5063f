//! Reset as a gate: a function changes hands only after a reset that is verified.

use std::time::{Duration, Instant};

use log::warn;
use pciback::Sbdf;
use pciback::config::{Access, ConfigSpace};
use pciback::live::{self, Canary, PlacedBar, Switch};
use pciback::platform::{HostFunction, Platform};
use pciback::spec::header;
use serde::{Deserialize, Serialize};

use super::Context;
use crate::journal::Record;
use crate::outcome::{ErrorCode, Failure};

/// How a function is reset, how long that may take and how success is known.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct ResetPlan {
    /// The methods that will do, in the words of Linux's `reset_method`; one that touches other functions is not among them.
    pub methods: Vec<String>,
    /// How long the reset itself may take, in seconds.
    pub limit_seconds: u64,
    /// How long the function may take to answer afterwards, in seconds (PCI Express 6.0, section 6.6.2: at most 1 s).
    pub answer_seconds: u64,
    /// What must hold afterwards.
    pub checks: Vec<ResetCheck>,
}

/// What shows that a reset happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ResetCheck {
    /// Command and Status do not read all ones.
    Answers,
    /// A register that Linux does not write back has lost what was written into it before. It shows nothing in a function without MSI and
    /// MSI-X.
    Cleared,
}

impl Default for ResetPlan {
    fn default() -> Self {
        Self {
            methods: ["flr", "af_flr", "pm", "device_specific"].map(str::to_owned).to_vec(),
            limit_seconds: 10,
            answer_seconds: 2,
            checks: vec![ResetCheck::Answers, ResetCheck::Cleared],
        }
    }
}

/// Command and Status in one.
const COMMAND_AND_STATUS: Access = Access::fixed::<{ header::COMMAND }, 4>();

/// Resets a function and makes sure that it did.
pub fn reset_and_verify(platform: &Platform, plan: &ResetPlan, address: Sbdf) -> Result<(), Failure> {
    let host = platform.host.as_ref();
    let function = host.function(address)?;
    refuse_unresettable(plan, &function)?;
    // Quiet before the reset: Linux saves Command and writes it back afterwards.
    let quiet = live::clear_bus_master(host.config(address)?.as_ref());
    quiet.map_err(|error| config_failure("quiesce", address, &error))?;
    let canary = Canary::set(host.config(address)?.as_ref())
        .map_err(|error| config_failure("mark a register before the reset of", address, &error))?;
    let reset = host.reset(address, Duration::from_secs(plan.limit_seconds));
    let config = host.config(address)?;
    let limit = Duration::from_secs(plan.answer_seconds);
    let verified = reset.map_err(Failure::from).and_then(|()| {
        plan.checks.iter().try_for_each(|check| verify(config.as_ref(), *check, canary, address, limit))
    });
    if verified.is_err()
        && let Some(Err(error)) = canary.map(|canary| canary.remove(config.as_ref()))
    {
        warn!("{address}: clear the mark that the reset left: {error}");
    }
    verified?;
    place_bars(config.as_ref(), &function)?;
    // Nobody hears its INTx until a guest has it, or a driver of dom0's, which clears the bit itself. Not all hardware has it.
    live::set_intx(config.as_ref(), Switch::Off)
        .map(drop)
        .map_err(|error| config_failure("disable INTx of", address, &error))
}

/// The addresses that Linux gave the BARs, where a reset of the link has taken them: the reset above has then kept what was no longer
/// right.
fn place_bars(config: &dyn ConfigSpace, function: &HostFunction) -> Result<(), Failure> {
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

/// Refuses a function that Linux would not reset in a way that will do.
pub fn refuse_unresettable(plan: &ResetPlan, function: &HostFunction) -> Result<(), Failure> {
    let address = function.address;
    let method = function.reset_methods.first();
    if !method.is_some_and(|method| plan.methods.contains(method)) {
        let found = method.map_or_else(|| "none".to_owned(), |method| format!("'{method}' first"));
        return Err(Failure::refused(format!(
            "reset {address}: Linux offers {found}, the reset plan wants one of: {}",
            plan.methods.join(", ")
        ))
        .on(address)
        .hint("a 'bus' reset also hits other functions; allow it in xpcid.yaml under 'reset: methods:' if that is meant"));
    }
    Ok(())
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
                ResetCheck::Cleared => "a register still holds what it held before",
            };
            return Err(Failure::new(ErrorCode::Failed, format!("reset {address}: {why} after {limit:?}"))
                .on(address)
                .hint("the device may need a power cycle"));
        }
        // No event tells when a device has come back: the specification has software ask (section 2.3.1, RRS).
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub(super) fn config_failure(action: &str, address: Sbdf, error: &std::io::Error) -> Failure {
    Failure::new(ErrorCode::Failed, format!("{action} {address}: config access: {error}")).on(address)
}

pub(super) fn run(context: &Context<'_>, record: &mut Record) -> Result<(), Failure> {
    if context.left_the_host(record) {
        return Ok(());
    }
    (context.progress)(&format!("resetting {}", record.address));
    reset_and_verify(context.platform, &context.settings.reset, record.address)
}
