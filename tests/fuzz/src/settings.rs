//! Any text as settings.

use std::time::{Duration, Instant};

use toolstack::settings::{Settings, SettingsError, load};

use crate::files::Folder;

/// What is refused says where; what is accepted is in range.
pub fn settings(data: &[u8]) {
    let folder = Folder::shared();
    let file = folder.write("xpcid.yaml", data);
    match load(Some(&file)) {
        Ok(loaded) => check(&loaded.settings),
        Err(SettingsError::Invalid(mistake)) => {
            let text = String::from_utf8_lossy(data);
            // A parser may count a line end more than the text has.
            let lines = text.split(['\n', '\r', '\u{85}', '\u{2028}', '\u{2029}']).count() as u32 + 1;
            assert!((1..=lines).contains(&mistake.at.line), "{mistake}");
            assert!(mistake.at.column >= 1 && mistake.message.len() < 8000, "{mistake}");
            assert!(!mistake.message.contains(char::is_control), "{:?}", mistake.message);
        }
        // It is no text.
        Err(SettingsError::Read { .. }) => assert!(std::str::from_utf8(data).is_err()),
        Err(SettingsError::TooMany { .. }) => unreachable!("there is one file"),
    }
}

fn check(settings: &Settings) {
    let seconds = 1..=600;
    for limit in [settings.guest_limit_seconds, settings.start_limit_seconds, settings.driver_limit_seconds] {
        assert!(seconds.contains(&limit), "{limit} s");
    }
    let reset = &settings.reset;
    assert!(seconds.contains(&reset.limit_seconds));
    // Times that can be waited for.
    let whole = reset.limit_seconds.checked_add(reset.answer_seconds).map(Duration::from_secs);
    assert!(whole.is_some_and(|whole| Instant::now().checked_add(whole).is_some()), "{reset:?}");
    let _ = (settings.guest_limit(), settings.longest_guest_limit(), settings.start_limit());
    assert!((1..=65536).contains(&settings.function_limit));
    for entry in &settings.virtual_functions {
        assert!(entry.count > 0 && entry.vfs.keys().all(|index| *index < entry.count), "{entry}");
    }
    for name in settings.names.values() {
        assert!(!name.to_string().contains(char::is_control), "{:?}", name.to_string());
    }
}
