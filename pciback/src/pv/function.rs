//! One function as a guest uses it: its config space, its MSI and MSI-X, its reset.

use std::io;
use std::sync::Arc;

use log::{debug, warn};
use nix::errno::Errno;

use super::interrupts;
use super::wire::{Command, MsixEntry, Op, OpAnswer, WireError};
use crate::config::{
    Access, ConfigSpace, InterruptMode, MaskedWrite, Planes, RequestRecord, RequestStage, SideEffect,
    VirtualConfigSpace, Width,
};
use crate::hash::Fnv;
use crate::platform::Hypervisor;
use crate::spec::header::COMMAND_BUS_MASTER;
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

/// One function, served to one guest.
pub struct GuestFunction {
    pub(super) domain: DomId,
    pub(super) address: Sbdf,
    pub(super) space: VirtualConfigSpace,
    pub(super) hardware: Box<dyn ConfigSpace>,
    pub(super) hypervisor: Arc<dyn Hypervisor>,
    /// The guest's physical interrupt for the function's line, which has the line's number; 0 where it has none.
    pub(super) line: u32,
    gone: bool,
    /// The reset under way is the host's.
    keeps_registers: bool,
    /// Why the last request failed, for whoever limits what a guest can put into the log.
    trouble: Option<String>,
}

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
        Self {
            domain,
            address,
            space,
            hardware,
            hypervisor,
            line,
            gone: false,
            keeps_registers: false,
            trouble: None,
        }
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
        if self.gone || self.resetting() {
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
        let access = match Access::new(op.offset, op.size) {
            Ok(access) => access,
            Err(_) => return (OpAnswer::failed(WireError::InvalidOffset), None),
        };
        if self.gone || self.resetting() {
            return (OpAnswer::value(access.width().mask()), None);
        }
        match self.space.read(access, self.hardware.as_ref()) {
            Ok(value) => (OpAnswer::value(value), None),
            Err(error) => self.failed_access("read", access, &error, OpAnswer::value(access.width().mask())),
        }
    }

    fn write(&mut self, op: &Op) -> (OpAnswer, Option<Demand>) {
        let access = match Access::new(op.offset, op.size) {
            Ok(access) => access,
            Err(_) => return (OpAnswer::failed(WireError::InvalidOffset), None),
        };
        match self.space.write(access, op.value & access.width().mask(), self.hardware.as_ref()) {
            Ok(Some(SideEffect::FunctionLevelReset)) => {
                debug!("{}: domain {} asks for a function level reset", self.address, self.domain);
                self.space.image_mut().set_resetting(true);
                (OpAnswer::value(op.value), Some(Demand::Reset))
            }
            Ok(Some(SideEffect::Command { changed, value })) if changed & value & COMMAND_BUS_MASTER != 0 => {
                (OpAnswer::value(op.value), Some(Demand::DriverStarted))
            }
            Ok(_) => (OpAnswer::value(op.value), None),
            Err(error) => self.failed_access("write", access, &error, OpAnswer::value(op.value)),
        }
    }

    /// An access that the host could not make: the function has left it, or the host is in trouble.
    fn failed_access(
        &mut self,
        what: &str,
        access: Access,
        error: &io::Error,
        answer: OpAnswer,
    ) -> (OpAnswer, Option<Demand>) {
        let bytes = access.width().bytes();
        warn!(
            "{}: {what} {bytes} bytes at {:#x} for domain {}: {error}",
            self.address,
            access.offset(),
            self.domain
        );
        if matches!(
            error.raw_os_error().map(Errno::from_raw),
            Some(Errno::ENODEV | Errno::ENXIO | Errno::ENOENT)
        ) {
            self.gone = true;
            return (answer, Some(Demand::Vanished));
        }
        (OpAnswer::failed(WireError::Failed), None)
    }

    /// The host is about to reset it for an error: until [`Self::reset_done`] it reads all ones. What the guest wrote stays, as
    /// when Linux restores config space for a driver: only a reset that the guest asks for takes that.
    pub fn begin_reset(&mut self) {
        self.keeps_registers = true;
        self.space.image_mut().set_resetting(true);
    }

    /// The reset that the guest asked for, or the host began, has ended well: the function answers again, with the guest's interrupts in place.
    pub fn reset_done(&mut self) -> io::Result<()> {
        if !std::mem::take(&mut self.keeps_registers) {
            self.space.reset();
        }
        // The host's reset puts Command back as it was before; for the guest it is 0.
        interrupts::clear_bus_master(self).map_err(io::Error::other)?;
        interrupts::restore(self)?;
        self.space.image_mut().set_resetting(false);
        Ok(())
    }

    /// Makes the function harmless before the guest loses it: bus mastering off, interrupts off and unmapped.
    pub fn quiesce(&mut self) -> Result<(), interrupts::InterruptError> {
        // While it is being reset nothing reaches it, and what the guest set is gone; the reset that detach ends with counts.
        if !self.gone && !self.resetting() {
            interrupts::clear_bus_master(self)?;
        }
        interrupts::release_all(self)
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

/// The two-byte access to a register, as Xen wants it for Message Control.
pub(super) fn word(offset: u16) -> io::Result<Access> {
    Access::new(u32::from(offset), u32::from(Width::Word.bytes())).map_err(io::Error::other)
}
