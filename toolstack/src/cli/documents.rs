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

/// Where the shells look for completions, below `share`.
const COMPLETIONS: [(Shell, &str); 3] = [
    (Shell::Bash, "bash-completion/completions"),
    (Shell::Zsh, "zsh/site-functions"),
    (Shell::Fish, "fish/vendor_completions.d"),
];

/// Writes them below a folder that is to be `share`.
pub(super) fn write(share: &Path) -> Result<Success, Failure> {
    let failed = |error: io::Error| {
        Failure::new(ErrorCode::Failed, format!("write the documents to {}: {error}", share.display()))
    };
    manual_pages(share).and_then(|()| completions(share)).map_err(failed)?;
    let message = format!("manual pages and completions are in {}", share.display());
    Ok(Success::Changed { message, warnings: Vec::new(), functions: Vec::new() })
}

fn manual_pages(share: &Path) -> io::Result<()> {
    let (user, system) = (share.join("man/man1"), share.join("man/man8"));
    fs::create_dir_all(&user)?;
    fs::create_dir_all(&system)?;
    // One page for each command besides that of the program.
    clap_mangen::generate_to(Cli::command().disable_help_subcommand(true), &user)?;
    let mut page = Vec::new();
    Man::new(ServiceArguments::command()).section("8").render(&mut page)?;
    fs::write(system.join("xpcid.8"), page)
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
