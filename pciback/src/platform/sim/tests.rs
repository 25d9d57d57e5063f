//! What only the simulation can show: its YAML, injected failures, hardware that leaves. The rest is in the contracts.

use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::{Failure, Owner, Simulation};
use crate::config::{Access, ConfigSpace};
use crate::platform::{Cause, Edit, MsiSource, Platform, Store, StoreOps};
use crate::policy::RdmPolicy;
use crate::{DomId, Sbdf};

const LIMIT: Duration = Duration::from_secs(1);
const GUEST: DomId = DomId(1);

fn shipped() -> (Simulation, Platform) {
    let simulation = Simulation::from_yaml(include_str!("../../../../configs/sim/two-guests.yaml")).unwrap();
    let platform = simulation.platform("test").unwrap();
    (simulation, platform)
}

fn at(text: &str) -> Sbdf {
    text.parse().unwrap()
}

fn read(config: &dyn ConfigSpace, offset: u32, size: u32) -> u32 {
    config.read(Access::new(offset, size).unwrap()).unwrap()
}

fn write(config: &dyn ConfigSpace, offset: u32, size: u32, value: u32) {
    config.write(Access::new(offset, size).unwrap(), value).unwrap();
}

#[test]
fn vfs_lie_where_the_sriov_capability_says_and_have_the_pfs_identity() {
    let (_, platform) = shipped();
    let host = platform.host;
    host.set_num_vfs(at("01:00.0"), 3, LIMIT).unwrap();
    host.set_num_vfs(at("03:00.0"), 2, LIMIT).unwrap();
    let pf = host.function(at("01:00.0")).unwrap();
    assert_eq!(pf.virtual_functions, [at("01:10.0"), at("01:10.2"), at("01:10.4")]);
    assert_eq!((pf.total_vfs, pf.interfaces.len()), (7, 1));
    assert_eq!(
        (pf.resources[7].start, pf.resources[7].size, pf.resources[7].flags),
        (0xfea0_0000, 0x2_0000, 0x14_220c)
    );
    let vf = host.function(at("01:10.2")).unwrap();
    assert_eq!((vf.vendor, vf.device, vf.driver.as_deref()), (0x8086, 0x10ca, Some("igbvf")));
    assert_eq!((vf.resources[3].start, vf.resources[3].size), (0xfea2_4000, 0x4000));
    assert_eq!(host.function(at("03:00.0")).unwrap().virtual_functions, [at("03:00.1"), at("03:00.2")]);
    let config = host.config(at("01:10.2")).unwrap();
    assert_eq!((read(&*config, 0, 4), config.size()), (0xffff_ffff, 4096));
    write(&*config, 4, 2, 0xffff);
    assert_eq!(read(&*config, 4, 2) & 2, 0, "a VF's Memory Space Enable is its PF's");
    let pf = host.config(at("01:00.0")).unwrap();
    assert_eq!((read(&*pf, 0x168, 2), read(&*pf, 0x170, 2)), (0x19, 3));
}

#[test]
fn bars_are_sized_as_on_hardware() {
    let (_, platform) = shipped();
    let config = platform.host.config(at("01:00.0")).unwrap();
    for (bar, mask) in
        [(0x10, 0xfffe_0000), (0x18, 0xffff_ffe1), (0x1c, 0xffff_c004), (0x24, 0), (0x184, 0xffff_c00c)]
    {
        write(&*config, bar, 4, u32::MAX);
        assert_eq!(read(&*config, bar, 4), mask, "{bar:#x}");
    }
}

#[test]
fn a_function_level_reset_forgets_and_linux_puts_back() {
    let (_, platform) = shipped();
    let host = &platform.host;
    let config = host.config(at("01:00.0")).unwrap();
    host.set_num_vfs(at("01:00.0"), 1, LIMIT).unwrap();
    write(&*config, 0xa8, 2, 0x000f);
    write(&*config, 0x72, 2, 0xc000);
    let bar = read(&*config, 0x10, 4);
    host.reset(at("01:00.0"), LIMIT).unwrap();
    assert_eq!((read(&*config, 0x10, 4), read(&*config, 0xa8, 2), read(&*config, 0x72, 2)), (bar, 0xf, 9));
    let vf = host.config(at("01:10.0")).unwrap();
    assert_eq!(read(&*vf, 0x70, 1), 0x11, "the PF's SR-IOV controls are put back");
    write(&*config, 0xa8, 2, 0x8000);
    assert_eq!((read(&*config, 0x10, 4), read(&*config, 0xa8, 2), read(&*config, 4, 2)), (0, 0, 0));
    assert_eq!(read(&*vf, 0x70, 4), u32::MAX, "nobody answers for a VF that its PF does not enable");
}

#[test]
fn xen_keeps_what_would_touch_its_interrupts() {
    let (_, platform) = shipped();
    let config = platform.host.config(at("01:00.0")).unwrap();
    write(&*config, 0x70, 4, 0xc000_0000);
    write(&*config, 0x73, 1, 0xc0);
    assert_eq!(read(&*config, 0x72, 2), 9);
    write(&*config, 0x72, 2, 0xc000);
    assert_eq!(read(&*config, 0x72, 2), 0xc009);
}

#[test]
fn a_dump_of_a_function_in_use_powers_up_without_msi_and_msix() {
    let simulation = Simulation::from_yaml(
        r#"
drivers: []
models:
  nic:
    size: 256
    reset-methods: [flr]
    bars: {0: 1000}
    config: |
      00: ec 10 65 57 06 05 10 00 01 02 08 01 08 00 00 00
      30: 00 00 00 00 40 00 00 00 00 00 00 00 ff 01 00 00
      40: 05 50 81 00 00 00 e0 fe 00 00 00 00 21 40 00 00
      50: 11 00 03 80 00 00 00 00 00 08 00 00 00 00 00 00
functions:
  - {address: "01:00.0", model: nic}
"#,
    )
    .unwrap();
    let config = simulation.platform("test").unwrap().host.config(at("01:00.0")).unwrap();
    assert_eq!((read(&*config, 0x42, 2), read(&*config, 0x52, 2)), (0x80, 3));
}

#[test]
fn what_leaves_answers_all_ones_and_belongs_to_nobody() {
    let (simulation, platform) = shipped();
    platform.host.set_num_vfs(at("01:00.0"), 1, LIMIT).unwrap();
    let vf = at("01:10.0");
    let config = platform.host.config(vf).unwrap();
    platform.hypervisor.assign(GUEST, vf, RdmPolicy::Strict).unwrap();
    assert_eq!(simulation.owner(vf), Some(Owner::Guest(GUEST)));
    simulation.silence(vf, true);
    assert_eq!(read(&*config, 0x70, 1), 0xff);
    assert_eq!(platform.host.reset(vf, LIMIT).unwrap_err().errno(), Some(Errno::ENOTTY));
    simulation.silence(vf, false);
    assert_eq!(read(&*config, 0x70, 1), 0x11);
    simulation.unplug(at("01:00.0"));
    assert_eq!((read(&*config, 0x70, 1), simulation.owner(vf)), (0xff, None));
    assert!(matches!(platform.host.function(vf).unwrap_err().cause, Cause::Missing));
    simulation.plug("{address: 01:00.0, model: \"82576\"}").unwrap();
    assert_eq!(platform.host.function(at("01:00.0")).unwrap().driver.as_deref(), Some("igb"));
}

#[test]
fn linux_and_xen_can_drift_apart() {
    let (simulation, platform) = shipped();
    simulation.report_to_xen(false);
    platform.host.set_num_vfs(at("01:00.0"), 1, LIMIT).unwrap();
    assert!(!platform.hypervisor.device_known(at("01:10.0")).unwrap());
    simulation.unplug(at("02:00.0"));
    assert!(platform.hypervisor.device_known(at("02:00.0")).unwrap());
}

#[test]
fn a_dead_domain_keeps_nothing() {
    let (simulation, platform) = shipped();
    let (vf, hypervisor) = (at("01:10.0"), &platform.hypervisor);
    platform.host.set_num_vfs(at("01:00.0"), 1, LIMIT).unwrap();
    platform.store.watch("@releaseDomain", "t").unwrap();
    while platform.store.next_event().unwrap().is_some() {}
    hypervisor.prepare_msix(vf).unwrap();
    hypervisor.assign(GUEST, vf, RdmPolicy::Strict).unwrap();
    hypervisor.iomem_permission(GUEST, 0xfea00, 4, Edit::Add).unwrap();
    let source = MsiSource::MsiX { entry: 0, table: 0xfea2_0000 };
    assert_eq!(hypervisor.map_msi(GUEST, vf, source).unwrap().0, 55);
    assert!(!simulation.grants(GUEST).is_empty());
    simulation.destroy(GUEST);
    assert!(simulation.grants(GUEST).is_empty());
    assert_eq!(simulation.owner(vf), Some(Owner::Quarantine));
    assert_eq!(platform.store.next_event().unwrap().unwrap().path, "@releaseDomain");
    assert!(!platform.store.domain_exists(GUEST).unwrap());
    assert_eq!(platform.store.read("/local/domain/1").unwrap(), None);
    hypervisor.release_msix(vf).unwrap();
    simulation.create(GUEST, "again", true).unwrap();
    assert_eq!(platform.store.read("/local/domain/1/name").unwrap().unwrap(), b"again");
}

#[test]
fn a_guest_has_32_interrupts_and_no_more() {
    let (_, platform) = shipped();
    let function = at("03:00.0");
    platform.hypervisor.prepare_msix(function).unwrap();
    platform.hypervisor.assign(GUEST, function, RdmPolicy::Strict).unwrap();
    let map = |entry| platform.hypervisor.map_msi(GUEST, function, MsiSource::MsiX { entry, table: 1 });
    let first: Vec<_> = (0..32).map(|entry| map(entry % 16).unwrap().0).collect();
    assert_eq!((first[0], first[31]), (55, 24));
    assert_eq!(map(0).unwrap_err().errno(), Some(Errno::ENOSPC));
}

#[test]
fn failures_come_when_and_where_they_are_wanted() {
    let (simulation, platform) = shipped();
    let (nvme, igb) = (at("03:00.0"), at("01:00.0"));
    simulation.fail(Failure {
        operation: "reset".into(),
        address: Some(nvme),
        errno: Some(Errno::EIO),
        after: 1,
        times: 1,
        ..Failure::default()
    });
    let reset = |address| platform.host.reset(address, LIMIT).map_err(|error| error.errno());
    assert_eq!(
        [reset(nvme), reset(igb), reset(nvme), reset(nvme)],
        [Ok(()), Ok(()), Err(Some(Errno::EIO)), Ok(())]
    );
    let slow = Duration::from_secs(60);
    simulation.fail(Failure { operation: "unbind".into(), delay: slow, times: 1, ..Failure::default() });
    let begin = Instant::now();
    let error = platform.host.unbind(nvme, Duration::from_millis(20)).unwrap_err();
    assert!(matches!(error.cause, Cause::TimedOut(_)) && begin.elapsed() < slow);
    simulation.fail(Failure {
        operation: "write".into(),
        path: Some("/a".into()),
        errno: Some(Errno::ENOSPC),
        times: 2,
        ..Failure::default()
    });
    platform.store.write("/ab", b"").unwrap();
    assert_eq!(platform.store.write("/a/b", b"").unwrap_err().errno(), Some(Errno::ENOSPC));
    let error = platform.store.transaction(&mut |within| {
        within.write("/c", b"")?;
        within.write("/a", b"")
    });
    assert_eq!(error.unwrap_err().errno(), Some(Errno::ENOSPC));
    assert_eq!(platform.store.read("/c").unwrap(), None);
}

#[test]
fn a_guest_may_only_what_xenstored_lets_it() {
    let (simulation, platform) = shipped();
    let guest = simulation.store(GUEST).unwrap();
    let errno = |result: crate::platform::Result<()>| result.map_err(|error| error.errno());
    assert_eq!(guest.read("/local/domain/1/name").unwrap().unwrap(), b"web");
    assert_eq!(guest.read("/local/domain/2/name").unwrap_err().errno(), Some(Errno::EACCES));
    assert_eq!(guest.read("/libxl/9").unwrap_err().errno(), Some(Errno::EACCES));
    assert_eq!(errno(guest.write("/local/domain/1/x", b"")), Err(Some(Errno::EACCES)));
    assert_eq!(errno(guest.write("/local/domain/1/data/x", b"1")), Ok(()));
    let other = crate::platform::Permissions { owner: DomId(2), readers: Vec::new() };
    assert_eq!(errno(guest.set_permissions("/local/domain/1/data/x", &other)), Err(Some(Errno::EPERM)));
    guest.watch("/local/domain", "t").unwrap();
    guest.next_event().unwrap().unwrap();
    platform.store.write("/local/domain/2/x", b"").unwrap();
    assert_eq!(guest.next_event().unwrap(), None);
    platform.store.write("/local/domain/1/x", b"").unwrap();
    assert_eq!(guest.next_event().unwrap().unwrap().path, "/local/domain/1/x");
}

#[test]
fn a_ring_takes_what_the_guest_offers_and_nothing_else() {
    let (simulation, platform) = shipped();
    let mut guest = simulation.guest(GUEST).unwrap();
    guest.share(8, 12).unwrap();
    let connect = |grant, port| platform.rings.connect(GUEST, grant, port).map_err(|error| error.errno());
    assert_eq!(connect(9, 12).err(), Some(Some(Errno::EINVAL)));
    assert_eq!(connect(8, 13).err(), Some(Some(Errno::EINVAL)));
    let ring = connect(8, 12).unwrap();
    assert_eq!(connect(8, 12).err(), Some(Some(Errno::EINVAL)), "bound already");
    while ring.take_event().unwrap() {}
    ring.page()[3].store(7, std::sync::atomic::Ordering::Relaxed);
    guest.notify().unwrap();
    assert!(ring.take_event().unwrap() && !ring.take_event().unwrap());
    ring.notify().unwrap();
    let seen = guest.wait_for_answer(LIMIT, |page| Some(page[3].load(std::sync::atomic::Ordering::Relaxed)));
    assert_eq!((seen.unwrap(), simulation.connected_rings(GUEST)), (7, 1));
    drop(ring);
    assert_eq!(simulation.connected_rings(GUEST), 0);
    connect(8, 12).unwrap();
}

#[test]
fn pf_drivers_keep_vfs_that_pciback_holds_until_they_leave_themselves() {
    let (_, platform) = shipped();
    let (host, pf, vf) = (&platform.host, at("01:00.0"), at("01:10.0"));
    host.set_num_vfs(pf, 1, LIMIT).unwrap();
    host.unbind(vf, LIMIT).unwrap();
    host.set_driver_override(vf, Some("pciback")).unwrap();
    host.probe(vf, LIMIT).unwrap();
    assert!(!platform.hypervisor.prepare_msix(vf).unwrap(), "xen-pciback has done it");
    let errno = |count| host.set_num_vfs(pf, count, LIMIT).map_err(|error| error.errno());
    assert_eq!(
        [errno(0), errno(2), errno(8), errno(1)],
        [Err(Some(Errno::EPERM)), Err(Some(Errno::EBUSY)), Err(Some(Errno::ERANGE)), Ok(())]
    );
    host.unbind(pf, LIMIT).unwrap();
    assert!(host.function(vf).is_err());
    assert_eq!(errno(1), Err(Some(Errno::ENOENT)));
}

#[test]
fn from_4_20_on_xen_holds_a_withdrawn_pf_against_its_vfs() {
    let text = "{xen: 4.20, drivers: [nvme], domains: [{id: 1, name: a, passthrough: true}],
        functions: [{address: 03:00.0, model: nvme, num-vfs: 1}]}";
    let platform = Simulation::from_yaml(text).unwrap().platform("test").unwrap();
    let xen = &platform.hypervisor;
    assert_eq!(xen.device_remove(at("03:00.0")).unwrap_err().errno(), Some(Errno::EBUSY));
    assert_eq!(xen.assign(GUEST, at("03:00.1"), RdmPolicy::Strict).unwrap_err().errno(), Some(Errno::EBADF));
}

#[test]
fn many_functions_are_quick() {
    let entries: Vec<String> =
        (0..64).map(|bus| format!("{{address: {bus:02x}:00.0, model: many-vfs, num-vfs: 64}}")).collect();
    let begin = Instant::now();
    let text = format!("{{drivers: [i40e, iavf], functions: [{}]}}", entries.join(","));
    let platform = Simulation::from_yaml(&text).unwrap().platform("test").unwrap();
    let functions = platform.host.functions().unwrap();
    assert_eq!(functions.len(), 64 * 65);
    for function in &functions {
        platform.host.function(*function).unwrap();
    }
    assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", begin.elapsed());
}

#[test]
fn a_description_that_makes_no_sense_is_refused_with_its_place() {
    for (text, part) in [
        ("{drivers: [x], functions: []}", "driver-kinds"),
        ("{drivers: [], functions: [{address: 01:00.0, model: x}]}", "no model 'x'"),
        ("{drivers: [], functions: [{address: 01:00.0, model: nvme, bars: {3: 1000}}]}", "no BAR 3"),
        ("{drivers: [], functions: [{address: 01:00.0, model: nvme, bars: {0: 1000}}]}", "no multiple"),
        ("{drivers: [], functions: [], domains: [{id: 0, name: a}]}", "taken"),
        ("{drivers: [], functions: [], failures: [{operation: reset, errno: EWHAT}]}", "EWHAT"),
        ("{drivers: [], functions: [], models: {a: {config: '00: 1ff'}}}", "no byte"),
        ("{drivers: [], functions: [], fnord: 1}", "fnord"),
    ] {
        let why = Simulation::from_yaml(text).err().unwrap_or_else(|| panic!("{text} was taken"));
        assert!(why.contains(part), "{why}");
    }
}
