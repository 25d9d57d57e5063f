//! What every platform promises, asked of the simulated host by `cargo test` and of a real dom0 by `examples/contract`. For tests only.
//!
//! A contract leaves what it touches as it found it, also when it fails. It only touches the functions and domains of its
//! [`Fixture`] and nodes below [`store::TOP`].

mod host;
mod hypervisor;
mod interrupts;
mod network;
mod store;

use std::fmt::Debug;
use std::time::Duration;

use nix::errno::Errno;
use pciback::platform::{Cause, Platform, PlatformError, StoreOps};
use pciback::{DomId, Sbdf};

/// What contracts work on.
pub struct Fixture {
    /// The host.
    pub platform: Platform,
    /// The same host, by connections of its own.
    pub other: Platform,
    /// A PF with VFs.
    pub pf: Sbdf,
    /// One of its VFs, with MSI-X, that is unused and attached to no guest.
    pub vf: Sbdf,
    /// A driver that takes any function by `driver_override` and does nothing to it: `pci-stub`.
    pub holder: String,
    /// A running domain with passthrough that has no functions.
    pub guest: DomId,
    /// One without passthrough.
    pub plain_guest: Option<DomId>,
    /// Whether all VFs of the PF may be taken away and made again.
    pub whole_pf: bool,
}

/// Why a contract is broken.
pub type Broken = String;

/// One contract: its name, what it needs besides the VF and the guest, and what asks.
pub type Contract = (&'static str, Needs, fn(&Fixture) -> Result<(), Broken>);

/// What not every fixture has.
#[derive(Clone, Copy)]
pub enum Needs {
    /// Nothing else.
    Nothing,
    /// A domain without passthrough.
    PlainGuest,
    /// All VFs of the PF.
    WholePf,
}

impl Fixture {
    /// Whether it has what a contract needs.
    pub fn has(&self, needs: Needs) -> bool {
        match needs {
            Needs::Nothing => true,
            Needs::PlainGuest => self.plain_guest.is_some(),
            Needs::WholePf => self.whole_pf,
        }
    }
}

/// How long a change of the host may take.
pub const LIMIT: Duration = Duration::from_secs(30);
/// A function that no host has, and a domain that does not exist.
pub const UNKNOWN: Sbdf = Sbdf::from_devfn(0, 0xee, 0);
const NO_DOMAIN: DomId = DomId(999);

/// All contracts.
pub fn all() -> impl Iterator<Item = Contract> {
    [store::CONTRACTS, host::CONTRACTS, network::CONTRACTS, hypervisor::CONTRACTS, interrupts::CONTRACTS]
        .concat()
        .into_iter()
}

/// Fails unless the two are equal.
pub fn same<T: PartialEq + Debug>(what: &str, found: T, wanted: T) -> Result<(), Broken> {
    if found == wanted { Ok(()) } else { Err(format!("{what}: {found:?}, not {wanted:?}")) }
}

/// Fails unless the call was refused with one of these error numbers.
pub fn refused<T: Debug>(
    what: &str,
    answer: Result<T, PlatformError>,
    wanted: &[Errno],
) -> Result<(), Broken> {
    match answer {
        Ok(value) => Err(format!("{what}: taken ({value:?}), not refused with {wanted:?}")),
        Err(error) if error.errno().is_some_and(|errno| wanted.contains(&errno)) => Ok(()),
        Err(error) => Err(format!("{what}: {error}, not {wanted:?}")),
    }
}

/// Fails unless the call found nothing there.
pub fn missing<T: Debug>(what: &str, answer: Result<T, PlatformError>) -> Result<(), Broken> {
    match answer {
        Err(PlatformError { cause: Cause::Missing, .. }) => Ok(()),
        other => Err(format!("{what}: {other:?}, not missing")),
    }
}

/// Makes an error of the platform one of the contract.
pub fn ok<T>(answer: Result<T, PlatformError>) -> Result<T, Broken> {
    answer.map_err(|error| error.to_string())
}

/// Runs `body`, then `undo`, even if `body` failed.
pub fn undone(
    body: impl FnOnce() -> Result<(), Broken>,
    undo: impl FnOnce() -> Result<(), Broken>,
) -> Result<(), Broken> {
    let (body, undo) = (body(), undo());
    body.and(undo)
}

/// A `write` whose error says what it was for.
pub fn put(store: &dyn StoreOps, path: &str, value: &str) -> Result<(), Broken> {
    ok(store.write(path, value.as_bytes()))
}
