//! The data objects that a mailbox knows: discovery (PCI Express 6.0, section 6.30.1.1), and two of a vendor's.
//!
//! An object is a header of two dwords, vendor with type and length, and its payload. Sent: type and VF number in one dword, sequence,
//! number of data bytes, data. Its response: a status, the sequence. Receive has no payload; its response has a status and, if that is
//! [`Status::Done`], a message as it was sent.

/// The vendor of the objects: that of Xen's own virtual devices.
pub const VENDOR: u16 = 0x5853;
/// The most bytes of data in a message.
pub const DATA_LIMIT: usize = 256;

const PCI_SIG: u16 = 1;
const DISCOVERY: u8 = 0;
const SEND: u8 = 1;
const RECEIVE: u8 = 2;
/// In the order of discovery.
const TYPES: [(u16, u8); 3] = [(PCI_SIG, DISCOVERY), (VENDOR, SEND), (VENDOR, RECEIVE)];

/// A message between the driver of a VF and the owner of its PF.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Message {
    /// What it is, as those who talk agree.
    pub kind: u16,
    /// Which VF of the PF it is from or for, from 0. A VF cannot choose.
    pub vf: u16,
    /// The sender's number.
    pub sequence: u32,
    /// At most [`DATA_LIMIT`] bytes.
    pub data: Vec<u8>,
}

/// What became of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Status {
    /// It was carried out.
    Done = 0,
    /// There is no message.
    Empty = 1,
    /// The receiver has not read earlier messages: try again later.
    Full = 2,
    /// Nobody is on the other side, or a policy forbids it.
    NoPeer = 3,
    /// The object means nothing.
    Malformed = 4,
    /// Too many in a second: try again later.
    TooMany = 5,
}

/// What a request object asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// Which type of object has this index.
    Discover(u8),
    /// To send a message.
    Send(Message),
    /// To receive the oldest message.
    Receive,
    /// A message that is none; its sequence.
    Malformed(u32),
}

impl Message {
    /// It as dwords, data filled up with 0.
    pub(super) fn words(&self) -> Vec<u32> {
        let data = &self.data[..self.data.len().min(DATA_LIMIT)];
        let mut words =
            vec![u32::from(self.kind) | u32::from(self.vf) << 16, self.sequence, data.len() as u32];
        words.extend(data.chunks(4).map(|bytes| {
            let mut word = [0; 4];
            word[..bytes.len()].copy_from_slice(bytes);
            u32::from_le_bytes(word)
        }));
        words
    }

    /// Reads it; `None` where the number of bytes is not that of the dwords.
    pub(super) fn parse(words: &[u32]) -> Option<Self> {
        let [first, sequence, bytes, data @ ..] = words else { return None };
        let bytes = *bytes as usize;
        if bytes > DATA_LIMIT || data.len() != bytes.div_ceil(4) {
            return None;
        }
        let mut data: Vec<u8> = data.iter().flat_map(|word| word.to_le_bytes()).collect();
        data.truncate(bytes);
        Some(Self { kind: *first as u16, vf: (first >> 16) as u16, sequence: *sequence, data })
    }
}

impl Request {
    /// Reads an object; `None`: it is of no type that is known.
    pub fn parse(words: &[u32]) -> Option<Self> {
        let [first, _, payload @ ..] = words else { return None };
        match (*first as u16, (first >> 16) as u8) {
            (PCI_SIG, DISCOVERY) => match payload {
                [index] => Some(Self::Discover(*index as u8)),
                _ => None,
            },
            (VENDOR, SEND) => Some(match Message::parse(payload) {
                Some(message) => Self::Send(message),
                None => Self::Malformed(payload.get(1).copied().unwrap_or(0)),
            }),
            (VENDOR, RECEIVE) if payload.is_empty() => Some(Self::Receive),
            _ => None,
        }
    }

    /// The response to a discovery: vendor and type of an index, and the next index.
    pub fn discovered(index: u8) -> Vec<u32> {
        let found = TYPES.get(usize::from(index));
        let next = if usize::from(index) + 1 < TYPES.len() { u32::from(index) + 1 } else { 0 };
        object(
            PCI_SIG,
            DISCOVERY,
            &[match found {
                Some((vendor, kind)) => u32::from(*vendor) | u32::from(*kind) << 16 | next << 24,
                None => 0xffff,
            }],
        )
    }

    /// The response to a message that was sent.
    pub fn sent(status: Status, sequence: u32) -> Vec<u32> {
        object(VENDOR, SEND, &[status as u32, sequence])
    }

    /// The response to who wants to receive.
    pub fn received(message: Result<&Message, Status>) -> Vec<u32> {
        let payload = match message {
            Ok(message) => [vec![Status::Done as u32], message.words()].concat(),
            Err(status) => vec![status as u32],
        };
        object(VENDOR, RECEIVE, &payload)
    }
}

fn object(vendor: u16, kind: u8, payload: &[u32]) -> Vec<u32> {
    let mut words = vec![u32::from(vendor) | u32::from(kind) << 16, payload.len() as u32 + 2];
    words.extend(payload);
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(bytes: usize) -> Message {
        Message { kind: 7, vf: 3, sequence: 0x1234_5678, data: (0..bytes).map(|byte| byte as u8).collect() }
    }

    #[test]
    fn discovery_leads_from_index_0_over_all_types_back_to_0() {
        let mut index = 0;
        let mut found = Vec::new();
        loop {
            let request = Request::parse(&[1, 3, u32::from(index)]).unwrap();
            assert_eq!(request, Request::Discover(index));
            let [header, 3, word] = Request::discovered(index)[..] else { panic!("its length") };
            assert_eq!(header, 1);
            found.push((word as u16, (word >> 16) as u8));
            index = (word >> 24) as u8;
            if index == 0 {
                break;
            }
        }
        assert_eq!(found, [(1, 0), (0x5853, 1), (0x5853, 2)]);
        assert_eq!(Request::discovered(200)[2], 0xffff, "an index that means nothing");
    }

    #[test]
    fn a_message_of_any_length_arrives_as_it_was_sent() {
        for bytes in 0..=DATA_LIMIT {
            let sent = message(bytes);
            let object = object(VENDOR, SEND, &sent.words());
            assert_eq!(Request::parse(&object), Some(Request::Send(sent.clone())));
            let received = Request::received(Ok(&sent));
            assert!(received.len() <= crate::mailbox::MOST_DWORDS);
            assert_eq!((received[1] as usize, received[2]), (received.len(), 0));
            assert_eq!(Message::parse(&received[3..]), Some(sent));
        }
    }

    #[test]
    fn lengths_that_are_nonsense_are_malformed_and_other_objects_unknown() {
        let send = u32::from(VENDOR) | 1 << 16;
        for payload in [vec![], vec![7], vec![7, 9], vec![7, 9, 1], vec![7, 9, 0, 0], vec![7, 9, u32::MAX, 0]]
        {
            let sequence = if payload.len() > 1 { 9 } else { 0 };
            let words = [vec![send, 0], payload].concat();
            assert_eq!(Request::parse(&words), Some(Request::Malformed(sequence)), "{words:x?}");
        }
        let too_long = [vec![send, 0, 7, 9, 257], vec![0; 65]].concat();
        assert_eq!(Request::parse(&too_long), Some(Request::Malformed(9)));
        for words in [[1, 2].as_slice(), &[1, 4, 0, 0], &[0x0001_0001, 3, 0], &[send + 0x2_0000, 2], &[5, 2]]
        {
            assert_eq!(Request::parse(words), None, "{words:x?}");
        }
    }
}
