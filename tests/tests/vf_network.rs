//! Network settings of an 82576's VFs, set by xpci through the PF's real driver: what the guest sees of them, whether they are
//! enforced, and that dom0 gets its VF back as it was.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use xpci_tests::host::state::{keep_running, make_held, no_problems};
use xpci_tests::host::{
    PF, SOON, VFS, bring_up, guest, nothing_remains, ping, prepare, state, xpci, xpci_fails,
};
use xpci_tests::scenes::{Check, Machine, Scene};
use xpci_tests::{Guest, Lab, Process, checks};

use crate::machines::HOST;

const MAC: &str = "52:54:00:aa:bb:01";
const OTHER_MAC: &str = "52:54:00:aa:bb:99";
/// Settings with VFs, the second of which is set.
const SECOND_MAC: &str = "52:54:00:aa:bb:02";
const SETTINGS: &str = "virtual-functions:\n  - \
    {pf: \"01:00.0\", count: 2, vfs: {1: {mac: \"52:54:00:aa:bb:02\", vlan: 100}}}";
/// What igb reports of a VF that has not been touched.
const NO_MAC: &str = "00:00:00:00:00:00";
/// dom0 and the guest in the PF's untagged network, and in VLAN 100.
const UNTAGGED: [&str; 2] = ["10.9.9.1", "10.9.9.11"];
const TAGGED: [&str; 2] = ["10.9.8.1", "10.9.8.11"];

pub struct VfNetwork<'a> {
    lab: &'a Lab,
    service: Process,
    one: Guest<'a>,
    /// The first VF as dom0 had it.
    untouched: Value,
}

impl<'a> Scene<'a> for VfNetwork<'a> {
    const NAME: &'static str = "vf_network";
    const MACHINE: &'static Machine = &HOST;

    fn set_up(lab: &'a Lab) -> Result<Self> {
        lab.push(SETTINGS.as_bytes(), "/etc/xpci/xpcid.yaml")?;
        let service = prepare(lab)?;
        lab.wait_for("its VFs", SOON, &format!("xpci vf show {PF} | grep -q {SECOND_MAC}"))?;
        let untouched = show(lab)?;
        let pf = format!("$(ls /sys/bus/pci/devices/{PF}/net)");
        lab.dom0("modprobe 8021q").ok()?;
        lab.dom0(&format!("ip link add link {pf} name tagged type vlan id 100")).ok()?;
        lab.dom0(&format!("ip addr add {}/24 dev tagged && ip link set tagged up", TAGGED[0])).ok()?;
        Ok(Self { lab, service, one: guest(lab, "one")?, untouched })
    }

    fn checks() -> Vec<Check<Self>> {
        checks![
            settings_are_set_when_the_vfs_are_created,
            a_vf_that_is_dom0s_takes_no_settings,
            what_cannot_be_set_is_refused_and_says_why,
            the_mac_address_that_is_set_is_the_guests,
            an_untrusted_guest_cannot_change_it needs the_mac_address_that_is_set_is_the_guests,
            without_a_vlan_the_guest_does_not_reach_one,
            with_a_vlan_the_guest_reaches_that_alone,
            without_it_again_the_guest_reaches_the_untagged_network,
            settings_stay_when_driver_and_vf_come_and_go,
            a_trusted_guest_changes_its_mac_address_and_the_difference_is_shown,
            detach_tells_of_the_difference_and_undoes_it needs a_trusted_guest_changes_its_mac_address_and_the_difference_is_shown,
            dom0_has_its_vf_back_as_it_was,
            the_service_knows_of_no_problem,
        ]
    }

    fn restore(&mut self) -> Result<()> {
        keep_running(self.lab, &mut self.service)?;
        make_held(self.lab, VFS[0])?;
        in_use(self)
    }
}

/// The VF is in the guest, without a VLAN and with both addresses.
fn in_use(scene: &VfNetwork<'_>) -> Result<()> {
    let (lab, one) = (scene.lab, &scene.one);
    if state(lab, VFS[0])? != "attached" {
        make_held(lab, VFS[0])?;
        xpci(
            lab,
            &format!("vf set 01:10.0 --mac {MAC} --spoof-check on --max-rate 500 --trust off --vlan 0"),
        )?;
        xpci(lab, "pci-attach one 01:10.0")?;
    }
    one.wait_for("the function", SOON, "[ -e /sys/bus/pci/devices/0000:00:00.0 ]")?;
    if mac_of(one).is_err() {
        begins_anew(one)?;
    }
    Ok(())
}

/// The guest's driver starts again, with both addresses.
fn begins_anew(one: &Guest<'_>) -> Result<()> {
    one.run("modprobe -r igbvf").ok()?;
    bring_up(one, UNTAGGED[1])?;
    one.run(&format!("ip addr add {}/24 dev {INTERFACE}", TAGGED[1])).ok().map(drop)
}

fn settings_are_set_when_the_vfs_are_created(scene: &mut VfNetwork<'_>) -> Result<()> {
    agrees(scene.lab, 1, &[SECOND_MAC, "vlan 100"])?;
    let untouched = &scene.untouched;
    ensure!(untouched["in-force"]["mac"] == NO_MAC && untouched["differing"] == json!([]), "{untouched}");
    Ok(())
}

fn the_mac_address_that_is_set_is_the_guests(scene: &mut VfNetwork<'_>) -> Result<()> {
    let (lab, one) = (scene.lab, &scene.one);
    make_held(lab, VFS[0])?;
    xpci(lab, &format!("vf set 01:10.0 --mac {MAC} --spoof-check on --max-rate 500"))?;
    agrees(lab, 0, &[MAC, "500"])?;
    xpci(lab, "pci-attach one 01:10.0")?;
    begins_anew(one)?;
    ensure!(mac_of(one)? == MAC, "{}", mac_of(one)?);
    ping(one, UNTAGGED[0])?;
    let view = show(lab)?;
    ensure!(view["in-force"]["mac"] == MAC && view["differing"] == json!([]), "{view}");
    Ok(())
}

fn an_untrusted_guest_cannot_change_it(scene: &mut VfNetwork<'_>) -> Result<()> {
    let status = change_mac(&scene.one, OTHER_MAC)?;
    let view = show(scene.lab)?;
    ensure!(status != 0 && view["in-force"]["mac"] == MAC, "{status}: {view}");
    Ok(())
}

fn settings_stay_when_driver_and_vf_come_and_go(scene: &mut VfNetwork<'_>) -> Result<()> {
    in_use(scene)?;
    let (lab, one) = (scene.lab, &scene.one);
    xpci(lab, "vf set 01:10.0 --vlan 100")?;
    one.run("modprobe -r igbvf").ok()?;
    xpci(lab, "pci-detach one 01:10.0")?;
    xpci(lab, "pci-attach one 01:10.0")?;
    bring_up(one, TAGGED[1])?;
    ensure!(mac_of(one)? == MAC, "{}", mac_of(one)?);
    ping(one, TAGGED[0])
}

fn a_trusted_guest_changes_its_mac_address_and_the_difference_is_shown(
    scene: &mut VfNetwork<'_>,
) -> Result<()> {
    in_use(scene)?;
    let (lab, one) = (scene.lab, &scene.one);
    one.run("modprobe -r igbvf").ok()?;
    xpci(lab, "vf set 01:10.0 --trust on --vlan 0")?;
    bring_up(one, UNTAGGED[1])?;
    ensure!(change_mac(one, OTHER_MAC)? == 0, "a trusted guest may");
    let view = show(lab)?;
    ensure!(view["in-force"]["mac"] == OTHER_MAC && view["wished"]["mac"] == MAC, "{view}");
    ensure!(view["differing"] == json!(["mac"]), "{view}");
    // Looked at by itself some time after the guest's driver has started.
    let said = format!(
        "xpci status | grep -q 'other network settings than requested: mac {OTHER_MAC} instead of mac {MAC}'"
    );
    lab.wait_for("the difference in the status", SOON, &said)
}

fn detach_tells_of_the_difference_and_undoes_it(scene: &mut VfNetwork<'_>) -> Result<()> {
    let (lab, one) = (scene.lab, &scene.one);
    let said = xpci(lab, "pci-detach one 01:10.0")?;
    ensure!(said.contains(&format!("mac {OTHER_MAC} instead of mac {MAC}")), "{said}");
    ensure!(show(lab)?["in-force"]["mac"] == MAC, "put back at once: {}", show(lab)?);
    xpci(lab, "pci-attach one 01:10.0")?;
    bring_up(one, UNTAGGED[1])?;
    ensure!(mac_of(one)? == MAC, "{}", mac_of(one)?);
    Ok(())
}

fn dom0_has_its_vf_back_as_it_was(scene: &mut VfNetwork<'_>) -> Result<()> {
    let lab = scene.lab;
    make_held(lab, VFS[0])?;
    nothing_remains(lab, &scene.one)?;
    xpci(lab, "pci-assignable-remove 01:10.0")?;
    let (after, before) = (show(lab)?, &scene.untouched);
    ensure!(after["in-force"] == before["in-force"], "{after}, but it was {before}");
    Ok(())
}

fn the_service_knows_of_no_problem(scene: &mut VfNetwork<'_>) -> Result<()> {
    no_problems(scene.lab)
}

/// `xpci vf show` of the first VF.
fn show(lab: &Lab) -> Result<Value> {
    let text = xpci(lab, &format!("vf show {} --json", VFS[0]))?;
    let envelope: Value = serde_json::from_str(&text).with_context(|| text.clone())?;
    Ok(envelope["result"].clone())
}

/// What `ip` shows of a VF has these words, whatever xpci says.
fn agrees(lab: &Lab, index: u8, words: &[&str]) -> Result<()> {
    let links = lab.dom0(&format!("ip link show $(ls /sys/bus/pci/devices/{PF}/net)")).ok()?;
    let vf = links
        .lines()
        .find(|line| line.trim().starts_with(&format!("vf {index} ")))
        .with_context(|| links.clone())?;
    ensure!(words.iter().all(|word| vf.contains(word)), "{vf}");
    Ok(())
}

fn a_vf_that_is_dom0s_takes_no_settings(scene: &mut VfNetwork<'_>) -> Result<()> {
    // Nothing would remember what to put back.
    let (code, said) = xpci_fails(scene.lab, &format!("vf set 01:10.0 --mac {MAC}"))?;
    ensure!(code == 5 && said.contains("pci-assignable-add"), "{code}, {said}");
    Ok(())
}

fn what_cannot_be_set_is_refused_and_says_why(scene: &mut VfNetwork<'_>) -> Result<()> {
    let lab = scene.lab;
    make_held(lab, VFS[0])?;
    // igb has no link state of its own for VFs; what came before it in the same command is taken back.
    let before = show(lab)?;
    let (code, said) = xpci_fails(lab, &format!("vf set 01:10.0 --mac {MAC} --link-state disable"))?;
    ensure!(code == 5 && said.contains("the PF's driver cannot do this"), "{code}, {said}");
    ensure!(show(lab)? == before, "{}, but it was {before}", show(lab)?);
    let (code, said) = xpci_fails(lab, "vf set 01:10.0 --min-rate 10")?;
    ensure!(code == 1 && said.contains("many drivers guarantee no minimum"), "{code}, {said}");
    let (code, said) = xpci_fails(lab, "vf show 02:00.0")?;
    ensure!(code == 5 && said.contains("is not a VF"), "{code}, {said}");
    Ok(())
}

/// The name of the guest's interface.
const INTERFACE: &str = "$(ls /sys/bus/pci/devices/0000:00:00.0/net)";

fn mac_of(guest: &Guest<'_>) -> Result<String> {
    Ok(guest.run(&format!("cat /sys/class/net/{INTERFACE}/address")).ok()?.trim().to_owned())
}

/// The exit status of the guest's attempt.
fn change_mac(guest: &Guest<'_>, mac: &str) -> Result<i32> {
    let change = format!("ip link set {INTERFACE} address {mac}");
    Ok(guest.run(&change).run()?.status())
}

fn without_a_vlan_the_guest_does_not_reach_one(scene: &mut VfNetwork<'_>) -> Result<()> {
    in_use(scene)?;
    unreachable(&scene.one, TAGGED[0])
}

/// Packets are tagged on the way, of which the guest knows nothing.
fn with_a_vlan_the_guest_reaches_that_alone(scene: &mut VfNetwork<'_>) -> Result<()> {
    in_use(scene)?;
    let (lab, one) = (scene.lab, &scene.one);
    xpci(lab, "vf set 01:10.0 --vlan 100:3")?;
    let before = received(lab)?;
    ping(one, TAGGED[0]).context("the VF's packets must arrive with the tag")?;
    ensure!(received(lab)? >= before + 3, "received on the VLAN: {before}, then {}", received(lab)?);
    unreachable(one, UNTAGGED[0]).context("the VF must not get out of its VLAN")?;
    let view = show(lab)?;
    ensure!(view["in-force"]["vlan"] == "100:3" && view["differing"] == json!([]), "{view}");
    Ok(())
}

fn without_it_again_the_guest_reaches_the_untagged_network(scene: &mut VfNetwork<'_>) -> Result<()> {
    in_use(scene)?;
    xpci(scene.lab, "vf set 01:10.0 --vlan 0")?;
    ping(&scene.one, UNTAGGED[0])?;
    unreachable(&scene.one, TAGGED[0])
}

/// Packets that dom0 has got with the VLAN's tag.
fn received(lab: &Lab) -> Result<u64> {
    Ok(lab.dom0("cat /sys/class/net/tagged/statistics/rx_packets").ok()?.trim().parse()?)
}

/// Nothing answers there, not even to the question for its address.
fn unreachable(from: &Guest<'_>, to: &str) -> Result<()> {
    // An answer that was got before the change would be used otherwise.
    from.run(&format!("ip neigh flush all; ! ping -c 2 -w 4 {to}")).ok().map(drop)
}
