//! The network settings that the administrator requests for a VF, by 'vf set' or in the service's settings: applying, keeping and undoing
//! them.
//!
//! Settings of 'vf set' are set through the PF at once, those of the service's settings when the VF is created. All of them are set again
//! at each attachment, after each reset that a guest requests (which may lose them), and when the guest has lost the VF. The values
//! before the first change are restored when the VF goes back to dom0.

use log::warn;
use nix::errno::Errno;
use pciback::Sbdf;
use pciback::platform::{
    Cause, HostFunction, Platform, PlatformError, VfNetwork, VfPlace, VfSetting, VfSettings,
};

use super::{Context, both};
use crate::journal::{Journal, NetworkRecord, Record};
use crate::outcome::{ErrorCode, Failure};
use crate::persistent_settings::PersistentSettings;
use crate::settings::Settings;

/// What a PF's driver reports for one VF.
#[derive(Debug, Clone)]
pub struct Reported {
    /// The VF.
    pub vf: VfPlace,
    /// The PF's network interface, if it has one.
    pub interface: Option<String>,
    /// The settings, if the driver reports any.
    pub settings: Option<VfSettings>,
}

impl Reported {
    /// The settings, or why none can be set.
    fn settable(&self) -> Result<VfSettings, Failure> {
        let pf = self.vf.physical_function;
        let failure = match (&self.interface, self.settings) {
            (_, Some(settings)) => return Ok(settings),
            (None, None) => {
                Failure::refused(format!("the PF of {}, {pf}, has no network interface", self.vf.address)).hint(
                    "only VFs of network cards have network settings, and only while the PF's own driver is loaded",
                )
            }
            (Some(name), None) => Failure::refused(format!(
                "the driver of {name} ({pf}) reports no network settings of {}",
                self.vf.address
            ))
            .hint("it has none to be set; see 'ip link show' in dom0"),
        };
        Err(failure.on(self.vf.address))
    }
}

/// The PF and the index of a VF.
pub fn place(platform: &Platform, address: Sbdf) -> Result<VfPlace, Failure> {
    let host = platform.host.as_ref();
    let function = host.function(address)?;
    let Some(physical_function) = function.physical_function else {
        let failure = Failure::refused(format!("{address} is not a VF"));
        return Err(failure
            .on(address)
            .hint("'xpci vf list' lists the VFs; a guest that has a PF configures it itself"));
    };
    let vfs = host.function(physical_function)?.virtual_functions;
    let index = vfs.iter().position(|vf| *vf == address).ok_or_else(|| {
        Failure::new(ErrorCode::Failed, format!("{address} is not among the VFs of {physical_function}"))
            .on(address)
            .hint("they are being changed; try again")
    })?;
    Ok(VfPlace { address, physical_function, index: index as u16 })
}

/// Asks a PF's driver for the settings of all its VFs.
pub fn read_all(platform: &Platform, pf: &HostFunction) -> Result<Vec<Reported>, Failure> {
    let found = platform
        .network
        .vf_settings(pf.address)
        .map_err(|error| Failure::from(error).on(pf.address).hint("see 'ip link show' in dom0"))?;
    let seen = pf.virtual_functions.iter().enumerate().map(|(index, address)| Reported {
        vf: VfPlace { address: *address, physical_function: pf.address, index: index as u16 },
        interface: found.as_ref().map(|network| network.interface.clone()),
        settings: found.as_ref().and_then(|network| network.vfs.get(&(index as u16)).copied()),
    });
    Ok(seen.collect())
}

/// Asks the PF's driver for the settings of one VF.
pub fn read_one(platform: &Platform, address: Sbdf) -> Result<Reported, Failure> {
    let vf = place(platform, address)?;
    let found = platform
        .network
        .vf_settings(vf.physical_function)
        .map_err(|error| Failure::from(error).on(address).hint("see 'ip link show' in dom0"))?;
    let settings = found.as_ref().and_then(|network| network.vfs.get(&vf.index).copied());
    Ok(Reported { vf, interface: found.map(|network| network.interface), settings })
}

/// Sets all wanted settings, or none.
fn put(
    network: &dyn VfNetwork,
    vf: VfPlace,
    wanted: &VfSettings,
    present: &VfSettings,
) -> Result<(), Failure> {
    let mut done = VfSettings::default();
    for setting in wanted.each(present) {
        match network.set_vf_setting(vf, setting) {
            Ok(()) => done.take(setting),
            Err(error) => {
                let failure = explained(&error, vf, setting);
                let undone = put_back(network, vf, &present.only(&done), present);
                return Err(both(failure, undone.into_iter().next()));
            }
        }
    }
    Ok(())
}

/// Sets as many as possible, and returns the failures.
fn put_back(network: &dyn VfNetwork, vf: VfPlace, before: &VfSettings, present: &VfSettings) -> Vec<Failure> {
    let failed = |setting| network.set_vf_setting(vf, setting).err().map(|error| (setting, error));
    let failures = before.each(present).into_iter().filter_map(failed);
    failures
        .map(|(setting, error)| Failure { code: ErrorCode::Failed, ..explained(&error, vf, setting) })
        .collect()
}

fn explained(error: &PlatformError, vf: VfPlace, setting: VfSetting) -> Failure {
    let plain = || Failure::new(ErrorCode::Failed, error.to_string());
    let failure = match (error.errno(), setting) {
        (Some(Errno::EOPNOTSUPP), _) => {
            Failure::refused(format!("{} {vf}: the PF's driver cannot do this", setting.action()))
                .hint("leave this setting out; 'xpci vf show' shows what the driver reports")
        }
        (Some(Errno::EINVAL), VfSetting::Rate { min, .. }) if min > 0 => {
            plain().hint("the PF's driver refuses these rates; many drivers guarantee no minimum")
        }
        (Some(Errno::EINVAL), VfSetting::Rate { .. }) => {
            plain().hint("the PF's link must be up and no slower than this rate: see 'ethtool' in dom0")
        }
        (Some(Errno::EINVAL), _) => {
            plain().hint("the PF's driver refuses this value; dom0's kernel log may say why")
        }
        _ if matches!(error.cause, Cause::TimedOut(_)) => {
            plain().hint("a network driver keeps dom0's kernel busy; see its log, then try again")
        }
        _ => plain().hint("see dom0's kernel log"),
    };
    failure.on(vf.address)
}

/// Settings as text, for example `mac 52:54:00:aa:bb:01, vlan 100`.
pub fn described(settings: &VfSettings) -> String {
    let words: Vec<String> =
        settings.words().into_iter().map(|(name, value)| format!("{name} {value}")).collect();
    words.join(", ")
}

/// The difference between the wanted and the reported settings, as text.
pub fn deviation(wanted: &VfSettings, found: &VfSettings) -> Option<String> {
    let unlike = wanted.unlike(found);
    (!unlike.is_empty()).then(|| {
        let instead = described(&found.only(&unlike));
        let instead = if instead.is_empty() { "no value".to_owned() } else { instead };
        format!("{instead} instead of {}", described(&unlike))
    })
}

/// Applies the settings that the administrator requests for a held or attached VF. Returns warnings, or `None` if all settings are in
/// force already. After a failure, the record and the VF are unchanged.
pub fn change(
    platform: &Platform,
    journal: &Journal,
    record: &mut Record,
    wishes: VfSettings,
) -> Result<Option<Vec<String>>, Failure> {
    let seen = read_one(platform, record.address)?;
    let present = seen.settable()?;
    let earlier = record.network.clone();
    let old = earlier.clone().unwrap_or_default();
    if wishes.unlike(&old.wished).is_empty() && wishes.unlike(&present).is_empty() {
        return Ok(None);
    }
    // Written to the journal first, because only a change with a record can be undone.
    let before = old.before.or(present.only(&wishes));
    record.network =
        Some(NetworkRecord { wished: wishes.or(old.wished), before, problem: None, ..old.clone() });
    let write =
        |record: &Record| journal.write(record).map_err(|error| Failure::from(error).on(record.address));
    let network = platform.network.as_ref();
    if let Err(failure) = write(record).and_then(|()| put(network, seen.vf, &wishes, &present)) {
        record.network = earlier;
        return Err(both(failure, write(record).err()));
    }
    let mut warnings = Vec::new();
    let unknown = wishes.unlike(&wishes.only(&before));
    if !unknown.is_empty() {
        warnings.push(format!(
            "the PF's driver does not report the settings before {}; they cannot be restored",
            described(&unknown)
        ));
    }
    warnings.extend(unconfirmed(platform, record.address, &wishes));
    Ok(Some(warnings))
}

/// Settings that the driver accepted but does not report.
fn unconfirmed(platform: &Platform, address: Sbdf, wishes: &VfSettings) -> Option<String> {
    match read_one(platform, address) {
        Ok(now) => deviation(wishes, &now.settings.unwrap_or_default()).map(|deviation| {
            format!("the PF's driver took the network settings of {address}, but reports {deviation}")
        }),
        Err(failure) => Some(format!("the network settings of {address} cannot be verified: {failure}")),
    }
}

/// The settings for a VF: those of 'vf set --persist', and for the others those of the service's settings.
fn configured(
    platform: &Platform,
    (settings, persistent): (&Settings, &PersistentSettings),
    vf: VfPlace,
) -> Result<VfSettings, Failure> {
    let host = platform.host.as_ref();
    let own = persistent.of(host, &host.function(vf.address)?).map(|one| one.network);
    Ok(own.unwrap_or_default().or(settings.network(host, vf)?))
}

/// Applies configured settings to VFs that were just created.
pub fn prepare(
    platform: &Platform,
    (settings, persistent): (&Settings, &PersistentSettings),
    pf: Sbdf,
    vfs: &[Sbdf],
) -> Result<(), Failure> {
    let mut seen = None;
    for (index, address) in vfs.iter().enumerate() {
        let vf = VfPlace { address: *address, physical_function: pf, index: index as u16 };
        let wanted = configured(platform, (settings, persistent), vf)?;
        if wanted.is_empty() {
            continue;
        }
        let found = match &seen {
            Some(found) => found,
            None => seen.insert(platform.network.vf_settings(pf)?),
        };
        let settings = found.as_ref().and_then(|network| network.vfs.get(&vf.index).copied());
        let interface = found.as_ref().map(|network| network.interface.clone());
        put(platform.network.as_ref(), vf, &wanted, &Reported { vf, interface, settings }.settable()?)?;
    }
    Ok(())
}

/// Applies the settings before a guest gets the VF. A failure fails the attachment, because the guest must not run with another VLAN or
/// address than requested.
pub(super) fn apply(context: &Context<'_>, record: &mut Record) -> Result<Option<String>, Failure> {
    let mut network = record.network.clone().unwrap_or_default();
    network.configured = match place(context.platform, record.address) {
        Ok(vf) => configured(context.platform, (context.settings, context.persistent_settings), vf)?,
        // It is no VF.
        Err(failure) if failure.code == ErrorCode::Refused => VfSettings::default(),
        Err(failure) => return Err(failure),
    };
    let wanted = network.wanted();
    if wanted.is_empty() {
        return Ok(None);
    }
    (context.progress)(&format!("setting the network of {}", record.address));
    let seen = read_one(context.platform, record.address)?;
    let present = seen.settable()?;
    // Written to the journal first, because only a change with a record can be undone.
    network.before = network.before.or(present.only(&wanted));
    record.network = Some(network);
    context.write(record)?;
    put(context.platform.network.as_ref(), seen.vf, &wanted, &present)?;
    Ok(unconfirmed(context.platform, record.address, &wanted))
}

/// Restores settings that a reset by the guest has lost. Settings that are in force are not set again, because the guest can cause this
/// as often as it likes and drivers log each change.
pub fn reapply(platform: &Platform, address: Sbdf, network: Option<&NetworkRecord>) -> Result<(), Failure> {
    let Some(wanted) = network.map(NetworkRecord::wanted).filter(|wanted| !wanted.is_empty()) else {
        return Ok(());
    };
    let seen = read_one(platform, address)?;
    let present = seen.settable()?;
    put(platform.network.as_ref(), seen.vf, &wanted.unlike(&present), &present)
}

/// Reports and undoes what the guest changed in the settings. A failure is only a warning, because the next attachment sets them again,
/// or fails.
pub(super) fn verify(context: &Context<'_>, record: &Record) -> Option<String> {
    let network = record.network.as_ref().filter(|network| !network.wanted().is_empty())?;
    if context.left_the_host(record) {
        return None;
    }
    let seen = read_one(context.platform, record.address).ok()?;
    let differs = deviation(&network.wanted(), &seen.settings?)?;
    let undone = match reapply(context.platform, record.address, Some(network)) {
        Ok(()) => String::new(),
        Err(failure) => format!("; it stays so until the next attach: {}", failure.message),
    };
    let text = format!("the guest had changed the network settings of {}: {differs}{undone}", record.address);
    warn!("{text}");
    Some(text)
}

/// Restores the settings from before the first change. A failure does not prevent that the VF goes back to dom0; it is in the record and
/// in the warning.
pub(super) fn restore(context: &Context<'_>, record: &mut Record) -> Result<Option<String>, Failure> {
    if context.left_the_host(record) {
        // The settings were lost with the VF; another one at its address has its own.
        record.network = None;
    }
    let Some(network) = &mut record.network else { return Ok(None) };
    let before = network.before;
    let failures = match read_one(context.platform, record.address) {
        Ok(seen) => match seen.settable() {
            Ok(present) => put_back(context.platform.network.as_ref(), seen.vf, &before, &present),
            Err(failure) => vec![failure],
        },
        Err(failure) => vec![failure],
    };
    let Some(failure) = failures.into_iter().reduce(|first, next| both(first, Some(next))) else {
        record.network = None;
        return Ok(None);
    };
    let warning = format!(
        "the network settings of {} could not be restored to {}: {}; set them with 'ip link set'",
        record.address,
        described(&before),
        failure.message
    );
    warn!("{warning}");
    network.problem = Some(warning.clone());
    Ok(Some(warning))
}
