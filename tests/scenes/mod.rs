//! System tests as scenes: a scene sets a booted machine up once, then its checks run in order, each showing one behaviour.
//!
//! A failed check stops no other one: the scene's state is restored, and the next check runs. What cannot run, because a check that it
//! needs has failed or because the state cannot be restored, is listed as not run and counts as a failure. Scenes of one machine share a
//! boot; between them the machine is cleaned. `libtest` and its replacements run independent tests; these checks share a machine and
//! build on each other.

mod play;
mod report;
mod select;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::{Builder, Lab};

pub use play::play;
pub use report::{Outcome, Report, Verdict};
pub use select::{Arguments, Selection};

/// One behaviour, shown by a function of that name.
pub struct Check<S> {
    pub(crate) name: &'static str,
    pub(crate) needs: &'static [&'static str],
    pub(crate) show: fn(&mut S) -> Result<()>,
}

impl<S> Check<S> {
    /// A check, and the checks of the same scene without whose success it cannot run.
    pub fn new(name: &'static str, needs: &'static [&'static str], show: fn(&mut S) -> Result<()>) -> Self {
        Self { name, needs, show }
    }
}

/// The checks of a scene, in order, by their functions: `checks![first, second needs first, third]`.
#[macro_export]
macro_rules! checks {
    ($($check:ident $(needs $($need:ident)&+)?),+ $(,)?) => {
        vec![$($crate::scenes::Check::new(stringify!($check), &[$($(stringify!($need)),+)?], $check)),+]
    };
}

/// A kind of machine. Scenes that name the same one share a boot.
#[derive(Debug, Clone, Copy)]
pub struct Machine {
    /// Its name, and that of the folder of its logs.
    pub name: &'static str,
    /// What is booted.
    pub builder: fn() -> Result<Builder>,
    /// Puts it back to what it was after its boot.
    pub clean: fn(&Lab) -> Result<()>,
    /// A check of its end, by scene, name and function.
    pub end: Option<End>,
}

/// The check of a machine's end.
pub type End = (&'static str, &'static str, fn(Lab) -> Result<()>);

/// What the checks of a file share.
pub trait Scene<'a>: Sized {
    /// The name of the file.
    const NAME: &'static str;
    /// The machine that it needs.
    const MACHINE: &'static Machine;

    /// Brings the machine to the state that the checks begin with.
    fn set_up(lab: &'a Lab) -> Result<Self>;

    /// The checks, in order.
    fn checks() -> Vec<Check<Self>>;

    /// Brings that state back after a failed check.
    fn restore(&mut self) -> Result<()>;
}

/// A scene of any type.
pub struct Entry {
    name: &'static str,
    machine: &'static Machine,
    checks: Vec<(&'static str, &'static [&'static str])>,
    play: fn(&Lab, &Selection, &mut Report),
}

impl Entry {
    fn selected(&self, selection: &Selection) -> Vec<&'static str> {
        selection.of(self.name, &self.checks)
    }

    /// Of [`scenes!`](crate::scenes!).
    pub fn new<'a, S: Scene<'a>>(play: fn(&Lab, &Selection, &mut Report)) -> Self {
        let checks = S::checks().iter().map(|check| (check.name, check.needs)).collect();
        Self { name: S::NAME, machine: S::MACHINE, checks, play }
    }
}

/// A list of scenes, by their types, each of which has one lifetime: that of the machine.
#[macro_export]
macro_rules! scenes {
    ($($($part:ident)::+),+ $(,)?) => {
        vec![$({
            type Played<'a> = $($part)::+<'a>;
            $crate::scenes::Entry::new::<Played<'_>>(|lab, selection, report| {
                $crate::scenes::play_in::<Played<'_>>(lab, selection, report);
            })
        }),+]
    };
}

/// Plays a scene on a machine that runs.
pub fn play_in<'a, S: Scene<'a>>(lab: &'a Lab, selection: &Selection, report: &mut Report) {
    let checks = S::checks();
    let selected =
        selection.of(S::NAME, &checks.iter().map(|check| (check.name, check.needs)).collect::<Vec<_>>());
    play(
        S::NAME,
        &checks,
        &selected,
        || S::set_up(lab),
        |scene| {
            lab.check()?;
            scene.restore()
        },
        report,
    );
}

/// Runs what the arguments select and prints the summary. Returns whether all of it passed.
pub fn run(entries: &[Entry], arguments: &Arguments) -> Result<bool> {
    let mut machines: Vec<&Machine> = Vec::new();
    for entry in entries {
        if machines.iter().all(|known| known.name != entry.machine.name) {
            machines.push(entry.machine);
        }
    }
    if arguments.list {
        let of_scenes =
            entries.iter().flat_map(|entry| entry.checks.iter().map(|(check, _)| (entry.name, *check)));
        let of_ends =
            machines.iter().filter_map(|machine| machine.end.map(|(scene, check, _)| (scene, check)));
        of_scenes.chain(of_ends).for_each(|(scene, check)| println!("{scene}::{check}: test"));
        return Ok(true);
    }
    let selection = Selection::new(&arguments.words);
    let begun = Instant::now();
    let mut report = Report::default();
    for machine in machines {
        let here =
            |entry: &&Entry| entry.machine.name == machine.name && !entry.selected(&selection).is_empty();
        let scenes: Vec<&Entry> = entries.iter().filter(here).collect();
        on_machine(machine, &scenes, &selection, &mut report);
    }
    ensure!(!report.is_empty(), "no check has one of these words in its name: {:?}", arguments.words);
    report.print(begun.elapsed());
    Ok(report.failed() == 0)
}

/// What all scenes of one machine may take together.
const TIME_LIMIT: Duration = Duration::from_secs(3600);

fn boot(machine: &Machine) -> Result<Lab> {
    (machine.builder)()?.name(machine.name).time_limit(TIME_LIMIT).corrected_qemu().boot()
}

/// Plays scenes that share a boot. After a failure the next one gets a new boot: the state of the machine is unknown.
fn on_machine(machine: &Machine, scenes: &[&Entry], selection: &Selection, report: &mut Report) {
    let mut running: Option<Lab> = None;
    for (index, scene) in scenes.iter().enumerate() {
        let before = report.failed();
        let lab = match running.take().map_or_else(|| boot(machine), Ok) {
            Ok(lab) => lab,
            Err(error) => {
                let why = format!("the machine did not boot: {}", report::causes(&error));
                report.nothing_ran(scene.name, &scene.selected(selection), &why);
                continue;
            }
        };
        (scene.play)(&lab, selection, report);
        let is_last = index + 1 == scenes.len();
        let goes_on = if is_last {
            true
        } else {
            let clean =
                || (machine.clean)(&lab).context("putting the machine back to what it was after its boot");
            report.failed() == before && report.time(scene.name, "leaves_a_clean_machine", clean)
        };
        running = goes_on.then_some(lab);
    }
    let Some((scene, check, show)) = machine.end else { return };
    if !selection.has(scene, check) {
        return;
    }
    match running.map_or_else(|| boot(machine), Ok) {
        Ok(lab) => _ = report.time(scene, check, || show(lab)),
        Err(error) => report.nothing_ran(
            scene,
            &[check],
            &format!("the machine did not boot: {}", report::causes(&error)),
        ),
    }
}
