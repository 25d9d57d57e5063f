//! The messages between a VF and the owner of its PF that wait to be received: one queue for each direction, in the VF's file.

use super::image::{MailboxImageError, PEER, QUEUES};
use super::object::{DATA_LIMIT, Message};
use crate::memory::{Words, next_generation};

/// How many messages wait in one direction at most.
pub const QUEUE_LENGTH: u32 = 8;

/// A message: type and VF, sequence, number of bytes, data.
const MESSAGE: usize = 3 + DATA_LIMIT / 4;
const GENERATION: usize = 0;
/// Two slots: number of the first message, number behind the last one, the sender's count when it sent that.
const CURSORS: usize = 16;
const CURSOR: usize = 16;
const MESSAGES: usize = 64;
pub(super) const QUEUE_WORDS: usize = MESSAGES + QUEUE_LENGTH as usize * MESSAGE;

/// Where messages go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// To the owner of the PF.
    ToPf = 0,
    /// To the VF.
    ToVf = 1,
}

/// Both queues of a VF. Those who use them exclude each other.
#[derive(Debug)]
pub struct Queues(Words);

#[derive(Debug, Clone, Copy)]
struct Cursors {
    head: u32,
    tail: u32,
    sent: u32,
}

/// `first`: the number of the first message, which no earlier user of the function had.
pub(super) fn begin(words: &Words, first: u32) {
    for direction in [Direction::ToPf, Direction::ToVf] {
        Queues(words.clone()).store(direction, Cursors { head: first, tail: first, sent: 0 });
    }
}

pub(super) fn check(words: &Words) -> Result<(), MailboxImageError> {
    let queues = Queues(words.clone());
    for direction in [Direction::ToPf, Direction::ToVf] {
        let Cursors { head, tail, .. } = queues.load(direction);
        let found = tail.wrapping_sub(head);
        if found > QUEUE_LENGTH {
            return Err(MailboxImageError::Damaged { what: "the number of messages", found });
        }
    }
    Ok(())
}

impl Queues {
    /// Those of a VF's mailbox.
    pub fn new(words: &Words) -> Self {
        Self(words.clone())
    }

    fn slot(direction: Direction, generation: u32) -> usize {
        QUEUES[direction as usize] + CURSORS + (generation & 1) as usize * CURSOR
    }

    fn load(&self, direction: Direction) -> Cursors {
        let slot = Self::slot(direction, self.0.latest(QUEUES[direction as usize] + GENERATION));
        Cursors { head: self.0.get(slot), tail: self.0.get(slot + 1), sent: self.0.get(slot + 2) }
    }

    fn store(&self, direction: Direction, cursors: Cursors) {
        let at = QUEUES[direction as usize] + GENERATION;
        let generation = next_generation(self.0.latest(at));
        let slot = Self::slot(direction, generation);
        for (index, value) in [cursors.head, cursors.tail, cursors.sent].into_iter().enumerate() {
            self.0.set(slot + index, value);
        }
        self.0.publish(at, generation);
    }

    fn message(direction: Direction, number: u32) -> usize {
        QUEUES[direction as usize] + MESSAGES + (number % QUEUE_LENGTH) as usize * MESSAGE
    }

    /// Who is on the side of the PF; `None`: nobody.
    pub fn peer(&self) -> Option<u16> {
        self.0.get(PEER).checked_sub(1).map(|domain| domain as u16)
    }

    /// Puts a domain, or nobody, on the side of the PF. What was written for another one, or by it, is dropped.
    pub fn connect(&mut self, peer: Option<u16>) {
        if self.peer() == peer {
            return;
        }
        // Killed before the last step, the next run begins with nobody and drops it again.
        self.0.publish(PEER, 0);
        for direction in [Direction::ToPf, Direction::ToVf] {
            let cursors = self.load(direction);
            self.store(direction, Cursors { head: cursors.tail, ..cursors });
        }
        self.0.publish(PEER, peer.map_or(0, |domain| u32::from(domain) + 1));
    }

    /// How many messages wait.
    pub fn waiting(&self, direction: Direction) -> u32 {
        let Cursors { head, tail, .. } = self.load(direction);
        tail.wrapping_sub(head)
    }

    /// Appends a message; `false`: there is no room. `sent`: the sender's count of what it sends, with this one: a service that was killed may
    /// send the same again, which then changes nothing; 0 where that cannot be.
    #[must_use = "a message that does not fit is not stored"]
    pub fn push(&mut self, direction: Direction, sent: u32, message: &Message) -> bool {
        let cursors = self.load(direction);
        if sent != 0 && cursors.sent == sent {
            return true;
        }
        if cursors.tail.wrapping_sub(cursors.head) >= QUEUE_LENGTH {
            return false;
        }
        let at = Self::message(direction, cursors.tail);
        for (index, word) in message.words().into_iter().enumerate() {
            self.0.set(at + index, word);
        }
        self.store(direction, Cursors { tail: cursors.tail.wrapping_add(1), sent, ..cursors });
        true
    }

    /// The oldest message, with its number.
    pub fn first(&self, direction: Direction) -> Option<(u32, Message)> {
        let Cursors { head, tail, .. } = self.load(direction);
        if head == tail {
            return None;
        }
        let at = Self::message(direction, head);
        let bytes = (self.0.get(at + 2) as usize).min(DATA_LIMIT);
        let mut words: Vec<u32> = (0..3 + bytes.div_ceil(4)).map(|index| self.0.get(at + index)).collect();
        words[2] = bytes as u32;
        Message::parse(&words).map(|message| (head, message))
    }

    /// Removes the oldest message, if it has this number.
    pub fn pop(&mut self, direction: Direction, number: u32) {
        let cursors = self.load(direction);
        if cursors.head == number && cursors.head != cursors.tail {
            self.store(direction, Cursors { head: number.wrapping_add(1), ..cursors });
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::image::tests::{OWNER, address, copy, memory};
    use super::super::mailbox_memory;
    use super::*;

    fn words() -> Words {
        mailbox_memory(memory(), OWNER, address(), Some(u32::MAX - 2)).unwrap()
    }

    fn message(sequence: u32) -> Message {
        Message { kind: 1, vf: 2, sequence, data: vec![sequence as u8; sequence as usize % 257] }
    }

    #[test]
    fn messages_are_received_in_their_order_and_no_more_than_fit_wait() {
        let mut queues = Queues::new(&words());
        for round in 0..3 {
            for sequence in 0..QUEUE_LENGTH {
                assert!(queues.push(Direction::ToPf, 0, &message(round * 100 + sequence)));
            }
            assert!(!queues.push(Direction::ToPf, 0, &message(99)));
            for sequence in 0..QUEUE_LENGTH {
                let (number, first) = queues.first(Direction::ToPf).unwrap();
                assert_eq!(first, message(round * 100 + sequence));
                queues.pop(Direction::ToPf, number.wrapping_add(1));
                assert_eq!(queues.waiting(Direction::ToPf), QUEUE_LENGTH - sequence, "another number");
                queues.pop(Direction::ToPf, number);
            }
            assert_eq!(queues.first(Direction::ToPf), None);
        }
    }

    #[test]
    fn the_same_message_of_a_service_that_was_killed_is_sent_once() {
        let mut queues = Queues::new(&words());
        assert!(queues.push(Direction::ToPf, 1, &message(1)));
        assert!(queues.push(Direction::ToPf, 1, &message(1)));
        assert_eq!(queues.waiting(Direction::ToPf), 1);
        assert!(queues.push(Direction::ToPf, 2, &message(2)));
        assert_eq!((queues.waiting(Direction::ToPf), queues.waiting(Direction::ToVf)), (2, 0));
    }

    #[test]
    fn another_owner_of_the_pf_gets_nothing_that_was_meant_for_the_last_one() {
        let words = words();
        let mut queues = Queues::new(&words);
        queues.connect(Some(3));
        assert!(queues.push(Direction::ToPf, 0, &message(1)) && queues.push(Direction::ToVf, 0, &message(2)));
        queues.connect(Some(3));
        assert_eq!(queues.waiting(Direction::ToPf), 1, "the same one goes on");
        let mut again = Queues::new(&mailbox_memory(copy(&words), OWNER, address(), None).unwrap());
        assert_eq!((again.peer(), again.waiting(Direction::ToVf)), (Some(3), 1));
        again.connect(Some(0));
        assert_eq!((again.waiting(Direction::ToPf), again.waiting(Direction::ToVf)), (0, 0));
        assert_eq!(again.peer(), Some(0), "dom0");
    }

    proptest! {
        #[test]
        fn queues_do_what_lists_do(steps in proptest::collection::vec((0..3u8, any::<bool>(), 0..300u32), 0..200)) {
            let words = words();
            let mut queues = Queues::new(&words);
            let mut lists = [Vec::new(), Vec::new()];
            for (step, to_pf, sequence) in steps {
                let direction = if to_pf { Direction::ToPf } else { Direction::ToVf };
                let list = &mut lists[direction as usize];
                match step {
                    0 => {
                        let fits = list.len() < QUEUE_LENGTH as usize;
                        prop_assert_eq!(queues.push(direction, 0, &message(sequence)), fits);
                        if fits {
                            list.push(message(sequence));
                        }
                    }
                    1 => {
                        if let Some((number, first)) = queues.first(direction) {
                            prop_assert_eq!(first, list.remove(0));
                            queues.pop(direction, number);
                        }
                    }
                    _ => queues = Queues::new(&mailbox_memory(copy(&words), OWNER, address(), None).unwrap()),
                }
                if step == 2 {
                    // What a killed service leaves is what it had; the test goes on with the first mapping.
                    let found = queues.waiting(direction) as usize;
                    prop_assert_eq!(found, list.len());
                    queues = Queues::new(&words);
                }
            }
        }
    }
}
