//! One function as a guest uses it: its config space, its MSI and MSI-X, its reset.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::{debug, warn};
use nix::errno::Errno;

use super::attachment::Attachment;
use super::interrupts;
use super::revocation::{Revocable, Revocation};
use super::wire::{Command, MsixEntry, Op, OpAnswer, WireError};
use crate::config::{
    Access, ConfigSpace, InterruptMode, MaskedWrite, Planes, RequestRecord, RequestStage, SideEffect,
    VirtualConfigSpace,
};
use crate::hash::Fnv;
use crate::hvm::Device;
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
    /// The guest has switched bus mastering on, as drivers do when they start. Nothing is asked.
    DriverStarted,
}

/// What came of a config access.
pub(crate) struct Accessed {
    /// What was read, all ones where nobody answered; what was written.
    pub value: u32,
    /// The host could not make the access.
    pub failed: bool,
    /// What it asks of the service.
    pub demand: Option<Demand>,
    /// What a write asked for besides.
    pub effect: Option<SideEffect>,
}

impl Accessed {
    const fn value(value: u32) -> Self {
        Self { value, failed: false, demand: None, effect: None }
    }

    fn answer(self) -> (OpAnswer, Option<Demand>) {
        let answer =
            if self.failed { OpAnswer::failed(WireError::Failed) } else { OpAnswer::value(self.value) };
        (answer, self.demand)
    }
}

/// One function, served to one guest.
pub struct GuestFunction {
    pub(crate) domain: DomId,
    pub(crate) address: Sbdf,
    attachment: Attachment,
    pub(crate) space: VirtualConfigSpace,
    pub(crate) hardware: Box<dyn ConfigSpace>,
    pub(crate) revocation: Revocation,
    pub(crate) hypervisor: Arc<dyn Hypervisor>,
    /// The guest's physical interrupt for the function's line, which has the line's number; 0 where it has none.
    pub(crate) line: u32,
    /// What it is in an HVM guest; a PV guest maps and binds for itself.
    pub(crate) device: Option<Device>,
    gone: bool,
    /// The guest loses it: its INTx reaches nobody any more.
    leaving: bool,
    /// The reset under way is the host's.
    keeps_registers: bool,
    /// Why the last request failed, for whoever limits what a guest can put into the log.
    trouble: Option<String>,
    /// When it was last reported that the guest's driver has started.
    driver_started: Option<Instant>,
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
        Self {
            domain,
            address,
            attachment: Attachment::new(address),
            space,
            hardware: Box::new(Revocable::new(hardware, &revocation)),
            revocation,
            hypervisor,
            line,
            device: None,
            gone: false,
            leaving: false,
            keeps_registers: false,
            trouble: None,
            driver_started: None,
        }
    }

    /// Whether nothing of the guest's reaches it: it has left the host, or is being reset.
    pub(crate) fn is_silent(&self) -> bool {
        self.gone || self.resetting()
    }

    /// Whether its guest is about to lose it.
    pub(super) fn is_leaving(&self) -> bool {
        self.leaving
    }

    /// Notes why something failed.
    pub(crate) fn note_trouble(&mut self, why: &dyn std::fmt::Display) {
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

    /// Whether a reset of the guest's was under way when an earlier life of the service ended.
    pub fn resetting(&self) -> bool {
        self.space.image().resetting()
    }

    /// From now on every access reads all ones and no hardware is touched.
    pub fn set_gone(&mut self) {
        self.gone = true;
    }

    /// Puts another filter of the same function in force; on an error the old one stays.
    pub fn replace_filter(&mut self, planes: Arc<Planes>) -> io::Result<()> {
        if self.gone {
            return Err(io::Error::other("the function answers no more"));
        }
        self.space.replace_filter(planes, self.hardware.as_ref())
    }

    /// The host has read and cleared hardware's events.
    pub fn events_cleared(&mut self) {
        self.space.events_cleared();
    }

    /// What of the guest's writes did not reach hardware.
    pub fn masked_writes(&self) -> Vec<MaskedWrite> {
        self.space.masked_writes().iter().copied().collect()
    }

    /// Answers a request. One that an earlier life of the service had completed is answered with what came out then.
    pub fn execute(&mut self, op: &Op) -> (OpAnswer, Option<Demand>) {
        if op.command == Command::CONF_READ {
            return self.read(op);
        }
        let record = record_of(op);
        if let Some(answer) = self.answered_before(&record) {
            return (answer, None);
        }
        self.space.image_mut().begin_request(&record);
        let (answer, demand) = self.carry_out(op);
        self.space.image_mut().finish_request(answer.error.number(), answer.value);
        (answer, demand)
    }

    /// Why the last request failed, where more is known than its answer says.
    pub fn take_trouble(&mut self) -> Option<String> {
        self.trouble.take()
    }

    /// The answer was sent: the same request is a new one when it comes again.
    pub fn sent(&mut self, op: &Op) {
        if op.command != Command::CONF_READ {
            self.space.image_mut().clear_request();
        }
    }

    fn answered_before(&self, wanted: &RequestRecord) -> Option<OpAnswer> {
        let found = self.space.image().request()?;
        let RequestStage::Done { error, value } = found.stage else { return None };
        // By its claim, not by its content: the same write may come twice, and part of an answer may stand on the page.
        let place = |record: &RequestRecord| (record.info, record.command, record.offset, record.size);
        let same = wanted.info != 0 && place(&found) == place(wanted);
        // The entries of MSI-X are read back from what is mapped.
        same.then(|| OpAnswer {
            error: WireError::from_number(error),
            value,
            entries: self.mapped_entries(wanted),
        })
    }

    fn mapped_entries(&self, wanted: &RequestRecord) -> Vec<MsixEntry> {
        let vectors = self.space.image().vectors();
        if Command(wanted.command) != Command::ENABLE_MSIX || vectors.mode != InterruptMode::MsiX {
            return Vec::new();
        }
        let entries = vectors.entries.iter();
        entries.map(|&(entry, pirq)| MsixEntry { entry, vector: pirq as u16 }).collect()
    }

    fn carry_out(&mut self, op: &Op) -> (OpAnswer, Option<Demand>) {
        if self.is_silent() {
            // As on a bus where nobody answers: writes are lost, which the writer does not notice.
            let answer = match op.command {
                Command::CONF_WRITE => OpAnswer::value(op.value),
                _ => OpAnswer::failed(WireError::Failed),
            };
            return (answer, None);
        }
        let answer = match op.command {
            Command::CONF_WRITE => return self.write(op),
            Command::ENABLE_MSI => interrupts::enable_msi(self),
            Command::ENABLE_MSIX => interrupts::enable_msix(self, op),
            Command::DISABLE_MSI => interrupts::disable(self, InterruptMode::Msi),
            Command::DISABLE_MSIX => interrupts::disable(self, InterruptMode::MsiX),
            _ => return (OpAnswer::failed(WireError::NotImplemented), None),
        };
        let answer = answer.unwrap_or_else(|error| {
            self.trouble = Some(error.to_string());
            OpAnswer::failed(WireError::Failed)
        });
        (answer, None)
    }

    fn read(&mut self, op: &Op) -> (OpAnswer, Option<Demand>) {
        match Access::new(op.offset, op.size) {
            Ok(access) => self.read_config(access).answer(),
            Err(_) => (OpAnswer::failed(WireError::InvalidOffset), None),
        }
    }

    fn write(&mut self, op: &Op) -> (OpAnswer, Option<Demand>) {
        match Access::new(op.offset, op.size) {
            Ok(access) => Accessed { value: op.value, ..self.write_config(access, op.value) }.answer(),
            Err(_) => (OpAnswer::failed(WireError::InvalidOffset), None),
        }
    }

    /// What the guest reads.
    pub(crate) fn read_config(&mut self, access: Access) -> Accessed {
        if self.is_silent() {
            return Accessed::value(access.width().mask());
        }
        match self.space.read(access, self.hardware.as_ref()) {
            Ok(value) => Accessed::value(value),
            Err(error) => self.failed_access("read", access, &error),
        }
    }

    /// What the guest writes.
    pub(crate) fn write_config(&mut self, access: Access, value: u32) -> Accessed {
        let value = value & access.width().mask();
        if self.is_silent() {
            return Accessed::value(value);
        }
        if Self::is_placement(access)
            && let Err(error) = self.restore_placement()
        {
            return self.failed_access("restore BARs and decoding before a write of", access, &error);
        }
        let written = self.space.write(access, value, self.hardware.as_ref());
        if Self::is_command(access)
            && let Err(error) = self.apply_interrupt_disable()
        {
            return self.failed_access("set Interrupt Disable after a write of", access, &error);
        }
        match written {
            Ok(Some(SideEffect::FunctionLevelReset)) => {
                debug!("{}: domain {} asks for a function level reset", self.address, self.domain);
                if let Err(error) = self.begin_silence() {
                    self.note_trouble(&error);
                    return Accessed { failed: true, ..Accessed::value(value) };
                }
                Accessed { demand: Some(Demand::Reset), ..Accessed::value(value) }
            }
            Ok(Some(SideEffect::MsiControl { value: control })) => {
                let on = control & legacy::MSI_ENABLE != 0;
                self.enabled_again(InterruptMode::Msi, on);
                let effect = Some(SideEffect::MsiControl { value: control });
                Accessed { effect, ..Accessed::value(value) }
            }
            Ok(Some(SideEffect::MsixControl { value: control })) => {
                let on = control & legacy::MSIX_ENABLE != 0;
                self.enabled_again(InterruptMode::MsiX, on);
                let effect = Some(SideEffect::MsixControl { value: control });
                Accessed { effect, ..Accessed::value(value) }
            }
            Ok(Some(effect @ SideEffect::Command { changed, value: command }))
                if changed & command & COMMAND_BUS_MASTER != 0 =>
            {
                let recently = |last: Instant| last.elapsed() < DRIVER_START_INTERVAL;
                let demand = (!self.driver_started.is_some_and(recently)).then(|| {
                    self.driver_started = Some(Instant::now());
                    Demand::DriverStarted
                });
                Accessed { demand, effect: Some(effect), ..Accessed::value(value) }
            }
            Ok(effect) => Accessed { effect, ..Accessed::value(value) },
            Err(error) => self.failed_access("write", access, &error),
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

    /// A reset is about to begin: the function reads all ones, and nothing of it is mapped in an HVM guest. On an error it goes on as before.
    fn begin_silence(&mut self) -> crate::platform::Result<()> {
        self.space.image_mut().set_resetting(true);
        let Err(error) = self.unmap_bars() else { return Ok(()) };
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
    /// An error: something of it may still be mapped in an HVM guest, and it must not be reset.
    pub fn begin_reset(&mut self) -> crate::platform::Result<()> {
        self.begin_silence()?;
        self.keeps_registers = true;
        Ok(())
    }

    /// The reset that the guest asked for, or the host began, has ended well: the function answers again, with the guest's interrupts in place.
    pub fn reset_done(&mut self) -> io::Result<()> {
        let keeps_registers = std::mem::take(&mut self.keeps_registers);
        if self.device.is_some() {
            // The messages that Xen has bound went with the reset: the guest begins anew, whoever asked for it.
            return self.reset_device();
        }
        if !keeps_registers {
            self.space.reset();
        }
        // The host's reset puts Command back as it was before; for the guest it is 0.
        live::clear_bus_master(self.hardware.as_ref())?;
        self.restore_placement()?;
        interrupts::restore(self)?;
        self.space.image_mut().set_resetting(false);
        self.apply_interrupt_disable()
    }

    /// Bus mastering and INTx off.
    fn silence(&self) -> io::Result<()> {
        live::clear_bus_master(self.hardware.as_ref())?;
        // Hardware without a pin need not have the bit.
        live::set_intx(self.hardware.as_ref(), Switch::Off).map(drop)
    }

    /// Makes the function harmless before the guest loses it: bus mastering off, interrupts off and unmapped.
    pub fn quiesce(&mut self) -> Result<(), interrupts::InterruptError> {
        self.leaving = true;
        // While it is being reset nothing reaches it, and what the guest set is gone; the reset that detach ends with counts.
        let quiet = if self.is_silent() { Ok(()) } else { self.silence() };
        let released = quiet.map_err(Into::into).and_then(|()| interrupts::release_all(self));
        let left = self.leave_guest();
        released.and(left)
    }
}

/// What identifies a request across lives of the service.
fn record_of(op: &Op) -> RequestRecord {
    let mut hash = Fnv::new();
    if op.command == Command::ENABLE_MSIX {
        for entry in &op.entries {
            hash.add(entry.entry.into());
        }
    }
    RequestRecord {
        command: op.command.0,
        offset: op.offset,
        size: op.size,
        value: op.value,
        info: op.info,
        entries_hash: hash.finish(),
        stage: RequestStage::Begun,
    }
}
