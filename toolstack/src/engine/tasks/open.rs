//! Opens a function for its guest: image, filter and config space.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::time::SystemTime;

use log::warn;
use pciback::DomId;
use pciback::config::{
    Filter, FunctionImage, FunctionSpec, GuestRom, ImageOwner, MailboxPlace, VirtualConfigSpace,
};
use pciback::hash::Fnv;
use pciback::mailbox::{MAILBOX_BYTES, mailbox_memory};
use pciback::memory::Words;
use pciback::platform::{BarMemory, PlatformError, SharedMemory};
use pciback::policy::Subject;
use pciback::serve::hvm::{self, RomCopy};
use pciback::serve::{FunctionMailbox, GuestFunction};

use super::TaskContext;
use crate::domains::{self, DomainType};
use crate::engine::functions::CompiledFilter;
use crate::journal::Record;
use crate::outcome::{ErrorCode, Failure};
use crate::spec::{self, Given};
use crate::transaction::{image_path, mailbox_path, read_rom_copy};

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
    pub lacks: Vec<String>,
    /// Why it has not got the mailbox that a policy gives it.
    pub without_mailbox: Option<String>,
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
        let mut lacks = Vec::new();
        if let Some(MailboxPlace { peers, .. }) = filter.mailbox() {
            let (words, lost) = self.mailbox_file(record, domain, image_state)?;
            lacks.extend(lost);
            let mailbox = FunctionMailbox::open(&self.mailboxes, &spec, domain, peers, &words);
            function.set_mailbox(mailbox);
        }
        let without_mailbox = filter.mailbox_refused();
        let without_mailbox = without_mailbox.map(|why| format!("{address} cannot have a mailbox: {why}"));
        let filter = CompiledFilter { spec, filter, policies: Arc::clone(&self.policies) };
        let open = |bar: u8| Ok((bar, host.bar_memory(address, bar)?));
        let bars = is_hvm.then(|| hvm::trapped_bars(&function).into_iter().map(open).collect());
        let memory: Option<BTreeMap<u8, Box<dyn BarMemory>>> =
            bars.transpose().map_err(|error: PlatformError| Failure::from(error).on(address))?;
        let rom = match self.rom(record) {
            Ok(rom) => rom,
            Err(why) if resumed => {
                lacks.push(format!(
                    "the guest of {address} reads all ones from the expansion ROM that it was given, until the function is attached again: {why}"
                ));
                Some(RomCopy::new(Vec::new()))
            }
            Err(why) => return Err(failed("take over the expansion ROM", &why)),
        };
        let memory = memory.map(|bars| bars.into_iter().chain(rom.map(RomCopy::into_memory)).collect());
        Ok(Opened { function: Box::new(function), filter, memory, lacks, without_mailbox })
    }

    /// The file of a function's mailbox: a new one, or that of an earlier run. One that is lost or damaged is replaced by a new one, and the
    /// second part of the result says so.
    fn mailbox_file(
        &self,
        record: &Record,
        domain: DomId,
        image_state: Image,
    ) -> Result<(Words, Option<String>), Failure> {
        let (address, owner) = (record.address, ImageOwner { boot: boot_number(&record.boot), domain });
        let path = mailbox_path(&self.settings.run_directory, address);
        let open = |begin: Option<u32>| -> Result<Words, String> {
            if let (Some(_), Some(directory)) = (begin, path.parent()) {
                fs::create_dir_all(directory).map_err(|error| error.to_string())?;
            }
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(begin.is_some()).mode(0o600);
            let file = options.open(&path).map_err(|error| error.to_string())?;
            if begin.is_some() {
                file.set_len(MAILBOX_BYTES as u64).map_err(|error| error.to_string())?;
            }
            let memory = SharedMemory::map_file(&file, MAILBOX_BYTES).map_err(|error| error.to_string())?;
            mailbox_memory(memory, owner, address, begin).map_err(|error| error.to_string())
        };
        let begin = || {
            // Messages of an earlier user of the function had other numbers.
            let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
            open(Some(now.as_nanos() as u32)).map_err(|why| {
                let text = format!("cannot create the mailbox {} of {address}: {why}", path.display());
                Failure::new(ErrorCode::Failed, text).on(address).of(domain)
            })
        };
        match image_state {
            Image::New => Ok((begin()?, None)),
            Image::Resumed => open(None).map(|words| (words, None)).or_else(|why| {
                let lost = format!(
                    "the mailbox of {address} was lost, and what was in it: {} cannot be taken over: {why}",
                    path.display()
                );
                Ok((begin()?, Some(lost)))
            }),
        }
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
            policy.keep_vfs_beside_pf();
            // It does not reach extended config space.
            policy.mailbox = None;
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
