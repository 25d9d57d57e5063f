//! MSI and MSI-X of an HVM guest's function: the guest writes messages, Xen delivers them.
//!
//! A vector is mapped and bound when the guest has enabled its kind of interrupts and unmasked it. From then on Xen takes the mask
//! of an MSI-X vector itself, from the guest's write to its table, and answers reads of it; everything else of the table
//! comes to us. So the masks in the image are true for vectors that are not bound, and are read from hardware when they are
//! unbound.

use super::device::Device;
use super::table::MASKED;
use crate::config::{Access, Bar, InterruptMode, MsiCapability, SideEffect, Width};
use crate::live;
use crate::platform::{MsiMessage, MsiSource, Pirq};
use crate::serve::device::GuestDevice;
use crate::serve::interrupts::kept;
use crate::serve::{GuestFunction, InterruptError};
use crate::spec::legacy;

type Result<T> = std::result::Result<T, InterruptError>;

impl Device {
    /// What a write to config space means for interrupts.
    pub(super) fn config_interrupts(
        &self,
        function: &mut GuestFunction,
        access: Access,
        effect: Option<SideEffect>,
    ) -> Result<()> {
        match effect {
            Some(SideEffect::MsixControl { value }) => self.msix_control(function, value),
            Some(SideEffect::MsiControl { value }) => self.msi_control(function, value),
            _ => match function.space.msi() {
                Some(msi) if function.vectors().mode == InterruptMode::Msi => {
                    self.msi_written(function, msi, access)
                }
                _ => Ok(()),
            },
        }
    }

    fn msix_control(&self, function: &mut GuestFunction, control: u16) -> Result<()> {
        let active = function.vectors().mode;
        if control & legacy::MSIX_ENABLE == 0 {
            if active == InterruptMode::MsiX {
                self.keep_masks(function);
                function.release()?;
            }
            return Ok(());
        }
        if active != InterruptMode::MsiX {
            if active == InterruptMode::Msi {
                function.release()?;
            }
            function.begin(InterruptMode::MsiX)?;
        }
        // Xen keeps this bit for the guest, and combines it with its own.
        let mask = control & legacy::MSIX_FUNCTION_MASK;
        let capability = function.capability_of(InterruptMode::MsiX)?;
        let register = live::message_control(capability).map_err(std::io::Error::other)?;
        let bits = legacy::MSIX_FUNCTION_MASK.into();
        kept(capability, live::rewrite(function.hardware.as_ref(), register, bits, mask.into())?)?;
        let entries = function.space.msix().map_or(0, |msix| msix.table_size);
        (0..entries).try_for_each(|entry| self.bind_if_unmasked(function, entry))
    }

    pub(super) fn bind_if_unmasked(&self, function: &mut GuestFunction, entry: u16) -> Result<()> {
        let [address, _, data, control] = function.space.image().table_entry(entry);
        if control & MASKED != 0 || function.vectors().mode != InterruptMode::MsiX {
            return Ok(());
        }
        let Some(msix) = function.space.msix() else { return Ok(()) };
        let table = function.msix_table(&msix)?;
        let pirq = self.mapped(function, entry, MsiSource::MsiX { entry, table })?;
        let seen = function.space.image().placed(msix.table_bar);
        let seen = seen.map_or(0, |address| address + u64::from(msix.table_offset));
        self.bind(function, pirq, MsiMessage { address, data }, seen, false)
    }

    /// The physical interrupt of a vector, mapped now where it was not.
    fn mapped(&self, function: &mut GuestFunction, entry: u16, source: MsiSource) -> Result<Pirq> {
        let mut vectors = function.vectors();
        let known = |entries: &[(u16, u32)]| {
            entries.iter().find(|(known, _)| *known == entry).map(|(_, pirq)| Pirq(*pirq))
        };
        if let Some(pirq) = known(&vectors.entries) {
            return Ok(pirq);
        }
        function.map(&mut vectors, source)?;
        known(&vectors.entries).ok_or(InterruptError::Entries("not mapped"))
    }

    fn bind(
        &self,
        function: &GuestFunction,
        pirq: Pirq,
        message: MsiMessage,
        table: u64,
        masked: bool,
    ) -> Result<()> {
        Ok(self.domains.bind_msi(function.domain, pirq, message, table, masked)?)
    }

    /// The BAR with the table has another address in the guest: Xen must look for masks there.
    pub(super) fn table_moved(&self, function: &mut GuestFunction, bar: &Bar) {
        let Some(msix) = function.space.msix().filter(|msix| msix.table_bar == bar.index) else { return };
        let vectors = function.vectors();
        if vectors.mode != InterruptMode::MsiX || vectors.entries.is_empty() {
            return;
        }
        self.keep_masks(function);
        let seen = function.space.image().placed(bar.index).unwrap_or(0) + u64::from(msix.table_offset);
        for (entry, pirq) in vectors.entries {
            self.unbind(function, Pirq(pirq));
            let [address, _, data, control] = function.space.image().table_entry(entry);
            let masked = control & MASKED != 0;
            if let Err(error) = self.bind(function, Pirq(pirq), MsiMessage { address, data }, seen, masked) {
                function.note_trouble(&error);
            }
        }
    }

    fn msi_control(&self, function: &mut GuestFunction, control: u16) -> Result<()> {
        let active = function.vectors().mode;
        if control & legacy::MSI_ENABLE == 0 {
            return if active == InterruptMode::Msi { function.release() } else { Ok(()) };
        }
        if active == InterruptMode::Msi {
            return Ok(());
        }
        if active == InterruptMode::MsiX {
            self.keep_masks(function);
            function.release()?;
        }
        let Some(msi) = function.space.msi() else { return Ok(()) };
        function.begin(InterruptMode::Msi)?;
        self.bind_msi(function, msi)?;
        function.enable_mapped_msi()
    }

    /// The guest wrote MSI's message or mask while it is enabled.
    fn msi_written(&self, function: &mut GuestFunction, msi: MsiCapability, access: Access) -> Result<()> {
        let end = msi.offset + if msi.address_64 { 0x18 } else { 0x14 };
        if !(msi.offset + 4..end).contains(&access.offset()) {
            return Ok(());
        }
        self.bind_msi(function, msi)
    }

    fn bind_msi(&self, function: &mut GuestFunction, msi: MsiCapability) -> Result<()> {
        let data_at = msi.offset + if msi.address_64 { 0xc } else { 8 };
        let message = MsiMessage {
            address: virtual_register(function, msi.offset + 4, Width::Dword)?,
            data: virtual_register(function, data_at, Width::Word)?,
        };
        let pirq = self.mapped(function, 0, MsiSource::Msi)?;
        let mut masked = false;
        if msi.maskable {
            let at = data_at + 4;
            let mask = virtual_register(function, at, Width::Dword)?;
            masked = mask & 1 != 0;
            self.bind(function, pirq, message, 0, masked)?;
            // Xen takes this write and combines it with its own mask.
            let access = Access::new(at.into(), 4).map_err(std::io::Error::other)?;
            return Ok(function.hardware.write(access, mask)?);
        }
        self.bind(function, pirq, message, 0, masked)
    }
}

/// What the guest reads in a register of MSI.
fn virtual_register(function: &GuestFunction, offset: u16, width: Width) -> Result<u32> {
    let access = Access::new(offset.into(), width.bytes().into()).map_err(std::io::Error::other)?;
    Ok(function.space.read(access, function.hardware.as_ref())?)
}
