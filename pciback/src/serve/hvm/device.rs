//! A function as a device of an HVM guest: its BARs in the guest's address space, and what the service answers there.
//!
//! A BAR of gigabytes is mapped in parts. How far that has come is in the image; after a pause, or in the next process, it goes on there.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use log::warn;

use super::Taken;
use super::bars::{self, Part};
use super::frames::{Frames, Run};
use super::numbers::Use;
use super::table::mask_table;
use crate::config::{Access, Bar, BarKind, SideEffect};
use crate::platform::{BarMemory, Edit, HvmDomains, PAGE, Pirq, PlatformError, Result, Revoked, ServerId};
use crate::serve::device::GuestDevice;
use crate::serve::{GuestFunction, InterruptError};
use crate::spec::header;
use crate::{Devfn, DeviceNumber};

/// What a function is in an HVM guest.
pub struct Device {
    pub(super) domains: Arc<dyn HvmDomains>,
    server: ServerId,
    /// The device number.
    slot: DeviceNumber,
    /// What all the guest's functions have of it.
    pub(super) taken: Arc<Taken>,
    /// The memory of the BARs that are not mapped as a whole.
    memory: Mutex<BTreeMap<u8, Box<dyn BarMemory>>>,
}

/// The BARs of a function that are not mapped as a whole, whose memory the service reads and writes for an HVM guest.
pub fn trapped_bars(function: &GuestFunction) -> Vec<u8> {
    let msix = function.space.msix();
    let bars = function.space.bars().iter();
    bars.filter(|bar| matches!(bar.kind, BarKind::Memory32 | BarKind::Memory64))
        .filter(|bar| !bars::parts(bar, msix.as_ref()).trapped.is_empty())
        .map(|bar| bar.index)
        .collect()
}

impl Device {
    /// At a device number of bus 0, answered for by a server; `taken` is the guest's, `memory` is that of [`trapped_bars`], and of a ROM.
    pub fn new(
        domains: Arc<dyn HvmDomains>,
        server: ServerId,
        slot: DeviceNumber,
        taken: Arc<Taken>,
        memory: BTreeMap<u8, Box<dyn BarMemory>>,
    ) -> Self {
        Self { domains, server, slot, taken, memory: Mutex::new(memory) }
    }

    /// Does something with the memory of a BAR that is not mapped as a whole.
    pub(super) fn with_memory<T>(&self, bar: u8, access: impl FnOnce(&dyn BarMemory) -> T) -> Option<T> {
        let memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        memory.get(&bar).map(|memory| access(memory.as_ref()))
    }

    /// Makes a function what an HVM guest finds at this device number. `again`: a previous process did so, and the guest continues; the
    /// serving thread takes over its BARs.
    pub fn enter(self, function: &mut GuestFunction, again: bool) -> Result<()> {
        let device = Arc::new(self);
        function.set_device(Arc::clone(&device) as _);
        device.vectors_noted(function);
        if !again {
            function.space.unplace();
            mask_table(function);
        }
        device.claim_config(function, Edit::Add)?;
        if !again {
            device.bind_line(function, Edit::Add)?;
            device.place_bars(function)?;
        }
        Ok(())
    }

    /// Says what a function was in an HVM guest, so that [`GuestFunction::quiesce`] takes it out of there.
    pub fn was_entered(self, function: &mut GuestFunction) {
        self.vectors_noted(function);
        function.set_device(Arc::new(self));
    }

    /// Takes the guest's accesses to config space of the function and of the VFs that the guest can create of it, or gives them up; all of it
    /// is tried. Nothing else is at the VFs' numbers: the guest's device model has no device there.
    fn claim_config(&self, function: &GuestFunction, edit: Edit) -> Result<()> {
        let own = self.slot.devfn();
        let vfs = function.space.guest_vf_ids(own).filter_map(|id| u8::try_from(id).ok()).map(Devfn);
        let mut outcome = Ok(());
        for devfn in std::iter::once(own).chain(vfs) {
            let answer = self.domains.claim_function(function.domain, self.server, devfn, edit);
            outcome = outcome.and(undone(edit, answer));
        }
        outcome
    }

    fn bind_line(&self, function: &GuestFunction, edit: Edit) -> Result<()> {
        // The pin of the function's own registers: during a reset the guest reads all ones, and what was bound is still to be unbound.
        let pin = function.space.own_register(header::INTERRUPT_PIN, 1);
        if function.line == 0 || !(1..=4).contains(&pin) {
            return Ok(());
        }
        let pirq = Pirq(function.line);
        self.domains.bind_line(function.domain, pirq, self.slot, pin as u8 - 1, edit)
    }

    /// The BARs of a function, each with the address at which the guest wants it. An absent function decodes nothing.
    fn wanted(function: &GuestFunction) -> Vec<(Bar, Option<u64>)> {
        let access = Access::new(u32::from(header::COMMAND), 2).ok();
        let command = access
            .and_then(|access| function.space.read(access, function.hardware.as_ref()).ok())
            .filter(|_| !function.is_silent());
        let placed = |bar: &Bar| bars::placed(bar, function.space.bar_register(bar), command? as u16);
        function.space.bars().iter().map(|bar| (*bar, placed(bar))).collect()
    }

    /// Brings one BAR into step with the guest's register; `again`: what is noted as mapped may not be.
    fn place(&self, function: &mut GuestFunction, bar: &Bar, wanted: Option<u64>, again: bool) -> Result<()> {
        let current = function.space.image().placed(bar.index);
        if let Some(address) = current.filter(|_| current != wanted) {
            self.remove(function, bar, address)?;
        }
        let Some(address) = wanted else { return Ok(()) };
        let is_new = current != wanted;
        if is_new || again {
            if !self.take(bar, address) {
                // Until the place is free nothing answers for this BAR.
                return Ok(());
            }
            let revoked = function.revocation.check();
            revoked.map_err(|errno| PlatformError::new("map a BAR of", function.address, errno))?;
            // Noted before it is done: what is not known to be mapped is never unmapped.
            if is_new {
                function.space.image_mut().set_placed(bar.index, Some(address));
            }
            let claimed = self.claim(function, bar, address, Edit::Add);
            claimed.map_err(|error| self.undo(function, bar, address, error))?;
        }
        let frames = Frames::of(bar, function.space.msix().as_ref());
        let maps = function.space.image().mapped_frames(bar.index) < frames.count();
        if maps {
            let mapped = self.map_frames(function, bar, address, &frames);
            mapped.map_err(|error| self.undo(function, bar, address, error))?;
        }
        let is_mapped = function.space.image().mapped_frames(bar.index) >= frames.count();
        if is_mapped && (is_new || again || maps) {
            self.table_moved(function, bar);
        }
        Ok(())
    }

    /// Maps the page frames that are not mapped yet, and pauses where the thread has orders.
    fn map_frames(
        &self,
        function: &mut GuestFunction,
        bar: &Bar,
        address: u64,
        frames: &Frames,
    ) -> Result<()> {
        let mut done = function.space.image().mapped_frames(bar.index);
        while let Some(Run { offset, count }) = frames.next(done) {
            if function.revocation.is_interrupted() {
                break;
            }
            let revoked = function.revocation.check();
            revoked.map_err(|errno| PlatformError::new("map a BAR of", function.address, errno))?;
            let (guest, host) = ((address + offset) / PAGE, (bar.start + offset) / PAGE);
            self.domains.map_memory(function.domain, guest, host, count, Edit::Add)?;
            done += count;
            function.space.image_mut().set_mapped_frames(bar.index, done);
            function.revocation.advance();
        }
        Ok(())
    }

    /// Takes a BAR out of the guest. On an error it stays noted.
    fn remove(&self, function: &mut GuestFunction, bar: &Bar, address: u64) -> Result<()> {
        function.space.image_mut().set_mapped_frames(bar.index, 0);
        let frames = Frames::of(bar, function.space.msix().as_ref());
        let mut outcome = self.claim(function, bar, address, Edit::Remove);
        let mut done = 0;
        // All of them: a process that was killed may have mapped more than it has noted.
        while let Some(Run { offset, count }) = frames.next(done) {
            let (guest, host) = ((address + offset) / PAGE, (bar.start + offset) / PAGE);
            let answer = self.domains.map_memory(function.domain, guest, host, count, Edit::Remove);
            outcome = outcome.and(Revoked::Reach.outcome(answer));
            done += count;
            function.revocation.advance();
        }
        outcome?;
        function.space.image_mut().set_placed(bar.index, None);
        self.give_up(bar, address);
        Ok(())
    }

    /// Takes back what was done of a BAR that cannot be mapped, and returns why.
    fn undo(
        &self,
        function: &mut GuestFunction,
        bar: &Bar,
        address: u64,
        error: PlatformError,
    ) -> PlatformError {
        if let Err(second) = self.remove(function, bar, address) {
            warn!("{}: {second}", function.address);
        }
        error
    }

    fn take(&self, bar: &Bar, address: u64) -> bool {
        bar.kind == BarKind::Io || self.taken.addresses.take(address, address + bar.size)
    }

    fn give_up(&self, bar: &Bar, address: u64) {
        if bar.kind != BarKind::Io {
            self.taken.addresses.release(address);
        }
    }

    /// Takes the guest's accesses to I/O ports and to the trapped parts of a BAR, or gives them up; all of it is tried.
    fn claim(&self, function: &GuestFunction, bar: &Bar, address: u64, edit: Edit) -> Result<()> {
        let (domains, domain) = (self.domains.as_ref(), function.domain);
        if bar.kind == BarKind::Io {
            let (guest, host, count) = (address as u32, bar.start as u32, bar.size as u32);
            return undone(edit, domains.map_ports(domain, guest, host, count, edit));
        }
        let parts = bars::parts(bar, function.space.msix().as_ref());
        let mut outcome = Ok(());
        for Part { offset, bytes } in parts.trapped {
            let answer = domains.claim_memory(domain, self.server, address + offset, bytes, edit);
            outcome = outcome.and(undone(edit, answer));
        }
        outcome
    }
}

impl GuestDevice for Device {
    fn config_written(
        &self,
        function: &mut GuestFunction,
        access: Access,
        effect: Option<SideEffect>,
    ) -> std::result::Result<(), InterruptError> {
        if (header::BAR0..header::BAR0 + 24).contains(&access.offset())
            || access.dword() == header::ROM
            || matches!(effect, Some(SideEffect::Command { .. }))
        {
            self.place_bars(function)?;
        }
        self.config_interrupts(function, access, effect)
    }

    /// Of the MSI-X table by the guest's own table, of other memory of a BAR as hardware answers.
    fn access_memory(
        &self,
        function: &mut GuestFunction,
        address: u64,
        bytes: u8,
        write: Option<u64>,
    ) -> Option<u64> {
        let (bar, offset) = bar_at(function, address)?;
        if function.is_silent() {
            return Some(write.unwrap_or(u64::MAX));
        }
        if let Some(value) = self.access_table(function, &bar, offset, bytes, write) {
            return Some(value);
        }
        // Of a ROM, any bytes can be read together; writes are dropped.
        let whole = bar.kind == BarKind::Rom || aligned(offset, bytes);
        self.with_memory(bar.index, |memory| match write {
            Some(value) => {
                if whole {
                    memory.write(offset, bytes, value);
                }
                value
            }
            None if whole => memory.read(offset, bytes),
            None => u64::MAX,
        })
    }

    fn place_bars(&self, function: &mut GuestFunction) -> Result<()> {
        let mut outcome = Ok(());
        for (bar, wanted) in Self::wanted(function) {
            outcome = outcome.and(self.place(function, &bar, wanted, false));
        }
        outcome
    }

    fn take_over_bars(&self, function: &mut GuestFunction) -> Result<()> {
        let mut outcome = Ok(());
        for (bar, wanted) in Self::wanted(function) {
            let Some(current) = function.space.image().placed(bar.index) else { continue };
            let stays = wanted.filter(|wanted| *wanted == current);
            outcome = outcome.and(self.place(function, &bar, stays, true));
        }
        outcome
    }

    fn unmap_bars(&self, function: &mut GuestFunction) -> Result<()> {
        let mut outcome = Ok(());
        for bar in function.space.bars().to_vec() {
            outcome = outcome.and(self.place(function, &bar, None, false));
        }
        outcome
    }

    fn vectors_noted(&self, function: &GuestFunction) {
        let entries = function.vectors().entries.into_iter();
        let vectors = entries.map(|(entry, pirq)| (Pirq(pirq), Use::Entry(entry)));
        let line = Some((Pirq(function.line), Use::Line)).filter(|_| function.line != 0);
        self.taken.numbers.set(function.address, vectors.chain(line).collect());
    }

    fn unbind(&self, function: &GuestFunction, pirq: Pirq) {
        let unbound = self.domains.unbind_msi(function.domain, pirq);
        if let Err(error) = Revoked::Interrupt.outcome(unbound) {
            // Unmapping it, which follows, ends it all the same or fails too.
            warn!("{}: {error}", function.address);
        }
    }

    /// The messages that Xen has bound go with a reset.
    fn begins_anew_after_reset(&self) -> bool {
        true
    }

    fn reset(&self, function: &mut GuestFunction) -> io::Result<()> {
        mask_table(function);
        Ok(())
    }

    fn leave(&self, function: &mut GuestFunction) -> std::result::Result<(), InterruptError> {
        let config = self.claim_config(function, Edit::Remove);
        let line = Revoked::Interrupt.outcome(self.bind_line(function, Edit::Remove));
        let unmapped = self.unmap_bars(function);
        Ok(config.and(line).and(unmapped)?)
    }
}

/// The BAR whose trapped part holds this address of the guest's, and the offset in it.
fn bar_at(function: &GuestFunction, address: u64) -> Option<(Bar, u64)> {
    let bars = function.space.bars().iter().filter(|bar| bar.kind != BarKind::Io);
    bars.filter_map(|bar| {
        let offset = address.checked_sub(function.space.image().placed(bar.index)?)?;
        (offset < bar.size).then_some((*bar, offset))
    })
    .next()
}

/// A register of a device is reached as a whole: an unaligned access reaches no register.
const fn aligned(offset: u64, bytes: u8) -> bool {
    offset.is_multiple_of(bytes as u64)
}

/// What is taken away may have been taken before.
fn undone(edit: Edit, answer: Result<()>) -> std::result::Result<(), PlatformError> {
    match edit {
        Edit::Add => answer,
        Edit::Remove => Revoked::Reach.outcome(answer),
    }
}
