//! Frontends that publish nonsense, jump between states, leave or die at the wrong moment. Each time the backend says what is
//! wrong, goes back to Initialised and waits; the service goes on, another guest is served, and a correct frontend connects.

use anyhow::{Context, Result, ensure};
use xpci_tests::host::SOON;
use xpci_tests::host::frontend::Step::{Await, Go, Publish};
use xpci_tests::host::frontend::hex;

use super::Ring;
use super::script::Frontend;

/// The order that reads who the function is, and the answer.
pub const IDENTITY: &str = "r 0 4";
pub const VF: &str = "0 10ca8086";

/// What is published instead of the right thing; `None`: nothing.
struct Lie<'a> {
    key: &'a str,
    value: Option<&'a [u8]>,
    /// What the service says of it.
    said: String,
}

/// One node after the other has a value that no frontend should write; the others are right.
pub fn nodes_with_nonsense_lead_to_a_line_in_the_log(scene: &mut Ring<'_>) -> Result<()> {
    let scene = &*scene;
    let domain = scene.one.domid()?;
    let console = scene.lab.dom0(&format!("xenstore-read /local/domain/{domain}/console/port")).ok()?;
    let bound_port = console.trim();
    let long = [b'9'; 2000];
    let lie = |key, value: &'static [u8], said: &str| Lie { key, value: Some(value), said: said.to_owned() };
    let wrong = |key: &str, value: &str| format!("it published an invalid value: {key} is {value}");
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
        lie("event-channel", b"\x00", &wrong("event-channel", r"'\u{0}'")),
    ];
    for key in ["magic", "pci-op-ref", "event-channel"] {
        let shown = "9".repeat(24);
        lies.push(Lie { key, value: Some(&long), said: wrong(key, &format!("'{shown}'")) });
        lies.push(Lie { key, value: None, said: wrong(key, "''") });
    }
    let unusable = |what: String| format!("domain {domain}: its ring cannot be used: cannot {what}");
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
    let mut frontend = Frontend::start(&scene.one)?;
    for lie in &lies {
        let shown = lie.value.map(|value| String::from_utf8_lossy(&value[..value.len().min(20)]));
        told(scene, &mut frontend, lie).with_context(|| format!("{} is {shown:?}", lie.key))?;
    }
    println!("  {} kinds of nonsense", lies.len());
    // More than xenstore takes does not come as far as the backend.
    for length in [3000, 4090] {
        let answer = frontend.tell(&format!("node magic {}", hex(vec![b'7'; length])))?;
        ensure!(answer != "ok", "xenstore took {length} bytes");
    }
    scene.is_forgiven(&mut frontend)?;
    frontend.leave()
}

/// A lie leads to a line in the log and to nothing else.
fn told(scene: &Ring<'_>, frontend: &mut Frontend, lie: &Lie<'_>) -> Result<()> {
    let times = || scene.service.output_so_far().matches(&lie.said).count();
    ensure!(times() == 0, "it was said before: {}", lie.said);
    let order_of_lie = match lie.value {
        Some(value) => format!("node {} {}", lie.key, hex(value)),
        None => format!("gone {}", lie.key),
    };
    frontend.steps(&[Go(1), Await(3), Publish])?;
    frontend.insist(&order_of_lie, "ok")?;
    frontend.steps(&[Go(3)])?;
    scene.service.wait_output(&lie.said, SOON)?;
    frontend.steps(&[Await(3), Go(4), Await(3)])?;
    scene.is_forgiven(frontend)?;
    // Said again at most for the frontend that went on to Connected with it.
    ensure!(times() <= 2, "it is said {} times: {}", times(), lie.said);
    Ok(())
}

/// States that do not follow from one another.
pub fn states_that_do_not_follow_from_one_another_are_survived(scene: &mut Ring<'_>) -> Result<()> {
    let mut frontend = Frontend::start(&scene.one)?;
    println!("  Connected from the start, without a ring and then with one");
    frontend.tell("gone magic\ngone pci-op-ref\ngone event-channel")?;
    for state in [4, 7, 8, 5, 99, 3] {
        frontend.steps(&[Go(state), Await(3)])?;
    }
    frontend.steps(&[Go(4), Publish, Await(4)])?;
    frontend.insist(IDENTITY, VF)?;
    println!("  Reconfiguring that nobody asked for");
    frontend.steps(&[Go(7), Await(8)])?;
    frontend.insist(IDENTITY, VF)?;
    frontend.steps(&[Go(4), Await(4)])?;
    println!("  states that do not exist");
    for state in ["9", "99", "4294967295", "4"] {
        frontend.node("state", state)?;
        frontend.insist(IDENTITY, VF)?;
    }
    for state in ["four", "", "-4", "4.0", "42949672960", "\u{0}4"] {
        frontend.node("state", state)?;
        frontend.steps(&[Await(3), Go(3), Await(4), Go(4)]).with_context(|| format!("state '{state}'"))?;
        frontend.insist(IDENTITY, VF)?;
    }
    println!("  states that go backwards");
    for state in [0, 1, 2, 3, 5, 6] {
        // Initialised with the ring that is connected asks for it anew, and is at once given it.
        frontend.steps(&[Go(state), Await(if state == 3 { 4 } else { 3 }), Go(4), Await(4)])?;
        frontend.insist(IDENTITY, VF)?;
    }
    println!("  its state is gone; its ring is somewhere else");
    frontend.insist("gone state", "ok")?;
    frontend.steps(&[Await(3), Go(4), Await(4)])?;
    frontend.node("event-channel", "1000000000")?;
    scene.service.wait_output("bind event channel port 1000000000", SOON)?;
    frontend.steps(&[Await(3), Publish, Await(4)])?;
    frontend.insist(IDENTITY, VF)?;
    println!("  300 changes of state without waiting for anybody");
    frontend.steps(&[Go(6), Go(3)].repeat(150))?;
    scene.others_are_served()?;
    scene.is_forgiven(&mut frontend)?;
    frontend.leave()
}

/// Frontends that end without a word, while they use what they have; the next one finds it switched off.
pub fn frontends_that_die_leave_the_function_switched_off(scene: &mut Ring<'_>) -> Result<()> {
    for _ in 0..3 {
        let mut frontend = Frontend::start(&scene.one)?;
        scene.is_forgiven(&mut frontend)?;
        let enabled = frontend.tell("op 4 0 0 0 0 0 3 0 0 1 2\nr 72 2\nw 4 2 6\nr 4 2")?;
        ensure!(enabled.contains("\n0 8002\n0 6\n0 6"), "MSI-X and bus mastering: {enabled}");
        frontend.kill()?;
        let mut next = Frontend::start(&scene.one)?;
        scene.is_forgiven(&mut next)?;
        let found = next.tell("r 72 2\nr 4 2")?;
        ensure!(found == "0 2\n0 2", "the next frontend finds {found}");
        next.kill()?;
    }
    let mut last = Frontend::start(&scene.one)?;
    scene.is_forgiven(&mut last)?;
    last.leave()
}

/// What is on the page besides a request, and requests that come in other ways.
pub fn a_page_full_of_nonsense_is_answered_by_what_is_in_it(scene: &mut Ring<'_>) -> Result<()> {
    let mut frontend = Frontend::start(&scene.one)?;
    println!("  a request that waits since before anybody was connected");
    // Four bytes at 0 of 00:00.0: all other words are 0.
    frontend.insist("poke 7 4\npoke 0 1", "ok\nok")?;
    frontend.connect()?;
    frontend.insist("answer", VF)?;
    println!("  events without requests; flags that are not the backend's");
    frontend.tell(&vec!["kick"; 200].join("\n"))?;
    frontend.insist("poke 0 fffffffe", "ok")?;
    frontend.insist(IDENTITY, VF)?;
    frontend.insist("peek 0", "fffffffe")?;
    println!("  a page of ones");
    let ones: Vec<String> = (1..1024).map(|word| format!("poke {word:x} ffffffff")).collect();
    frontend.tell(&ones.join("\n"))?;
    frontend.insist("poke 0 ffffffff\nkick\nanswer\npeek 0", "ok\nok\n-1 ffffffff\nfffffffe")?;
    // The backend writes its flag and the error here; the value is all ones anyway, and nothing else is its to write.
    let others: Vec<String> =
        (1..1024).filter(|word| *word != 2).map(|word| format!("peek {word:x}")).collect();
    frontend.insist(&others.join("\n"), &vec!["ffffffff"; others.len()].join("\n"))?;
    frontend.insist("poke 0 0", "ok")?;
    frontend.insist(IDENTITY, VF)?;
    scene.others_are_served()?;
    frontend.leave()
}
