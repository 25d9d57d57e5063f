//! The name of the command that a command line has, for answers to command lines that cannot be understood as well.

use clap::CommandFactory;

use super::Cli;

/// The words of the command, joined by `-`, as in `vf-create`; empty if there is none.
pub fn typed(words: &[String]) -> String {
    let mut words = words.iter();
    let mut name = String::new();
    let mut command = Cli::command();
    while let Some(word) = words.next() {
        match command.find_subcommand(word) {
            Some(found) => {
                name = [name.as_str(), found.get_name()].join("-");
                command = found.clone();
            }
            _ if word == "--socket" => drop(words.next()),
            _ if word.starts_with('-') => {}
            _ => break,
        }
    }
    name.trim_start_matches('-').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_named_whatever_is_wrong_with_its_arguments() {
        for (line, name) in [
            ("--json pci-attach web nonsense", "pci-attach"),
            ("--socket vf --json vf create", "vf-create"),
            ("vf --json set", "vf-set"),
            ("--json pci-list vf", "pci-list"),
            ("--json foo pci-list", ""),
            ("--json", ""),
        ] {
            let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
            assert_eq!(typed(&words), name, "{line}");
        }
    }
}
