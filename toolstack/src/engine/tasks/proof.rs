//! The proof that a guest can no longer reach a function.

use std::sync::Arc;

use log::{info, warn};
use nix::errno::Errno;
use pciback::platform::ServerId;
use pciback::serve::hvm::Device;
use pciback::{DomId, live};

use super::TaskContext;
use super::open::{Image, Opened};
use crate::domains::{self, DomainType};
use crate::engine::notes::noted_server;
use crate::journal::Record;
use crate::outcome::{ErrorCode, Failure};

/// The number of an ioreq server that no domain has, for a domain without a noted one: the ranges that its server had claimed went with
/// it.
const NO_SERVER: ServerId = ServerId(u16::MAX);

impl TaskContext {
    /// Makes sure that the guest of a function that is not served cannot reach it: by withdrawing what the image lists, or because the
    /// guest has ended.
    ///
    /// # Errors
    ///
    /// The guest may still reach the function; bus mastering and interrupts are switched off where possible.
    pub(super) fn prove_withdrawn(&self, record: &Record, domain: DomId) -> Result<(), Failure> {
        let address = record.address;
        if !self.handover.reachable.contains(address) {
            return Ok(());
        }
        if self.has_ended(domain) || self.left_the_host(record) && !self.may_map(domain) {
            self.handover.reachable.withdrawn(address);
            return Ok(());
        }
        let why = match self.open_function(record, domain, Image::Resumed) {
            Ok(opened) => match self.quiesce(opened, record, domain) {
                Ok(()) => {
                    info!("{address}: switched off for domain {domain} by its image");
                    self.handover.reachable.withdrawn(address);
                    return Ok(());
                }
                Err(why) => why,
            },
            Err(failure) => failure.message,
        };
        let off = self
            .platform
            .host
            .config(address)
            .map_err(|error| error.to_string())
            .and_then(|config| live::switch_off(config.as_ref()).map_err(|error| error.to_string()));
        match off {
            Ok(true) => info!("{address}: bus mastering and interrupts are off"),
            Ok(false) => warn!("{address}: it answers all ones, so that it cannot be switched off"),
            Err(error) => warn!("{address}: switch it off: {error}"),
        }
        let text = format!(
            "domain {domain} may still reach {address}, which is not served, and its mappings are unknown: {why}"
        );
        Err(Failure::new(ErrorCode::Failed, text)
            .on(address)
            .of(domain)
            .hint(format!("destroy or shut down the domain; then 'xpci quarantine clear {address}'")))
    }

    fn has_ended(&self, domain: DomId) -> bool {
        matches!(self.platform.hypervisor.domain(domain), Err(error) if error.errno() == Some(Errno::ESRCH))
    }

    /// Whether the device was removed, or replaced by another. Xen has freed its interrupts in that case.
    fn left_the_host(&self, record: &Record) -> bool {
        match self.platform.host.function(record.address) {
            Ok(function) => record.incarnation != 0 && function.incarnation != record.incarnation,
            Err(error) => error.errno() == Some(Errno::ENOENT),
        }
    }

    /// Whether BARs of the function may be mapped in the domain's second-stage page tables, which Xen keeps. A PV guest's own page tables
    /// are checked by `former_owners`.
    fn may_map(&self, domain: DomId) -> bool {
        !matches!(domains::kind(self.platform.store.as_ref(), domain), Ok(kind) if kind != DomainType::Hvm)
    }

    fn quiesce(&self, opened: Opened, record: &Record, domain: DomId) -> Result<(), String> {
        let Opened { mut function, memory, .. } = opened;
        if let (Some(memory), Some(place)) = (memory, record.guest) {
            let server = noted_server(&self.settings, domain).unwrap_or(NO_SERVER);
            let slot = place.devfn.device();
            let hvm = Arc::clone(&self.platform.hvm);
            Device::new(hvm, server, slot, Arc::default(), memory).was_entered(&mut function);
        }
        function.quiesce().map_err(|error| error.to_string())
    }
}
