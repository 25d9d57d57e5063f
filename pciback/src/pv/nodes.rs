//! The names of all xenstore nodes of a PV PCI device, and what may stand in them.
//!
//! What a guest writes is hostile: numbers are decimal, bounded and checked; nothing else is looked at.

use std::fmt;

use thiserror::Error;

use crate::platform::{Permissions, Result, StoreOps};
use crate::{DomId, Sbdf};

/// The version of the protocol that a frontend must publish.
pub const MAGIC: &str = "7";
/// The largest event channel port (`EVTCHN_FIFO_NR_CHANNELS` - 1).
const MAX_PORT: u32 = (1 << 17) - 1;
/// The largest grant reference that is looked at further: it travels through signed integers.
const MAX_GRANT: u32 = i32::MAX as u32;
/// The most functions that one frontend can see: one bus.
pub const MAX_FUNCTIONS: u16 = 256;

/// The state of one side; unknown numbers are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct XenbusState(pub u32);

impl XenbusState {
    /// There is no such node, or no number in it.
    pub const UNKNOWN: Self = Self(0);
    /// Being set up.
    pub const INITIALISING: Self = Self(1);
    /// Waiting for the other side's information.
    pub const INIT_WAIT: Self = Self(2);
    /// Information is published, waiting for a connection.
    pub const INITIALISED: Self = Self(3);
    /// Connected.
    pub const CONNECTED: Self = Self(4);
    /// Being shut down.
    pub const CLOSING: Self = Self(5);
    /// Shut down.
    pub const CLOSED: Self = Self(6);
    /// Functions come or go.
    pub const RECONFIGURING: Self = Self(7);
    /// Functions have come or gone.
    pub const RECONFIGURED: Self = Self(8);
}

impl fmt::Display for XenbusState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match *self {
            Self::INITIALISING => "Initialising",
            Self::INIT_WAIT => "InitWait",
            Self::INITIALISED => "Initialised",
            Self::CONNECTED => "Connected",
            Self::CLOSING => "Closing",
            Self::CLOSED => "Closed",
            Self::RECONFIGURING => "Reconfiguring",
            Self::RECONFIGURED => "Reconfigured",
            _ => "unknown",
        };
        write!(f, "{} ({name})", self.0)
    }
}

/// Keys of the backend's directory.
pub mod backend_key {
    /// The frontend's directory.
    pub const FRONTEND: &str = "frontend";
    /// The guest.
    pub const FRONTEND_ID: &str = "frontend-id";
    /// `1` while the device is to be there.
    pub const ONLINE: &str = "online";
    /// Our state.
    pub const STATE: &str = "state";
    /// One more than the highest index in use.
    pub const NUM_DEVS: &str = "num_devs";
    /// How many root buses the guest sees.
    pub const ROOT_NUM: &str = "root_num";
    /// The only root bus.
    pub const ROOT_0: &str = "root-0";

    /// The function's address on the host.
    pub fn dev(index: u16) -> String {
        format!("dev-{index}")
    }
    /// Its address in the guest.
    pub fn vdev(index: u16) -> String {
        format!("vdev-{index}")
    }
    /// Its own state.
    pub fn state(index: u16) -> String {
        format!("state-{index}")
    }
    /// Its options.
    pub fn opts(index: u16) -> String {
        format!("opts-{index}")
    }
}

/// Keys of the frontend's directory.
pub mod frontend_key {
    /// The backend's directory.
    pub const BACKEND: &str = "backend";
    /// The backend's domain.
    pub const BACKEND_ID: &str = "backend-id";
    /// The guest's state.
    pub const STATE: &str = "state";
    /// The guest's grant of the shared page.
    pub const OP_REF: &str = "pci-op-ref";
    /// The guest's event channel port.
    pub const EVENT_CHANNEL: &str = "event-channel";
    /// The protocol's version.
    pub const MAGIC: &str = "magic";
}

/// The root bus that a guest sees its functions on.
pub const ROOT: &str = "0000:00";

/// Where the nodes of one guest's PV PCI device are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Nodes {
    domain: DomId,
}

impl Nodes {
    /// The nodes of a guest.
    pub const fn of(domain: DomId) -> Self {
        Self { domain }
    }

    /// The guest.
    pub const fn domain(&self) -> DomId {
        self.domain
    }

    /// The directory of all guests' backends, in dom0.
    pub const fn all_backends() -> &'static str {
        "/local/domain/0/backend/xpci"
    }

    /// The directory above the backend's, which holds nothing else.
    pub fn backend_parent(&self) -> String {
        format!("{}/{}", Self::all_backends(), self.domain)
    }

    /// The backend's directory.
    pub fn backend(&self) -> String {
        format!("{}/0", self.backend_parent())
    }

    /// A node of the backend's directory.
    pub fn backend_node(&self, key: &str) -> String {
        format!("{}/{key}", self.backend())
    }

    /// The directory above the frontend's, which holds nothing else.
    pub fn frontend_parent(&self) -> String {
        format!("/local/domain/{}/device/pci", self.domain)
    }

    /// The frontend's directory.
    pub fn frontend(&self) -> String {
        format!("{}/0", self.frontend_parent())
    }

    /// A node of the frontend's directory.
    pub fn frontend_node(&self, key: &str) -> String {
        format!("{}/{key}", self.frontend())
    }
}

/// Whose a node is; dom0 and the guest can read both kinds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// dom0 writes, the guest reads.
    Backend,
    /// The guest writes, dom0 reads.
    Frontend,
}

/// One change of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Write a node and set its permissions.
    Write {
        /// Which.
        path: String,
        /// What.
        value: String,
        /// Whose it is.
        owner: Owner,
    },
    /// Remove a node with all below it.
    Remove {
        /// Which.
        path: String,
    },
}

impl Change {
    /// Carries it out.
    pub fn apply(&self, guest: DomId, store: &dyn StoreOps) -> Result<()> {
        match self {
            Self::Write { path, value, owner } => {
                store.write(path, value.as_bytes())?;
                let permissions = match owner {
                    Owner::Backend => Permissions::backend(guest),
                    Owner::Frontend => Permissions::frontend(guest),
                };
                store.set_permissions(path, &permissions)
            }
            Self::Remove { path } => store.remove(path),
        }
    }
}

/// Why what a frontend published cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum OfferError {
    /// A node is not there.
    #[error("the frontend's {key} is missing")]
    Missing {
        /// Which.
        key: &'static str,
    },
    /// A node holds no number from 1 to its limit.
    #[error("the frontend's {key} is '{found}', it must be a decimal number from 1 to {max}")]
    Number {
        /// Which.
        key: &'static str,
        /// The beginning of what it holds, printable.
        found: String,
        /// The limit.
        max: u32,
    },
    /// It speaks another version of the protocol.
    #[error("the frontend's magic is '{found}', this backend speaks '{MAGIC}'")]
    Magic {
        /// The beginning of what it holds, printable.
        found: String,
    },
}

/// What a frontend offers to connect with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offer {
    /// Grant reference of its page.
    pub grant: u32,
    /// Its event channel port.
    pub port: u32,
}

/// The frontend's nodes, as they were read together. Everything but the state is the guest's word.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FrontendSnapshot {
    /// `state`.
    pub state: Option<Vec<u8>>,
    /// `pci-op-ref`.
    pub grant: Option<Vec<u8>>,
    /// `event-channel`.
    pub port: Option<Vec<u8>>,
    /// `magic`.
    pub magic: Option<Vec<u8>>,
}

impl FrontendSnapshot {
    /// Reads the nodes. Done within a transaction they belong together.
    pub fn read(nodes: &Nodes, store: &dyn StoreOps) -> Result<Self> {
        let read = |key| store.read(&nodes.frontend_node(key));
        Ok(Self {
            state: read(frontend_key::STATE)?,
            grant: read(frontend_key::OP_REF)?,
            port: read(frontend_key::EVENT_CHANNEL)?,
            magic: read(frontend_key::MAGIC)?,
        })
    }

    /// The frontend's state; anything that is no number counts as unknown.
    pub fn state(&self) -> XenbusState {
        self.state
            .as_deref()
            .and_then(|text| decimal(text, u32::MAX))
            .map_or(XenbusState::UNKNOWN, XenbusState)
    }

    /// What it offers.
    pub fn offer(&self) -> std::result::Result<Offer, OfferError> {
        let magic = self.magic.as_deref().ok_or(OfferError::Missing { key: frontend_key::MAGIC })?;
        if magic != MAGIC.as_bytes() {
            return Err(OfferError::Magic { found: excerpt(magic) });
        }
        Ok(Offer {
            grant: number(frontend_key::OP_REF, self.grant.as_deref(), MAX_GRANT)?,
            port: number(frontend_key::EVENT_CHANNEL, self.port.as_deref(), MAX_PORT)?,
        })
    }
}

/// One function as the backend's directory has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredFunction {
    /// Its index N.
    pub index: u16,
    /// Its address on the host.
    pub address: Sbdf,
    /// Its device and function number in the guest.
    pub devfn: u8,
    /// Its own state.
    pub state: XenbusState,
    /// Its options.
    pub options: String,
}

/// The backend's directory as an earlier life of the service left it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct BackendSnapshot {
    /// Whether there is a directory.
    pub exists: bool,
    /// Our state.
    pub state: Option<XenbusState>,
    /// The functions.
    pub functions: Vec<StoredFunction>,
    /// Indices whose nodes make no sense.
    pub damaged: Vec<u16>,
}

impl BackendSnapshot {
    /// Reads the directory. Done within a transaction its nodes belong together.
    pub fn read(nodes: &Nodes, store: &dyn StoreOps) -> Result<Self> {
        let children = store.list(&nodes.backend())?;
        let read = |key: &str| store.read(&nodes.backend_node(key));
        let state = read(backend_key::STATE)?;
        let mut snapshot = Self {
            exists: !children.is_empty() || state.is_some(),
            state: state.as_deref().and_then(|text| decimal(text, u32::MAX)).map(XenbusState),
            ..Self::default()
        };
        let mut indices: Vec<u16> = children
            .iter()
            .filter_map(|name| name.strip_prefix("dev-"))
            .filter_map(|digits| decimal(digits.as_bytes(), u32::from(MAX_FUNCTIONS) - 1))
            .map(|index| index as u16)
            .collect();
        indices.sort_unstable();
        for index in indices {
            let address = read(&backend_key::dev(index))?;
            let virtual_address = read(&backend_key::vdev(index))?;
            let address = address.as_deref().and_then(parse_address);
            let devfn = virtual_address.as_deref().and_then(parse_virtual_address);
            let Some((address, devfn)) = address.zip(devfn) else {
                snapshot.damaged.push(index);
                continue;
            };
            if snapshot.functions.iter().any(|function| function.devfn == devfn) {
                snapshot.damaged.push(index);
                continue;
            }
            let state = read(&backend_key::state(index))?;
            let state = state.as_deref().and_then(|text| decimal(text, u32::MAX));
            let options = read(&backend_key::opts(index))?.unwrap_or_default();
            snapshot.functions.push(StoredFunction {
                index,
                address,
                devfn,
                state: state.map_or(XenbusState::UNKNOWN, XenbusState),
                options: String::from_utf8_lossy(&options).into_owned(),
            });
        }
        Ok(snapshot)
    }
}

/// A function's address in the guest as frontends parse it: two digits for the function, unlike everywhere else.
pub fn virtual_address(devfn: u8) -> String {
    format!("{ROOT}:{:02x}.{:02x}", devfn >> 3, devfn & 7)
}

fn parse_virtual_address(text: &[u8]) -> Option<u8> {
    let text = std::str::from_utf8(text).ok()?;
    let (slot, function) = text.strip_prefix(ROOT)?.strip_prefix(':')?.split_once('.')?;
    let slot = u8::from_str_radix(slot, 16).ok().filter(|slot| *slot < 32)?;
    let function = u8::from_str_radix(function, 16).ok().filter(|function| *function < 8)?;
    Some(slot << 3 | function)
}

fn parse_address(text: &[u8]) -> Option<Sbdf> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// A decimal number without sign, blanks or surplus digits, up to `max`.
fn decimal(text: &[u8], max: u32) -> Option<u32> {
    if text.is_empty() || text.len() > 10 || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let value = text.iter().fold(0u64, |value, digit| value * 10 + u64::from(digit - b'0'));
    u32::try_from(value).ok().filter(|value| *value <= max)
}

fn number(key: &'static str, text: Option<&[u8]>, max: u32) -> std::result::Result<u32, OfferError> {
    let text = text.ok_or(OfferError::Missing { key })?;
    decimal(text, max).filter(|value| *value != 0).ok_or_else(|| OfferError::Number {
        key,
        found: excerpt(text),
        max,
    })
}

/// The beginning of a guest's text, with everything that could disturb a log or a terminal escaped.
fn excerpt(text: &[u8]) -> String {
    text.iter().take(24).flat_map(|byte| std::ascii::escape_default(*byte)).map(char::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(grant: &str, port: &str, magic: &str) -> FrontendSnapshot {
        let bytes = |text: &str| Some(text.as_bytes().to_vec());
        FrontendSnapshot { state: bytes("3"), grant: bytes(grant), port: bytes(port), magic: bytes(magic) }
    }

    #[test]
    fn paths_are_where_frontends_look() {
        let nodes = Nodes::of(DomId(5));
        assert_eq!(nodes.backend_node(&backend_key::dev(3)), "/local/domain/0/backend/xpci/5/0/dev-3");
        assert_eq!(nodes.frontend_node(frontend_key::STATE), "/local/domain/5/device/pci/0/state");
        assert_eq!(virtual_address(0x0b), "0000:00:01.03");
        assert_eq!(parse_virtual_address(b"0000:00:01.03"), Some(0x0b));
    }

    #[test]
    fn what_a_frontend_offers_is_checked() {
        assert_eq!(snapshot("8", "12", "7").offer(), Ok(Offer { grant: 8, port: 12 }));
        for grant in
            ["0", "", "-1", " 8", "8\n", "0x8", "4294967295", "2147483648", "99999999999", "\u{1b}[2J"]
        {
            assert!(
                matches!(snapshot(grant, "12", "7").offer(), Err(OfferError::Number { .. })),
                "{grant:?}"
            );
        }
        for port in ["0", "131072", "a"] {
            assert!(matches!(snapshot("8", port, "7").offer(), Err(OfferError::Number { .. })), "{port:?}");
        }
        for magic in ["8", "", "77", "07"] {
            assert!(matches!(snapshot("8", "12", magic).offer(), Err(OfferError::Magic { .. })), "{magic:?}");
        }
        assert_eq!(
            FrontendSnapshot { port: None, ..snapshot("8", "", "7") }.offer(),
            Err(OfferError::Missing { key: frontend_key::EVENT_CHANNEL })
        );
    }

    #[test]
    fn an_error_shows_little_of_a_guests_text_and_no_control_characters() {
        let error = snapshot(&"\u{1b}".repeat(4000), "1", "7").offer().unwrap_err().to_string();
        assert!(error.len() < 250 && error.bytes().all(|byte| (0x20..0x7f).contains(&byte)), "{error}");
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_parsed_without_a_panic(text: Vec<u8>) {
            let some = Some(text.clone());
            let snapshot =
                FrontendSnapshot { state: some.clone(), grant: some.clone(), port: some.clone(), magic: some };
            let _ = (snapshot.state(), snapshot.offer(), parse_address(&text), parse_virtual_address(&text));
        }

        #[test]
        fn virtual_addresses_round_trip(devfn: u8) {
            assert_eq!(parse_virtual_address(virtual_address(devfn).as_bytes()), Some(devfn));
        }
    }
}
