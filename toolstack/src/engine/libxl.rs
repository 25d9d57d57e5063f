//! Functions that the service has to do with are shown to libxl as assigned, so that xl and libvirt refuse to give them to guests.
//!
//! libxl takes a function for assigned while `/libxl/pci/SSSS-BB-DD-F/domid` exists (`libxl_device_pci_assignable_list` of Xen 4.17 and
//! 4.20). It removes that node when it refuses the function: so it is written again. Where the node has another value, a guest has the
//! function through libxl, and the node stays.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use log::warn;
use pciback::Sbdf;
use pciback::platform::{PlatformError, Store, StoreOps};

use super::Engine;

/// The directory with what libxl knows of functions; also the token of the watch on it.
pub(super) const DIRECTORY: &str = "/libxl/pci";
/// Of dom0: libxl looks only whether there is a value, and gives no function to domain 0 itself.
const OURS: &[u8] = b"0";
/// When what failed is tried again.
const AGAIN: Duration = Duration::from_secs(5);

/// What has happened to a function.
enum Change {
    /// The service has to do with it from now on.
    Taken(Sbdf),
    /// The service has nothing to do with it any more.
    Released(Sbdf),
    /// libxl, or somebody else, has changed its nodes.
    Touched(Sbdf),
}

/// The functions whose nodes the service has to do with.
#[derive(Default)]
pub(super) struct Marks {
    /// Those with a node that is the service's, or may be.
    shown: BTreeSet<Sbdf>,
    /// The thread that writes the nodes: there may be thousands. `None`: it has not started.
    writer: Option<mpsc::Sender<Change>>,
}

fn directory(address: Sbdf) -> String {
    format!("{DIRECTORY}/{}", address.to_string().replace([':', '.'], "-"))
}

fn node(address: Sbdf) -> String {
    format!("{}/domid", directory(address))
}

/// The function that a path below [`DIRECTORY`] is about.
pub(super) fn function_of(path: &str) -> Option<Sbdf> {
    let name = path.strip_prefix(DIRECTORY)?.strip_prefix('/')?.split('/').next()?;
    let mut parts = name.splitn(4, '-');
    let mut part = || parts.next();
    format!("{}:{}:{}.{}", part()?, part()?, part()?, part()?).parse().ok()
}

fn mark(store: &dyn Store, address: Sbdf) -> Result<(), PlatformError> {
    let node = node(address);
    store.transaction(&mut |nodes| match nodes.read(&node)? {
        None => nodes.write(&node, OURS),
        Some(_) => Ok(()),
    })
}

fn unmark(store: &dyn Store, address: Sbdf) -> Result<(), PlatformError> {
    let (node, directory) = (node(address), directory(address));
    store.transaction(&mut |nodes: &dyn StoreOps| {
        if nodes.read(&node)?.is_none_or(|value| value != OURS) {
            return Ok(());
        }
        nodes.remove(&node)?;
        // libxl keeps there what it needs to give the function back to its driver.
        if nodes.list(&directory)?.is_empty() { nodes.remove(&directory) } else { Ok(()) }
    })
}

/// What the thread knows.
struct Writer<'a> {
    store: &'a dyn Store,
    /// The functions that libxl is to take for assigned.
    taken: BTreeSet<Sbdf>,
    /// Those whose node could not be written or removed.
    failed: BTreeSet<Sbdf>,
}

impl Writer<'_> {
    /// Works until the engine ends; the nodes stay, as the functions do.
    fn run(&mut self, changes: &mpsc::Receiver<Change>) {
        loop {
            let next = match self.failed.is_empty() {
                true => changes.recv().map_err(|_| RecvTimeoutError::Disconnected),
                false => changes.recv_timeout(AGAIN),
            };
            match next {
                Ok(Change::Taken(address)) if self.taken.insert(address) => self.write(address),
                Ok(Change::Released(address)) => {
                    self.taken.remove(&address);
                    self.write(address);
                }
                Ok(Change::Touched(address)) if self.taken.contains(&address) => self.write(address),
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => {
                    std::mem::take(&mut self.failed).into_iter().for_each(|address| self.write(address));
                }
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn write(&mut self, address: Sbdf) {
        let change = if self.taken.contains(&address) { mark } else { unmark };
        match change(self.store, address) {
            Ok(()) => drop(self.failed.remove(&address)),
            Err(error) => {
                warn!("{address}: libxl is not shown whether xpcid has it: {error}; it is tried again");
                self.failed.insert(address);
            }
        }
    }
}

impl Engine {
    /// Removes what an earlier run has shown libxl and this one does not.
    pub(super) fn find_shown(&mut self) -> Result<(), PlatformError> {
        let names = self.platform.store.list(DIRECTORY)?;
        self.marks.shown =
            names.iter().filter_map(|name| function_of(&format!("{DIRECTORY}/{name}"))).collect();
        for address in self.marks.shown.clone() {
            if !self.is_kept_from_libxl(address) {
                self.mark(address);
            }
        }
        Ok(())
    }

    /// Shows libxl what has changed since the last call.
    pub(super) fn show_libxl(&mut self) {
        for address in self.functions.take_changed() {
            self.mark(address);
        }
    }

    fn is_kept_from_libxl(&self, address: Sbdf) -> bool {
        self.settings.keep_from_libxl && self.functions.records().get(address).is_some()
    }

    fn mark(&mut self, address: Sbdf) {
        if self.is_kept_from_libxl(address) {
            self.marks.shown.insert(address);
            self.change_mark(Change::Taken(address));
        } else if self.marks.shown.remove(&address) {
            self.change_mark(Change::Released(address));
        }
    }

    /// libxl's nodes of a function have changed.
    pub(super) fn libxl_changed(&mut self, address: Sbdf) {
        if self.settings.keep_from_libxl {
            self.change_mark(Change::Touched(address));
        }
    }

    fn change_mark(&mut self, change: Change) {
        if self.marks.writer.is_none() {
            let (sender, changes) = mpsc::channel();
            let store = Arc::clone(&self.platform.store);
            self.inbox.run("libxl", move || {
                let (taken, failed) = (BTreeSet::new(), BTreeSet::new());
                Writer { store: store.as_ref(), taken, failed }.run(&changes);
            });
            self.marks.writer = Some(sender);
        }
        // Where the thread could not be started, that is a problem in the status.
        let _ = self.marks.writer.as_ref().map(|sender| sender.send(change));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_of_libxls_names_its_function() {
        let address: Sbdf = "0000:01:10.2".parse().unwrap();
        assert_eq!(node(address), "/libxl/pci/0000-01-10-2/domid");
        assert_eq!(function_of(&node(address)), Some(address));
        assert_eq!(function_of(&directory(address)), Some(address));
        for other in
            ["/libxl/pci", "/libxl/pci/", "/libxl/pci/0000-01-10", "/libxl/pci/x/domid", "/libxl/3/pci"]
        {
            assert_eq!(function_of(other), None, "{other}");
        }
    }
}
