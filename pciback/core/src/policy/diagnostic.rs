//! What is wrong with a policy file, and where.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A place in a file, from line 1 and column 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
pub struct Spot {
    /// The line.
    pub line: u32,
    /// The column, in characters.
    pub column: u32,
}

impl Spot {
    pub(super) const START: Self = Self { line: 1, column: 1 };

    /// From the parser's line, which begins with 1, and column, which begins with 0.
    pub(super) fn new(line: usize, column: usize) -> Self {
        let bounded = |value: usize| u32::try_from(value).unwrap_or(u32::MAX);
        Self { line: bounded(line).max(1), column: bounded(column).saturating_add(1) }
    }
}

/// One mistake.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Diagnostic {
    /// The file.
    pub file: String,
    /// Where in it.
    #[serde(flatten)]
    pub at: Spot,
    /// What is wrong there.
    pub message: String,
    /// The word that was probably meant.
    pub suggestion: Option<String>,
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}: {}", self.file, self.at.line, self.at.column, self.message)?;
        self.suggestion.as_ref().map_or(Ok(()), |word| write!(f, "; did you mean '{word}'?"))
    }
}

impl std::error::Error for Diagnostic {}

/// The mistakes of one file, in the order in which they are found.
#[derive(Debug)]
pub(super) struct Diagnostics {
    file: String,
    list: Vec<Diagnostic>,
}

impl Diagnostics {
    /// A longer list of mistakes would not be read to its end.
    const LIMIT: usize = 50;

    pub fn new(file: &str) -> Self {
        Self { file: file.to_owned(), list: Vec::new() }
    }

    pub fn say(&mut self, at: Spot, message: String) {
        self.add(at, message, None);
    }

    /// An unknown word, where one of `words` was expected.
    pub fn unknown<'a>(
        &mut self,
        at: Spot,
        what: &str,
        found: &str,
        words: impl Iterator<Item = &'a str> + Clone,
    ) {
        let found: String = found.chars().take(60).collect();
        let suggestion = nearest(&found, words.clone()).map(str::to_owned);
        let list: Vec<&str> = words.take(12).collect();
        let listed = if suggestion.is_some() || list.len() == 12 {
            String::new()
        } else {
            format!("; it is one of {}", list.join(", "))
        };
        self.add(at, format!("'{found}' is not a valid {what}{listed}"), suggestion);
    }

    fn add(&mut self, at: Spot, message: String, suggestion: Option<String>) {
        if self.list.len() < Self::LIMIT {
            self.list.push(Diagnostic { file: self.file.clone(), at, message, suggestion });
        }
    }

    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    pub fn into_list(mut self) -> Vec<Diagnostic> {
        self.list.sort_by_key(|diagnostic| diagnostic.at);
        self.list
    }
}

/// The word that is most like `found`, if any is like it at all.
pub fn nearest<'a>(found: &str, words: impl Iterator<Item = &'a str> + Clone) -> Option<&'a str> {
    let found = found.to_lowercase().replace(['_', ' '], "-");
    // 'msix' is 'msi-x', though 'msi' has as many letters in common.
    let joined = |word: &str| word.replace('-', "");
    if let Some(same) = words.clone().find(|word| joined(word) == joined(&found)) {
        return Some(same);
    }
    let scored = words.clone().map(|word| (strsim::damerau_levenshtein(&found, word), word));
    let (distance, word) = scored.min_by_key(|(distance, _)| *distance)?;
    // A third of the letters may be wrong; a word that begins as the found one does is near, too.
    let near = distance <= word.len().max(found.len()) / 3;
    let begins =
        || words.filter(|word| found.len() > 2 && word.starts_with(&found)).min_by_key(|word| word.len());
    if near { Some(word) } else { begins() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_without_its_hyphens_is_that_word() {
        assert_eq!(nearest("msix", ["msi", "msi-x", "pm"].into_iter()), Some("msi-x"));
        assert_eq!(nearest("PCI_Express", ["pci-x", "pci-express"].into_iter()), Some("pci-express"));
    }

    #[test]
    fn the_nearest_word_is_suggested_and_a_far_one_is_not() {
        let words = ["read-only", "pass", "hide", "virtual"];
        for (found, expected) in [
            ("readonly", Some("read-only")),
            ("r-e-a-d-only", Some("read-only")),
            ("read_only", Some("read-only")),
            ("Pass", Some("pass")),
            ("hid", Some("hide")),
            ("virt", Some("virtual")),
            ("zebra", None),
            ("", None),
        ] {
            assert_eq!(nearest(found, words.into_iter()), expected, "{found}");
        }
    }
}
