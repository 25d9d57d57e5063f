//! xenstore through libxenstore.
//!
//! The library serialises requests of several threads itself; its first `xs_watch` starts a thread that reads all
//! answers, and events then wait in a list whose state a pipe shows. A transaction belongs to the connection, so other
//! threads' requests may come in between without being part of it.

use std::ffi::{CStr, CString, c_char, c_void};
use std::os::fd::{BorrowedFd, RawFd};
use std::ptr::NonNull;
use std::slice;
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::libc;

use super::bindings::{Libraries, XBT_NULL, XS_PERM_NONE, XS_PERM_READ, xs_handle, xs_permissions};
use crate::DomId;
use crate::platform::{Cause, Permissions, PlatformError, Result, Store, StoreOps, WatchEvent};

/// How often a transaction is tried.
const ATTEMPTS: usize = 100;

/// The host's xenstore.
pub struct XenStoreConnection {
    libraries: Arc<Libraries>,
    handle: NonNull<xs_handle>,
    events: RawFd,
}

// SAFETY: libxenstore's handle is not bound to a thread.
unsafe impl Send for XenStoreConnection {}
// SAFETY: libxenstore locks its handle for each request and for the list of events.
unsafe impl Sync for XenStoreConnection {}

/// Memory that the library allocated for an answer, freed when dropped.
struct Allocated<T>(NonNull<T>);

impl<T> Allocated<T> {
    fn new(pointer: *mut T) -> std::result::Result<Self, Errno> {
        NonNull::new(pointer).map(Self).ok_or_else(Errno::last)
    }

    /// # Safety
    /// The library must have put `count` values there.
    unsafe fn values(&self, count: u32) -> &[T] {
        // SAFETY: promised by the caller; the memory is valid as long as `self`.
        unsafe { slice::from_raw_parts(self.0.as_ptr(), count as usize) }
    }
}

impl<T> Drop for Allocated<T> {
    fn drop(&mut self) {
        // SAFETY: the library allocated it with `malloc` and leaves it to the caller.
        unsafe { libc::free(self.0.as_ptr().cast::<c_void>()) };
    }
}

/// Makes what is absent `None`.
fn present<T>(result: std::result::Result<T, Errno>) -> std::result::Result<Option<T>, Errno> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(Errno::ENOENT) => Ok(None),
        Err(errno) => Err(errno),
    }
}

fn done(success: bool) -> std::result::Result<(), Errno> {
    if success { Ok(()) } else { Err(Errno::last()) }
}

fn c_string(text: &str) -> std::result::Result<CString, Errno> {
    CString::new(text).map_err(|_| Errno::EINVAL)
}

impl XenStoreConnection {
    /// Connects to xenstored.
    pub fn open(libraries: &Arc<Libraries>) -> Result<Self> {
        // SAFETY: 0 are valid flags.
        let opened = unsafe { libraries.store.xs_open(0) };
        let handle = NonNull::new(opened).ok_or_else(|| {
            let why = format!("{} (is xenstored running?)", Errno::last());
            PlatformError::new("connect to", "xenstore", Cause::NotYet(why))
        })?;
        let mut store = Self { libraries: Arc::clone(libraries), handle, events: -1 };
        // SAFETY: the handle is open.
        store.events = unsafe { libraries.store.xs_fileno(handle.as_ptr()) };
        if store.events < 0 {
            return Err(PlatformError::new("open", "xenstore's event pipe", Errno::last()));
        }
        fcntl(store.event_fd(), FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))
            .map_err(|errno| PlatformError::new("set close-on-exec on", "xenstore's event pipe", errno))?;
        Ok(store)
    }

    fn within(&self, transaction: u32) -> Within<'_> {
        Within { store: self, transaction }
    }

    fn handle(&self) -> *mut xs_handle {
        self.handle.as_ptr()
    }

    fn start(&self) -> Result<Transaction<'_>> {
        // SAFETY: the handle is open.
        let id = unsafe { self.libraries.store.xs_transaction_start(self.handle()) };
        if id == XBT_NULL {
            return Err(PlatformError::new("start", "a xenstore transaction", Errno::last()));
        }
        Ok(Transaction { store: self, id, open: true })
    }
}

impl Drop for XenStoreConnection {
    fn drop(&mut self) {
        // SAFETY: the handle is open, and nothing uses it any more.
        unsafe { self.libraries.store.xs_close(self.handle()) };
    }
}

/// A transaction that is given up unless it is committed.
struct Transaction<'a> {
    store: &'a XenStoreConnection,
    id: u32,
    open: bool,
}

impl Transaction<'_> {
    fn commit(&mut self) -> std::result::Result<(), Errno> {
        self.end(false)
    }

    fn end(&mut self, abort: bool) -> std::result::Result<(), Errno> {
        self.open = false;
        // SAFETY: the handle is open; the transaction was started on it and is ended once.
        done(unsafe { self.store.libraries.store.xs_transaction_end(self.store.handle(), self.id, abort) })
    }
}

impl Drop for Transaction<'_> {
    fn drop(&mut self) {
        if self.open
            && let Err(errno) = self.end(true)
        {
            log::error!("give up a xenstore transaction: {errno}");
        }
    }
}

/// The nodes as a transaction sees them, or outside of any.
struct Within<'a> {
    store: &'a XenStoreConnection,
    transaction: u32,
}

impl Within<'_> {
    fn get(&self, path: &str) -> std::result::Result<Vec<u8>, Errno> {
        let path = c_string(path)?;
        let mut length = 0;
        // SAFETY: the handle is open; path and length live as long as the call.
        let answer = Allocated::new(unsafe {
            self.store.libraries.store.xs_read(
                self.store.handle(),
                self.transaction,
                path.as_ptr(),
                &raw mut length,
            )
        })?;
        let bytes = Allocated::<u8>(answer.0.cast());
        std::mem::forget(answer);
        // SAFETY: the library says that it put `length` bytes there.
        Ok(unsafe { bytes.values(length) }.to_vec())
    }

    fn children(&self, path: &str) -> std::result::Result<Vec<String>, Errno> {
        let path = c_string(path)?;
        let mut count = 0;
        // SAFETY: the handle is open; path and count live as long as the call.
        let answer: Allocated<*mut c_char> = Allocated::new(unsafe {
            self.store.libraries.store.xs_directory(
                self.store.handle(),
                self.transaction,
                path.as_ptr(),
                &raw mut count,
            )
        })?;
        // SAFETY: the library says that it put `count` pointers there.
        let names = unsafe { answer.values(count) };
        // SAFETY: each points to a C string within the same allocation. xenstored accepts ASCII names only.
        Ok(names.iter().map(|name| unsafe { CStr::from_ptr(*name) }.to_string_lossy().into_owned()).collect())
    }

    fn put(&self, path: &str, value: &[u8]) -> std::result::Result<(), Errno> {
        let path = c_string(path)?;
        let length = u32::try_from(value.len()).map_err(|_| Errno::E2BIG)?;
        // SAFETY: the handle is open; path and value live as long as the call, and the value has this length.
        done(unsafe {
            self.store.libraries.store.xs_write(
                self.store.handle(),
                self.transaction,
                path.as_ptr(),
                value.as_ptr().cast(),
                length,
            )
        })
    }

    fn delete(&self, path: &str) -> std::result::Result<(), Errno> {
        let path = c_string(path)?;
        // SAFETY: the handle is open, and the path is valid during the call.
        done(unsafe {
            self.store.libraries.store.xs_rm(self.store.handle(), self.transaction, path.as_ptr())
        })
    }

    fn set(&self, path: &str, permissions: &Permissions) -> std::result::Result<(), Errno> {
        let path = c_string(path)?;
        let owner = xs_permissions { id: permissions.owner.0.into(), perms: XS_PERM_NONE };
        let readers =
            permissions.readers.iter().map(|id| xs_permissions { id: id.0.into(), perms: XS_PERM_READ });
        let mut list: Vec<_> = std::iter::once(owner).chain(readers).collect();
        let count = u32::try_from(list.len()).map_err(|_| Errno::E2BIG)?;
        // SAFETY: the handle is open; path and list live as long as the call, and the list has `count` entries.
        done(unsafe {
            self.store.libraries.store.xs_set_permissions(
                self.store.handle(),
                self.transaction,
                path.as_ptr(),
                list.as_mut_ptr(),
                count,
            )
        })
    }

    fn owners(&self, path: &str) -> std::result::Result<Vec<xs_permissions>, Errno> {
        let path = c_string(path)?;
        let mut count = 0;
        // SAFETY: the handle is open; path and count live as long as the call.
        let answer = Allocated::new(unsafe {
            self.store.libraries.store.xs_get_permissions(
                self.store.handle(),
                self.transaction,
                path.as_ptr(),
                &raw mut count,
            )
        })?;
        // SAFETY: the library says that it put `count` entries there.
        Ok(unsafe { answer.values(count) }.to_vec())
    }
}

fn domain(id: u32) -> std::result::Result<DomId, Cause> {
    u16::try_from(id).map(DomId).map_err(|_| Cause::Malformed(format!("domain id {id}")))
}

impl StoreOps for Within<'_> {
    fn read(&self, path: &str) -> Result<Option<Vec<u8>>> {
        present(self.get(path)).map_err(|errno| PlatformError::new("read xenstore node", path, errno))
    }

    fn list(&self, path: &str) -> Result<Vec<String>> {
        present(self.children(path))
            .map(Option::unwrap_or_default)
            .map_err(|errno| PlatformError::new("list xenstore node", path, errno))
    }

    fn write(&self, path: &str, value: &[u8]) -> Result<()> {
        self.put(path, value).map_err(|errno| PlatformError::new("write xenstore node", path, errno))
    }

    fn remove(&self, path: &str) -> Result<()> {
        present(self.delete(path))
            .map(drop)
            .map_err(|errno| PlatformError::new("remove xenstore node", path, errno))
    }

    fn set_permissions(&self, path: &str, permissions: &Permissions) -> Result<()> {
        self.set(path, permissions)
            .map_err(|errno| PlatformError::new("set the permissions of xenstore node", path, errno))
    }

    fn permissions(&self, path: &str) -> Result<Option<Permissions>> {
        let error = |cause: Cause| PlatformError::new("read the permissions of xenstore node", path, cause);
        let Some(list) = present(self.owners(path)).map_err(|errno| error(errno.into()))? else {
            return Ok(None);
        };
        let Some((owner, others)) = list.split_first() else {
            return Err(error(Cause::Malformed("no owner".into())));
        };
        let readers = others.iter().filter(|entry| entry.perms & XS_PERM_READ != 0);
        Ok(Some(Permissions {
            owner: domain(owner.id).map_err(error)?,
            readers: readers
                .map(|entry| domain(entry.id))
                .collect::<std::result::Result<_, _>>()
                .map_err(error)?,
        }))
    }
}

impl StoreOps for XenStoreConnection {
    fn read(&self, path: &str) -> Result<Option<Vec<u8>>> {
        self.within(XBT_NULL).read(path)
    }

    fn list(&self, path: &str) -> Result<Vec<String>> {
        self.within(XBT_NULL).list(path)
    }

    fn write(&self, path: &str, value: &[u8]) -> Result<()> {
        self.within(XBT_NULL).write(path, value)
    }

    fn remove(&self, path: &str) -> Result<()> {
        self.within(XBT_NULL).remove(path)
    }

    fn set_permissions(&self, path: &str, permissions: &Permissions) -> Result<()> {
        self.within(XBT_NULL).set_permissions(path, permissions)
    }

    fn permissions(&self, path: &str) -> Result<Option<Permissions>> {
        self.within(XBT_NULL).permissions(path)
    }
}

impl Store for XenStoreConnection {
    fn transaction(&self, body: &mut dyn FnMut(&dyn StoreOps) -> Result<()>) -> Result<()> {
        for _ in 0..ATTEMPTS {
            let mut transaction = self.start()?;
            body(&self.within(transaction.id))?;
            match transaction.commit() {
                Ok(()) => return Ok(()),
                Err(Errno::EAGAIN) => {}
                Err(errno) => return Err(PlatformError::new("commit", "a xenstore transaction", errno)),
            }
        }
        let subject = format!("a xenstore transaction, {ATTEMPTS} times");
        Err(PlatformError::new("commit", subject, Errno::EAGAIN))
    }

    fn domain_exists(&self, domain: DomId) -> Result<bool> {
        // SAFETY: the handle is open.
        Ok(unsafe { self.libraries.store.xs_is_domain_introduced(self.handle(), u32::from(domain.0)) })
    }

    fn watch(&self, path: &str, token: &str) -> Result<()> {
        let watch = || {
            let (path, token) = (c_string(path)?, c_string(token)?);
            // SAFETY: the handle is open; path and token live as long as the call.
            done(unsafe { self.libraries.store.xs_watch(self.handle(), path.as_ptr(), token.as_ptr()) })
        };
        watch().map_err(|errno| PlatformError::new("watch xenstore node", path, errno))
    }

    fn unwatch(&self, path: &str, token: &str) -> Result<()> {
        let unwatch = || {
            let (path, token) = (c_string(path)?, c_string(token)?);
            // SAFETY: the handle is open; path and token live as long as the call.
            done(unsafe { self.libraries.store.xs_unwatch(self.handle(), path.as_ptr(), token.as_ptr()) })
        };
        unwatch().map_err(|errno| PlatformError::new("stop watching xenstore node", path, errno))
    }

    fn event_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor stays open as long as the handle, which `self` owns.
        unsafe { BorrowedFd::borrow_raw(self.events) }
    }

    fn next_event(&self) -> Result<Option<WatchEvent>> {
        // SAFETY: the handle is open.
        let strings = unsafe { self.libraries.store.xs_check_watch(self.handle()) };
        let strings = match Allocated::new(strings) {
            Ok(strings) => strings,
            Err(Errno::EAGAIN) => return Ok(None),
            // The library's reader has left because xenstored closed the connection.
            Err(errno) => return Err(PlatformError::new("take", "a xenstore event", errno)),
        };
        // SAFETY: the library checks that there are at least two: path and token.
        let pair = unsafe { strings.values(2) };
        // SAFETY: both point to C strings within the same allocation.
        let text = |index: usize| unsafe { CStr::from_ptr(pair[index]) }.to_string_lossy().into_owned();
        Ok(Some(WatchEvent { path: text(0), token: text(1) }))
    }
}
