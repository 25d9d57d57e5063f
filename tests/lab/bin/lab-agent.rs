//! The lab's agent inside dom0 (`lab-agent dom0`), inside a guest (`lab-agent guest`), and the bridge between the two
//! (`lab-agent console TTY`).

use anyhow::{Result, bail};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["dom0"] => xpci_tests::agent::serve_dom0(),
        ["guest"] => xpci_tests::agent::serve_guest(),
        ["console", tty] => xpci_tests::agent::bridge_console(tty),
        _ => bail!("usage: lab-agent dom0|guest|console TTY"),
    }
}
