//! Frontends that publish nonsense, jump between states, leave or die at the wrong moment. Each time the backend says what is
//! wrong, goes back to Initialised and waits; the service lives on, another guest is served, and a correct frontend connects.

use anyhow::{Context, Result, ensure};
use xpci_tests::host::SOON;
use xpci_tests::{Guest, Process};

use crate::script::{Frontend, hex};

/// What is published instead of the right thing; `None`: nothing.
struct Lie<'a> {
    key: &'a str,
    value: Option<&'a [u8]>,
    /// What the service says of it.
    said: String,
}

/// Everybody who is there while one guest lies.
pub struct Scene<'a> {
    pub liar: &'a Guest<'a>,
    pub other: &'a Guest<'a>,
    pub service: &'a Process,
}

impl Scene<'_> {
    /// The service is alive and serves the other guest.
    fn others_are_served(&self) -> Result<()> {
        ensure!(self.service.ended().is_none(), "the service ended: {}", self.service.output_so_far());
        let identity = self.other.run("setpci -s 00:00.0 0.l 4.l >/tmp/read && head -n 1 /tmp/read").ok()?;
        ensure!(identity.trim() == "10ca8086", "the other guest reads {identity}");
        Ok(())
    }

    fn is_said(&self, text: &str) -> Result<()> {
        self.service.wait_output(text, SOON).map(drop)
    }

    /// The frontend that has lied begins anew and is served.
    fn is_forgiven(&self, frontend: &mut Frontend) -> Result<()> {
        frontend.connect()?;
        let answer = frontend.tell("r 0 4")?;
        ensure!(answer == "0 10ca8086", "after all it reads {answer}");
        self.others_are_served()
    }
}

/// One node after the other has a value that no frontend should write; the others are right.
pub fn nodes(scene: &Scene<'_>, domain: u32, bound_port: &str) -> Result<()> {
    let long = [b'9'; 2000];
    let lie = |key, value: &'static [u8], said: &str| Lie { key, value: Some(value), said: said.to_owned() };
    let wrong = |key: &str, value: &str| format!("it published nonsense: {key} is {value}");
    let mut lies = vec![
        lie("magic", b"8", &wrong("magic", "'8', not '7'")),
        lie("magic", b"7 ", &wrong("magic", "'7 ', not '7'")),
        lie("magic", b"\xff\x00\x1b[2J", &wrong("magic", r"'\u{fffd}\u{0}\u{1b}[2J', not '7'")),
        lie("pci-op-ref", b"0", &wrong("pci-op-ref", "'0'")),
        lie("pci-op-ref", b"-1", &wrong("pci-op-ref", "'-1'")),
        lie("pci-op-ref", b"0x8", &wrong("pci-op-ref", "'0x8'")),
        lie("pci-op-ref", b"eight", &wrong("pci-op-ref", "'eight'")),
        lie("pci-op-ref", b"4294967296", &wrong("pci-op-ref", "'4294967296'")),
        lie("pci-op-ref", b"00000000008", &wrong("pci-op-ref", "'00000000008'")),
        lie("event-channel", b"0", &wrong("event-channel", "'0'")),
        lie("event-channel", b" 5", &wrong("event-channel", "' 5'")),
        lie("event-channel", b"18446744073709551616", &wrong("event-channel", "'18446744073709551616'")),
        lie("event-channel", b"\x00", &wrong("event-channel", "''")),
    ];
    for key in ["magic", "pci-op-ref", "event-channel"] {
        let shown = "9".repeat(24);
        lies.push(Lie { key, value: Some(&long), said: wrong(key, &format!("'{shown}'")) });
        lies.push(Lie { key, value: None, said: wrong(key, "''") });
    }
    let unusable = |what: String| format!("domain {domain}: its ring cannot be used: {what}");
    // No grant of that number exists; the table does not reach that far.
    for grant in ["4095", "65535", "4294967295"] {
        let said = unusable(format!("map the page that domain {domain} grants as {grant}"));
        lies.push(Lie { key: "pci-op-ref", value: Some(grant.as_bytes()), said });
    }
    // No port of that number exists; none can; it is the console's.
    for port in ["4000", "4294967295", bound_port] {
        let said = unusable(format!("bind event channel port {port} of domain {domain}"));
        lies.push(Lie { key: "event-channel", value: Some(port.as_bytes()), said });
    }
    for lie in &lies {
        let shown = lie.value.map(|value| String::from_utf8_lossy(&value[..value.len().min(20)]));
        told(scene, lie).with_context(|| format!("{} is {shown:?}", lie.key))?;
    }
    println!("  {} kinds of nonsense", lies.len());
    // More than xenstore takes does not come as far as the backend.
    let mut frontend = Frontend::start(scene.liar)?;
    for length in [3000, 4090] {
        let answer = frontend.tell(&format!("node magic {}", hex(vec![b'7'; length])))?;
        ensure!(answer != "ok", "xenstore took {length} bytes");
    }
    scene.is_forgiven(&mut frontend)?;
    frontend.leave()
}

/// A lie leads to a line in the log and to nothing else.
fn told(scene: &Scene<'_>, lie: &Lie<'_>) -> Result<()> {
    let heard = scene.service.output_so_far().matches(&lie.said).count();
    let mut frontend = Frontend::start(scene.liar)?;
    frontend.state(1)?;
    frontend.follows(3)?;
    frontend.tell("publish")?;
    let answer = match lie.value {
        Some(value) => frontend.tell(&format!("node {} {}", lie.key, hex(value)))?,
        None => frontend.tell(&format!("gone {}", lie.key))?,
    };
    ensure!(answer == "ok", "{answer}");
    ensure!(heard == 0, "it was said before: {}", lie.said);
    frontend.state(3)?;
    scene.is_said(&lie.said)?;
    frontend.follows(3)?;
    scene.others_are_served()?;
    // It is not said again and again.
    frontend.state(4)?;
    scene.is_forgiven(&mut frontend)?;
    let said = scene.service.output_so_far().matches(&lie.said).count();
    ensure!(said <= 2, "it is said {said} times: {}", lie.said);
    frontend.leave()
}

/// States that do not follow from one another.
pub fn states(scene: &Scene<'_>) -> Result<()> {
    let mut frontend = Frontend::start(scene.liar)?;
    let reads = |frontend: &mut Frontend| -> Result<()> {
        let answer = frontend.tell("r 0 4")?;
        ensure!(answer == "0 10ca8086", "it reads {answer}");
        Ok(())
    };
    println!("  Connected from the start, without a ring and then with one");
    for key in ["magic", "pci-op-ref", "event-channel"] {
        frontend.tell(&format!("gone {key}"))?;
    }
    for state in [4, 7, 8, 5, 99, 3] {
        frontend.state(state)?;
        frontend.follows(3)?;
    }
    frontend.state(4)?;
    frontend.tell("publish")?;
    frontend.follows(4)?;
    reads(&mut frontend)?;
    println!("  Reconfiguring that nobody asked for");
    frontend.state(7)?;
    frontend.follows(8)?;
    reads(&mut frontend)?;
    frontend.state(4)?;
    frontend.follows(4)?;
    println!("  states that do not exist");
    for state in ["9", "99", "4294967295"] {
        frontend.node("state", state)?;
        reads(&mut frontend)?;
    }
    frontend.state(4)?;
    reads(&mut frontend)?;
    for state in ["four", "", "-4", "4.0", "42949672960", "\u{0}4"] {
        frontend.node("state", state)?;
        frontend.follows(3).with_context(|| format!("state '{state}'"))?;
        frontend.state(3)?;
        frontend.follows(4)?;
        frontend.state(4)?;
        reads(&mut frontend)?;
    }
    println!("  states that go backwards");
    for state in [0, 1, 2, 3, 5, 6] {
        frontend.state(state)?;
        // Initialised with the ring that is connected asks for it anew, and is at once given it.
        frontend.follows(if state == 3 { 4 } else { 3 })?;
        frontend.state(4)?;
        frontend.follows(4)?;
        reads(&mut frontend)?;
    }
    println!("  its state is gone; its ring is somewhere else");
    frontend.tell("gone state")?;
    frontend.follows(3)?;
    frontend.state(4)?;
    frontend.follows(4)?;
    frontend.node("event-channel", "1000000000")?;
    scene.is_said("bind event channel port 1000000000")?;
    frontend.follows(3)?;
    frontend.tell("publish")?;
    frontend.follows(4)?;
    reads(&mut frontend)?;
    println!("  300 changes of state without waiting for anybody");
    let flaps = "node state 36\nnode state 33\n".repeat(150);
    frontend.tell(flaps.trim_end())?;
    scene.others_are_served()?;
    scene.is_forgiven(&mut frontend)?;
    frontend.leave()
}

/// Frontends that end without a word, while they use what they have; the next one finds it switched off.
pub fn deaths(scene: &Scene<'_>) -> Result<()> {
    for _ in 0..3 {
        let mut frontend = Frontend::start(scene.liar)?;
        scene.is_forgiven(&mut frontend)?;
        let enabled = frontend.tell("op 4 0 0 0 0 0 3 0 0 1 2\nr 72 2\nw 4 2 6\nr 4 2")?;
        ensure!(enabled.contains("\n0 8002\n0 6\n0 6"), "MSI-X and bus mastering: {enabled}");
        frontend.kill()?;
        let mut next = Frontend::start(scene.liar)?;
        scene.is_forgiven(&mut next)?;
        let found = next.tell("r 72 2\nr 4 2")?;
        ensure!(found == "0 2\n0 2", "the next frontend finds {found}");
        next.kill()?;
    }
    let mut last = Frontend::start(scene.liar)?;
    scene.is_forgiven(&mut last)?;
    last.leave()
}
