//! Makes every call of the platform on a real dom0 and prints what it answers, one line a call.
//!
//! `platform_probe PF VF OTHER_VF GUEST PLAIN_GUEST`: two VFs of the PF held by pci-stub, and two running PV guests, of
//! which the first was created with `passthrough="enabled"` and the second without. What this printed is kept in
//! `docs/xen-answers.md`; the simulated platform answers the same.

mod config;
mod host;
mod hypervisor;
mod interrupts;
mod ring;
mod store;

use std::fmt::Debug;
use std::process::ExitCode;
use std::str::FromStr;

use pciback::platform::linux::blocking::run_if_child;
use pciback::platform::{Cause, Platform, Result, xen};
use pciback::{DomId, Sbdf};

/// What the probe works on.
struct Subject {
    pf: Sbdf,
    vf: Sbdf,
    other_vf: Sbdf,
    guest: DomId,
    plain_guest: DomId,
}

/// A function that this host does not have.
const UNKNOWN: Sbdf = Sbdf::from_devfn(0, 0xee, 0);
/// A domain that does not exist.
const NOBODY: DomId = DomId(999);

fn main() -> ExitCode {
    if let Some(code) = run_if_child() {
        return code;
    }
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let Some(subject) = subject(&arguments) else {
        println!("usage: platform_probe PF VF OTHER_VF GUEST PLAIN_GUEST");
        return ExitCode::from(2);
    };
    match xen::open().and_then(|platform| run(&platform, &subject)) {
        Ok(()) => {
            println!("PROBE: end");
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("PROBE: stopped: {error}");
            ExitCode::FAILURE
        }
    }
}

fn subject(arguments: &[String]) -> Option<Subject> {
    fn parse<T: FromStr>(text: Option<&String>) -> Option<T> {
        text?.parse().ok()
    }
    Some(Subject {
        pf: parse(arguments.first())?,
        vf: parse(arguments.get(1))?,
        other_vf: parse(arguments.get(2))?,
        guest: DomId(parse(arguments.get(3))?),
        plain_guest: DomId(parse(arguments.get(4))?),
    })
}

fn run(platform: &Platform, subject: &Subject) -> Result<()> {
    println!("PROBE: platform: {}", platform.description);
    host::probe(platform, subject)?;
    store::probe(platform.store.as_ref(), subject)?;
    hypervisor::probe(platform, subject)?;
    interrupts::probe(platform, subject)?;
    ring::probe(platform, subject)?;
    host::changes(platform, subject)
}

/// Prints what a call answered: a value, or the error's number and text.
fn say<T: Debug>(call: &str, answer: Result<T>) -> Option<T> {
    match answer {
        Ok(value) => {
            println!("PROBE: {call}: {value:?}");
            Some(value)
        }
        Err(error) => {
            let number = match (&error.cause, error.errno()) {
                (Cause::Os(_), Some(errno)) => format!("{errno:?}"),
                (cause, _) => format!("{cause:?}").chars().take(30).collect(),
            };
            println!("PROBE: {call}: {number} <- {error}");
            None
        }
    }
}
