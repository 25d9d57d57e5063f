//! A function as a device of an HVM guest: its BARs in the guest's address space, and what the service answers there.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use log::warn;

use super::addresses::Addresses;
use super::bars::{self, Part};
use super::wire::pieces;
use crate::config::{Access, Bar, BarKind, SideEffect, Width};
use crate::live;
use crate::platform::{BarMemory, HvmDomains, PAGE, Pirq, PlatformError, Result, Revoked, ServerId};
use crate::pv::function::{Accessed, Demand, GuestFunction};
use crate::spec::header;

/// Where the window to extended config space is in every guest: hvmloader reports 0xfc000000 to 4 GiB as reserved, uses none of
/// it from 0xfe000000 up to the I/O APIC, and the specification wants it aligned to its size (PCI Express 6.0, section 7.2.2).
pub const ECAM_BASE: u64 = 0xfe00_0000;
/// Its size: one bus.
pub const ECAM_BYTES: u64 = 1 << 20;

/// What a function is in an HVM guest.
pub struct Device {
    pub(super) domains: Arc<dyn HvmDomains>,
    pub(super) server: ServerId,
    /// The device number.
    pub(super) slot: u8,
    /// Where the BARs of all the guest's functions are.
    pub(super) addresses: Arc<Addresses>,
    /// The memory of the BARs that are not mapped as a whole.
    pub(super) memory: BTreeMap<u8, Box<dyn BarMemory>>,
}

impl Device {
    /// At a device number of bus 0, answered for by a server; `addresses` is the guest's, `memory` is that of [`GuestFunction::trapped_bars`].
    pub fn new(
        domains: Arc<dyn HvmDomains>,
        server: ServerId,
        slot: u8,
        addresses: Arc<Addresses>,
        memory: BTreeMap<u8, Box<dyn BarMemory>>,
    ) -> Self {
        Self { domains, server, slot, addresses, memory }
    }
}

impl GuestFunction {
    /// The BARs that are not mapped as a whole, whose memory the service reads and writes for an HVM guest.
    pub fn trapped_bars(&self) -> Vec<u8> {
        let msix = self.space.msix();
        let bars = self.space.bars().iter();
        bars.filter(|bar| matches!(bar.kind, BarKind::Memory32 | BarKind::Memory64))
            .filter(|bar| !bars::parts(bar, msix.as_ref()).trapped.is_empty())
            .map(|bar| bar.index)
            .collect()
    }

    /// Makes it what an HVM guest finds at a device number. `again`: an earlier life had done so, and the guest goes on.
    pub fn enter_guest(&mut self, device: Device, again: bool) -> Result<()> {
        let (domains, server, slot) = (Arc::clone(&device.domains), device.server, device.slot);
        self.device = Some(device);
        if !again {
            self.space.unplace();
            self.mask_table();
        }
        domains.claim_slot(self.domain, server, slot, true)?;
        if !again {
            self.bind_line(true)?;
        }
        self.place_bars(again)
    }

    /// Says what it was in an HVM guest, so that [`Self::quiesce`] takes it out of there.
    pub fn was_in_guest(&mut self, device: Device) {
        self.device = Some(device);
    }

    /// Takes everything of it out of the guest; nothing happens for a PV guest.
    pub(crate) fn leave_guest(&mut self) -> std::result::Result<(), crate::pv::InterruptError> {
        let Some(device) = &self.device else { return Ok(()) };
        let slot = device.domains.claim_slot(self.domain, device.server, device.slot, false);
        let slot = Revoked::Reach.outcome(slot);
        let line = Revoked::Interrupt.outcome(self.bind_line(false));
        let unmapped = self.unmap_bars();
        Ok(slot.and(line).and(unmapped)?)
    }

    /// What a reset that its guest asked for leaves: no BAR, no interrupt; the guest's driver sets up everything anew.
    pub(crate) fn reset_device(&mut self) -> io::Result<()> {
        crate::pv::interrupts::release_all(self).map_err(io::Error::other)?;
        self.space.reset();
        live::clear_bus_master(self.hardware.as_ref())?;
        self.restore_placement()?;
        self.mask_table();
        self.space.image_mut().set_resetting(false);
        self.apply_interrupt_disable()?;
        self.place_bars(false).map_err(io::Error::other)
    }

    fn bind_line(&self, bind: bool) -> Result<()> {
        let Some(device) = &self.device else { return Ok(()) };
        let pin = Access::new(u32::from(header::INTERRUPT_PIN), 1)
            .ok()
            .and_then(|access| self.space.read(access, self.hardware.as_ref()).ok());
        match pin {
            Some(pin @ 1..=4) if self.line != 0 => {
                let pirq = Pirq(self.line);
                device.domains.bind_line(self.domain, pirq, device.slot, pin as u8 - 1, bind)
            }
            _ => Ok(()),
        }
    }

    /// Reads config space as a request of any alignment does; `bytes` of it, at most four.
    pub(super) fn config_read(&mut self, offset: u16, bytes: u8) -> (u64, Option<Demand>) {
        let (mut value, mut demand) = (u64::MAX, None);
        for (access, distance) in pieces(offset, bytes) {
            let piece = self.read_config(access);
            value = with_piece(value, access.width(), distance, piece.value);
            demand = demand.or(piece.demand);
        }
        (value, demand)
    }

    /// Writes config space likewise, and does what follows from it.
    pub(super) fn config_write(&mut self, offset: u16, bytes: u8, value: u64) -> Option<Demand> {
        let mut demand = None;
        for (access, distance) in pieces(offset, bytes) {
            let piece = (value >> (8 * u32::from(distance))) as u32;
            let Accessed { demand: wanted, effect, .. } = self.write_config(access, piece);
            demand = demand.or(wanted);
            if let Err(error) = self.follow(access, effect) {
                self.note_trouble(&error);
            }
        }
        demand
    }

    /// What of a write to config space concerns more than config space.
    fn follow(
        &mut self,
        access: Access,
        effect: Option<SideEffect>,
    ) -> std::result::Result<(), crate::pv::InterruptError> {
        if self.is_silent() {
            return Ok(());
        }
        if access.offset() < header::BAR0 + 24 && access.offset() >= header::BAR0
            || matches!(effect, Some(SideEffect::Command { .. }))
        {
            self.place_bars(false)?;
        }
        self.config_interrupts(access, effect)
    }

    /// Brings what is mapped into step with the guest's registers; `again`: what is noted as mapped may not be.
    pub(super) fn place_bars(&mut self, again: bool) -> Result<()> {
        let access = Access::new(u32::from(header::COMMAND), 2).ok();
        let command = access
            .and_then(|access| self.space.read(access, self.hardware.as_ref()).ok())
            .filter(|_| !self.is_silent());
        let mut outcome = Ok(());
        for bar in self.space.bars().to_vec() {
            let register = self.space.bar_register(&bar);
            // An absent function decodes nothing.
            let wanted = command.and_then(|command| bars::placed(&bar, register, command as u16));
            outcome = outcome.and(self.place(&bar, wanted, again));
        }
        outcome
    }

    /// Nothing of it is mapped in an HVM guest any more; nothing happens for a PV guest.
    pub(crate) fn unmap_bars(&mut self) -> Result<()> {
        let bars = self.space.bars().to_vec();
        let mut outcome = Ok(());
        for bar in bars {
            outcome = outcome.and(self.place(&bar, None, false));
        }
        outcome
    }

    fn place(&mut self, bar: &Bar, wanted: Option<u64>, again: bool) -> Result<()> {
        let current = self.space.image().placed(bar.index);
        if current == wanted && !(again && wanted.is_some()) {
            return Ok(());
        }
        if let Some(address) = current.filter(|_| current != wanted) {
            self.reach(bar, address, false)?;
            self.space.image_mut().set_placed(bar.index, None);
            self.give_up(bar, address);
        }
        let Some(address) = wanted else { return Ok(()) };
        if !self.take(bar, address) {
            // Until the place is free nobody answers for this BAR.
            return Ok(());
        }
        self.revocation.check().map_err(|errno| PlatformError::new("map a BAR of", self.address, errno))?;
        // Noted before it is done: what is not known to be mapped is never unmapped.
        self.space.image_mut().set_placed(bar.index, Some(address));
        if let Err(error) = self.reach(bar, address, true) {
            if let Err(second) = self.reach(bar, address, false) {
                warn!("{}: {second}", self.address);
            }
            self.space.image_mut().set_placed(bar.index, None);
            self.give_up(bar, address);
            return Err(error);
        }
        self.table_moved(bar);
        Ok(())
    }

    fn take(&self, bar: &Bar, address: u64) -> bool {
        let Some(device) = &self.device else { return false };
        bar.kind == BarKind::Io || device.addresses.take(address, address + bar.size)
    }

    fn give_up(&self, bar: &Bar, address: u64) {
        if let Some(device) = self.device.as_ref().filter(|_| bar.kind != BarKind::Io) {
            device.addresses.release(address);
        }
    }

    /// How often places of the guest's BARs have become free.
    pub(super) fn places_released(&self) -> u64 {
        self.device.as_ref().map_or(0, |device| device.addresses.released())
    }

    /// Lets the guest reach a BAR at an address, or not any more; all of it is tried.
    fn reach(&self, bar: &Bar, address: u64, map: bool) -> Result<()> {
        let Some(device) = &self.device else { return Ok(()) };
        let (domains, domain) = (device.domains.as_ref(), self.domain);
        if bar.kind == BarKind::Io {
            let (guest, host, count) = (address as u32, bar.start as u32, bar.size as u32);
            return undone(map, domains.map_ports(domain, guest, host, count, map));
        }
        let parts = bars::parts(bar, self.space.msix().as_ref());
        let mut outcome = Ok(());
        for Part { offset, bytes } in parts.mapped {
            let (guest, host) = ((address + offset) / PAGE, (bar.start + offset) / PAGE);
            let answer = domains.map_memory(domain, guest, host, bytes / PAGE, map);
            outcome = outcome.and(undone(map, answer));
        }
        for Part { offset, bytes } in parts.trapped {
            let answer = domains.claim_memory(domain, device.server, address + offset, bytes, map);
            outcome = outcome.and(undone(map, answer));
        }
        outcome
    }

    /// The BAR whose trapped part holds this address of the guest's, and the offset in it.
    fn bar_at(&self, address: u64) -> Option<(Bar, u64)> {
        let bars = self.space.bars().iter().filter(|bar| bar.kind != BarKind::Io);
        bars.filter_map(|bar| {
            let offset = address.checked_sub(self.space.image().placed(bar.index)?)?;
            (offset < bar.size).then_some((*bar, offset))
        })
        .next()
    }

    /// Reads memory of a BAR that is trapped; `None`: there is no BAR of this function.
    pub(super) fn memory_read(&mut self, address: u64, bytes: u8) -> Option<u64> {
        let (bar, offset) = self.bar_at(address)?;
        if self.is_silent() {
            return Some(u64::MAX);
        }
        if let Some(value) = self.table_read(&bar, offset, bytes) {
            return Some(value);
        }
        let memory = self.device.as_ref()?.memory.get(&bar.index)?;
        Some(if aligned(offset, bytes) { memory.read(offset, bytes) } else { u64::MAX })
    }

    /// Writes it likewise.
    pub(super) fn memory_write(&mut self, address: u64, bytes: u8, value: u64) -> Option<()> {
        let (bar, offset) = self.bar_at(address)?;
        if self.is_silent() {
            return Some(());
        }
        match self.table_write(&bar, offset, bytes, value) {
            Some(Ok(())) => return Some(()),
            Some(Err(error)) => {
                self.note_trouble(&error);
                return Some(());
            }
            None => {}
        }
        let memory = self.device.as_ref()?.memory.get(&bar.index)?;
        if aligned(offset, bytes) {
            memory.write(offset, bytes, value);
        }
        Some(())
    }
}

/// A register of a device is reached as a whole: what is not aligned is nobody's.
const fn aligned(offset: u64, bytes: u8) -> bool {
    offset.is_multiple_of(bytes as u64)
}

/// What is taken away may have been taken before.
fn undone(map: bool, answer: Result<()>) -> std::result::Result<(), PlatformError> {
    if map { answer } else { Revoked::Reach.outcome(answer) }
}

/// A value with some of its bytes replaced.
fn with_piece(value: u64, width: Width, distance: u8, piece: u32) -> u64 {
    let shift = 8 * u32::from(distance);
    let mask = u64::from(width.mask()) << shift;
    value & !mask | (u64::from(piece) << shift & mask)
}
