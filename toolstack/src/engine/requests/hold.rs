//! Plans of holding functions, giving them back to dom0, and clearing a quarantine.

use pciback::platform::{HostFunction, Platform};
use pciback::policy::Reuse;
use pciback::{FunctionState, Sbdf};

use super::obstacles::{InUse, Refusal, ThreadChecks, reuse_with};
use super::{Plan, dry_run_answer};
use crate::engine::Engine;
use crate::engine::tasks::Course;
use crate::journal::Record;
use crate::outcome::Failure;
use crate::protocol::Success;
use crate::reply::Reply;
use crate::reservations::Change;
use crate::spec::existing;
use crate::transaction::{Kind, guest_owned, holder_of, refuse_in_use};

/// Whether a function goes back to dom0 that a guest has persistently.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::engine) enum Reserved {
    /// It is refused.
    Refused,
    /// The reservation ends (`--force`).
    Ended,
}

/// A requested hold.
#[derive(Debug, Clone, Copy)]
pub(super) struct Hold {
    pub address: Sbdf,
    /// Take it even while something in dom0 uses it.
    pub force: bool,
    /// Hold it again whenever it appears.
    pub persist: bool,
    /// Whether it goes back to dom0 when the guest has released it for which it is held.
    pub managed: bool,
    /// Only report what would be done.
    pub dry_run: bool,
}

impl Engine {
    /// Makes a function assignable.
    pub(super) fn hold(&mut self, wanted: Hold, reply: Reply) {
        let plan = self.plan_hold(wanted);
        if matches!(plan, Ok(Plan::Answer(_))) && !wanted.managed && !wanted.dry_run {
            self.keep_held(wanted.address);
        }
        match wanted.persist && !wanted.dry_run {
            true => self.hold_persistently(wanted.address, plan, reply),
            false => self.carry_out(plan, reply),
        }
    }

    fn plan_hold(&self, wanted: Hold) -> Result<Plan, Failure> {
        let Hold { address, force, managed, dry_run, .. } = wanted;
        let function = existing(self.platform.host.as_ref(), address)?;
        self.functions.idle(address)?;
        let record = self.functions.records().get_or_new(address);
        match record.state {
            FunctionState::Held => {
                return Ok(Plan::Answer(Success::Already {
                    message: format!("{address} is assignable already"),
                }));
            }
            FunctionState::Host => {}
            other => return Err(not_in_state(&record, other, "made assignable")),
        }
        let message = format!("{address} is assignable");
        let found = holdable(&self.platform, &function);
        if dry_run || !found.is_empty() {
            let hold = (!function.is_bridge()).then_some(InUse::by_force(force));
            let refusal = Refusal { address, action: format!("make {address} assignable"), found };
            return Ok(Plan::Check(refusal, ThreadChecks { hold, shares: None }, dry_run_answer(&message)));
        }
        let course = if force { Course::ForceHold } else { Course::Forward(Kind::Hold) };
        Ok(Plan::Transaction(course, Box::new(Record { managed, ..record }), message.into(), None))
    }

    /// Gives a function back to dom0, or forgets one that left the host.
    pub(super) fn release(&mut self, address: Sbdf, force: bool, trust_former_owner: bool, reply: Reply) {
        let reserved = if force { Reserved::Ended } else { Reserved::Refused };
        let plan = self.forget_gone(address);
        let plan =
            plan.unwrap_or_else(|| self.plan_release(address, reserved, reuse_with(trust_former_owner)));
        self.carry_out(plan, reply);
    }

    /// Deletes the record of a function that left the host, where a release has nothing to do.
    fn forget_gone(&mut self, address: Sbdf) -> Option<Result<Plan, Failure>> {
        if self.functions.records().state(address) != FunctionState::Gone || self.functions.is_busy(address) {
            return None;
        }
        if let Err(failure) = self.forget(address) {
            return Some(Err(failure));
        }
        let message = format!("{address} left the host; its record is deleted");
        Some(Ok(Plan::Answer(Success::Changed { message, warnings: Vec::new(), functions: Vec::new() })))
    }

    pub(in crate::engine) fn plan_release(
        &mut self,
        address: Sbdf,
        reserved: Reserved,
        reuse: Reuse,
    ) -> Result<Plan, Failure> {
        self.functions.idle(address)?;
        let record = self.functions.records().get_or_new(address);
        match record.state {
            FunctionState::Host => {
                existing(self.platform.host.as_ref(), address)?;
                Ok(Plan::Answer(Success::Already { message: format!("{address} belongs to dom0 already") }))
            }
            FunctionState::Held => {
                self.has_no_vfs(address)?;
                if reserved == Reserved::Refused {
                    self.persistent_context().may_be_released(address)?;
                }
                self.out_of_reach(address, None, &format!("give {address} back to dom0"), reuse)?;
                let driver = record.original_driver.as_deref().unwrap_or("no driver").to_owned();
                let message = format!("{address} belongs to dom0 again, with {driver}");
                Ok(self.release_of(record, message))
            }
            other => Err(not_in_state(&record, other, "given back to dom0")),
        }
    }

    /// Plans to give a function back to dom0; its reservation and its persistent settings end with that.
    fn release_of(&mut self, record: Record, mut message: String) -> Plan {
        let reservation = self.reservation_ends(record.address);
        if let Some(reservation) = &reservation {
            message.push_str(&format!("; it is no longer persistent for {}", reservation.who()));
        }
        let function = self.platform.host.function(record.address).ok();
        let device = function.and_then(|function| self.devices.known(&function).ok());
        if device.is_some_and(|device| self.files.persistent_settings.of_device(&device).is_some()) {
            message.push_str("; its persistent settings are deleted");
        }
        let change = reservation.map(|reservation| Change::Forget(reservation.address));
        Plan::Transaction(Course::GiveBack, Box::new(record), message.into(), change)
    }

    /// Refuses to take a PF with VFs from the driver that alone can remove them.
    fn has_no_vfs(&self, address: Sbdf) -> Result<(), Failure> {
        match self.platform.host.function(address).map_or(0, |function| function.num_vfs) {
            0 => Ok(()),
            vfs => Err(Failure::refused(format!("{address} has {vfs} VFs, which a guest has created"))
                .on(address)
                .hint(format!("detach and release them, then 'xpci vf destroy {address}'"))),
        }
    }

    pub(super) fn clear_quarantine(&mut self, address: Sbdf, reuse: Reuse, reply: Reply) {
        let record = self.functions.records().get_or_new(address);
        if let Err(failure) = self.functions.idle(address) {
            return reply.done(Err(failure));
        }
        if record.state == FunctionState::Host
            && let Err(failure) = existing(self.platform.host.as_ref(), address)
        {
            return reply.done(Err(failure));
        }
        if record.state != FunctionState::Quarantined {
            let message = format!("{address} is not quarantined; its state is '{}'", record.state);
            return reply.done(Ok(Success::Already { message }));
        }
        // A driver of dom0 may have bound to it since.
        if record.guest.is_none()
            && let Err(failure) = refuse_in_use(self.platform.host.as_ref(), address)
        {
            return reply.done(Err(failure));
        }
        // The guest from which the function was taken is a former owner as any other. A guest that still has it loses it in this
        // transaction.
        if existing(self.platform.host.as_ref(), address).is_ok()
            && let Err(failure) =
                self.out_of_reach(address, None, &format!("clear the quarantine of {address}"), reuse)
        {
            return reply.done(Err(failure));
        }
        self.start(Course::Clear, record, Some(reply), move |record| {
            format!("{address} is {} again", record.state)
        });
    }
}

/// Obstacles to holding a function that `--force` does not override.
pub(in crate::engine) fn holdable(platform: &Platform, function: &HostFunction) -> Vec<Failure> {
    let address = function.address;
    if function.is_bridge() {
        let text = format!("{address} is a bridge; bridges stay with the host");
        return vec![Failure::refused(text).on(address)];
    }
    let mut found = Vec::new();
    if function.num_vfs > 0 {
        let enabled = format!("{address} is a PF with {} VFs enabled", function.num_vfs);
        let hint = "its driver must stay while it has VFs; 'xpci vf destroy' disables them";
        found.push(Failure::refused(enabled).on(address).hint(hint));
    }
    // Checked before the driver is touched: the undo of a failed hold would take the function from a guest of xl.
    if holder_of(function).is_some() && matches!(platform.hypervisor.assignable(address), Ok(false)) {
        found.push(guest_owned(platform, address));
    }
    found
}

pub(in crate::engine) fn not_in_state(record: &Record, state: FunctionState, wanted: &str) -> Failure {
    let address = record.address;
    let text = match (state, record.guest) {
        (FunctionState::Attached, Some(guest)) if wanted == "attached" => {
            format!("{address} is attached to domain {} already", guest.domain)
        }
        (FunctionState::Attached, Some(guest)) => {
            format!("{address} is attached to domain {}; it cannot be {wanted} meanwhile", guest.domain)
        }
        (_, Some(guest)) => {
            format!("{address} is {state} (domain {}); it cannot be {wanted} now", guest.domain)
        }
        (_, None) => format!("{address} is {state}; it cannot be {wanted} now"),
    };
    let failure = Failure::refused(text);
    let hint = match (state, record.guest) {
        (FunctionState::Attached, Some(guest)) => {
            format!("detach it first: 'xpci pci-detach {} {address}'", guest.domain)
        }
        (FunctionState::Quarantined, _) => {
            format!("see why in 'xpci status', then 'xpci quarantine clear {address}'")
        }
        (FunctionState::Gone, _) => {
            format!("it left the host; 'xpci pci-assignable-remove {address}' forgets it")
        }
        _ => "try again when that has ended".to_owned(),
    };
    failure.on(record.address).hint(hint)
}
