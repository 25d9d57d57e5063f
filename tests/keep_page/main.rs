//! A program for a hostile guest: it maps a page of physical memory and keeps it, whatever happens to the device there.
//!
//! `keep-page ADDRESS` maps the page at a hexadecimal physical address through /dev/mem, prints `mapped`, and answers each line
//! `OFFSET` (hexadecimal, a multiple of 4 below 1000) with the 32 bits there.

use std::fs::OpenOptions;
use std::io::{BufRead, Write};
use std::num::NonZeroUsize;
use std::os::unix::fs::OpenOptionsExt;

use anyhow::{Context, Result, ensure};
use nix::sys::mman::{MapFlags, ProtFlags, mmap};

const PAGE: NonZeroUsize = NonZeroUsize::new(4096).unwrap();

fn main() -> Result<()> {
    let address = std::env::args().nth(1).context("which address?")?;
    let address = i64::from_str_radix(&address, 16).with_context(|| address.clone())?;
    let memory =
        OpenOptions::new().read(true).write(true).custom_flags(nix::libc::O_SYNC).open("/dev/mem")?;
    #[expect(unsafe_code, reason = "mapping memory")]
    // SAFETY: a new mapping at an address that the kernel chooses overlaps nothing.
    let page = unsafe {
        mmap(None, PAGE, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED, &memory, address)
    }
    .with_context(|| format!("map {address:x}"))?;
    println!("mapped");
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let offset = usize::from_str_radix(line.trim(), 16).with_context(|| line.clone())?;
        ensure!(offset < PAGE.get() && offset.is_multiple_of(4), "{line}: not an offset in a page");
        #[expect(unsafe_code, reason = "address within the mapping")]
        // SAFETY: the offset lies within the mapping.
        let register = unsafe { page.cast::<u32>().add(offset / 4) };
        #[expect(unsafe_code, reason = "access to the mapping")]
        // SAFETY: the page is never unmapped, and the register is aligned.
        let value = unsafe { register.read_volatile() };
        println!("{value:08x}");
        std::io::stdout().flush()?;
    }
    Ok(())
}
