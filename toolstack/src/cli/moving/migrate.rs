//! `xpci migrate`: the part of a move on the host that the guest leaves.
//!
//! Until the service has noted that the guest is handed over, every failure gives the guest back what it had, and lets it run on. From then on
//! it never runs here again. If it is unknown whether that is noted, the guest stays paused on both hosts.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, BufReader, Read, Write};
use std::process::{self, Child, ChildStdin, ChildStdout, Command, Stdio};

use clap::Args;
use pciback::{DomId, Sbdf};

use super::messages::{self, Order, PART_LIMIT, Report, send};
use super::receive::STANDARD_INPUT;
use super::xl::{Xl, fail_if_interrupted, xl_anyway};
use super::{Service, changed, failed, functions, give_back, unexpected};
use crate::outcome::{ErrorCode, Failure};
use crate::protocol::{DomainName, Request, Side, Success};
use crate::saved::SavedGuest;

/// The suffix of a name while the guest may have it on the other host, as with xl.
const AWAY: &str = "--migratedaway";

/// The arguments of `migrate`.
#[derive(Debug, Args)]
pub struct MigrateArguments {
    /// How the other host is reached: 'SSHCOMMAND HOST xpci migrate-receive' is run by a shell. If empty, HOST itself is run instead.
    #[arg(short = 's', value_name = "SSHCOMMAND", default_value = "ssh")]
    ssh: String,
    /// The guest, by name or number.
    domain: String,
    /// The other host, which has xpci too; with -s '', a command that runs 'xpci migrate-receive'.
    #[arg(value_name = "HOST")]
    host: String,
}

/// The other host.
struct Peer {
    name: String,
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Peer {
    fn connect(arguments: &MigrateArguments) -> Result<Self, Failure> {
        let MigrateArguments { ssh, host, .. } = arguments;
        let mut command = Command::new("sh");
        match ssh.is_empty() {
            true => command.args(["-c", host.as_str()]),
            // The name is no part of the script: the shell does not interpret it.
            false => command.args(["-c", &format!("exec {ssh} \"$0\" xpci migrate-receive"), host.as_str()]),
        };
        // Interrupts stay blocked in it: the connection must not end when the user wants only this program to.
        let started = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut child =
            started.map_err(|error| failed(format!("cannot run a shell to reach {host}: {error}")))?;
        match (child.stdin.take(), child.stdout.take()) {
            (Some(to), Some(from)) => Ok(Self { name: host.clone(), child, to, from: BufReader::new(from) }),
            _ => Err(failed(format!("cannot talk to {host}: it has no pipes"))),
        }
    }

    fn order(&mut self, order: &Order) -> Result<(), Failure> {
        send(&mut self.to, order).map_err(|error| self.ended(&error))
    }

    fn send_part(&mut self, part: &[u8]) -> Result<(), Failure> {
        let bytes = u32::try_from(part.len()).unwrap_or(u32::MAX);
        self.order(&Order::Part { bytes })?;
        self.to.write_all(part).map_err(|error| self.ended(&error))
    }

    /// Why it takes no more: what it says itself, if it does.
    fn ended(&mut self, error: &io::Error) -> Failure {
        match self.hear() {
            Err(failure) => failure,
            Ok(_) => messages::lost(error),
        }
    }

    /// What it reports; its failures are failures of the move.
    fn hear(&mut self) -> Result<Report, Failure> {
        match messages::receive(&mut self.from) {
            Ok(Report::Failed { failure }) => {
                let message = format!("{}: {}", self.name, failure.message);
                // Functions and domains of the other host would be taken for those of this one.
                Err(Failure { message, address: None, domain: None, ..*failure })
            }
            Ok(report) => Ok(report),
            Err(failure) => {
                Err(Failure { message: format!("{}: {}", self.name, failure.message), ..failure })
            }
        }
    }

    fn expect(&mut self, wanted: &Report) -> Result<(), Failure> {
        match self.hear()? {
            report if report == *wanted => Ok(()),
            other => Err(failed(format!("{} reports {other:?} when it should not", self.name))),
        }
    }

    /// Ends the connection, and waits for the other end's last words.
    fn close(self) {
        let Self { mut child, to, from, .. } = self;
        drop((to, from));
        let _ = child.wait();
    }
}

/// The guest that leaves.
struct Departure<'a, 'b> {
    service: &'a mut Service<'b>,
    domain: DomId,
    guest: SavedGuest,
    /// Its name while the other host has the guest's name.
    renamed: bool,
    /// Whether xl has paused it.
    paused: bool,
}

/// Moves a guest to another host.
pub(super) fn migrate(arguments: &MigrateArguments, service: &mut Service<'_>) -> Result<Success, Failure> {
    let host = &arguments.host;
    if host.starts_with('-') || host.is_empty() {
        return Err(Failure::new(ErrorCode::Usage, format!("'{host}' is no host")));
    }
    let ask = Request::Migrate {
        domain: DomainName(arguments.domain.clone()),
        to: host.clone(),
        process: process::id(),
    };
    let (domain, guest) = match service.ask(ask)? {
        Success::Saved { domain, guest } => (domain, guest),
        _ => return Err(unexpected("something else")),
    };
    let mut leaving = Departure { service, domain, guest, renamed: false, paused: false };
    let mut peer = match Peer::connect(arguments) {
        Ok(peer) => peer,
        Err(failure) => return Err(leaving.stays(failure)),
    };
    let outcome = leaving.carry_out(&mut peer);
    peer.close();
    outcome
}

impl Departure<'_, '_> {
    fn carry_out(mut self, peer: &mut Peer) -> Result<Success, Failure> {
        if let Err(failure) = self.ask_for_functions(peer) {
            let _ = peer.order(&Order::Stay);
            return Err(self.stays(failure));
        }
        if let Err(failure) = self.take_functions() {
            let _ = peer.order(&Order::Stay);
            return Err(self.stays(failure));
        }
        let sent = self.send(peer).and_then(|()| peer.expect(&Report::Ready));
        if let Err(failure) = sent.and_then(|()| fail_if_interrupted()) {
            let _ = peer.order(&Order::Stay);
            return Err(self.runs_on(failure));
        }
        match self.service.ask(Request::MigrateHandOver { guest: self.guest.guest }) {
            Ok(_) => self.leave(peer),
            Err(failure) if failure.code == ErrorCode::Unreachable => Err(self.open(&peer.name, failure)),
            Err(failure) => {
                let _ = peer.order(&Order::Stay);
                Err(self.runs_on(failure))
            }
        }
    }

    /// Has the other host reserve functions. The guest has not been touched yet.
    fn ask_for_functions(&mut self, peer: &mut Peer) -> Result<(), Failure> {
        (self.service.progress)(&format!("asking {} for functions", peer.name));
        let from = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let from = Some(from.trim().to_owned()).filter(|from| !from.is_empty());
        let (from, guest) = (from.unwrap_or_else(|| "the other host".to_owned()), self.guest.clone());
        peer.order(&Order::Reserve { version: messages::VERSION, from, guest })?;
        match peer.hear()? {
            Report::Reserved { functions } if functions.len() == self.guest.functions.len() => Ok(()),
            other => Err(failed(format!("{} reports {other:?} when it should not", peer.name))),
        }
    }

    fn take_functions(&mut self) -> Result<(), Failure> {
        fail_if_interrupted()?;
        let guest = match self.service.ask(Request::Save { domain: DomainName(self.domain.to_string()) })? {
            Success::Saved { guest, .. } => guest,
            _ => return Err(unexpected("something else")),
        };
        let places = |guest: &SavedGuest| -> Vec<(Sbdf, _)> {
            guest.functions.iter().map(|one| (one.device.address, one.slot)).collect()
        };
        if places(&guest) == places(&self.guest) {
            return Ok(());
        }
        let back = give_back(self.domain, &guest, self.service);
        let text = "the guest got or lost functions while it was about to move";
        Err(with(failed(text.to_owned()).of(self.domain), back.err()).hint("try again"))
    }

    /// Has xl save the guest, and sends what it writes. The guest is paused then.
    fn send(&mut self, peer: &mut Peer) -> Result<(), Failure> {
        (self.service.progress)(&format!("sending {} to {}", self.guest.called(), peer.name));
        fail_if_interrupted()?;
        let (mut reader, writer) =
            io::pipe().map_err(|error| failed(format!("make a pipe for xl: {error}")))?;
        let number = OsString::from(self.domain.to_string());
        let words = [OsStr::new("save"), OsStr::new("-p"), &number, OsStr::new(STANDARD_INPUT)];
        let xl = Xl::start(&words, Stdio::from(writer))?;
        let mut part = vec![0; PART_LIMIT];
        let mut sent = Ok(());
        let mut is_first = true;
        // xl is always heard to its end, also when the other host takes no more: so it is known to have paused the guest.
        let read = loop {
            match reader.read(&mut part) {
                Ok(0) => break Ok(()),
                Ok(_) if sent.is_err() => {}
                Ok(length) => {
                    // xl has written the name into what it sends, and the other host has not seen it yet, which may be this one.
                    let named = if is_first { self.rename() } else { Ok(()) };
                    sent = named.and_then(|()| peer.send_part(&part[..length]));
                    is_first = false;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => break Err(failed(format!("read what xl saves of the guest: {error}"))),
            }
        };
        drop(reader);
        xl.wait()?;
        self.paused = true;
        read.and(sent)?;
        peer.order(&Order::Complete)
    }

    fn rename(&mut self) -> Result<(), Failure> {
        let Some(name) = &self.guest.name else { return Ok(()) };
        let away = format!("{name}{AWAY}");
        self.renamed = true;
        self.xl(&["rename", &self.domain.to_string(), &away])
    }

    fn xl(&self, words: &[&str]) -> Result<(), Failure> {
        let words: Vec<&OsStr> = words.iter().map(OsStr::new).collect();
        xl_anyway(&words)
    }

    /// Lets the guest run on with what it had.
    fn runs_on(mut self, failure: Failure) -> Failure {
        let number = self.domain.to_string();
        let mut wrong = Vec::new();
        if let Some(name) = self.guest.name.as_ref().filter(|_| self.renamed) {
            wrong.extend(self.xl(&["rename", &number, name]).err());
        }
        if self.paused {
            wrong.extend(self.xl(&["unpause", &number]).err());
        }
        wrong.extend(give_back(self.domain, &self.guest, self.service).err());
        let is_whole = wrong.is_empty();
        let failure = wrong.into_iter().fold(failure, |failure, second| with(failure, Some(second)));
        // The note stays for what is to be done by hand.
        if !is_whole {
            let hint = format!(
                "'xl list' shows whether the guest runs; 'xpci status' what it is to get back; unpause it with 'xl unpause {number}'"
            );
            return failure.of(self.domain).hint(hint);
        }
        let text = "the guest runs on here";
        let again = match self.guest.functions.is_empty() {
            true => text.to_owned(),
            false => format!("{text} and has its functions again"),
        };
        let message = format!("{}; {again}", failure.message);
        self.stays(Failure { message, code: ErrorCode::Failed, ..failure })
    }

    /// Ends the note about the guest, which stays.
    fn stays(&mut self, failure: Failure) -> Failure {
        let ended = self.service.ask(Request::MigrateEnd { guest: self.guest.guest, side: Side::Leaving });
        with(failure.of(self.domain), ended.err())
    }

    /// Leaves the guest paused: whether it is noted that it was handed over is unknown.
    fn open(&self, host: &str, failure: Failure) -> Failure {
        let message = format!(
            "{}; whether {} was handed over to {host} is unknown, and it stays paused on both hosts",
            failure.message,
            self.guest.called()
        );
        let hint = "start xpcid; then 'xpci status' says which host may let it run";
        Failure { message, ..failure }.of(self.domain).hint(hint)
    }

    /// Ends the guest here, and has the other host let it run.
    fn leave(self, peer: &mut Peer) -> Result<Success, Failure> {
        let host = peer.name.clone();
        let by_hand =
            format!("it must not run here any more; 'xpci status' says how to let it run on {host}");
        let over = |failure: Failure| {
            let message =
                format!("{} is handed over to {host}, but: {}", self.guest.called(), failure.message);
            failed(message).of(self.domain).hint(by_hand.clone())
        };
        self.xl(&["destroy", &self.domain.to_string()]).map_err(over)?;
        peer.order(&Order::Run).and_then(|()| peer.expect(&Report::Runs)).map_err(over)?;
        let mut message = format!("{} runs on {host}", self.guest.called());
        if !self.guest.functions.is_empty() {
            message.push_str(&format!(", with {}", functions(self.guest.functions.len())));
        }
        let ended = self.service.ask(Request::MigrateEnd { guest: self.guest.guest, side: Side::Leaving });
        let warnings = ended.err().map(|failure| failure.to_string()).into_iter().collect();
        Ok(changed(message, warnings))
    }
}

/// A failure, with what else failed.
fn with(failure: Failure, second: Option<Failure>) -> Failure {
    match second {
        None => failure,
        Some(second) => Failure { message: format!("{}; {}", failure.message, second.message), ..failure },
    }
}
