//! `xpci save`, `xpci restore` and `xpci migrate`: xl's commands, between requests to the service.
//!
//! xl runs here, because the service's sandbox does not permit what xl does. So this program may be killed between any two steps, and the
//! service must leave nothing that needs a further step: functions that it took from a guest are reserved for that guest, and a problem
//! is shown as long as the domain that lost them exists.

mod messages;
mod migrate;
mod receive;
mod xl;

use std::ffi::{OsStr, OsString};
use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};

use clap::Args;
use pciback::DomId;

pub use self::migrate::MigrateArguments;
pub(super) use self::xl::block_interrupts;
use self::xl::{xl, xl_anyway};
use crate::client;
use crate::outcome::{ErrorCode, Failure};
use crate::protocol::{DomainName, Request, ReservedFunction, Scope, Success};
use crate::saved::SavedGuest;

/// The arguments of `save`.
#[derive(Debug, Args)]
pub struct SaveArguments {
    /// Leaves the guest running after it was saved; it gets its functions again.
    #[arg(short = 'c')]
    keep_running: bool,
    /// Leaves the guest paused after it was saved; it gets its functions again.
    #[arg(short = 'p', conflicts_with = "keep_running")]
    leave_paused: bool,
    /// The guest, by name or number.
    domain: String,
    /// The checkpoint to write. What the guest had is written to FILE.xpci.
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// The guest's xl.cfg, if it is to be saved with another configuration than it has.
    config: Option<PathBuf>,
}

/// The arguments of `restore`.
#[derive(Debug, Args)]
pub struct RestoreArguments {
    /// Leaves the guest paused.
    #[arg(short = 'p')]
    leave_paused: bool,
    /// The checkpoint, with FILE.xpci beside it; before it, the guest's xl.cfg, if it is to be restored with another configuration than it
    /// was saved with.
    #[arg(value_name = "FILE", required = true, num_args = 1..=2)]
    files: Vec<PathBuf>,
}

/// A command that runs xl.
#[derive(Debug)]
pub enum Moving {
    /// Save a guest.
    Save(SaveArguments),
    /// Restore a guest.
    Restore(RestoreArguments),
    /// Move a guest to another host.
    Migrate(MigrateArguments),
    /// Receive a guest from another host.
    Receive,
}

/// Sends requests to the service, and reports progress.
struct Service<'a> {
    socket: &'a Path,
    progress: &'a mut dyn FnMut(&str),
}

impl Service<'_> {
    fn ask(&mut self, request: Request) -> Result<Success, Failure> {
        let envelope = client::call(self.socket, request.into(), self.progress)?;
        match (envelope.result, envelope.error) {
            (Some(success), _) => Ok(success),
            (None, error) => Err(error.unwrap_or_else(|| unexpected("nothing"))),
        }
    }
}

fn unexpected(what: &str) -> Failure {
    Failure::new(ErrorCode::Failed, format!("xpcid answered with {what}"))
        .hint("xpci and xpcid must be of the same version")
}

fn failed(text: String) -> Failure {
    Failure::new(ErrorCode::Failed, text)
}

fn changed(message: String, warnings: Vec<String>) -> Success {
    Success::Changed { message, warnings, functions: Vec::new() }
}

impl Moving {
    /// The command's name in the envelope.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Save(_) => "save",
            Self::Restore(_) => "restore",
            Self::Migrate(_) => "migrate",
            Self::Receive => "migrate-receive",
        }
    }

    /// Runs the command.
    ///
    /// # Errors
    /// A failure of the service, of a file, or of xl. The guest is then restored to its earlier state.
    pub fn run(self, socket: &Path, progress: &mut dyn FnMut(&str)) -> Result<Success, Failure> {
        let mut service = Service { socket, progress };
        match self {
            Self::Save(arguments) => save(&arguments, &mut service),
            Self::Restore(arguments) => restore(&arguments, &mut service),
            Self::Migrate(arguments) => migrate::migrate(&arguments, &mut service),
            Self::Receive => receive::receive(&mut service),
        }
    }
}

fn save(arguments: &SaveArguments, service: &mut Service<'_>) -> Result<Success, Failure> {
    let file = &arguments.file;
    refuse_unwritable(file)?;
    let (domain, guest) = match service.ask(Request::Save { domain: DomainName(arguments.domain.clone()) })? {
        Success::Saved { domain, guest } => (domain, guest),
        _ => return Err(unexpected("something else")),
    };
    let number = OsString::from(domain.to_string());
    let mut words = vec![OsStr::new("save")];
    words.extend(arguments.keep_running.then_some(OsStr::new("-c")));
    words.extend(arguments.leave_paused.then_some(OsStr::new("-p")));
    words.extend([number.as_os_str(), file.as_os_str()]);
    words.extend(arguments.config.as_ref().map(|config| config.as_os_str()));
    // Before the checkpoint, so that no checkpoint exists without this file.
    if let Err(failure) = guest.write(file).and_then(|()| xl(&words)) {
        let left = SavedGuest::remove(file).err().map(|failure| failure.message);
        let back = give_back(domain, &guest, service);
        let text = [Some(failure.message), left, back.as_ref().err().map(ToString::to_string)];
        let text = text.into_iter().flatten().collect::<Vec<_>>().join("; ");
        let hint = match (back.is_ok(), guest.functions.is_empty()) {
            (false, _) => "see 'xpci status', which shows how the guest gets its functions again".to_owned(),
            (true, true) => format!("the guest was not saved; {} cannot be used", file.display()),
            (true, false) => {
                format!(
                    "the guest was not saved, and has its functions again; {} cannot be used",
                    file.display()
                )
            }
        };
        return Err(failed(text).of(domain).hint(hint));
    }
    let count = guest.functions.len();
    let mut message = format!("{} is saved in {}", guest.called(), file.display());
    if count > 0 {
        message.push_str(&format!(
            ", with {}, noted in {}",
            functions(count),
            SavedGuest::path(file).display()
        ));
    }
    if arguments.keep_running || arguments.leave_paused {
        give_back(domain, &guest, service)?;
        return Ok(changed(format!("{message}; the guest has its functions again"), Vec::new()));
    }
    Ok(changed(message, Vec::new()))
}

fn functions(count: usize) -> String {
    match count {
        1 => "1 function".to_owned(),
        more => format!("{more} functions"),
    }
}

/// Refuses an unwritable checkpoint, while the guest still has its functions.
fn refuse_unwritable(file: &Path) -> Result<(), Failure> {
    let existed = file.try_exists().unwrap_or(false);
    let opened = OpenOptions::new().append(true).create(true).open(file);
    let opened = opened.and_then(|_| if existed { Ok(()) } else { fs::remove_file(file) });
    opened.map_err(|error| Failure::refused(format!("cannot write {}: {error}", file.display())))
}

/// Attaches the functions again, with the same device numbers, to a guest that was not saved or that continues to run.
fn give_back(domain: DomId, guest: &SavedGuest, service: &mut Service<'_>) -> Result<(), Failure> {
    let mut failed = None;
    for function in &guest.functions {
        let attach = Request::PciAttach {
            domain: DomainName(domain.to_string()),
            address: function.device.address,
            slot: Some(function.slot),
            persist: false,
            managed: false,
            trust_former_owner: true,
            dry_run: false,
        };
        if let Err(failure) = service.ask(attach) {
            failed = Some(failure);
        }
    }
    failed.map_or(Ok(()), Err)
}

fn restore(arguments: &RestoreArguments, service: &mut Service<'_>) -> Result<Success, Failure> {
    let Some((file, config)) = arguments.files.split_last() else {
        return Err(Failure::new(ErrorCode::Usage, "a checkpoint is missing"));
    };
    let guest = SavedGuest::read(file)?;
    let uuid = guest.guest;
    let reserved = match service.ask(Request::Restore { guest: guest.clone() })? {
        Success::Reserved { functions, .. } => functions,
        _ => return Err(unexpected("something else")),
    };
    let mut words = vec![OsStr::new("restore"), OsStr::new("-p")];
    words.extend(config.iter().map(|config| config.as_os_str()));
    words.push(file.as_os_str());
    if let Err(failure) = xl(&words) {
        forget(&guest, &reserved, service);
        let hint = format!("{} is unchanged: the guest can be restored from it", file.display());
        return Err(failure.hint(hint));
    }
    let restored = service.ask(Request::Restored { guest: uuid, functions: reserved.clone() });
    let (domain, warnings) = match restored {
        Ok(Success::Restored { domain, warnings }) => (domain, warnings),
        Ok(_) => return Err(unexpected("something else")),
        Err(failure) => return Err(end(&guest, &reserved, file, failure, service)),
    };
    let number = OsString::from(domain.to_string());
    let mut message = format!("{} is restored, as domain {domain}", guest.called());
    if !reserved.is_empty() {
        let has = |one: &ReservedFunction| format!("{} as device {:x}", one.address, one.slot);
        let has: Vec<String> = reserved.iter().map(has).collect();
        message.push_str(&format!(", with {}", has.join(", ")));
    }
    if arguments.leave_paused {
        return Ok(changed(format!("{message}; it is paused"), warnings));
    }
    xl(&[OsStr::new("unpause"), &number]).map_err(|failure| {
        failure
            .of(domain)
            .hint(format!("the guest is restored and has its functions; 'xl unpause {domain}' lets it run"))
    })?;
    // The warnings are not shown: they say that the guest, which was paused then, has not connected.
    Ok(changed(message, Vec::new()))
}

/// Destroys a restored guest that cannot have its functions, before it runs; its checkpoint is unchanged.
fn end(
    guest: &SavedGuest,
    reserved: &[ReservedFunction],
    file: &Path,
    failure: Failure,
    service: &mut Service<'_>,
) -> Failure {
    let shown = file.display();
    let Some(domain) = failure.domain else {
        let hint = format!(
            "the restored guest is paused: destroy it ('xl list' shows it) and restore {shown} again"
        );
        return failure.hint(hint);
    };
    let number = OsString::from(domain.to_string());
    take_back(domain, reserved, service);
    if let Err(second) = xl_anyway(&[OsStr::new("destroy"), &number]) {
        let message = format!("{}; {}", failure.message, second.message);
        let hint = format!("the restored guest is paused: 'xl destroy {domain}', then restore {shown} again");
        return Failure { message, ..failure }.hint(hint);
    }
    forget(guest, reserved, service);
    let message = format!("{failure}; the restored guest was ended before it ran");
    failed(message).of(domain).hint(format!(
        "{shown} is unchanged: 'xpci restore' restores the guest when that is corrected, 'xl restore {shown}' without functions"
    ))
}

/// Takes the functions from a restored guest that is to be destroyed before it runs: they are held then, and can be given back.
fn take_back(domain: DomId, reserved: &[ReservedFunction], service: &mut Service<'_>) {
    for ReservedFunction { address, .. } in reserved {
        let domain = DomainName(domain.to_string());
        let detach = Request::PciDetach { domain, address: *address, force: true, scope: Scope::Live };
        match service.ask(detach) {
            Err(failure) if failure.code != ErrorCode::NotFound => {
                (service.progress)(&format!("take {address} back: {failure}"));
            }
            // It may not have got this one.
            _ => {}
        }
    }
}

/// Removes the reservations of a guest that was not restored, except those made when it was saved.
fn forget(guest: &SavedGuest, reserved: &[ReservedFunction], service: &mut Service<'_>) {
    for request in reserved.iter().rev().flat_map(|function| function.undoing(guest.guest)) {
        if let Err(failure) = service.ask(request) {
            (service.progress)(&format!("undo what was reserved: {failure}"));
        }
    }
}
