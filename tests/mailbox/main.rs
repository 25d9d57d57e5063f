//! A program for guests: the mailbox of a VF or PF, through its config space in sysfs and with nothing of xpci's. The numbers are those of
//! docs/mailbox.md.
//!
//! `mailbox FUNCTION discover` lists the types of objects; `send VF TYPE SEQUENCE TEXT` sends a message and prints its status; `receive` waits
//! for a message and prints it. `write WORD...` writes dwords of an object, `go` and `abort` do what DOE Control has, and `read` prints a
//! response; so a transfer can stop anywhere. FUNCTION is its address in the guest: 0000:00:00.0.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

/// The extended capability (PCI Express 6.0, section 7.9.24) and its registers.
const DOE: u32 = 0x2e;
const CONTROL: u64 = 0x08;
const STATUS: u64 = 0x0c;
const WRITE_DATA: u64 = 0x10;
const READ_DATA: u64 = 0x14;
const ABORT: u32 = 1;
const GO: u32 = 1 << 31;
const READY: u32 = 1 << 31;
const ERROR: u32 = 1 << 2;

const DISCOVER: u32 = 1;
const SEND: u32 = 0x5853 | 1 << 16;
const RECEIVE: u32 = 0x5853 | 2 << 16;

/// How long a message is waited for.
const LIMIT: Duration = Duration::from_secs(60);

struct Mailbox {
    config: File,
    at: u64,
}

impl Mailbox {
    fn find(function: &str) -> Result<Self> {
        let path = format!("/sys/bus/pci/devices/{function}/config");
        let config = OpenOptions::new().read(true).write(true).open(&path).with_context(|| path.clone())?;
        let mut mailbox = Self { config, at: 0 };
        let (mut at, mut others) = (0x100, Vec::new());
        // Each capability takes at least 8 bytes.
        for _ in 0..0xf00 / 8 {
            let header = mailbox.read(at)?;
            if header & 0xffff == DOE {
                mailbox.at = at;
                return Ok(mailbox);
            }
            others.push(format!("{header:08x} at {at:#x}"));
            at = u64::from(header >> 20);
            if at == 0 {
                break;
            }
        }
        bail!("{function} has no Data Object Exchange, only {}", others.join(", "))
    }

    fn read(&self, register: u64) -> Result<u32> {
        let mut bytes = [0; 4];
        self.config.read_exact_at(&mut bytes, self.at + register)?;
        Ok(u32::from_le_bytes(bytes))
    }

    fn write(&self, register: u64, value: u32) -> Result<()> {
        Ok(self.config.write_all_at(&value.to_le_bytes(), self.at + register)?)
    }

    fn put(&self, words: &[u32]) -> Result<()> {
        words.iter().try_for_each(|word| self.write(WRITE_DATA, *word))
    }

    /// Reads the response; empty where there is none.
    fn response(&self) -> Result<Vec<u32>> {
        let mut words = Vec::new();
        loop {
            let status = self.read(STATUS)?;
            ensure!(status & ERROR == 0, "DOE Error");
            if status & READY == 0 {
                return Ok(words);
            }
            words.push(self.read(READ_DATA)?);
            self.write(READ_DATA, 0)?;
        }
    }

    fn exchange(&self, kind: u32, payload: &[u32]) -> Result<Vec<u32>> {
        self.put(&[kind, payload.len() as u32 + 2])?;
        self.put(payload)?;
        self.write(CONTROL, GO)?;
        let response = self.response()?;
        ensure!(response.len() >= 3 && response[0] == kind, "the response to {kind:x} is {response:x?}");
        ensure!(response[1] as usize == response.len(), "its length: {response:x?}");
        Ok(response[2..].to_vec())
    }

    fn discover(&self) -> Result<()> {
        let mut index = 0;
        loop {
            let found = self.exchange(DISCOVER, &[index])?[0];
            println!("{:04x}:{:02x}", found & 0xffff, found >> 16 & 0xff);
            index = found >> 24;
            if index == 0 {
                return Ok(());
            }
        }
    }

    fn send(&self, vf: u32, kind: u32, sequence: u32, text: &str) -> Result<()> {
        let mut payload = vec![kind | vf << 16, sequence, text.len() as u32];
        payload.extend(text.as_bytes().chunks(4).map(|bytes| {
            let mut word = [0; 4];
            word[..bytes.len()].copy_from_slice(bytes);
            u32::from_le_bytes(word)
        }));
        let response = self.exchange(SEND, &payload)?;
        println!("status {}", response[0]);
        Ok(())
    }

    fn receive(&self) -> Result<()> {
        let began = Instant::now();
        loop {
            match self.exchange(RECEIVE, &[])?[..] {
                [0, first, sequence, bytes, ref data @ ..] => {
                    let data: Vec<u8> = data.iter().flat_map(|word| word.to_le_bytes()).collect();
                    let data = data.get(..bytes as usize).context("more bytes than data")?;
                    let (kind, vf) = (first & 0xffff, first >> 16);
                    println!("vf {vf} type {kind} sequence {sequence} {}", String::from_utf8_lossy(data));
                    return Ok(());
                }
                // There is none, or nobody is there yet.
                [1 | 3] => ensure!(began.elapsed() < LIMIT, "no message has come"),
                ref other => bail!("received {other:x?}"),
            }
            sleep(Duration::from_millis(50));
        }
    }
}

fn number(text: &str) -> Result<u32> {
    let (digits, radix) = text.strip_prefix("0x").map_or((text, 10), |digits| (digits, 16));
    u32::from_str_radix(digits, radix).with_context(|| text.to_owned())
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let [function, command, rest @ ..] = &arguments[..] else { bail!("which function, and what?") };
    let mailbox = Mailbox::find(function)?;
    match (*command, rest) {
        ("discover", []) => mailbox.discover(),
        ("send", [vf, kind, sequence, text]) => {
            mailbox.send(number(vf)?, number(kind)?, number(sequence)?, text)
        }
        ("receive", []) => mailbox.receive(),
        ("write", words) => {
            mailbox.put(&words.iter().map(|word| number(word)).collect::<Result<Vec<u32>>>()?)
        }
        ("go", []) => mailbox.write(CONTROL, GO),
        ("abort", []) => mailbox.write(CONTROL, ABORT),
        ("read", []) => {
            let words: Vec<String> = mailbox.response()?.iter().map(|word| format!("{word:08x}")).collect();
            println!("{}", words.join(" "));
            Ok(())
        }
        _ => bail!("what is '{command}' with {} words?", rest.len()),
    }
}
