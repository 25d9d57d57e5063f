//! `xpci migrate-receive`: the part of a move on the host to which the guest comes.
//!
//! The guest may run here only when the other host says so: it has noted then that it never lets the guest run again. A connection that ends
//! before that leaves the question open, and the guest paused.

use std::ffi::{OsStr, OsString};
use std::io::{self, BufRead, BufReader, PipeWriter};
use std::process::{self, Stdio};

use pciback::DomId;

use super::messages::{self, Order, Report, copy_part, send};
use super::xl::{Xl, xl_anyway};
use super::{Service, changed, failed, forget, take_back, unexpected};
use crate::outcome::{ErrorCode, Failure};
use crate::protocol::{Request, ReservedFunction, Side, Success};
use crate::saved::SavedGuest;

/// How xl finds its standard input.
pub(super) const STANDARD_INPUT: &str = "/proc/self/fd/0";

/// A guest that comes.
struct Arrival<'a, 'b> {
    service: &'a mut Service<'b>,
    from: String,
    guest: SavedGuest,
    reserved: Vec<ReservedFunction>,
}

/// Receives a guest over standard input and output.
pub(super) fn receive(service: &mut Service<'_>) -> Result<Success, Failure> {
    let mut orders = BufReader::new(io::stdin().lock());
    let arrival = match Arrival::begin(&mut orders, service) {
        Ok(arrival) => arrival,
        Err(failure) => return Err(reported(failure)),
    };
    arrival.carry_out(&mut orders)
}

fn report(report: &Report) -> io::Result<()> {
    send(&mut io::stdout().lock(), report)
}

/// Reports a failure to the other host.
fn reported(failure: Failure) -> Failure {
    // Who does not hear it finds that the connection has ended.
    let _ = report(&Report::Failed { failure: Box::new(failure.clone()) });
    failure
}

impl<'a, 'b> Arrival<'a, 'b> {
    /// Reserves the functions that the other host asks for.
    fn begin(orders: &mut impl BufRead, service: &'a mut Service<'b>) -> Result<Self, Failure> {
        let (from, guest) = match messages::receive(orders)? {
            Order::Reserve { version: messages::VERSION, from, guest } => (from, guest),
            Order::Reserve { version, .. } => {
                let text = format!("xpci {} does not understand version {version} of a move", crate::VERSION);
                return Err(
                    Failure::new(ErrorCode::Usage, text).hint("both hosts need the same version of xpci")
                );
            }
            other => return Err(out_of_turn(&other)),
        };
        guest.check().map_err(|why| {
            Failure::new(ErrorCode::Usage, format!("the guest that is to come cannot be described: {why}"))
        })?;
        let ask =
            Request::MigrateReceive { guest: guest.clone(), from: from.clone(), process: process::id() };
        match service.ask(ask)? {
            Success::Reserved { functions, .. } => Ok(Self { service, from, guest, reserved: functions }),
            _ => Err(unexpected("something else")),
        }
    }

    fn carry_out(mut self, orders: &mut impl BufRead) -> Result<Success, Failure> {
        let arrived = report(&Report::Reserved { functions: self.reserved.clone() })
            .map_err(|error| messages::lost(&error))
            .and_then(|()| self.restore(orders))
            .and_then(|restored| if restored { self.attach().map(Some) } else { Ok(None) });
        let domain = match arrived {
            Ok(Some(domain)) => domain,
            // xl has left nothing of a guest that it could not restore.
            Ok(None) => return Ok(self.stays()),
            Err(failure) => return Err(reported(self.end(failure))),
        };
        if let Err(error) = report(&Report::Ready) {
            // The other host has not heard it, and hands nothing over.
            let failure = messages::lost(&error);
            let failure = match self.destroy(Some(domain)) {
                Ok(()) => failure,
                Err(second) => {
                    Failure { message: format!("{}; {}", failure.message, second.message), ..failure }
                }
            };
            return Err(self.end(failure));
        }
        match messages::receive(orders) {
            Ok(Order::Run) => self.run(domain),
            Ok(Order::Stay) => {
                self.destroy(Some(domain))?;
                Ok(self.stays())
            }
            Ok(other) => Err(self.open(domain, &out_of_turn(&other))),
            Err(failure) => Err(self.open(domain, &failure)),
        }
    }

    /// Has xl restore the guest, paused, from what comes. `false`: the guest stays where it was, and nothing of it is here.
    fn restore(&mut self, orders: &mut impl BufRead) -> Result<bool, Failure> {
        let bytes = match messages::receive(orders)? {
            Order::Part { bytes } => bytes,
            Order::Stay => return Ok(false),
            other => return Err(out_of_turn(&other)),
        };
        let (reader, writer) = io::pipe().map_err(|error| failed(format!("make a pipe for xl: {error}")))?;
        let words = ["restore", "-p", STANDARD_INPUT].map(OsStr::new);
        let xl = Xl::start(&words, Stdio::from(reader))?;
        let fed = feed(orders, bytes, writer);
        match (fed, xl.wait()) {
            (Ok(Fed::Whole), restored) => restored.map(|()| true),
            // An xl that fails leaves nothing of the guest.
            (Ok(Fed::Stays), Err(_)) => Ok(false),
            (Ok(Fed::Unread), Err(failure)) | (Err(failure), Err(_)) => Err(failure),
            (fed, Ok(())) => {
                self.destroy(None)?;
                match fed? {
                    Fed::Unread => Err(failed("xl restored the guest before it was complete".to_owned())),
                    Fed::Stays | Fed::Whole => Ok(false),
                }
            }
        }
    }

    /// Attaches the functions to the restored guest.
    fn attach(&mut self) -> Result<DomId, Failure> {
        let restored = Request::Restored { guest: self.guest.guest, functions: self.reserved.clone() };
        let attached = match self.service.ask(restored) {
            Ok(Success::Restored { domain, .. }) => return Ok(domain),
            Ok(_) => unexpected("something else"),
            Err(failure) => failure,
        };
        match self.destroy(attached.domain) {
            Ok(()) => Err(attached),
            Err(second) => {
                let message = format!("{}; {}", attached.message, second.message);
                Err(Failure { message, ..attached })
            }
        }
    }

    /// Ends the copy of the guest, which has not run.
    fn destroy(&mut self, domain: Option<DomId>) -> Result<(), Failure> {
        if let Some(domain) = domain {
            take_back(domain, &self.reserved, self.service);
        }
        let domain = domain.map(|domain| domain.to_string()).or_else(|| self.guest.name.clone());
        let Some(domain) = domain.map(OsString::from) else {
            return Err(failed(
                "the copy of the guest, which is paused, must be destroyed by 'xl destroy'".to_owned(),
            ));
        };
        xl_anyway(&[OsStr::new("destroy"), &domain])
    }

    /// Gives back what was reserved.
    fn end(&mut self, failure: Failure) -> Failure {
        forget(&self.guest, &self.reserved, self.service);
        self.note_end();
        failure
    }

    fn stays(mut self) -> Success {
        forget(&self.guest, &self.reserved, self.service);
        self.note_end();
        changed(format!("{} stays on {}", self.guest.called(), self.from), Vec::new())
    }

    fn note_end(&mut self) {
        let ended = Request::MigrateEnd { guest: self.guest.guest, side: Side::Arriving };
        if let Err(failure) = self.service.ask(ended) {
            (self.service.progress)(&format!("note the end of the move: {failure}"));
        }
    }

    fn run(mut self, domain: DomId) -> Result<Success, Failure> {
        let number = OsString::from(domain.to_string());
        if let Err(failure) = xl_anyway(&[OsStr::new("unpause"), &number]) {
            let hint = format!("the guest is here and has its functions: 'xl unpause {domain}' lets it run");
            return Err(reported(failure.of(domain).hint(hint)));
        }
        self.note_end();
        // The other host says what it knows if it does not hear this.
        let _ = report(&Report::Runs);
        Ok(changed(format!("{} runs here, as domain {domain}", self.guest.called()), Vec::new()))
    }

    /// Leaves the guest paused: whether the other host has handed it over is unknown.
    fn open(&self, domain: DomId, failure: &Failure) -> Failure {
        let Self { guest, from, .. } = self;
        let text =
            format!("{} is here, as domain {domain}, and stays paused: {}", guest.called(), failure.message);
        failed(text).of(domain).hint(format!(
            "if 'xpci status' of {from} says that it was handed over, 'xl unpause {domain}' lets it run here; otherwise 'xl destroy {domain}' ends this copy"
        ))
    }
}

fn out_of_turn(order: &Order) -> Failure {
    failed(format!("the other host gave the order {order:?} when another one was due"))
}

/// How the guest's memory came.
enum Fed {
    /// All of it.
    Whole,
    /// xl reads no more of it.
    Unread,
    /// The guest stays where it was.
    Stays,
}

/// Gives xl what comes of the guest, from a part of this size on.
fn feed(orders: &mut impl BufRead, bytes: u32, mut xl: PipeWriter) -> Result<Fed, Failure> {
    let mut buffer = Vec::new();
    let mut order = Order::Part { bytes };
    loop {
        match order {
            Order::Part { bytes } => {
                if copy_part(orders, bytes, &mut buffer, &mut xl)?.is_err() {
                    return Ok(Fed::Unread);
                }
            }
            Order::Complete => return Ok(Fed::Whole),
            Order::Stay => return Ok(Fed::Stays),
            other => return Err(out_of_turn(&other)),
        }
        order = messages::receive(orders)?;
    }
}
