//! dom0 has the PF: `xpci mailbox` is on its side.

use anyhow::{Result, ensure};
use xpci_tests::host::state::{kill_and_start, make_held, no_problems};
use xpci_tests::host::{SOON, VFS, xpci};

use super::VfInAGuest;

const POLICY: &str = "match: {vendor: 8086, function: virtual}\nmailbox: dom0\n";

pub fn dom0_exchanges_data_objects_with_the_guest_across_a_kill_of_the_service(
    scene: &mut VfInAGuest<'_>,
) -> Result<()> {
    const DEVICE: &str = "-e /sys/bus/pci/devices/0000:00:00.0";
    let (lab, one) = (scene.lab, &scene.one);
    make_held(lab, VFS[0])?;
    // What was taken from it by force goes later.
    one.wait_for("its last function to go", SOON, &format!("[ ! {DEVICE} ]"))?;
    lab.push(POLICY.as_bytes(), "/etc/xpci/policies/mailbox.yaml")?;
    xpci(lab, "policy reload")?;
    xpci(lab, "pci-attach one 01:10.0")?;
    one.wait_for("the VF", SOON, &format!("[ {DEVICE} ]"))?;
    let mailbox = |words: &str| one.run(&format!("/lab/mailbox 0000:00:00.0 {words}")).limit(SOON * 2).ok();
    let follower = lab.spawn("xpci mailbox receive --follow 01:00.0")?;
    ensure!(mailbox("send 0 7 1 hello")?.trim() == "status 0", "the guest cannot send");
    follower.wait_output("0000:01:10.0 type 7 sequence 1: 68656c6c6f 'hello'\n", SOON)?;
    xpci(lab, "mailbox send --type 8 --sequence 2 01:10.0 'to the VF'")?;
    kill_and_start(lab, &mut scene.service)?;
    let received = mailbox("receive")?;
    ensure!(received.trim() == "vf 0 type 8 sequence 2 to the VF", "{received}");
    ensure!(mailbox("send 0 7 3 again")?.trim() == "status 0", "the guest cannot send");
    follower.wait_output("0000:01:10.0 type 7 sequence 3: 616761696e 'again'\n", SOON)?;
    drop(follower);
    no_problems(lab)
}
