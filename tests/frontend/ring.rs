//! A page shared with dom0, an event channel to it, and requests on the page (`xen/io/pciif.h`).

#![expect(unsafe_code, reason = "ioctls and a page that another domain writes have no safe interface")]

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

const GRANTS: &str = "/dev/xen/gntalloc";
const CHANNELS: &str = "/dev/xen/evtchn";
const PAGE_BYTES: usize = 4096;
/// How long the answer is looked for on the page before this process sleeps: a guess. On a quiet host 50 us and 300 us were alike.
const SPIN: Duration = Duration::from_micros(50);
/// An answer that takes longer is none. Linux's xen-pcifront gives up after two seconds.
const LIMIT: Duration = Duration::from_secs(20);

/// `struct ioctl_gntalloc_alloc_gref` for one page.
#[repr(C)]
struct AllocGref {
    domain: u16,
    flags: u16,
    count: u32,
    index: u64,
    grant: u32,
}

const GNTALLOC_WRITABLE: u16 = 1;

/// `_IOC(_IOC_NONE, type, number, size)`, as both drivers make their numbers.
const fn ioc(kind: u8, number: u8, size: usize) -> u64 {
    (size as u64) << 16 | (kind as u64) << 8 | number as u64
}

const ALLOC_GREF: u64 = ioc(b'G', 5, size_of::<AllocGref>());
const BIND_UNBOUND_PORT: u64 = ioc(b'E', 2, size_of::<u32>());
const NOTIFY: u64 = ioc(b'E', 4, size_of::<u32>());

/// `T` must be what this request of this driver reads and writes.
unsafe fn ioctl<T>(file: &File, request: u64, argument: &mut T) -> Result<u32> {
    // SAFETY: the descriptor is open, and the caller has chosen the argument's type for the request.
    let answer = unsafe { libc::ioctl(file.as_raw_fd(), request, ptr::from_mut(argument)) };
    u32::try_from(answer).map_err(|_| std::io::Error::last_os_error().into())
}

fn open(path: &str) -> Result<File> {
    let opened = OpenOptions::new().read(true).write(true).open(path);
    opened.with_context(|| format!("opening {path}; is its module loaded?"))
}

/// One request: command, segment, bus, device and function, offset, size, value, info; any values.
pub struct Request<'a> {
    pub fields: [u32; 8],
    /// MSI-X table entries.
    pub entries: &'a [u16],
}

/// What the backend wrote.
pub struct Answer {
    pub error: i32,
    pub value: u32,
    /// One for each entry of the request.
    pub vectors: Vec<u16>,
}

/// Words of the page.
mod word {
    pub const FLAGS: usize = 0;
    pub const COMMAND: usize = 1;
    pub const ERROR: usize = 2;
    pub const DOMAIN: usize = 3;
    pub const VALUE: usize = 8;
    pub const MSIX_ENTRIES: usize = 10;
}

const ACTIVE: u32 = 1;

/// A page and a port, both for dom0. They stay until the process ends.
pub struct Ring {
    words: &'static [AtomicU32],
    channels: File,
    pub grant: u32,
    pub port: u32,
    _grants: File,
}

impl Ring {
    pub fn new() -> Result<Self> {
        let (grants, channels) = (open(GRANTS)?, open(CHANNELS)?);
        let mut wanted = AllocGref { domain: 0, flags: GNTALLOC_WRITABLE, count: 1, index: 0, grant: 0 };
        // SAFETY: the argument is this request's structure, with room for its one grant.
        unsafe { ioctl(&grants, ALLOC_GREF, &mut wanted) }.context("sharing a page")?;
        let mut remote = 0u32;
        // SAFETY: the argument is this request's structure, the number of a domain.
        let port = unsafe { ioctl(&channels, BIND_UNBOUND_PORT, &mut remote) }.context("making a port")?;
        let (access, offset) = (libc::PROT_READ | libc::PROT_WRITE, wanted.index.cast_signed());
        // SAFETY: the kernel chooses the place, so nothing that exists is touched.
        let mapped = unsafe {
            libc::mmap(ptr::null_mut(), PAGE_BYTES, access, libc::MAP_SHARED, grants.as_raw_fd(), offset)
        };
        ensure!(mapped != libc::MAP_FAILED, "mapping the page: {}", std::io::Error::last_os_error());
        // SAFETY: it is mapped, aligned and zeroed, never unmapped, and all that is ever made of it are atomics.
        let words = unsafe { std::slice::from_raw_parts(mapped.cast::<AtomicU32>(), PAGE_BYTES / 4) };
        Ok(Self { words, channels, grant: wanted.grant, port, _grants: grants })
    }

    /// Puts a request on the page, notifies dom0, waits for the answer.
    pub fn ask(&mut self, request: &Request<'_>) -> Result<Answer> {
        let put = |index: usize, value: u32| self.words[index].store(value, Ordering::Relaxed);
        let [command, rest @ ..] = request.fields;
        put(word::COMMAND, command);
        // Neither is an error that exists nor a value that was asked for: the backend has to write both.
        put(word::ERROR, 0x5a5a_5a5a);
        for (index, value) in rest.into_iter().enumerate() {
            put(word::DOMAIN + index, value);
        }
        for (index, entry) in request.entries.iter().enumerate() {
            put(word::MSIX_ENTRIES + index, u32::from(*entry) << 16);
        }
        self.words[word::FLAGS].fetch_or(ACTIVE, Ordering::Release);
        self.notify()?;
        self.answer(request.entries.len())
    }

    /// Waits until no request is active, and takes what is on the page, with this many vectors.
    pub fn answer(&mut self, vectors: usize) -> Result<Answer> {
        self.await_answer()?;
        let get = |index: usize| self.words[index].load(Ordering::Relaxed);
        let vectors = (0..vectors).map(|index| get(word::MSIX_ENTRIES + index) as u16).collect();
        Ok(Answer { error: get(word::ERROR).cast_signed(), value: get(word::VALUE), vectors })
    }

    pub fn poke(&self, index: usize, value: u32) -> Result<()> {
        self.words.get(index).context("no such word")?.store(value, Ordering::SeqCst);
        Ok(())
    }

    pub fn peek(&self, index: usize) -> Result<u32> {
        Ok(self.words.get(index).context("no such word")?.load(Ordering::SeqCst))
    }

    pub fn notify(&self) -> Result<()> {
        let mut port = self.port;
        // SAFETY: the argument is this request's structure, the number of a port.
        unsafe { ioctl(&self.channels, NOTIFY, &mut port) }.context("sending an event").map(drop)
    }

    fn answered(&self) -> bool {
        self.words[word::FLAGS].load(Ordering::Acquire) & ACTIVE == 0
    }

    fn await_answer(&mut self) -> Result<()> {
        let begun = Instant::now();
        while begun.elapsed() < SPIN {
            if self.answered() {
                return Ok(());
            }
            std::hint::spin_loop();
        }
        while !self.answered() {
            let left = LIMIT.saturating_sub(begun.elapsed());
            let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            let mut fds = [PollFd::new(self.channels.as_fd(), PollFlags::POLLIN)];
            let came = poll(&mut fds, left).context("waiting for an event")?;
            ensure!(came > 0, "no answer within {LIMIT:?}");
            let mut port = [0; 4];
            self.channels.read_exact(&mut port).context("taking an event")?;
            self.channels.write_all(&port).context("unmasking the port")?;
        }
        Ok(())
    }
}
