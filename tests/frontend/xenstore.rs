//! The guest's xenstore, spoken to over /dev/xen/xenbus: the wire format of `xen/io/xs_wire.h`.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

const DEVICE: &str = "/dev/xen/xenbus";

/// Message types (`enum xsd_sockmsg_type`).
mod kind {
    pub const READ: u32 = 2;
    pub const WATCH: u32 = 4;
    pub const UNWATCH: u32 = 5;
    pub const WRITE: u32 = 11;
    pub const REMOVE: u32 = 13;
    pub const WATCH_EVENT: u32 = 15;
    pub const ERROR: u32 = 16;
}

/// A connection. Relative paths are below the guest's own directory.
pub struct Store {
    device: File,
    request: u32,
}

impl Store {
    pub fn open() -> Result<Self> {
        let device = OpenOptions::new().read(true).write(true).open(DEVICE).context(DEVICE)?;
        Ok(Self { device, request: 0 })
    }

    /// The value of a node; `Err` with xenstore's word for it, such as `ENOENT`.
    pub fn read(&mut self, path: &str) -> Result<Result<Vec<u8>, String>> {
        self.ask(kind::READ, &[path.as_bytes(), b"\0"].concat())
    }

    /// Any bytes as a node's value.
    pub fn write(&mut self, path: &str, value: &[u8]) -> Result<Result<(), String>> {
        let payload = [path.as_bytes(), b"\0", value].concat();
        // The kernel takes no longer message, and says so by failing the write.
        if payload.len() > 4096 {
            return Ok(Err("E2BIG".to_owned()));
        }
        Ok(self.ask(kind::WRITE, &payload)?.map(drop))
    }

    pub fn remove(&mut self, path: &str) -> Result<Result<(), String>> {
        Ok(self.ask(kind::REMOVE, &[path.as_bytes(), b"\0"].concat())?.map(drop))
    }

    /// Waits until a node has this value, and returns what it has in the end.
    pub fn wait(&mut self, path: &str, wanted: &[u8], limit: Duration) -> Result<Vec<u8>> {
        let end = Instant::now() + limit;
        let watch = [path.as_bytes(), b"\0frontend\0"].concat();
        self.insist(kind::WATCH, &watch)?;
        let found = loop {
            let value = self.read(path)?.unwrap_or_else(String::into_bytes);
            let left = end.saturating_duration_since(Instant::now());
            // What changed since the read is waiting as an event already.
            if value == wanted || !self.event(left)? {
                break value;
            }
        };
        self.insist(kind::UNWATCH, &watch)?;
        Ok(found)
    }

    /// Takes one event of a watch; `false` when none came in time.
    fn event(&mut self, limit: Duration) -> Result<bool> {
        let limit = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(self.device.as_fd(), PollFlags::POLLIN)];
        if poll(&mut fds, limit).context("waiting for a watch")? == 0 {
            return Ok(false);
        }
        self.message().map(|_| true)
    }

    fn insist(&mut self, kind: u32, payload: &[u8]) -> Result<()> {
        match self.ask(kind, payload)? {
            // The watch may fire between two waits, or be gone with its node.
            Ok(_) => Ok(()),
            Err(error) => bail!("xenstore: message {kind}: {error}"),
        }
    }

    fn ask(&mut self, kind: u32, payload: &[u8]) -> Result<Result<Vec<u8>, String>> {
        self.request += 1;
        let header = [kind, self.request, 0, payload.len() as u32];
        let mut message: Vec<u8> = header.iter().flat_map(|word| word.to_le_bytes()).collect();
        message.extend(payload);
        self.device.write_all(&message).context("sending to xenstore")?;
        loop {
            let (answer, request, mut payload) = self.message()?;
            match answer {
                kind::WATCH_EVENT => continue,
                _ => ensure!(request == self.request, "an answer to request {request}, not {}", self.request),
            }
            if answer != kind::ERROR {
                return Ok(Ok(payload));
            }
            payload.retain(|byte| *byte != 0);
            return Ok(Err(String::from_utf8_lossy(&payload).into_owned()));
        }
    }

    fn message(&mut self) -> Result<(u32, u32, Vec<u8>)> {
        let mut header = [0; 16];
        self.device.read_exact(&mut header).context("reading from xenstore")?;
        let word = |index: usize| {
            header[4 * index..].first_chunk().map_or(0, |bytes: &[u8; 4]| u32::from_le_bytes(*bytes))
        };
        let mut payload = vec![0; word(3) as usize];
        self.device.read_exact(&mut payload).context("reading from xenstore")?;
        Ok((word(0), word(1), payload))
    }
}
