//! Conversations with a guest's device model over QMP.
//!
//! The device model is QEMU, which a guest may have taken over: what it says is bounded in bytes and, as a whole, in time.

use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt::SendTimeout,
};
use nix::sys::time::{TimeVal, TimeValLike};
use serde_json::{Value, json};

use crate::DomId;
use crate::platform::Cause;

/// How long a whole conversation may take. QEMU listens to one client at a time, so others may have to wait for it.
const LIMIT: Duration = Duration::from_secs(5);
/// How much the device model may say in it, in bytes: `query-pci` of 32 devices is some 20 KiB.
const SIZE_LIMIT: usize = 1 << 20;
/// How much of a refusal is repeated, in characters.
const REASON: usize = 200;

/// Where the device model of a domain listens. The first is for statistics and nearly always free; at the second libxl itself connects, for
/// each of its commands.
fn sockets(domain: DomId) -> [String; 2] {
    ["qmp-libxenstat", "qmp-libxl"].map(|name| format!("/run/xen/{name}-{domain}"))
}

/// Connects to the device model of a domain.
pub fn connect_to(domain: DomId) -> Result<Conversation, Cause> {
    connect_at(&sockets(domain), LIMIT)
}

/// Connects to the device model of a domain, for a conversation that ends within this limit, connecting included.
pub fn connect_within(domain: DomId, limit: Duration) -> Result<Conversation, Cause> {
    connect_until(&sockets(domain), limit)
}

/// The same at these sockets. To be greeted, each gets an equal share of what is left of the time, the conversation all of it.
fn connect_until(paths: &[String], limit: Duration) -> Result<Conversation, Cause> {
    let deadline = Instant::now() + limit;
    let mut outcome = Err(Cause::TimedOut(limit));
    for (path, sockets) in paths.iter().zip((1..=paths.len() as u32).rev()) {
        let begun = begin_at(
            Path::new(path),
            Instant::now() + deadline.saturating_duration_since(Instant::now()) / sockets,
        );
        outcome = begun.map(|begun| Conversation { limit, deadline, ..begun });
        if outcome.is_ok() {
            break;
        }
    }
    outcome
}

fn begin_at(path: &Path, deadline: Instant) -> Result<Conversation, Cause> {
    let left = || deadline.saturating_duration_since(Instant::now());
    let limit = left();
    // To the kernel, 0 is no limit.
    if limit.as_millis() == 0 {
        return Err(Cause::TimedOut(limit));
    }
    let stream = open(path, limit)?;
    Conversation::begin(stream, left())
}

/// Connects to the first of these sockets at which QEMU is free to talk.
fn connect_at(paths: &[String], limit: Duration) -> Result<Conversation, Cause> {
    let mut busy = None;
    for stream in paths.iter().filter_map(|path| open(Path::new(path), limit).ok()) {
        match Conversation::begin(stream, limit) {
            Ok(begun) => return Ok(begun),
            Err(cause) => busy = Some(cause),
        }
    }
    Err(busy.unwrap_or_else(|| Cause::Unavailable(format!("no process listens at {}", paths.join(" or ")))))
}

/// Connects, within the limit: a process that accepts no connections leaves clients waiting in the queue.
fn open(path: &Path, limit: Duration) -> io::Result<UnixStream> {
    let descriptor: OwnedFd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    let limit = TimeVal::milliseconds(limit.as_millis() as i64);
    setsockopt(&descriptor, SendTimeout, &limit)?;
    connect(descriptor.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(descriptor.into())
}

/// What the device model does not do.
#[derive(Debug)]
pub struct Refused {
    /// Whether it has no such device.
    pub is_missing: bool,
    /// Its reason, shortened, without control characters.
    pub why: String,
}

/// A connection in command mode.
pub struct Conversation {
    stream: UnixStream,
    limit: Duration,
    deadline: Instant,
    /// What has come of the next line.
    pending: Vec<u8>,
    received: usize,
}

impl Conversation {
    pub fn begin(stream: UnixStream, limit: Duration) -> Result<Self, Cause> {
        let deadline = Instant::now() + limit;
        let mut begun = Self { stream, limit, deadline, pending: Vec::new(), received: 0 };
        begun.answer("QMP")?.map_err(Refused::into_cause)?;
        begun.ask("qmp_capabilities", &json!({}))?;
        Ok(begun)
    }

    /// Has a command carried out.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Result<Result<Value, Refused>, Cause> {
        self.say(format!("{}\n", json!({"execute": command, "arguments": arguments})).as_bytes())?;
        self.answer("return")
    }

    /// Has a command carried out that is always possible.
    pub fn ask(&mut self, command: &str, arguments: &Value) -> Result<Value, Cause> {
        self.execute(command, arguments)?.map_err(Refused::into_cause)
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
    fn answer(&mut self, key: &str) -> Result<Result<Value, Refused>, Cause> {
        loop {
            let line = self.line()?;
            let mut value = parsed(&line)?;
            if let Some(found) = value.get_mut(key) {
                return Ok(Ok(found.take()));
            }
            if let Some(error) = value.get("error") {
                return Ok(Err(Refused::of(error)));
            }
        }
    }
}

fn parsed(line: &[u8]) -> Result<Value, Cause> {
    serde_json::from_slice(line).map_err(|error| Cause::Malformed(error.to_string()))
}

impl Refused {
    fn of(error: &Value) -> Self {
        let text = error["desc"].as_str().map_or_else(|| error.to_string(), str::to_owned);
        let why = text.chars().filter(|char| !char.is_control()).take(REASON).collect();
        Self { is_missing: error["class"] == "DeviceNotFound", why }
    }

    pub fn into_cause(self) -> Cause {
        Cause::Unavailable(format!("QEMU refuses it: {}", self.why))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::thread;

    use super::*;

    /// Asks a device model that says this, each part as soon as it can be written, and then stays silent.
    fn asked(said: impl Iterator<Item = Vec<u8>> + Send + 'static, limit: Duration) -> Result<Value, Cause> {
        told(said, limit, |conversation| conversation.ask("query-pci", &json!({})))
    }

    fn told<T>(
        said: impl Iterator<Item = Vec<u8>> + Send + 'static,
        limit: Duration,
        what: impl FnOnce(&mut Conversation) -> Result<T, Cause>,
    ) -> Result<T, Cause> {
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
        let answer = Conversation::begin(ours, limit).and_then(|mut begun| what(&mut begun));
        model.join().unwrap();
        answer
    }

    const LONG: Duration = Duration::from_secs(60);
    const GREETING: &str = "{\"QMP\":{}}\n{\"event\":\"RESUME\"}\n{\"return\":{}}\n";

    #[test]
    fn an_answer_is_understood_however_it_comes_in_pieces() {
        let answer = "{\"return\":[{\"bus\":0}]}\n";
        let said = format!("{GREETING}{answer}").into_bytes();
        let bytes = said.clone().into_iter().map(|byte| vec![byte]);
        assert_eq!(asked(bytes, LONG).unwrap(), json!([{"bus": 0}]));
        assert_eq!(asked(std::iter::once(said), LONG).unwrap(), json!([{"bus": 0}]));
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
    fn another_client_at_the_first_socket_leaves_the_second() {
        let directory = tempfile::tempdir().unwrap();
        let paths = ["one", "two"].map(|name| directory.path().join(name).display().to_string());
        assert!(matches!(connect_at(&paths, LONG), Err(Cause::Unavailable(_))));
        let (_busy, free) = (UnixListener::bind(&paths[0]).unwrap(), UnixListener::bind(&paths[1]).unwrap());
        let model = thread::spawn(move || {
            let (mut stream, _) = free.accept().unwrap();
            stream.write_all(GREETING.as_bytes()).unwrap();
            let _ = stream.read_to_end(&mut Vec::new());
        });
        // The first never answers; what that costs is the limit.
        assert!(connect_at(&paths, Duration::from_secs(1)).is_ok());
        model.join().unwrap();
    }

    #[test]
    fn a_short_conversation_ends_in_time_however_many_sockets_are_busy() {
        let directory = tempfile::tempdir().unwrap();
        let paths = ["one", "two"].map(|name| directory.path().join(name).display().to_string());
        let limit = Duration::from_secs(2);
        let _busy = paths.each_ref().map(|path| UnixListener::bind(path).unwrap());
        let begun = Instant::now();
        assert!(matches!(connect_until(&paths, limit), Err(Cause::TimedOut(_))));
        // Each socket alone would take that long.
        assert!(begun.elapsed() < limit * 3 / 2, "{:?}", begun.elapsed());
    }

    #[test]
    fn a_short_conversation_has_the_time_that_connecting_has_left() {
        let directory = tempfile::tempdir().unwrap();
        let paths = ["one", "two"].map(|name| directory.path().join(name).display().to_string());
        let (_busy, free) = (UnixListener::bind(&paths[0]).unwrap(), UnixListener::bind(&paths[1]).unwrap());
        let model = thread::spawn(move || {
            let (mut stream, _) = free.accept().unwrap();
            stream.write_all(GREETING.as_bytes()).unwrap();
            let _ = stream.read_to_end(&mut Vec::new());
        });
        let limit = Duration::from_secs(4);
        let begun = Instant::now();
        let mut conversation = connect_until(&paths, limit).unwrap();
        assert!(matches!(conversation.ask("query-pci", &json!({})), Err(Cause::TimedOut(_))));
        assert!((limit..limit * 2).contains(&begun.elapsed()), "{:?}", begun.elapsed());
        drop(conversation);
        model.join().unwrap();
    }

    #[test]
    fn a_refusal_is_shortened_and_printable() {
        let refused = format!(
            "{GREETING}{{\"error\":{{\"class\":\"DeviceNotFound\",\"desc\":\"no \\u001b[2J{}\"}}}}\n",
            "x".repeat(1000)
        );
        let refused = told(std::iter::once(refused.into_bytes()), LONG, |model| {
            model.execute("device_del", &json!({"id": "one"}))
        });
        let refused = refused.unwrap().unwrap_err();
        assert!(refused.is_missing && refused.why.starts_with("no [2Jxx"), "{refused:?}");
        assert_eq!(refused.why.chars().count(), REASON);
    }
}
