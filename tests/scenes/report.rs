//! What came of the checks.

use std::time::{Duration, Instant};

use anyhow::{Error, Result};

/// How a check ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It showed what it says.
    Passed,
    /// It did not, for this reason.
    Failed(String),
    /// It could not be tried, for this reason; counts as a failure.
    NotRun(String),
}

/// One check that was to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// `scene::check`.
    pub name: String,
    /// What came of it.
    pub verdict: Verdict,
    /// How long it took.
    pub took: Duration,
}

/// All outcomes so far, in order.
#[derive(Debug, Default)]
pub struct Report {
    outcomes: Vec<Outcome>,
}

impl Report {
    /// Runs something and keeps its outcome. Returns whether it succeeded.
    pub fn time(&mut self, scene: &str, name: &str, run: impl FnOnce() -> Result<()>) -> bool {
        let begun = Instant::now();
        println!("-- {scene}::{name}");
        let verdict = match run() {
            Ok(()) => Verdict::Passed,
            Err(error) => Verdict::Failed(causes(&error)),
        };
        self.add(scene, name, verdict, begun.elapsed())
    }

    /// Keeps an outcome and prints it. Returns whether it is a success.
    pub fn add(&mut self, scene: &str, name: &str, verdict: Verdict, took: Duration) -> bool {
        let outcome = Outcome { name: format!("{scene}::{name}"), verdict, took };
        let passed = outcome.verdict == Verdict::Passed;
        println!("   {}", outcome.line());
        if let Verdict::Failed(why) | Verdict::NotRun(why) = &outcome.verdict {
            println!("{why}");
        }
        self.outcomes.push(outcome);
        passed
    }

    /// None of these checks could be tried.
    pub fn nothing_ran(&mut self, scene: &str, checks: &[&str], why: &str) {
        for check in checks {
            self.add(scene, check, Verdict::NotRun(why.to_owned()), Duration::ZERO);
        }
    }

    /// Whether nothing was selected.
    pub fn is_empty(&self) -> bool {
        self.outcomes.is_empty()
    }

    /// All outcomes.
    pub fn outcomes(&self) -> &[Outcome] {
        &self.outcomes
    }

    /// How many checks failed or did not run.
    pub fn failed(&self) -> usize {
        self.outcomes.iter().filter(|outcome| outcome.verdict != Verdict::Passed).count()
    }

    /// The summary: each check by name with its time, the failures once more with their causes, and the counts.
    pub fn print(&self, took: Duration) {
        println!("\n== lab tests, {:.0} s", took.as_secs_f32());
        for outcome in &self.outcomes {
            println!("{}", outcome.line());
        }
        println!("{}", self.failures());
        println!("{} passed, {} failed", self.outcomes.len() - self.failed(), self.failed());
    }

    fn failures(&self) -> String {
        let why = |outcome: &Outcome| match &outcome.verdict {
            Verdict::Passed => None,
            Verdict::Failed(why) | Verdict::NotRun(why) => Some(format!("\n{}\n{why}\n", outcome.line())),
        };
        self.outcomes.iter().filter_map(why).collect()
    }
}

/// An error and its causes, a paragraph each.
pub(crate) fn causes(error: &Error) -> String {
    error.chain().map(ToString::to_string).collect::<Vec<_>>().join("\nbecause: ")
}

impl Outcome {
    fn line(&self) -> String {
        let verdict = match self.verdict {
            Verdict::Passed => "ok",
            Verdict::Failed(_) => "FAILED",
            Verdict::NotRun(_) => "NOT RUN",
        };
        format!("{verdict:<7} {:>6.1} s  {}", self.took.as_secs_f32(), self.name)
    }
}
