//! The nodes that the toolstack makes, as `xenstore-ls -p` shows them after `xl create`.

use super::tree::{Caller, Tree};
use super::xen::Domain;
use crate::DomId;
use crate::platform::Permissions;

/// dom0's own connection, which no domain can have.
const TOOLSTACK: Caller = Caller { connection: 0, transaction: None };

/// What `xl create` leaves to the guest.
const OWN: [&str; 6] = ["data", "drivers", "feature", "attr", "error", "control/shutdown"];

impl Tree {
    /// What is there before any guest.
    pub(super) fn furnish(&mut self) {
        self.put_text("/local/domain/0/name", "Domain-0");
        self.put_text("/local/domain/0/domid", "0");
        self.put_text("/local/domain/0/backend", "");
        self.put_text("/vm", "");
        self.put_text("/libxl", "");
    }

    /// The nodes of a new domain.
    pub fn introduce(&mut self, domain: &Domain) {
        let id = domain.id;
        let home = format!("/local/domain/{id}");
        let vm = format!("/vm/{}", domain.uuid);
        self.set_introduced(id, true);
        for top in [&home, &vm] {
            self.put_text(top, "");
            self.give(top, &Permissions::backend(id));
        }
        self.put_text(&format!("{home}/vm"), &vm);
        self.put_text(&format!("{home}/name"), &domain.name);
        self.put_text(&format!("{home}/domid"), &id.to_string());
        self.put_text(&format!("{home}/device"), "");
        self.put_text(&format!("{home}/control"), "");
        self.put_text(&format!("{vm}/name"), &domain.name);
        self.put_text(&format!("{vm}/uuid"), vm.trim_start_matches("/vm/"));
        self.put_text(&format!("/libxl/{id}/type"), &domain.kind);
        if domain.kind == "hvm" {
            let acpi = if domain.without_acpi { "0" } else { "1" };
            self.put_text(&format!("{home}/platform/acpi"), acpi);
        }
        for name in OWN {
            let path = format!("{home}/{name}");
            self.put_text(&path, "");
            self.give(&path, &Permissions { owner: id, readers: Vec::new() });
        }
    }

    /// A domain is gone: xenstored says so and takes the nodes it owned, xl removes its own.
    pub fn release(&mut self, id: DomId) {
        let vm = self.read(TOOLSTACK, &format!("/local/domain/{id}/vm")).ok().flatten();
        self.set_introduced(id, false);
        let owned: Vec<String> = self
            .nodes
            .iter()
            .filter(|(_, node)| node.permissions.owner == id)
            .map(|(path, _)| path.clone())
            .collect();
        let homes = [format!("/local/domain/{id}"), format!("/libxl/{id}")];
        let vm = vm.and_then(|vm| String::from_utf8(vm).ok());
        let device_model = format!("/local/domain/0/device-model/{id}");
        let device_model = Some(device_model).filter(|path| self.nodes.contains_key(path));
        for path in owned.into_iter().chain(homes).chain(vm).chain(device_model) {
            if let Err(errno) = self.remove(TOOLSTACK, &path) {
                log::warn!("{path}: the simulated xl cannot remove it: {errno}");
            }
        }
    }

    pub(super) fn put_text(&mut self, path: &str, value: &str) {
        if let Err(errno) = self.write(TOOLSTACK, path, value.as_bytes()) {
            log::warn!("{path}: the simulated xl cannot write it: {errno}");
        }
    }

    fn give(&mut self, path: &str, permissions: &Permissions) {
        if let Err(errno) = self.set_permissions(TOOLSTACK, path, permissions) {
            log::warn!("{path}: the simulated xl cannot give it away: {errno}");
        }
    }
}
