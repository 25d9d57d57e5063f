//! Messages in the mailboxes of VFs.

use std::fmt;

use pciback::Sbdf;
use pciback::mailbox::{DATA_LIMIT, Message};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A message of a VF.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct MessageView {
    /// The VF.
    pub address: Sbdf,
    /// Its number, from 0.
    pub index: u16,
    /// The type, as those who talk agree.
    #[serde(rename = "type")]
    pub kind: u16,
    /// The sender's number.
    pub sequence: u32,
    /// The data, in hexadecimal.
    pub data: String,
}

impl MessageView {
    /// The view of a message from a VF.
    pub fn new(address: Sbdf, message: &Message) -> Self {
        let data = message.data.iter().map(|byte| format!("{byte:02x}")).collect();
        Self { address, index: message.vf, kind: message.kind, sequence: message.sequence, data }
    }
}

impl fmt::Display for MessageView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { address, kind, sequence, data, .. } = self;
        write!(f, "{address} type {kind} sequence {sequence}: ")?;
        let bytes = message_data(data).unwrap_or_default();
        let is_text = |byte: &u8| (b' '..=b'~').contains(byte);
        match std::str::from_utf8(&bytes) {
            Ok(text) if bytes.iter().all(is_text) && !bytes.is_empty() => write!(f, "{data} '{text}'"),
            _ if bytes.is_empty() => f.write_str("no data"),
            _ => f.write_str(data),
        }
    }
}

/// Reads data in hexadecimal; `None` where it is not, or has more bytes than a message.
pub fn message_data(text: &str) -> Option<Vec<u8>> {
    let digits: Option<Vec<u32>> = text.chars().map(|digit| digit.to_digit(16)).collect();
    let digits = digits.filter(|digits| digits.len().is_multiple_of(2) && digits.len() <= 2 * DATA_LIMIT)?;
    Some(digits.chunks(2).map(|pair| (pair[0] << 4 | pair[1]) as u8).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_is_an_even_number_of_digits_for_at_most_256_bytes() {
        assert_eq!(message_data(""), Some(Vec::new()));
        assert_eq!(message_data("00fF"), Some(vec![0, 0xff]));
        assert_eq!(message_data(&"00".repeat(256)).map(|data| data.len()), Some(256));
        for text in ["0", "0g", "+1", " 00", "é0", &"00".repeat(257)] {
            assert_eq!(message_data(text), None, "{text}");
        }
    }
}
