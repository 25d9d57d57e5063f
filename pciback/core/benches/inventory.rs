//! What planning costs, for one PF with 64 VFs and up to 64 of them: when all agree, which is what every event costs, and when all
//! cards were pulled out from under their guests.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use xpci_core::inventory::{
    Function, GuestPlace, HostView, Identity, Intent, Observed, Owner, Published, Want, Wanted, plan,
};
use xpci_core::{Devfn, DomId, Sbdf};

const VFS: u8 = 64;
const GUESTS: u16 = 100;

/// PFs of dom0, and their VFs with guests.
fn agreement(pfs: u8) -> (Observed, Wanted) {
    let (mut observed, mut wanted) = (Observed::default(), Wanted::default());
    observed.domains = (1..=GUESTS).map(DomId).collect();
    for bus in 0..pfs {
        let pf = Sbdf::from_devfn(0, bus, 0);
        let vfs: Vec<Sbdf> = (0..VFS).map(|index| Sbdf::from_devfn(0, bus, 0x80 + index)).collect();
        for (index, &address) in vfs.iter().enumerate() {
            let number = u16::from(bus) * u16::from(VFS) + index as u16;
            let place =
                GuestPlace { domain: DomId(1 + number % GUESTS), devfn: Devfn((number / GUESTS) as u8) };
            let host = HostView { driver: true, held: true, msix: true, ..HostView::default() };
            let xen = Some(Owner::Domain(place.domain));
            let function = Function { host: Some(host), physical_function: Some(pf), xen };
            observed.functions.insert(address, function);
            observed.published.insert(Published { address, place });
            let identity = Some(Identity::default());
            let intent = Intent { want: Want::Attached(place), identity, msix_prepared: true };
            wanted.functions.insert(address, intent);
        }
        let num_vfs = u16::from(VFS);
        let host = HostView { driver: true, num_vfs, virtual_functions: vfs, ..HostView::default() };
        let function = Function { host: Some(host), physical_function: None, xen: Some(Owner::Host) };
        observed.functions.insert(pf, function);
    }
    (observed, wanted)
}

fn planning(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("plan");
    for pfs in [1, 16, 64] {
        let (mut observed, wanted) = agreement(pfs);
        let vfs = u32::from(pfs) * u32::from(VFS);
        group.bench_function(BenchmarkId::new("agreement", vfs), |bencher| {
            bencher.iter(|| plan(black_box(&observed), black_box(&wanted)));
        });
        observed.functions.values_mut().for_each(|function| function.host = None);
        group.bench_function(BenchmarkId::new("pulled-out", vfs), |bencher| {
            bencher.iter(|| plan(black_box(&observed), black_box(&wanted)));
        });
    }
    group.finish();
}

criterion_group!(benches, planning);
criterion_main!(benches);
