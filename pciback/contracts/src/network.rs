//! Contracts of the VFs' network settings: of a PF that is a network card with its own driver, and of any other.

use nix::errno::Errno;
use pciback::platform::network::{LinkState, Vlan};
use pciback::platform::{VfPlace, VfSetting, VfSettings};

use crate::Needs::Nothing;
use crate::{Broken, Contract, Fixture, UNKNOWN, ok, refused, same, undone};

pub const CONTRACTS: &[Contract] = &[
    ("network/every-vf-is-reported", Nothing, reported),
    ("network/what-is-set-is-reported", Nothing, set),
    ("network/what-a-driver-cannot-do-is-refused", Nothing, unsupported),
    ("network/pf-without-interface-has-no-settings", Nothing, without_interface),
];

/// Whether the PF has a network interface; its VFs have settings then, and only then.
fn is_card(fixture: &Fixture) -> Result<bool, Broken> {
    Ok(!ok(fixture.platform.host.function(fixture.pf))?.interfaces.is_empty())
}

fn place(fixture: &Fixture) -> Result<VfPlace, Broken> {
    let vfs = ok(fixture.platform.host.function(fixture.pf))?.virtual_functions;
    let index = vfs.iter().position(|vf| *vf == fixture.vf).ok_or("the VF is not among its PF's")?;
    Ok(VfPlace { address: fixture.vf, physical_function: fixture.pf, index: index as u16 })
}

fn settings(fixture: &Fixture, vf: VfPlace) -> Result<VfSettings, Broken> {
    let network = ok(fixture.platform.network.vf_settings(fixture.pf))?.ok_or("the PF has no interface")?;
    network.vfs.get(&vf.index).copied().ok_or_else(|| format!("VF {} is not reported", vf.index))
}

fn reported(fixture: &Fixture) -> Result<(), Broken> {
    if !is_card(fixture)? {
        return same("reported", ok(fixture.platform.network.vf_settings(fixture.pf))?, None);
    }
    let pf = ok(fixture.platform.host.function(fixture.pf))?;
    let network = ok(fixture.platform.network.vf_settings(fixture.pf))?.ok_or("the PF has no interface")?;
    same("the interface", pf.interfaces.contains(&network.interface), true)?;
    let indices: Vec<u16> = network.vfs.keys().copied().collect();
    same("the VFs", indices, (0..pf.num_vfs).collect())?;
    // The link state has no value for "unknown"; the others are what the 82576's driver has.
    let vf = settings(fixture, place(fixture)?)?;
    let known = [vf.mac.is_some(), vf.vlan.is_some(), vf.spoof_check.is_some(), vf.trust.is_some()];
    same("what is known of a VF", (known, vf.max_rate, vf.min_rate), ([true; 4], Some(0), Some(0)))
}

fn set(fixture: &Fixture) -> Result<(), Broken> {
    let (network, vf) = (&fixture.platform.network, place(fixture)?);
    if !is_card(fixture)? {
        return refused("set", network.set_vf_setting(vf, VfSetting::Trust(true)), &[Errno::ENODEV]);
    }
    let before = settings(fixture, vf)?;
    let wished = VfSettings {
        mac: "52:54:00:0c:0c:0c".parse().ok(),
        vlan: Some(Vlan { id: 77, qos: 5 }),
        spoof_check: before.spoof_check.map(|on| !on),
        trust: before.trust.map(|on| !on),
        ..VfSettings::default()
    };
    let each = |wished: &VfSettings| {
        wished.each(&before).into_iter().try_for_each(|setting| {
            ok(network.set_vf_setting(vf, setting))?;
            // Twice is as good as once.
            ok(network.set_vf_setting(vf, setting))
        })
    };
    undone(
        || {
            each(&wished)?;
            same("as set, the rest as before", settings(fixture, vf)?, wished.or(before))
        },
        || {
            each(&before.only(&wished))?;
            same("as before", settings(fixture, vf)?, before)
        },
    )
}

fn unsupported(fixture: &Fixture) -> Result<(), Broken> {
    let (network, vf) = (&fixture.platform.network, place(fixture)?);
    if !is_card(fixture)? {
        return refused("set", network.set_vf_setting(vf, VfSetting::Trust(true)), &[Errno::ENODEV]);
    }
    let before = settings(fixture, vf)?;
    let link = network.set_vf_setting(vf, VfSetting::LinkState(LinkState::Disable));
    refused("a link state of its own", link, &[Errno::EOPNOTSUPP])?;
    let guaranteed = network.set_vf_setting(vf, VfSetting::Rate { min: 10, max: 0 });
    refused("a guaranteed rate", guaranteed, &[Errno::EINVAL])?;
    let beyond = VfPlace { index: 200, ..vf };
    refused("a VF beyond", network.set_vf_setting(beyond, VfSetting::Trust(true)), &[Errno::EINVAL])?;
    same("nothing changed", settings(fixture, vf)?, before)
}

fn without_interface(fixture: &Fixture) -> Result<(), Broken> {
    let (network, vf) = (&fixture.platform.network, place(fixture)?);
    let nowhere = VfPlace { physical_function: UNKNOWN, ..vf };
    same("reported", ok(network.vf_settings(UNKNOWN))?, None)?;
    refused("set", network.set_vf_setting(nowhere, VfSetting::Trust(true)), &[Errno::ENODEV])
}
