//! The host, Xen, xenstore and the service's records as plain sets, with Xen's refusals (`docs/xen-answers.md`).
//!
//! It knows nothing of planning: it carries out one repair as [`Repair`] promises it, and fails where Xen would refuse, panic or
//! take a function from under a guest.

use std::collections::{BTreeMap, BTreeSet};

use super::super::*;
use crate::{DomId, Sbdf};

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hardware {
    pub identity: Identity,
    pub bridge: bool,
    pub msix: bool,
    pub extended: bool,
    pub driver: bool,
    pub held: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// [`Owner::Host`], [`Owner::Quarantine`] or [`Owner::Domain`].
    pub owner: Owner,
    pub prepared: bool,
    /// Whether interrupts are mapped for the guest that owns it, by whomever.
    pub mapped: bool,
}

/// How much Xen reports of owners.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sight {
    Exact,
    Assignable,
    Blind,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct World {
    pub sight: Sight,
    /// VFs and their PFs, there or not, and the other way round.
    family: BTreeMap<Sbdf, Sbdf>,
    families: BTreeMap<Sbdf, BTreeSet<Sbdf>>,
    pub hardware: BTreeMap<Sbdf, Hardware>,
    pub xen: BTreeMap<Sbdf, Device>,
    pub nodes: BTreeSet<Published>,
    pub alive: BTreeSet<DomId>,
    pub wanted: Wanted,
}

type Carried = Result<(), String>;

fn check(condition: bool, refusal: &str) -> Carried {
    if condition { Ok(()) } else { Err(refusal.to_owned()) }
}

impl World {
    /// No functions yet.
    pub fn new(sight: Sight, alive: BTreeSet<DomId>) -> Self {
        Self {
            sight,
            family: BTreeMap::new(),
            families: BTreeMap::new(),
            hardware: BTreeMap::new(),
            xen: BTreeMap::new(),
            nodes: BTreeSet::new(),
            alive,
            wanted: Wanted::default(),
        }
    }

    /// Makes a function a VF.
    pub fn relate(&mut self, vf: Sbdf, pf: Sbdf) {
        self.family.insert(vf, pf);
        self.families.entry(pf).or_default().insert(vf);
    }

    pub fn pf(&self, address: Sbdf) -> Option<Sbdf> {
        self.family.get(&address).copied()
    }

    pub fn vfs(&self, pf: Sbdf) -> impl Iterator<Item = Sbdf> {
        self.families.get(&pf).into_iter().flatten().copied()
    }

    /// Whether a transaction is using it or its PF is being changed.
    pub fn is_busy(&self, address: Sbdf) -> bool {
        let busy = &self.wanted.busy;
        busy.contains(&address) || self.pf(address).is_some_and(|pf| busy.contains(&pf))
    }

    pub fn record(&self, address: Sbdf) -> Option<&Intent> {
        self.wanted.functions.get(&address)
    }

    pub fn place(&self, address: Sbdf) -> Option<GuestPlace> {
        self.record(address).and_then(Intent::place)
    }

    pub fn addresses(&self) -> BTreeSet<Sbdf> {
        let records = self.wanted.functions.keys();
        let nodes = self.nodes.iter().map(|node| &node.address);
        self.hardware.keys().chain(self.xen.keys()).chain(records).chain(nodes).copied().collect()
    }

    fn host_view(&self, address: Sbdf) -> Option<HostView> {
        let hardware = self.hardware.get(&address)?;
        let vfs: Vec<Sbdf> = self.vfs(address).filter(|vf| self.hardware.contains_key(vf)).collect();
        Some(HostView {
            identity: hardware.identity,
            bridge: hardware.bridge,
            msix: hardware.msix,
            extended: hardware.extended,
            num_vfs: vfs.len() as u16,
            virtual_functions: vfs,
            driver: hardware.driver,
            held: hardware.held,
        })
    }

    fn seen_owner(&self, owner: Owner) -> Owner {
        match (self.sight, owner) {
            (Sight::Exact, owner) => owner,
            (Sight::Assignable, Owner::Domain(_)) => Owner::Guest,
            (Sight::Assignable, _) => Owner::Free,
            (Sight::Blind, _) => Owner::Unknown,
        }
    }

    pub fn observe(&self) -> Observed {
        let function = |address: Sbdf| Function {
            host: self.host_view(address),
            physical_function: self.pf(address),
            xen: self.xen.get(&address).map(|device| self.seen_owner(device.owner)),
        };
        Observed {
            functions: self.addresses().into_iter().map(|address| (address, function(address))).collect(),
            published: self.nodes.clone(),
            domains: self.alive.clone(),
        }
    }

    pub fn plan(&self) -> Plan {
        plan(&self.observe(), &self.wanted)
    }

    fn device(&mut self, address: Sbdf) -> Result<&mut Device, String> {
        self.xen.get_mut(&address).ok_or_else(|| "ENODEV: Xen does not know it".to_owned())
    }

    /// Carries out one repair.
    pub fn carry_out(&mut self, repair: Repair) -> Carried {
        let address = repair.address();
        check(!self.is_busy(address), "a transaction has it")?;
        match repair {
            Repair::Withdraw { place, .. } => {
                check(self.alive.contains(&place.domain), "its guest has ended")?;
                self.take(address, place)
            }
            Repair::DetachFromDead { place, .. } => {
                check(!self.alive.contains(&place.domain), "its guest is alive")?;
                self.take(address, place)
            }
            Repair::RemoveNodes { place, .. } => {
                check(self.place(address) != Some(place), "a guest has it")?;
                check(self.nodes.remove(&Published { address, place }), "there are none")
            }
            Repair::ReleaseMsix { .. } => {
                let hardware = self.hardware.get(&address).ok_or("it is not there")?;
                check(hardware.msix, "Xen panics: no MSI-X capability")?;
                let device = self.device(address)?;
                check(!device.mapped, "EBUSY: entries are mapped")?;
                // Noted and never done is no failure, the service finds that out.
                device.prepared = false;
                self.unprepared(address);
                Ok(())
            }
            Repair::ReportToXen { kind, .. } => self.report(address, kind),
            Repair::RemoveFromXen { .. } => self.remove(address),
            Repair::Hold { .. } => self.hold(address),
            Repair::Release { .. } => {
                let device = self.device(address)?;
                check(!matches!(device.owner, Owner::Domain(_)), "ENODEV: a guest owns it")?;
                device.owner = Owner::Host;
                Ok(())
            }
            Repair::Publish { place, .. } => {
                check(
                    self.record(address).is_some_and(|it| it.want == Want::Attached(place)),
                    "not attached",
                )?;
                check(self.alive.contains(&place.domain), "its guest has ended")?;
                check(self.nodes.iter().all(|node| node.place != place), "the place is taken")?;
                self.nodes.insert(Published { address, place });
                Ok(())
            }
            Repair::Quarantine { .. } => {
                let new = Intent { want: Want::Host, identity: None, msix_prepared: false };
                let record = self.wanted.functions.entry(address).or_insert(new);
                record.want = Want::Quarantined(record.place());
                Ok(())
            }
            Repair::MarkGone { .. } => {
                check(!self.hardware.contains_key(&address), "it is there")?;
                check(self.place(address).is_none(), "a guest has it")?;
                let record = self.wanted.functions.get_mut(&address).ok_or("no record")?;
                (record.want, record.msix_prepared) = (Want::Gone, false);
                Ok(())
            }
            Repair::Forget { .. } => {
                check(self.place(address).is_none(), "a guest has it")?;
                self.wanted.functions.remove(&address).map(drop).ok_or_else(|| "no record".to_owned())
            }
        }
    }

    fn unprepared(&mut self, address: Sbdf) {
        if let Some(record) = self.wanted.functions.get_mut(&address) {
            record.msix_prepared = false;
        }
    }

    fn take(&mut self, address: Sbdf, place: GuestPlace) -> Carried {
        check(self.place(address) == Some(place), "it is not that guest's")?;
        self.nodes.remove(&Published { address, place });
        let table = self.hardware.get(&address).is_some_and(|hardware| hardware.msix);
        if let Some(device) = self.xen.get_mut(&address) {
            if device.owner == Owner::Domain(place.domain) {
                (device.owner, device.mapped) = (Owner::Quarantine, false);
            }
            device.prepared &= !table;
        }
        let record = self.wanted.functions.get_mut(&address).ok_or("no record")?;
        record.msix_prepared = false;
        record.want = match record.want {
            Want::Attached(_) => Want::Held,
            _ => Want::Quarantined(None),
        };
        Ok(())
    }

    fn report(&mut self, address: Sbdf, kind: ReportKind) -> Carried {
        let hardware = self.hardware.get(&address).ok_or("only functions that sysfs shows are reported")?;
        check(!self.xen.contains_key(&address), "it is known")?;
        let expected = match self.pf(address) {
            Some(physical_function) => ReportKind::Virtual { physical_function },
            None if hardware.extended => ReportKind::Extended,
            None => ReportKind::Plain,
        };
        check(kind == expected, "it is reported as something else")?;
        if let Some(pf) = self.pf(address) {
            check(self.xen.contains_key(&pf), "Xen panics later: a VF of a PF that it does not know")?;
            check(self.hardware.contains_key(&pf), "Xen reads the config space of a PF that left")?;
        }
        self.xen.insert(address, Device { owner: Owner::Host, prepared: false, mapped: false });
        self.unprepared(address);
        Ok(())
    }

    fn remove(&mut self, address: Sbdf) -> Carried {
        self.device(address)?;
        check(!self.hardware.contains_key(&address), "sysfs shows it")?;
        check(
            self.vfs(address).all(|vf| !self.xen.contains_key(&vf)),
            "EBUSY: a PF with VFs, all broken now",
        )?;
        let whole = self.pf(address).is_none_or(|pf| self.xen.contains_key(&pf));
        check(whole, "Xen panics: its report may have failed half-way")?;
        let published = self.nodes.iter().any(|node| node.address == address);
        check(self.place(address).is_none() && !published, "it is removed from under a guest")?;
        self.xen.remove(&address);
        self.unprepared(address);
        Ok(())
    }

    fn hold(&mut self, address: Sbdf) -> Carried {
        check(self.record(address).is_some_and(|record| record.want == Want::Held), "no record wants that")?;
        let vfs = self.vfs(address).any(|vf| self.hardware.contains_key(&vf));
        let hardware = self.hardware.get_mut(&address).ok_or("it is not there")?;
        check(!hardware.bridge, "it is a bridge")?;
        check(hardware.held || !vfs, "its VFs vanish")?;
        (hardware.driver, hardware.held) = (true, true);
        let device = self.device(address)?;
        check(!matches!(device.owner, Owner::Domain(_)), "EBUSY: a guest owns it")?;
        device.owner = Owner::Quarantine;
        Ok(())
    }
}
