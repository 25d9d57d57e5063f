//! What every platform answers, as `docs/xen-answers.md` has it: asked of the simulation in `cargo test`, of a real dom0 by
//! `examples/contract`.

use std::fmt::Debug;
use std::time::Duration;

use nix::errno::Errno;
use pciback::config::Access;
use pciback::platform::{MsiSource, Permissions, Platform, Result, Store};
use pciback::{DomId, Sbdf};

/// What the contracts are tried on. The function is held by pci-stub, owned by dom0 or the quarantine domain, and has MSI-X.
pub struct Subject {
    pub function: Sbdf,
    /// A running PV guest with passthrough.
    pub guest: DomId,
    /// One without.
    pub closed: DomId,
}

/// Why a contract is broken.
pub type Verdict = std::result::Result<(), String>;
/// One contract by its name.
pub type Contract = (&'static str, fn(&Platform, &Subject) -> Verdict);

/// All of them, in the order they are to be tried.
pub const CONTRACTS: &[Contract] = &[
    ("a domain without passthrough gets no function", closed_domain),
    ("what does not exist is told apart", absent),
    ("a guest's function is given to nobody else", owned),
    ("the quarantine domain may get twice what it has, dom0 nothing", quarantine),
    ("a deassignment works once", deassigned_twice),
    ("MSI-X is prepared once, and released when nothing is mapped", prepared),
    ("vectors are mapped for the owner, within the table, as often as asked", mapped),
    ("a ring that the guest has not offered is refused", ring),
    ("a transaction happens as a whole or not at all", transaction),
    ("a transaction that saw what changed runs again", conflict),
    ("a watch fires when it is set and when its node changes", watch),
    ("permissions are read back, missing nodes are none", permissions),
    ("a reset keeps the BARs", reset),
    ("an overridden function is probed by nobody else", overridden),
];

const UNKNOWN: Sbdf = Sbdf::from_devfn(0, 0xee, 0);
const NOBODY: DomId = DomId(999);
const LIMIT: Duration = Duration::from_secs(30);
const NODE: &str = "/local/domain/0/xpci-contract";

fn fails<T: Debug>(call: &str, answer: Result<T>, wanted: Errno) -> Verdict {
    match answer {
        Err(error) if error.errno() == Some(wanted) => Ok(()),
        other => Err(format!("{call}: {other:?}, not {wanted:?}")),
    }
}

fn works<T>(call: &str, answer: Result<T>) -> std::result::Result<T, String> {
    answer.map_err(|error| format!("{call}: {error}"))
}

fn is<T: Debug + PartialEq>(call: &str, found: T, wanted: T) -> Verdict {
    if found == wanted { Ok(()) } else { Err(format!("{call}: {found:?}, not {wanted:?}")) }
}

/// Runs a contract on a function that the quarantine domain has, and leaves it so.
fn held(platform: &Platform, subject: &Subject, body: impl FnOnce() -> Verdict) -> Verdict {
    works("assign(IO)", platform.hypervisor.assign(DomId::IO, subject.function))?;
    let outcome = body();
    // Where it is still the guest's; ENODEV where it is not.
    let _ = platform.hypervisor.deassign(subject.guest, subject.function);
    outcome
}

fn closed_domain(platform: &Platform, subject: &Subject) -> Verdict {
    let xen = &platform.hypervisor;
    held(platform, subject, || {
        fails("assign", xen.assign(subject.closed, subject.function), Errno::EOPNOTSUPP)?;
        fails("deassign", xen.deassign(subject.closed, subject.function), Errno::EOPNOTSUPP)
    })
}

fn absent(platform: &Platform, subject: &Subject) -> Verdict {
    let xen = &platform.hypervisor;
    fails("assign an unknown function", xen.assign(subject.guest, UNKNOWN), Errno::ENODEV)?;
    fails("deassign an unknown function", xen.deassign(subject.guest, UNKNOWN), Errno::ENODEV)?;
    fails("assign to nobody", xen.assign(NOBODY, subject.function), Errno::ESRCH)?;
    fails("deassign from nobody", xen.deassign(NOBODY, subject.function), Errno::ESRCH)?;
    is("assignable(unknown)", works("assignable", xen.assignable(UNKNOWN))?, false)?;
    is("device_known(unknown)", works("device_known", xen.device_known(UNKNOWN))?, false)?;
    fails("grant memory to nobody", xen.iomem_permission(NOBODY, 0xfe000, 1, true), Errno::ESRCH)?;
    fails("grant no memory", xen.iomem_permission(subject.guest, 0xfe000, 0, true), Errno::EINVAL)
}

fn owned(platform: &Platform, subject: &Subject) -> Verdict {
    let xen = &platform.hypervisor;
    held(platform, subject, || {
        works("assign(guest)", xen.assign(subject.guest, subject.function))?;
        fails("assign(guest) again", xen.assign(subject.guest, subject.function), Errno::EBUSY)?;
        fails("assign(IO)", xen.assign(DomId::IO, subject.function), Errno::EBUSY)?;
        is("assignable", works("assignable", xen.assignable(subject.function))?, false)
    })
}

fn quarantine(platform: &Platform, subject: &Subject) -> Verdict {
    let xen = &platform.hypervisor;
    held(platform, subject, || {
        works("assign(IO) again", xen.assign(DomId::IO, subject.function))?;
        fails("assign(dom0)", xen.assign(DomId::DOM0, subject.function), Errno::EINVAL)?;
        is("assignable", works("assignable", xen.assignable(subject.function))?, true)
    })
}

fn deassigned_twice(platform: &Platform, subject: &Subject) -> Verdict {
    let xen = &platform.hypervisor;
    held(platform, subject, || {
        works("assign(guest)", xen.assign(subject.guest, subject.function))?;
        works("deassign(guest)", xen.deassign(subject.guest, subject.function))?;
        fails("deassign(guest) again", xen.deassign(subject.guest, subject.function), Errno::ENODEV)
    })
}

fn prepared(platform: &Platform, subject: &Subject) -> Verdict {
    let xen = &platform.hypervisor;
    let function = subject.function;
    fails("release before", xen.release_msix(function), Errno::EBUSY)?;
    is("prepare", works("prepare", xen.prepare_msix(function))?, true)?;
    is("prepare again", works("prepare", xen.prepare_msix(function))?, false)?;
    works("release", xen.release_msix(function))?;
    fails("release again", xen.release_msix(function), Errno::EBUSY)?;
    fails("prepare an unknown function", xen.prepare_msix(UNKNOWN), Errno::ENODEV)
}

fn mapped(platform: &Platform, subject: &Subject) -> Verdict {
    let xen = &platform.hypervisor;
    let Subject { function, guest, .. } = *subject;
    let table = works("function", platform.host.function(function))?.resources[3].start;
    let entry = |entry| MsiSource::MsiX { entry, table };
    held(platform, subject, || {
        fails("map of what is not the guest's", xen.map_msi(guest, function, entry(0)), Errno::ENODEV)?;
        works("assign(guest)", xen.assign(guest, function))?;
        fails("map before preparing", xen.map_msi(guest, function, entry(0)), Errno::ENODATA)?;
        works("prepare", xen.prepare_msix(function))?;
        let first = works("map", xen.map_msi(guest, function, entry(0)))?;
        let second = works("map again", xen.map_msi(guest, function, entry(0)))?;
        let past = fails("map past the end", xen.map_msi(guest, function, entry(2047)), Errno::EINVAL);
        let busy = fails("release while mapped", xen.release_msix(function), Errno::EBUSY);
        works("unmap", xen.unmap_pirq(guest, first))?;
        let twice = fails("unmap twice", xen.unmap_pirq(guest, first), Errno::EINVAL);
        works("unmap the other", xen.unmap_pirq(guest, second))?;
        works("release", xen.release_msix(function))?;
        past.and(busy).and(twice).and(if first == second {
            Err("the same pirq twice".into())
        } else {
            Ok(())
        })
    })
}

fn ring(platform: &Platform, subject: &Subject) -> Verdict {
    for (grant, port) in [(u32::MAX, 1), (1_000_000, 1_000_000)] {
        let connected = platform.rings.connect(subject.guest, grant, port).map(drop);
        fails(&format!("connect to grant {grant}, port {port}"), connected, Errno::EINVAL)?;
    }
    Ok(())
}

fn transaction(platform: &Platform, _: &Subject) -> Verdict {
    let store = platform.store.as_ref();
    let broken = store.transaction(&mut |nodes| {
        nodes.write(NODE, b"half")?;
        nodes.set_permissions(&format!("{NODE}/missing"), &Permissions::backend(DomId(1)))
    });
    fails("a body that fails", broken, Errno::ENOENT)?;
    is("what it wrote", works("read", store.read(NODE))?, None)?;
    works("commit", store.transaction(&mut |nodes| nodes.write(NODE, b"whole")))?;
    is("what was committed", works("read", store.read(NODE))?, Some(b"whole".to_vec()))?;
    works("remove", store.remove(NODE))?;
    works("remove again", store.remove(NODE))
}

fn conflict(platform: &Platform, _: &Subject) -> Verdict {
    let store = platform.store.as_ref();
    works("write", store.write(NODE, b"0"))?;
    let mut runs = 0;
    let committed = store.transaction(&mut |nodes| {
        runs += 1;
        nodes.read(NODE)?;
        if runs == 1 {
            store.write(NODE, b"1")?;
        }
        nodes.write(NODE, b"2")
    });
    works("commit", committed)?;
    is("runs", runs, 2)?;
    is("the node", works("read", store.read(NODE))?, Some(b"2".to_vec()))?;
    works("remove", store.remove(NODE))
}

fn next_event(store: &dyn Store) -> std::result::Result<String, String> {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    loop {
        if let Some(event) = works("next_event", store.next_event())? {
            return Ok(event.path);
        }
        let limit = PollTimeout::try_from(LIMIT).map_err(|error| error.to_string())?;
        match poll(&mut [PollFd::new(store.event_fd(), PollFlags::POLLIN)], limit) {
            Ok(0) => return Err(format!("no event within {LIMIT:?}")),
            Ok(_) => {}
            Err(errno) => return Err(errno.to_string()),
        }
    }
}

fn watch(platform: &Platform, _: &Subject) -> Verdict {
    let store = platform.store.as_ref();
    works("watch", store.watch(NODE, "contract"))?;
    is("the first event", next_event(store)?, NODE.to_owned())?;
    fails("watch again", store.watch(NODE, "contract"), Errno::EEXIST)?;
    works("write", store.write(&format!("{NODE}/below"), b""))?;
    if !next_event(store)?.starts_with(NODE) {
        return Err("an event of another node".into());
    }
    works("unwatch", store.unwatch(NODE, "contract"))?;
    fails("unwatch again", store.unwatch(NODE, "contract"), Errno::ENOENT)?;
    works("remove", store.remove(NODE))
}

fn permissions(platform: &Platform, subject: &Subject) -> Verdict {
    let store = platform.store.as_ref();
    is("read", works("read", store.read(NODE))?, None)?;
    is("list", works("list", store.list(NODE))?, Vec::new())?;
    is("permissions", works("permissions", store.permissions(NODE))?, None)?;
    works("write", store.write(NODE, b""))?;
    let wanted = Permissions::backend(subject.guest);
    works("set", store.set_permissions(NODE, &wanted))?;
    is("permissions", works("permissions", store.permissions(NODE))?, Some(wanted))?;
    works("remove", store.remove(NODE))
}

fn reset(platform: &Platform, subject: &Subject) -> Verdict {
    let config = works("config", platform.host.config(subject.function))?;
    let bars = || -> std::result::Result<Vec<u32>, String> {
        (0x10..0x28)
            .step_by(4)
            .map(|offset| {
                let access = Access::new(offset, 4).map_err(|error| error.to_string())?;
                config.read(access).map_err(|error| error.to_string())
            })
            .collect()
    };
    let before = bars()?;
    works("reset", platform.host.reset(subject.function, LIMIT))?;
    is("the BARs", bars()?, before)
}

fn overridden(platform: &Platform, subject: &Subject) -> Verdict {
    let host = &platform.host;
    let driver = || Ok::<_, String>(works("function", host.function(subject.function))?.driver);
    works("override", host.set_driver_override(subject.function, Some("pci-stub")))?;
    works("unbind", host.unbind(subject.function, LIMIT))?;
    is("the driver after unbind", driver()?, None)?;
    works("unbind again", host.unbind(subject.function, LIMIT))?;
    works("probe", host.probe(subject.function, LIMIT))?;
    is("the driver after probe", driver()?, Some("pci-stub".to_owned()))
}
