//! `xpci documents`: the manual pages and shell completions of both programs, for packages and `make install`.

use std::fs;
use std::io;
use std::path::Path;

use clap::CommandFactory;
use clap_complete::{Shell, generate_to};
use clap_mangen::Man;

use super::{Cli, ServiceArguments};
use crate::outcome::{ErrorCode, Failure};
use crate::protocol::Success;

/// The directories for shell completions, below `share`.
const COMPLETIONS: [(Shell, &str); 3] = [
    (Shell::Bash, "bash-completion/completions"),
    (Shell::Zsh, "zsh/site-functions"),
    (Shell::Fish, "fish/vendor_completions.d"),
];

/// The file formats: name, description, paths, and an example with all keys.
const FORMATS: [(&str, &str, &str, &str); 2] = [
    (
        "xpcid.yaml",
        "settings of xpcid",
        "/etc/xpci/xpcid.yaml, /etc/xpci/xpcid.yaml.d/*.yaml",
        include_str!("../../../configs/xpcid.yaml"),
    ),
    (
        "xpci-policy",
        "policies of xpcid: what guests may do with the registers of their functions",
        "/etc/xpci/policies/*.yaml, /usr/share/xpci/policies/*.yaml",
        include_str!("../../../configs/policies/example.yaml"),
    ),
];

/// Writes the documents below a directory that is to become `share`.
pub(super) fn write(share: &Path) -> Result<Success, Failure> {
    let failed = |error: io::Error| {
        Failure::new(ErrorCode::Failed, format!("cannot write the documents to {}: {error}", share.display()))
    };
    manual_pages(share).and_then(|()| completions(share)).map_err(failed)?;
    let message = format!("manual pages and completions are in {}", share.display());
    Ok(Success::Changed { message, warnings: Vec::new(), functions: Vec::new() })
}

fn manual_pages(share: &Path) -> io::Result<()> {
    let (user, system) = (share.join("man/man1"), share.join("man/man8"));
    fs::create_dir_all(&user)?;
    fs::create_dir_all(&system)?;
    // One page for the program, and one for each command.
    clap_mangen::generate_to(Cli::command().disable_help_subcommand(true), &user)?;
    for entry in fs::read_dir(&user)? {
        let path = entry?.path();
        let page = fs::read_to_string(&path)?;
        // What clap calls so is explained under NOTES in manual pages (man-pages(7)).
        fs::write(&path, page.replace("\n.SH EXTRA\n", "\n.SH NOTES\n"))?;
    }
    let mut page = Vec::new();
    Man::new(ServiceArguments::command()).section("8").render(&mut page)?;
    fs::write(system.join("xpcid.8"), page)?;
    let formats = share.join("man/man5");
    fs::create_dir_all(&formats)?;
    for (name, purpose, place, text) in FORMATS {
        fs::write(formats.join(format!("{name}.5")), file_format(name, purpose, place, text))?;
    }
    Ok(())
}

/// The manual page of a file format: an example with all keys and their meaning.
fn file_format(name: &str, purpose: &str, place: &str, text: &str) -> String {
    let (title, version) = (name.to_uppercase(), crate::VERSION);
    let mut page = format!(
        ".TH {title} 5 \"\" \"xpci {version}\"\n.SH NAME\n{name} \\- {purpose}\n.SH SYNOPSIS\n{place}\n.SH DESCRIPTION\n\
         All keys, in YAML, with their meaning in comments:\n.PP\n.nf\n"
    );
    for line in text.lines() {
        // Otherwise a dot or an apostrophe at the start of a line would be a roff request.
        page.push_str("\\&");
        page.push_str(&line.replace('\\', "\\e").replace('-', "\\-"));
        page.push('\n');
    }
    page.push_str(".fi\n.SH SEE ALSO\nxpci(1), xpcid(8)\n");
    page
}

fn completions(share: &Path) -> io::Result<()> {
    for (shell, folder) in COMPLETIONS {
        let folder = share.join(folder);
        fs::create_dir_all(&folder)?;
        for (name, mut command) in [("xpci", Cli::command()), ("xpcid", ServiceArguments::command())] {
            let written = generate_to(shell, &mut command, name, &folder)?;
            if shell == Shell::Bash {
                // bash-completion looks for a file named after the program.
                fs::rename(written, folder.join(name))?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_manual_pages_of_the_file_formats_have_every_line_of_the_shipped_files() {
        let share = tempfile::tempdir().unwrap();
        write(share.path()).unwrap();
        for (name, _, _, text) in FORMATS {
            let page = fs::read_to_string(share.path().join(format!("man/man5/{name}.5"))).unwrap();
            let shown: Vec<String> = page
                .lines()
                .filter_map(|line| line.strip_prefix("\\&"))
                .map(|line| line.replace("\\-", "-").replace("\\e", "\\"))
                .collect();
            assert_eq!(shown, text.lines().collect::<Vec<_>>(), "{name}");
        }
    }
}
