//! The simulated host in a file, so that it outlives the process that simulates it: hardware, Linux, Xen and xenstore do not restart with the
//! service.
//!
//! Guests have no process of their own here, so that their memory, rings and device models are not kept.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::placement::Placement;
use super::tree::{Node, Tree};
use super::world::World;
use super::xen::{Device, Domain};
use super::{Simulation, locked};
use crate::hash::Fnv;
use crate::platform::{Permissions, VfSettings};
use crate::{DomId, Sbdf};

/// The format of the file; others are ignored.
const FORMAT: u32 = 1;
/// The pause after a write, in times that the write took: a kill loses what changed within it.
const PAUSE: u32 = 4;

/// The pause before a failed write is repeated.
const AGAIN: Duration = Duration::from_millis(500);

/// All that changes while the service runs.
#[derive(Serialize, Deserialize)]
struct Kept {
    format: u32,
    /// The boot of the real host: a simulated one ends with it.
    boot: String,
    /// The description that it is of.
    description: u64,
    appeared: u64,
    functions: BTreeMap<Sbdf, KeptFunction>,
    devices: BTreeMap<Sbdf, Device>,
    domains: BTreeMap<DomId, Domain>,
    lines: BTreeSet<u32>,
    lost: u32,
    nodes: BTreeMap<String, KeptNode>,
}

#[derive(Serialize, Deserialize)]
struct KeptFunction {
    /// All of config space.
    registers: Vec<u8>,
    driver: Option<String>,
    driver_override: Option<String>,
    virtual_functions: Vec<Sbdf>,
    vf_autoprobe: bool,
    network: VfSettings,
    incarnation: u64,
}

#[derive(Serialize, Deserialize)]
struct KeptNode {
    value: Vec<u8>,
    permissions: Permissions,
}

/// Whether anything has changed since the last write, and whether to end.
#[derive(Default)]
struct State {
    changed: bool,
    end: bool,
}

/// Told of each change.
#[derive(Clone, Default)]
pub(super) struct Changes(Arc<(Mutex<State>, Condvar)>);

impl Changes {
    pub fn note(&self) {
        locked(&self.0.0).changed = true;
        self.0.1.notify_one();
    }

    /// Ends the waiting.
    fn end(&self) {
        locked(&self.0.0).end = true;
        self.0.1.notify_one();
    }

    /// Waits for a change; `false`: the end has come.
    fn wait(&self) -> bool {
        let idle = |state: &mut State| !state.changed && !state.end;
        let state = self.0.1.wait_while(locked(&self.0.0), idle);
        let mut state = state.unwrap_or_else(PoisonError::into_inner);
        state.changed = false;
        !state.end
    }

    /// Waits for the end, at most for `limit`.
    fn wait_for_end(&self, limit: Duration) {
        // Whether it came, the next wait tells.
        drop(self.0.1.wait_timeout_while(locked(&self.0.0), limit, |state| !state.end));
    }
}

/// Writes the host to its file whenever it has changed, until it is dropped.
pub struct Keeper {
    file: Arc<KeptFile>,
    writer: Option<JoinHandle<()>>,
}

/// The file of a host.
struct KeptFile {
    simulation: Simulation,
    path: PathBuf,
    boot: String,
}

impl Simulation {
    /// Continues the host that an earlier process kept in a file, unless that was of another boot or description; keeps it there from now on.
    pub fn keep_in(&self, path: &Path, boot: &str) -> io::Result<Keeper> {
        match fs::read(path) {
            Ok(text) => self.resume_if_same(&text, path, boot),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let (simulation, path, boot) = (self.clone(), path.to_owned(), boot.to_owned());
        let file = Arc::new(KeptFile { simulation, path, boot });
        // A service that has guests starts on a full disk, too.
        file.write();
        let kept = Arc::clone(&file);
        let writer = thread::Builder::new().name("simulated host".into()).spawn(move || kept.follow())?;
        Ok(Keeper { file, writer: Some(writer) })
    }

    fn resume_if_same(&self, text: &[u8], path: &Path, boot: &str) {
        let (level, why) = match serde_json::from_slice::<Kept>(text) {
            Ok(kept) if kept.format == FORMAT && kept.boot == boot && kept.description == self.described => {
                return self.resume(kept);
            }
            Ok(_) => (log::Level::Info, "it is of another boot or description".to_owned()),
            Err(error) => (log::Level::Warn, error.to_string()),
        };
        log::log!(level, "{}: {why}; the simulated host begins anew", path.display());
    }

    fn kept(&self, boot: &str) -> Kept {
        let (world, tree) = (locked(&self.world), locked(&self.tree));
        let functions = world.functions.iter().map(|(address, function)| {
            let kept = KeptFunction {
                registers: function.registers.all().to_vec(),
                driver: function.driver.clone(),
                driver_override: function.driver_override.clone(),
                virtual_functions: function.virtual_functions.clone(),
                vf_autoprobe: function.vf_autoprobe,
                network: function.network,
                incarnation: function.incarnation,
            };
            (*address, kept)
        });
        let nodes = tree.nodes.iter().map(|(path, node)| {
            (path.clone(), KeptNode { value: node.value.clone(), permissions: node.permissions.clone() })
        });
        Kept {
            format: FORMAT,
            boot: boot.to_owned(),
            description: self.described,
            appeared: world.appeared,
            functions: functions.collect(),
            devices: world.xen.devices.clone(),
            domains: world.xen.domains.clone(),
            lines: world.xen.lines.clone(),
            lost: world.xen.lost,
            nodes: nodes.collect(),
        }
    }

    fn resume(&self, kept: Kept) {
        let (mut world, mut tree) = (locked(&self.world), locked(&self.tree));
        world.resume_functions(kept.functions);
        world.appeared = kept.appeared;
        world.xen.devices = kept.devices;
        world.xen.domains = kept.domains;
        world.xen.lines = kept.lines;
        world.xen.lost = kept.lost;
        tree.resume(kept.nodes);
    }
}

impl World {
    fn resume_functions(&mut self, kept: BTreeMap<Sbdf, KeptFunction>) {
        self.functions
            .retain(|address, function| kept.contains_key(address) && function.physical_function.is_none());
        for function in self.functions.values_mut() {
            function.virtual_functions.clear();
        }
        for (pf, function) in &kept {
            for (index, vf) in (0..u16::MAX).zip(&function.virtual_functions) {
                if self.functions.contains_key(vf) {
                    continue;
                }
                let parent = self.functions.get(pf);
                let made = parent.and_then(|parent| Placement::virtual_function(*pf, parent, index));
                if let Some(made) = made {
                    self.functions.insert(*vf, made);
                }
            }
        }
        let vfs: Vec<(Sbdf, Sbdf)> = self
            .functions
            .iter()
            .filter_map(|(vf, function)| Some((function.physical_function?, *vf)))
            .collect();
        for (pf, vf) in vfs {
            if let Some(pf) = self.functions.get_mut(&pf) {
                pf.virtual_functions.push(vf);
            }
        }
        for (address, kept) in kept {
            let Some(function) = self.functions.get_mut(&address) else { continue };
            function.registers.poke(0, &kept.registers);
            function.driver = kept.driver;
            function.driver_override = kept.driver_override;
            function.vf_autoprobe = kept.vf_autoprobe;
            function.network = kept.network;
            function.incarnation = kept.incarnation;
        }
    }
}

impl Tree {
    fn resume(&mut self, nodes: BTreeMap<String, KeptNode>) {
        self.nodes.clear();
        for (path, KeptNode { value, permissions }) in nodes {
            if let Some((parent, name)) = path.rsplit_once('/').filter(|(_, name)| !name.is_empty()) {
                let parent = if parent.is_empty() { "/" } else { parent };
                // Parents come before their children, by the order of their names.
                if let Some(parent) = self.nodes.get_mut(parent) {
                    Arc::make_mut(parent).children.insert(name.to_owned());
                }
            }
            let node = Node { value, permissions, children: BTreeSet::new(), generation: 0 };
            self.nodes.insert(path, Arc::new(node));
        }
    }
}

impl KeptFile {
    /// Writes the host after each change, until the end.
    fn follow(&self) {
        let changes = &self.simulation.changes;
        while changes.wait() {
            let begun = Instant::now();
            let pause = match self.write() {
                true => begun.elapsed() * PAUSE,
                false => {
                    changes.note();
                    AGAIN
                }
            };
            changes.wait_for_end(pause);
        }
    }

    /// Writes the host as it is now; `false`: it could not.
    fn write(&self) -> bool {
        let new = self.path.with_extension("new");
        let written = serde_json::to_vec(&self.simulation.kept(&self.boot))
            .map_err(io::Error::from)
            .and_then(|text| fs::write(&new, text))
            .and_then(|()| fs::rename(&new, &self.path));
        if let Err(error) = &written {
            log::warn!("keep the simulated host in {}: {error}", self.path.display());
        }
        written.is_ok()
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.file.simulation.changes.end();
        if let Some(writer) = self.writer.take() {
            // A thread that panicked has said so itself.
            let _ = writer.join();
        }
        self.file.write();
    }
}

/// What identifies a description.
pub(super) fn identify(text: &str) -> u64 {
    let mut hash = Fnv::new();
    hash.add_bytes(text.as_bytes());
    hash.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Access;
    use crate::platform::Edit;
    use crate::policy::RdmPolicy;

    const HOST: &str = include_str!("../../../../configs/sim/two-guests.yaml");
    const LIMIT: Duration = Duration::from_secs(1);

    fn bdf(text: &str) -> Sbdf {
        text.parse().unwrap()
    }

    fn text(simulation: &Simulation) -> String {
        serde_json::to_string(&simulation.kept("this boot")).unwrap()
    }

    #[test]
    fn the_next_process_of_the_same_boot_finds_the_host_as_it_was() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("host");
        let first = Simulation::from_yaml(HOST).unwrap();
        let keeper = first.keep_in(&file, "this boot").unwrap();
        let platform = first.platform("first").unwrap();
        let (host, xen) = (&platform.host, &platform.hypervisor);
        host.set_vf_autoprobe(bdf("01:00.0"), false).unwrap();
        host.set_num_vfs(bdf("01:00.0"), 2, LIMIT).unwrap();
        host.set_driver_override(bdf("01:10.0"), Some("pciback")).unwrap();
        host.config(bdf("01:10.0")).unwrap().write(Access::new(4, 2).unwrap(), 4).unwrap();
        xen.assign(DomId(1), bdf("01:10.0"), RdmPolicy::Strict).unwrap();
        xen.iomem_permission(DomId(1), 0xfea00, 4, Edit::Add).unwrap();
        platform.store.write("/local/domain/0/backend/x", b"\xff").unwrap();
        drop(keeper);

        let second = Simulation::from_yaml(HOST).unwrap();
        assert_ne!(text(&second), text(&first));
        let keeper = second.keep_in(&file, "this boot").unwrap();
        assert_eq!(text(&second), text(&first));
        assert_eq!(
            second.platform("second").unwrap().store.read("/local/domain/0/backend/x").unwrap(),
            Some(b"\xff".to_vec())
        );
        drop(keeper);

        let third = Simulation::from_yaml(HOST).unwrap();
        let _keeper = third.keep_in(&file, "another boot").unwrap();
        assert_eq!(text(&third), text(&Simulation::from_yaml(HOST).unwrap()));
    }

    #[test]
    fn a_file_that_is_damaged_or_of_another_description_is_ignored() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("host");
        let fresh = Simulation::from_yaml(HOST).unwrap();
        for damaged in [&b""[..], b"{", b"{\"format\":1}", b"\xff"] {
            fs::write(&file, damaged).unwrap();
            drop(fresh.keep_in(&file, "this boot").unwrap());
            assert_eq!(text(&fresh), text(&Simulation::from_yaml(HOST).unwrap()));
        }
        let other = Simulation::from_yaml("{drivers: [], functions: []}").unwrap();
        drop(other.keep_in(&file, "this boot").unwrap());
        assert!(locked(&other.world).functions.is_empty());
    }
}
