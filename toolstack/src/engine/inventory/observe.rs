//! Reads the state of the host's functions from sysfs, Xen and xenstore.

use std::collections::{BTreeMap, BTreeSet};

use log::warn;
use nix::errno::Errno;
use pciback::config::CapabilityList;
use pciback::inventory::{
    Function, GuestPlace, HostView, Identity, Observed, Owner, Published, Want, Wanted,
};
use pciback::platform::{HostFunction, PlatformError};
use pciback::serve::pv::nodes::{self, PublishedFunction};
use pciback::spec::CapabilityId;
use pciback::{DomId, Sbdf};

use crate::domains::{self, DomainType};
use crate::engine::tasks::TaskContext;
use crate::outcome::Failure;
use crate::transaction::{holder_of, is_held};

/// Functions that were seen since the service started, with the PF of each VF. Xen has no hypercall that lists its functions, and only
/// this list still has the PF of a VF that left the host.
pub(super) type Known = BTreeMap<Sbdf, Option<Sbdf>>;

impl TaskContext {
    /// Reads all three lists. A function that cannot be read is left alone: it is added to the busy ones, and the second value has the
    /// reasons.
    pub(super) fn observe(
        &self,
        wanted: &mut Wanted,
        known: &Known,
    ) -> Result<(Observed, Vec<String>), Failure> {
        let mut observed =
            Observed { domains: domains::present(self.platform.store.as_ref())?, ..Observed::default() };
        self.published(&mut observed)?;
        self.without_nodes(wanted, &mut observed)?;
        let listed = self.platform.host.functions()?;
        let recorded = wanted.functions.keys().chain(known.keys()).copied();
        let addresses: BTreeSet<Sbdf> = listed
            .into_iter()
            .chain(recorded)
            .chain(observed.published.iter().map(|node| node.address))
            .collect();
        let mut unread = Vec::new();
        for address in addresses {
            let intent = wanted.functions.get(&address);
            let prepared = intent.is_some_and(|intent| intent.msix_prepared);
            let ours = intent.is_some_and(|intent| intent.want != Want::Host);
            match self.observe_one(address, prepared, ours) {
                Ok(mut function) => {
                    let pf = known.get(&address).copied().flatten();
                    function.physical_function = function.physical_function.or(pf);
                    observed.functions.insert(address, function);
                }
                Err(error) => {
                    warn!("{error}");
                    unread.push(error.to_string());
                    wanted.busy.insert(address);
                }
            }
        }
        Ok((observed, unread))
    }

    /// Adds the functions of HVM guests to the published ones: HVM guests have no nodes, their firmware enumerates functions.
    fn without_nodes(&self, wanted: &Wanted, observed: &mut Observed) -> Result<(), Failure> {
        for (&address, intent) in &wanted.functions {
            if let Some(place) = intent.place()
                && domains::kind(self.platform.store.as_ref(), place.domain)? == DomainType::Hvm
            {
                observed.published.insert(Published { address, place });
            }
        }
        Ok(())
    }

    /// Reads one function. `prepared`: whether the service prepared its MSI-X table; config space is read for an MSI-X capability only in
    /// that case. `ours`: whether the service holds it.
    fn observe_one(&self, address: Sbdf, prepared: bool, ours: bool) -> Result<Function, PlatformError> {
        let function = self.find(address)?;
        Ok(Function {
            physical_function: function.as_ref().and_then(|function| function.physical_function),
            host: function.map(|function| self.view(&function, prepared, ours)),
            xen: self.owner(address)?,
        })
    }

    /// Reads a function from sysfs; `None` where there is none.
    pub(super) fn find(&self, address: Sbdf) -> Result<Option<HostFunction>, PlatformError> {
        match self.platform.host.function(address) {
            Ok(function) => Ok(Some(function)),
            Err(error) if error.errno() == Some(Errno::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn view(&self, function: &HostFunction, prepared: bool, ours: bool) -> HostView {
        let msix = prepared && {
            let config = self.platform.host.config(function.address).map_err(std::io::Error::other);
            let bytes = config.and_then(|config| config.read_all()).unwrap_or_default();
            CapabilityList::walk(&bytes).legacy(CapabilityId::MSI_X).is_some()
        };
        HostView {
            identity: Identity::of(function),
            bridge: function.is_bridge(),
            msix,
            extended: false,
            virtual_functions: function.virtual_functions.clone(),
            num_vfs: function.num_vfs,
            driver: function.driver.is_some(),
            held: if ours { is_held(function) } else { holder_of(function).is_some() },
        }
    }

    /// The owner of a function in Xen; `None` where Xen does not know it.
    pub(super) fn owner(&self, address: Sbdf) -> Result<Option<Owner>, PlatformError> {
        let hypervisor = self.platform.hypervisor.as_ref();
        if !hypervisor.device_known(address)? {
            return Ok(None);
        }
        Ok(Some(match hypervisor.assignable(address) {
            Ok(true) => Owner::Free,
            Ok(false) => Owner::Guest,
            Err(_) => Owner::Unknown,
        }))
    }

    fn published(&self, observed: &mut Observed) -> Result<(), PlatformError> {
        let store = self.platform.store.as_ref();
        for name in store.list(nodes::BACKENDS)? {
            let Ok(number) = name.parse::<u16>() else { continue };
            let domain = DomId(number);
            for PublishedFunction { devfn, address, .. } in nodes::read_backend_functions(store, domain)? {
                if let Some(address) = address {
                    observed.published.insert(Published { address, place: GuestPlace { domain, devfn } });
                }
            }
        }
        Ok(())
    }
}
