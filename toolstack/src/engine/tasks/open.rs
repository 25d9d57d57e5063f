//! Opens a function for its guest: image, filter and config space.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::sync::Arc;

use log::warn;
use pciback::DomId;
use pciback::config::{Filter, FunctionImage, FunctionSpec, GuestRom, ImageOwner, VirtualConfigSpace};
use pciback::hash::Fnv;
use pciback::platform::{BarMemory, PlatformError, SharedMemory};
use pciback::policy::Subject;
use pciback::serve::GuestFunction;
use pciback::serve::hvm::{self, RomCopy};

use super::TaskContext;
use crate::domains::{self, DomainType};
use crate::engine::functions::CompiledFilter;
use crate::journal::Record;
use crate::outcome::{ErrorCode, Failure};
use crate::spec::{self, Given};
use crate::transaction::{image_path, read_rom_copy};

/// What is in the image of a function that is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::engine) enum Image {
    /// Nothing yet.
    New,
    /// The state in which an earlier run of the service left the function.
    Resumed,
}

/// A function that is opened for its guest.
pub struct Opened {
    /// The function, ready to be served.
    pub function: Box<GuestFunction>,
    /// Its filter.
    pub filter: CompiledFilter,
    /// For an HVM guest: the memory of the BARs that are not mapped as a whole.
    pub memory: Option<BTreeMap<u8, Box<dyn BarMemory>>>,
    /// What an earlier run gave to the guest and this run cannot serve.
    pub lacks: Option<String>,
}

impl TaskContext {
    /// Opens the image and the config space of a function for a guest.
    pub(in crate::engine) fn open_function(
        &self,
        record: &Record,
        domain: DomId,
        image_state: Image,
    ) -> Result<Opened, Failure> {
        let address = record.address;
        let failed = |what: &str, why: &dyn std::fmt::Display| {
            Failure::new(ErrorCode::Failed, format!("{what} of {address}: {why}")).on(address).of(domain)
        };
        let path = image_path(&self.settings.run_directory, address);
        let file = OpenOptions::new().read(true).write(true).open(&path);
        let file = file.map_err(|error| failed("open the image", &error))?;
        let is_hvm = domains::kind(self.platform.store.as_ref(), domain)? == DomainType::Hvm;
        let bytes = if is_hvm { FunctionImage::HVM_BYTES } else { FunctionImage::BYTES };
        let memory = SharedMemory::map_file(&file, bytes);
        let memory = memory.map_err(|error| failed("map the image", &error))?;
        let image = FunctionImage::new(memory, ImageOwner { boot: boot_number(&record.boot), domain });
        let host = self.platform.host.as_ref();
        let given = Given { line: !record.without_line, rom: guest_rom(record) };
        let spec = Arc::new(spec::guest_spec(host, address, given)?);
        // Capabilities that the guest has seen stay visible, even if policies have changed.
        let resumed = image_state == Image::Resumed;
        let visible = resumed.then(|| image.visible_capabilities(spec.bytes.len()));
        let filter = self.compile_filter(&spec, domain, visible.as_deref())?;
        let hardware = host.config(address)?;
        let space = match resumed {
            false => VirtualConfigSpace::create(&spec, Arc::clone(&filter), image),
            true => VirtualConfigSpace::resume(&spec, Arc::clone(&filter), image, hardware.as_ref()),
        };
        let mut space = space.map_err(|error| failed("take over the config space", &error))?;
        if let Some(place) = record.guest {
            space.show_own_number(place.devfn);
        }
        let hypervisor = Arc::clone(&self.platform.hypervisor);
        let mut function = GuestFunction::new(domain, address, space, hardware, hypervisor, spec.gsi);
        match function.keep_hardware() {
            // The state of a function that a guest uses is checked elsewhere.
            Err(error) if resumed => warn!("{address}: bring hardware into step: {error}"),
            kept => kept.map_err(|error| failed("set decoding and interrupts", &error))?,
        }
        let filter = CompiledFilter { spec, filter, policies: Arc::clone(&self.policies) };
        let open = |bar: u8| Ok((bar, host.bar_memory(address, bar)?));
        let bars = is_hvm.then(|| hvm::trapped_bars(&function).into_iter().map(open).collect());
        let memory: Option<BTreeMap<u8, Box<dyn BarMemory>>> =
            bars.transpose().map_err(|error: PlatformError| Failure::from(error).on(address))?;
        let (rom, lacks) = match self.rom(record) {
            Ok(rom) => (rom, None),
            Err(why) if resumed => (Some(RomCopy::new(Vec::new())), Some(why)),
            Err(why) => return Err(failed("take over the expansion ROM", &why)),
        };
        let memory = memory.map(|bars| bars.into_iter().chain(rom.map(RomCopy::into_memory)).collect());
        Ok(Opened { function: Box::new(function), filter, memory, lacks })
    }

    /// The guest's copy of the expansion ROM, if it has one.
    fn rom(&self, record: &Record) -> Result<Option<RomCopy>, String> {
        let Some(known) = record.rom else { return Ok(None) };
        read_rom_copy(&self.settings.run_directory, record.address, known).map(|rom| Some(RomCopy::new(rom)))
    }

    /// The filter of a function for a guest; functions with the same filter share one.
    pub(in crate::engine) fn compile_filter(
        &self,
        spec: &FunctionSpec,
        domain: DomId,
        visible: Option<&[u16]>,
    ) -> Result<Arc<Filter>, Failure> {
        let name = domains::name(self.platform.store.as_ref(), domain)?;
        let mut policy = self.policies.merge(&Subject::of(spec, name.as_deref())).policy;
        if domains::kind(self.platform.store.as_ref(), domain)? == DomainType::Hvm {
            policy.hide_enhanced_allocation();
            policy.virtual_functions = None;
        }
        self.filters.compile(spec, policy, visible)
    }
}

/// The expansion ROM that the guest of a function has.
fn guest_rom(record: &Record) -> Option<GuestRom> {
    let copy = record.rom.map(|rom| GuestRom::Copy(rom.bytes));
    copy.or_else(|| record.own_rom.then_some(GuestRom::OfHost))
}

/// The boot identifier as a number, as the header of the image has it.
fn boot_number(boot: &str) -> u64 {
    let mut hash = Fnv::new();
    hash.add_bytes(boot.as_bytes());
    hash.finish()
}
