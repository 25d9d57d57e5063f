//! A xenstore by hand: nodes with their values and permissions.

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;
use std::sync::Mutex;

use pciback::DomId;
use pciback::platform::{Permissions, Result, Store, StoreOps, WatchEvent};

#[derive(Default)]
pub struct Nodes(Mutex<BTreeMap<String, (Vec<u8>, Option<Permissions>)>>);

impl Nodes {
    fn with<T>(&self, action: impl FnOnce(&mut BTreeMap<String, (Vec<u8>, Option<Permissions>)>) -> T) -> T {
        action(&mut self.0.lock().expect("no panic holds it"))
    }

    /// What a node has, as text.
    pub fn text(&self, path: &str) -> Option<String> {
        self.with(|nodes| nodes.get(path).map(|(value, _)| String::from_utf8_lossy(value).into_owned()))
    }

    /// The nodes at and below a path, with who may do what with them.
    pub fn below(&self, path: &str) -> Vec<(String, Option<Permissions>)> {
        self.with(|nodes| {
            let own = nodes.iter().filter(|(name, _)| is_below(name, path));
            own.map(|(name, (_, permissions))| (name.clone(), permissions.clone())).collect()
        })
    }
}

fn is_below(name: &str, path: &str) -> bool {
    name.strip_prefix(path).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

impl StoreOps for Nodes {
    fn read(&self, path: &str) -> Result<Option<Vec<u8>>> {
        Ok(self.with(|nodes| nodes.get(path).map(|(value, _)| value.clone())))
    }

    fn list(&self, path: &str) -> Result<Vec<String>> {
        self.with(|nodes| {
            let children = nodes.keys().filter_map(|name| name.strip_prefix(path)?.strip_prefix('/'));
            let mut names: Vec<String> =
                children.map(|rest| rest.split('/').next().unwrap_or_default().to_owned()).collect();
            names.dedup();
            Ok(names)
        })
    }

    fn write(&self, path: &str, value: &[u8]) -> Result<()> {
        assert!(value.len() <= 4096 && path.starts_with('/') && !path.ends_with('/'), "{path}");
        self.with(|nodes| {
            for (at, _) in path.match_indices('/').skip(1) {
                nodes.entry(path[..at].to_owned()).or_default();
            }
            nodes.entry(path.to_owned()).or_default().0 = value.to_vec();
        });
        Ok(())
    }

    fn remove(&self, path: &str) -> Result<()> {
        self.with(|nodes| nodes.retain(|name, _| !is_below(name, path)));
        Ok(())
    }

    fn set_permissions(&self, path: &str, permissions: &Permissions) -> Result<()> {
        self.with(|nodes| {
            nodes.get_mut(path).expect("a node that exists").1 = Some(permissions.clone());
        });
        Ok(())
    }

    fn permissions(&self, path: &str) -> Result<Option<Permissions>> {
        let found = self.with(|nodes| nodes.get(path).map(|(_, permissions)| permissions.clone()));
        Ok(found.map(|permissions| {
            permissions.unwrap_or(Permissions { owner: DomId::DOM0, readers: Vec::new() })
        }))
    }
}

impl Store for Nodes {
    fn transaction(&self, body: &mut dyn FnMut(&dyn StoreOps) -> Result<()>) -> Result<()> {
        body(self)
    }

    fn domain_exists(&self, domain: DomId) -> Result<bool> {
        Ok(domain.0.is_multiple_of(2))
    }

    fn watch(&self, _: &str, _: &str) -> Result<()> {
        unreachable!("only the engine watches")
    }

    fn unwatch(&self, _: &str, _: &str) -> Result<()> {
        unreachable!("only the engine watches")
    }

    fn event_fd(&self) -> BorrowedFd<'_> {
        unreachable!("only the engine waits")
    }

    fn next_event(&self) -> Result<Option<WatchEvent>> {
        unreachable!("only the engine waits")
    }
}
