//! Network settings of an 82576's VFs, set by xpci through the PF's real driver: what the guest sees of them, whether they are
//! enforced, and that dom0 gets its VF back as it was. S7.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use xpci_tests::host::{
    PF, SOON, VFS, bring_up, builder, guest, nothing_remains, ping, prepare, status, xpci, xpci_fails,
};
use xpci_tests::{Guest, Lab};

const MAC: &str = "52:54:00:aa:bb:01";
const OTHER_MAC: &str = "52:54:00:aa:bb:99";
/// Settings with VFs, the second of which is set.
const SECOND_MAC: &str = "52:54:00:aa:bb:02";
const SETTINGS: &str = "virtual-functions:\n  - \
    {pf: \"01:00.0\", count: 2, vfs: {1: {mac: \"52:54:00:aa:bb:02\", vlan: 100}}}";
/// What igb reports of a VF that nobody has touched.
const NO_MAC: &str = "00:00:00:00:00:00";
/// dom0 and the guest in the PF's untagged network, and in VLAN 100.
const UNTAGGED: [&str; 2] = ["10.9.9.1", "10.9.9.11"];
const TAGGED: [&str; 2] = ["10.9.8.1", "10.9.8.11"];

#[test]
fn of_the_82576_on_xen_4_17() -> Result<()> {
    let lab = builder().boot()?;
    println!("what the settings say is set when the VFs are created");
    lab.dom0(&format!("mkdir -p /etc/xpci && echo '{SETTINGS}' > /etc/xpci/xpcid.yaml")).ok()?;
    let _service = prepare(&lab)?;
    lab.wait_for("its VFs", SOON, &format!("xpci vf show {PF} | grep -q {SECOND_MAC}"))?;
    agrees(&lab, 1, &[SECOND_MAC, "vlan 100"])?;
    let untouched = show(&lab)?;
    ensure!(untouched["in-force"]["mac"] == NO_MAC && untouched["differing"] == json!([]), "{untouched}");

    println!("what cannot be set is refused, and says why");
    mistakes(&lab)?;

    println!("the MAC address that is set is the guest's");
    xpci(&lab, &format!("vf set 01:10.0 --mac {MAC} --spoof-check on --max-rate 500"))?;
    agrees(&lab, 0, &[MAC, "500"])?;
    let one = guest(&lab, "one")?;
    xpci(&lab, "pci-attach one 01:10.0")?;
    bring_up(&one, UNTAGGED[1])?;
    ensure!(mac_of(&one)? == MAC, "{}", mac_of(&one)?);
    ping(&one, UNTAGGED[0])?;
    let view = show(&lab)?;
    ensure!(view["in-force"]["mac"] == MAC && view["differing"] == json!([]), "{view}");

    println!("a guest that is not trusted cannot change it");
    ensure!(change_mac(&one, OTHER_MAC)? != 0 && show(&lab)?["in-force"]["mac"] == MAC, "{}", show(&lab)?);

    println!("a VLAN is put on what the guest sends, which knows nothing of it");
    vlan(&lab, &one)?;

    println!("the settings stay when the guest's driver and the VF come and go");
    one.run("modprobe -r igbvf").ok()?;
    xpci(&lab, "pci-detach one 01:10.0")?;
    xpci(&lab, "pci-attach one 01:10.0")?;
    bring_up(&one, TAGGED[1])?;
    ensure!(mac_of(&one)? == MAC, "{}", mac_of(&one)?);
    ping(&one, TAGGED[0])?;

    println!("a guest that is trusted changes its MAC address: shown, noticed, told at detach and undone");
    one.run("modprobe -r igbvf").ok()?;
    xpci(&lab, "vf set 01:10.0 --trust on --vlan 0")?;
    bring_up(&one, UNTAGGED[1])?;
    ensure!(change_mac(&one, OTHER_MAC)? == 0, "a trusted guest may");
    let view = show(&lab)?;
    ensure!(view["in-force"]["mac"] == OTHER_MAC && view["wished"]["mac"] == MAC, "{view}");
    ensure!(view["differing"] == json!(["mac"]), "{view}");
    // Looked at by itself some time after the guest's driver has started.
    let said = format!(
        "xpci status | grep -q 'other network settings than wished: mac {OTHER_MAC} instead of mac {MAC}'"
    );
    lab.wait_for("the difference in the status", SOON, &said)?;
    let said = xpci(&lab, "pci-detach one 01:10.0")?;
    ensure!(said.contains(&format!("mac {OTHER_MAC} instead of mac {MAC}")), "{said}");
    ensure!(show(&lab)?["in-force"]["mac"] == MAC, "put back at once: {}", show(&lab)?);
    xpci(&lab, "pci-attach one 01:10.0")?;
    bring_up(&one, UNTAGGED[1])?;
    ensure!(mac_of(&one)? == MAC, "{}", mac_of(&one)?);
    xpci(&lab, "pci-detach one 01:10.0")?;
    nothing_remains(&lab, &one)?;

    println!("dom0 has its VF back as it was");
    xpci(&lab, "pci-assignable-remove 01:10.0")?;
    let after = show(&lab)?;
    ensure!(after["in-force"] == untouched["in-force"], "{after}, but it was {untouched}");
    ensure!(status(&lab)?["problems"].as_array().is_some_and(Vec::is_empty), "{}", status(&lab)?);
    Ok(())
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

fn mistakes(lab: &Lab) -> Result<()> {
    // dom0's own VF: nothing would remember what to put back.
    let (code, said) = xpci_fails(lab, &format!("vf set 01:10.0 --mac {MAC}"))?;
    ensure!(code == 5 && said.contains("pci-assignable-add"), "{code}, {said}");
    xpci(lab, "pci-assignable-add 01:10.0")?;
    // igb has no link state of its own for VFs; what came before it in the same command is taken back.
    let before = show(lab)?;
    let (code, said) = xpci_fails(lab, &format!("vf set 01:10.0 --mac {MAC} --link-state disable"))?;
    ensure!(code == 5 && said.contains("the PF's driver cannot do this"), "{code}, {said}");
    ensure!(show(lab)? == before, "{}, but it was {before}", show(lab)?);
    let (code, said) = xpci_fails(lab, "vf set 01:10.0 --min-rate 10")?;
    ensure!(code == 1 && said.contains("many drivers guarantee no minimum"), "{code}, {said}");
    let (code, said) = xpci_fails(lab, "vf show 02:00.0")?;
    ensure!(code == 5 && said.contains("is no VF"), "{code}, {said}");
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

/// With the VLAN the guest reaches dom0 in that VLAN only, and without it again only outside.
fn vlan(lab: &Lab, guest: &Guest<'_>) -> Result<()> {
    let pf = format!("$(ls /sys/bus/pci/devices/{PF}/net)");
    lab.dom0("modprobe 8021q").ok()?;
    lab.dom0(&format!("ip link add link {pf} name tagged type vlan id 100")).ok()?;
    lab.dom0(&format!("ip addr add {}/24 dev tagged && ip link set tagged up", TAGGED[0])).ok()?;
    guest.run(&format!("ip addr add {}/24 dev {INTERFACE}", TAGGED[1])).ok()?;
    unreachable(guest, TAGGED[0]).context("untagged packets must not reach the VLAN")?;

    xpci(lab, "vf set 01:10.0 --vlan 100:3")?;
    let before = received(lab)?;
    ping(guest, TAGGED[0]).context("the VF's packets must arrive with the tag")?;
    ensure!(received(lab)? >= before + 3, "received on the VLAN: {before}, then {}", received(lab)?);
    unreachable(guest, UNTAGGED[0]).context("the VF must not get out of its VLAN")?;
    let view = show(lab)?;
    ensure!(view["in-force"]["vlan"] == "100:3" && view["differing"] == json!([]), "{view}");

    xpci(lab, "vf set 01:10.0 --vlan 0")?;
    ping(guest, UNTAGGED[0])?;
    unreachable(guest, TAGGED[0])?;
    xpci(lab, "vf set 01:10.0 --vlan 100").map(drop)
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
