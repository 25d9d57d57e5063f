//! `xpci xl-config`: settings of xpcid for the functions that an xl configuration file (xl.cfg(5)) gives to its guest, without the
//! service.

use std::fmt::Write as _;
use std::fs::File;
use std::io::Read as _;
use std::iter::Peekable;
use std::path::Path;
use std::str::Chars;

use super::{Functions, PciSpec};
use crate::outcome::{ErrorCode, Failure};
use crate::protocol::{Success, XlConfigView};

/// The size limit of a file, in bytes.
const LIMIT: u64 = 1 << 20;
/// The limit for nested lists. xl's own options nest lists at most two deep.
const DEPTH: usize = 8;

/// The relevant contents of a file.
#[derive(Debug, Default, PartialEq, Eq)]
struct XlConfig {
    name: Option<String>,
    /// Whether the guest is an HVM guest: `type` or the older `builder`.
    hvm: bool,
    /// The items of `pci`, each with its line.
    functions: Vec<(usize, String)>,
}

/// A value. Numbers are kept as text.
enum Value {
    Text(String),
    List(Vec<(usize, Value)>),
}

/// The unread characters of a file, and the current line.
struct Source<'a> {
    rest: Peekable<Chars<'a>>,
    line: usize,
}

impl Source<'_> {
    fn next(&mut self) -> Option<char> {
        let next = self.rest.next()?;
        self.line += usize::from(next == '\n');
        Some(next)
    }

    fn next_if(&mut self, wanted: impl Fn(char) -> bool) -> Option<char> {
        let found = self.rest.peek().is_some_and(|next| wanted(*next));
        if found { self.next() } else { None }
    }

    /// Skips blanks and comments; with `lines`, also line ends.
    fn skip(&mut self, lines: bool) {
        while let Some(next) = self.rest.peek().copied() {
            match next {
                '#' => while self.next_if(|next| next != '\n').is_some() {},
                '\n' if !lines => return,
                next if next.is_ascii_whitespace() => _ = self.next(),
                _ => return,
            }
        }
    }

    fn word(&mut self) -> String {
        let mut word = String::new();
        while let Some(next) = self.next_if(|next| next.is_ascii_alphanumeric() || "_.-+".contains(next)) {
            word.push(next);
        }
        word
    }

    fn found(&mut self) -> String {
        self.rest.peek().map_or_else(|| "the file ends".to_owned(), |next| format!("found {next:?}"))
    }

    fn value(&mut self, depth: usize) -> Result<Value, (usize, String)> {
        self.skip(depth > 0);
        let line = self.line;
        if let Some(quote) = self.next_if(|next| next == '\'' || next == '"') {
            let mut text = String::new();
            loop {
                match self.next() {
                    Some(next) if next == quote => return Ok(Value::Text(text)),
                    Some('\n') | None => return Err((line, format!("no {quote} ends the string"))),
                    Some(next) => text.push(next),
                }
            }
        }
        if self.next_if(|next| next == '[').is_none() {
            let word = self.word();
            return match word.is_empty() {
                true => Err((line, format!("a value is expected: {}", self.found()))),
                false => Ok(Value::Text(word)),
            };
        }
        if depth == DEPTH {
            return Err((line, format!("lists are nested more than {DEPTH} deep")));
        }
        let mut items = Vec::new();
        loop {
            self.skip(true);
            if self.next_if(|next| next == ']').is_some() {
                return Ok(Value::List(items));
            }
            let line = self.line;
            items.push((line, self.value(depth + 1)?));
            self.skip(true);
            if self.next_if(|next| next == ',').is_none() && self.rest.peek() != Some(&']') {
                return Err((self.line, format!("',' or ']' is expected: {}", self.found())));
            }
        }
    }
}

/// Parses a file; an error has the line.
fn parse(text: &str) -> Result<XlConfig, (usize, String)> {
    let mut source = Source { rest: text.chars().peekable(), line: 1 };
    let mut config = XlConfig::default();
    loop {
        source.skip(true);
        while source.next_if(|next| next == ';').is_some() {
            source.skip(true);
        }
        if source.rest.peek().is_none() {
            return Ok(config);
        }
        let (line, mut key) = (source.line, source.word());
        let appends = key.ends_with('+');
        if appends {
            key.pop();
        }
        source.skip(false);
        let appends = appends || source.next_if(|next| next == '+').is_some();
        if key.is_empty() || source.next_if(|next| next == '=').is_none() {
            return Err((line, format!("NAME = VALUE is expected: {}", source.found())));
        }
        let value = source.value(0)?;
        source.skip(false);
        if !matches!(source.rest.peek(), None | Some('\n' | ';')) {
            return Err((source.line, format!("the end of the line is expected: {}", source.found())));
        }
        match (key.as_str(), value) {
            ("name", Value::Text(name)) => config.name = Some(name),
            ("type" | "builder", Value::Text(kind)) => config.hvm = kind == "hvm",
            ("pci", Value::List(items)) => {
                if !appends {
                    config.functions.clear();
                }
                for (line, item) in items {
                    let Value::Text(item) = item else {
                        return Err((line, "an item of pci is a string".to_owned()));
                    };
                    config.functions.push((line, item));
                }
            }
            ("pci", Value::Text(_)) => return Err((line, "pci is a list of strings".to_owned())),
            _ => {}
        }
    }
}

/// Converts the functions in a file.
pub(super) fn convert(path: &Path) -> Result<Success, Failure> {
    let shown = path.display();
    let failed =
        |error: std::io::Error| Failure::new(ErrorCode::Failed, format!("cannot read {shown}: {error}"));
    let mut text = String::new();
    let length = File::open(path).and_then(|file| file.take(LIMIT + 1).read_to_string(&mut text));
    if length.map_err(failed)? as u64 > LIMIT {
        return Err(Failure::new(ErrorCode::Usage, format!("{shown} has more than {LIMIT} bytes")));
    }
    view(&text, &shown.to_string()).map(Success::XlConfig)
}

fn view(text: &str, file: &str) -> Result<XlConfigView, Failure> {
    let wrong =
        |(line, why): (usize, String)| Failure::new(ErrorCode::Usage, format!("{file}:{line}: {why}"));
    let config = parse(text).map_err(wrong)?;
    let name = config.name.ok_or_else(|| wrong((1, "no name = \"GUEST\"".to_owned())))?;
    if config.functions.is_empty() {
        let text = format!("{file} gives '{name}' no functions: it has no pci = [...]");
        return Err(Failure::not_found(text));
    }
    let (mut functions, mut notes) = (Vec::new(), Vec::new());
    for (line, item) in config.functions {
        let place: PciSpec = item.parse().map_err(|failure: Failure| Failure {
            message: format!("{file}:{line}: {}", failure.message),
            ..failure
        })?;
        let Functions::One(function) = place.functions else {
            let why = "name the functions of the device one by one: settings give a guest certain functions";
            return Err(wrong((line, format!("'{item}': {why}"))));
        };
        let slot = place.slot.map(|slot| format!("@{slot:x}")).unwrap_or_default();
        functions.push(format!("{function}{slot}"));
        notes.extend(place.notes.into_iter().map(str::to_owned));
    }
    notes.sort();
    notes.dedup();
    // A guest's name may be any text; a JSON string is also a valid YAML string.
    let quoted = |text: &str| serde_json::Value::from(text).to_string();
    let list = functions.iter().map(|function| quoted(function)).collect::<Vec<_>>().join(", ");
    let settings = format!("guests:\n  {}: [{list}]\n", quoted(&name));
    let instead = match config.hvm {
        true => "passthrough=\"enabled\"",
        // For a PV guest, xl sets both if pci is not empty.
        false => "passthrough=\"enabled\" and e820_host=1",
    };
    Ok(XlConfigView {
        guest: name,
        file: file.to_owned(),
        functions,
        settings,
        instead: instead.to_owned(),
        notes,
    })
}

/// The settings, with the further steps as comments.
pub(super) fn text(view: &XlConfigView) -> String {
    let XlConfigView { guest, file, functions, settings, instead, notes } = view;
    let bare: Vec<&str> =
        functions.iter().map(|function| function.split('@').next().unwrap_or(function)).collect();
    let mut text = format!(
        "# Functions of '{guest}', from {file}:\n\
         # 1. shut the guest down;\n\
         # 2. in {file}, write {instead} in place of pci = [...];\n\
         # 3. put these lines into a file /etc/xpci/xpcid.yaml.d/NAME.yaml, and run 'systemctl restart xpcid';\n\
         # 4. run 'xpci pci-assignable-add --persist {}', and start the guest.\n",
        bare.join(" ")
    );
    for note in notes {
        _ = writeln!(text, "# {note}");
    }
    text + settings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn functions(text: &str) -> Vec<String> {
        parse(text).unwrap().functions.into_iter().map(|(_, function)| function).collect()
    }

    #[test]
    fn lists_of_both_kinds_of_strings_over_several_lines_with_comments_are_read() {
        let text = "name = 'web' # a guest\nmemory=512;vcpus = 2\n\npci = [ '01:10.0', # the first\n  \"02:00.0@3,permissive=1\",\n]\n\
                    disk = [ [ 'a', 'b' ], 'phy:/dev/x,xvda,w' ]\nextra = \"pci=['09:00.0']\"\n";
        let config = parse(text).unwrap();
        assert_eq!(config.name.as_deref(), Some("web"));
        assert_eq!(config.functions, [(4, "01:10.0".to_owned()), (5, "02:00.0@3,permissive=1".to_owned())]);
    }

    #[test]
    fn the_last_list_counts_unless_it_is_appended() {
        assert_eq!(functions("pci=['01:00.0']\npci=['02:00.0']\n"), ["02:00.0"]);
        assert_eq!(functions("pci=['01:00.0']\npci += ['02:00.0']"), ["01:00.0", "02:00.0"]);
        assert_eq!(functions("pci=['01:00.0']\npci+=['02:00.0']"), ["01:00.0", "02:00.0"]);
    }

    #[test]
    fn an_invalid_configuration_is_reported_with_its_line() {
        for (text, line, said) in [
            ("name='web'\npci = [ '01:00.0'", 2, "the file ends"),
            ("name='web'\n\npci = '01:00.0'\n", 3, "list of strings"),
            ("pci = [ '01:00.0\n ]", 1, "no ' ends the string"),
            ("pci = [ '01:00.0' '02:00.0' ]", 1, "',' or ']' is expected"),
            ("pci = [ ['01:00.0'] ]", 1, "is a string"),
            ("pci\n", 1, "NAME = VALUE"),
            ("= 3\n", 1, "NAME = VALUE"),
            ("memory = \n", 1, "a value is expected"),
            ("memory = 3 4\n", 1, "end of the line"),
        ] {
            let (found, why) = parse(text).unwrap_err();
            assert!(found == line && why.contains(said), "{text:?}: {found}: {why}");
        }
        assert!(parse(&"pci=[".repeat(100_000)).unwrap_err().1.contains("expected"));
        assert!(parse(&format!("pci={}", "[".repeat(100_000))).unwrap_err().1.contains("nested"));
    }

    #[test]
    fn options_of_xl_become_slots_and_notes() {
        let view =
            view("name='a \"b\"'\ntype='hvm'\npci=['01:10.0,vslot=1f,permissive=1','name=nic']\n", "a.cfg")
                .unwrap();
        assert_eq!(view.functions, ["0000:01:10.0@1f", "nic"]);
        assert_eq!(view.settings, "guests:\n  \"a \\\"b\\\"\": [\"0000:01:10.0@1f\", \"nic\"]\n");
        assert!(view.notes[0].contains("permissive"), "{:?}", view.notes);
        assert_eq!(view.instead, "passthrough=\"enabled\"");
    }

    #[test]
    fn an_unsupported_option_is_reported_with_its_line() {
        let failure = view("name='web'\npci=['01:10.0',\n'01:10.2,seize=1']\n", "a.cfg").unwrap_err();
        assert!(failure.message.starts_with("a.cfg:3: 'seize=1'"), "{}", failure.message);
    }
}
