//! `make demo` and `make demo-pf`: what xpci does on a real Xen host inside QEMU, explained to a first-time reader.

mod pf;
mod story;
mod vf;

use std::time::Instant;

use anyhow::{Result, bail};

fn main() -> Result<()> {
    let begun = Instant::now();
    match std::env::args().nth(1).as_deref() {
        None => vf::tell(begun),
        Some("pf") => pf::tell(begun),
        Some(other) => bail!("there is no demo '{other}'; there is one without a name, and 'pf'"),
    }
}
