//! The harness's end of an agent: commands by number, what they wrote, how they ended.

use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail};

use crate::wire::{Exit, Frame, Kind, Start};

/// How long after a failed write the reader needs to find the cause.
const CAUSE_LIMIT: Duration = Duration::from_secs(15);

type Send = Box<dyn Fn(&Frame) -> Result<()> + std::marker::Send + Sync>;

/// A connection to one agent. The reader of its stream calls [`Link::receive`].
pub(crate) struct Link {
    send: Send,
    next: AtomicU32,
    channels: Mutex<HashMap<u32, Arc<Channel>>>,
    /// Frames about no command in particular: answers to pings, and why the link is dead.
    pub(crate) control: Channel,
}

#[derive(Default)]
pub(crate) struct Captured {
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
    pub(crate) exit: Option<Exit>,
    pub(crate) log: Option<File>,
    pub(crate) pongs: u32,
}

/// What came back for one command.
#[derive(Default)]
pub(crate) struct Channel {
    captured: Mutex<Captured>,
    changed: Condvar,
}

impl Channel {
    pub(crate) fn lock(&self) -> MutexGuard<'_, Captured> {
        self.captured.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `ready` finds something; `None` when the limit has passed.
    pub(crate) fn wait<T>(
        &self,
        limit: Option<Duration>,
        mut ready: impl FnMut(&mut Captured) -> Option<T>,
    ) -> Option<T> {
        let end = limit.map(|limit| Instant::now() + limit);
        let mut captured = self.lock();
        loop {
            if let Some(found) = ready(&mut captured) {
                return Some(found);
            }
            let left = match end {
                Some(end) => end.checked_duration_since(Instant::now())?,
                None => Duration::from_secs(3600),
            };
            captured = self.changed.wait_timeout(captured, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn update(&self, change: impl FnOnce(&mut Captured)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }
}

impl Link {
    pub(crate) fn new(send: impl Fn(&Frame) -> Result<()> + std::marker::Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self {
            send: Box::new(send),
            next: AtomicU32::new(1),
            channels: Mutex::default(),
            control: Channel::default(),
        })
    }

    fn channels(&self) -> MutexGuard<'_, HashMap<u32, Arc<Channel>>> {
        self.channels.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn send(&self, kind: Kind, id: u32, payload: impl Into<Vec<u8>>) -> Result<()> {
        if let Some(exit) = &self.control.lock().exit {
            bail!("{}", exit.why());
        }
        (self.send)(&Frame::new(kind, id, payload)).map_err(|error| {
            // The reader of the other direction finds out why.
            match self.control.wait(Some(CAUSE_LIMIT), |c| c.exit.clone()) {
                Some(exit) => anyhow!("{}", exit.why()),
                None => error,
            }
        })
    }

    /// Whether the agent will say nothing more.
    pub(crate) fn is_dead(&self) -> bool {
        self.control.lock().exit.is_some()
    }

    pub(crate) fn start(self: &Arc<Self>, start: &Start, log: Option<File>) -> Result<Process> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let channel = Arc::new(Channel::default());
        channel.lock().log = log;
        self.channels().insert(id, Arc::clone(&channel));
        let process = Process { link: Arc::clone(self), id, channel, name: start.argv.join(" ") };
        self.send(Kind::START, id, serde_json::to_vec(start)?)?;
        Ok(process)
    }

    /// Takes a frame from the agent.
    pub(crate) fn receive(&self, frame: Frame) {
        if frame.kind == Kind::PONG {
            return self.control.update(|c| c.pongs += 1);
        }
        let Some(channel) = self.channels().get(&frame.id).cloned() else { return };
        channel.update(|captured| match frame.kind {
            Kind::STDOUT => captured.take(&frame.payload, |c| &mut c.stdout),
            Kind::STDERR => captured.take(&frame.payload, |c| &mut c.stderr),
            Kind::EXIT => captured.exit = Some(serde_json::from_slice(&frame.payload).unwrap_or_default()),
            _ => {}
        });
    }

    /// The agent will say nothing more.
    pub(crate) fn dead(&self, why: &str) {
        let exit = Exit { error: Some(why.to_owned()), ..Exit::default() };
        self.control.update(|c| c.exit = Some(exit));
        self.end_all(why);
    }

    /// Another agent has taken the place of the one that ran these commands.
    pub(crate) fn end_all(&self, why: &str) {
        let exit = Exit { error: Some(why.to_owned()), ..Exit::default() };
        for (_, channel) in self.channels().drain() {
            channel.update(|c| _ = c.exit.get_or_insert_with(|| exit.clone()));
        }
    }
}

impl Captured {
    fn take(&mut self, bytes: &[u8], which: impl FnOnce(&mut Self) -> &mut Vec<u8>) {
        which(self).extend(bytes);
        if let Some(log) = &mut self.log {
            // A log that cannot be written must not fail the test.
            _ = log.write_all(bytes);
        }
    }
}

/// A command running inside a machine. Dropping it kills it with its children.
pub struct Process {
    link: Arc<Link>,
    id: u32,
    channel: Arc<Channel>,
    name: String,
}

impl Process {
    /// Sends a signal to its process group.
    pub fn signal(&self, number: i32) -> Result<()> {
        self.link.send(Kind::SIGNAL, self.id, number.to_le_bytes())
    }

    /// Gives it bytes on its standard input (it must have been started with one).
    pub fn write(&self, bytes: &[u8]) -> Result<()> {
        bytes.chunks(32 << 10).try_for_each(|piece| self.link.send(Kind::STDIN, self.id, piece))
    }

    /// Ends its standard input.
    pub fn close_stdin(&self) -> Result<()> {
        self.link.send(Kind::STDIN_END, self.id, "")
    }

    /// How it ended, if it has.
    pub fn ended(&self) -> Option<Exit> {
        self.channel.lock().exit.clone()
    }

    fn why_ended(&self) -> String {
        self.ended().map_or_else(|| "not yet".to_owned(), |exit| exit.why())
    }

    /// Everything it has written so far: standard output, then standard error.
    pub fn output_so_far(&self) -> String {
        let captured = self.channel.lock();
        String::from_utf8_lossy(&[&captured.stdout[..], &captured.stderr[..]].concat()).into_owned()
    }

    /// Waits until it has written this text on either stream.
    pub fn wait_output(&self, text: &str, limit: Duration) -> Result<()> {
        let has = |bytes: &[u8]| bytes.windows(text.len()).any(|w| w == text.as_bytes());
        let found = self.channel.wait(Some(limit), |c| {
            let found = has(&c.stdout) || has(&c.stderr);
            (found || c.exit.is_some()).then_some(found)
        });
        match found {
            Some(true) => Ok(()),
            Some(false) => bail!(
                "{} ended ({}) without saying {text:?}: {}",
                self.name,
                self.why_ended(),
                self.output_so_far()
            ),
            None => bail!("{} did not say {text:?} within {limit:?}: {}", self.name, self.output_so_far()),
        }
    }

    /// Waits until what it has written to its standard output satisfies a condition.
    pub fn wait_for(&self, limit: Duration, holds: impl Fn(&str) -> bool) -> Result<()> {
        let held = self.channel.wait(Some(limit), |c| {
            let held = holds(&String::from_utf8_lossy(&c.stdout));
            (held || c.exit.is_some()).then_some(held)
        });
        match held {
            Some(true) => Ok(()),
            Some(false) => bail!("{} ended ({})", self.name, self.why_ended()),
            None => bail!("{} did not say what was awaited within {limit:?}", self.name),
        }
    }

    /// Waits for its end.
    pub fn wait(&self, limit: Duration) -> Result<Exit> {
        let exit = self.channel.wait(Some(limit), |c| c.exit.clone());
        match exit {
            Some(Exit { error: Some(error), .. }) => bail!("{}: {error}", self.name),
            Some(exit) => Ok(exit),
            None => bail!("{} did not end within {limit:?}; so far: {}", self.name, self.output_so_far()),
        }
    }

    /// What it wrote: standard output and standard error.
    pub(crate) fn captured(&self) -> (Vec<u8>, Vec<u8>) {
        let mut captured = self.channel.lock();
        (std::mem::take(&mut captured.stdout), std::mem::take(&mut captured.stderr))
    }

    /// Waits for more standard output and takes it; `None` at the end.
    pub fn next_output(&self) -> Option<Vec<u8>> {
        self.channel.wait(None, |c| {
            let bytes = std::mem::take(&mut c.stdout);
            (!bytes.is_empty()).then_some(Some(bytes)).or(c.exit.is_some().then_some(None))
        })?
    }

    /// A second hold on the input side, for another thread.
    pub fn writer(&self) -> impl Fn(&[u8]) -> Result<()> + std::marker::Send + Sync + 'static {
        let (link, id) = (Arc::downgrade(&self.link), self.id);
        move |bytes| match link.upgrade() {
            Some(link) => link.send(Kind::STDIN, id, bytes),
            None => bail!("the agent is gone"),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.ended().is_none() {
            // Nothing to kill when the agent itself is gone.
            _ = self.signal(nix::libc::SIGKILL);
        }
        self.link.channels().remove(&self.id);
    }
}
