//! Policy files: which registers of which functions a guest may use, written by people.
//!
//! A file is checked as a whole and every mistake is reported with its place; files that match a function are laid over each other,
//! the least specific first, and what results is compiled into the filter ([`crate::config::Filter`]).

mod diagnostic;
mod dumped;
mod errors;
mod explain;
mod file;
mod learn;
mod mailbox;
mod matching;
mod names;
mod obstacles;
mod read;
mod reset;
mod rom;
mod rules;
mod schema;
mod set;
mod virtual_functions;
mod yaml;

pub use diagnostic::{Diagnostic, Spot, nearest};
pub use dumped::{Dumped, specs as dumped_specs};
pub use explain::{BitsLine, CapabilityLine, Explanation, RegisterLine, deferred, explain};
pub use file::{Holding, Permission, PolicyFile, Profile, RdmPolicy, Reuse};
pub use learn::{Learned, LearnedRegister, learn};
pub use mailbox::words as mailbox_words;
pub use matching::{ClassPrefix, Kind, Match, Specificity, Subject};
pub use names::{CAPABILITIES as CAPABILITY_WORDS, selector, selector_word, word as capability_word};
pub use obstacles::{obstacles, own_resets, rom_unknown};
pub use reset::{RESET_METHODS, ResetWishes, WithoutReset};
pub use rom::RomSource;
pub use schema::schema;
pub use set::{Merged, PolicySet};
pub use yaml::FILE_LIMIT;
