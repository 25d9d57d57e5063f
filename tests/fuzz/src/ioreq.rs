//! Any requests of an HVM guest's vCPUs, of services that are killed between them, too.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, OnceLock};

use pciback::config::{CapabilityList, Filter, FunctionImage, FunctionSpec, Policy, VirtualConfigSpace};
use pciback::platform::{BarMemory, DeviceModels, HvmDomains, IoreqServer, Resource, ServerId, SharedMemory};
use pciback::serve::hvm::wire::{self, xen};
use pciback::serve::hvm::{ConfigPorts, Connection, Device, ECAM_BASE, RomCopy, Unthreaded, trapped_bars};
use pciback::serve::{GuestFunction, ServerReport};
use pciback::spec::CapabilityId;
use pciback::{Devfn, DeviceNumber, Sbdf, dump};

use crate::byhand;
use crate::hvm::{Memory, Model, Page, Xen};
use crate::hypervisor::Counting;
use crate::space::{self, DOMAIN, Hardware, Kept};

/// Functions that a guest has together.
const DEVICES: [&str; 4] = [
    include_str!("../../../pciback/tests/dumps/qemu-igb.txt"),
    include_str!("../../../pciback/tests/dumps/qemu-nvme.txt"),
    include_str!("../../../pciback/tests/dumps/qemu-ich9-ahci.txt"),
    include_str!("../../../pciback/tests/dumps/composed-graphics-resizable-bars.txt"),
];
/// The device number of the first one in the guest.
const SLOT: u8 = 3;
/// The first one has more vectors than an image can note, which is one page less than a BAR.
const MANY: u16 = 0x380;
/// More than that.
const INTERRUPTS: usize = 600;
/// The bytes of BARs in memory, by index.
const SIZES: [u64; 6] = [0x4000, 0x100, 0x1000, 0x4000, 0x8000, 0x80];
/// Where the guest may place them: beside and over each other, at the ends of what is possible, over what is not free.
const PLACES: [u64; 16] = [
    0xf300_0000,
    0xf300_4000,
    0xf300_4100,
    0xf300_8000,
    0xf301_0000,
    0xfebf_c000,
    0xfebf_ff00,
    ECAM_BASE,
    ECAM_BASE + 0x1_8000,
    0xfec0_0000,
    0xffff_c000,
    0x1_0000_0000,
    0x7f_ffff_c000,
    0x80_0000_0000,
    0xffff_ffff_ffff_c000,
    0xc000,
];
const SIZE: [u32; 8] = [1, 2, 4, 8, 4, 0, 3, 16];

struct Function {
    spec: FunctionSpec,
    filter: Arc<Filter>,
    /// The bits of config space that no guest changes.
    guarded: Vec<u8>,
    msi: Option<u16>,
    msix: Option<u16>,
    /// Its MSI-X table: where it is in its BAR, and how many entries it has.
    table: u64,
    entries: u16,
}

fn functions() -> &'static [Function] {
    static ALL: OnceLock<Vec<Function>> = OnceLock::new();
    ALL.get_or_init(|| {
        let mut policy = Policy::default();
        policy.hide_enhanced_allocation();
        let function = |(index, text): (usize, &&str)| {
            let mut bytes = dump::parse(text).expect("a dump").remove(0).bytes;
            let list = CapabilityList::walk(&bytes);
            let at = |id| list.legacy(CapabilityId(id)).map(|capability| capability.offset);
            let (msi, msix) = (at(0x05), at(0x11));
            if let Some(msix) = msix.filter(|_| index == 0) {
                bytes[usize::from(msix) + 2..][..2].copy_from_slice(&(MANY - 1).to_le_bytes());
                bytes[usize::from(msix) + 4..][..4].copy_from_slice(&3u32.to_le_bytes());
                bytes[usize::from(msix) + 8..][..4].copy_from_slice(&(0x3800u32 | 3).to_le_bytes());
            }
            let mut spec = space::function(&bytes);
            spec.address = Sbdf::from_devfn(0, 1 + index as u8, 0);
            for (resource, size) in spec.resources.iter_mut().zip(SIZES) {
                match resource.is_io() {
                    true => resource.start += 0x100 * index as u64,
                    false => {
                        let start = resource.start + 0x10_0000 * index as u64;
                        *resource = Resource { start, size, flags: resource.flags };
                    }
                }
            }
            spec.rom = Some(pciback::config::GuestRom::Copy(0x1000));
            space::place_bars(&mut spec);
            let mut guarded = byhand::guarded_well_formed(&spec.bytes);
            // Of Command the service sets decoding, and Interrupt Disable; of interrupts, what Xen lets it set.
            guarded[4] &= !0x03;
            guarded[5] &= !0x04;
            for control in [msi, msix].into_iter().flatten().map(usize::from) {
                guarded[control + 2..control + 4].fill(0);
            }
            if let Some(msi) = msi.map(usize::from) {
                let mask = msi + if spec.bytes[msi + 2] & 0x80 != 0 { 0x10 } else { 0x0c };
                guarded[mask..mask + 4].fill(0);
            }
            // The service switches its decoder off.
            guarded[0x30..0x34].fill(0);
            let filter =
                Arc::new(Filter::compile(&spec, &policy).expect("a function that a guest can be given"));
            let image = Kept::new(FunctionImage::HVM_BYTES).image();
            let space =
                VirtualConfigSpace::create(&spec, Arc::clone(&filter), image).expect("its own filter");
            let (table, entries) =
                space.msix().map_or((0, 0), |msix| (u64::from(msix.table_offset), msix.table_size));
            Function { spec, filter, guarded, msi, msix, table, entries }
        };
        DEVICES.iter().enumerate().map(function).collect()
    })
}

fn slot(index: usize) -> DeviceNumber {
    DeviceNumber::new(SLOT + index as u8).expect("below 32")
}

/// What outlives a service of one function.
struct Left {
    function: &'static Function,
    hardware: Hardware,
    image: Kept,
    memory: BTreeMap<u8, Memory>,
}

struct Guest {
    hypervisor: Arc<Counting>,
    xen: Arc<Xen>,
    model: Arc<Model>,
    page: Page,
    left: Vec<Left>,
    /// Where their tables are, if those were the BARs that the guest placed last.
    tables: Vec<u64>,
    /// Functions whose reset is asked for.
    resets: Arc<Mutex<Vec<Sbdf>>>,
    /// Functions that do not answer, of which nothing can be switched off.
    vanished: Arc<Mutex<BTreeSet<Sbdf>>>,
}

impl Guest {
    fn new() -> Self {
        let hypervisor = Arc::new(Counting::with_limit(INTERRUPTS));
        let left = functions().iter().map(|function| Left {
            function,
            hardware: Hardware::new(&function.spec.bytes),
            image: Kept::new(FunctionImage::HVM_BYTES),
            memory: BTreeMap::new(),
        });
        let mut left: Vec<Left> = left.collect();
        let spaces: Vec<VirtualConfigSpace> = left.iter().map(Left::create).collect();
        for (left, space) in left.iter_mut().zip(&spaces) {
            left.memory = space.bars().iter().map(|bar| (bar.index, Memory::new(space, bar))).collect();
        }
        let xen = Xen::new(&hypervisor, left.iter().map(|left| &left.function.spec).zip(&spaces));
        let tables = vec![0; left.len()];
        Self {
            hypervisor,
            xen: Arc::new(xen),
            model: Model::new(),
            page: Page::new(),
            left,
            tables,
            resets: Arc::default(),
            vanished: Arc::default(),
        }
    }

    /// What the first process of the service does, or another one, `again`.
    fn serve(&self, again: bool) -> Unthreaded {
        let taken = Arc::default();
        let mut functions = BTreeMap::new();
        for (index, left) in self.left.iter().enumerate() {
            let Function { spec, filter, .. } = left.function;
            let space = if again {
                VirtualConfigSpace::resume(spec, Arc::clone(filter), left.image.image(), &left.hardware)
                    .expect("an image of ours")
            } else {
                left.create()
            };
            let hardware = Box::new(left.hardware.clone());
            let hypervisor = Arc::clone(&self.hypervisor) as _;
            let mut function = GuestFunction::new(DOMAIN, spec.address, space, hardware, hypervisor, 11);
            function.keep_hardware().expect("hardware that does not fail");
            let trapped = trapped_bars(&function).into_iter();
            let mut memory: BTreeMap<u8, Box<dyn BarMemory>> =
                trapped.map(|bar| (bar, Box::new(left.memory[&bar].clone()) as _)).collect();
            memory.extend([RomCopy::new(vec![0x55; 0x1000]).into_memory()]);
            let domains = Arc::clone(&self.xen) as Arc<dyn HvmDomains>;
            Device::new(domains, ServerId(1), slot(index), Arc::clone(&taken), memory)
                .enter(&mut function, again)
                .expect("Xen refuses nothing yet");
            functions.insert(slot(index).devfn(), Box::new(function));
        }
        let connection = Connection {
            server: Box::new(self.page.clone()),
            ports: ConfigPorts::new(SharedMemory::anonymous(ConfigPorts::BYTES).expect("memory")),
            taken,
            domains: Arc::clone(&self.xen) as Arc<dyn HvmDomains>,
            models: Arc::clone(&self.model) as Arc<dyn DeviceModels>,
            shared: false,
        };
        let (resets, vanished) = (Arc::clone(&self.resets), Arc::clone(&self.vanished));
        // What did not answer the last process is looked at again.
        vanished.lock().expect("no panic holds it").clear();
        let report = move |report| match report {
            ServerReport::ResetWanted(attachment) => {
                resets.lock().expect("no panic holds it").push(attachment.address());
            }
            ServerReport::Vanished(attachment) | ServerReport::RestoreFailed(attachment, _) => {
                vanished.lock().expect("no panic holds it").insert(attachment.address());
            }
            _ => {}
        };
        Unthreaded::start(DOMAIN, connection, functions, Box::new(report))
    }

    fn world(&self, fails: Option<i32>, refuses: bool) {
        for left in &self.left {
            left.hardware.with(|state| state.fails = fails);
        }
        self.xen.refuse(refuses);
        self.hypervisor.refuse(refuses);
        self.model.refuse(refuses);
    }

    /// The resets that were asked for end.
    fn end_resets(&self, server: &mut Unthreaded, verified: bool) {
        let resets = std::mem::take(&mut *self.resets.lock().expect("no panic holds it"));
        for address in resets {
            let index = self.left.iter().position(|left| left.function.spec.address == address);
            server.reset_ended(slot(index.expect("a function of ours")).devfn(), verified);
            if !verified {
                self.vanished.lock().expect("no panic holds it").insert(address);
            }
        }
    }

    fn bytes(&self) -> Vec<Vec<u8>> {
        self.left.iter().map(|left| left.hardware.with(|state| state.bytes.clone())).collect()
    }

    fn put(&self, vcpu: u16, access: &xen::Access) {
        // Xen has no second request of a vCPU before the first is answered.
        if self.page.page()[usize::from(vcpu) * 8 + 7].load(Relaxed) & 0xf << 16 == 0 {
            xen::put_request(self.page.page(), vcpu, access);
        }
    }

    /// Has all requests answered.
    fn answer(&self, server: &mut Unthreaded) {
        server.serve();
        for vcpu in 0..wire::VCPUS {
            let kind = self.page.page()[usize::from(vcpu) * 8 + 7].load(Relaxed);
            let waits = matches!(kind >> 16 & 0xf, 1 | 2);
            assert!(!waits, "vCPU {vcpu} waits for an answer");
            xen::take_answer(self.page.page(), vcpu);
        }
    }

    fn ask(&self, server: &mut Unthreaded, access: xen::Access) {
        self.put(0, &access);
        self.answer(server);
    }

    /// That nothing was written that no guest changes, since config space had these bytes.
    fn check(&self, before: &[Vec<u8>]) {
        for ((left, before), after) in self.left.iter().zip(before).zip(self.bytes()) {
            if *before == after {
                continue;
            }
            for (at, guarded) in left.function.guarded.iter().enumerate() {
                let changed = (before[at] ^ after[at]) & guarded;
                let address = left.function.spec.address;
                assert_eq!(changed, 0, "guarded bits {changed:#x} of {address} at {at:#x} were written");
            }
        }
        self.xen.check_bound();
    }
}

impl Left {
    fn create(&self) -> VirtualConfigSpace {
        let Function { spec, filter, .. } = self.function;
        VirtualConfigSpace::create(spec, Arc::clone(filter), self.image.image()).expect("its own filter")
    }
}

/// Each 12 bytes are what a vCPU does, and what happens in the world then.
pub fn ioreq(data: &[u8]) {
    let mut guest = Guest::new();
    let mut server = guest.serve(false);
    for step in data.chunks_exact(12).take(80) {
        match step[3] {
            0x7e => {
                guest.world(None, false);
                // What the last process was asked for, the next one knows from the image.
                guest.end_resets(&mut server, true);
                drop(server);
                server = guest.serve(true);
            }
            world => {
                let errno = if world & 1 != 0 { 19 } else { 5 };
                let fails = (world & 0xf0 == 0xf0).then_some(errno);
                guest.world(fails, world & 0x0f == 0x0f);
            }
        }
        let before = guest.bytes();
        act(&mut guest, &mut server, step);
        guest.check(&before);
        guest.end_resets(&mut server, step[3] & 0x3f != 0x3d);
    }
    guest.world(None, false);
    guest.answer(&mut server);
    guest.end_resets(&mut server, true);
    for (_, mut function) in server.stop() {
        let resets = function.resetting();
        let vanished = guest.vanished.lock().expect("no panic holds it").contains(&function.address());
        function.quiesce().expect("hardware and Xen that do not fail");
        let index = guest.left.iter().position(|left| left.function.spec.address == function.address());
        let hardware = &guest.left[index.expect("a function of ours")].hardware;
        let masters = hardware.with(|state| state.bytes[4] & 4 != 0);
        assert!(!masters || resets || vanished, "{} can still reach memory", function.address());
    }
    let mapped = guest.hypervisor.mapped();
    assert!(mapped.is_empty(), "interrupts stay mapped: {mapped:?}");
    guest.xen.check_nothing_left();
}

fn act(guest: &mut Guest, server: &mut Unthreaded, step: &[u8]) {
    let index = usize::from(step[2] & 3);
    let place = PLACES[usize::from(step[2] >> 4)];
    let size = SIZE[usize::from(step[1] & 7)];
    let offset = u16::from_le_bytes([step[4], step[5]]);
    let value = u32::from_le_bytes([step[8], step[9], step[10], step[11]]);
    let write = (step[0] & 0x80 != 0).then_some(value);
    let long = write.map(|value| u64::from(value) | u64::from(value) << 32);
    let own = SLOT + index as u8;
    let Function { msi, msix, .. } = *guest.left[index].function;
    let capability = |at: Option<u16>, offset: u16, size| {
        xen::config(own, at.unwrap_or(0xfc).saturating_add(offset) & 0xfff, size, write)
    };
    let access = match step[0] & 0x0f {
        0 | 1 => xen::config(own, offset & 0xfff, size, write),
        2 => xen::Access {
            address: u64::from(value) << 32 | u64::from(offset),
            ..xen::config(0, 0, size, write)
        },
        3 => {
            let devfn = Devfn(step[7]).0;
            let devfn = if step[6] & 1 == 0 { slot(index).devfn().0 } else { devfn };
            xen::memory(ECAM_BASE + (u64::from(devfn) << 12) + u64::from(offset & 0xfff), size, long)
        }
        4 => xen::memory(place.wrapping_add(u64::from(offset)), size, long),
        5 => xen::memory(place.wrapping_sub(u64::from(offset & 0x1f)), size, long),
        6 => xen::memory(u64::from(value) << (step[6] & 0x3f), size, long),
        7 if step[6] & 1 == 0 => xen::port(0xcf8 + (offset & 7), size, write),
        7 => xen::port(offset, size, write),
        8 => {
            let count = u32::from(step[6]) << (step[7] & 0xf);
            let items = xen::Items { memory: u64::from(value) << 8, count, down: step[1] & 0x80 != 0 };
            xen::read_items(place.wrapping_add(u64::from(offset)), size, items)
        }
        9 => {
            // Both halves, as a guest that knows of 64-bit BARs does it.
            let bar = u16::from(step[4] % 6);
            let (low, high) = ((place | u64::from(step[6] & 1)) as u32, (place >> 32) as u32);
            guest.ask(server, xen::config(own, 0x10 + 4 * bar, 4, Some(low)));
            if high != 0 || step[6] & 2 != 0 {
                guest.ask(server, xen::config(own, 0x14 + 4 * bar, 4, Some(high)));
            }
            guest.tables[index] = place.wrapping_add(guest.left[index].function.table);
            xen::config(own, 4, 2, Some(u32::from(step[6] >> 4 & 7)))
        }
        10 => xen::config(own, 4, 2, write.map(|value| value & 0x0407)),
        11 => capability(msix, 2, 2),
        12 => {
            // What Xen never writes, on any vCPU.
            let vcpu = u16::from(step[7] & 0x7f);
            let at = usize::from(vcpu) * 8;
            let words = [value, u32::from(step[6]), value.rotate_left(9), value, u32::from(offset), size];
            for (index, word) in words.into_iter().enumerate() {
                guest.page.page()[at + index].store(word, Relaxed);
            }
            let kind = 1 << 16 | u32::from(step[1]) << 20 | u32::from(step[2]) << 24;
            guest.page.page()[at + 7].store(kind, Relaxed);
            return guest.answer(server);
        }
        13 => {
            let vcpus = usize::from(wire::VCPUS);
            for (entry, vcpu) in (0..guest.left[index].function.entries).zip((0..vcpus).cycle()) {
                let at = guest.tables[index].wrapping_add(16 * u64::from(entry)) + u64::from(step[4] & 0xc);
                guest.put(vcpu as u16, &xen::memory(at, 4, long));
                if vcpu + 1 == vcpus {
                    guest.answer(server);
                }
            }
            guest.answer(server);
            return;
        }
        14 => {
            let entry = offset % guest.left[index].function.entries.max(1);
            let at = guest.tables[index].wrapping_add(16 * u64::from(entry)) + u64::from(step[6] & 0xf);
            xen::memory(at, size, long)
        }
        _ => capability(msi, u16::from(step[4] & 0x1f), size),
    };
    // Others may have something to ask, too.
    guest.put(u16::from(step[7] & 0x7f), &access);
    if step[1] & 0x40 == 0 {
        guest.answer(server);
    }
}
