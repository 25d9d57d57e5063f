//! The functions of the guest's device model in the window to config space.
//!
//! At ports CF8 and CFC, Xen sends each access to whoever has the function. The window is this service's as a whole: what the guest does there
//! to a function of the device model's is passed on to that, another process, over some messages. The thread waits for it, and obeys no
//! orders meanwhile: so each access has a limit, and after a failure nothing is asked for a while.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::wire;
use crate::config::{Access, CONVENTIONAL_SIZE};
use crate::platform::{DeviceModels, Result};
use crate::{Devfn, DeviceNumber, DomId};

/// How long an access may take: half of the time after which a thread that does not obey counts as stuck.
const LIMIT: Duration = Duration::from_secs(1);
/// How long a device model that has failed is not asked again.
const REST: Duration = Duration::from_secs(5);
/// How old the list of functions may be. A guest that looks for functions reads all 256 at once, and few of them exist; one that is told
/// of a new device must find it.
const LIST_AGE: Duration = Duration::from_millis(100);

/// Functions of one guest's device model.
pub(super) struct Emulated {
    domain: DomId,
    models: Arc<dyn DeviceModels>,
    /// The functions that it has, and since when that is known.
    functions: Option<(Instant, Vec<Devfn>)>,
    rests_until: Option<Instant>,
}

impl Emulated {
    pub fn new(domain: DomId, models: Arc<dyn DeviceModels>) -> Self {
        Self { domain, models, functions: None, rests_until: None }
    }

    /// Carries out an access of up to eight bytes, of any alignment; what is read, and what went wrong. Where nothing answers, all ones are
    /// read: behind the first 256 bytes, which are all that there is of these functions, and while the device model rests.
    pub fn access(
        &mut self,
        function: Devfn,
        offset: u16,
        bytes: u8,
        write: Option<u64>,
    ) -> (u64, Option<String>) {
        let begun = Instant::now();
        if offset >= CONVENTIONAL_SIZE || self.rests_until.is_some_and(|until| begun < until) {
            return (u64::MAX, None);
        }
        match self.pass_on(function, offset, bytes, write, begun + LIMIT) {
            Ok(value) => (value, None),
            Err(error) => {
                self.rests_until = Some(Instant::now() + REST);
                let trouble = format!("{error}; its functions read all ones in the window for {REST:?}");
                (u64::MAX, Some(trouble))
            }
        }
    }

    /// Whether the guest has ejected the device, which it was asked to release.
    pub fn has_ejected(&mut self, slot: DeviceNumber) -> bool {
        if self.rests_until.is_some_and(|until| Instant::now() < until) {
            return false;
        }
        self.models.has_ejected(self.domain, slot, LIMIT).unwrap_or_else(|_| {
            self.rests_until = Some(Instant::now() + REST);
            false
        })
    }

    fn pass_on(
        &mut self,
        function: Devfn,
        offset: u16,
        bytes: u8,
        write: Option<u64>,
        until: Instant,
    ) -> Result<u64> {
        let left = || until.saturating_duration_since(Instant::now());
        if !self.has(function, left())? {
            return Ok(u64::MAX);
        }
        let mut value = u64::MAX;
        let there = |access: &Access| access.offset() < CONVENTIONAL_SIZE;
        for (access, distance) in wire::pieces(offset, bytes).filter(|(access, _)| there(access)) {
            let shift = 8 * u32::from(distance);
            let mask = access.width().mask();
            match write {
                Some(value) => {
                    let piece = (value >> shift) as u32 & mask;
                    self.models.write_config(self.domain, function, access, piece, left())?;
                }
                None => {
                    let piece = self.models.read_config(self.domain, function, access, left())?;
                    value = value & !(u64::from(mask) << shift) | u64::from(piece & mask) << shift;
                }
            }
        }
        Ok(value)
    }

    /// Whether the device model has this function. A placeholder does not count: it is there for a function of this service's, and nobody
    /// may reach it.
    fn has(&mut self, function: Devfn, limit: Duration) -> Result<bool> {
        if let Some((since, functions)) = &self.functions
            && since.elapsed() < LIST_AGE
        {
            return Ok(functions.contains(&function));
        }
        let functions = self.models.functions(self.domain, limit)?;
        let found = functions.contains(&function);
        self.functions = Some((Instant::now(), functions));
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::DeviceNumber;
    use crate::platform::{Cause, PlatformError};

    const DOMAIN: DomId = DomId(5);
    const HOST_BRIDGE: Devfn = Devfn(0);
    const ABSENT: Devfn = Devfn(0x18);

    /// A device model with a host bridge, and what it was asked.
    #[derive(Default)]
    struct Model {
        asked: Mutex<Vec<String>>,
        /// It never answers: no time passes in this test, but the caller's limit counts as over.
        silent: Mutex<bool>,
    }

    impl Model {
        fn ask<T>(&self, what: String, limit: Duration, answer: T) -> Result<T> {
            assert!(limit <= LIMIT, "{limit:?}");
            self.asked.lock().unwrap().push(what);
            match *self.silent.lock().unwrap() {
                true => Err(PlatformError::new("ask the device model of", DOMAIN, Cause::TimedOut(limit))),
                false => Ok(answer),
            }
        }

        fn asked(&self) -> Vec<String> {
            std::mem::take(&mut self.asked.lock().unwrap())
        }
    }

    impl DeviceModels for Model {
        fn slots(&self, _: DomId) -> Result<Vec<DeviceNumber>> {
            panic!("an access asks for functions")
        }
        fn announce(&self, _: DomId, _: DeviceNumber) -> Result<()> {
            panic!("an access announces nothing")
        }
        fn request_eject(&self, _: DomId, _: DeviceNumber, _: Duration) -> Result<bool> {
            panic!("an access ejects nothing")
        }
        fn has_ejected(&self, _: DomId, slot: DeviceNumber, limit: Duration) -> Result<bool> {
            self.ask(format!("ejected {slot:x}"), limit, true)
        }
        fn forget(&self, _: DomId, _: DeviceNumber) {
            panic!("an access forgets nothing")
        }
        fn eject(&self, _: DomId, _: DeviceNumber) -> Result<()> {
            panic!("an access ejects nothing")
        }
        fn functions(&self, _: DomId, limit: Duration) -> Result<Vec<Devfn>> {
            self.ask("functions".to_owned(), limit, vec![HOST_BRIDGE])
        }
        /// Each byte is its offset.
        fn read_config(&self, _: DomId, function: Devfn, access: Access, limit: Duration) -> Result<u32> {
            let at = u32::from(access.offset());
            let value = (at | (at + 1) << 8 | (at + 2) << 16 | (at + 3) << 24) & access.width().mask();
            self.ask(format!("read {function} {at:x}/{}", access.width().bytes()), limit, value)
        }
        fn write_config(
            &self,
            _: DomId,
            function: Devfn,
            access: Access,
            value: u32,
            limit: Duration,
        ) -> Result<()> {
            let (at, bytes) = (access.offset(), access.width().bytes());
            self.ask(format!("write {function} {at:x}/{bytes} {value:x}"), limit, ())
        }
    }

    fn emulated() -> (Arc<Model>, Emulated) {
        let model = Arc::new(Model::default());
        let models = Arc::clone(&model) as Arc<dyn DeviceModels>;
        let mut emulated = Emulated::new(DOMAIN, models);
        // What is tested does not depend on how fast the machine is.
        emulated.functions = Some((Instant::now() + Duration::from_secs(3600), vec![HOST_BRIDGE]));
        (model, emulated)
    }

    #[test]
    fn a_read_of_any_alignment_is_made_of_what_the_device_model_answers() {
        for (offset, bytes, value) in [
            (0x10, 4, 0x1312_1110),
            (0x11, 4, 0x1413_1211),
            (0x13, 1, 0x13),
            (0x10, 8, 0x1716_1514_1312_1110),
        ] {
            let (model, mut emulated) = emulated();
            let (read, trouble) = emulated.access(HOST_BRIDGE, offset, bytes, None);
            let mask = u64::MAX >> (64 - 8 * u32::from(bytes));
            assert_eq!((read & mask, trouble), (value, None), "{offset:x}/{bytes}");
            assert!(model.asked().iter().all(|asked| asked.starts_with("read 00.0")));
        }
    }

    #[test]
    fn a_write_is_passed_on_in_aligned_pieces() {
        let (model, mut emulated) = emulated();
        assert_eq!(emulated.access(HOST_BRIDGE, 0x11, 4, Some(0x4433_2211)).1, None);
        assert_eq!(model.asked(), ["write 00.0 11/1 11", "write 00.0 12/2 3322", "write 00.0 14/1 44"]);
    }

    #[test]
    fn behind_256_bytes_nothing_is_asked_and_all_ones_are_read() {
        let (model, mut emulated) = emulated();
        for offset in [0x100, 0xffc] {
            assert_eq!(emulated.access(HOST_BRIDGE, offset, 4, None), (u64::MAX, None));
            assert_eq!(emulated.access(HOST_BRIDGE, offset, 4, Some(0)).1, None);
        }
        assert_eq!(model.asked(), [""; 0]);
        assert_eq!(emulated.access(HOST_BRIDGE, 0xfc, 8, None).0, 0xffff_ffff_fffe_fdfc);
        assert_eq!(model.asked(), ["read 00.0 fc/4"]);
    }

    #[test]
    fn a_scan_of_the_bus_asks_for_the_list_and_for_functions_that_are_there() {
        let (model, mut emulated) = emulated();
        for number in 0..=255 {
            let (value, trouble) = emulated.access(Devfn(number), 0, 4, None);
            assert_eq!((value == u64::MAX, trouble), (number != 0, None), "{number:x}");
        }
        assert_eq!(model.asked(), ["read 00.0 0/4"]);
        // Whatever its age, it is asked for once.
        emulated.functions = None;
        assert_eq!(emulated.access(ABSENT, 0, 4, None), (u64::MAX, None));
        assert_eq!(model.asked(), ["functions"]);
    }

    #[test]
    fn a_list_that_is_old_is_asked_for_again() {
        let (model, mut emulated) = emulated();
        emulated.functions = Instant::now().checked_sub(LIST_AGE).map(|since| (since, vec![ABSENT]));
        assert_eq!(emulated.access(ABSENT, 0, 4, None), (u64::MAX, None));
        assert_eq!(model.asked(), ["functions"]);
    }

    #[test]
    fn a_device_model_that_has_failed_is_left_alone_and_asked_again_later() {
        let (model, mut emulated) = emulated();
        *model.silent.lock().unwrap() = true;
        let (value, trouble) = emulated.access(HOST_BRIDGE, 0, 4, None);
        assert!(value == u64::MAX && trouble.is_some_and(|trouble| trouble.contains("no answer within")));
        assert_eq!(model.asked(), ["read 00.0 0/4"]);
        *model.silent.lock().unwrap() = false;
        assert_eq!(emulated.access(HOST_BRIDGE, 0, 4, None), (u64::MAX, None));
        assert_eq!(model.asked(), [""; 0], "it is asked at once again");
        emulated.rests_until = Some(Instant::now());
        assert_eq!(emulated.access(HOST_BRIDGE, 0, 4, None).0 as u32, 0x0302_0100);
    }
}
