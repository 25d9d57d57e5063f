//! What the harness and its agents say to each other.
//!
//! A frame is `{kind: u8, id: u32, payload}`. On dom0's virtio-serial port frames are length-prefixed bytes. On a
//! guest's console they are text lines, because the kernel prints there too: base64 with a checksum between two
//! marker bytes, so that anything else on that console is simply not a frame.

use std::io::{self, Read};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

/// A frame's type. Unknown numbers are carried along and ignored by the receiver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind(pub u8);

impl Kind {
    /// Harness to agent: run a command (`Start` as JSON).
    pub const START: Self = Self(1);
    /// Harness to agent: bytes for the command's standard input.
    pub const STDIN: Self = Self(2);
    /// Harness to agent: end of the standard input.
    pub const STDIN_END: Self = Self(3);
    /// Harness to agent: send a signal (i32) to the command's process group.
    pub const SIGNAL: Self = Self(4);
    /// Harness to agent: are you there?
    pub const PING: Self = Self(5);
    /// Agent to harness: yes.
    pub const PONG: Self = Self(6);
    /// Agent to harness: the command wrote to its standard output.
    pub const STDOUT: Self = Self(7);
    /// Agent to harness: the command wrote to its standard error.
    pub const STDERR: Self = Self(8);
    /// Agent to harness: the command ended (`Exit` as JSON); the last frame of its id.
    pub const EXIT: Self = Self(9);
    /// Agent to harness, guests only: a line of the kernel's log.
    pub const KMSG: Self = Self(10);
}

/// One message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// What it says.
    pub kind: Kind,
    /// Which command it is about.
    pub id: u32,
    /// Its content.
    pub payload: Vec<u8>,
}

/// A command to run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Start {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// The whole process group is killed after this time.
    pub limit_ms: Option<u64>,
    /// Run it on a pseudo-terminal of this many (rows, columns).
    pub terminal: Option<(u16, u16)>,
    /// Whether standard input will be sent; else it is empty.
    pub stdin: bool,
}

/// How a command ended.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// Exit status, if it exited.
    pub code: Option<i32>,
    /// Signal, if it was killed.
    pub signal: Option<i32>,
    /// Killed by the agent because its time was up.
    pub timed_out: bool,
    /// It could not be started at all.
    pub error: Option<String>,
}

impl Exit {
    /// The same in words.
    pub fn why(&self) -> String {
        match (&self.error, self.code, self.signal) {
            (Some(error), ..) => error.clone(),
            (None, _, _) if self.timed_out => "its time was up".to_owned(),
            (None, Some(code), _) => format!("status {code}"),
            (None, None, Some(signal)) => format!("signal {signal}"),
            (None, None, None) => "for no known reason".to_owned(),
        }
    }
}

/// Longest payload accepted; senders split output far below this.
const MAX_PAYLOAD: usize = 16 << 20;
const HEAD: usize = 5;

impl Frame {
    /// A frame of these parts.
    pub fn new(kind: Kind, id: u32, payload: impl Into<Vec<u8>>) -> Self {
        Self { kind, id, payload: payload.into() }
    }

    fn body(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEAD + self.payload.len());
        out.push(self.kind.0);
        out.extend(self.id.to_le_bytes());
        out.extend(&self.payload);
        out
    }

    fn from_body(mut body: Vec<u8>) -> Option<Self> {
        let id = u32::from_le_bytes(body.get(1..HEAD)?.try_into().ok()?);
        let payload = body.split_off(HEAD);
        Some(Self { kind: Kind(body[0]), id, payload })
    }

    /// The form for a clean byte stream.
    pub fn to_bytes(&self) -> Vec<u8> {
        let body = self.body();
        let mut out = (body.len() as u32).to_le_bytes().to_vec();
        out.extend(body);
        out
    }

    /// Reads one frame from a clean byte stream; `None` at its end.
    pub fn read(from: &mut impl Read) -> Result<Option<Self>> {
        let mut len = [0; 4];
        match from.read_exact(&mut len) {
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            other => other.context("reading a frame's length")?,
        }
        let len = u32::from_le_bytes(len) as usize;
        ensure!((HEAD..=MAX_PAYLOAD).contains(&len), "frame of {len} bytes: the stream is out of step");
        let mut body = vec![0; len];
        from.read_exact(&mut body).context("reading a frame")?;
        Ok(Self::from_body(body))
    }

    /// The form for a console shared with other writers.
    pub fn to_line(&self) -> Vec<u8> {
        let body = self.body();
        let mut out = vec![b'\n', BEGIN];
        out.extend(format!("{:08x}", checksum(&body)).bytes());
        encode64(&body, &mut out);
        out.extend([END, b'\n']);
        out
    }
}

const BEGIN: u8 = 0x02;
const END: u8 = 0x03;

/// Finds frames in what a shared console says, and keeps the rest.
#[derive(Debug, Default)]
pub struct LineDecoder {
    frame: Option<Vec<u8>>,
    /// Bytes that belong to no frame: the kernel's messages.
    pub noise: Vec<u8>,
    /// Frames that arrived damaged.
    pub damaged: usize,
}

impl LineDecoder {
    /// Takes the next bytes, returns the frames completed by them.
    pub fn push(&mut self, bytes: &[u8]) -> Vec<Frame> {
        let mut frames = Vec::new();
        for &byte in bytes {
            match (byte, &mut self.frame) {
                (BEGIN, _) => self.frame = Some(Vec::new()),
                (END, frame @ Some(_)) => match frame.take().and_then(|text| decode_text(&text)) {
                    Some(frame) => frames.push(frame),
                    None => self.damaged += 1,
                },
                (_, Some(text)) => text.push(byte),
                (_, None) => self.noise.push(byte),
            }
        }
        frames
    }
}

fn decode_text(text: &[u8]) -> Option<Frame> {
    let sum = u32::from_str_radix(std::str::from_utf8(text.get(..8)?).ok()?, 16).ok()?;
    let body = decode64(text.get(8..)?)?;
    (checksum(&body) == sum).then_some(())?;
    Frame::from_body(body)
}

/// FNV-1a: enough to notice a kernel message in the middle of a line.
fn checksum(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |sum, b| (sum ^ u32::from(*b)).wrapping_mul(0x0100_0193))
}

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

fn encode64(bytes: &[u8], out: &mut Vec<u8>) {
    for chunk in bytes.chunks(3) {
        let word = chunk.iter().fold(0u32, |w, b| w << 8 | u32::from(*b)) << (8 * (3 - chunk.len()));
        out.extend((0..=chunk.len()).map(|i| ALPHABET[(word >> (18 - 6 * i)) as usize & 63]));
    }
}

fn decode64(text: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len() * 3 / 4);
    for chunk in text.chunks(4) {
        let mut word = 0u32;
        for byte in chunk {
            let value = match byte {
                b'A'..=b'Z' => byte - b'A',
                b'a'..=b'z' => byte - b'a' + 26,
                b'0'..=b'9' => byte - b'0' + 52,
                b'+' => 62,
                b'/' => 63,
                _ => return None,
            };
            word = word << 6 | u32::from(value);
        }
        let bytes = (word << (6 * (4 - chunk.len()))).to_be_bytes();
        out.extend(&bytes[1..chunk.len()]);
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_survives_both_forms_whatever_its_length() {
        for len in 0..100u32 {
            let frame =
                Frame::new(Kind::STDOUT, 7 + len, (0..len).map(|i| (i * 37) as u8).collect::<Vec<_>>());
            assert_eq!(Frame::read(&mut &frame.to_bytes()[..]).unwrap().as_ref(), Some(&frame));
            let mut decoder = LineDecoder::default();
            assert_eq!(decoder.push(&frame.to_line()), [frame]);
        }
    }

    #[test]
    fn kernel_messages_between_frames_are_noise_and_inside_one_are_noticed() {
        let frame = Frame::new(Kind::EXIT, 1, "hello");
        let line = frame.to_line();
        let mut decoder = LineDecoder::default();
        let mut bytes = b"[ 1.0] hi".to_vec();
        bytes.extend(&line);
        bytes.extend(&line[..8]);
        bytes.extend(b"[ 2.0] oops");
        bytes.extend(&line[8..]);
        bytes.extend(&line);
        assert_eq!(decoder.push(&bytes), [frame.clone(), frame]);
        assert_eq!(decoder.damaged, 1);
        assert!(decoder.noise.starts_with(b"[ 1.0] hi"));
    }

    #[test]
    fn a_truncated_stream_is_an_error_and_an_ended_one_is_not() {
        let bytes = Frame::new(Kind::PING, 1, "x").to_bytes();
        assert!(Frame::read(&mut &bytes[..0]).unwrap().is_none());
        assert!(Frame::read(&mut &bytes[..bytes.len() - 1]).is_err());
        assert!(Frame::read(&mut &[0xffu8; 16][..]).is_err());
    }
}
