//! The shared page and the event channel of a guest's stock frontend.

use std::sync::atomic::Ordering;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use pciback::DomId;
use pciback::platform::{Permissions, Platform, Result, Store};

use super::{NOBODY, Subject, say};

/// Places in the shared page, in words of four bytes.
const FLAGS: usize = 0;
const COMMAND: usize = 1;
const ERROR: usize = 2;
const OFFSET: usize = 6;

pub fn probe(platform: &Platform, subject: &Subject) -> Result<()> {
    let guest = subject.guest;
    let store = platform.store.as_ref();
    let backend = format!("/local/domain/0/backend/xpci/{guest}/0");
    let frontend = format!("/local/domain/{guest}/device/pci/0");
    let (ours, theirs) = (Permissions::backend(guest), Permissions::frontend(guest));
    // At once: the frontend looks for its backend as soon as its directory appears, and does not look again.
    store.transaction(&mut |inside| {
        let put = |path: String, value: &str, permissions: &Permissions| -> Result<()> {
            inside.write(&path, value.as_bytes())?;
            inside.set_permissions(&path, permissions)
        };
        put(backend.clone(), "", &ours)?;
        for (name, value) in [
            ("frontend", frontend.as_str()),
            ("frontend-id", &guest.to_string()),
            ("online", "1"),
            ("num_devs", "0"),
            ("root_num", "1"),
            ("root-0", "0000:00"),
            ("state", "3"),
        ] {
            put(format!("{backend}/{name}"), value, &ours)?;
        }
        put(frontend.clone(), "", &theirs)?;
        for (name, value) in [("backend", backend.as_str()), ("backend-id", "0"), ("state", "1")] {
            put(format!("{frontend}/{name}"), value, &theirs)?;
        }
        Ok(())
    })?;
    if !wait_for_state(store, &frontend, "3")? {
        println!("PROBE: the frontend did not become Initialised");
        return Ok(());
    }
    let number = |name: &str| -> Result<u32> {
        let value = store.read(&format!("{frontend}/{name}"))?.unwrap_or_default();
        Ok(String::from_utf8_lossy(&value).parse().unwrap_or(0))
    };
    let (grant, port) = (number("pci-op-ref")?, number("event-channel")?);
    println!("PROBE: grant {grant} port {port}");
    wrong_numbers(platform, guest, grant, port);
    serve(platform, guest, grant, port, || store.write(&format!("{backend}/state"), b"4"))?;
    store.write(&format!("{backend}/state"), b"5")?;
    store.remove(&backend)
}

fn wait_for_state(store: &dyn Store, frontend: &str, wanted: &str) -> Result<bool> {
    let path = format!("{frontend}/state");
    store.watch(&path, "probe")?;
    let mut found = false;
    for _ in 0..100 {
        if store.read(&path)?.as_deref() == Some(wanted.as_bytes()) {
            found = true;
            break;
        }
        let mut waiting = [PollFd::new(store.event_fd(), PollFlags::POLLIN)];
        if !matches!(poll(&mut waiting, PollTimeout::from(60_000u16)), Ok(1)) {
            break;
        }
        while store.next_event()?.is_some() {}
    }
    store.unwatch(&path, "probe")?;
    Ok(found)
}

fn wrong_numbers(platform: &Platform, guest: DomId, grant: u32, port: u32) {
    let connect = |domain, grant, port| platform.rings.connect(domain, grant, port).map(drop);
    say("connect with an unused grant", connect(guest, 400, port));
    say("connect with a grant out of range", connect(guest, u32::MAX, port));
    say("connect with an unused port", connect(guest, grant, 900));
    say("connect with a port out of range", connect(guest, grant, u32::MAX));
    say("connect with port 0", connect(guest, grant, 0));
    say("connect with a port bound elsewhere", connect(guest, grant, 1));
    say("connect with nobody", connect(NOBODY, grant, port));
    say("connect with dom0", connect(DomId::DOM0, grant, port));
    say("connect", connect(guest, grant, port));
    say("connect after a drop", connect(guest, grant, port));
}

fn serve(
    platform: &Platform,
    guest: DomId,
    grant: u32,
    port: u32,
    connected: impl Fn() -> Result<()>,
) -> Result<()> {
    let ring = platform.rings.connect(guest, grant, port)?;
    say("connect a second time", platform.rings.connect(guest, grant, port).map(drop));
    while ring.take_event()? {}
    say("take_event without any", ring.take_event());
    connected()?;
    let (mut events, mut requests) = (0, Vec::new());
    while requests.len() < 5 {
        let mut waiting = [PollFd::new(ring.event_fd(), PollFlags::POLLIN)];
        if !matches!(poll(&mut waiting, PollTimeout::from(5_000u16)), Ok(1)) {
            break;
        }
        while ring.take_event()? {
            events += 1;
        }
        let page = ring.page();
        if page[FLAGS].load(Ordering::Acquire) & 1 != 0 {
            let (command, offset) =
                (page[COMMAND].load(Ordering::Relaxed), page[OFFSET].load(Ordering::Relaxed));
            requests.push((command, offset));
            page[ERROR].store(-1i32 as u32, Ordering::Relaxed);
            page[FLAGS].fetch_and(!1, Ordering::Release);
            ring.notify()?;
        }
    }
    println!("PROBE: {events} events, requests {requests:?}");
    drop(ring);
    say("connect after serving", platform.rings.connect(guest, grant, port).map(drop));
    Ok(())
}
