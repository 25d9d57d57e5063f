//! The key `errors` of a policy file: what is done about errors that a function reports.

use super::diagnostic::Diagnostics;
use super::read::{self, KeyWord, key};
use super::yaml::Node;
use crate::fault::{Action, ErrorWishes};

pub(super) const ERROR_KEYS: &[KeyWord] = &[
    key("correctable", "What is done about a correctable error."),
    key("non-fatal", "What is done about a non-fatal error."),
    key("fatal", "What is done about a fatal error."),
    key(
        "link-reset",
        "What is done with a function that lost its state because its link was reset for another one's error.",
    ),
    key(
        "unanswered",
        "What is done when the guest cannot be notified, does not answer in time, gives an invalid answer, or its driver gives up.",
    ),
    key(
        "storm",
        "What is done when a limit of uncorrectable errors is exceeded, unless the error's own action is harsher.",
    ),
    key("answer-seconds", "How long the guest may take for each answer, 1-600."),
    key(
        "mmio-enabled",
        "Whether the guest's driver is asked to look at the function before a reset; drivers without a callback for it crash the guest.",
    ),
    key("correctable-per-minute", "More correctable errors than this are masked at the source, 1-1000000."),
    key("mask-seconds", "How long they stay masked, 1-86400."),
    key(
        "uncorrectable-per-hour",
        "More uncorrectable errors of the function than this are a storm, 1-1000000.",
    ),
    key(
        "guest-per-hour",
        "More uncorrectable errors of all functions of its guest than this are a storm, 1-1000000.",
    ),
];

/// Words for yes and no.
pub(super) const SWITCH: &[(&str, bool)] = &[("true", true), ("false", false)];

/// The most a number of `errors` may be.
pub(super) fn most(key: &str) -> u32 {
    match key {
        "answer-seconds" => 600,
        "mask-seconds" => 86_400,
        _ => 1_000_000,
    }
}

/// What actions a key takes.
pub(super) fn actions(key: &str) -> &'static [(&'static str, Action)] {
    match key {
        "unanswered" | "storm" => Action::LAST_RESORTS,
        _ => Action::WORDS,
    }
}

/// Reads the mapping.
pub(super) fn errors(node: &Node, diagnostics: &mut Diagnostics) -> ErrorWishes {
    let mut wishes = ErrorWishes::default();
    for (key, node) in read::entries(node, "'errors'", ERROR_KEYS, diagnostics) {
        match key {
            "correctable" => wishes.correctable = action(key, node, diagnostics),
            "non-fatal" => wishes.non_fatal = action(key, node, diagnostics),
            "fatal" => wishes.fatal = action(key, node, diagnostics),
            "link-reset" => wishes.link_reset = action(key, node, diagnostics),
            "unanswered" => wishes.unanswered = action(key, node, diagnostics),
            "storm" => wishes.storm = action(key, node, diagnostics),
            "mmio-enabled" => wishes.mmio_enabled = read::choice(node, "switch", SWITCH, diagnostics),
            "answer-seconds" => wishes.answer_seconds = number(key, node, diagnostics),
            "correctable-per-minute" => wishes.correctable_per_minute = number(key, node, diagnostics),
            "mask-seconds" => wishes.mask_seconds = number(key, node, diagnostics),
            "uncorrectable-per-hour" => wishes.uncorrectable_per_hour = number(key, node, diagnostics),
            _ => wishes.guest_per_hour = number(key, node, diagnostics),
        }
    }
    wishes
}

fn action(key: &str, node: &Node, diagnostics: &mut Diagnostics) -> Option<Action> {
    let what = if actions(key).len() == Action::WORDS.len() { "action" } else { "action of last resort" };
    read::choice(node, what, actions(key), diagnostics)
}

fn number(key: &str, node: &Node, diagnostics: &mut Diagnostics) -> Option<u32> {
    let most = most(key);
    let found = read::scalar(node, key, diagnostics)?;
    let number = read::parse_number(found).filter(|number| (1..=most).contains(number));
    if number.is_none() {
        let found: String = found.chars().take(60).collect();
        diagnostics
            .say(node.at, format!("'{found}' is not a valid {key}: a number from 1 to {most} is expected"));
    }
    number
}

#[cfg(test)]
mod tests {
    use super::super::PolicyFile;
    use super::*;

    #[test]
    fn every_key_is_read() {
        let text = "errors:\n  correctable: log\n  non-fatal: tell-guest\n  fatal: destroy-guest\n  link-reset: reset\n  \
                    unanswered: unplug\n  storm: pause-guest\n  answer-seconds: 600\n  mmio-enabled: true\n  \
                    correctable-per-minute: 1\n  mask-seconds: 0x10\n  uncorrectable-per-hour: 5\n  guest-per-hour: 1000000\n";
        let wishes = PolicyFile::parse("f.yaml", text).unwrap().errors;
        let expected = ErrorWishes {
            correctable: Some(Action::Log),
            non_fatal: Some(Action::TellGuest),
            fatal: Some(Action::DestroyGuest),
            link_reset: Some(Action::Reset),
            unanswered: Some(Action::Unplug),
            storm: Some(Action::PauseGuest),
            answer_seconds: Some(600),
            mmio_enabled: Some(true),
            correctable_per_minute: Some(1),
            mask_seconds: Some(16),
            uncorrectable_per_hour: Some(5),
            guest_per_hour: Some(1_000_000),
        };
        assert_eq!(wishes, expected);
        assert_eq!(ERROR_KEYS.len(), 12, "a new key is read here, too");
    }

    #[test]
    fn mistakes_are_told_where_they_stand_with_what_was_meant() {
        for (text, expected) in [
            (
                "errors: {fatl: log}",
                "f.yaml:1:10: 'fatl' is not a valid key of 'errors'; did you mean 'fatal'?",
            ),
            ("errors: {fatal: kill}", "f.yaml:1:17: 'kill' is not a valid action; it is one of"),
            (
                "errors: {unanswered: tell-guest}",
                "f.yaml:1:22: 'tell-guest' is not a valid action of last resort; it is one of log, reset",
            ),
            (
                "errors: {answer-seconds: 0}",
                "'0' is not a valid answer-seconds: a number from 1 to 600 is expected",
            ),
            ("errors: {answer-seconds: -1}", "'-1' is not a valid answer-seconds"),
            ("errors: {mask-seconds: 86401}", "'86401' is not a valid mask-seconds"),
            ("errors: {mmio-enabled: yes}", "'yes' is not a valid switch; it is one of true, false"),
            ("errors: log", "'errors' is a mapping, not a word"),
        ] {
            let mistakes = PolicyFile::parse("f.yaml", text).unwrap_err();
            assert!(mistakes[0].to_string().contains(expected), "{}", mistakes[0]);
        }
    }
}
