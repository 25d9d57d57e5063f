//! `list` and `show`: all functions of the host.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use pciback::containment::radius::{Bridge, Group};
use pciback::platform::{Host, HostFunction, Names, Resource, Store, StoreOps};
use pciback::policy::Reuse;
use pciback::serve::pv::nodes;
use pciback::{DomId, FunctionState, Sbdf};

use super::lists::Shown;
use super::obstacles::{InUse, hold_obstacles, shared_obstacles, shares_with_others};
use crate::doctor;
use crate::domains;
use crate::engine::Engine;
use crate::names::printed;
use crate::outcome::{ErrorCode, Failure, Obstacle};
use crate::pci_path::PciPath;
use crate::protocol::{Finding, ListFilter, ListedView, ShownView, Success, Verdict};
use crate::reply::Reply;
use crate::spec::{existing, serial_number};
use crate::transaction::holder_of;

/// The base classes, by number (PCI Code and ID Assignment 1.16, section 1).
const BASE_CLASSES: [&str; 0x13] = [
    "unclassified",
    "storage",
    "network",
    "display",
    "multimedia",
    "memory",
    "bridge",
    "communication",
    "system",
    "input",
    "docking",
    "processor",
    "serial-bus",
    "wireless",
    "intelligent-io",
    "satellite",
    "encryption",
    "signal-processing",
    "accelerator",
];

fn base_class(class: u32) -> &'static str {
    BASE_CLASSES.get((class >> 16) as usize).copied().unwrap_or("other")
}

/// Host data for a list, in addition to the records.
struct Survey<'a> {
    shown: &'a Shown,
    store: &'a dyn StoreOps,
    functions: BTreeMap<Sbdf, HostFunction>,
    names: BTreeMap<Sbdf, Names>,
    ports: BTreeMap<Sbdf, Vec<Sbdf>>,
    groups: BTreeMap<Sbdf, u32>,
}

impl<'a> Survey<'a> {
    fn of(shown: &'a Shown, store: &'a dyn StoreOps) -> Result<Self, Failure> {
        let host = shown.host.as_ref();
        // A function that is removed meanwhile is not listed.
        let found: Vec<HostFunction> =
            host.functions()?.into_iter().filter_map(|address| host.function(address).ok()).collect();
        let names = host.names(&found);
        let names = found.iter().map(|function| function.address).zip(names).collect();
        let ports: BTreeMap<Sbdf, Vec<Sbdf>> = found
            .iter()
            .map(|function| (function.address, host.ports_above(function.address).unwrap_or_default()))
            .collect();
        let functions = found.into_iter().map(|function| (function.address, function)).collect();
        let mut survey = Self { shown, store, functions, names, ports, groups: BTreeMap::new() };
        survey.groups = survey.numbered_groups(host);
        Ok(survey)
    }

    fn numbered_groups(&self, host: &dyn Host) -> BTreeMap<Sbdf, u32> {
        let above: BTreeSet<Sbdf> = self.ports.values().flatten().copied().collect();
        let bridge =
            |port: &Sbdf| Some((*port, Bridge::read(*port, &host.config(*port).ok()?.read_all().ok()?)));
        let bridges: BTreeMap<Sbdf, Bridge> = above.iter().filter_map(bridge).collect();
        let mut numbers: BTreeMap<Group, u32> = BTreeMap::new();
        let number = |function: &HostFunction| {
            let above: Vec<Bridge> =
                self.ports[&function.address].iter().filter_map(|port| bridges.get(port).cloned()).collect();
            let next = numbers.len() as u32;
            (function.address, *numbers.entry(Group::of(function, &above)).or_insert(next))
        };
        self.functions.values().map(number).collect()
    }

    fn view(&self, function: &HostFunction) -> ListedView {
        let address = function.address;
        let mut view = self.shown.view(address);
        // Only xenstore nodes tell which guest has a function that xl attached.
        if view.state == FunctionState::Host && holder_of(function).is_some() {
            view.domain = nodes::pciback_guest(self.store, address).ok().flatten();
        }
        let siblings = function.physical_function.and_then(|pf| self.functions.get(&pf));
        let siblings = siblings.map(|pf| pf.virtual_functions.as_slice());
        let index = siblings.and_then(|vfs| vfs.iter().position(|vf| *vf == address));
        let is_pf = function.total_vfs > 0;
        ListedView {
            function: view,
            names: self.names.get(&address).cloned().unwrap_or_default(),
            class: format!("{:06x}", function.class),
            base_class: base_class(function.class).to_owned(),
            total_vfs: is_pf.then_some(function.total_vfs),
            enabled_vfs: is_pf.then_some(function.num_vfs),
            vf_index: index.map(|index| index as u16),
            vf_count: index.and(siblings).map(|vfs| vfs.len() as u16),
            interfaces: function.interfaces.clone(),
            reset_methods: function.reset_methods.clone(),
            iommu_group: self.groups.get(&address).copied().unwrap_or_default(),
            ports: self.ports.get(&address).cloned().unwrap_or_default(),
            numa_node: function.numa_node,
        }
    }
}

impl Engine {
    pub(in crate::engine) fn list(&self, filter: ListFilter, reply: Reply) {
        let store: Arc<dyn Store> = Arc::clone(&self.platform.store);
        self.show(reply, move |shown| {
            let survey = Survey::of(shown, store.as_ref())?;
            let all: Vec<ListedView> =
                survey.functions.values().map(|function| survey.view(function)).collect();
            if let Some(word) = &filter.class {
                known_class(word, &all)?;
            }
            let matches = |view: &ListedView| {
                let driver = view.function.driver.as_deref().unwrap_or("none");
                filter.class.as_ref().is_none_or(|word| is_of_class(view, word))
                    && filter.driver.as_ref().is_none_or(|wanted| wanted == driver)
                    && filter.state.is_none_or(|state| state == view.function.state)
                    && (!filter.assignable || shown.assignable(view.function.address).is_some())
            };
            Ok(Success::Listed { functions: all.into_iter().filter(matches).collect() })
        });
    }

    /// Shows one function. The engine checks its own state for obstacles; the other checks run on the thread.
    pub(super) fn show_function(&self, address: Sbdf, reply: Reply) {
        let checked = existing(self.platform.host.as_ref(), address)
            .map(|function| self.attach_obstacles(&function, None, Reuse::AfterShutdown));
        let known = match checked {
            Ok(known) => known,
            Err(failure) => return reply.done(Err(failure)),
        };
        let (context, holder) = (self.task_context(), self.settings.holder);
        self.show(reply, move |shown| {
            let platform = &context.platform;
            let host = platform.host.as_ref();
            let function = existing(host, address)?;
            let survey = Survey::of(shown, platform.store.as_ref())?;
            let listed = survey.view(&function);
            let uses: Vec<String> =
                host.uses(address).unwrap_or_default().iter().map(ToString::to_string).collect();
            let mut found = known;
            if listed.function.state == FunctionState::Host && !function.is_bridge() {
                found.extend(hold_obstacles(platform, holder, address, InUse::Refused));
            }
            if shares_with_others(listed.function.state, &function) {
                found.extend(shared_obstacles(&context, address, shown.record(address), None));
            }
            let group = survey.groups.get(&address);
            let members = survey.groups.iter().filter(|(_, number)| Some(*number) == group);
            let is_bridge =
                |address: &Sbdf| survey.functions.get(address).is_some_and(HostFunction::is_bridge);
            Ok(Success::Shown(Box::new(ShownView {
                group_members: members
                    .map(|(member, _)| *member)
                    .filter(|member| *member != address && !is_bridge(member))
                    .collect(),
                listed,
                revision: format!("{:02x}", function.revision),
                subsystem: format!("{:04x}:{:04x}", function.subsystem_vendor, function.subsystem),
                serial_number: serial_number(host, function.physical_function.unwrap_or(address))
                    .map(printed),
                path: function
                    .physical_function
                    .is_none()
                    .then(|| PciPath::of(host, address).ok())
                    .flatten()
                    .map(|path| path.to_string()),
                bars: bars(&function),
                interrupt_line: Some(function.irq).filter(|line| *line != 0),
                uses,
                obstacles: found.into_iter().map(Obstacle::from).collect(),
            })))
        });
    }

    /// Checks dom0's set-up on a thread, because running xl takes some time.
    pub(in crate::engine) fn examine(&mut self, reply: Reply) {
        let (platform, version) = (self.platform.clone(), crate::VERSION);
        let problems = self.problems_now().len();
        self.background("doctor", move || {
            let service = match problems {
                0 => Finding::new("service", Verdict::Good, format!("xpcid {version} answers")),
                some => Finding::new(
                    "service",
                    Verdict::Warning,
                    format!("xpcid {version} answers; problems: {some}"),
                )
                .mend("'xpci status' shows them"),
            };
            let mut findings = vec![service];
            findings.extend(doctor::examine(&platform));
            reply.done(Ok(Success::Checkup { findings }));
        });
    }

    /// The name and number of a domain, or only its number.
    pub(in crate::engine) fn called(&self, domain: DomId) -> String {
        domains::called(self.platform.store.as_ref(), domain)
    }
}

/// Refuses an unknown class, so that an empty list always means that there is no such function.
fn known_class(word: &str, all: &[ListedView]) -> Result<(), Failure> {
    let digits = word.bytes().all(|byte| byte.is_ascii_hexdigit()) && (1..=6).contains(&word.len());
    let named = BASE_CLASSES.iter().any(|name| contains(name, word));
    if digits || named || all.iter().any(|view| is_of_class(view, word)) {
        return Ok(());
    }
    let shown: String = word.chars().take(64).collect();
    Err(Failure::new(ErrorCode::Usage, format!("'{shown}' is not a class of functions")).hint(format!(
        "write the first digits of a class code, as in 'lspci -n', a part of a class's name, or one of: {}",
        BASE_CLASSES.join(", ")
    )))
}

fn is_of_class(view: &ListedView, word: &str) -> bool {
    let word = word.to_ascii_lowercase();
    view.class.starts_with(&word)
        || contains(&view.base_class, &word)
        || view.names.class.as_ref().is_some_and(|name| contains(name, &word))
}

fn contains(name: &str, word: &str) -> bool {
    name.to_ascii_lowercase().contains(&word.to_ascii_lowercase())
}

fn bars(function: &HostFunction) -> Vec<String> {
    let bar = |(index, bar): (usize, &Resource)| {
        let kind = match (bar.is_io(), bar.flags & Resource::MEMORY_64 != 0) {
            (true, _) => "I/O ports",
            (_, true) => "64-bit memory",
            _ => "32-bit memory",
        };
        let prefetchable = if bar.flags & Resource::PREFETCH != 0 { ", prefetchable" } else { "" };
        let place = match bar.is_placed() {
            true => format!("at {:#x}", bar.start),
            false => "without an address".to_owned(),
        };
        format!("BAR {index}: {kind} {place}, {:#x} bytes{prefetchable}", bar.size)
    };
    let bars = function.bars().iter().enumerate().filter(|(_, bar)| bar.exists()).map(bar);
    bars.chain(rom(function.rom())).collect()
}

/// The expansion ROM, which only policies give to guests.
fn rom(rom: &Resource) -> Option<String> {
    let place = match (rom.flags & Resource::ROM_SHADOW != 0, rom.is_placed()) {
        (true, _) => format!("a copy of firmware's at {:#x}", rom.start),
        (false, true) => format!("at {:#x}", rom.start),
        (false, false) => "without an address".to_owned(),
    };
    rom.exists().then(|| format!("expansion ROM {place}, {:#x} bytes", rom.size))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_is_shown_with_type_address_and_size() {
        let memory =
            Resource { start: 0xfe00_0000, size: 0x4000, flags: Resource::MEMORY | Resource::MEMORY_64 };
        let unset = Resource { start: 0, size: 0x20, flags: Resource::IO | Resource::UNSET };
        let mut resources = [Resource::default(); 13];
        (resources[0], resources[2]) = (memory, unset);
        let host = pciback::platform::sim::Simulation::from_yaml(
            "drivers: []\nfunctions: [{address: 02:00.0, model: virtio-net}]\n",
        );
        let platform = host.unwrap().platform("test").unwrap();
        let function = platform.host.function("02:00.0".parse().unwrap()).unwrap();
        let shown = bars(&HostFunction { resources, ..function });
        assert_eq!(
            shown,
            [
                "BAR 0: 64-bit memory at 0xfe000000, 0x4000 bytes",
                "BAR 2: I/O ports without an address, 0x20 bytes"
            ]
        );
    }
}
