//! Asks a host for every contract of the platform: one line each, `PASS NAME`, `FAIL NAME: WHY`, or `SKIP NAME` for
//! one that needs `--plain-guest` or `--whole-pf`.
//!
//! `contract --platform xen|sim:FILE --pf BDF --vf BDF --guest ID [--plain-guest ID] [--holder DRIVER] [--whole-pf]`
//!
//! The VF must be bound to the holder (`pci-stub`) and owned by dom0 or DOMID_IO; the guest must have been created with
//! passthrough and have no functions, the plain one without. Only these are touched, unless `--whole-pf` says that all VFs of
//! the PF may be taken away and made again. Ends with status 0 when all pass, 1 when one fails, 2 when it cannot begin.

use std::path::Path;
use std::process::ExitCode;
use std::str::FromStr;

use pciback::platform::linux::blocking::run_if_child;
use pciback::platform::sim::Simulation;
use pciback::platform::{Platform, xen};
use pciback::{DomId, Sbdf};
use xpci_contracts::Fixture;

const USAGE: &str =
    "--platform xen|sim:FILE --pf BDF --vf BDF --guest ID [--plain-guest ID] [--holder DRIVER] [--whole-pf]";

fn main() -> ExitCode {
    if let Some(code) = run_if_child() {
        return code;
    }
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let fixture = match fixture(&arguments) {
        Ok(fixture) => fixture,
        Err(why) => {
            println!("{why}\nusage: contract {USAGE}");
            return ExitCode::from(2);
        }
    };
    let mut failed = 0;
    for (name, needs, contract) in xpci_contracts::all() {
        if !fixture.has(needs) {
            println!("SKIP {name}");
            continue;
        }
        match contract(&fixture) {
            Ok(()) => println!("PASS {name}"),
            Err(why) => {
                failed += 1;
                println!("FAIL {name}: {why}");
            }
        }
    }
    println!("{} contracts, {failed} broken", xpci_contracts::all().count());
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The value behind an option.
fn option<T: FromStr>(arguments: &[String], name: &str) -> Result<Option<T>, String> {
    let Some(place) = arguments.iter().position(|argument| argument == name) else { return Ok(None) };
    let value = arguments.get(place + 1).ok_or_else(|| format!("{name}: a value is missing"))?;
    value.parse().map(Some).map_err(|_| format!("{name}: '{value}' is none"))
}

fn required<T: FromStr>(arguments: &[String], name: &str) -> Result<T, String> {
    option(arguments, name)?.ok_or_else(|| format!("{name} is missing"))
}

fn fixture(arguments: &[String]) -> Result<Fixture, String> {
    let choice: String = required(arguments, "--platform")?;
    let vf: Sbdf = required(arguments, "--vf")?;
    let pf: Sbdf = required(arguments, "--pf")?;
    let holder = option(arguments, "--holder")?.unwrap_or_else(|| "pci-stub".to_owned());
    let (platform, other) = open(&choice, pf, vf, &holder).map_err(|error| error.to_string())?;
    Ok(Fixture {
        platform,
        other,
        pf,
        vf,
        holder,
        guest: DomId(required(arguments, "--guest")?),
        plain_guest: option(arguments, "--plain-guest")?.map(DomId),
        whole_pf: arguments.iter().any(|argument| argument == "--whole-pf"),
    })
}

/// Opens the host twice. A simulated one begins as its file says, so its VF is made and bound here.
fn open(choice: &str, pf: Sbdf, vf: Sbdf, holder: &str) -> pciback::platform::Result<(Platform, Platform)> {
    let Some(file) = choice.strip_prefix("sim:") else { return Ok((xen::open()?, xen::open()?)) };
    let simulation = Simulation::open(Path::new(file))?;
    let platform = simulation.platform(choice)?;
    if platform.host.function(vf).is_err() {
        let total = platform.host.function(pf)?.total_vfs;
        platform.host.set_num_vfs(pf, total, xpci_contracts::LIMIT)?;
    }
    platform.host.unbind(vf, xpci_contracts::LIMIT)?;
    platform.host.set_driver_override(vf, Some(holder))?;
    platform.host.probe(vf, xpci_contracts::LIMIT)?;
    Ok((platform, simulation.platform(choice)?))
}
