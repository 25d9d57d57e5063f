//! What the filter costs: one access of a guest, compiling for a thousand VFs, and memory for each of them.
//!
//! The peer of an access is a table with one entry for each byte that is looked at byte by byte, which is how a filter is written
//! first. `make bench` runs this after the lab's own figures; only the ratios of one run mean anything.

#![expect(clippy::unwrap_used, reason = "a benchmark that cannot begin has nothing to measure")]

use std::hint::black_box;
use std::io;
use std::path::Path;
use std::sync::Arc;

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use pciback::config::{
    Access, ConfigSpace, Filter, FunctionImage, FunctionSpec, ImageOwner, Policy, VirtualConfigSpace,
};
use pciback::platform::SharedMemory;
use pciback::policy::{PolicyFile, PolicySet, Subject, dumped_specs};
use pciback::{DomId, dump};
use toolstack::spec::Filters;

const VFS: u32 = 1000;

/// A VF of QEMU's 82576.
fn vf() -> FunctionSpec {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let text = std::fs::read_to_string(repository.join("pciback/tests/dumps/qemu-igbvf.txt")).unwrap();
    dumped_specs(&dump::parse(&text).unwrap(), Some(pciback::policy::Kind::Virtual)).remove(0).spec
}

/// As many VFs as one would have of one PF: they differ in their addresses and in nothing that the filter is compiled from.
fn vfs() -> Vec<FunctionSpec> {
    let first = vf();
    let of = |index| FunctionSpec { address: first.address.offset_by(2 * index).unwrap(), ..first.clone() };
    (0..VFS).map(of).collect()
}

fn shipped() -> PolicySet {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/policies/intel-82576-vf.yaml");
    let text = std::fs::read_to_string(path).unwrap();
    PolicySet::new(vec![PolicyFile::parse("intel-82576-vf.yaml", &text).unwrap()])
}

/// Bytes in memory: what is measured beside them is the filter alone.
struct Memory(Vec<u8>);

impl ConfigSpace for Memory {
    fn size(&self) -> u16 {
        self.0.len() as u16
    }

    fn read(&self, access: Access) -> io::Result<u32> {
        let at = usize::from(access.offset());
        let bytes = &self.0[at..at + usize::from(access.width().bytes())];
        Ok(bytes.iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte)))
    }

    fn write(&self, _access: Access, value: u32) -> io::Result<()> {
        black_box(value);
        Ok(())
    }
}

/// The peer: for each byte which bits are shown, taken and kept.
struct Bytewise(Vec<(u8, u8, u8, u8)>);

impl Bytewise {
    fn new(filter: &Filter, size: usize) -> Self {
        let cell = |at: usize| {
            let bits = filter.bits(at as u16);
            let byte = |plane: u32| (plane >> (8 * (at & 3))) as u8;
            (byte(bits.hw_read), byte(bits.hw_write), byte(bits.shadow_write), byte(bits.value))
        };
        Self((0..size).map(cell).collect())
    }

    fn read(&self, at: usize, length: usize, hardware: &[u8]) -> u32 {
        (at..at + length).rev().fold(0, |value, at| {
            let (shown, _, _, own) = self.0[at];
            value << 8 | u32::from(hardware[at] & shown | own & !shown)
        })
    }
}

fn accesses(criterion: &mut Criterion) {
    let spec = vf();
    let filter = Arc::new(Filter::compile(&spec, &Policy::default()).unwrap());
    let memory = SharedMemory::anonymous(FunctionImage::BYTES).unwrap();
    let image = FunctionImage::new(memory, ImageOwner { boot: 1, domain: DomId(1) });
    let mut space = VirtualConfigSpace::create(&spec, Arc::clone(&filter), image).unwrap();
    let hardware = Memory(spec.bytes.clone());
    let bytewise = Bytewise::new(&filter, spec.bytes.len());
    let (ids, device_control, pass) =
        (Access::new(0, 4).unwrap(), Access::new(0xa8, 2).unwrap(), Access::new(0x40, 4).unwrap());
    let mut group = criterion.benchmark_group("access");
    group.bench_function("read, no hardware", |bencher| {
        bencher.iter(|| space.read(black_box(ids), &hardware).unwrap());
    });
    group.bench_function("read of the bytewise peer", |bencher| {
        bencher.iter(|| bytewise.read(black_box(0), 4, &hardware.0));
    });
    group.bench_function("read through to memory", |bencher| {
        bencher.iter(|| space.read(black_box(pass), &hardware).unwrap());
    });
    let mut value = 0;
    group.bench_function("write, no hardware", |bencher| {
        bencher.iter(|| {
            value ^= 0x2000;
            space.write(black_box(device_control), value, &hardware).unwrap()
        });
    });
    group.finish();
}

fn compiling(criterion: &mut Criterion) {
    let (specs, policies) = (vfs(), shipped());
    let merged = |spec: &FunctionSpec| policies.merge(&Subject::of(spec, None)).policy;
    let shared = || {
        let filters = Filters::default();
        specs.iter().map(|spec| filters.compile(spec, merged(spec), None).unwrap()).collect::<Vec<_>>()
    };
    let filter = shared();
    let distinct = filter.iter().filter(|one| !Arc::ptr_eq(one, &filter[0])).count() + 1;
    let image = FunctionImage::BYTES;
    println!(
        "memory: {distinct} filter of {} KiB for {VFS} VFs, and a file of {} KiB for each in use: {} KiB a VF",
        filter[0].memory() / 1024,
        image / 1024,
        (filter[0].memory() * distinct / filter.len() + image) / 1024
    );
    let mut group = criterion.benchmark_group("compile");
    group.sample_size(10);
    group.bench_function("1,000 VFs, shared", |bencher| bencher.iter(shared));
    group.bench_function("one VF", |bencher| {
        bencher.iter_batched(
            || merged(&specs[0]),
            |policy| Filter::compile(&specs[0], &policy).unwrap(),
            BatchSize::SmallInput,
        );
    });
    group.finish();
}

criterion_group!(benches, accesses, compiling);
criterion_main!(benches);
