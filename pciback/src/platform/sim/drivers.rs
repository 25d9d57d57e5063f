//! How Linux gives functions to drivers, and what drivers do to them when they come and go.

use nix::errno::Errno;

use super::Answer;
use super::model::DriverKind;
use super::placement::Placement;
use super::world::{COMMAND, COMMAND_MEMORY, World};
use crate::Sbdf;
use crate::platform::HostEvent;

const COMMAND_IO: u16 = 1 << 0;
const COMMAND_MASTER: u16 = 1 << 2;
/// Offsets and bits of the SR-IOV capability.
const CONTROL: u16 = 0x08;
const VF_ENABLE: u16 = 1 << 0;
const VF_MEMORY: u16 = 1 << 3;
const ARI_HIERARCHY: u16 = 1 << 4;
const TOTAL_VFS: u16 = 0x0e;
const NUM_VFS: u16 = 0x10;
const FIRST_VF: u16 = 0x14;
const STRIDE: u16 = 0x16;

impl World {
    pub fn driver_of(&self, address: Sbdf) -> Option<&DriverKind> {
        self.driver_kinds.get(self.functions.get(&address)?.driver.as_deref()?)
    }

    /// The driver that a probe ends with: the overriding one, or the first whose id table has the function.
    fn matching(&self, address: Sbdf) -> Option<String> {
        let function = self.functions.get(&address)?;
        // With sriov_drivers_autoprobe off a VF goes to the driver of its override only.
        let pf = function.physical_function.and_then(|pf| self.functions.get(&pf));
        if function.driver_override.is_none() && pf.is_some_and(|pf| !pf.vf_autoprobe) {
            return None;
        }
        let (vendor, device) = function.ids(&self.functions);
        let id = format!("{vendor:04x}:{device:04x}");
        let takes = |name: &&String| {
            let kind = self.driver_kinds.get(*name);
            match &function.driver_override {
                Some(wanted) => {
                    *name == wanted && kind.is_some_and(|kind| kind.any || kind.ids.contains(&id))
                }
                None => kind.is_some_and(|kind| !kind.any && kind.ids.contains(&id)),
            }
        };
        self.drivers.iter().find(takes).cloned()
    }

    /// Lets the drivers probe a function that has none.
    pub fn bind(&mut self, address: Sbdf) {
        let Some(name) = self.matching(address) else { return };
        let kind = self.driver_kinds.get(&name).cloned().unwrap_or_default();
        let Some(function) = self.functions.get_mut(&address).filter(|function| function.driver.is_none())
        else {
            return;
        };
        function.driver = Some(name);
        self.listeners.tell(HostEvent::Changed(address));
        if function.physical_function.is_none() {
            let io = function.resources[..6].iter().any(|bar| bar.exists() && bar.is_io());
            let decoding = COMMAND_MEMORY | if io { COMMAND_IO } else { 0 };
            function.registers.change16(COMMAND, 0, decoding);
        }
        if !kind.any {
            function.registers.change16(COMMAND, 0, COMMAND_MASTER);
        }
        let msix = function.masks().layout.msix.is_some();
        if kind.holds_for_guests && msix {
            let memory = self.decodes_memory(address);
            // The driver only logs what Xen says.
            if let Err(errno) = self.xen.prepare_msix(address, memory) {
                log::warn!("{address}: the simulated Xen refuses to prepare MSI-X: {errno}");
            }
        }
    }

    /// Takes a function from its driver, if it has one.
    pub fn unbind(&mut self, address: Sbdf) {
        let Some(kind) = self.driver_of(address).cloned() else { return };
        // Seen with igb: its VFs leave with it, also one that is held.
        if kind.sriov && !kind.any {
            self.disable_vfs(address);
        }
        if kind.holds_for_guests
            && let Err(errno) = self.xen.release_msix(address)
        {
            log::warn!("{address}: the simulated Xen refuses to release MSI-X: {errno}");
        }
        let Some(function) = self.functions.get_mut(&address) else { return };
        function.driver = None;
        self.listeners.tell(HostEvent::Changed(address));
        function.registers.change16(COMMAND, COMMAND_MASTER, 0);
    }

    /// `sriov_totalvfs`: what the hardware says, or less where the driver says so.
    pub fn total_vfs(&self, address: Sbdf) -> u16 {
        let hardware = self.functions.get(&address).and_then(|function| {
            let at = function.masks().layout.sriov?;
            Some(function.registers.peek16(at + TOTAL_VFS))
        });
        let driver = self.driver_of(address).and_then(|kind| kind.max_vfs).unwrap_or(u16::MAX);
        hardware.unwrap_or(0).min(driver)
    }

    /// A write to `sriov_numvfs`.
    pub fn set_num_vfs(&mut self, address: Sbdf, count: u16) -> Answer<()> {
        let sriov = self.function(address)?.masks().layout.sriov.ok_or(Errno::ENOENT)?;
        if count > self.total_vfs(address) {
            return Err(Errno::ERANGE);
        }
        let present = self.function(address)?.virtual_functions.len();
        if usize::from(count) == present {
            return Ok(());
        }
        if !self.driver_of(address).is_some_and(|kind| kind.sriov) {
            return Err(Errno::ENOENT);
        }
        match (count, present) {
            (0, _) => {
                // xen-pciback marks what it holds as assigned, and PF drivers such as igb then refuse.
                let vfs = &self.function(address)?.virtual_functions.clone();
                let held = |vf: &Sbdf| self.driver_of(*vf).is_some_and(|kind| kind.holds_for_guests);
                if vfs.iter().any(held) {
                    return Err(Errno::EPERM);
                }
                self.disable_vfs(address);
                Ok(())
            }
            (_, 0) => self.enable_vfs(address, sriov, count),
            _ => Err(Errno::EBUSY),
        }
    }

    fn enable_vfs(&mut self, address: Sbdf, sriov: u16, count: u16) -> Answer<()> {
        let pf = self.function(address)?;
        let (first, stride) = (pf.registers.peek16(sriov + FIRST_VF), pf.registers.peek16(sriov + STRIDE));
        let mut vfs = Vec::new();
        for index in 0..count {
            let offset = u32::from(first) + u32::from(index) * u32::from(stride);
            let vf = address.offset_by(offset).filter(|vf| !self.functions.contains_key(vf));
            let made = Placement::virtual_function(address, self.function(address)?, index);
            vfs.push((vf.ok_or(Errno::ENOMEM)?, made.ok_or(Errno::ENODEV)?));
        }
        let pf = self.function(address)?;
        pf.registers.poke(sriov + NUM_VFS, &count.to_le_bytes());
        pf.registers.change16(sriov + CONTROL, 0, VF_ENABLE | VF_MEMORY | ARI_HIERARCHY);
        pf.virtual_functions = vfs.iter().map(|(vf, _)| *vf).collect();
        for (vf, made) in vfs {
            self.appear(vf, made);
            self.bind(vf);
        }
        Ok(())
    }

    /// VFs leave first, then the PF stops answering for them.
    fn disable_vfs(&mut self, address: Sbdf) {
        let Some(pf) = self.functions.get_mut(&address) else { return };
        let Some(sriov) = pf.masks().layout.sriov else { return };
        for vf in std::mem::take(&mut pf.virtual_functions) {
            self.remove_function(vf);
        }
        if let Some(pf) = self.functions.get_mut(&address) {
            pf.registers.change16(sriov + CONTROL, VF_ENABLE | VF_MEMORY, 0);
            pf.registers.poke(sriov + NUM_VFS, &[0, 0]);
        }
    }

    /// Linux's reset of a function: hardware forgets, the kernel writes again what it has saved.
    pub fn reset(&mut self, address: Sbdf) -> Answer<()> {
        let function = self.function(address)?;
        if function.silent {
            // The kernel waits a minute for an answer before it says so.
            return Err(Errno::ENOTTY);
        }
        let saved = function.registers.save();
        self.hardware_reset(address);
        self.function(address)?.registers.restore(&saved);
        Ok(())
    }

    /// A function level reset; a PF's reaches its VFs.
    pub fn hardware_reset(&mut self, address: Sbdf) {
        let Some(function) = self.functions.get_mut(&address).filter(|function| !function.unreset) else {
            return;
        };
        function.registers.reset();
        for vf in function.virtual_functions.clone() {
            self.hardware_reset(vf);
        }
    }
}
