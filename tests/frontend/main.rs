//! A PCI frontend without any knowledge of PCI, for a guest in which xen-pcifront is not loaded: it reads orders, one a line, and
//! prints what came back, one line for each. What to ask and what should be answered is known outside.
//!
//! ```text
//! r OFFSET SIZE                  read config space of 00:00.0       -> ERROR VALUE
//! w OFFSET SIZE VALUE            write it                           -> ERROR VALUE
//! op COMMAND SEGMENT BUS DEVFN OFFSET SIZE VALUE INFO [ENTRY...]    -> ERROR VALUE [VECTOR...]
//! poke WORD VALUE                change a word of the page          -> ok
//! peek WORD                      look at it                         -> VALUE
//! kick                           send dom0 an event                 -> ok
//! answer                         wait until no request is active    -> ERROR VALUE
//! node KEY HEX                   write a node of the frontend       -> ok, or xenstore's error
//! gone KEY                       remove one (`.`: the directory)    -> ok, or xenstore's error
//! ring                           share a page, make a port          -> GRANT PORT
//! publish                        name both, and the protocol        -> ok
//! await STATE MILLISECONDS       wait for the backend's state       -> the state in the end
//! say TEXT                       -> TEXT
//! ```
//!
//! Numbers of requests and answers are hexadecimal, errors decimal. The ring is made by `ring`, or when it is first needed.

mod ring;
mod xenstore;

use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};

use ring::{Answer, Request, Ring};
use xenstore::Store;

const DIRECTORY: &str = "device/pci/0";

fn main() -> Result<()> {
    let mut store = Store::open()?;
    let backend = store.read(&format!("{DIRECTORY}/backend"))?;
    let backend = backend.map_err(|error| anyhow!("no backend: {error}"))?;
    let backend = String::from_utf8_lossy(&backend).into_owned();
    let mut frontend = Frontend { store, backend, ring: None };
    let (mut input, mut out) = (BufReader::new(io::stdin().lock()), BufWriter::new(io::stdout().lock()));
    let mut line = String::new();
    while input.read_line(&mut line).context("reading the orders")? > 0 {
        let words: Vec<&str> = line.split_whitespace().collect();
        // What was answered before is still written when this one fails: it shows what led to that.
        let answer = frontend.obey(&words).with_context(|| line.clone())?;
        writeln!(out, "{answer}")?;
        if input.buffer().is_empty() {
            // The sender of the orders may wait for the answer.
            out.flush()?;
        }
        line.clear();
    }
    Ok(out.flush()?)
}

struct Frontend {
    store: Store,
    /// Where the backend's nodes are; known even after the frontend's are gone.
    backend: String,
    ring: Option<Ring>,
}

impl Frontend {
    fn ring(&mut self) -> Result<&mut Ring> {
        if self.ring.is_none() {
            self.ring = Some(Ring::new()?);
        }
        self.ring.as_mut().context("no ring")
    }

    fn obey(&mut self, words: &[&str]) -> Result<String> {
        match words {
            ["r", offset, size] => self.ask(&["0", "0", "0", "0", offset, size, "0", "0"]),
            ["w", offset, size, value] => self.ask(&["1", "0", "0", "0", offset, size, value, "0"]),
            ["op", fields @ ..] => self.ask(fields),
            ["poke", index, value] => {
                let (index, value) = (number(index)?, number(value)?);
                self.ring()?.poke(index as usize, value).map(|()| "ok".to_owned())
            }
            ["peek", index] => {
                let index = number(index)?;
                self.ring()?.peek(index as usize).map(|value| format!("{value:x}"))
            }
            ["kick"] => self.ring()?.notify().map(|()| "ok".to_owned()),
            ["answer"] => self.ring()?.answer(0).map(shown),
            ["node", key] => self.node(key, b""),
            ["node", key, value] => self.node(key, &bytes(value)?),
            ["gone", "."] => Ok(said(self.store.remove(DIRECTORY)?)),
            ["gone", key] => Ok(said(self.store.remove(&format!("{DIRECTORY}/{key}"))?)),
            ["ring"] => self.ring().map(|ring| format!("{} {}", ring.grant, ring.port)),
            ["publish"] => self.publish(),
            ["await", state, limit] => self.wait(state, limit.parse()?),
            ["say", words @ ..] => Ok(words.join(" ")),
            _ => bail!("no order"),
        }
    }

    fn ask(&mut self, words: &[&str]) -> Result<String> {
        let numbers: Vec<u32> = words.iter().map(|word| number(word)).collect::<Result<_>>()?;
        let (fields, entries) = numbers.split_first_chunk().context("too few numbers")?;
        let entries: Vec<u16> = entries.iter().map(|entry| *entry as u16).collect();
        self.ring()?.ask(&Request { fields: *fields, entries: &entries }).map(shown)
    }

    fn node(&mut self, key: &str, value: &[u8]) -> Result<String> {
        self.store.write(&format!("{DIRECTORY}/{key}"), value).map(said)
    }

    fn publish(&mut self) -> Result<String> {
        let ring = self.ring()?;
        let nodes = [("pci-op-ref", ring.grant.to_string()), ("event-channel", ring.port.to_string())];
        for (key, value) in nodes.into_iter().chain([("magic", "7".to_owned())]) {
            let written = self.node(key, value.as_bytes())?;
            if written != "ok" {
                bail!("{key}: {written}");
            }
        }
        Ok("ok".to_owned())
    }

    fn wait(&mut self, state: &str, milliseconds: u64) -> Result<String> {
        let path = format!("{}/state", self.backend);
        let found = self.store.wait(&path, state.as_bytes(), Duration::from_millis(milliseconds))?;
        Ok(String::from_utf8_lossy(&found).into_owned())
    }
}

fn said(outcome: Result<(), String>) -> String {
    outcome.err().unwrap_or_else(|| "ok".to_owned())
}

fn shown(answer: Answer) -> String {
    let vectors: String = answer.vectors.iter().map(|vector| format!(" {vector:x}")).collect();
    format!("{} {:x}{vectors}", answer.error, answer.value)
}

fn number(hex: &str) -> Result<u32> {
    Ok(u32::from_str_radix(hex, 16)?)
}

fn bytes(hex: &str) -> Result<Vec<u8>> {
    let digits = hex.as_bytes().chunks(2).map(|pair| std::str::from_utf8(pair).unwrap_or_default());
    digits.map(|pair| Ok(u8::from_str_radix(pair, 16)?)).collect()
}
