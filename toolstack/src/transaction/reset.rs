//! Reset as a gate: a function changes hands only after a reset that is verified.

use std::time::{Duration, Instant};

use log::warn;
use pciback::Sbdf;
use pciback::config::{Access, ConfigSpace};
use pciback::platform::{Host, HostFunction, Platform, Resource};
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
    /// Bus Master Enable is clear.
    BusMasterOff,
}

impl Default for ResetPlan {
    fn default() -> Self {
        Self {
            methods: ["flr", "af_flr", "pm", "device_specific"].map(str::to_owned).to_vec(),
            limit_seconds: 10,
            answer_seconds: 2,
            checks: vec![ResetCheck::Answers, ResetCheck::BusMasterOff],
        }
    }
}

const COMMAND: u32 = 0x04;
const BUS_MASTER: u32 = 1 << 2;
/// I/O Space Enable and Memory Space Enable.
const DECODING: u32 = 0x3;
const BAR0: u32 = 0x10;

/// Resets a function and makes sure that it did.
pub fn reset_and_verify(platform: &Platform, plan: &ResetPlan, address: Sbdf) -> Result<(), Failure> {
    let host = platform.host.as_ref();
    let function = host.function(address)?;
    refuse_unresettable(plan, &function)?;
    // Quiet before the reset: Linux saves Command and writes it back afterwards.
    quiesce(host, address)?;
    host.reset(address, Duration::from_secs(plan.limit_seconds))?;
    let config = host.config(address)?;
    for check in &plan.checks {
        verify(config.as_ref(), *check, address, Duration::from_secs(plan.answer_seconds))?;
    }
    place_bars(config.as_ref(), &function)
}

/// Writes the addresses that Linux gave the BARs back where the registers have lost them: a reset of the link, as Linux begins one
/// when an error was fatal, takes them, and the reset above has then kept what was no longer right. A VF has none: its PF places
/// its BARs.
fn place_bars(config: &dyn ConfigSpace, function: &HostFunction) -> Result<(), Failure> {
    if function.physical_function.is_some() {
        return Ok(());
    }
    let address = function.address;
    let failed = |error| config_failure("restore the BARs of", address, &error);
    let mut lost = Vec::new();
    for (index, bar) in (0u32..).zip(function.bars()) {
        if !bar.exists() || bar.start == 0 {
            continue;
        }
        let registers = if bar.flags & Resource::MEMORY_64 != 0 { 2 } else { 1 };
        let kind = if bar.is_io() { 0x3 } else { 0xf };
        for (part, kind) in [(0, kind), (1, 0)].into_iter().take(registers) {
            let access = register(BAR0 + 4 * (index + part), 4, address)?;
            let expected = (bar.start >> (32 * part)) as u32;
            if config.read(access).map_err(failed)? & !kind != expected {
                lost.push((access, expected, kind));
            }
        }
    }
    if lost.is_empty() {
        return Ok(());
    }
    warn!("{address}: restoring {} BAR registers that a reset of its link has cleared", lost.len());
    // Nothing decodes half an address.
    let command_at = register(COMMAND, 2, address)?;
    let command = config.read(command_at).map_err(failed)?;
    config.write(command_at, command & !DECODING).map_err(failed)?;
    for (access, expected, kind) in lost {
        config.write(access, expected).map_err(failed)?;
        let found = config.read(access).map_err(failed)? & !kind;
        if found != expected {
            let why = format!(
                "its BAR register {:#x} reads {found:#x} after {expected:#x} was written",
                access.offset()
            );
            return Err(Failure::new(ErrorCode::Failed, format!("restore the BARs of {address}: {why}"))
                .on(address)
                .hint("remove the function from Linux and rescan its bus, or power-cycle the device"));
        }
    }
    config.write(command_at, command).map_err(failed)
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

fn register(offset: u32, size: u32, address: Sbdf) -> Result<Access, Failure> {
    Access::new(offset, size).map_err(|error| Failure::new(ErrorCode::Failed, error.to_string()).on(address))
}

fn quiesce(host: &dyn Host, address: Sbdf) -> Result<(), Failure> {
    let config = host.config(address)?;
    let access = register(COMMAND, 2, address)?;
    let failed = |error| config_failure("quiesce", address, &error);
    let command = config.read(access).map_err(failed)?;
    if command != 0xffff && command & BUS_MASTER != 0 {
        config.write(access, command & !BUS_MASTER).map_err(failed)?;
    }
    Ok(())
}

fn verify(
    config: &dyn ConfigSpace,
    check: ResetCheck,
    address: Sbdf,
    limit: Duration,
) -> Result<(), Failure> {
    let access = register(COMMAND, 4, address)?;
    let deadline = Instant::now() + limit;
    loop {
        let value =
            config.read(access).map_err(|error| config_failure("verify the reset of", address, &error))?;
        let holds = match check {
            ResetCheck::Answers => value != u32::MAX,
            ResetCheck::BusMasterOff => value & BUS_MASTER == 0,
        };
        if holds {
            return Ok(());
        }
        if Instant::now() >= deadline {
            let why = match check {
                ResetCheck::Answers => "it still answers all ones",
                ResetCheck::BusMasterOff => "bus mastering is still on",
            };
            return Err(Failure::new(ErrorCode::Failed, format!("reset {address}: {why} after {limit:?}"))
                .on(address)
                .hint("the device may need a power cycle"));
        }
        // No event tells when a device has come back: the specification has software ask (section 2.3.1, RRS).
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn config_failure(action: &str, address: Sbdf, error: &std::io::Error) -> Failure {
    Failure::new(ErrorCode::Failed, format!("{action} {address}: config access: {error}")).on(address)
}

pub(super) fn run(context: &Context<'_>, record: &mut Record) -> Result<(), Failure> {
    if context.left_the_host(record) {
        return Ok(());
    }
    (context.progress)(&format!("resetting {}", record.address));
    reset_and_verify(context.platform, &context.settings.reset, record.address)
}
