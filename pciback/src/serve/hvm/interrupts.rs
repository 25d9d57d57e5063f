//! MSI and MSI-X of an HVM guest's function: the guest writes messages, Xen delivers them.
//!
//! A message is by a vector, or names a physical interrupt that the guest takes as an event ([`MsiMessage::pirq`]); that is seen from each
//! message again. A vector is mapped and bound once the guest has enabled its kind of interrupts and unmasked it. From then on Xen takes the mask
//! of an MSI-X vector itself, from the guest's write to its table, and answers reads of it; everything else of the table
//! comes to us. So the masks in the image are true for vectors that are not bound, and are read from hardware when they are
//! unbound.

use super::device::Device;
use super::numbers::{self, Use};
use super::table;
use crate::config::{
    Access, Bar, InterruptMode, MsiCapability, MsixCapability, SideEffect, VectorState, Width,
};
use crate::live;
use crate::platform::{MsiMessage, MsiSource, Pirq, Revoked};
use crate::serve::interrupts::kept;
use crate::serve::{GuestFunction, InterruptError};
use crate::spec::legacy::{self, MESSAGE_CONTROL};

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
        // One that cannot be had keeps no other from being bound.
        (0..entries).map(|entry| self.bind_entry(function, entry, false)).fold(Ok(()), Result::and)
    }

    /// Binds a vector of MSI-X that can be delivered now, with the message that the table has.
    ///
    /// One that comes by a vector can be when it is not masked. A system that names a physical interrupt takes that as an event, and masks
    /// that: it never touches the mask in the table, so that its message counts when the function is not masked as a whole.
    /// `mask_written`: the guest has written the vector's mask, just now.
    pub(super) fn bind_entry(
        &self,
        function: &mut GuestFunction,
        entry: u16,
        mask_written: bool,
    ) -> Result<()> {
        let Some(msix) = function.space.msix().filter(|_| function.vectors().mode == InterruptMode::MsiX)
        else {
            return Ok(());
        };
        let (message, masked) = table::message(function, entry);
        let wanted = message.pirq();
        let waits = match wanted {
            Some(_) => {
                let control = virtual_register(function, msix.offset + MESSAGE_CONTROL, Width::Word)?;
                control & u32::from(legacy::MSIX_FUNCTION_MASK) != 0
            }
            None => masked,
        };
        if waits {
            return Ok(());
        }
        let source = MsiSource::MsiX { entry, table: function.msix_table(&msix)? };
        let known = is_mapped(&function.vectors(), entry, wanted);
        let pirq = self.mapped(function, source, wanted)?;
        // The mask of one that is bound is Xen's, which takes it from the guest's write or from its event channel.
        let in_hardware = if known && !mask_written { self.mask_in_hardware(&msix, entry) } else { None };
        let masked = in_hardware.unwrap_or(masked);
        let table = table_in_guest(function, &msix);
        self.bind(function, source, pirq, message, table, masked)
    }

    /// The physical interrupt of a vector, mapped now where it was not: one of Xen's choice, or the one that the guest wants.
    fn mapped(&self, function: &mut GuestFunction, source: MsiSource, wanted: Option<Pirq>) -> Result<Pirq> {
        let mut vectors = function.vectors();
        let entry = source.entry();
        if is_mapped(&vectors, entry, wanted)
            && let Some(pirq) = vectors.pirq_of(entry)
        {
            return Ok(Pirq(pirq));
        }
        function.unmap(&mut vectors, entry)?;
        let Some(pirq) = wanted else { return function.map(&mut vectors, source) };
        if let Some(holder) = self.holder(function, source, pirq) {
            return Err(InterruptError::Taken { interrupt: source, address: function.address, pirq, holder });
        }
        function.map_chosen(&mut vectors, source, pirq)?;
        Ok(pirq)
    }

    /// Who has a physical interrupt, or may have it, which the guest wants for another one; in words.
    fn holder(&self, function: &GuestFunction, source: MsiSource, pirq: Pirq) -> Option<String> {
        if pirq < numbers::FIRST {
            return Some("an interrupt line's".to_owned());
        }
        let (address, what) = self.taken.numbers.holder(pirq)?;
        Some(match (what, source) {
            (Use::Line, _) => format!("the interrupt line's of {address}"),
            (Use::Entry(entry), MsiSource::MsiX { .. }) if address == function.address => {
                format!("its MSI-X entry {entry}'s")
            }
            (Use::Entry(_), _) => format!("one of {address}'s"),
        })
    }

    /// Binds a vector that is mapped; on an error it is not mapped any more, so that what is mapped is bound.
    fn bind(
        &self,
        function: &mut GuestFunction,
        source: MsiSource,
        pirq: Pirq,
        message: MsiMessage,
        table: u64,
        masked: bool,
    ) -> Result<()> {
        let bound = self.domains.bind_msi(function.domain, pirq, message, table, masked);
        let Err(first) = bound.map_err(InterruptError::from) else { return Ok(()) };
        Err(match function.unmap(&mut function.vectors(), source.entry()) {
            Ok(()) => first,
            Err(second) => InterruptError::Both { first: Box::new(first), second: Box::new(second) },
        })
    }

    /// The BAR with the table has another address in the guest: Xen must look for masks there.
    pub(super) fn table_moved(&self, function: &mut GuestFunction, bar: &Bar) {
        let Some(msix) = function.space.msix().filter(|msix| msix.table_bar == bar.index) else { return };
        let vectors = function.vectors();
        if vectors.mode != InterruptMode::MsiX || vectors.entries.is_empty() {
            return;
        }
        let seen = table_in_guest(function, &msix);
        let Ok(table) = function.msix_table(&msix) else { return };
        for (entry, pirq) in &vectors.entries {
            // Before it is unbound: what is bound again is masked, unless the flag for unmasked is passed.
            let in_hardware = self.mask_in_hardware(&msix, *entry);
            let unbound = self.domains.unbind_msi(function.domain, Pirq(*pirq));
            let was_bound = unbound.is_ok();
            if let Err(error) = Revoked::Interrupt.outcome(unbound) {
                function.note_trouble(&error);
            }
            // If a previous process was killed before binding it, it has the mask that the guest has written.
            let (message, written) = table::message(function, *entry);
            let masked = in_hardware.filter(|_| was_bound).unwrap_or(written);
            if !vectors.chosen.contains(entry) {
                table::set_mask(function, *entry, masked);
            }
            // A message that was written since, and waits for the end of its mask, is another interrupt's.
            if !is_mapped(&vectors, *entry, message.pirq()) {
                continue;
            }
            let source = MsiSource::MsiX { entry: *entry, table };
            if let Err(error) = self.bind(function, source, Pirq(*pirq), message, seen, masked) {
                function.note_trouble(&error);
            }
        }
    }

    fn msi_control(&self, function: &mut GuestFunction, control: u16) -> Result<()> {
        let active = function.vectors().mode;
        if control & legacy::MSI_ENABLE == 0 {
            return if active == InterruptMode::Msi { function.release() } else { Ok(()) };
        }
        let Some(msi) = function.space.msi() else { return Ok(()) };
        if active == InterruptMode::MsiX {
            self.keep_masks(function);
            function.release()?;
        }
        // Enabled already, it may be that a previous process was killed before all was done.
        if active != InterruptMode::Msi {
            function.begin(InterruptMode::Msi)?;
        }
        self.bind_msi(function, msi, false)?;
        function.enable_mapped_msi()
    }

    /// The guest wrote MSI's message or mask while it is enabled.
    fn msi_written(&self, function: &mut GuestFunction, msi: MsiCapability, access: Access) -> Result<()> {
        let end = msi.offset + if msi.address_64 { 0x18 } else { 0x14 };
        let data = data_register(msi);
        let reaches = access.offset() + access.width().bytes();
        if !(msi.offset + 4..end).contains(&access.offset()) {
            return Ok(());
        }
        let vectors = function.vectors();
        let wanted = msi_message(function, msi)?.pirq();
        // Half of a number names another interrupt: it counts when the data has been written, which comes last.
        if (wanted.is_some() || vectors.chosen.contains(&0)) && reaches <= data {
            return Ok(());
        }
        let anew = !is_mapped(&vectors, 0, wanted);
        self.bind_msi(function, msi, reaches > data + 4)?;
        if anew { function.enable_mapped_msi() } else { Ok(()) }
    }

    /// Binds MSI with the message in the guest's registers; `mask_written`: so is its mask, just now.
    fn bind_msi(&self, function: &mut GuestFunction, msi: MsiCapability, mask_written: bool) -> Result<()> {
        let message = msi_message(function, msi)?;
        let at = data_register(msi) + 4;
        let mask = if msi.maskable { virtual_register(function, at, Width::Dword)? } else { 0 };
        let pirq = self.mapped(function, MsiSource::Msi, message.pirq())?;
        self.bind(function, MsiSource::Msi, pirq, message, 0, mask & 1 != 0)?;
        if msi.maskable && (mask_written || message.pirq().is_none()) {
            // Xen takes this write and combines it with its own mask. It ends a mask that binding an event channel has cleared.
            let access = Access::new(at.into(), 4).map_err(std::io::Error::other)?;
            function.hardware.write(access, mask)?;
        }
        Ok(())
    }
}

/// Whether an entry has the physical interrupt that its message asks for: this one, or any of Xen's choice. What a previous process was
/// about to map may not be mapped, and Xen would not say so.
fn is_mapped(vectors: &VectorState, entry: u16, wanted: Option<Pirq>) -> bool {
    let chosen = vectors.chosen.contains(&entry);
    vectors.pending != Some(entry)
        && vectors
            .pirq_of(entry)
            .is_some_and(|pirq| wanted.map_or(!chosen, |wanted| chosen && wanted.0 == pirq))
}

/// Where the guest sees its MSI-X table.
fn table_in_guest(function: &GuestFunction, msix: &MsixCapability) -> u64 {
    let placed = function.space.image().placed(msix.table_bar);
    placed.map_or(0, |address| address + u64::from(msix.table_offset))
}

/// Where Message Data is (PCI Express 6.0, section 7.7.1).
const fn data_register(msi: MsiCapability) -> u16 {
    msi.offset + if msi.address_64 { 0xc } else { 8 }
}

fn msi_message(function: &GuestFunction, msi: MsiCapability) -> Result<MsiMessage> {
    let high = if msi.address_64 { virtual_register(function, msi.offset + 8, Width::Dword)? } else { 0 };
    Ok(MsiMessage {
        address: virtual_register(function, msi.offset + 4, Width::Dword)?,
        address_high: high,
        data: virtual_register(function, data_register(msi), Width::Word)?,
    })
}

/// What the guest reads in a register of MSI.
fn virtual_register(function: &GuestFunction, offset: u16, width: Width) -> Result<u32> {
    let access = Access::new(offset.into(), width.bytes().into()).map_err(std::io::Error::other)?;
    Ok(function.space.read(access, function.hardware.as_ref())?)
}
