//! Runs the checks of one scene.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

use super::Check;
use super::report::{Report, Verdict, causes};

/// Sets a scene up, runs the selected checks in order and restores the scene's state after each that fails. Where the checks that the
/// scene begins with are not selected, what they would have left is made by restoring it, too.
pub fn play<S>(
    scene: &str,
    checks: &[Check<S>],
    selected: &[&'static str],
    set_up: impl FnOnce() -> Result<S>,
    restore: impl Fn(&mut S) -> Result<()>,
    report: &mut Report,
) {
    let begun = Instant::now();
    let mut state = match caught(set_up) {
        Ok(state) => state,
        Err(error) => {
            return report.nothing_ran(
                scene,
                selected,
                &format!("the scene could not be set up: {}", causes(&error)),
            );
        }
    };
    println!("-- {scene}: set up in {:.1} s", begun.elapsed().as_secs_f32());
    // Checks that failed or did not run, and why nothing can run any more.
    let mut failed: Vec<&'static str> = Vec::new();
    let mut lost: Option<String> = None;
    if selected.first() != checks.first().map(|check| &check.name)
        && let Err(error) = caught(|| restore(&mut state))
    {
        lost = Some(format!("the state of the checks before could not be made: {}", causes(&error)));
    }
    for check in checks.iter().filter(|check| selected.contains(&check.name)) {
        let missing = check.needs.iter().find(|need| failed.contains(need));
        let why = lost.clone().or(missing.map(|need| format!("it needs {need}")));
        if let Some(why) = why {
            report.add(scene, check.name, Verdict::NotRun(why), Duration::ZERO);
            failed.push(check.name);
            continue;
        }
        if report.time(scene, check.name, || caught(|| (check.show)(&mut state))) {
            continue;
        }
        failed.push(check.name);
        let begun = Instant::now();
        match caught(|| restore(&mut state)) {
            Ok(()) => println!("   state restored in {:.1} s", begun.elapsed().as_secs_f32()),
            Err(error) => {
                let why = causes(&error);
                lost = Some(format!("the state could not be restored after {}: {why}", check.name));
            }
        }
    }
}

/// A panic is a failure like any other.
fn caught<T>(run: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| Err(anyhow!("{}", said(&*panic))))
}

fn said(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
    format!("it panicked: {}", text.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use anyhow::ensure;

    use super::*;
    use crate::checks;

    /// What the checks did, and whether their state can be restored.
    #[derive(Default)]
    struct World {
        ran: Vec<&'static str>,
        restored: usize,
        broken: bool,
    }

    fn first(world: &mut World) -> Result<()> {
        world.ran.push("first");
        Ok(())
    }

    fn fails(world: &mut World) -> Result<()> {
        world.ran.push("fails");
        ensure!(world.ran.is_empty(), "a reason");
        Ok(())
    }

    fn panics(world: &mut World) -> Result<()> {
        world.ran.push("panics");
        assert!(world.ran.is_empty(), "another reason");
        Ok(())
    }

    fn depends(world: &mut World) -> Result<()> {
        world.ran.push("depends");
        Ok(())
    }

    fn last(world: &mut World) -> Result<()> {
        ensure!(world.restored > 0, "nothing was restored");
        Ok(())
    }

    fn outcome(broken: bool, set_up: Result<()>) -> Vec<(String, String)> {
        outcome_of(&["first", "fails", "panics", "depends", "last"], broken, set_up)
    }

    fn outcome_of(names: &[&'static str], broken: bool, set_up: Result<()>) -> Vec<(String, String)> {
        let checks: Vec<Check<World>> = checks![first, fails, panics, depends needs fails, last];
        let mut report = Report::default();
        let restore = |world: &mut World| {
            world.restored += 1;
            ensure!(!world.broken, "it stays broken");
            Ok(())
        };
        let world = || set_up.map(|()| World { broken, ..World::default() });
        play("scene", &checks, names, world, restore, &mut report);
        let shown = |verdict: &Verdict| match verdict {
            Verdict::Passed => "passed".to_owned(),
            Verdict::Failed(why) => format!("failed: {why}"),
            Verdict::NotRun(why) => format!("not run: {why}"),
        };
        report.outcomes().iter().map(|outcome| (outcome.name.clone(), shown(&outcome.verdict))).collect()
    }

    #[test]
    fn a_failed_check_neither_hides_nor_stops_the_others() {
        let found = outcome(false, Ok(()));
        let verdicts: Vec<&str> =
            found.iter().map(|(_, verdict)| verdict.split('\n').next().unwrap()).collect();
        assert_eq!(found.len(), 5);
        assert_eq!(verdicts[0], "passed");
        assert!(found[1].1.starts_with("failed: a reason"), "{found:?}");
        assert!(found[2].1.starts_with("failed: it panicked: another reason"), "{found:?}");
        assert_eq!(verdicts[3], "not run: it needs fails");
        assert_eq!(verdicts[4], "passed");
    }

    #[test]
    fn a_check_that_runs_without_those_before_it_finds_the_scenes_state() {
        let found = outcome_of(&["last"], false, Ok(()));
        assert_eq!(found, [("scene::last".to_owned(), "passed".to_owned())]);
    }

    #[test]
    fn after_a_state_that_cannot_be_restored_nothing_runs_and_all_of_it_is_listed() {
        let found = outcome(true, Ok(()));
        assert_eq!(found.len(), 5);
        for (name, verdict) in &found[2..] {
            assert!(
                verdict.starts_with("not run: the state could not be restored after fails: it stays"),
                "{name}: {verdict}"
            );
        }
    }

    #[test]
    fn checks_of_a_scene_that_cannot_be_set_up_are_listed_as_not_run() {
        let found = outcome(false, Err(anyhow!("no guest")));
        assert_eq!(found.len(), 5);
        assert!(
            found
                .iter()
                .all(|(_, verdict)| verdict.starts_with("not run: the scene could not be set up: no guest"))
        );
    }
}
