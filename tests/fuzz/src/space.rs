//! A function made of bytes, all of which can be written, and its virtual config space.

use std::io;
use std::sync::atomic::AtomicU32;
use std::sync::{Arc, Mutex};

use pciback::config::{
    Access, ConfigSpace, Filter, FunctionImage, FunctionKind, FunctionSpec, Identity, ImageOwner,
    VirtualConfigSpace,
};
use pciback::memory::SharedWords;
use pciback::platform::{Resource, SharedMemory};
use pciback::{DomId, Sbdf};

pub const DOMAIN: DomId = DomId(3);

/// Config space that stores what is written. Clones share it.
#[derive(Clone)]
pub struct Hardware(pub Arc<Mutex<State>>);

#[derive(Default)]
pub struct State {
    pub bytes: Vec<u8>,
    /// What accesses fail with.
    pub fails: Option<i32>,
    pub writes: usize,
}

impl Hardware {
    pub fn new(bytes: &[u8]) -> Self {
        Self(Arc::new(Mutex::new(State { bytes: bytes.to_vec(), ..State::default() })))
    }

    pub fn with<T>(&self, action: impl FnOnce(&mut State) -> T) -> T {
        action(&mut self.0.lock().expect("no panic holds it"))
    }
}

impl ConfigSpace for Hardware {
    fn size(&self) -> u16 {
        self.with(|state| state.bytes.len() as u16)
    }

    fn read(&self, access: Access) -> io::Result<u32> {
        self.with(|state| {
            if let Some(errno) = state.fails {
                return Err(io::Error::from_raw_os_error(errno));
            }
            let from = usize::from(access.offset());
            let bytes = &state.bytes[from..from + usize::from(access.width().bytes())];
            Ok(bytes.iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte)))
        })
    }

    fn write(&self, access: Access, value: u32) -> io::Result<()> {
        self.with(|state| {
            if let Some(errno) = state.fails {
                return Err(io::Error::from_raw_os_error(errno));
            }
            assert_eq!(value & !access.width().mask(), 0, "a write wider than its access");
            state.writes += 1;
            let (from, length) = (usize::from(access.offset()), usize::from(access.width().bytes()));
            state.bytes[from..from + length].copy_from_slice(&value.to_le_bytes()[..length]);
            Ok(())
        })
    }
}

/// What the host would say of a function of which only the bytes are known: every BAR has a range of its register's kind.
pub fn function(bytes: &[u8]) -> FunctionSpec {
    let mut resources = [Resource::default(); 13];
    for (index, resource) in resources.iter_mut().take(6).enumerate() {
        *resource = if bytes[0x10 + 4 * index] & 1 != 0 {
            Resource { start: 0xe000 + 0x20 * index as u64, size: 0x20, flags: Resource::IO }
        } else {
            Resource { start: 0xfe80_0000 + 0x4000 * index as u64, size: 0x4000, flags: Resource::MEMORY }
        };
    }
    FunctionSpec {
        address: Sbdf::from_devfn(0, 1, 0x80),
        bytes: bytes.to_vec(),
        resources,
        identity: Identity { vendor: 0x1af4, device: 0x10f0, ..Identity::default() },
        kind: FunctionKind::Physical,
        gsi: 11,
        rom: None,
    }
}

/// Writes the addresses of the ranges into the BARs, as the host's firmware or kernel has done before a guest gets the function.
pub fn place_bars(spec: &mut FunctionSpec) {
    const BAR0: usize = 0x10;
    let mut index = 0;
    while index < 6 {
        let at = BAR0 + 4 * index;
        let kind = spec.bytes[at] & if spec.bytes[at] & 1 != 0 { 0x3 } else { 0xf };
        let wide = kind & 7 == 4 && index < 5;
        let value = spec.resources[index].start | u64::from(kind);
        let length = if wide { 8 } else { 4 };
        spec.bytes[at..at + length].copy_from_slice(&value.to_le_bytes()[..length]);
        index += length / 4;
    }
}

/// Words of a file that outlives a service. Clones share them.
#[derive(Debug, Clone)]
pub struct Kept(Arc<[AtomicU32]>);

impl Kept {
    /// A file of so many bytes, zeros at first.
    pub fn new(bytes: usize) -> Self {
        Self((0..bytes / 4).map(|_| AtomicU32::new(0)).collect())
    }

    /// An image over it.
    pub fn image(&self) -> FunctionImage {
        FunctionImage::new(self.clone(), ImageOwner { boot: 1, domain: DOMAIN })
    }
}

impl SharedWords for Kept {
    fn words(&self) -> &[AtomicU32] {
        &self.0
    }
}

/// The beginning of a function's attachment to a guest.
pub fn create(spec: &FunctionSpec, filter: Arc<Filter>) -> VirtualConfigSpace {
    let memory = SharedMemory::anonymous(FunctionImage::BYTES).expect("memory");
    let image = FunctionImage::new(memory, ImageOwner { boot: 1, domain: DOMAIN });
    VirtualConfigSpace::create(spec, filter, image).expect("filter of the same function")
}

/// All that a guest reads.
pub fn guest_bytes(space: &VirtualConfigSpace, hardware: &Hardware) -> Vec<u8> {
    let dword = |offset| {
        let access = Access::new(u32::from(offset), 4).expect("a dword within it");
        space.read(access, hardware).expect("hardware that does not fail").to_le_bytes()
    };
    (0..space.filter().size()).step_by(4).flat_map(dword).collect()
}
