//! What the service shows.

use pciback::platform::{Host, HostFunction};
use pciback::{FunctionState, Sbdf};

use super::Engine;
use crate::domains;
use crate::journal::Record;
use crate::outcome::Failure;
use crate::protocol::{DomainName, FunctionView, GuestView, StatusView, Success, VfView};
use crate::transaction::holder_of;

/// A function as its record and the host show it.
pub(super) fn view_of(host: &dyn Host, record: &Record) -> FunctionView {
    view(host.function(record.address).ok().as_ref(), record)
}

fn view(function: Option<&HostFunction>, record: &Record) -> FunctionView {
    let note = record.quarantine.clone().or_else(|| {
        record.transaction.as_ref().map(|progress| {
            let direction = if progress.undoing { "undoing " } else { "" };
            format!("{direction}{:?}", progress.step).to_lowercase()
        })
    });
    FunctionView {
        address: record.address,
        id: function.map_or_else(String::new, |found| format!("{:04x}:{:04x}", found.vendor, found.device)),
        state: if function.is_some() { record.state } else { FunctionState::Gone },
        driver: function.and_then(|found| found.driver.clone()),
        original_driver: record.original_driver.clone(),
        physical_function: function.and_then(|found| found.physical_function),
        domain: record.guest.map(|guest| guest.domain),
        guest_address: record.guest.map(|guest| Sbdf::from_devfn(0, 0, guest.devfn)),
        note,
    }
}

impl Engine {
    pub(super) fn function_view(&self, address: Sbdf) -> FunctionView {
        view_of(self.platform.host.as_ref(), &self.record(address))
    }

    /// Functions that could be attached: held by the service, or by somebody else's `pci-assignable-add`.
    pub(super) fn assignable_list(&self) -> Result<Success, Failure> {
        let mut functions = Vec::new();
        for address in self.platform.host.functions()? {
            let record = self.record(address);
            match record.state {
                FunctionState::Held => functions.push(self.function_view(address)),
                FunctionState::Host => functions.extend(self.held_by_others(&record)),
                _ => {}
            }
        }
        Ok(Success::Functions { functions })
    }

    fn held_by_others(&self, record: &Record) -> Option<FunctionView> {
        let function = self.platform.host.function(record.address).ok()?;
        holder_of(&function)?;
        let note = "held, but not by xpcid: 'xpci pci-assignable-add' adopts it".to_owned();
        Some(FunctionView { note: Some(note), ..view(Some(&function), record) })
    }

    pub(super) fn guest_list(&self, domain: &DomainName) -> Result<Success, Failure> {
        let domain = domains::find(self.platform.store.as_ref(), domain)?;
        let of_guest = |record: &&Record| record.guest.is_some_and(|guest| guest.domain == domain);
        let functions =
            self.records.values().filter(of_guest).map(|record| self.function_view(record.address));
        Ok(Success::Functions { functions: functions.collect() })
    }

    pub(super) fn vf_list(&self, physical_function: Option<Sbdf>) -> Result<Success, Failure> {
        let host = self.platform.host.as_ref();
        let pfs = match physical_function {
            Some(address) => vec![super::requests::existing(host, address)?],
            None => {
                let found = host.functions()?.into_iter().filter_map(|address| host.function(address).ok());
                found.filter(|function| function.total_vfs > 0).collect()
            }
        };
        if let (Some(address), [pf]) = (physical_function, pfs.as_slice())
            && pf.total_vfs == 0
        {
            return Err(
                Failure::refused(format!("{address} is no PF: it has no SR-IOV capability")).on(address)
            );
        }
        let vfs = pfs.iter().flat_map(|pf| {
            pf.virtual_functions.iter().enumerate().map(|(index, address)| VfView {
                index: index as u16,
                function: self.function_view(*address),
            })
        });
        Ok(Success::Vfs { vfs: vfs.collect() })
    }

    pub(super) fn status(&self) -> Success {
        let functions: Vec<_> = self.records.keys().map(|address| self.function_view(*address)).collect();
        let quarantined = functions.iter().filter(|function| function.state == FunctionState::Quarantined);
        let quarantined = quarantined.map(|function| {
            let why = function.note.as_deref().unwrap_or("unknown reason");
            format!("{} is quarantined: {why}", function.address)
        });
        // One that has lost its last function stays known for a moment, until its nodes may be made again.
        let served = self.guests.iter().filter(|(_, guest)| guest.has_functions());
        let guests = served.map(|(domain, guest)| GuestView {
            domain: *domain,
            name: domains::name(self.platform.store.as_ref(), *domain).unwrap_or_default(),
            frontend: guest.describe(),
            requests: guest.requests(),
            errors: guest.errors(),
        });
        Success::Status(StatusView {
            service: env!("CARGO_PKG_VERSION").to_owned(),
            platform: self.platform.description.clone(),
            guests: guests.collect(),
            problems: quarantined.chain(self.problems.iter().cloned()).collect(),
            functions,
        })
    }
}
