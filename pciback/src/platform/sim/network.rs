//! What PF drivers answer about the network settings of VFs: they keep what they were set to.

use std::sync::{Arc, Mutex};

use nix::errno::Errno;

use super::failures::{Failures, Subject};
use super::world::World;
use super::{Answer, locked};
use crate::Sbdf;
use crate::platform::network::{LinkState, MacAddress, PfNetwork, Vlan};
use crate::platform::{Cause, PlatformError, Result, VfNetwork, VfPlace, VfSetting, VfSettings};

pub(super) struct SimVfNetwork {
    world: Arc<Mutex<World>>,
    failures: Failures,
}

impl SimVfNetwork {
    pub fn new(world: &Arc<Mutex<World>>, failures: &Failures) -> Self {
        Self { world: Arc::clone(world), failures: failures.clone() }
    }
}

/// A VF that has just been enabled, as igb reports it.
pub(super) const FRESH: VfSettings = VfSettings {
    mac: Some(MacAddress([0; 6])),
    vlan: Some(Vlan { id: 0, qos: 0 }),
    spoof_check: Some(true),
    trust: Some(false),
    max_rate: Some(0),
    min_rate: Some(0),
    link_state: Some(LinkState::Auto),
};

/// The word for a setting in a description's `vf-settings`.
const fn word(setting: VfSetting) -> &'static str {
    match setting {
        VfSetting::Mac(_) => "mac",
        VfSetting::Vlan(_) => "vlan",
        VfSetting::SpoofCheck(_) => "spoof-check",
        VfSetting::Trust(_) => "trust",
        VfSetting::Rate { .. } => "rate",
        VfSetting::LinkState(_) => "link-state",
    }
}

impl World {
    /// The interface that the PF's own driver makes.
    fn interface(&self, physical_function: Sbdf) -> Option<&String> {
        let driven = self.driver_of(physical_function).is_some_and(|kind| !kind.any);
        self.functions.get(&physical_function).filter(|_| driven)?.interfaces.first()
    }

    fn network(&self, physical_function: Sbdf) -> Option<PfNetwork> {
        let interface = self.interface(physical_function)?.clone();
        let reports = self.driver_of(physical_function).is_some_and(|kind| !kind.vf_settings.is_empty());
        let vfs = &self.functions.get(&physical_function)?.virtual_functions;
        let settings = vfs.iter().enumerate().filter_map(|(index, vf)| {
            let function = self.functions.get(vf).filter(|_| reports)?;
            Some((index as u16, function.network))
        });
        Some(PfNetwork { interface, vfs: settings.collect() })
    }

    fn set_network(&mut self, vf: VfPlace, setting: VfSetting) -> Answer<()> {
        self.interface(vf.physical_function).ok_or(Errno::ENODEV)?;
        let kind = self.driver_of(vf.physical_function).ok_or(Errno::ENODEV)?;
        if !kind.vf_settings.iter().any(|name| name == word(setting)) {
            return Err(Errno::EOPNOTSUPP);
        }
        // igb answers so: a guaranteed rate is not EOPNOTSUPP but EINVAL.
        let guaranteed = kind.vf_settings.iter().any(|name| name == "min-rate");
        if matches!(setting, VfSetting::Rate { min: 1.., .. }) && !guaranteed {
            return Err(Errno::EINVAL);
        }
        let vfs = &self.function(vf.physical_function)?.virtual_functions;
        let address = vfs.get(usize::from(vf.index)).copied().ok_or(Errno::EINVAL)?;
        self.function(address)?.network.take(setting);
        Ok(())
    }
}

impl VfNetwork for SimVfNetwork {
    fn vf_settings(&self, physical_function: Sbdf) -> Result<Option<PfNetwork>> {
        self.failures.check("vf_settings", Subject::from(physical_function)).map_err(|cause| {
            PlatformError::new("read the network settings of the VFs of", physical_function, cause)
        })?;
        Ok(locked(&self.world).network(physical_function))
    }

    fn set_vf_setting(&self, vf: VfPlace, setting: VfSetting) -> Result<()> {
        let failed = self.failures.check("set_vf_setting", Subject::from(vf.address));
        let set = || locked(&self.world).set_network(vf, setting).map_err(Cause::from);
        let answer = failed.and_then(|()| self.failures.fuse.change(set));
        answer.map_err(|cause| PlatformError::new(setting.action(), vf, cause))
    }
}
