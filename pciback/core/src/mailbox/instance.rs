//! One Data Object Exchange: what is written to its registers, and what they read.

use crate::spec::doe;

/// The longest object that is taken or sent, in dwords: its header, a status, a message with its data.
pub const MOST_DWORDS: usize = 2 + 1 + 3 + super::DATA_LIMIT / 4;

/// A Data Object Exchange. Any sequence of writes leaves it in one of these states: an object is being written, a response waits to be
/// read, or an error waits for an abort. It is never busy: a request is answered before the next access.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Instance {
    /// The dwords that have been written since the last Go or Abort, at most [`MOST_DWORDS`].
    pub(super) request: Vec<u32>,
    /// More were written.
    pub(super) too_long: bool,
    /// The response, at most [`MOST_DWORDS`]; empty when there is none.
    pub(super) response: Vec<u32>,
    /// How many of its dwords have been read.
    pub(super) read: usize,
    /// DOE Error.
    pub(super) error: bool,
}

/// What a write has completed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exchanged {
    /// A request is complete; [`Instance::respond`] is awaited.
    Request(Vec<u32>),
    /// The response has been read to its end.
    Read,
    /// What was under way was given up.
    Aborted,
}

impl Instance {
    /// A guest's write of the register at this offset in the capability; `mask`: the bits that it covers. Data is taken in whole dwords.
    pub fn write(&mut self, register: u16, value: u32, mask: u32) -> Option<Exchanged> {
        let value = value & mask;
        match register {
            doe::CONTROL if value & doe::ABORT != 0 => {
                *self = Self::default();
                Some(Exchanged::Aborted)
            }
            _ if self.error => None,
            doe::CONTROL if value & doe::GO != 0 && self.response.is_empty() => self.go(),
            doe::WRITE_DATA if mask == u32::MAX && self.response.is_empty() => {
                match self.request.len() < MOST_DWORDS {
                    true => self.request.push(value),
                    false => self.too_long = true,
                }
                None
            }
            doe::READ_DATA if mask == u32::MAX && !self.response.is_empty() => {
                self.read += 1;
                if self.read < self.response.len() {
                    return None;
                }
                self.response.clear();
                self.read = 0;
                Some(Exchanged::Read)
            }
            _ => None,
        }
    }

    /// An object whose length is not the number of its dwords is dropped without a response (section 6.30.1); one that is too long for
    /// any request is an error.
    fn go(&mut self) -> Option<Exchanged> {
        let request = std::mem::take(&mut self.request);
        if std::mem::take(&mut self.too_long) {
            self.error = true;
            return None;
        }
        let length = request.get(1).map_or(0, |length| length & 0x3_ffff);
        (length as usize == request.len() && length >= 2).then_some(Exchanged::Request(request))
    }

    /// Offers the response to the request; `None`: it is of no type that is known, and dropped.
    pub fn respond(&mut self, response: Option<Vec<u32>>) {
        self.response = response.filter(|response| response.len() <= MOST_DWORDS).unwrap_or_default();
        self.read = 0;
    }

    /// What DOE Status reads.
    pub fn status(&self) -> u32 {
        let ready = if self.response.is_empty() { 0 } else { doe::READY };
        if self.error { doe::ERROR } else { ready }
    }

    /// What the Read Data Mailbox reads.
    pub fn data(&self) -> u32 {
        self.response.get(self.read).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ALL: u32 = u32::MAX;

    fn written(words: &[u32]) -> Instance {
        let mut instance = Instance::default();
        for word in words {
            assert_eq!(instance.write(doe::WRITE_DATA, *word, ALL), None);
        }
        instance
    }

    fn go(instance: &mut Instance) -> Option<Exchanged> {
        instance.write(doe::CONTROL, doe::GO, ALL)
    }

    #[test]
    fn an_object_is_a_request_if_its_length_is_the_number_of_its_dwords() {
        for (words, is_request) in [
            (vec![], false),
            (vec![1], false),
            (vec![1, 2], true),
            (vec![1, 3, 7], true),
            (vec![1, 2, 7], false),
            (vec![1, 4, 7], false),
            (vec![1, 0], false),
            (vec![1, 0x4_0003, 7], true),
            (vec![1, 1], false),
            (vec![1, ALL], false),
        ] {
            let mut instance = written(&words);
            let expected = is_request.then(|| Exchanged::Request(words.clone()));
            assert_eq!(go(&mut instance), expected, "{words:x?}");
            assert_eq!(instance, Instance::default(), "what is dropped leaves nothing: {words:x?}");
        }
    }

    #[test]
    fn a_response_is_read_dword_by_dword_and_the_last_one_ends_it() {
        let mut instance = written(&[1, 2]);
        assert!(go(&mut instance).is_some());
        instance.respond(Some(vec![5, 6]));
        assert_eq!((instance.status(), instance.data()), (doe::READY, 5));
        assert_eq!(instance.write(doe::READ_DATA, 0, ALL), None);
        assert_eq!((instance.status(), instance.data()), (doe::READY, 6));
        assert_eq!(instance.write(doe::READ_DATA, 0, ALL), Some(Exchanged::Read));
        assert_eq!((instance.status(), instance.data()), (0, 0));
        assert_eq!(instance.write(doe::READ_DATA, 0, ALL), None, "there is nothing more");
    }

    #[test]
    fn an_object_that_is_too_long_is_an_error_until_an_abort() {
        let mut words = vec![0; MOST_DWORDS + 1];
        words[1] = words.len() as u32;
        let mut instance = written(&words);
        assert_eq!(go(&mut instance), None);
        assert_eq!(instance.status(), doe::ERROR);
        instance.write(doe::WRITE_DATA, 1, ALL);
        instance.write(doe::WRITE_DATA, 2, ALL);
        assert_eq!(go(&mut instance), None);
        assert_eq!(instance.status(), doe::ERROR);
        assert_eq!(instance.write(doe::CONTROL, doe::ABORT, ALL), Some(Exchanged::Aborted));
        assert_eq!(instance, Instance::default());
    }

    #[test]
    fn an_abort_gives_up_whatever_was_under_way() {
        let mut with_response = written(&[1, 2]);
        go(&mut with_response);
        with_response.respond(Some(vec![5, 6]));
        for mut instance in [Instance::default(), written(&[1, 2, 3]), with_response] {
            assert_eq!(
                instance.write(doe::CONTROL, doe::ABORT | doe::GO, ALL),
                Some(Exchanged::Aborted),
                "Abort wins over Go"
            );
            assert_eq!(instance, Instance::default());
        }
    }

    #[test]
    fn nothing_is_taken_while_a_response_waits() {
        let mut instance = written(&[1, 2]);
        go(&mut instance);
        instance.respond(Some(vec![5]));
        let before = instance.clone();
        instance.write(doe::WRITE_DATA, 1, ALL);
        assert_eq!(go(&mut instance), None);
        assert_eq!(instance, before);
    }

    #[test]
    fn parts_of_a_dword_are_no_data_but_reach_the_bits_of_control() {
        let mut instance = written(&[1, 2]);
        instance.write(doe::WRITE_DATA, ALL, 0xffff);
        assert_eq!(instance.write(doe::CONTROL, ALL, 0x00ff_ff00), None);
        assert!(instance.write(doe::CONTROL, doe::GO, 0xff00_0000).is_some());
        instance.respond(Some(vec![5, 6]));
        instance.write(doe::READ_DATA, 0, 0xff);
        assert_eq!(instance.data(), 5);
        assert_eq!(instance.write(doe::CONTROL, doe::ABORT, 0xff), Some(Exchanged::Aborted));
    }

    proptest! {
        #[test]
        fn any_sequence_of_writes_stays_within_the_limits_and_an_abort_always_recovers(
            writes in proptest::collection::vec(
                (
                    prop_oneof![Just(doe::CONTROL), Just(doe::WRITE_DATA), Just(doe::READ_DATA), 0..0x18u16],
                    prop_oneof![Just(0), Just(2), Just(3), Just(doe::ABORT), Just(doe::GO), any::<u32>()],
                    prop_oneof![4 => Just(ALL), 1 => Just(0xffff), 1 => Just(0xff00_0000u32)],
                    0..=MOST_DWORDS + 2,
                ),
                0..400,
            )
        ) {
            let mut instance = Instance::default();
            for (register, value, mask, length) in writes {
                match instance.write(register, value, mask) {
                    Some(Exchanged::Request(words)) => {
                        prop_assert!(words.len() >= 2 && words.len() <= MOST_DWORDS);
                        prop_assert_eq!(words[1] as usize & 0x3_ffff, words.len());
                        instance.respond((length > 0).then(|| vec![7; length]));
                    }
                    Some(Exchanged::Read | Exchanged::Aborted) => prop_assert_eq!(instance.status(), 0),
                    None => {}
                }
                prop_assert!(instance.request.len() <= MOST_DWORDS && instance.response.len() <= MOST_DWORDS);
                prop_assert!(instance.read == 0 || instance.read < instance.response.len());
                prop_assert!(instance.request.is_empty() || instance.response.is_empty());
                let ready = instance.status() & doe::READY != 0;
                prop_assert!(!(ready && instance.status() & doe::ERROR != 0));
                prop_assert!(ready || instance.data() == 0);
            }
            instance.write(doe::CONTROL, doe::ABORT, ALL);
            prop_assert_eq!(instance, Instance::default());
        }
    }
}
