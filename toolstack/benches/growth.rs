//! How it grows with the number of VFs: from writing `sriov_numvfs` to "all VFs assignable", through the whole service on a simulated
//! host, and what a comparison of sysfs, Xen and xenstore takes then.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a benchmark that fails says so by panicking")]

use std::fmt::Write as _;
use std::fs;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::eventfd::EventFd;
use pciback::Sbdf;
use pciback::platform::sim::Simulation;
use pciback::policy::PolicySet;
use toolstack::client;
use toolstack::control;
use toolstack::engine::Engine;
use toolstack::guest_names::GuestNames;
use toolstack::journal::Journal;
use toolstack::protocol::Request;
use toolstack::settings::Settings;

/// VFs of each PF.
const VFS: u16 = 64;
/// As many as `xpci` makes at the same time.
const CLIENTS: u8 = 8;

fn main() {
    println!("VFs    created    all held   each      compared   memory");
    for pfs in [1, 4, 16, 64] {
        measure(pfs);
    }
}

fn host(pfs: u8) -> String {
    let mut text = "drivers: [i40e, pci-stub]\nfunctions:\n".to_owned();
    for bus in 0..pfs {
        let _ = writeln!(text, "  - {{address: '{}', model: many-vfs}}", Sbdf::from_devfn(0, bus, 0));
    }
    text
}

fn measure(pfs: u8) {
    let directory = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    let platform = Simulation::from_yaml(&host(pfs)).unwrap().platform("benchmark").unwrap();
    let settings = Settings {
        run_directory: directory.path().join("run"),
        state_directory: directory.path().join("state"),
        ..Settings::default()
    };
    fs::create_dir_all(settings.run_directory.join("images")).unwrap();
    let journal = Journal::open(&settings.state_directory).unwrap();
    let socket = settings.socket();
    let names = GuestNames::new(&platform.store);
    let mut engine = Engine::new(platform, settings, PolicySet::default(), journal, "boot".into()).unwrap();
    engine.recover().unwrap();
    control::listen(&socket, engine.inbox(), names).unwrap();
    let stop = Arc::new(EventFd::new().unwrap());
    let stopped = Arc::clone(&stop);
    let service = thread::spawn(move || engine.run(stopped.as_fd()).unwrap());

    let created = timed(|| {
        for_each_pf(pfs, |bus| {
            ask(
                &socket,
                Request::VfCreate { address: Sbdf::from_devfn(0, bus, 0), count: VFS, unmanaged: false },
            );
        });
    });
    let held = timed(|| {
        for_each_pf(pfs, |bus| {
            for devfn in 1..=VFS as u8 {
                ask(
                    &socket,
                    Request::PciAssignableAdd {
                        address: Sbdf::from_devfn(0, bus, devfn),
                        force: false,
                        persist: false,
                        managed: false,
                        dry_run: false,
                    },
                );
            }
        });
    });
    let compared = timed(|| ask(&socket, Request::Sync { dry_run: true }));
    let vfs = u32::from(pfs) * u32::from(VFS);
    println!(
        "{vfs:<6} {:<10} {:<10} {:<9} {:<10} {} MiB",
        format!("{created:.1?}"),
        format!("{held:.1?}"),
        format!("{:.0?}", (created + held) / vfs),
        format!("{compared:.1?}"),
        peak_memory() / 1024
    );
    stop.write(1).unwrap();
    service.join().unwrap();
}

fn timed(work: impl FnOnce()) -> Duration {
    let began = Instant::now();
    work();
    began.elapsed()
}

/// Some PFs at a time.
fn for_each_pf(pfs: u8, work: impl Fn(u8) + Sync) {
    thread::scope(|scope| {
        for client in 0..CLIENTS.min(pfs) {
            let work = &work;
            scope.spawn(move || (client..pfs).step_by(usize::from(CLIENTS)).for_each(work));
        }
    });
}

fn ask(socket: &Path, request: Request) {
    let envelope = client::call(socket, request.into(), &mut |_| ()).unwrap();
    assert!(envelope.error.is_none(), "{:?}", envelope.error);
}

/// The most memory that this process had so far, in KiB.
fn peak_memory() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches("kB").trim().parse().unwrap()
}
