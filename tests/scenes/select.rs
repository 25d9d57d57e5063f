//! Which checks are to run.

use anyhow::{Result, bail};

/// What the command line asks for.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Arguments {
    /// Checks with one of these words in their names; all when there is none.
    pub words: Vec<String>,
    /// Prints names only.
    pub list: bool,
}

impl Arguments {
    /// Reads them. Options of libtest that make no difference here are taken, since people and programs give them to any test.
    pub fn read(given: impl IntoIterator<Item = String>) -> Result<Self> {
        let mut arguments = Self::default();
        let mut given = given.into_iter();
        while let Some(argument) = given.next() {
            match argument.as_str() {
                "--list" => arguments.list = true,
                "--nocapture" | "--no-capture" | "--show-output" | "--test-threads=1" => {}
                "--test-threads" if given.next().as_deref() == Some("1") => {}
                "" => {}
                option if option.starts_with('-') => {
                    bail!(
                        "{option}: known are --list, --nocapture, --test-threads=1 and words of checks' names"
                    )
                }
                _ => arguments.words.push(argument),
            }
        }
        Ok(arguments)
    }
}

/// Checks that are selected by words, with those that they need.
#[derive(Debug, Default)]
pub struct Selection {
    words: Vec<String>,
}

impl Selection {
    /// By words in `scene::check`; everything when there is none.
    pub fn new(words: &[String]) -> Self {
        Self { words: words.to_vec() }
    }

    /// Whether the words select this check.
    pub fn has(&self, scene: &str, check: &str) -> bool {
        let name = format!("{scene}::{check}");
        self.words.is_empty() || self.words.iter().any(|word| name.contains(word.as_str()))
    }

    /// The names of the selected checks of a scene, in order.
    pub fn of(&self, scene: &str, checks: &[(&'static str, &'static [&'static str])]) -> Vec<&'static str> {
        let mut wanted: Vec<&str> =
            checks.iter().map(|(name, _)| *name).filter(|name| self.has(scene, name)).collect();
        // A check needs earlier ones only.
        for (name, needs) in checks.iter().rev() {
            if wanted.contains(name) {
                wanted.extend(needs.iter());
            }
        }
        checks.iter().map(|(name, _)| *name).filter(|name| wanted.contains(name)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHECKS: [(&str, &[&str]); 4] = [
        ("a_vf_appears", &[]),
        ("it_is_held", &["a_vf_appears"]),
        ("it_is_attached", &["it_is_held"]),
        ("other", &[]),
    ];

    fn selected(word: &str) -> Vec<&'static str> {
        Selection::new(&[word.to_owned()]).of("vfs", &CHECKS)
    }

    #[test]
    fn a_word_selects_the_checks_that_have_it_and_those_they_need() {
        assert_eq!(selected("held"), ["a_vf_appears", "it_is_held"]);
        assert_eq!(selected("attached"), ["a_vf_appears", "it_is_held", "it_is_attached"]);
        assert_eq!(selected("other"), ["other"]);
        assert_eq!(selected("nothing"), [""; 0]);
    }

    #[test]
    fn the_name_of_a_scene_selects_all_of_it() {
        assert_eq!(selected("vfs::").len(), 4);
        assert_eq!(Selection::new(&[]).of("vfs", &CHECKS).len(), 4);
    }

    #[test]
    fn options_of_libtest_are_taken_and_unknown_ones_refused() {
        let read = |words: &[&str]| Arguments::read(words.iter().map(|word| (*word).to_owned()));
        let all = read(&["--test-threads=1", "--nocapture", "ring", "--list"]).unwrap();
        assert_eq!(all, Arguments { words: vec!["ring".into()], list: true });
        assert!(read(&["--test-threads", "2"]).is_err());
        assert!(read(&["--ignored"]).is_err());
    }
}
