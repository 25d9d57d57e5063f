//! Restores registers to the values that they had when the function was first held, so that the next owner does not find those of the
//! last one.
//!
//! Linux saves most control registers before a reset and restores them afterwards, including values that a guest wrote. So the control
//! registers of all known capabilities are noted when a function is first held. Those bits that a guest could reach are restored and
//! verified whenever the function gets another owner. The enable bit of the expansion ROM, which is off while a guest has the function, is one
//! of them.

use log::{info, warn};
use pciback::Sbdf;
use pciback::config::{Access, ConfigSpace, ControlRegister, Filter, FunctionSpec, Policy};
use pciback::live::errors as registers;
use pciback::spec::header;

use super::Context;
use super::reset::config_failure;
use crate::journal::{Pristine, Record};
use crate::outcome::{ErrorCode, Failure};
use crate::spec::function_spec;

/// Enable of the expansion ROM.
const ROM: ControlRegister = ControlRegister {
    access: Access::fixed::<{ header::ROM }, 4>(),
    name: "Expansion ROM Enable",
    mask: header::ROM_ENABLE,
    zero: 0,
};

/// The built-in filter: it tells registers that store what is written from others.
fn built_in(spec: &FunctionSpec) -> Result<Filter, Failure> {
    let address = spec.address;
    Filter::compile(spec, &Policy::default()).map_err(|error| {
        Failure::new(ErrorCode::Failed, format!("determine the registers of {address}: {error}")).on(address)
    })
}

/// Notes the registers of a function that is held for the first time. If they cannot be read now, they are noted before an attachment.
pub(super) fn take(context: &Context<'_>, record: &mut Record) {
    if record.pristine.is_some() {
        return;
    }
    let spec = function_spec(context.platform.host.as_ref(), record.address);
    match spec.and_then(|spec| read(context, &spec)) {
        Ok(pristine) => record.pristine = Some(pristine),
        Err(failure) => warn!("{}: its registers are not noted yet: {failure}", record.address),
    }
}

fn read(context: &Context<'_>, spec: &FunctionSpec) -> Result<Vec<Pristine>, Failure> {
    let (address, filter) = (spec.address, built_in(spec)?);
    let config = context.platform.host.config(address)?;
    let note = |control: ControlRegister| {
        let value = config.read(control.access)? & control.mask;
        let (offset, width) = (control.access.offset(), control.access.width().bytes() as u8);
        Ok(Pristine { offset, width, mask: control.mask, value, reached: 0 })
    };
    let noted: std::io::Result<_> = controls(&filter, spec).into_iter().map(note).collect();
    noted.map_err(|error| config_failure("note the registers of", address, &error))
}

/// The registers that the service restores.
fn controls(filter: &Filter, spec: &FunctionSpec) -> Vec<ControlRegister> {
    let mut controls = filter.controls();
    if spec.resources[6].exists() && !spec.is_virtual() {
        controls.push(ROM);
    }
    controls
}

/// Before a function that was reset is given to a guest: notes the registers if that was not done yet, restores what an earlier guest may
/// have changed, and notes what the next one can reach.
pub(super) fn prepare(context: &Context<'_>, record: &mut Record) -> Result<Option<String>, Failure> {
    let spec = function_spec(context.platform.host.as_ref(), record.address)?;
    if record.pristine.is_none() {
        record.pristine = Some(read(context, &spec)?);
    }
    let warning = put_back(context, record, &spec)?;
    note_reach(context, record, &spec)?;
    // Written to the journal before the guest can write to the function.
    context.write(record)?;
    Ok(warning)
}

/// Adds the bits that the guest's filter passes to hardware, by the current policies, and those that the service changes while a guest
/// has the function.
fn note_reach(context: &Context<'_>, record: &mut Record, spec: &FunctionSpec) -> Result<(), Failure> {
    let Some(guest) = record.guest else { return Ok(()) };
    let filter = context.serving.filter(spec, guest.domain)?;
    for register in record.pristine.iter_mut().flatten() {
        if let Ok(access) = Access::new(register.offset.into(), register.width.into()) {
            let changed = if access == ROM.access { header::ROM_ENABLE } else { 0 };
            register.reached |= (filter.reaches(access) | changed) & register.mask;
        }
    }
    Ok(())
}

/// After a guest has had the function and it was reset: restores what the guest could reach.
pub(super) fn restore(context: &Context<'_>, record: &mut Record) -> Result<Option<String>, Failure> {
    if context.left_the_host(record) || record.pristine.is_none() {
        return Ok(None);
    }
    if record.guest.is_none() && !is_reached(record) {
        return Ok(None);
    }
    let spec = function_spec(context.platform.host.as_ref(), record.address)?;
    note_reach(context, record, &spec)?;
    put_back(context, record, &spec)
}

fn is_reached(record: &Record) -> bool {
    record.pristine.iter().flatten().any(|register| register.reached != 0)
}

fn put_back(
    context: &Context<'_>,
    record: &mut Record,
    spec: &FunctionSpec,
) -> Result<Option<String>, Failure> {
    if !is_reached(record) {
        return Ok(None);
    }
    let (address, filter) = (record.address, built_in(spec)?);
    let config = context.platform.host.config(address)?;
    let controls = controls(&filter, spec);
    let (mut kept_out, mut reported) = (Vec::new(), Vec::new());
    for register in record.pristine.iter_mut().flatten().filter(|register| register.reached != 0) {
        let control = controls.iter().find(|control| {
            let (offset, width) = (control.access.offset(), control.access.width().bytes());
            (offset, width) == (register.offset, u16::from(register.width))
        });
        // Its capability is no longer there, so that no guest can reach it either.
        let Some(control) = control else { continue };
        let left = put(config.as_ref(), control, register)
            .map_err(|error| config_failure("restore the registers of", address, &error))?;
        if left == 0 {
            register.reached = 0;
            continue;
        }
        let text = format!("{} at {:#x}, bits {left:#x}", control.name, register.offset);
        // All hardware stores the bits that the built-in rules open to guests; bits that only a policy opens may be device specific.
        match left & filter.reaches(control.access) {
            0 => reported.push(text),
            _ => kept_out.push(text),
        }
    }
    clear_errors(context, address);
    if !kept_out.is_empty() {
        let text = format!(
            "restore the registers of {address} as they were when it was first held: {} did not take the value",
            kept_out.join("; ")
        );
        return Err(Failure::new(ErrorCode::Failed, text)
            .on(address)
            .hint(format!("the device may need a power cycle; then 'xpci quarantine clear {address}'")));
    }
    Ok((!reported.is_empty()).then(|| {
        format!(
            "{address}: values that the previous owner wrote remain for the next one: {}",
            reported.join("; ")
        )
    }))
}

/// Restores one register and reads it back; returns the bits that still differ.
fn put(config: &dyn ConfigSpace, control: &ControlRegister, register: &Pristine) -> std::io::Result<u32> {
    let mask = register.reached & register.mask & control.mask;
    let found = config.read(control.access)?;
    if (found ^ register.value) & mask == 0 {
        return Ok(0);
    }
    let value = found & !control.zero & !mask | register.value & mask;
    info!("{} at {:#x}: {found:#x} is restored to {value:#x}", control.name, register.offset);
    config.write(control.access, value)?;
    Ok((config.read(control.access)? ^ register.value) & mask)
}

/// Clears errors of the last owner, unless the platform firmware handles errors.
fn clear_errors(context: &Context<'_>, address: Sbdf) {
    let (host, errors) = (context.platform.host.as_ref(), &context.platform.errors);
    let root = host.ports_above(address).ok().and_then(|ports| ports.last().copied());
    if !root.is_some_and(|root| errors.handled(root).unwrap_or(false)) {
        return;
    }
    let found = registers::of_errors(host, address, None);
    if let Err(error) = registers::clear_errors(host, address, None, &found) {
        warn!("{address}: clear its error registers: {error}");
    }
}
