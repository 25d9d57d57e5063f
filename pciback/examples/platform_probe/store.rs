//! xenstore: nodes, permissions, transactions, watches.

use std::thread;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use pciback::DomId;
use pciback::platform::{Cause, Permissions, PlatformError, Result, Store};

use super::{Subject, say};

const ROOT: &str = "/tool/platform-probe";

pub fn probe(store: &dyn Store, subject: &Subject) -> Result<()> {
    let node = |name: &str| format!("{ROOT}/{name}");
    say("read missing", store.read(&node("a")));
    say("list missing", store.list(&node("a")));
    say("remove missing", store.remove(&node("a")));
    say("remove missing below missing", store.remove(&node("a/b/c")));
    say("permissions of missing", store.permissions(&node("a")));
    say(
        "set permissions of missing",
        store.set_permissions(&node("a"), &Permissions::backend(subject.guest)),
    );
    say("write", store.write(&node("a/b"), b"value"));
    say("read", store.read(&node("a/b")));
    say("read parent", store.read(&node("a")));
    say("write empty", store.write(&node("a/empty"), b""));
    say("read empty", store.read(&node("a/empty")));
    say("write bytes", store.write(&node("a/bytes"), &[0, 0xff, 10]));
    say("read bytes", store.read(&node("a/bytes")));
    say("list", store.list(&node("a")));
    say("write 2048", store.write(&node("a/long"), &[b'x'; 2048]));
    say("write 4000", store.write(&node("a/long"), &[b'x'; 4000]));
    say("write 5000", store.write(&node("a/long"), &[b'x'; 5000]));
    say("write bad path", store.write(&node("a b"), b""));
    say("write path//", store.write(&format!("{ROOT}//x"), b""));
    say("write path/", store.write(&format!("{ROOT}/x/"), b""));
    say("write with NUL in path", store.write("/tool/a\0b", b""));
    say("read of the root", store.list("/").map(|names| names.len()));
    say("permissions new", store.permissions(&node("a")));
    say("set permissions", store.set_permissions(&node("a"), &Permissions::frontend(subject.guest)));
    say("permissions", store.permissions(&node("a")));
    say("write below the guest's", store.write(&node("a/new"), b""));
    say("permissions below the guest's", store.permissions(&node("a/new")));
    let nobody = Permissions { owner: DomId(999), readers: vec![] };
    say("set permissions to nobody", store.set_permissions(&node("a"), &nobody));
    transactions(store);
    watches(store)?;
    say("remove all", store.remove(ROOT));
    Ok(())
}

fn transactions(store: &dyn Store) {
    let node = |name: &str| format!("{ROOT}/{name}");
    let mut runs = 0;
    let answer = store.transaction(&mut |inside| {
        runs += 1;
        inside.read(&node("counter"))?;
        if runs == 1 {
            store.write(&node("counter"), b"outside")?;
        }
        inside.write(&node("counter"), format!("run {runs}").as_bytes())
    });
    say("transaction with a conflict", answer.map(|()| runs));
    say("its value", store.read(&node("counter")));
    let answer = store.transaction(&mut |inside| {
        inside.write(&node("counter"), b"never")?;
        say("seen inside", inside.read(&node("counter")));
        say("seen outside", store.read(&node("counter")));
        Err(PlatformError::new("give up", "on purpose", Cause::Missing))
    });
    say("transaction that fails", answer);
    say("value after it", store.read(&node("counter")));
    let mut runs = 0;
    let answer = store.transaction(&mut |inside| {
        runs += 1;
        inside.read(&node("counter"))?;
        store.write(&node("counter"), b"outside")?;
        inside.write(&node("counter"), b"inside")
    });
    say("transaction that always conflicts", answer);
    println!("PROBE: it ran {runs} times");
    let answer = store.transaction(&mut |inside| {
        inside.write(&node("fresh/child"), b"1")?;
        inside.set_permissions(&node("fresh"), &Permissions::backend(DomId(1)))?;
        inside.remove(&node("counter"))?;
        say("removed inside", inside.read(&node("counter")));
        Ok(())
    });
    say("transaction with permissions", answer);
    // Several threads on one connection.
    let counted = thread::scope(|scope| {
        let add = || {
            (0..25)
                .filter(|_| {
                    store
                        .transaction(&mut |inside| {
                            let text = inside.read(&node("sum"))?.unwrap_or_default();
                            let sum: u32 = String::from_utf8_lossy(&text).parse().unwrap_or(0);
                            inside.write(&node("sum"), (sum + 1).to_string().as_bytes())
                        })
                        .is_ok()
                })
                .count()
        };
        let (first, second) = (scope.spawn(add), scope.spawn(add));
        first.join().unwrap_or(0) + second.join().unwrap_or(0)
    });
    println!("PROBE: {counted} additions of two threads");
    say("their sum", store.read(&node("sum")));
}

fn watches(store: &dyn Store) -> Result<()> {
    let node = |name: &str| format!("{ROOT}/{name}");
    let ready = |limit: u16| {
        let mut waiting = [PollFd::new(store.event_fd(), PollFlags::POLLIN)];
        matches!(poll(&mut waiting, PollTimeout::from(limit)), Ok(1))
    };
    let drain = |what: &str| {
        let mut seen = Vec::new();
        while ready(300) {
            match store.next_event() {
                Ok(Some(event)) => seen.push(format!("{} {}", event.path, event.token)),
                Ok(None) => seen.push("none".into()),
                Err(error) => println!("PROBE: {what}: {error}"),
            }
            if seen.len() > 20 {
                break;
            }
        }
        println!("PROBE: events {what}: {seen:?}");
    };
    say("next event without a watch", store.next_event());
    say("watch", store.watch(&node("w"), "token"));
    drain("of setting it");
    say("watch again", store.watch(&node("w"), "token"));
    say("watch with another token", store.watch(&node("w"), "second"));
    drain("of the second");
    store.write(&node("w/x"), b"1")?;
    drain("of a write below");
    store.write(&node("wider"), b"1")?;
    drain("of a write beside");
    let answer = store.transaction(&mut |inside| {
        inside.write(&node("w/x"), b"2")?;
        inside.write(&node("w/x"), b"3")
    });
    say("transaction under watch", answer);
    drain("of a transaction with two writes of a node");
    store.set_permissions(&node("w/x"), &Permissions::backend(DomId(1)))?;
    drain("of new permissions");
    store.remove(&node("w"))?;
    drain("of the removal");
    say("unwatch", store.unwatch(&node("w"), "second"));
    say("unwatch again", store.unwatch(&node("w"), "second"));
    say("unwatch of an unknown", store.unwatch(&node("v"), "token"));
    store.write(&node("w"), b"")?;
    drain("with one watch left");
    say("watch @releaseDomain", store.watch("@releaseDomain", "gone"));
    say("watch @nonsense", store.watch("@nonsense", "x"));
    say("watch relative", store.watch("relative", "x"));
    drain("of @releaseDomain and a relative path");
    say("next event at the end", store.next_event());
    Ok(())
}
