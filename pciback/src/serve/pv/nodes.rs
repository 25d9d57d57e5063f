//! The xenstore nodes of a guest's PCI device: every path and key is spelled here and nowhere else.

use crate::platform::{Permissions, Result, Store, StoreOps};
use crate::{Devfn, DeviceNumber, DomId, Sbdf};

use super::wire::MAGIC;

/// The keys of the two directories.
pub(crate) mod key {
    pub const STATE: &str = "state";
    pub const NUM_DEVS: &str = "num_devs";
    pub const OP_REF: &str = "pci-op-ref";
    pub const EVENT_CHANNEL: &str = "event-channel";
    pub const MAGIC: &str = "magic";
}

/// A device's state as its two ends publish it (`XenbusState`); unknown numbers are kept as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct XenbusState(pub u32);

impl XenbusState {
    /// Nothing is known.
    pub const UNKNOWN: Self = Self(0);
    /// The toolstack has made the device.
    pub const INITIALISING: Self = Self(1);
    /// Early set-up is done; the other end is awaited.
    pub const INIT_WAIT: Self = Self(2);
    /// This end has published what the other end needs.
    pub const INITIALISED: Self = Self(3);
    /// In use.
    pub const CONNECTED: Self = Self(4);
    /// Going away.
    pub const CLOSING: Self = Self(5);
    /// Gone.
    pub const CLOSED: Self = Self(6);
    /// The set of functions changes.
    pub const RECONFIGURING: Self = Self(7);
    /// The set of functions has changed.
    pub const RECONFIGURED: Self = Self(8);
}

/// Where our backends are, a directory for each guest.
pub const BACKENDS: &str = "/local/domain/0/backend/xpci";

/// The directory of our end, of a type of our own: xen-pciback looks after `backend/pci` only.
pub fn backend_directory(domain: DomId) -> String {
    format!("{BACKENDS}/{domain}/0")
}

/// The directory of the guest's end.
pub fn frontend_directory(domain: DomId) -> String {
    format!("/local/domain/{domain}/device/pci/0")
}

/// Whose nodes a change is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Ours; the guest may read.
    Backend,
    /// The guest's; dom0 may read.
    Frontend,
}

/// One change of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NodeChange {
    /// Writes a key of one end's directory.
    Write(End, String, String),
    /// Removes a key.
    Remove(End, String),
    /// Removes both directories.
    RemoveAll,
}

impl NodeChange {
    pub(crate) fn backend(key: impl Into<String>, value: impl ToString) -> Self {
        Self::Write(End::Backend, key.into(), value.to_string())
    }

    pub(crate) fn frontend(key: impl Into<String>, value: impl ToString) -> Self {
        Self::Write(End::Frontend, key.into(), value.to_string())
    }

    /// The changes that publish a device without functions.
    pub(crate) fn device(domain: DomId) -> Vec<Self> {
        vec![
            Self::backend("frontend", frontend_directory(domain)),
            Self::backend("frontend-id", domain),
            Self::backend("online", 1),
            Self::backend("root_num", 1),
            Self::backend("root-0", "0000:00"),
            Self::frontend("backend", backend_directory(domain)),
            Self::frontend("backend-id", DomId::DOM0),
            Self::frontend(key::STATE, XenbusState::INITIALISING.0),
        ]
    }

    /// The changes that publish one function at an index.
    pub(crate) fn function(index: u32, address: Sbdf, devfn: Devfn, state: XenbusState) -> Vec<Self> {
        let mut changes = vec![Self::backend(format!("dev-{index}"), address)];
        changes.extend(Self::function_to_drop(index, devfn, state));
        changes
    }

    /// The changes that publish at an index what a guest needs to drop a function.
    pub(crate) fn function_to_drop(index: u32, devfn: Devfn, state: XenbusState) -> [Self; 2] {
        let seen = format!("0000:00:{:02x}.{:02x}", devfn.device(), devfn.function());
        [Self::backend(format!("vdev-{index}"), seen), Self::function_state(index, state)]
    }

    pub(crate) fn function_state(index: u32, state: XenbusState) -> Self {
        Self::backend(format!("state-{index}"), state.0)
    }

    /// The change that leaves of a function only what its guest reads to drop it.
    pub(crate) fn withdrawn_function(index: u32) -> Self {
        Self::Remove(End::Backend, format!("dev-{index}"))
    }

    /// The changes that remove one function.
    pub(crate) fn no_function(index: u32) -> Vec<Self> {
        ["dev", "vdev", "state"].map(|key| Self::Remove(End::Backend, format!("{key}-{index}"))).to_vec()
    }
}

/// The key of our end that a guest can watch for messages in the mailbox of a function: its value is how many wait.
fn doorbell(devfn: Devfn) -> String {
    // xenstore permits no point in a name.
    format!("mailbox-{:02x}-{}", devfn.device(), devfn.function())
}

/// Rings a function's doorbell in its guest; nothing happens where our end is not there.
pub fn ring(store: &dyn Store, domain: DomId, devfn: Devfn, waiting: u32) -> Result<()> {
    let state = format!("{}/{}", backend_directory(domain), key::STATE);
    let change = NodeChange::backend(doorbell(devfn), waiting);
    store.transaction(&mut |nodes| match nodes.read(&state)? {
        Some(_) => apply_one(nodes, domain, &change),
        None => Ok(()),
    })
}

/// Removes the doorbell of a function that its guest loses.
pub fn remove_doorbell(store: &dyn StoreOps, domain: DomId, devfn: Devfn) -> Result<()> {
    store.remove(&format!("{}/{}", backend_directory(domain), doorbell(devfn)))
}

/// Makes all changes in one transaction, each new node with its end's permissions.
pub fn apply(store: &dyn Store, domain: DomId, changes: &[NodeChange]) -> Result<()> {
    store.transaction(&mut |nodes| changes.iter().try_for_each(|change| apply_one(nodes, domain, change)))
}

fn apply_one(nodes: &dyn StoreOps, domain: DomId, change: &NodeChange) -> Result<()> {
    let place = |end: End| match end {
        End::Backend => (backend_directory(domain), Permissions::backend(domain)),
        End::Frontend => (frontend_directory(domain), Permissions::frontend(domain)),
    };
    match change {
        NodeChange::Write(end, key, value) => {
            let (directory, permissions) = place(*end);
            if nodes.permissions(&directory)?.is_none() {
                nodes.write(&directory, b"")?;
                nodes.set_permissions(&directory, &permissions)?;
            }
            let path = format!("{directory}/{key}");
            nodes.write(&path, value.as_bytes())?;
            nodes.set_permissions(&path, &permissions)
        }
        NodeChange::Remove(end, key) => nodes.remove(&format!("{}/{key}", place(*end).0)),
        NodeChange::RemoveAll => {
            nodes.remove(&frontend_directory(domain))?;
            nodes.remove(&backend_directory(domain))?;
            // The parents were made with the first device of this type; an empty one of a guest's is not left behind.
            for directory in [frontend_directory(domain), backend_directory(domain)] {
                if let Some((parent, _)) = directory.rsplit_once('/')
                    && nodes.list(parent)?.is_empty()
                {
                    nodes.remove(parent)?;
                }
            }
            Ok(())
        }
    }
}

/// What the guest says in its directory. Everything in it is the guest's choice.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FrontendView {
    /// Its state; `None` where there is no such node or it is no number.
    pub state: Option<XenbusState>,
    /// Where it says its ring is; the text says what is wrong with it.
    pub ring: Option<std::result::Result<RingPlace, String>>,
}

/// A guest's shared page and event channel, by its own numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RingPlace {
    /// The grant reference of the page.
    pub grant: u32,
    /// The event channel.
    pub port: u32,
}

/// Reads what the guest says, each node once.
pub fn read_frontend(store: &dyn StoreOps, domain: DomId) -> Result<FrontendView> {
    let directory = frontend_directory(domain);
    let read = |key: &str| store.read(&format!("{directory}/{key}"));
    let state = read(key::STATE)?.as_deref().and_then(number).map(XenbusState);
    let (grant, port, magic) = (read(key::OP_REF)?, read(key::EVENT_CHANNEL)?, read(key::MAGIC)?);
    let ring = match (grant, port) {
        (None, None) => None,
        (grant, port) => Some(parse_ring(grant.as_deref(), port.as_deref(), magic.as_deref())),
    };
    Ok(FrontendView { state, ring })
}

fn parse_ring(
    grant: Option<&[u8]>,
    port: Option<&[u8]>,
    magic: Option<&[u8]>,
) -> std::result::Result<RingPlace, String> {
    // Frontends may end the text with a NUL; the protocol compares up to it.
    let magic = magic.unwrap_or_default();
    if magic.strip_suffix(b"\0").unwrap_or(magic) != MAGIC.as_bytes() {
        return Err(format!("{} is {}, not '{MAGIC}'", key::MAGIC, shown(magic)));
    }
    let wanted = |key: &str, value: Option<&[u8]>| {
        let value = value.unwrap_or_default();
        number(value).filter(|number| *number != 0).ok_or_else(|| format!("{key} is {}", shown(value)))
    };
    Ok(RingPlace { grant: wanted(key::OP_REF, grant)?, port: wanted(key::EVENT_CHANNEL, port)? })
}

/// A guest's text for the log: short and without control characters.
fn shown(value: &[u8]) -> String {
    format!("'{}'", printable(value, 24))
}

/// The beginning of a guest's text, at most so many characters, those that cannot be printed as escapes.
fn printable(value: &[u8], characters: usize) -> String {
    String::from_utf8_lossy(value).chars().flat_map(char::escape_default).take(characters).collect()
}

/// A decimal number of at most ten digits and nothing else.
fn number(value: &[u8]) -> Option<u32> {
    let digits = value.strip_suffix(b"\0").unwrap_or(value);
    let plain = !digits.is_empty() && digits.len() <= 10 && digits.iter().all(u8::is_ascii_digit);
    plain.then(|| std::str::from_utf8(digits).ok()?.parse().ok()).flatten()
}

/// The backend directory that the guest's PCI device points to, when it is not ours: xen-pciback's, for example. For messages only: the guest
/// can write anything there.
pub fn foreign_backend(store: &dyn StoreOps, domain: DomId) -> Result<Option<String>> {
    let backend = store.read(&format!("{}/backend", frontend_directory(domain)))?.unwrap_or_default();
    let is_foreign = !backend.is_empty() && backend != backend_directory(domain).as_bytes();
    Ok(is_foreign.then(|| printable(&backend, 64)))
}

/// Where xl keeps what xen-pciback gives to guests.
pub const PCIBACK: &str = "/local/domain/0/backend/pci";

/// The functions that guests have through xen-pciback, as xl attaches them, each with its guest.
pub fn pciback_functions(store: &dyn StoreOps) -> Result<Vec<(Sbdf, DomId)>> {
    let mut found = Vec::new();
    for name in store.list(PCIBACK)? {
        let Ok(number) = name.parse() else { continue };
        let directory = format!("{PCIBACK}/{name}/0");
        for key in store.list(&directory)?.iter().filter(|key| key.starts_with("dev-")) {
            let value = store.read(&format!("{directory}/{key}"))?.unwrap_or_default();
            let address = std::str::from_utf8(&value).ok().and_then(|text| text.parse().ok());
            found.extend(address.map(|address| (address, DomId(number))));
        }
    }
    Ok(found)
}

/// The guest that has a function through xen-pciback.
pub fn pciback_guest(store: &dyn StoreOps, address: Sbdf) -> Result<Option<DomId>> {
    let found = pciback_functions(store)?.into_iter().find(|(function, _)| *function == address);
    Ok(found.map(|(_, domain)| domain))
}

/// Makes xenstore notify a guest of its new device once more. A guest looks for devices when it boots, and later only where it is notified of a
/// change: one that was suspended when the device was published was not.
pub fn tell_again(store: &dyn Store, domain: DomId) -> Result<()> {
    let path = format!("{}/{}", frontend_directory(domain), key::STATE);
    store.transaction(&mut |nodes| match nodes.read(&path)?.as_deref().and_then(number) {
        // The same again, and only until the guest has written there.
        Some(state) if XenbusState(state) == XenbusState::INITIALISING => {
            nodes.write(&path, state.to_string().as_bytes())
        }
        _ => Ok(()),
    })
}

/// Reads the state our end was left in by a previous process; `None` where there is no device.
pub fn read_backend_state(store: &dyn StoreOps, domain: DomId) -> Result<Option<XenbusState>> {
    let path = format!("{}/{}", backend_directory(domain), key::STATE);
    Ok(store.read(&path)?.as_deref().and_then(number).map(XenbusState))
}

/// A function that our end's nodes name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PublishedFunction {
    /// Where it is in the nodes.
    pub index: u32,
    /// The device and function number that the guest sees.
    pub devfn: Devfn,
    /// Its own state.
    pub state: XenbusState,
    /// The function; `None` when it was withdrawn, and the nodes are there for the guest to drop it.
    pub address: Option<Sbdf>,
}

/// Reads which functions our end was left with.
pub fn read_backend_functions(store: &dyn StoreOps, domain: DomId) -> Result<Vec<PublishedFunction>> {
    let directory = backend_directory(domain);
    let count =
        store.read(&format!("{directory}/{}", key::NUM_DEVS))?.as_deref().and_then(number).unwrap_or(0);
    let mut functions = Vec::new();
    for index in 0..count.min(256) {
        let Some(seen) = store.read(&format!("{directory}/vdev-{index}"))? else { continue };
        let seen = std::str::from_utf8(&seen).ok().and_then(|text| text.rsplit_once(':')?.1.split_once('.'));
        let parsed = seen.and_then(|(device, function)| {
            let device = u8::from_str_radix(device, 16).ok().and_then(DeviceNumber::new)?;
            let function = u8::from_str_radix(function, 16).ok().filter(|function| *function < 8)?;
            Some(Devfn(device.devfn().0 | function))
        });
        let Some(devfn) = parsed else { continue };
        let state = store.read(&format!("{directory}/state-{index}"))?.as_deref().and_then(number);
        let address = store.read(&format!("{directory}/dev-{index}"))?;
        let address = address.and_then(|text| std::str::from_utf8(&text).ok()?.parse().ok());
        functions.push(PublishedFunction { index, devfn, state: XenbusState(state.unwrap_or(0)), address });
    }
    Ok(functions)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_needs_its_magic_and_two_plain_numbers() {
        let good = RingPlace { grant: 8, port: 23 };
        assert_eq!(parse_ring(Some(b"8"), Some(b"23"), Some(b"7")), Ok(good));
        assert_eq!(parse_ring(Some(b"8\0"), Some(b"23"), Some(b"7\0")), Ok(good));
        for (grant, port, magic, named) in [
            (&b"8"[..], &b"23"[..], &b"8"[..], key::MAGIC),
            (b"8", b"23", b"", key::MAGIC),
            (b"0", b"23", b"7", key::OP_REF),
            (b"-1", b"23", b"7", key::OP_REF),
            (b"99999999999", b"23", b"7", key::OP_REF),
            (b"\xff\xfe", b"23", b"7", key::OP_REF),
            (b"8", b"4294967296", b"7", key::EVENT_CHANNEL),
            (b"8", b" 5", b"7", key::EVENT_CHANNEL),
        ] {
            let error = parse_ring(Some(grant), Some(port), Some(magic)).unwrap_err();
            assert!(error.contains(named), "{error}");
        }
    }

    #[test]
    fn what_a_guest_wrote_reaches_the_log_short_and_printable() {
        let text = shown(&[b"\x1b[2J\n".as_slice(), &[b'a'; 5000]].concat());
        assert!(text.len() < 200 && text.bytes().all(|byte| byte.is_ascii_graphic()), "{text}");
    }
}
