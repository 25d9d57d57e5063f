//! Orders for the frontend in the guest, and the answers that are expected.

use std::fmt::Display;
use std::io::{Read, Write};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use xpci_tests::host::SOON;
use xpci_tests::host::frontend::{CONNECT, PROGRAM, Step, hex};
use xpci_tests::{Guest, Process};

const LEAVE: [Step; 2] = [Step::Go(6), Step::Await(3)];

/// A long list of orders for a frontend that connects, carries them out and leaves again.
pub struct Script {
    orders: Vec<String>,
    answers: Vec<String>,
}

impl Script {
    pub fn new() -> Self {
        let mut script = Self { orders: Vec::new(), answers: Vec::new() };
        script.steps(&CONNECT);
        script
    }

    fn steps(&mut self, steps: &[Step]) {
        for (order, answer) in steps.iter().copied().map(Step::order) {
            self.say(order, answer);
        }
    }

    pub fn say(&mut self, order: impl Display, answer: impl Display) {
        self.orders.push(order.to_string());
        self.answers.push(answer.to_string());
    }

    /// Carries it out, and insists on every answer.
    pub fn run(mut self, guest: &Guest<'_>, what: &str) -> Result<()> {
        self.steps(&LEAVE);
        let answers = run(guest, &self.orders, what)?;
        for (index, (got, wanted)) in answers.iter().zip(&self.answers).enumerate() {
            let before = self.orders[index.saturating_sub(4)..index].join("; ");
            let order = &self.orders[index];
            ensure!(
                got == wanted,
                "{what}: order {index}, '{order}', is answered '{got}', not '{wanted}'; before it: {before}"
            );
        }
        ensure!(answers.len() == self.orders.len(), "{what}: {} answers", answers.len());
        Ok(())
    }
}

/// Both ways are compressed: a guest's console is slow.
fn run(guest: &Guest<'_>, orders: &[String], what: &str) -> Result<Vec<String>> {
    let mut input = GzEncoder::new(Vec::new(), Compression::default());
    for order in orders {
        writeln!(input, "{order}")?;
    }
    let begun = Instant::now();
    let command = format!("set -o pipefail; gunzip | {PROGRAM} | gzip");
    let output = guest.run(&command).input(input.finish()?).limit(SOON * 5).run()?;
    let mut text = String::new();
    GzDecoder::new(&output.bytes[..]).read_to_string(&mut text).with_context(|| output.stderr())?;
    let answers: Vec<String> = text.lines().map(str::to_owned).collect();
    if output.status() != 0 {
        // The answers until then show more than the status.
        let last = answers.last().cloned().unwrap_or_default();
        output.ok().with_context(|| format!("{what}: after {} answers, {last}", answers.len()))?;
    }
    println!("  {what}: {} orders in {:.1} s", orders.len(), begun.elapsed().as_secs_f32());
    Ok(answers)
}

/// A frontend that carries out one order after the other.
pub struct Frontend {
    process: Process,
    told: usize,
    heard: usize,
}

impl Frontend {
    pub fn start(guest: &Guest<'_>) -> Result<Self> {
        Ok(Self { process: guest.converse(PROGRAM)?, told: 0, heard: 0 })
    }

    /// Gives an order and returns the answer.
    pub fn tell(&mut self, order: &str) -> Result<String> {
        self.told += 1;
        let mark = format!("<{}>\n", self.told);
        self.process.write(format!("{order}\nsay {mark}").as_bytes())?;
        self.process.wait_output(&mark, SOON * 3).with_context(|| order.to_owned())?;
        let output = self.process.output_so_far();
        let found = output[self.heard..].find(&mark).context("the mark is gone")?;
        let answer = output[self.heard..self.heard + found].trim_end().to_owned();
        self.heard += found + mark.len();
        Ok(answer)
    }

    pub fn node(&mut self, key: &str, value: &str) -> Result<()> {
        self.insist(&format!("node {key} {}", hex(value)), "ok")
    }

    /// Gives orders, one a line, and insists on their answers.
    pub fn insist(&mut self, orders: &str, answers: &str) -> Result<()> {
        let found = self.tell(orders)?;
        ensure!(found == answers, "'{orders}' is answered '{found}', not '{answers}'");
        Ok(())
    }

    pub fn steps(&mut self, steps: &[Step]) -> Result<()> {
        let (orders, answers): (Vec<_>, Vec<_>) = steps.iter().copied().map(Step::order).unzip();
        self.insist(&orders.join("\n"), &answers.join("\n"))
    }

    /// Whatever was before: connects as a frontend should.
    pub fn connect(&mut self) -> Result<()> {
        self.steps(&CONNECT)
    }

    /// Leaves as a frontend should.
    pub fn leave(&mut self) -> Result<()> {
        self.steps(&LEAVE)
    }

    /// It ends in the middle of its work.
    pub fn kill(self) -> Result<()> {
        self.process.signal(9)?;
        self.process.wait(Duration::from_secs(30)).map(drop)
    }
}
