//! Asks a platform what its contracts say, one line for each: `PASS name`, or `FAIL name: why`.
//!
//! `contract --platform xen|sim:FILE --function BDF --guest ID --closed-guest ID`. The function is a VF with MSI-X, held by
//! pci-stub and nobody's; the guests are PV, one with and one without passthrough. It is left with the quarantine domain.

#[path = "../../tests/contract/suite.rs"]
mod suite;

use std::path::Path;
use std::process::ExitCode;

use pciback::DomId;
use pciback::platform::linux::blocking::run_if_child;
use pciback::platform::{Platform, sim, xen};
use suite::{CONTRACTS, Subject};

fn main() -> ExitCode {
    if let Some(code) = run_if_child() {
        return code;
    }
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (platform, subject) = match open(&arguments) {
        Ok(opened) => opened,
        Err(why) => {
            println!("FAIL start: {why}");
            return ExitCode::from(2);
        }
    };
    let mut broken = false;
    for (name, contract) in CONTRACTS {
        match contract(&platform, &subject) {
            Ok(()) => println!("PASS {name}"),
            Err(why) => {
                println!("FAIL {name}: {why}");
                broken = true;
            }
        }
    }
    if broken { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn open(arguments: &[String]) -> Result<(Platform, Subject), String> {
    let value = |name: &str| {
        let at = arguments.iter().position(|argument| argument == name);
        at.and_then(|at| arguments.get(at + 1)).ok_or_else(|| format!("{name} is missing"))
    };
    let domain = |name: &str| -> Result<DomId, String> {
        Ok(DomId(value(name)?.parse().map_err(|_| format!("{name} must be a number"))?))
    };
    let subject = Subject {
        function: value("--function")?.parse().map_err(|error| format!("--function: {error}"))?,
        guest: domain("--guest")?,
        closed: domain("--closed-guest")?,
    };
    let platform = match value("--platform")?.split_once(':') {
        Some(("sim", file)) => sim::open(Path::new(file)),
        _ => xen::open(),
    };
    Ok((platform.map_err(|error| error.to_string())?, subject))
}
