//! VFs with which the service starts: those that the settings ask for, and PFs that an earlier run left to pci-pf-stub. What is to be done
//! is found on a thread, because a PF may be slow: it is read from sysfs, and its serial number from config space.

use log::{info, warn};
use pciback::Sbdf;
use pciback::platform::HostFunction;

use super::by_request::Change;
use super::{Event, unmanaged};
use crate::engine::problems::Problem;
use crate::engine::requests::all_pfs;
use crate::engine::tasks::TaskContext;
use crate::engine::{self, Engine};
use crate::outcome::Failure;
use crate::protocol::Cause;

/// What is to be done about VFs when the service starts.
#[derive(Debug, Default)]
pub struct AtStart {
    /// PFs that a killed earlier run bound to pci-pf-stub and that have no VFs enabled.
    left: Vec<Sbdf>,
    /// The VFs that the settings ask for, on PFs that have none. Other numbers of VFs are not changed.
    wanted: Vec<WantedPf>,
    problems: Vec<Problem>,
}

/// A PF on which the settings ask for VFs.
#[derive(Debug)]
pub(super) struct WantedPf {
    pub pf: HostFunction,
    pub count: u16,
    pub unmanaged: bool,
}

impl TaskContext {
    fn vfs_at_start(&self) -> AtStart {
        let left = self.left_to_stub();
        let mut found = AtStart { left, ..AtStart::default() };
        self.find_wanted(&mut found);
        found
    }

    fn left_to_stub(&self) -> Vec<Sbdf> {
        let host = self.platform.host.as_ref();
        let is_wanted = |pf: &HostFunction| {
            let mut wanted = self.settings.virtual_functions.iter();
            wanted.any(|entry| entry.means(host, &self.settings.names, pf))
        };
        let is_left =
            |address: &Sbdf| host.function(*address).is_ok_and(|pf| pf.num_vfs == 0 && !is_wanted(&pf));
        unmanaged::noted(&self.settings.run_directory).into_iter().filter(is_left).collect()
    }

    fn find_wanted(&self, AtStart { wanted, problems, .. }: &mut AtStart) {
        if self.settings.virtual_functions.is_empty() {
            return;
        }
        let host = self.platform.host.as_ref();
        let pfs = match all_pfs(host) {
            Ok(pfs) => pfs,
            Err(failure) => {
                let text = format!("enable the VFs that the settings ask for: {failure}");
                return problems.push(Problem::new(Cause::VirtualFunctions, text));
            }
        };
        for entry in &self.settings.virtual_functions {
            let matching: Vec<&HostFunction> =
                pfs.iter().filter(|pf| entry.means(host, &self.settings.names, pf)).collect();
            if matching.is_empty() {
                let text = format!("virtual-functions: no PF matches {entry}");
                problems.push(Problem::new(Cause::VirtualFunctions, text));
            }
            for pf in matching {
                let (address, there) = (pf.address, pf.num_vfs);
                if there == entry.count {
                    continue;
                }
                if there != 0 {
                    warn!("{address}: it has {there} VFs already, not {}; they stay", entry.count);
                    continue;
                }
                let unmanaged = entry.unmanaged && pf.driver.is_none();
                wanted.push(WantedPf { pf: pf.clone(), count: entry.count, unmanaged });
            }
        }
    }
}

impl Engine {
    /// Finds out, on a thread, what is to be done about VFs when the service starts. Functions are examined after that.
    pub(in crate::engine) fn find_vfs_at_start(&mut self) {
        let notes = unmanaged::noted(&self.settings.run_directory);
        if self.settings.virtual_functions.is_empty() && notes.is_empty() {
            return;
        }
        self.vfs.starts();
        let (context, inbox) = (self.task_context(), self.inbox.clone());
        self.inbox.background(
            "find vfs",
            move || context.vfs_at_start(),
            move |found| {
                inbox.send(engine::Event::Vfs(Event::FoundAtStart(found)));
            },
        );
    }

    /// Takes PFs back from pci-pf-stub, and enables the VFs that the settings ask for. What clients have begun meanwhile goes first.
    pub(super) fn found_at_start(&mut self, found: Result<AtStart, Failure>) {
        let begun = self.vfs.has_started();
        let AtStart { left, wanted, problems } = found.unwrap_or_else(|failure| {
            let problems = vec![Problem::failed(Cause::VirtualFunctions, &failure)];
            AtStart { problems, ..AtStart::default() }
        });
        self.problems.extend(problems);
        for pf in left.into_iter().filter(|pf| !begun.contains(pf)) {
            if self.vf_changes().is_left(pf) {
                self.change_vfs(pf, Ok(Change::Destroy), self.inbox.unasked_reply(Cause::VirtualFunctions));
            }
        }
        for wanted in wanted {
            let pf = wanted.pf.address;
            if begun.contains(&pf) {
                info!("{pf}: its VFs are as a client has asked for since the start, not as in the settings");
                continue;
            }
            let change = self.vf_changes().wanted(&wanted);
            self.change_vfs(pf, change, self.inbox.unasked_reply(Cause::VirtualFunctions));
        }
    }
}
