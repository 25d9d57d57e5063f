//! A child that dies with its parent, however that ends.

use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::unistd::{Pid, getppid};

/// Has the kernel kill the child when the thread that starts it ends: start it from a thread that outlives it.
pub fn die_with_parent(command: &mut Command) {
    let parent = Pid::this();
    let between_fork_and_exec = move || {
        set_pdeathsig(Signal::SIGKILL)?;
        // The parent may have died before the line above; then there is no one to report to.
        if getppid() == parent { Ok(()) } else { Err(std::io::Error::from_raw_os_error(nix::libc::ESRCH)) }
    };
    #[expect(unsafe_code, reason = "nothing in std sets the parent-death signal")]
    // SAFETY: the closure makes two system calls and neither allocates nor takes locks.
    unsafe {
        command.pre_exec(between_fork_and_exec);
    }
}
