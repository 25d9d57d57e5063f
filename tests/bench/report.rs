//! All that was measured, and which parts failed.

use std::fmt;

use anyhow::{Error, Result, bail};

use crate::figures::{Comparison, table};

/// What parts add to. A part that fails keeps what it measured before, and takes nothing from the others.
#[derive(Debug, Default)]
pub struct Report {
    comparisons: Vec<Comparison>,
    notes: Vec<String>,
    failures: Vec<(&'static str, Error)>,
}

impl Report {
    /// Figures of both peers, also those of a few rounds only.
    pub fn add(&mut self, figures: impl IntoIterator<Item = Comparison>) {
        self.comparisons.extend(figures.into_iter().filter(Comparison::has_rounds));
    }

    /// A line about what has no peer.
    pub fn note(&mut self, line: String) {
        self.notes.push(line);
    }

    /// How a part ended.
    pub fn end_of(&mut self, part: &'static str, outcome: Result<()>) {
        if let Err(error) = outcome {
            println!("{part} failed: {error:#}");
            self.failures.push((part, error));
        }
    }

    /// Fails, with their names, if parts failed.
    pub fn into_outcome(self) -> Result<()> {
        let parts: Vec<&str> = self.failures.iter().map(|(part, _)| *part).collect();
        if parts.is_empty() { Ok(()) } else { bail!("parts of the benchmark failed: {}", parts.join(", ")) }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.comparisons.is_empty() {
            f.write_str(&table(&self.comparisons))?;
        }
        if !self.notes.is_empty() {
            writeln!(f, "\nxpci alone:\n{}", self.notes.join("\n"))?;
        }
        self.failures.iter().try_for_each(|(part, error)| writeln!(f, "\n{part} FAILED: {error:#}"))
    }
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;
    use crate::figures::Better;

    fn figure(name: &'static str, rounds: usize) -> Comparison {
        let mut figure = Comparison::new(name, Better::Less);
        (0..rounds).for_each(|_| figure.add(1.0, 2.0));
        figure
    }

    #[test]
    fn a_failed_part_is_named_and_hides_no_figures() {
        let mut report = Report::default();
        report.add([figure("before", 2), figure("after one round", 1), figure("never", 0)]);
        report.end_of("pv", Err(anyhow!("the guest is gone")));
        report.note("error to DMA off, ms 5".to_owned());
        report.end_of("errors", Ok(()));
        let text = report.to_string();
        for expected in
            ["before", "after one round", "error to DMA off, ms 5", "pv FAILED: the guest is gone"]
        {
            assert!(text.contains(expected), "{text}");
        }
        assert!(!text.contains("never"), "{text}");
        let outcome = report.into_outcome().map_err(|error| error.to_string());
        assert_eq!(outcome, Err("parts of the benchmark failed: pv".to_owned()));
    }

    #[test]
    fn without_failures_the_outcome_is_a_success() {
        let mut report = Report::default();
        report.end_of("vfs", Ok(()));
        assert!(report.into_outcome().is_ok());
    }
}
