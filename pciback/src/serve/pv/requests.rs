//! A PV guest's requests for one function, as pciif has them.

use super::interrupts;
use super::wire::{Command, MsixEntry, Op, OpAnswer, WireError};
use crate::config::{Access, InterruptMode, RequestRecord, RequestStage};
use crate::hash::Fnv;
use crate::serve::function::Accessed;
use crate::serve::{Demand, GuestFunction};

impl GuestFunction {
    /// Answers a request. One that a previous process had completed is answered with its recorded result.
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
            // As on a bus where no device answers: writes are lost, which the writer does not notice.
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
            self.note_trouble(&error);
            OpAnswer::failed(WireError::Failed)
        });
        (answer, None)
    }

    fn read(&mut self, op: &Op) -> (OpAnswer, Option<Demand>) {
        match Access::new(op.offset, op.size) {
            Ok(access) => answer(self.read_config(access)),
            Err(_) => (OpAnswer::failed(WireError::InvalidOffset), None),
        }
    }

    fn write(&mut self, op: &Op) -> (OpAnswer, Option<Demand>) {
        match Access::new(op.offset, op.size) {
            Ok(access) => answer(Accessed { value: op.value, ..self.write_config(access, op.value) }),
            Err(_) => (OpAnswer::failed(WireError::InvalidOffset), None),
        }
    }
}

fn answer(accessed: Accessed) -> (OpAnswer, Option<Demand>) {
    let answer =
        if accessed.failed { OpAnswer::failed(WireError::Failed) } else { OpAnswer::value(accessed.value) };
    (answer, accessed.demand)
}

/// What identifies a request across restarts of the service.
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
