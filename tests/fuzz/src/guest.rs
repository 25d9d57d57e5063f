//! Any requests on a guest's page.

use std::sync::{Arc, OnceLock};

use pciback::Sbdf;
use pciback::config::{AnyId, CapabilityList, Filter, FunctionKind, FunctionSpec, InterruptMode, Policy};
use pciback::dump;
use pciback::platform::{MsiSource, SharedMemory};
use pciback::serve::pv::wire::{self, Command, OpAnswer, WireError};
use pciback::serve::{Demand, GuestFunction};
use pciback::spec::CapabilityId;

use crate::byhand;
use crate::hypervisor::Counting;
use crate::space::{self, DOMAIN, Hardware};

/// Functions to drive. All lists are well formed.
const DEVICES: &[&str] = &[
    include_str!("../../../pciback/tests/dumps/qemu-igb.txt"),
    include_str!("../../../pciback/tests/dumps/qemu-virtio-net-aer-ats.txt"),
    include_str!("../../../pciback/tests/dumps/qemu-nvme.txt"),
    include_str!("../../../pciback/tests/dumps/qemu-e1000e.txt"),
    include_str!("../../../pciback/tests/dumps/qemu-rtl8139.txt"),
    include_str!("../../../pciback/tests/dumps/qemu-ich9-ahci.txt"),
    include_str!("../../../pciback/tests/dumps/qemu-cxl-type3.txt"),
    include_str!("../../../pciback/tests/dumps/composed-server-network-pf.txt"),
    include_str!("../../../pciback/tests/dumps/composed-graphics-resizable-bars.txt"),
    include_str!("../../../pciback/tests/dumps/composed-accelerator-64gt-ide.txt"),
    include_str!("../../../pciback/tests/dumps/composed-sata-advanced-features.txt"),
    include_str!("../../../pciback/tests/dumps/composed-pci-x-266.txt"),
];

/// A VF, whose identity and BARs are its PF's to tell: the first device.
const VIRTUAL: &str = include_str!("../../../pciback/tests/dumps/qemu-igbvf.txt");

struct Device {
    spec: FunctionSpec,
    guarded: Vec<u8>,
    filter: Arc<Filter>,
}

impl Device {
    fn new(bytes: &[u8], guarded: Vec<u8>, kind: FunctionKind) -> Self {
        let mut spec = FunctionSpec { kind, ..space::function(bytes) };
        // A VF's BARs are in its PF's capability.
        if matches!(spec.kind, FunctionKind::Physical) {
            space::place_bars(&mut spec);
        }
        let filter =
            Filter::compile(&spec, &Policy::default()).expect("a function that a guest can be given");
        Self { spec, guarded, filter: Arc::new(filter) }
    }
}

fn bytes(text: &str) -> Vec<u8> {
    dump::parse(text).expect("a dump").remove(0).bytes
}

fn devices() -> &'static [Device] {
    static ALL: OnceLock<Vec<Device>> = OnceLock::new();
    ALL.get_or_init(|| {
        let mut all: Vec<Device> = DEVICES
            .iter()
            .map(|text| {
                let bytes = bytes(text);
                let mut guarded = byhand::guarded_well_formed(&bytes);
                // Of Command the service sets decoding, and Interrupt Disable where the line is not delivered.
                guarded[4] &= !0x03;
                guarded[5] &= !0x04;
                Device::new(&bytes, guarded, FunctionKind::Physical)
            })
            .collect();
        let physical_function = Sbdf::from_devfn(0, 1, 0);
        let kind = FunctionKind::Virtual { physical_function, pf_bytes: all[0].spec.bytes.clone(), index: 0 };
        let bytes = bytes(VIRTUAL);
        let mut guarded = byhand::guarded_well_formed(&bytes);
        // A VF's Command has bus mastering only.
        guarded[4] = 0xfb;
        all.push(Device::new(&bytes, guarded, kind));
        all
    })
}

/// Words of a page that a request reaches: flags, ten fields, 128 MSI-X entries.
const WORDS: usize = 10 + 128;
/// Bytes of input for one request.
const REQUEST: usize = 16;

/// The first byte chooses a function, each 16 more are a request and concurrent events.
pub fn ring_request(data: &[u8]) {
    let Some((choice, data)) = data.split_first() else { return };
    let device = &devices()[usize::from(*choice) % devices().len()];
    let spec = &device.spec;
    let hardware = Hardware::new(&spec.bytes);
    let hypervisor = Arc::new(Counting::default());
    let mut function = GuestFunction::new(
        DOMAIN,
        spec.address,
        space::create(spec, Arc::clone(&device.filter)),
        Box::new(hardware.clone()),
        Arc::clone(&hypervisor) as _,
        11,
    );
    let page = SharedMemory::anonymous(4096).expect("memory");
    for (index, request) in data.chunks_exact(REQUEST).take(64).enumerate() {
        put(&page, request);
        let world = request[15];
        hardware.with(|state| state.fails = (world & 0xf0 == 0xf0).then_some(5));
        hypervisor.refuse(world & 0x0f == 0x0f);
        serve(&mut function, &page, index as u32 + 1, device, &hardware);
        check_interrupts(&hypervisor, &spec.bytes);
    }
    hardware.with(|state| state.fails = None);
    hypervisor.refuse(false);
    if function.resetting() {
        function.reset_done().expect("hardware and hypervisor that do not fail");
    }
    function.quiesce().expect("hardware and hypervisor that do not fail");
    assert!(hypervisor.mapped().is_empty(), "interrupts stay mapped: {:?}", hypervisor.mapped());
    assert_eq!(hardware.with(|state| state.bytes[4]) & 4, 0, "the function can still reach memory");
}

/// Fills the page as a guest could: nothing is checked, every word is any value.
fn put(page: &SharedMemory, request: &[u8]) {
    use std::sync::atomic::Ordering::Relaxed;
    let word =
        |at: usize| u32::from_le_bytes([request[at], request[at + 1], request[at + 2], request[at + 3]]);
    let [command, size, offset_low, offset_high] = word(0).to_le_bytes();
    let offset = u32::from(offset_low) | u32::from(offset_high & 0x0f) << 8;
    let (value, extra) = (word(4), word(8));
    // Most offsets are within config space; some are anything.
    let offset = if offset_high & 0x80 != 0 { extra } else { offset };
    let fields = [1, u32::from(command & 7), 0, 0, 0, 0, offset, u32::from(size & 7), value, extra & 1];
    for index in 0..WORDS {
        let entry = extra.wrapping_add((index as u32).wrapping_mul(u32::from(request[12]) << 16));
        page[index].store(fields.get(index).copied().unwrap_or(entry), Relaxed);
    }
    if command & 0x80 != 0 {
        page[usize::from(request[13]) % WORDS].store(word(8), Relaxed);
    }
}

/// What the guest's thread does for each request.
fn serve(
    function: &mut GuestFunction,
    page: &SharedMemory,
    token: u32,
    device: &Device,
    hardware: &Hardware,
) {
    let Some(mut op) = wire::take_request(page) else { return };
    if op.info == 0 {
        op.info = token;
        wire::claim(page, token);
    }
    let before = hardware.with(|state| state.bytes.clone());
    let (answer, demand) = function.execute(&op);
    check_answer(&op, &answer);
    hardware.with(|state| {
        // Interrupts are switched by requests of their own, never by a guest's write.
        let own = matches!(op.command, Command::CONF_READ | Command::CONF_WRITE);
        for (at, guarded) in device.guarded.iter().enumerate().filter(|_| own) {
            let changed = (state.bytes[at] ^ before[at]) & guarded;
            assert_eq!(changed, 0, "guarded bits at {at:#x} were written by {op:x?}");
        }
        assert!(op.command != Command::CONF_READ || state.bytes == before, "a read wrote: {op:x?}");
    });
    if wire::claimed(page, op.info) {
        wire::put_answer(page, &answer);
    }
    function.sent(&op);
    function.take_trouble();
    match demand {
        Some(Demand::Reset) => {
            assert!(function.resetting());
            // As the engine does it: with a host that works again, or the function is gone.
            if function.reset_done().is_err() {
                function.set_gone();
            }
        }
        Some(Demand::Vanished | Demand::DriverStarted | Demand::Vfs | Demand::Message) | None => {}
    }
}

fn check_answer(op: &wire::Op, answer: &OpAnswer) {
    assert!(answer.entries.len() <= wire::MSIX_ENTRIES, "{op:x?}: {} entries", answer.entries.len());
    if op.command == Command::CONF_READ && answer.error == WireError::Success {
        assert!(
            matches!(op.size, 1 | 2 | 4) && op.offset < 4096 && op.offset.is_multiple_of(op.size),
            "{op:x?}"
        );
        assert_eq!(u64::from(answer.value) >> (8 * op.size), 0, "{op:x?}: {:#x}", answer.value);
    }
    assert!(op.command.0 <= 5 || answer.error != WireError::Success, "{op:x?} succeeded");
}

/// Only interrupts that the function can send are mapped, and of one kind.
fn check_interrupts(hypervisor: &Counting, bytes: &[u8]) {
    let list = CapabilityList::walk(bytes);
    let has = |id: u8| list.capabilities.iter().find(|one| one.id == AnyId::Legacy(CapabilityId(id)));
    let mut kinds = Vec::new();
    for (_, source) in hypervisor.mapped().values() {
        kinds.push(match *source {
            MsiSource::Msi => {
                assert!(has(5).is_some());
                InterruptMode::Msi
            }
            MsiSource::MsiX { entry, .. } => {
                let at = usize::from(has(0x11).expect("a function with MSI-X").offset);
                let size = (u16::from_le_bytes([bytes[at + 2], bytes[at + 3]]) & 0x7ff) + 1;
                assert!(entry < size, "entry {entry} of {size}");
                InterruptMode::MsiX
            }
        });
    }
    assert!(kinds.windows(2).all(|pair| pair[0] == pair[1]), "{kinds:?}");
}
