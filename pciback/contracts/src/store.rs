//! Contracts of xenstore.

use std::cell::Cell;
use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use pciback::DomId;
use pciback::platform::{Permissions, Platform, Store};

use crate::Needs::Nothing;
use crate::{Broken, Contract, Fixture, NO_DOMAIN, ok, put, refused, same, undone};

/// Everything happens below this node.
pub const TOP: &str = "/local/domain/0/xpci-contract";

pub const CONTRACTS: &[Contract] = &[
    ("store/what-is-missing-is-none", Nothing, missing),
    ("store/write-makes-what-is-above", Nothing, parents),
    ("store/permissions-read-back", Nothing, permissions),
    ("store/bad-paths-and-long-values-are-refused", Nothing, limits),
    ("store/transaction-is-all-or-nothing", Nothing, atomic),
    ("store/transaction-runs-again-on-conflict", Nothing, conflict),
    ("store/new-sibling-is-no-loss", Nothing, siblings),
    ("store/watch-tells-at-once-and-below", Nothing, watch),
    ("store/watch-is-set-once", Nothing, watch_twice),
    ("store/removal-is-told-once", Nothing, removal),
    ("store/commit-tells-once-for-each-node", Nothing, commit_tells),
    ("store/special-watches-exist", Nothing, special),
    ("store/domains-exist-or-not", Nothing, domains),
];

/// Runs below a node that is empty at first and gone afterwards.
fn below(fixture: &Fixture, body: impl FnOnce(&dyn Store) -> Result<(), Broken>) -> Result<(), Broken> {
    let store = &*fixture.platform.store;
    ok(store.remove(TOP))?;
    put(store, TOP, "")?;
    undone(|| body(store), || ok(store.remove(TOP)))
}

fn path(name: &str) -> String {
    format!("{TOP}/{name}")
}

fn missing(fixture: &Fixture) -> Result<(), Broken> {
    below(fixture, |store| {
        same("read", ok(store.read(&path("none")))?, None)?;
        same("list", ok(store.list(&path("none")))?, Vec::new())?;
        same("permissions", ok(store.permissions(&path("none")))?, None)?;
        ok(store.remove(&path("none")))?;
        ok(store.remove(&path("none/below")))?;
        refused(
            "set",
            store.set_permissions(&path("none"), &Permissions::backend(fixture.guest)),
            &[Errno::ENOENT],
        )
    })
}

fn parents(fixture: &Fixture) -> Result<(), Broken> {
    below(fixture, |store| {
        let readable = Permissions::backend(fixture.guest);
        ok(store.set_permissions(TOP, &readable))?;
        put(store, &path("a/b/c"), "value")?;
        same("the node", ok(store.read(&path("a/b/c")))?, Some(b"value".to_vec()))?;
        same("above", ok(store.read(&path("a/b")))?, Some(Vec::new()))?;
        same("children", ok(store.list(&path("a")))?, vec!["b".to_owned()])?;
        same("inherited", ok(store.permissions(&path("a/b/c")))?, Some(readable))?;
        ok(store.remove(&path("a")))?;
        same("below a removed node", ok(store.read(&path("a/b/c")))?, None)
    })
}

fn permissions(fixture: &Fixture) -> Result<(), Broken> {
    below(fixture, |store| {
        put(store, &path("node"), "")?;
        for permissions in [Permissions::frontend(fixture.guest), Permissions::backend(fixture.guest)] {
            ok(store.set_permissions(&path("node"), &permissions))?;
            same("read back", ok(store.permissions(&path("node")))?, Some(permissions))?;
        }
        let missing = Permissions { owner: NO_DOMAIN, readers: Vec::new() };
        refused(
            "an owner that is not there",
            store.set_permissions(&path("node"), &missing),
            &[Errno::ENOENT],
        )
    })
}

fn limits(fixture: &Fixture) -> Result<(), Broken> {
    below(fixture, |store| {
        for bad in [path("a b"), path("a//b"), path("a/"), path("a\u{e4}")] {
            refused(&bad, store.write(&bad, b""), &[Errno::EINVAL])?;
        }
        ok(store.write(&path("long"), &[b'x'; 4000]))?;
        refused("5,000 bytes", store.write(&path("long"), &[b'x'; 5000]), &[Errno::E2BIG])?;
        ok(store.write(&path("bytes"), &[0, 0xff, b'\n']))?;
        same("any bytes", ok(store.read(&path("bytes")))?, Some(vec![0, 0xff, b'\n']))
    })
}

fn atomic(fixture: &Fixture) -> Result<(), Broken> {
    below(fixture, |store| {
        let mut seen_outside = Vec::new();
        ok(store.transaction(&mut |within| {
            within.write(&path("a"), b"1")?;
            within.write(&path("b"), b"2")?;
            seen_outside.push(fixture.other.store.read(&path("a"))?);
            assert_within(within.read(&path("a"))?.as_deref() == Some(b"1"))
        }))?;
        same("outside, before the commit", seen_outside.pop(), Some(None))?;
        same("outside, after it", ok(fixture.other.store.read(&path("b")))?, Some(b"2".to_vec()))?;
        let failed = store.transaction(&mut |within| {
            within.write(&path("a"), b"3")?;
            within.remove(&path("b"))?;
            within.set_permissions(&path("none"), &Permissions::backend(DomId::DOM0))
        });
        refused("a body that fails", failed, &[Errno::ENOENT])?;
        same("nothing changed", ok(store.read(&path("a")))?, Some(b"1".to_vec()))?;
        same("nothing was removed", ok(store.read(&path("b")))?, Some(b"2".to_vec()))
    })
}

/// A promise inside a transaction, where only the platform's errors can leave.
fn assert_within(kept: bool) -> pciback::platform::Result<()> {
    let broken =
        || pciback::platform::PlatformError::new("keep", "the transaction's own view", Errno::EPROTO);
    kept.then_some(()).ok_or_else(broken)
}

fn conflict(fixture: &Fixture) -> Result<(), Broken> {
    below(fixture, |store| {
        put(store, &path("count"), "0")?;
        let runs = Cell::new(0);
        ok(store.transaction(&mut |within| {
            let read = within.read(&path("count"))?.unwrap_or_default();
            runs.set(runs.get() + 1);
            if runs.get() == 1 {
                fixture.other.store.write(&path("count"), b"10")?;
            }
            within.write(&path("count"), &[read.as_slice(), b"+"].concat())
        }))?;
        same("runs", runs.get(), 2)?;
        same("the second run's value", ok(store.read(&path("count")))?, Some(b"10+".to_vec()))?;
        let always = store.transaction(&mut |within| {
            within.read(&path("count"))?;
            fixture.other.store.write(&path("count"), b"x")?;
            within.write(&path("count"), b"y")
        });
        refused("a conflict without end", always, &[Errno::EAGAIN])
    })
}

fn siblings(fixture: &Fixture) -> Result<(), Broken> {
    below(fixture, |store| {
        let runs = Cell::new(0);
        ok(store.transaction(&mut |within| {
            runs.set(runs.get() + 1);
            within.write(&path("ours"), b"")?;
            if runs.get() == 1 {
                fixture.other.store.write(&path("theirs"), b"")?;
            }
            Ok(())
        }))?;
        let mut names = ok(store.list(TOP))?;
        names.sort();
        same("both are there", names, vec!["ours".to_owned(), "theirs".to_owned()])
    })
}

/// The paths of the events with this token that arrive within a moment.
fn events(platform: &Platform, token: &str) -> Result<Vec<String>, Broken> {
    let mut paths = Vec::new();
    loop {
        let fd = platform.store.event_fd();
        let moment = PollTimeout::from(300u16);
        let ready = poll(&mut [PollFd::new(fd.as_fd(), PollFlags::POLLIN)], moment);
        if ready.map_err(|errno| errno.to_string())? == 0 {
            return Ok(paths);
        }
        while let Some(event) = ok(platform.store.next_event())? {
            if event.token == token {
                paths.push(event.path);
            }
        }
    }
}

/// A watch of `top` with the other connection, whose first event is taken; it is removed afterwards.
fn watched(
    fixture: &Fixture,
    top: &str,
    token: &str,
    body: impl FnOnce(&dyn Store) -> Result<(), Broken>,
) -> Result<(), Broken> {
    let watcher = &fixture.other;
    ok(watcher.store.watch(top, token))?;
    let body = || {
        same("the first event", events(watcher, token)?, vec![top.to_owned()])?;
        body(&*fixture.platform.store)
    };
    undone(body, || ok(watcher.store.unwatch(top, token)))
}

fn watch(fixture: &Fixture) -> Result<(), Broken> {
    below(fixture, |_| {
        watched(fixture, &path("w"), "below", |store| {
            put(store, &path("w"), "1")?;
            put(store, &path("w/deep/er"), "2")?;
            put(store, &path("wider"), "3")?;
            ok(store.set_permissions(&path("w"), &Permissions::backend(fixture.guest)))?;
            let wanted = vec![path("w"), path("w/deep/er"), path("w")];
            same("events", events(&fixture.other, "below")?, wanted)
        })
    })
}

fn watch_twice(fixture: &Fixture) -> Result<(), Broken> {
    below(fixture, |_| {
        watched(fixture, TOP, "twice", |_| {
            let store = &fixture.other.store;
            refused("the same again", store.watch(TOP, "twice"), &[Errno::EEXIST])?;
            ok(store.watch(TOP, "another"))?;
            ok(store.unwatch(TOP, "another"))?;
            refused("unwatch again", store.unwatch(TOP, "another"), &[Errno::ENOENT])
        })
    })
}

fn removal(fixture: &Fixture) -> Result<(), Broken> {
    below(fixture, |store| {
        put(store, &path("gone/a"), "")?;
        put(store, &path("gone/b"), "")?;
        watched(fixture, &path("gone"), "removal", |store| {
            ok(store.remove(&path("gone")))?;
            same("events", events(&fixture.other, "removal")?, vec![path("gone")])
        })
    })
}

fn commit_tells(fixture: &Fixture) -> Result<(), Broken> {
    below(fixture, |_| {
        watched(fixture, &path("t"), "commit", |store| {
            ok(store.transaction(&mut |within| {
                within.write(&path("t"), b"1")?;
                within.write(&path("t"), b"2")
            }))?;
            same("events", events(&fixture.other, "commit")?, vec![path("t")])
        })
    })
}

fn special(fixture: &Fixture) -> Result<(), Broken> {
    watched(fixture, "@releaseDomain", "release", |_| Ok(()))?;
    watched(fixture, "@introduceDomain", "introduce", |_| Ok(()))
}

fn domains(fixture: &Fixture) -> Result<(), Broken> {
    let exists = |domain| ok(fixture.platform.store.domain_exists(domain));
    same("the guest", exists(fixture.guest)?, true)?;
    same("a domain that does not exist", exists(NO_DOMAIN)?, false)?;
    let home = format!("/local/domain/{}", fixture.guest);
    let permissions = ok(fixture.platform.store.permissions(&home))?;
    same("its home", permissions, Some(Permissions::backend(fixture.guest)))
}
