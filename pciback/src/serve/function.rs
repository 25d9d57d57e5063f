//! One function as a guest uses it: its config space, its MSI and MSI-X, its reset.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::{debug, warn};
use nix::errno::Errno;

use super::attachment::Attachment;
use super::device::{GuestDevice, Unplaced};
use super::guest_vfs::VfRequests;
use super::interrupts;
use super::mailbox::FunctionMailbox;
use super::revocation::{Revocable, Revocation};
use crate::config::{
    Access, ConfigSpace, Filter, InterruptMode, MaskedWrite, SideEffect, VirtualConfigSpace,
};
use crate::fault::{Conversation, Heard};
use crate::live::{self, Switch};
use crate::platform::Hypervisor;
use crate::spec::header::COMMAND_BUS_MASTER;
use crate::spec::legacy;
use crate::{DomId, Sbdf};

/// What the guest's request asks of the service beyond its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Demand {
    /// The guest asked for a function level reset; until it has ended the function reads all ones.
    Reset,
    /// The function no longer answers.
    Vanished,
    /// The guest has changed VF Enable of its PF.
    Vfs,
    /// The guest has sent a message to another function.
    Message,
    /// The guest has switched bus mastering on, as drivers do when they start. Nothing is asked.
    DriverStarted,
}

/// What came of a config access.
pub(super) struct Accessed {
    /// What was read, all ones where no device answered; what was written.
    pub value: u32,
    /// The host could not make the access.
    pub failed: bool,
    /// What it asks of the service.
    pub demand: Option<Demand>,
}

/// Why a write was not carried out.
struct Unwritten {
    what: &'static str,
    error: io::Error,
}

impl Accessed {
    const fn value(value: u32) -> Self {
        Self { value, failed: false, demand: None }
    }
}

/// One function, served to one guest.
pub struct GuestFunction {
    pub(super) domain: DomId,
    pub(super) address: Sbdf,
    attachment: Attachment,
    pub(super) space: VirtualConfigSpace,
    pub(super) hardware: Box<dyn ConfigSpace>,
    pub(super) revocation: Revocation,
    pub(super) hypervisor: Arc<dyn Hypervisor>,
    /// The guest's physical interrupt for the function's line, which has the line's number; 0 where it has none.
    pub(super) line: u32,
    device: Arc<dyn GuestDevice>,
    gone: bool,
    /// The guest loses it, or has left its ring: until it is served again its INTx is not delivered.
    leaving: bool,
    /// The reset under way is the host's.
    keeps_registers: bool,
    /// Why the last request failed, for the code that limits what a guest can put into the log.
    trouble: Option<String>,
    /// When it was last reported that the guest's driver has started.
    driver_started: Option<Instant>,
    /// The VFs that the guest creates.
    pub(super) vfs: VfRequests,
    /// Its mailbox, if it has one.
    pub(super) mailbox: Option<FunctionMailbox>,
}

/// A guest that switches bus mastering on again and again has its driver started once in this time.
const DRIVER_START_INTERVAL: Duration = Duration::from_secs(1);

impl GuestFunction {
    /// A function with its virtual and its physical config space, and its interrupt line (the GSI; 0 for none).
    pub fn new(
        domain: DomId,
        address: Sbdf,
        space: VirtualConfigSpace,
        hardware: Box<dyn ConfigSpace>,
        hypervisor: Arc<dyn Hypervisor>,
        line: u32,
    ) -> Self {
        let revocation = Revocation::default();
        // The reset that a killed process had under way was the host's, if the guest's driver had answered that it needs one.
        let conversation = Conversation::from_word(space.image().conversation());
        let is_answered = |conversation: Conversation| matches!(conversation.heard, Heard::Answer(_));
        let keeps_registers = space.image().resetting() && conversation.is_some_and(is_answered);
        let function = Self {
            domain,
            address,
            attachment: Attachment::new(address),
            space,
            hardware: Box::new(Revocable::new(hardware, &revocation)),
            revocation,
            hypervisor,
            line,
            device: Arc::new(Unplaced),
            gone: false,
            leaving: false,
            keeps_registers,
            trouble: None,
            driver_started: None,
            vfs: VfRequests::default(),
            mailbox: None,
        };
        if function.has_vfs() {
            // Of an earlier process of the service.
            function.ask_for_vfs();
        }
        function
    }

    /// Whether nothing of the guest's reaches it: it has left the host, or is being reset.
    pub(super) fn is_silent(&self) -> bool {
        self.gone || self.resetting()
    }

    /// Whether its guest is about to lose it.
    pub(super) fn is_leaving(&self) -> bool {
        self.leaving
    }

    /// A thread serves it from now on. A guest that has left its ring and comes back starts its driver, which switches INTx on by its
    /// next write of Command.
    pub(super) fn begin_service(&mut self) {
        self.leaving = false;
    }

    /// Notes why something failed.
    pub(super) fn note_trouble(&mut self, why: &dyn std::fmt::Display) {
        self.trouble = Some(why.to_string());
    }

    /// Which attachment of the function this is.
    pub fn attachment(&self) -> Attachment {
        self.attachment
    }

    /// Where it is on the host.
    pub fn address(&self) -> Sbdf {
        self.address
    }

    /// Whether a reset of the guest's was under way when a previous process of the service ended.
    pub fn resetting(&self) -> bool {
        self.space.image().resetting()
    }

    /// The conversation with the guest's driver about an error, as it was noted last.
    pub fn conversation(&self) -> Option<Conversation> {
        Conversation::from_word(self.space.image().conversation())
    }

    /// Notes how far the conversation has come, or that it has ended.
    pub fn note_conversation(&mut self, conversation: Option<Conversation>) {
        let note = conversation.map_or(0, |conversation| conversation.to_word());
        self.space.image_mut().set_conversation(note);
    }

    /// From now on every access reads all ones and no hardware is touched.
    pub fn set_gone(&mut self) {
        self.gone = true;
    }

    /// Puts another filter of the same function in force; on an error the old one stays.
    pub fn replace_filter(&mut self, filter: Arc<Filter>) -> io::Result<()> {
        if self.gone {
            return Err(io::Error::other("the function answers no more"));
        }
        self.space.replace_filter(filter, self.hardware.as_ref())?;
        self.show_mailbox();
        Ok(())
    }

    /// The host has read and cleared hardware's events.
    pub fn events_cleared(&mut self) {
        self.space.events_cleared();
    }

    /// Says what the service has placed of it in its guest, or places now.
    pub(super) fn set_device(&mut self, device: Arc<dyn GuestDevice>) {
        self.device = device;
    }

    /// What the service has placed of it in its guest.
    pub(super) fn device(&self) -> Arc<dyn GuestDevice> {
        Arc::clone(&self.device)
    }

    /// What of the guest's writes did not reach hardware.
    pub fn masked_writes(&self) -> Vec<MaskedWrite> {
        self.space.masked_writes().iter().copied().collect()
    }

    /// Why the last request failed, where more is known than its answer says.
    pub fn take_trouble(&mut self) -> Option<String> {
        self.trouble.take()
    }

    /// What the guest reads.
    pub(super) fn read_config(&mut self, access: Access) -> Accessed {
        if self.is_silent() {
            return Accessed::value(access.width().mask());
        }
        match self.space.read(access, self.hardware.as_ref()) {
            Ok(value) => Accessed::value(value),
            Err(error) => self.failed_access("read", access, &error),
        }
    }

    /// What the guest writes, and what follows from it.
    pub(super) fn write_config(&mut self, access: Access, value: u32) -> Accessed {
        let value = value & access.width().mask();
        if self.is_silent() {
            return Accessed::value(value);
        }
        let (accessed, effect) = match self.write_registers(access, value) {
            Ok(effect) => (self.take_effect(value, effect), effect),
            Err(Unwritten { what, error }) => (self.failed_access(what, access, &error), None),
        };
        if !self.is_silent()
            && let Err(error) = self.device().config_written(self, access, effect)
        {
            self.note_trouble(&error);
        }
        accessed
    }

    fn write_registers(&mut self, access: Access, value: u32) -> Result<Option<SideEffect>, Unwritten> {
        let failed = |what| move |error| Unwritten { what, error };
        if Self::is_placement(access) {
            let restored = self.restore_placement();
            restored.map_err(failed("restore BARs and decoding before a write of"))?;
        }
        let written = self.space.write(access, value, self.hardware.as_ref());
        if Self::is_command(access) {
            let applied = self.apply_interrupt_disable();
            applied.map_err(failed("set Interrupt Disable after a write of"))?;
        }
        written.map_err(failed("write"))
    }

    /// What a write of a value means for the function itself and for the service.
    fn take_effect(&mut self, value: u32, effect: Option<SideEffect>) -> Accessed {
        let mut accessed = Accessed::value(value);
        match effect {
            // A reset of the PF would take the VFs from their guests: it is only the guest's view that is reset.
            Some(SideEffect::FunctionLevelReset) if self.has_vfs() => {
                if let Err(error) = self.reset_done() {
                    self.note_trouble(&error);
                    accessed.failed = true;
                }
            }
            Some(SideEffect::VfEnable) if self.ask_for_vfs() => accessed.demand = Some(Demand::Vfs),
            Some(SideEffect::DataObject { offset, value, mask }) => {
                accessed.demand = self.write_mailbox(offset, value, mask).then_some(Demand::Message);
            }
            Some(SideEffect::FunctionLevelReset) => {
                debug!("{}: domain {} asks for a function level reset", self.address, self.domain);
                match self.begin_silence() {
                    Ok(()) => accessed.demand = Some(Demand::Reset),
                    Err(error) => {
                        self.note_trouble(&error);
                        accessed.failed = true;
                    }
                }
            }
            Some(SideEffect::MsiControl { value: control }) => {
                self.enabled_again(InterruptMode::Msi, control & legacy::MSI_ENABLE != 0);
            }
            Some(SideEffect::MsixControl { value: control }) => {
                self.enabled_again(InterruptMode::MsiX, control & legacy::MSIX_ENABLE != 0);
            }
            Some(SideEffect::VpdRead { register, address }) => self.read_vpd(register, address),
            Some(SideEffect::Command { changed, value: command })
                if changed & command & COMMAND_BUS_MASTER != 0 =>
            {
                let recently = |last: Instant| last.elapsed() < DRIVER_START_INTERVAL;
                if !self.driver_started.is_some_and(recently) {
                    self.driver_started = Some(Instant::now());
                    accessed.demand = Some(Demand::DriverStarted);
                }
            }
            _ => {}
        }
        accessed
    }

    /// Reads VPD for the guest. Where that fails the flag stays 0, as on a card that does not answer.
    fn read_vpd(&mut self, register: u16, address: u16) {
        match self.hardware.read_vpd(address) {
            Ok(data) => self.space.show_vpd(register, data.unwrap_or(u32::MAX)),
            Err(error) => self.note_trouble(&format!("read VPD at {address:#x}: {error}")),
        }
    }

    /// The guest has written an Enable bit as 1, which may be so already.
    fn enabled_again(&mut self, mode: InterruptMode, on: bool) {
        if on
            && self.vectors().mode == mode
            && let Err(error) = self.assert_enable(mode)
        {
            self.note_trouble(&error);
        }
    }

    /// A reset is about to begin: the function reads all ones, and nothing of it is mapped in its guest. On error it continues as before.
    fn begin_silence(&mut self) -> crate::platform::Result<()> {
        self.space.image_mut().set_resetting(true);
        let Err(error) = self.device().unmap_bars(self) else { return Ok(()) };
        self.space.image_mut().set_resetting(false);
        Err(error)
    }

    /// An access that the host could not make: the function has left it, or the host is in trouble.
    fn failed_access(&mut self, what: &str, access: Access, error: &io::Error) -> Accessed {
        let bytes = access.width().bytes();
        warn!(
            "{}: {what} {bytes} bytes at {:#x} for domain {}: {error}",
            self.address,
            access.offset(),
            self.domain
        );
        let value = access.width().mask();
        if matches!(
            error.raw_os_error().map(Errno::from_raw),
            Some(Errno::ENODEV | Errno::ENXIO | Errno::ENOENT)
        ) {
            self.gone = true;
            return Accessed { demand: Some(Demand::Vanished), ..Accessed::value(value) };
        }
        Accessed { failed: true, ..Accessed::value(value) }
    }

    /// The host is about to reset it for an error: until [`Self::reset_done`] it reads all ones. What the guest wrote stays, as
    /// when Linux restores config space for a driver: only a reset that the guest asks for takes that.
    /// An error: something of it may still be mapped in its guest, and it must not be reset.
    pub fn begin_reset(&mut self) -> crate::platform::Result<()> {
        self.begin_silence()?;
        self.keeps_registers = true;
        Ok(())
    }

    /// The reset that the guest asked for, or the host began, has ended well: the function answers again, with the guest's interrupts in place.
    pub fn reset_done(&mut self) -> io::Result<()> {
        let keeps_registers = std::mem::take(&mut self.keeps_registers);
        let device = self.device();
        let begins_anew = device.begins_anew_after_reset();
        if begins_anew {
            interrupts::release_all(self).map_err(io::Error::other)?;
        }
        if begins_anew || !keeps_registers {
            self.space.reset();
            self.reset_mailbox();
        }
        // The host's reset puts Command and the ROM's Enable back as they were before; for the guest they are 0.
        live::clear_bus_master(self.hardware.as_ref())?;
        live::disable_rom(self.hardware.as_ref())?;
        self.restore_placement()?;
        device.reset(self)?;
        self.space.image_mut().set_resetting(false);
        self.apply_interrupt_disable()?;
        device.place_bars(self).map_err(io::Error::other)
    }

    /// Bus mastering, the decoder of the expansion ROM and INTx off.
    fn silence(&self) -> io::Result<()> {
        live::clear_bus_master(self.hardware.as_ref())?;
        live::disable_rom(self.hardware.as_ref())?;
        // Hardware without a pin need not have the bit.
        live::set_intx(self.hardware.as_ref(), Switch::Off).map(drop)
    }

    /// Makes the function harmless before the guest loses it: bus mastering off, interrupts off and unmapped.
    pub fn quiesce(&mut self) -> Result<(), interrupts::InterruptError> {
        self.leaving = true;
        self.note_conversation(None);
        self.reset_mailbox();
        // While it is being reset nothing reaches it, and what the guest set is gone; the reset that detach ends with counts.
        let quiet = if self.is_silent() { Ok(()) } else { self.silence() };
        let released = quiet.map_err(Into::into).and_then(|()| interrupts::release_all(self));
        let left = self.device().leave(self);
        released.and(left)
    }
}
