//! What `xpci migrate` and `xpci migrate-receive` say to each other: JSON, one message a line. The memory of the guest follows in parts, each
//! after a line with its size.
//!
//! The other end may be of another version or may be a shell that greets first: what comes is bounded and checked here.

use std::io::{self, BufRead, ErrorKind, Read, Write};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::failed;
use crate::outcome::{Failure, excerpt};
use crate::protocol::ReservedFunction;
use crate::saved::SavedGuest;

/// The version of the conversation; others are refused.
pub const VERSION: u32 = 1;
/// The longest message, in bytes; a guest with 32 functions needs a tenth of that.
const LINE_LIMIT: u64 = 1 << 20;
/// The largest part of a guest's memory, in bytes.
pub const PART_LIMIT: usize = 1 << 20;
/// How much of something that is no message is shown, in characters.
const SHOWN: usize = 80;

/// From the host that the guest leaves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "message", deny_unknown_fields, rename_all = "kebab-case")]
pub enum Order {
    /// Asks for a function for each that the guest has.
    Reserve {
        /// The version of the conversation.
        version: u32,
        /// The name of this host, for messages.
        from: String,
        /// The guest.
        guest: SavedGuest,
    },
    /// So many bytes of the guest follow.
    Part {
        /// 1 to [`PART_LIMIT`].
        bytes: u32,
    },
    /// The guest is complete.
    Complete,
    /// The guest is yours; let it run.
    Run,
    /// The guest stays.
    Stay,
}

/// From the host to which the guest comes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "message", deny_unknown_fields, rename_all = "kebab-case")]
pub enum Report {
    /// The functions that the guest will have.
    Reserved {
        /// One for each.
        functions: Vec<ReservedFunction>,
    },
    /// The guest is here, has its functions and is paused.
    Ready,
    /// The guest runs.
    Runs,
    /// It failed; nothing of the guest is left, unless it was to run.
    Failed {
        /// Why.
        failure: Box<Failure>,
    },
}

/// Sends a message.
///
/// # Errors
/// The other end does not read.
pub fn send(to: &mut impl Write, message: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    to.write_all(&line).and_then(|()| to.flush())
}

/// Receives a message.
///
/// # Errors
/// The connection ended, or what came is no message.
pub fn receive<T: DeserializeOwned>(from: &mut impl BufRead) -> Result<T, Failure> {
    let mut line = Vec::new();
    from.by_ref().take(LINE_LIMIT).read_until(b'\n', &mut line).map_err(|error| lost(&error))?;
    // Who could not send the end of a line counts it as not sent.
    if line.len() < LINE_LIMIT as usize && !line.ends_with(b"\n") {
        return Err(lost(&"it was closed"));
    }
    serde_json::from_slice(&line).map_err(|error| {
        let text = String::from_utf8_lossy(&line);
        let shown: String = text.trim_end().chars().take(SHOWN).flat_map(char::escape_default).collect();
        // It quotes what it does not know.
        let why = excerpt(&error.to_string());
        failed(format!("the other host said '{shown}', which is no message of xpci: {why}"))
            .hint("both hosts need the same version of xpci, and a shell that prints nothing by itself")
    })
}

/// The failure of a connection that has ended.
pub fn lost(why: &dyn std::fmt::Display) -> Failure {
    failed(format!("the connection to the other host ended: {why}"))
}

/// Copies a part of the guest; `bytes` was received.
///
/// # Errors
/// The connection ended, or the size is invalid. The inner error: it could not be written.
pub fn copy_part(
    from: &mut impl Read,
    bytes: u32,
    buffer: &mut Vec<u8>,
    to: &mut impl Write,
) -> Result<io::Result<()>, Failure> {
    let size = usize::try_from(bytes).unwrap_or(usize::MAX);
    if size == 0 || size > PART_LIMIT {
        return Err(failed(format!("the other host announced a part of {bytes} bytes, more than is valid")));
    }
    buffer.resize(size, 0);
    from.read_exact(buffer).map_err(|error| match error.kind() {
        ErrorKind::UnexpectedEof => lost(&"it was closed within the guest's memory"),
        _ => lost(&error),
    })?;
    Ok(to.write_all(buffer))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_received_as_they_were_sent() {
        let mut sent = Vec::new();
        send(&mut sent, &Order::Part { bytes: 7 }).unwrap();
        send(&mut sent, &Order::Run).unwrap();
        let mut from = sent.as_slice();
        assert_eq!(receive::<Order>(&mut from).unwrap(), Order::Part { bytes: 7 });
        assert_eq!(receive::<Order>(&mut from).unwrap(), Order::Run);
        let mut line = Vec::new();
        send(&mut line, &Order::Run).unwrap();
        for length in 0..line.len() {
            let ended = receive::<Order>(&mut &line[..length]).unwrap_err();
            assert!(ended.message.contains("the connection to the other host ended"), "{length}: {ended}");
        }
    }

    #[test]
    fn what_is_no_message_is_shown_without_its_control_characters_and_at_most_in_part() {
        let greeting = format!("\x1b[2JWelcome{}\n", "!".repeat(2 << 20));
        let failure = receive::<Report>(&mut greeting.as_bytes()).unwrap_err();
        assert!(failure.message.contains("\\u{1b}[2JWelcome!!"), "{failure}");
        assert!(failure.message.len() < 400, "{}", failure.message.len());
        let dance = format!("{{\"message\":\"{}\"}}\n", "dance".repeat(1 << 17));
        let failure = receive::<Order>(&mut dance.as_bytes()).unwrap_err();
        assert!(failure.message.len() < 1000, "{}", failure.message.len());
        for invalid in ["{\"message\":\"part\"}\n", "{\"message\":\"dance\"}\n", "{\n", "\n"] {
            receive::<Order>(&mut invalid.as_bytes()).unwrap_err();
        }
    }

    #[test]
    fn a_part_has_a_valid_size_and_arrives_whole() {
        let (mut buffer, mut written) = (Vec::new(), Vec::new());
        for bytes in [0, PART_LIMIT as u32 + 1, u32::MAX] {
            let copied = copy_part(&mut io::repeat(7), bytes, &mut buffer, &mut written);
            assert!(copied.is_err(), "{bytes}");
        }
        assert!(copy_part(&mut [7; 3].as_slice(), 4, &mut buffer, &mut written).is_err(), "cut short");
        assert!(written.is_empty());
        copy_part(&mut [7; 9].as_slice(), 4, &mut buffer, &mut written).unwrap().unwrap();
        assert_eq!(written, [7; 4]);
    }
}
