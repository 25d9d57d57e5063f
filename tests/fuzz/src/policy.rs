//! Any text as a policy file.

use std::sync::LazyLock;

use pciback::config::{Filter, FunctionSpec};
use pciback::dump;
use pciback::policy::{PolicyFile, PolicySet, dumped_specs, explain};

use crate::byhand;

const DEVICE: &str = include_str!("../../../pciback/tests/dumps/composed-most-extended-capabilities.txt");

/// What is refused says where; what is accepted compiles, and opens nothing that is guarded.
pub fn policy_parser(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let file = match PolicyFile::parse("fuzz.yaml", &text) {
        Ok(file) => file,
        Err(mistakes) => {
            assert!(!mistakes.is_empty() && mistakes.len() <= 50);
            // A parser may count a line end more than the text has.
            let lines = text.split(['\n', '\r', '\u{85}', '\u{2028}', '\u{2029}']).count() as u32 + 1;
            for mistake in mistakes {
                assert!((1..=lines).contains(&mistake.at.line), "{mistake}");
                assert!(mistake.at.column >= 1 && mistake.message.len() < 1000, "{mistake}");
            }
            return;
        }
    };
    static SPECS: LazyLock<Vec<FunctionSpec>> = LazyLock::new(|| {
        vec![dumped_specs(&dump::parse(DEVICE).expect("a dump of ours"), None).remove(0).spec]
    });
    let spec = &SPECS[0];
    let set = PolicySet::new(vec![file]);
    let policy = set.all().policy;
    let filter = Filter::compile(spec, &policy).expect("a device of ours");
    for (offset, bits) in byhand::guarded(&spec.bytes).into_iter().enumerate() {
        let passing = filter.bits(offset as u16 & !3).hw_write >> (8 * (offset as u32 & 3));
        assert_eq!(passing & u32::from(bits), 0, "{offset:#x} passes {passing:#x}");
    }
    let explained = explain(spec, &policy, None);
    assert!(explained.not_assignable.is_none());
}
