//! MSI and MSI-X of an HVM guest's function: the guest writes messages, Xen delivers them.
//!
//! A vector is mapped and bound when the guest has enabled its kind of interrupts and unmasked it. From then on Xen takes the mask
//! of an MSI-X vector itself, from the guest's write to its table, and answers reads of it; everything else of the table
//! comes to us. So the masks in the image are true for vectors that are not bound, and are read from hardware when they are
//! unbound.

use log::warn;

use super::bars;
use crate::config::{Access, Bar, InterruptMode, MsiCapability, SideEffect, Width};
use crate::live;
use crate::platform::{MsiMessage, MsiSource, Pirq, Revoked};
use crate::pv::InterruptError;
use crate::pv::function::GuestFunction;
use crate::pv::interrupts::kept;
use crate::spec::legacy;

type Result<T> = std::result::Result<T, InterruptError>;

/// Index of Vector Control in an entry of the table, and its Mask bit (PCI Express 6.0, section 7.7.2.9).
const CONTROL: usize = 3;
const MASKED: u32 = 1;

impl GuestFunction {
    /// Ends the delivery of a physical interrupt in an HVM guest.
    pub(crate) fn unbind(&mut self, pirq: Pirq) {
        let Some(device) = &self.device else { return };
        let unbound = device.domains.unbind_msi(self.domain, pirq);
        if let Err(error) = Revoked::Interrupt.outcome(unbound) {
            // Unmapping it, which follows, ends it all the same or fails too.
            warn!("{}: {error}", self.address);
        }
    }

    /// What a write to config space means for interrupts.
    pub(super) fn config_interrupts(&mut self, access: Access, effect: Option<SideEffect>) -> Result<()> {
        match effect {
            Some(SideEffect::MsixControl { value }) => self.msix_control(value),
            Some(SideEffect::MsiControl { value }) => self.msi_control(value),
            _ => match self.space.msi() {
                Some(msi) if self.vectors().mode == InterruptMode::Msi => self.msi_written(msi, access),
                _ => Ok(()),
            },
        }
    }

    fn msix_control(&mut self, control: u16) -> Result<()> {
        let active = self.vectors().mode;
        if control & legacy::MSIX_ENABLE == 0 {
            if active == InterruptMode::MsiX {
                self.keep_masks();
                self.release()?;
            }
            return Ok(());
        }
        if active != InterruptMode::MsiX {
            if active == InterruptMode::Msi {
                self.release()?;
            }
            self.begin(InterruptMode::MsiX)?;
        }
        // Xen keeps this bit for the guest, and combines it with its own.
        let mask = control & legacy::MSIX_FUNCTION_MASK;
        let capability = self.capability_of(InterruptMode::MsiX)?;
        let register = live::message_control(capability).map_err(std::io::Error::other)?;
        let bits = legacy::MSIX_FUNCTION_MASK.into();
        kept(capability, live::rewrite(self.hardware.as_ref(), register, bits, mask.into())?)?;
        let entries = self.space.msix().map_or(0, |msix| msix.table_size);
        (0..entries).try_for_each(|entry| self.bind_if_unmasked(entry))
    }

    fn bind_if_unmasked(&mut self, entry: u16) -> Result<()> {
        let [address, _, data, control] = self.space.image().table_entry(entry);
        if control & MASKED != 0 || self.vectors().mode != InterruptMode::MsiX {
            return Ok(());
        }
        let Some(msix) = self.space.msix() else { return Ok(()) };
        let table = self.space.bars().iter().find(|bar| bar.index == msix.table_bar).map(|bar| bar.start);
        let table = table.ok_or(InterruptError::Entries("in a table that no BAR holds"))?;
        let pirq = self.mapped(entry, MsiSource::MsiX { entry, table })?;
        let seen = self.space.image().placed(msix.table_bar);
        let seen = seen.map_or(0, |address| address + u64::from(msix.table_offset));
        self.bind(pirq, MsiMessage { address, data }, seen, false)
    }

    /// The physical interrupt of a vector, mapped now where it was not.
    fn mapped(&mut self, entry: u16, source: MsiSource) -> Result<Pirq> {
        let mut vectors = self.vectors();
        let known = |entries: &[(u16, u32)]| {
            entries.iter().find(|(known, _)| *known == entry).map(|(_, pirq)| Pirq(*pirq))
        };
        if let Some(pirq) = known(&vectors.entries) {
            return Ok(pirq);
        }
        self.map(&mut vectors, source)?;
        known(&vectors.entries).ok_or(InterruptError::Entries("not mapped"))
    }

    fn bind(&self, pirq: Pirq, message: MsiMessage, table: u64, masked: bool) -> Result<()> {
        match &self.device {
            Some(device) => Ok(device.domains.bind_msi(self.domain, pirq, message, table, masked)?),
            None => Ok(()),
        }
    }

    /// The BAR with the table has another address in the guest: Xen must look for masks there.
    pub(super) fn table_moved(&mut self, bar: &Bar) {
        let Some(msix) = self.space.msix().filter(|msix| msix.table_bar == bar.index) else { return };
        let vectors = self.vectors();
        if vectors.mode != InterruptMode::MsiX || vectors.entries.is_empty() {
            return;
        }
        self.keep_masks();
        let seen = self.space.image().placed(bar.index).unwrap_or(0) + u64::from(msix.table_offset);
        for (entry, pirq) in vectors.entries {
            self.unbind(Pirq(pirq));
            let [address, _, data, control] = self.space.image().table_entry(entry);
            let masked = control & MASKED != 0;
            if let Err(error) = self.bind(Pirq(pirq), MsiMessage { address, data }, seen, masked) {
                self.note_trouble(&error);
            }
        }
    }

    /// Notes the masks of bound vectors, which Xen took from the guest without asking us, as hardware has them.
    fn keep_masks(&mut self) {
        let Some(msix) = self.space.msix() else { return };
        for (entry, _) in self.vectors().entries {
            let at = u64::from(msix.table_offset) + bars::ENTRY * u64::from(entry) + 4 * CONTROL as u64;
            let memory = self.device.as_ref().and_then(|device| device.memory.get(&msix.table_bar));
            if let Some(memory) = memory {
                let control = memory.read(at, 4) as u32;
                self.space.image_mut().set_table_word(entry, CONTROL, control & MASKED);
            }
        }
    }

    /// What a reset makes of the table: every vector is masked.
    pub(super) fn mask_table(&mut self) {
        let entries = self.space.msix().map_or(0, |msix| msix.table_size);
        for entry in 0..entries {
            for (index, value) in [0, 0, 0, MASKED].into_iter().enumerate() {
                self.space.image_mut().set_table_word(entry, index, value);
            }
        }
    }

    /// The place of an access in the table: entry and first word. `None`: it is not in the table. `Some(None)`: it is, but in no
    /// way that the specification defines (section 7.7.2: aligned dwords and quadwords).
    fn table_place(&self, bar: &Bar, offset: u64, bytes: u8) -> Option<Option<(u16, usize)>> {
        let part = bars::table_part(bar, &self.space.msix()?)?;
        let at = offset.checked_sub(part.offset).filter(|at| *at < part.bytes)?;
        let defined = matches!(bytes, 4 | 8) && at.is_multiple_of(u64::from(bytes));
        Some(defined.then_some(((at / bars::ENTRY) as u16, (at % bars::ENTRY / 4) as usize)))
    }

    /// What the guest reads of its table; `None`: it is no part of the table.
    pub(super) fn table_read(&self, bar: &Bar, offset: u64, bytes: u8) -> Option<u64> {
        let Some((entry, index)) = self.table_place(bar, offset, bytes)? else { return Some(u64::MAX) };
        let words = self.space.image().table_entry(entry);
        let high = if bytes == 8 { words[index + 1] } else { 0 };
        Some(u64::from(words[index]) | u64::from(high) << 32)
    }

    /// The guest writes its table; `None`: it is no part of the table.
    pub(super) fn table_write(
        &mut self,
        bar: &Bar,
        offset: u64,
        bytes: u8,
        value: u64,
    ) -> Option<Result<()>> {
        let Some((entry, first)) = self.table_place(bar, offset, bytes)? else { return Some(Ok(())) };
        for (index, value) in (first..).zip([value as u32, (value >> 32) as u32]).take(usize::from(bytes) / 4)
        {
            // Of Vector Control only the mask is not reserved.
            let value = if index == CONTROL { value & MASKED } else { value };
            self.space.image_mut().set_table_word(entry, index, value);
        }
        // Pending bits are read where hardware has them, and writes of them do nothing.
        Some(self.bind_if_unmasked(entry))
    }

    fn msi_control(&mut self, control: u16) -> Result<()> {
        let active = self.vectors().mode;
        if control & legacy::MSI_ENABLE == 0 {
            return if active == InterruptMode::Msi { self.release() } else { Ok(()) };
        }
        if active == InterruptMode::Msi {
            return Ok(());
        }
        if active == InterruptMode::MsiX {
            self.keep_masks();
            self.release()?;
        }
        let Some(msi) = self.space.msi() else { return Ok(()) };
        self.begin(InterruptMode::Msi)?;
        self.bind_msi(msi)?;
        self.enable_mapped_msi()
    }

    /// The guest wrote MSI's message or mask while it is enabled.
    fn msi_written(&mut self, msi: MsiCapability, access: Access) -> Result<()> {
        let end = msi.offset + if msi.address_64 { 0x18 } else { 0x14 };
        if !(msi.offset + 4..end).contains(&access.offset()) {
            return Ok(());
        }
        self.bind_msi(msi)
    }

    fn bind_msi(&mut self, msi: MsiCapability) -> Result<()> {
        let data_at = msi.offset + if msi.address_64 { 0xc } else { 8 };
        let message = MsiMessage {
            address: self.virtual_register(msi.offset + 4, Width::Dword)?,
            data: self.virtual_register(data_at, Width::Word)?,
        };
        let pirq = self.mapped(0, MsiSource::Msi)?;
        let mut masked = false;
        if msi.maskable {
            let at = data_at + 4;
            let mask = self.virtual_register(at, Width::Dword)?;
            masked = mask & 1 != 0;
            self.bind(pirq, message, 0, masked)?;
            // Xen takes this write and combines it with its own mask.
            let access = Access::new(at.into(), 4).map_err(std::io::Error::other)?;
            return Ok(self.hardware.write(access, mask)?);
        }
        self.bind(pirq, message, 0, masked)
    }

    fn virtual_register(&self, offset: u16, width: Width) -> Result<u32> {
        let access = Access::new(offset.into(), width.bytes().into()).map_err(std::io::Error::other)?;
        Ok(self.space.read(access, self.hardware.as_ref())?)
    }
}
