//! The limit of open files: each attached function needs several.

use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Files that the service opens independent of guests: connections of libraries, xenstore, clients, the journal.
const FIXED: u64 = 256;
/// The largest number of files for one attached function: config space, mapped BARs, the guest's event channel and page.
const PER_FUNCTION: u64 = 4;

/// Raises the soft limit to the hard limit (setrlimit(2)), and returns it.
pub fn raise_limit() -> Result<u64, Errno> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft < hard {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    }
    Ok(hard)
}

/// A warning if the limit is too low for all functions of the host to be attached.
pub fn shortage(limit: u64, functions: usize) -> Option<String> {
    let needed = FIXED + PER_FUNCTION * functions as u64;
    (limit < needed).then(|| {
        format!(
            "xpcid can open {limit} files, and the {functions} functions of this host may need {needed} with guests: raise LimitNOFILE \
             in its systemd unit ('systemctl edit xpcid'), or 'ulimit -Hn'"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_that_is_too_low_for_the_hosts_functions_is_reported_with_what_they_need() {
        assert_eq!(shortage(1024, 64), None);
        assert_eq!(shortage(FIXED + 4096 * PER_FUNCTION, 4096), None);
        let said = shortage(1024, 4096).unwrap();
        assert!(
            said.contains("1024 files") && said.contains("16640") && said.contains("LimitNOFILE"),
            "{said}"
        );
    }
}
