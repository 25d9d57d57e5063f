//! The settings and the policies with which the service starts. Mistakes in their files must not stop the guests of an earlier process:
//! copies of those that were last in force are used then.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::bail;
use log::warn;
use pciback::policy::PolicySet;
use toolstack::cli::ServiceArguments;
use toolstack::policies;
use toolstack::protocol::Cause;
use toolstack::settings::{self, Settings};

/// Names and texts of files.
pub type Sources = Vec<(String, String)>;
/// What is found before the engine runs, for `xpci status`.
pub type Problems = Vec<(Cause, String)>;

/// The settings in force, with what the command line changes, and the texts of their files.
pub fn settings_with(
    arguments: &ServiceArguments,
    problems: &mut Problems,
) -> anyhow::Result<(Settings, Option<Sources>)> {
    let copies = copies_of_settings(arguments);
    let (mut settings, sources, problem) = read_settings(arguments.settings.as_deref(), &copies)?;
    problems.extend(problem.map(|text| (Cause::Settings, text)));
    settings.run_directory = arguments.run_directory.clone().unwrap_or(settings.run_directory);
    settings.state_directory = arguments.state_directory.clone().unwrap_or(settings.state_directory);
    if !arguments.policy_directories.is_empty() {
        settings.policy_directories.clone_from(&arguments.policy_directories);
    }
    Ok((settings, sources))
}

/// Reads the settings: with their files and an error message. Mistakes in the files must not stop the guests of an earlier process: the
/// copy of the settings in force is used then, and not overwritten.
fn read_settings(
    path: Option<&Path>,
    copies: &Path,
) -> anyhow::Result<(Settings, Option<Sources>, Option<String>)> {
    match settings::load(path) {
        Ok(loaded) => Ok((loaded.settings, Some(loaded.sources), None)),
        Err(problem) => {
            let Some(settings) = settings::read_copy(copies) else {
                bail!("{problem}\ncorrect the settings ('xpcid --check'), then start xpcid again");
            };
            let text =
                format!("the settings cannot be used, those that were last in force are kept: {problem}");
            Ok((settings, None, Some(text)))
        }
    }
}

/// Where copies of the settings are kept, whatever the settings say.
pub fn copies_of_settings(arguments: &ServiceArguments) -> PathBuf {
    arguments.state_directory.clone().unwrap_or_else(|| Settings::default().state_directory)
}

/// Keeps a copy of the settings, for a start with mistakes in them. Like that of the policies, a failure is not fatal, for example on a full
/// disk, because guests wait for the service.
pub fn keep_settings(directory: &Path, sources: &[(String, String)], problems: &mut Problems) {
    let kept = fs::create_dir_all(directory).and_then(|()| settings::keep_copy(directory, sources));
    if let Err(error) = kept {
        let text = format!("cannot keep a copy of the settings in {}: {error}", directory.display());
        problems.push((Cause::StateFiles, text));
    }
}

/// Reads the policies, with their files. Mistakes in the files must not stop the guests of an earlier process: the copy of the policies in
/// force is used then, and not overwritten.
pub fn usable_policies(
    settings: &Settings,
    problems: &mut Problems,
) -> anyhow::Result<(PolicySet, Option<Vec<policies::Source>>)> {
    match policies::load(&settings.policy_directories) {
        Ok((sources, set)) => Ok((set, Some(sources))),
        Err(problem) => {
            let Some(set) = policies::read_copy(&settings.state_directory) else {
                bail!(
                    "{problem}\ncorrect the files ('xpci policy check') or remove them, then start xpcid again"
                );
            };
            let text =
                format!("the policy files cannot be used, those that were last in force are kept: {problem}");
            problems.push((Cause::Policies, text));
            Ok((set, None))
        }
    }
}

pub fn keep_policies(directory: &Path, sources: &[policies::Source], problems: &mut Problems) {
    if let Err(error) = policies::keep_copy(directory, sources) {
        let text = format!("cannot keep a copy of the policies in {}: {error}", directory.display());
        problems.push((Cause::Policies, text));
    }
}

/// Policy directories that do not exist, except the default ones.
pub fn missing_directories(settings: &Settings) -> impl Iterator<Item = &PathBuf> {
    let usual = Settings::default().policy_directories;
    settings.policy_directories.iter().filter(move |path| !path.is_dir() && !usual.contains(path))
}

/// Checks settings and policies.
pub fn check(arguments: &ServiceArguments) -> anyhow::Result<()> {
    let settings::Loaded { mut settings, sources } = settings::load(arguments.settings.as_deref())?;
    if !arguments.policy_directories.is_empty() {
        settings.policy_directories.clone_from(&arguments.policy_directories);
    }
    for directory in missing_directories(&settings) {
        warn!("the policy directory {} does not exist", directory.display());
    }
    let (policies, _) = policies::load(&settings.policy_directories)?;
    let files =
        |count: usize, kind: &str| format!("{count} {kind} file{}", if count == 1 { "" } else { "s" });
    println!("no mistake in {} and {}", files(sources.len(), "settings"), files(policies.len(), "policy"));
    Ok(())
}
