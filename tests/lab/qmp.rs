//! QEMU's monitor protocol: commands, and events to wait for.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

struct Inner {
    reader: BufReader<UnixStream>,
    events: Vec<Value>,
    partial: Vec<u8>,
}

/// A connection to the monitor.
pub struct Qmp {
    inner: Mutex<Inner>,
}

const LIMIT: Duration = Duration::from_secs(60);

impl Qmp {
    /// Takes the monitor's socket and greets it.
    pub fn new(stream: UnixStream) -> Result<Self> {
        let inner = Inner { reader: BufReader::new(stream), events: Vec::new(), partial: Vec::new() };
        let qmp = Self { inner: Mutex::new(inner) };
        qmp.execute("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// Runs a command and returns what it answers.
    pub fn execute(&self, command: &str, arguments: &Value) -> Result<Value> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let line = format!("{}\n", json!({"execute": command, "arguments": arguments}));
        inner.reader.get_mut().write_all(line.as_bytes()).context("QEMU's monitor is gone")?;
        let end = Instant::now() + LIMIT;
        loop {
            let mut answer =
                inner.next(end).with_context(|| format!("waiting for QEMU's answer to {command}"))?;
            if let Some(error) = answer.get("error") {
                bail!("QEMU refuses {command}: {error}");
            }
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            inner.events.push(answer);
        }
    }

    /// Runs a line of the human monitor and returns its text.
    pub fn human(&self, line: &str) -> Result<String> {
        let answer = self.execute("human-monitor-command", &json!({"command-line": line}))?;
        let text = answer.as_str().unwrap_or_default().replace('\r', "");
        if text.starts_with("Error:") || text.starts_with("unknown command") {
            bail!("QEMU refuses {line:?}: {}", text.trim());
        }
        Ok(text)
    }

    /// Waits for an event (one that came earlier counts once).
    pub fn wait_event(&self, name: &str, limit: Duration) -> Result<Value> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let end = Instant::now() + limit;
        loop {
            if let Some(at) = inner.events.iter().position(|e| e["event"] == name) {
                return Ok(inner.events.remove(at));
            }
            let event = inner.next(end).with_context(|| format!("waiting for QEMU's event {name}"))?;
            inner.events.push(event);
        }
    }
}

impl Inner {
    fn next(&mut self, end: Instant) -> Result<Value> {
        let left = end.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        self.reader.get_ref().set_read_timeout(Some(left))?;
        // A read cut short by its limit keeps what it got for the next one.
        let n = self.reader.read_until(b'\n', &mut self.partial)?;
        if n == 0 {
            bail!("QEMU closed its monitor");
        }
        serde_json::from_slice(&std::mem::take(&mut self.partial)).context("reading QEMU's answer")
    }
}
