//! The service's side of its control socket and of its socket for the status group. One thread serves each client; the number of clients
//! and the length of lines are limited.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use log::{debug, warn};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::sockopt::PeerCredentials;
use nix::sys::socket::{
    self, AddressFamily, Backlog, SockFlag, SockType, UnixAddr, UnixCredentials, bind, getsockopt, socket,
};
use nix::sys::stat::{Mode, fchmod};
use nix::unistd::{Group, geteuid};

use crate::engine::{Event, Inbox};
use crate::guest_names::GuestNames;
use crate::outcome::{ErrorCode, Failure};
use crate::protocol::{Call, Envelope, LINE_LIMIT};
use crate::reply::{Line, Reply};

/// The largest number of clients; further ones are refused.
const CLIENT_LIMIT: usize = 64;
/// A client that does not read its answer for this long is dropped.
const WRITE_LIMIT: Duration = Duration::from_secs(10);
/// The pause after a failed accept, for example while no file descriptor is free.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);
/// The interval at which a waiting client is checked for a hang-up.
const HANGUP_INTERVAL: Duration = Duration::from_secs(5);

/// The requests that a socket accepts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Access {
    /// All requests.
    Control,
    /// Requests that change nothing.
    Status,
}

/// Listens at `path`, for root only, until the process ends.
pub fn listen(path: &Path, inbox: Inbox, names: GuestNames) -> io::Result<()> {
    remove_former(path)?;
    let listener = bind_for_owner(path)?;
    thread::Builder::new()
        .name("control".into())
        .spawn(move || accept(&listener, &inbox, &names, Access::Control))?;
    Ok(())
}

/// Listens at `path`, for root and the members of a group, and accepts requests that change nothing. Without a group, a socket that an
/// earlier process left there is removed.
pub fn listen_for_group(path: &Path, group: Option<&str>, inbox: Inbox, names: GuestNames) -> io::Result<()> {
    remove_former(path)?;
    let Some(name) = group else { return Ok(()) };
    let group = Group::from_name(name)?
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("there is no group '{name}'")))?;
    let listener = bind_for_owner(path)?;
    // After it is bound, because the service's umask applies to the mode at bind and would remove the group's bits.
    set_group(path, &group)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o660))?;
    if let Some(directory) = path.parent() {
        allow_entry(directory, &group)?;
    }
    thread::Builder::new()
        .name("status".into())
        .spawn(move || accept(&listener, &inbox, &names, Access::Status))?;
    Ok(())
}

/// Removes the socket of an earlier process. The caller holds the service's lock, so no running process uses it.
fn remove_former(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Lets a group open files in a directory by name, without listing it. systemd resets the directory's owner and mode before each start.
fn allow_entry(directory: &Path, group: &Group) -> io::Result<()> {
    let mode = fs::metadata(directory)?.mode() & 0o7777;
    // A directory that others may enter, such as /run, is not changed.
    if mode & 0o001 != 0 {
        return Ok(());
    }
    let allow = |mode| fs::set_permissions(directory, fs::Permissions::from_mode(mode));
    // Permissions of the directory's former group must not apply to this one.
    allow(mode & !0o070)?;
    set_group(directory, group)?;
    allow(mode & !0o070 | 0o010)
}

/// Changes the group of a file that the service owns; no capability is needed if the service is a member of the group.
fn set_group(path: &Path, group: &Group) -> io::Result<()> {
    chown(path, None, Some(group.gid.as_raw())).map_err(|error| match error.kind() {
        io::ErrorKind::PermissionDenied => io::Error::new(
            error.kind(),
            format!("{error}: the service is not a member; 'systemctl edit xpcid': [Service] SupplementaryGroups={}", group.name),
        ),
        _ => error,
    })
}

/// Creates a socket to which no other user can connect at any time: the file gets the mode that the socket has when it is bound
/// (`unix(7)`).
fn bind_for_owner(path: &Path) -> io::Result<UnixListener> {
    let socket = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR)?;
    bind(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    socket::listen(&socket, Backlog::new(CLIENT_LIMIT as i32)?)?;
    Ok(socket.into())
}

/// The credentials of a client; an error unless it is root or the user of the service. The mode of the status socket restricts who can
/// connect to it.
fn peer(stream: &UnixStream, access: Access) -> Result<UnixCredentials, Failure> {
    let peer = getsockopt(stream, PeerCredentials).map_err(|errno| {
        Failure::new(ErrorCode::Failed, format!("ask who connects to the socket: {errno}"))
    })?;
    let user = peer.uid();
    if access == Access::Status || user == 0 || user == geteuid().as_raw() {
        return Ok(peer);
    }
    Err(Failure::refused(format!("user {user} may not control xpcid"))
        .hint("run xpci as root, for example with sudo"))
}

fn no_change(name: &str) -> Failure {
    let text = format!(
        "only root may use {name}: members of the status group may only send requests that change nothing"
    );
    Failure::refused(text).hint("run xpci as root, for example with sudo")
}

fn accept(listener: &UnixListener, inbox: &Inbox, names: &GuestNames, access: Access) {
    let clients = Arc::new(AtomicUsize::new(0));
    let mut failing = false;
    for stream in listener.incoming() {
        let stream = match stream {
            Ok(stream) => stream,
            Err(error) => {
                if !failing {
                    warn!("accept control connections: {error}; trying again every {ACCEPT_AGAIN:?}");
                }
                failing = true;
                // The client stays in the queue, so that the next accept would fail at once: no event tells when a descriptor is free.
                thread::sleep(ACCEPT_AGAIN);
                continue;
            }
        };
        failing = false;
        let peer = match peer(&stream, access) {
            Ok(peer) => peer,
            Err(failure) => {
                warn!("{failure}");
                let _ = send(&stream, &Envelope::done(0, "", Err(failure)));
                continue;
            }
        };
        if clients.fetch_add(1, Ordering::Relaxed) >= CLIENT_LIMIT {
            clients.fetch_sub(1, Ordering::Relaxed);
            let failure = Failure::refused(format!("xpcid serves {CLIENT_LIMIT} clients already; try again"));
            let _ = send(&stream, &Envelope::done(0, "", Err(failure)));
            continue;
        }
        let (inbox, names, clients_left) = (inbox.clone(), names.clone(), Arc::clone(&clients));
        let spawned = thread::Builder::new().name("client".into()).spawn(move || {
            if let Err(error) = converse(&stream, &inbox, &names, peer, access) {
                debug!("control connection: {error}");
            }
            clients_left.fetch_sub(1, Ordering::Relaxed);
        });
        if let Err(error) = spawned {
            clients.fetch_sub(1, Ordering::Relaxed);
            warn!("serve a control connection: {error}");
        }
    }
}

fn converse(
    stream: &UnixStream,
    inbox: &Inbox,
    names: &GuestNames,
    peer: UnixCredentials,
    access: Access,
) -> io::Result<()> {
    stream.set_write_timeout(Some(WRITE_LIMIT))?;
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = Vec::new();
        let length = reader.by_ref().take(LINE_LIMIT as u64 + 1).read_until(b'\n', &mut line)?;
        if length == 0 {
            return Ok(());
        }
        if length > LINE_LIMIT {
            let failure =
                Failure::new(ErrorCode::Usage, format!("a request is longer than {LINE_LIMIT} bytes"));
            return send(stream, &Envelope::done(0, "", Err(failure)));
        }
        match Call::parse(&line) {
            Ok(call) => {
                let (name, user, process) = (call.request.name(), peer.uid(), peer.pid());
                debug!("{name}: asked by user {user}, process {process}");
                match access {
                    Access::Status if !call.request.changes_nothing() => {
                        send(stream, &Envelope::done(call.id, name, Err(no_change(name))))?;
                    }
                    Access::Control | Access::Status => answer(stream, inbox, names, call)?,
                }
            }
            Err((id, failure)) => send(stream, &Envelope::done(id, "", Err(failure)))?,
        }
    }
}

fn answer(stream: &UnixStream, inbox: &Inbox, names: &GuestNames, call: Call) -> io::Result<()> {
    let name = call.request.name();
    let (reply, lines) = Reply::channel();
    inbox.send(Event::Call { request: call.request, reply });
    loop {
        let line = match lines.recv_timeout(HANGUP_INTERVAL) {
            Ok(line) => line,
            // A client that follows events may hang up long before the next event.
            Err(mpsc::RecvTimeoutError::Timeout) if has_hung_up(stream)? => return Ok(()),
            Err(mpsc::RecvTimeoutError::Timeout) => continue,
            Err(mpsc::RecvTimeoutError::Disconnected) => break,
        };
        match line {
            Line::Event(event) => send(stream, &Envelope::event(call.id, name, *event))?,
            Line::Written(_) => {}
            Line::Progress(mut text) => {
                names.lookup().name_in(&mut text);
                send(stream, &Envelope::progress(call.id, name, text))?;
            }
            Line::Done(mut outcome) => {
                names.lookup().name_all(&mut outcome);
                return send(stream, &Envelope::done(call.id, name, *outcome));
            }
        }
    }
    let failure = Failure::new(ErrorCode::Unreachable, "xpcid stopped before it answered").hint(
        "when it runs again, it completes or undoes what it had begun; 'xpci status' shows the outcome",
    );
    send(stream, &Envelope::done(call.id, name, Err(failure)))
}

fn has_hung_up(stream: &UnixStream) -> io::Result<bool> {
    let mut fds = [PollFd::new(stream.as_fd(), PollFlags::empty())];
    poll(&mut fds, PollTimeout::ZERO)?;
    Ok(fds[0].revents().is_some_and(|events| !events.is_empty()))
}

fn send(mut stream: &UnixStream, envelope: &Envelope) -> io::Result<()> {
    let mut line = serde_json::to_vec(envelope)?;
    line.push(b'\n');
    stream.write_all(&line)
}
