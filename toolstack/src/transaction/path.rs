//! The path of an assigned function, from the root port to the function: errors are reported, do not escalate, and do not crash the host.
//!
//! `pciback::containment` has the settings and their reasons. A port is set once for all assigned functions below it, and its earlier
//! values are restored when the last of them is detached.

use std::io;

use log::{info, warn};
use pciback::Sbdf;
use pciback::config::{Access, ConfigSpace};
use pciback::containment::radius::{Bridge, Radius, is_bridge};
use pciback::containment::{Role, Setting, role, settings};
use pciback::live::errors::put;
use pciback::platform::{HostFunction, Platform};
use pciback::spec::header;

use super::{Context, sharing};
use crate::journal::Record;
use crate::ledger::{Before, Entry, Ledger};
use crate::outcome::{ErrorCode, Failure};

/// A function on the path: a port above, the PF, or the function itself.
#[derive(Debug)]
pub struct Member {
    /// From sysfs.
    pub function: HostFunction,
    /// Its role on the path.
    pub role: Role,
    /// Its config space.
    pub bytes: Vec<u8>,
}

/// The path of a function.
#[derive(Debug)]
pub struct FunctionPath {
    /// From the root port down to the function itself.
    pub members: Vec<Member>,
    /// The root port, and whether the kernel handles the errors that arrive there; `None` where there is none.
    pub root_port: Option<(Sbdf, bool)>,
}

impl FunctionPath {
    /// Reads all functions on the path.
    pub fn of(platform: &Platform, address: Sbdf) -> Result<Self, Failure> {
        let host = platform.host.as_ref();
        let mut addresses = host.ports_above(address)?;
        let root_port = match addresses.last() {
            Some(root) => Some((*root, platform.errors.handled(*root)?)),
            None => None,
        };
        addresses.reverse();
        addresses.extend(host.function(address)?.physical_function);
        addresses.push(address);
        let member = |address: Sbdf| {
            let function = host.function(address)?;
            let bytes =
                host.config(address)?.read_all().map_err(|error| access_failure("read", address, &error))?;
            let role = role(&bytes, function.physical_function.is_some());
            Ok(Member { function, role, bytes })
        };
        Ok(Self { members: addresses.into_iter().map(member).collect::<Result<_, Failure>>()?, root_port })
    }

    /// Whether the kernel controls AER. Without a root port it counts as not controlled.
    pub fn os_owns_aer(&self) -> bool {
        self.root_port.is_some_and(|(_, handled)| handled)
    }

    /// The bridges above, the nearest first.
    pub(super) fn bridges(&self) -> Vec<Bridge> {
        let bridges = self.members.iter().filter(|member| is_bridge(&member.bytes));
        bridges.rev().map(|member| Bridge::read(member.function.address, &member.bytes)).collect()
    }
}

impl Member {
    /// The registers to be set in it.
    pub fn settings(&self, os_owns_aer: bool) -> Vec<Setting> {
        settings(&self.bytes, self.role, os_owns_aer)
    }
}

/// The value of a register, in the bytes that were read from config space.
pub fn value_in(bytes: &[u8], access: Access) -> u32 {
    let range = usize::from(access.offset())..usize::from(access.offset() + access.width().bytes());
    let bytes = bytes.get(range).unwrap_or_default();
    bytes.iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte))
}

/// The functions that a failure of this one affects.
pub fn blast_radius(platform: &Platform, path: &FunctionPath) -> Result<Radius, Failure> {
    let host = platform.host.as_ref();
    let bridges = path.bridges();
    let Some(member) = path.members.last() else {
        return Err(Failure::new(ErrorCode::Failed, "a path without a function"));
    };
    // A function that leaves meanwhile is not affected.
    let others: Vec<HostFunction> =
        host.functions()?.into_iter().filter_map(|address| host.function(address).ok()).collect();
    let pin = member.bytes.get(usize::from(header::INTERRUPT_PIN)).is_some_and(|pin| *pin != 0);
    Ok(Radius::of(&member.function, pin && member.role != Role::Virtual, &bridges, &others))
}

pub(super) fn apply(context: &Context<'_>, record: &Record) -> Result<Option<String>, Failure> {
    let address = record.address;
    (context.progress)(&format!("setting error reporting on the path of {address}"));
    let _alone = context.ledger.lock();
    let path = FunctionPath::of(context.platform, address)?;
    sharing::refuse(context, record, &path)?;
    for member in &path.members {
        set(context, member, address, path.os_owns_aer())?;
    }
    let unhandled = path.root_port.filter(|(_, handled)| !handled);
    Ok(unhandled.map(|(root_port, _)| not_handled(root_port)))
}

/// Sets the registers in the function itself again, because a reset clears those that Linux does not restore.
pub fn renew(platform: &Platform, ledger: &Ledger, address: Sbdf) -> Result<(), Failure> {
    let _alone = ledger.lock();
    let Some(entry) = ledger.entry(address)? else { return Ok(()) };
    let config = platform.host.config(address)?;
    let bytes = config.read_all().map_err(|error| access_failure("read", address, &error))?;
    let known = |setting: &&Setting| entry.before.iter().any(|before| before.is_of(setting));
    settings(&bytes, entry.role, true)
        .iter()
        .filter(known)
        .try_for_each(|setting| enforce(config.as_ref(), setting, address))
}

/// The warning for a root port whose errors the kernel does not handle.
pub fn not_handled(root_port: Sbdf) -> String {
    format!(
        "the firmware does not grant Linux control of AER at {root_port}: error reporting is not changed, and xpci detects no errors below"
    )
}

/// Sets the registers of one function on the path, for `user`.
fn set(context: &Context<'_>, member: &Member, user: Sbdf, os_owns_aer: bool) -> Result<(), Failure> {
    let address = member.function.address;
    let settings = member.settings(os_owns_aer);
    if settings.is_empty() {
        return Ok(());
    }
    let known = context.ledger.entry(address)?;
    // An entry of another device that had this address does not count, because its register values left with it.
    let known = known.filter(|entry| entry.incarnation == member.function.incarnation);
    let mut entry = known
        .clone()
        .unwrap_or_else(|| context.ledger.begin(address, member.function.incarnation, member.role));
    for setting in &settings {
        if !entry.before.iter().any(|before| before.is_of(setting)) {
            entry.before.push(Before::of(setting, value_in(&member.bytes, setting.access)));
        }
    }
    entry.users.insert(user);
    if known.as_ref() != Some(&entry) {
        context.ledger.write(&entry)?;
    }
    let config = context.platform.host.config(address)?;
    settings.iter().try_for_each(|setting| enforce(config.as_ref(), setting, address))
}

/// Sets a register to its wanted value.
fn enforce(config: &dyn ConfigSpace, setting: &Setting, address: Sbdf) -> Result<(), Failure> {
    let left = put(config, setting, setting.row.wanted)
        .map_err(|error| access_failure(&format!("set {} of", setting.row.name), address, &error))?;
    if left == 0 {
        return Ok(());
    }
    let text = format!(
        "set {} of {address}: bits {left:#x} do not become {:#x}",
        setting.row.name,
        setting.row.wanted & left
    );
    if setting.row.must_hold {
        return Err(Failure::new(ErrorCode::Failed, text).on(address).hint(setting.row.reason));
    }
    info!("{text}; they may be hardwired");
    Ok(())
}

/// Removes the function as a user of all entries, and restores those without another user. The entries are searched, not the path,
/// because the ports may have been removed together with the function.
pub(super) fn restore(context: &Context<'_>, record: &Record) -> Result<(), Failure> {
    let user = record.address;
    let _alone = context.ledger.lock();
    let entries = context.ledger.entries()?;
    let mut entries: Vec<Entry> = entries.into_iter().filter(|entry| entry.users.contains(&user)).collect();
    // From the function upwards, so that error messages stop before the ports that route them change.
    entries.sort_by_key(|entry| match entry.role {
        Role::Virtual | Role::Physical => 0,
        Role::Port => 1,
        Role::RootPort => 2,
    });
    let mut outcome = Ok(());
    for mut entry in entries {
        entry.users.remove(&user);
        let restored = match entry.users.is_empty() {
            true => put_back(context, &entry),
            false => Ok(()),
        };
        // An entry that could not be restored is kept for the next attempt.
        let written = restored.and_then(|()| Ok(context.ledger.write(&entry)?));
        outcome = outcome.and(written);
    }
    outcome
}

fn put_back(context: &Context<'_>, entry: &Entry) -> Result<(), Failure> {
    let address = entry.address;
    let host = context.platform.host.as_ref();
    match host.function(address) {
        Ok(function) if function.incarnation == entry.incarnation => {}
        Err(error) if error.errno() != Some(nix::errno::Errno::ENOENT) => return Err(error.into()),
        // The device was removed, and its register values with it.
        _ => return Ok(()),
    }
    let config = host.config(address)?;
    let bytes = config.read_all().map_err(|error| access_failure("read", address, &error))?;
    if bytes.iter().all(|byte| *byte == 0xff) {
        warn!("{address}: it answers all ones; its earlier register values cannot be restored");
        return Ok(());
    }
    let settings = settings(&bytes, entry.role, true);
    let mut outcome = Ok(());
    for before in entry.before.iter().rev() {
        let Some(setting) = settings.iter().find(|setting| before.is_of(setting)) else { continue };
        let left = put(config.as_ref(), setting, before.value).and_then(|left| match left {
            0 => Ok(()),
            left => Err(io::Error::other(format!("bits {left:#x} do not become {:#x}", before.value & left))),
        });
        let action = format!("restore {} of", setting.row.name);
        outcome = outcome.and(left.map_err(|error| access_failure(&action, address, &error)));
    }
    outcome
}

impl Before {
    fn of(setting: &Setting, value: u32) -> Self {
        let mask = setting.row.mask;
        let width = setting.row.width;
        Self { offset: setting.access.offset(), width, mask, value: value & mask }
    }

    /// Whether it is the value of this register.
    pub fn is_of(&self, setting: &Setting) -> bool {
        (self.offset, self.width) == (setting.access.offset(), setting.row.width)
    }
}

/// The value of a register before it was set.
pub fn before(ledger: &Ledger, address: Sbdf, setting: &Setting) -> Option<u32> {
    let entry = ledger.entry(address).ok()??;
    entry.before.iter().find(|before| before.is_of(setting)).map(|before| before.value)
}

fn access_failure(action: &str, address: Sbdf, error: &io::Error) -> Failure {
    Failure::new(ErrorCode::Failed, format!("{action} {address}: config access: {error}")).on(address)
}
