//! A simulated host, made of bytes and tables: for trying things without Xen, and for fast tests.
//!
//! It answers as hardware, Linux, Xen and xenstore do, with their error numbers, and knows nothing of what xpci makes of the
//! answers. One lock guards it all; every answer is exact and the same each time.

mod config;
mod fuse;
mod guest;
mod host;
mod hypervisor;
mod model;
mod rings;
mod store;
mod tree;
mod world;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;

use super::{Cause, Platform, PlatformError, Result};
use crate::{DomId, Sbdf};

pub use fuse::{Fuse, Moment};
pub use guest::SimGuest;
pub use store::SimStore;
pub use world::{Owner, Vector};

use tree::Tree;
use world::World;

/// A simulated host. Clones are the same host.
#[derive(Clone)]
pub struct Simulation {
    world: Arc<Mutex<World>>,
    tree: Arc<Mutex<Tree>>,
    rings: rings::SimRings,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A test that failed while it held the lock says so itself.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Opens the host that a YAML file describes.
pub fn open(path: &Path) -> Result<Platform> {
    let read = |error: std::io::Error| PlatformError::new("read simulated host", path.display(), error);
    let text = fs::read_to_string(path).map_err(read)?;
    let simulation = Simulation::from_yaml(&text)
        .map_err(|why| PlatformError::new("read simulated host", path.display(), Cause::Malformed(why)))?;
    simulation.platform(&format!("simulation of {}", path.display()))
}

impl Simulation {
    /// The host that a YAML text describes; the error says where and why it does not.
    pub fn from_yaml(text: &str) -> std::result::Result<Self, String> {
        let description: model::Description =
            serde_saphyr::from_str(text).map_err(|error| error.to_string())?;
        let world = World::new(&description)?;
        let mut tree = Tree::new();
        for domain in world.domains.values() {
            tree.introduce(domain);
        }
        Ok(Self {
            world: Arc::new(Mutex::new(world)),
            tree: Arc::new(Mutex::new(tree)),
            rings: rings::SimRings::new(),
        })
    }

    /// This host as a platform, with a connection to its xenstore.
    pub fn platform(&self, description: &str) -> Result<Platform> {
        self.platform_with(description, &Fuse::default())
    }

    /// The same, for a service that dies when the fuse says so.
    pub fn platform_with(&self, description: &str, fuse: &Fuse) -> Result<Platform> {
        Ok(Platform {
            host: Arc::new(host::SimHost::new(&self.world, fuse)),
            hypervisor: Arc::new(hypervisor::SimHypervisor::new(&self.world, fuse)),
            store: Arc::new(SimStore::connect(&self.tree, DomId::DOM0)?.of_a_life(&self.world, fuse)),
            rings: Arc::new(self.rings.of_a_life(&self.world, fuse)),
            description: description.to_owned(),
        })
    }

    /// A connection to xenstore, with the rights of a domain.
    pub fn store(&self, domain: DomId) -> Result<SimStore> {
        SimStore::connect(&self.tree, domain)
    }

    /// The guest's side of things.
    pub fn guest(&self, domain: DomId) -> Result<SimGuest> {
        SimGuest::new(domain, self.store(domain)?, self.rings.clone())
    }

    /// Ends a domain: Xen takes its functions, xl its nodes, and whoever watches is told.
    pub fn destroy(&self, domain: DomId) {
        locked(&self.world).destroy(domain);
        self.rings.drop_domain(domain);
        locked(&self.tree).release(domain);
        store::wake_listeners(&self.tree);
    }

    /// Pulls a function out of its slot.
    pub fn unplug(&self, address: Sbdf) {
        locked(&self.world).remove_function(address);
    }

    /// Makes an operation fail from now on, `times` times after `after` good ones.
    pub fn fail(&self, operation: &str, address: Option<Sbdf>, errno: Errno, after: u32, times: u32) {
        let failure = world::Failure { operation: operation.to_owned(), address, errno, after, times };
        locked(&self.world).failures.push(failure);
    }

    /// How many calls shall still fail.
    pub fn pending_failures(&self) -> u32 {
        locked(&self.world).failures.iter().map(|failure| failure.times).sum()
    }

    /// Nothing fails from now on.
    pub fn forget_failures(&self) {
        locked(&self.world).failures.clear();
    }

    /// Who owns a function, as Xen's debug key Q shows it; `None` where Xen does not know it.
    pub fn owner(&self, address: Sbdf) -> Option<Owner> {
        locked(&self.world).functions.get(&address)?.xen.as_ref().map(|xen| xen.owner)
    }

    /// The vectors that are mapped for a domain.
    pub fn vectors(&self, domain: DomId) -> BTreeMap<u32, Vector> {
        locked(&self.world).vectors(domain)
    }

    /// How many page frames and ports a domain may use.
    pub fn granted(&self, domain: DomId) -> usize {
        let world = locked(&self.world);
        world
            .domains
            .get(&domain)
            .map_or(0, |domain| domain.frames.len() + domain.ports.len() + domain.lines.len())
    }

    /// Whether Xen guards a function's MSI-X table for a guest.
    pub fn msix_prepared(&self, address: Sbdf) -> bool {
        let world = locked(&self.world);
        world
            .functions
            .get(&address)
            .and_then(|function| function.xen.as_ref())
            .is_some_and(|xen| xen.msix_prepared)
    }

    /// Bytes of a function's config space as hardware has them, without any access.
    pub fn peek(&self, address: Sbdf, offset: u16, length: u16) -> Vec<u8> {
        let world = locked(&self.world);
        let Some(function) = world.functions.get(&address) else { return vec![0xff; usize::from(length)] };
        (offset..offset + length).map(|at| function.registers.peek(at)).collect()
    }
}
