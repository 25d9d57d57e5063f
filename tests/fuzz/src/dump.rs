//! Any text as a dump.

use pciback::dump;

/// What is accepted can be printed and read again.
pub fn dump_parser(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    // One line, of a length that a terminal can take.
    let check = |error: &dump::DumpError| {
        let said = error.to_string();
        assert!(said.len() < 1000 && !said.contains(['\n', '\r']), "{said:?}");
    };
    let functions = match dump::read(&text) {
        Ok(dump) => {
            dump.damage.iter().for_each(check);
            dump.functions
        }
        Err(error) => return check(&error),
    };
    assert!(!functions.is_empty());
    let printed: String = functions.iter().map(ToString::to_string).collect();
    let again = dump::parse(&printed).unwrap_or_else(|error| panic!("{error}: {printed}"));
    assert_eq!(again.len(), functions.len());
    for (again, function) in again.iter().zip(&functions) {
        assert!(matches!(function.bytes.len(), 64 | 128 | 256 | 4096));
        assert_eq!(
            (again.address, &again.title, &again.bytes),
            (function.address, &function.title, &function.bytes)
        );
    }
}
