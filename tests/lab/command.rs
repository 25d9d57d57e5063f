//! Running a command inside a machine and looking at how it ended.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::link::Link;
use crate::wire::{Exit, Start};

/// Commands that say nothing else get this long.
pub const DEFAULT_LIMIT: Duration = Duration::from_secs(60);

/// A shell command to be run.
#[must_use = "a command does nothing until it is run"]
pub struct Command {
    link: Result<Arc<Link>>,
    script: String,
    limit: Duration,
    input: Option<Vec<u8>>,
}

impl Command {
    pub(crate) fn new(link: Result<Arc<Link>>, script: &str) -> Self {
        Self { link, script: script.to_owned(), limit: DEFAULT_LIMIT, input: None }
    }

    /// Another limit than [`DEFAULT_LIMIT`].
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Bytes for its standard input.
    pub fn input(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.input = Some(bytes.into());
        self
    }

    /// Runs it to its end, with any exit status. Errors: it did not start, or its time was up.
    pub fn run(self) -> Result<Output> {
        let start = Start {
            argv: vec!["/bin/sh".into(), "-c".into(), self.script.clone()],
            limit_ms: Some(self.limit.as_millis() as u64),
            terminal: None,
            stdin: self.input.is_some(),
        };
        let process = self.link?.start(&start, None)?;
        if let Some(input) = &self.input {
            process.write(input)?;
            process.close_stdin()?;
        }
        // The agent keeps the limit; the time on top is for the way there and back.
        let exit = process
            .wait(self.limit + Duration::from_secs(30))
            .with_context(|| format!("running {}", self.script))?;
        let (stdout, stderr) = process.captured();
        let output = Output { script: self.script, exit, bytes: stdout, errors: stderr };
        if output.exit.timed_out {
            bail!("not done within {:?}: {}", self.limit, output.describe());
        }
        Ok(output)
    }

    /// Runs it, insists on status 0 and returns its standard output.
    pub fn ok(self) -> Result<String> {
        self.run()?.ok()
    }
}

/// A command that has ended.
#[derive(Debug, Clone)]
pub struct Output {
    script: String,
    exit: Exit,
    /// Its standard output.
    pub bytes: Vec<u8>,
    /// Its standard error.
    pub errors: Vec<u8>,
}

impl Output {
    /// Exit status; as in a shell, 128 + N for signal N.
    pub fn status(&self) -> i32 {
        self.exit.code.unwrap_or_else(|| 128 + self.exit.signal.unwrap_or(0))
    }

    /// Standard output as text.
    pub fn stdout(&self) -> String {
        String::from_utf8_lossy(&self.bytes).into_owned()
    }

    /// Standard error as text.
    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&self.errors).into_owned()
    }

    /// Insists on status 0; the error has all it wrote.
    pub fn ok(self) -> Result<String> {
        if self.status() != 0 {
            bail!("status {}: {}", self.status(), self.describe());
        }
        Ok(self.stdout())
    }

    fn describe(&self) -> String {
        format!("{}\n--- stdout\n{}\n--- stderr\n{}", self.script, self.stdout(), self.stderr())
    }
}
