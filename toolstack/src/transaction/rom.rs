//! The expansion ROM that policies give to a guest.
//!
//! An HVM guest gets a copy, made before the guest gets the function, so that a restarted service can use it again. A PV guest maps
//! addresses of the host, where no copy can be: it gets the device's own ROM, which is granted like a BAR.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::libc::O_NONBLOCK;
use nix::unistd::geteuid;
use pciback::config::{ROM_LIMIT, rom_contents};
use pciback::hash::Fnv;
use pciback::platform::{HostFunction, Platform, Resource};
use pciback::policy::{PolicySet, RomSource, Subject};
use pciback::{DomId, Sbdf};

use super::{Context, guest_of};
use crate::domains::{self, DomainType};
use crate::journal::{Record, RomRecord};
use crate::outcome::{ErrorCode, Failure};

/// Mode bits that let users other than the owner write to a file.
const WRITABLE_BY_OTHERS: u32 = 0o022;

/// The path of the copy of a function's ROM, next to its image.
pub fn rom_path(run_directory: &Path, address: Sbdf) -> PathBuf {
    run_directory.join("images").join(format!("{address}.rom"))
}

/// Makes the copy if the policies ask for one. The text is a warning that the guest, a PV guest, cannot have it.
pub(super) fn copy(context: &Context<'_>, record: &mut Record) -> Result<Option<String>, Failure> {
    let (address, domain) = (record.address, guest_of(record)?);
    remove(context, record)?;
    let wanted = wanted(context.platform, context.policies, address, Some(domain))?;
    let Some(wanted) = wanted else { return Ok(None) };
    if domains::kind(context.platform.store.as_ref(), domain)? != DomainType::Hvm {
        let is_file = matches!(wanted.source, RomSource::File(_));
        return Ok(is_file.then(|| {
            format!(
                "{address}: domain {domain} gets no expansion ROM in spite of {}: a PV guest maps the addresses of the device itself, where \
                 no copy can be",
                wanted.asked
            )
        }));
    }
    let contents = wanted.contents(context.platform)?;
    let path = rom_path(&context.settings.run_directory, address);
    write(&path, &contents).map_err(|error| {
        let text =
            format!("cannot write the copy {} of the expansion ROM of {address}: {error}", path.display());
        Failure::new(ErrorCode::Failed, text).on(address)
    })?;
    record.rom = Some(RomRecord { bytes: contents.len() as u32, hash: hash(&contents) });
    Ok(None)
}

/// The place of the function's own expansion ROM, if the policies give that to its guest, a PV guest.
///
/// # Errors
///
/// There is no ROM that could be given.
pub(super) fn own(
    platform: &Platform,
    policies: &PolicySet,
    function: &HostFunction,
    domain: Option<DomId>,
) -> Result<Option<Resource>, Failure> {
    let address = function.address;
    let Some(domain) = domain.filter(|domain| *domain != DomId::DOM0) else { return Ok(None) };
    let wanted = wanted(platform, policies, address, Some(domain))?;
    let Some(wanted) = wanted.filter(|wanted| wanted.source == RomSource::Device) else { return Ok(None) };
    if domains::kind(platform.store.as_ref(), domain)? == DomainType::Hvm {
        return Ok(None);
    }
    let rom = function.rom();
    match unusable(function) {
        None => Ok(Some(*rom)),
        Some(why) => {
            Err(wanted.refusal(&format!("the ROM of {address}: {why}"), "write 'rom: hide' instead"))
        }
    }
}

/// Why a guest cannot map the expansion ROM of a function.
fn unusable(function: &HostFunction) -> Option<&'static str> {
    let rom = function.rom();
    if function.physical_function.is_some() || !rom.exists() {
        return Some("it has none");
    }
    if rom.flags & Resource::ROM_SHADOW != 0 {
        return Some("what the kernel shows as its ROM is a copy that firmware has left in memory");
    }
    if rom.flags & Resource::ENHANCED_ALLOCATION != 0 {
        return Some("its address is in an Enhanced Allocation capability, and it cannot be switched off");
    }
    (!rom.is_placed()).then_some("the kernel found no address for it")
}

/// A warning for a guest that can switch the decoder of the device's ROM.
pub(super) fn shared_decoder(address: Sbdf, domain: DomId) -> String {
    format!(
        "{address}: domain {domain} can enable the device's expansion ROM: if the device has one address decoder for its ROM and its BARs \
         (PCI 3.0, section 6.2.5.2), the BARs do not answer while the ROM is enabled"
    )
}

/// Refuses to attach where the policies name a file that is not a ROM, or give a PV guest a ROM that it cannot map. For an HVM guest, the
/// device's own ROM is read only when the function is attached, because reading it switches the ROM's decoder on.
pub fn refuse_unusable(
    platform: &Platform,
    policies: &PolicySet,
    address: Sbdf,
    domain: Option<DomId>,
) -> Result<(), Failure> {
    let pv = match domain {
        Some(domain) => domains::kind(platform.store.as_ref(), domain)? != DomainType::Hvm,
        None => false,
    };
    match wanted(platform, policies, address, domain)? {
        Some(wanted @ WantedRom { source: RomSource::File(_), .. }) if !pv => {
            wanted.contents(platform).map(drop)
        }
        Some(_) if pv => own(platform, policies, &platform.host.function(address)?, domain).map(drop),
        _ => Ok(()),
    }
}

/// The ROM that the policies give a function.
struct WantedRom {
    address: Sbdf,
    domain: Option<DomId>,
    source: RomSource,
    /// The key, and the policy file that has it.
    asked: String,
}

fn wanted(
    platform: &Platform,
    policies: &PolicySet,
    address: Sbdf,
    domain: Option<DomId>,
) -> Result<Option<WantedRom>, Failure> {
    let function = platform.host.function(address)?;
    let name = domain.map(|domain| domains::name(platform.store.as_ref(), domain)).transpose()?.flatten();
    let merged = policies.merge(&Subject::of_host(&function, name));
    let (source, file) = merged.rom;
    let asked = format!("'rom: {source}' of {}", file.unwrap_or("the policies"));
    Ok((source != RomSource::Hide).then_some(WantedRom { address, domain, source, asked }))
}

impl WantedRom {
    fn contents(&self, platform: &Platform) -> Result<Vec<u8>, Failure> {
        let Self { address, source, .. } = self;
        let (contents, origin, hint) = match source {
            RomSource::File(path) => {
                let hint = "the file must be a ROM as the device has it, beginning with 55 aa, owned by root and not writable by others";
                (read_file(path).map_err(|error| error.to_string()), path.display().to_string(), hint)
            }
            _ => {
                let hint = "write 'rom: FILE' instead, with a file of the vendor or one read on another machine, or 'rom: hide'";
                (read_device(platform, *address), format!("the ROM of {address}"), hint)
            }
        };
        let checked = contents.and_then(|bytes| rom_contents(bytes).map_err(|error| error.to_string()));
        checked.map_err(|why| self.refusal(&format!("{origin}: {why}"), hint))
    }

    fn refusal(&self, why: &str, hint: &str) -> Failure {
        let Self { address, domain, asked, .. } = self;
        let guest = domain.map_or_else(|| "a guest".to_owned(), |domain| format!("domain {domain}"));
        let text = format!("give {address} with an expansion ROM to {guest}, as {asked} says: {why}");
        Failure { domain: *domain, ..Failure::refused(text).on(*address).hint(hint) }
    }
}

/// Reads the copy and compares it with the journal.
pub fn read_copy(run_directory: &Path, address: Sbdf, known: RomRecord) -> Result<Vec<u8>, String> {
    let path = rom_path(run_directory, address);
    let contents = File::open(&path).and_then(read_bounded);
    let contents = contents.map_err(|error| format!("cannot read {}: {error}", path.display()))?;
    if contents.len() != known.bytes as usize || hash(&contents) != known.hash {
        return Err(format!("{} is not what was written there", path.display()));
    }
    Ok(contents)
}

/// Removes the copy.
pub(super) fn remove(context: &Context<'_>, record: &mut Record) -> Result<(), Failure> {
    let path = rom_path(&context.settings.run_directory, record.address);
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            let text = format!("cannot remove the copy {} of an expansion ROM: {error}", path.display());
            Err(Failure::new(ErrorCode::Failed, text).on(record.address))
        }
        _ => {
            record.rom = None;
            Ok(())
        }
    }
}

fn read_device(platform: &Platform, address: Sbdf) -> Result<Vec<u8>, String> {
    platform.host.rom(address, ROM_LIMIT + 1).map_err(|error| match error.errno() {
        Some(Errno::ENOENT) => "it has none".to_owned(),
        _ => format!("the kernel cannot read it: {error}"),
    })
}

/// Reads a ROM file that only root can change, because the guest's firmware runs it.
fn read_file(path: &Path) -> io::Result<Vec<u8>> {
    // O_NONBLOCK, so that opening a FIFO does not block.
    let file = OpenOptions::new().read(true).custom_flags(O_NONBLOCK).open(path)?;
    let status = file.metadata()?;
    if !status.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    if status.uid() != 0 && status.uid() != geteuid().as_raw() {
        return Err(io::Error::other(format!("it is owned by user {}", status.uid())));
    }
    if status.mode() & WRITABLE_BY_OTHERS != 0 {
        return Err(io::Error::other(format!("others may write to it (mode {:o})", status.mode() & 0o7777)));
    }
    read_bounded(file)
}

fn read_bounded(file: File) -> io::Result<Vec<u8>> {
    let mut contents = Vec::new();
    file.take(ROM_LIMIT as u64 + 1).read_to_end(&mut contents)?;
    Ok(contents)
}

fn write(path: &Path, contents: &[u8]) -> io::Result<()> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?.write_all(contents)
}

fn hash(contents: &[u8]) -> u64 {
    let mut hash = Fnv::new();
    hash.add_bytes(contents);
    hash.finish()
}
