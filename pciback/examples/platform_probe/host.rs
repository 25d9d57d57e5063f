//! The host's functions, drivers, resets and events.

use std::fs;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use pciback::platform::linux::events::{Action, PciEvents, Source};
use pciback::platform::{Platform, Result};

use super::{Subject, UNKNOWN, config, say};

const LIMIT: Duration = Duration::from_secs(30);

pub fn probe(platform: &Platform, subject: &Subject) -> Result<()> {
    let host = platform.host.as_ref();
    say("functions", host.functions());
    say("drivers", host.drivers());
    say("function(pf)", host.function(subject.pf));
    say("function(vf)", host.function(subject.vf));
    say("function(unknown)", host.function(UNKNOWN).map(drop));
    say("config(unknown)", host.config(UNKNOWN).map(drop));
    for (name, address) in [("pf", subject.pf), ("vf", subject.vf)] {
        let space = host.config(address)?;
        println!(
            "PROBE: config({name}): size {} id {:#010x} command {:#06x} extended {:#010x}",
            space.size(),
            config::read(space.as_ref(), 0, 4),
            config::read(space.as_ref(), 4, 2),
            config::read(space.as_ref(), 0x100, 4)
        );
    }
    Ok(())
}

/// What changes the host: done last.
pub fn changes(platform: &Platform, subject: &Subject) -> Result<()> {
    let host = platform.host.as_ref();
    let started = Instant::now();
    say("reset(vf)", host.reset(subject.vf, LIMIT));
    println!("PROBE: reset took {:?}", started.elapsed());
    say("reset(vf) in no time", host.reset(subject.vf, Duration::ZERO));
    say("function(vf) meanwhile", host.function(subject.vf).map(|function| function.driver_override));
    say("reset(unknown)", host.reset(UNKNOWN, LIMIT));
    say("unbind(vf)", host.unbind(subject.vf, LIMIT));
    say("unbind(vf) again", host.unbind(subject.vf, LIMIT));
    say("function(vf) unbound", host.function(subject.vf).map(|function| function.driver));
    say("set_driver_override(vf, none)", host.set_driver_override(subject.vf, None));
    say("function(vf) cleared", host.function(subject.vf).map(|function| function.driver_override));
    say("set_driver_override(vf, absent)", host.set_driver_override(subject.vf, Some("no-such-driver")));
    say("probe(vf) by an absent driver", host.probe(subject.vf, LIMIT));
    say("set_driver_override(vf, pci-stub)", host.set_driver_override(subject.vf, Some("pci-stub")));
    say("probe(vf)", host.probe(subject.vf, LIMIT));
    say("probe(vf) again", host.probe(subject.vf, LIMIT));
    say("probe(unknown)", host.probe(UNKNOWN, LIMIT));
    say("function(vf) probed", host.function(subject.vf).map(|function| function.driver));
    say("set_num_vfs(vf)", host.set_num_vfs(subject.vf, 1, LIMIT));
    say("set_vf_autoprobe(pf)", host.set_vf_autoprobe(subject.pf, false));

    let events = PciEvents::open(Source::Kernel)?;
    let count = host.function(subject.pf)?.num_vfs;
    say("set_num_vfs(pf, same)", host.set_num_vfs(subject.pf, count, LIMIT));
    say("set_num_vfs(pf, other)", host.set_num_vfs(subject.pf, count - 1, LIMIT));
    say("set_num_vfs(pf, 0)", host.set_num_vfs(subject.pf, 0, LIMIT));
    say("set_num_vfs(pf, too many)", host.set_num_vfs(subject.pf, 1000, LIMIT));
    say("set_num_vfs(pf, all)", host.set_num_vfs(subject.pf, count, LIMIT));
    let (mut added, mut removed) = (0, 0);
    while added < count {
        let mut waiting = [PollFd::new(events.event_fd(), PollFlags::POLLIN)];
        if !matches!(poll(&mut waiting, PollTimeout::from(10_000u16)), Ok(1)) {
            println!("PROBE: events: no more after 10 s");
            break;
        }
        while let Some(event) = events.next_event() {
            match event.action {
                Action::Add => added += 1,
                Action::Remove => removed += 1,
                _ => {}
            }
        }
    }
    println!("PROBE: events: {removed} removed, {added} added");
    descriptors();
    Ok(())
}

/// Every descriptor of this process, with whether a child would inherit it.
fn descriptors() {
    let Ok(entries) = fs::read_dir("/proc/self/fd") else { return };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let target = fs::read_link(entry.path()).unwrap_or_default();
        let info = fs::read_to_string(format!("/proc/self/fdinfo/{name}")).unwrap_or_default();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap_or("0").trim();
        let flags = u32::from_str_radix(flags, 8).unwrap_or(0);
        println!("PROBE: descriptor {name}: {} cloexec {}", target.display(), flags & 0o200_0000 != 0);
    }
}
