//! Asking a guest's device model, over QMP, which slots it uses.
//!
//! The device model is QEMU, which a guest may have taken over: its answer is bounded in bytes and, as a whole, in time.

use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt::SendTimeout,
};
use nix::sys::time::{TimeVal, TimeValLike};
use serde_json::Value;

use crate::platform::Cause;
use crate::{DeviceNumber, DomId};

/// How long the whole conversation may take.
const LIMIT: Duration = Duration::from_secs(5);
/// How much the device model may say in it, in bytes: `query-pci` of 32 devices is some 20 KiB.
const SIZE_LIMIT: usize = 1 << 20;

/// QEMU's answer to QMP's `query-pci`: the device numbers on bus 0.
pub fn ask_device_model(domain: DomId) -> Result<Vec<DeviceNumber>, Cause> {
    // The first is for statistics and nearly always free; at the second libxl itself connects, for each of its commands.
    let paths = ["qmp-libxenstat", "qmp-libxl"].map(|name| format!("/run/xen/{name}-{domain}"));
    let stream = paths
        .iter()
        .find_map(|path| open(Path::new(path), LIMIT).ok())
        .ok_or_else(|| Cause::Unavailable(format!("no process listens at {} or {}", paths[0], paths[1])))?;
    Conversation::new(stream, LIMIT).slots()
}

/// Connects, within the limit: a process that accepts no connections leaves clients waiting in the queue.
fn open(path: &Path, limit: Duration) -> io::Result<UnixStream> {
    let descriptor: OwnedFd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    let limit = TimeVal::milliseconds(limit.as_millis() as i64);
    setsockopt(&descriptor, SendTimeout, &limit)?;
    connect(descriptor.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(descriptor.into())
}

struct Conversation {
    stream: UnixStream,
    limit: Duration,
    deadline: Instant,
    /// What has come of the next line.
    pending: Vec<u8>,
    received: usize,
}

impl Conversation {
    fn new(stream: UnixStream, limit: Duration) -> Self {
        Self { stream, limit, deadline: Instant::now() + limit, pending: Vec::new(), received: 0 }
    }

    fn slots(mut self) -> Result<Vec<DeviceNumber>, Cause> {
        self.answer("QMP")?;
        self.say(b"{\"execute\":\"qmp_capabilities\"}\n")?;
        self.answer("return")?;
        self.say(b"{\"execute\":\"query-pci\"}\n")?;
        let buses = self.answer("return")?;
        slots_of(&buses).ok_or_else(|| Cause::Malformed("query-pci lists no bus 0".to_owned()))
    }

    /// What is left of the time.
    fn left(&self) -> Result<Duration, Cause> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(Cause::TimedOut(self.limit)) } else { Ok(left) }
    }

    /// An error of the stream, in which a time-out is the whole conversation's.
    fn failed(&self, error: io::Error) -> Cause {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Cause::TimedOut(self.limit),
            _ => error.into(),
        }
    }

    fn say(&mut self, line: &[u8]) -> Result<(), Cause> {
        self.stream.set_write_timeout(Some(self.left()?))?;
        self.stream.write_all(line).map_err(|error| self.failed(error))
    }

    /// The next line, without its end.
    fn line(&mut self) -> Result<Vec<u8>, Cause> {
        let mut looked_at = 0;
        loop {
            if let Some(end) = self.pending[looked_at..].iter().position(|byte| *byte == b'\n') {
                let rest = self.pending.split_off(looked_at + end + 1);
                return Ok(std::mem::replace(&mut self.pending, rest));
            }
            looked_at = self.pending.len();
            self.stream.set_read_timeout(Some(self.left()?))?;
            let mut bytes = [0; 4096];
            let count = match self.stream.read(&mut bytes) {
                Ok(0) => return Err(Cause::Missing),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(self.failed(error)),
            };
            self.received += count;
            if self.received > SIZE_LIMIT {
                return Err(Cause::Malformed(format!("its answer has more than {SIZE_LIMIT} bytes")));
            }
            self.pending.extend_from_slice(&bytes[..count]);
        }
    }

    /// What the next line with this key has there. Lines with events are passed over.
    fn answer(&mut self, key: &str) -> Result<Value, Cause> {
        loop {
            let line = self.line()?;
            let mut value: Value =
                serde_json::from_slice(&line).map_err(|error| Cause::Malformed(error.to_string()))?;
            if let Some(found) = value.get_mut(key) {
                return Ok(found.take());
            }
            if let Some(error) = value.get("error") {
                return Err(Cause::Malformed(error.to_string()));
            }
        }
    }
}

fn slots_of(buses: &Value) -> Option<Vec<DeviceNumber>> {
    let root = buses.as_array()?.iter().find(|bus| bus["bus"] == 0)?;
    let slots = root["devices"].as_array()?.iter().map(|device| device["slot"].as_u64());
    slots.map(|slot| DeviceNumber::new(u8::try_from(slot?).ok()?)).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::thread;

    use super::*;

    /// Talks to a device model that says this, each part as soon as it can be written, and then stays silent.
    fn asked(
        said: impl Iterator<Item = Vec<u8>> + Send + 'static,
        limit: Duration,
    ) -> Result<Vec<DeviceNumber>, Cause> {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let model = thread::spawn(move || {
            // The client may close the connection early.
            for part in said {
                if theirs.write_all(&part).is_err() {
                    return;
                }
            }
            let _ = theirs.read_to_end(&mut Vec::new());
        });
        let answer = Conversation::new(ours, limit).slots();
        model.join().unwrap();
        answer
    }

    const LONG: Duration = Duration::from_secs(60);
    const GREETING: &str = "{\"QMP\":{}}\n{\"event\":\"RESUME\"}\n{\"return\":{}}\n";

    #[test]
    fn a_device_model_tells_which_slots_it_uses() {
        let answer = "{\"return\":[{\"bus\":0,\"devices\":[{\"slot\":0},{\"slot\":3}]}]}\n";
        let said = format!("{GREETING}{answer}").into_bytes();
        // However it comes in pieces.
        let bytes = said.clone().into_iter().map(|byte| vec![byte]);
        let slots = [0, 3].map(|slot| DeviceNumber::new(slot).unwrap());
        assert_eq!(asked(bytes, LONG).unwrap(), slots);
        assert_eq!(asked(std::iter::once(said), LONG).unwrap(), slots);
    }

    #[test]
    fn an_answer_without_end_is_refused_when_it_is_too_long() {
        let endless = std::iter::repeat(vec![b' '; 65536]);
        assert!(matches!(asked(endless, LONG), Err(Cause::Malformed(_))));
        let events = std::iter::repeat(b"{\"event\":\"STOP\"}\n".repeat(1024));
        assert!(matches!(asked(events, LONG), Err(Cause::Malformed(_))));
    }

    #[test]
    fn one_that_says_a_little_again_and_again_has_no_more_time_than_a_silent_one() {
        let limit = Duration::from_millis(200);
        let trickle = std::iter::repeat_with(|| {
            thread::sleep(Duration::from_millis(20));
            vec![b' ']
        });
        assert!(matches!(asked(trickle, limit), Err(Cause::TimedOut(_))));
        assert!(matches!(asked(std::iter::empty(), limit), Err(Cause::TimedOut(_))));
    }

    #[test]
    fn a_process_that_accepts_nobody_does_not_keep_the_service_waiting() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("qmp");
        let _listener = UnixListener::bind(&path).unwrap();
        let mut waiting = Vec::new();
        // The queue has room for some.
        let full = (0..100_000).find_map(|_| match open(&path, Duration::from_millis(50)) {
            Ok(stream) => {
                waiting.push(stream);
                None
            }
            Err(error) => Some(error),
        });
        assert!(full.is_some());
    }

    #[test]
    fn the_device_models_slots_are_those_of_bus_0() {
        let answer = serde_json::json!([
            {"bus": 0, "devices": [{"slot": 0, "function": 0}, {"slot": 1, "function": 3}, {"slot": 4}]},
            {"bus": 1, "devices": [{"slot": 9}]},
        ]);
        assert_eq!(slots_of(&answer), [0, 1, 4].map(DeviceNumber::new).into_iter().collect());
        for malformed in [serde_json::json!([]), serde_json::json!([{"bus": 0, "devices": [{"slot": 32}]}])] {
            assert_eq!(slots_of(&malformed), None, "{malformed}");
        }
    }
}
