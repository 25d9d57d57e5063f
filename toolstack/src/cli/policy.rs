//! `xpci policy`: commands with and without the service.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand, ValueEnum};
use pciback::dump;
use pciback::policy::{
    Dumped, Explanation, Kind, PolicyFile, PolicySet, dumped_specs, explain, obstacles, rom_unknown, schema,
};

use super::Step;
use crate::outcome::{ErrorCode, Failure};
use crate::policies::{self, PolicyError};
use crate::protocol::{CheckedView, Request, Success};
use crate::settings;
use crate::target::Target;

/// Commands for policies.
#[derive(Debug, Subcommand)]
pub enum Policy {
    /// Shows which policy files apply to a function, in the order in which they are merged, and the result.
    Show {
        /// The function.
        #[arg(long = "for", value_name = "BDF")]
        address: Target,
        /// The result for this guest; without it, for the guest that has the function.
        #[arg(long, value_name = "NAME")]
        domain: Option<String>,
    },
    /// Checks policy files; without FILE, those of the settings' directories.
    ///
    /// Shows each mistake with line, column and the nearest valid word. Does not need the service.
    Check {
        /// The files.
        #[arg(value_name = "FILE")]
        files: Vec<PathBuf>,
    },
    /// Shows for each register what a guest reads, what its writes do, and the rule that decides it.
    Explain(ExplainArguments),
    /// Shows the blocked writes of a guest, and the smallest addition to a policy that permits them, with its risk.
    Learn {
        /// A guest, by name or number, or one of its functions.
        #[arg(value_name = "DOMAIN|BDF")]
        target: String,
    },
    /// Reads the policy files again and applies them, to connected guests too. A mistake in a file changes nothing.
    Reload,
    /// Prints the JSON schema of policy files, for editors. Does not need the service.
    Schema,
}

/// The arguments of `policy explain`.
#[derive(Debug, Args)]
pub struct ExplainArguments {
    /// A function of this host, under the policies in force.
    #[arg(value_name = "BDF", required_unless_present = "dump", conflicts_with_all = ["dump", "policy", "kind"])]
    pub address: Option<Target>,
    /// The result for this guest; without it, for the guest that has the function.
    #[arg(long, value_name = "NAME", requires = "address")]
    pub domain: Option<String>,
    /// The functions of a dump in the format of 'lspci -xxxx' ('-': standard input), under the built-in rules. Does not need the
    /// service.
    #[arg(long, value_name = "FILE")]
    pub dump: Option<PathBuf>,
    /// With --dump: applies this policy file too, whether it matches or not; may be given several times.
    #[arg(long, value_name = "FILE", requires = "dump")]
    pub policy: Vec<PathBuf>,
    /// With --dump: the kind of the functions; without it, what the dump shows.
    #[arg(long = "as", value_name = "KIND", requires = "dump")]
    pub kind: Option<As>,
}

/// The kind of the functions in a dump.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum As {
    /// Physical functions.
    Pf,
    /// Virtual functions.
    Vf,
}

/// Commands that run without the service.
#[derive(Debug)]
pub enum Local {
    /// Checks policy files.
    Check(Vec<PathBuf>),
    /// Explains a dump.
    Explain {
        /// The dump.
        dump: PathBuf,
        /// The policy files.
        policies: Vec<PathBuf>,
        /// The kind of its functions.
        kind: Option<As>,
    },
    /// Prints the schema.
    Schema,
    /// Writes an ACPI table.
    AcpiTable(PathBuf),
    /// Converts an xl configuration file.
    XlConfig(PathBuf),
    /// Writes manual pages and completions.
    Documents(PathBuf),
}

impl Policy {
    pub(super) fn step(self) -> Step {
        match self {
            Self::Show { address, domain } => Step::Ask(Request::PolicyShow { address, domain }),
            Self::Check { files } => Step::Local(Local::Check(files)),
            Self::Explain(ExplainArguments { dump: Some(dump), policy, kind, .. }) => {
                Step::Local(Local::Explain { dump, policies: policy, kind })
            }
            Self::Explain(ExplainArguments { address, domain, .. }) => match address {
                Some(address) => Step::Ask(Request::PolicyExplain { address, domain }),
                // clap requires one of the two.
                None => Step::Local(Local::Explain { dump: "-".into(), policies: Vec::new(), kind: None }),
            },
            Self::Learn { target } => Step::Ask(Request::PolicyLearn { target }),
            Self::Reload => Step::Ask(Request::PolicyReload),
            Self::Schema => Step::Local(Local::Schema),
        }
    }
}

impl Local {
    /// The command's name in the envelope.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Check(_) => "policy-check",
            Self::Explain { .. } => "policy-explain",
            Self::Schema => "policy-schema",
            Self::AcpiTable(_) => "hvm-acpi-table",
            Self::XlConfig(_) => "xl-config",
            Self::Documents(_) => "documents",
        }
    }

    /// Runs the command.
    pub fn run(self) -> Result<Success, Failure> {
        match self {
            Self::Check(files) => check(&files),
            Self::Explain { dump, policies, kind } => explain_dump(&dump, &policies, kind),
            Self::Schema => Ok(Success::Schema { schema: schema() }),
            Self::Documents(directory) => super::documents::write(&directory),
            Self::AcpiTable(path) => super::hvm::write_acpi_table(&path),
            Self::XlConfig(path) => super::xl_config::convert(&path),
        }
    }
}

fn failed(error: PolicyError) -> Failure {
    let failure = Failure::new(ErrorCode::Failed, error.to_string());
    match error {
        PolicyError::Invalid(mistakes) => failure.mistakes(mistakes.0),
        _ => failure,
    }
}

fn sources(files: &[PathBuf]) -> Result<PolicySet, Failure> {
    let sources = files.iter().map(|file| policies::read(file)).collect::<Result<Vec<_>, _>>();
    sources.and_then(|sources| policies::parse(&sources)).map_err(failed)
}

fn check(files: &[PathBuf]) -> Result<Success, Failure> {
    let set = if files.is_empty() {
        let settings = settings::load(None)
            .map_err(|error| Failure::new(ErrorCode::Failed, error.to_string()))?
            .settings;
        in_directories(&settings.policy_directories)?
    } else {
        sources(files)?
    };
    let view = |file: &PolicyFile| CheckedView {
        name: file.name.clone(),
        matches: file.matching.to_string(),
        rules: file.capabilities.len() + file.registers.len(),
    };
    Ok(Success::Checked { files: set.files().iter().map(view).collect() })
}

/// The policies of some directories, with at least one file.
fn in_directories(directories: &[PathBuf]) -> Result<PolicySet, Failure> {
    let set = policies::load(directories).map_err(failed)?.1;
    if set.files().is_empty() {
        let named: Vec<String> = directories.iter().map(|path| path.display().to_string()).collect();
        let text = format!("there are no policy files to check in {}", named.join(", "));
        let hint = "name the files to check; or set 'policy-directories' in xpcid.yaml";
        return Err(Failure::new(ErrorCode::NotFound, text).hint(hint));
    }
    Ok(set)
}

fn explain_dump(path: &Path, files: &[PathBuf], kind: Option<As>) -> Result<Success, Failure> {
    let shown = path.display();
    let unreadable =
        |error: io::Error| Failure::new(ErrorCode::Failed, format!("cannot read the dump {shown}: {error}"));
    let mut text = Vec::new();
    let limit = dump::MAX_TEXT as u64 + 1;
    if path == Path::new("-") {
        io::stdin().take(limit).read_to_end(&mut text).map_err(unreadable)?;
    } else {
        File::open(path).and_then(|file| file.take(limit).read_to_end(&mut text)).map_err(unreadable)?;
    }
    // Device names may have any encoding; the digits are ASCII.
    let dump::Dump { functions, damage } = dump::read(&String::from_utf8_lossy(&text)).map_err(|error| {
        Failure::new(ErrorCode::Failed, format!("{shown}: {error}"))
            .hint("'lspci -xxxx', as root, writes what is expected; one device: 'lspci -xxxx -s 01:10.0'")
    })?;
    let set = sources(files)?;
    let merged = set.all();
    let kind = kind.map(|kind| if kind == As::Vf { Kind::Virtual } else { Kind::Physical });
    let explained = |Dumped { spec, unknown }: Dumped| Explanation {
        obstacles: obstacles(&spec, &merged, None),
        unknown: unknown.into_iter().chain(rom_unknown(&spec, &merged)).collect(),
        ..explain(&spec, &merged.policy, None)
    };
    let devices = dumped_specs(&functions, kind).into_iter().map(explained).collect();
    let damage = damage.iter().map(|error| format!("{shown}: {error}")).collect();
    Ok(Success::Explained { devices, damage })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checking_no_files_is_a_failure() {
        let directory = tempfile::tempdir().unwrap();
        let directories = [directory.path().to_owned(), "/nonexistent".into()];
        let failure = in_directories(&directories).err().unwrap();
        assert_eq!(failure.code, ErrorCode::NotFound);
        assert!(failure.message.contains("/nonexistent"), "{failure}");
        std::fs::write(directory.path().join("strict.yaml"), "profile: strict\n").unwrap();
        assert_eq!(in_directories(&directories).unwrap().files().len(), 1);
    }
}
