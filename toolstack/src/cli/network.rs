//! `xpci vf set` and `xpci vf show`.

use clap::{Args, ValueEnum};
use pciback::Sbdf;
use pciback::platform::VfSettings;
use pciback::platform::network::{LinkState, MacAddress, Vlan};

use super::table::table;
use crate::protocol::{Request, SriovView, VfNetworkView};
use crate::target::Target;

/// The arguments of `vf set`.
#[derive(Debug, Args)]
pub struct SetArguments {
    /// The VF.
    #[arg(value_name = "VF")]
    pub address: Target,
    /// Persistently: also after a reboot of the host, until pci-assignable-remove.
    #[arg(long)]
    persist: bool,
    #[command(flatten)]
    settings: SettingArguments,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = true)]
struct SettingArguments {
    /// The MAC address; 00:00:00:00:00:00 leaves it to the guest.
    #[arg(long)]
    mac: Option<MacAddress>,
    /// The VLAN (1-4094; 0: none) and priority (0-7) of its packets; the guest does not see the tag.
    #[arg(long, value_name = "ID[:QOS]")]
    vlan: Option<Vlan>,
    /// Whether packets with another source address are dropped.
    #[arg(long, value_enum)]
    spoof_check: Option<Switch>,
    /// Whether the PF's driver lets the guest change what it otherwise protects, for example the MAC address.
    #[arg(long, value_enum)]
    trust: Option<Switch>,
    /// The maximum transmit rate, in Mbit/s; 0: no limit.
    #[arg(long, value_name = "MBIT")]
    max_rate: Option<u32>,
    /// The guaranteed transmit rate, in Mbit/s.
    #[arg(long, value_name = "MBIT")]
    min_rate: Option<u32>,
    /// The link state that the guest sees: that of the PF, always up, or always down.
    #[arg(long, value_enum)]
    link_state: Option<Link>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Switch {
    On,
    Off,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Link {
    Auto,
    Enable,
    Disable,
}

impl SetArguments {
    /// The request.
    pub(super) fn request(self) -> Request<Target> {
        let given = self.settings;
        let link = |link| match link {
            Link::Auto => LinkState::Auto,
            Link::Enable => LinkState::Enable,
            Link::Disable => LinkState::Disable,
        };
        let settings = VfSettings {
            mac: given.mac,
            vlan: given.vlan,
            spoof_check: given.spoof_check.map(|switch| switch == Switch::On),
            trust: given.trust.map(|switch| switch == Switch::On),
            max_rate: given.max_rate,
            min_rate: given.min_rate,
            link_state: given.link_state.map(link),
        };
        Request::VfSet { address: self.address, settings, persist: self.persist }
    }
}

/// The settings of a VF, as text.
pub(super) fn vf_network(view: &VfNetworkView) -> String {
    let state = match (view.domain, &view.domain_name) {
        (Some(domain), Some(name)) => format!("{}, '{name}', domain {domain}", view.state),
        (Some(domain), None) => format!("{}, domain {domain}", view.state),
        (None, _) => view.state.to_string(),
    };
    let head = format!("{} ({state}) is VF {} of {}", view.address, view.index, view.physical_function);
    let Some(interface) = &view.interface else {
        return format!("{head}, which has no network interface: there are no network settings\n");
    };
    let Some(in_force) = &view.in_force else {
        return format!("{head} ({interface}), whose driver reports no network settings of VFs\n");
    };
    let value = |settings: &VfSettings, name: &str| {
        let found = settings.words().into_iter().find(|(word, _)| *word == name);
        found.map_or_else(|| "-".to_owned(), |(_, value)| value)
    };
    // Settings that the driver does not report may be requested, too.
    let names = in_force.or(view.wished).words().into_iter().map(|(name, _)| name);
    let row = |name: &str| {
        let differs = view.differing.iter().any(|differing| differing == name);
        vec![
            name.to_owned(),
            value(in_force, name),
            value(&view.wished, name),
            value(&view.before, name),
            if differs { "not as requested".to_owned() } else { String::new() },
        ]
    };
    let titles = ["SETTING", "IN FORCE", "REQUESTED", "BEFORE", "NOTE"].map(str::to_owned).to_vec();
    let rows: Vec<_> = std::iter::once(titles).chain(names.map(row)).collect();
    format!("{head} ({interface})\n{}", table(&rows))
}

/// The settings in the order of the columns.
const COLUMNS: [&str; 7] = ["mac", "vlan", "spoof-check", "trust", "max-rate", "min-rate", "link-state"];

/// The SR-IOV capability of a PF, as text.
fn sriov_text(sriov: &SriovView) -> String {
    let names = |names: &[String]| if names.is_empty() { "-".to_owned() } else { names.join(", ") };
    let SriovView { num_vfs, initial_vfs, total_vfs, first_vf_offset, vf_stride, .. } = sriov;
    format!(
        "VFs:           NumVFs {num_vfs}, InitialVFs {initial_vfs}, TotalVFs {total_vfs}, First VF Offset {first_vf_offset}, VF Stride {vf_stride}\n\
         Capabilities:  {}\nControl:       {}\nStatus:        {}\n",
        names(&sriov.capabilities),
        names(&sriov.control),
        names(&sriov.status)
    )
}

/// The SR-IOV capability of a PF and the settings of all its VFs, as text, with requested values that differ.
pub(super) fn vf_networks(
    physical_function: Sbdf,
    sriov: Option<&SriovView>,
    vfs: &[VfNetworkView],
) -> String {
    let sriov = sriov.map(sriov_text).unwrap_or_default();
    let Some(first) = vfs.first() else {
        return format!("{physical_function} has no VFs enabled\n{sriov}");
    };
    let head = match &first.interface {
        Some(interface) => format!("VFs of {physical_function} ({interface})"),
        None => format!(
            "VFs of {physical_function}, which has no network interface: there are no network settings"
        ),
    };
    let mut titles = ["VF", "FUNCTION", "STATE", "GUEST"].map(str::to_owned).to_vec();
    titles.extend(COLUMNS.map(str::to_uppercase));
    titles.push("REQUESTED INSTEAD".to_owned());
    let row = |view: &VfNetworkView| {
        let words = |settings: &VfSettings| settings.words();
        let in_force = view.in_force.as_ref().map(words).unwrap_or_default();
        let value = |name: &str| {
            let found = in_force.iter().find(|(word, _)| *word == name);
            found.map_or_else(|| "-".to_owned(), |(_, value)| value.clone())
        };
        let instead = words(&view.wished)
            .into_iter()
            .filter(|(name, _)| view.differing.iter().any(|other| other == name));
        let instead: Vec<String> = instead.map(|(name, value)| format!("{name} {value}")).collect();
        let number = || view.domain.map_or_else(|| "-".to_owned(), |domain| domain.to_string());
        let guest = view.domain_name.clone().unwrap_or_else(number);
        let mut cells = vec![view.index.to_string(), view.address.to_string(), view.state.to_string(), guest];
        cells.extend(COLUMNS.iter().map(|name| value(name)));
        cells.push(instead.join(", "));
        cells
    };
    let rows: Vec<_> = std::iter::once(titles).chain(vfs.iter().map(row)).collect();
    format!("{head}\n{sriov}{}", table(&rows))
}
