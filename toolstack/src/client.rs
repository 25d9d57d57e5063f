//! The client's side of the control socket.

use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use crate::outcome::{ErrorCode, Failure};
use crate::protocol::{ANSWER_LIMIT, Call, Envelope, Request, STATUS_SOCKET, VERSION};
use crate::target::Target;

/// Sends a request and returns the final answer; progress lines go to `progress`.
pub fn call(
    socket: &Path,
    request: Request<Target>,
    progress: &mut dyn FnMut(&str),
) -> Result<Envelope, Failure> {
    follow(socket, request, &mut |envelope| {
        if let Some(text) = &envelope.progress {
            progress(text);
        }
    })
}

/// The hint for a service that does not answer.
const START: &str = "start it with 'systemctl start xpcid', as root; its log says why it stopped";

/// The hint for a failed connection.
fn connect_hint(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::PermissionDenied => {
            "only root may use it: run the command as root, for example with sudo; 'status-group' in the settings lets a group send requests that change nothing"
        }
        _ => START,
    }
}

/// As [`call`], with all envelopes before the final one passed to `on_envelope`.
pub fn follow(
    socket: &Path,
    request: Request<Target>,
    on_envelope: &mut dyn FnMut(&Envelope),
) -> Result<Envelope, Failure> {
    follow_on(connect(socket)?, socket, request, on_envelope)
}

fn unreachable(socket: &Path, what: &str, why: &dyn std::fmt::Display) -> Failure {
    Failure::new(ErrorCode::Unreachable, format!("cannot {what} xpcid at {}: {why}", socket.display()))
        .hint(START)
}

/// Connects to `socket`, or else to the status group's socket beside it.
pub fn connect(socket: &Path) -> Result<UnixStream, Failure> {
    let failed = |socket: &Path, error: io::Error| {
        Err(unreachable(socket, "connect to", &error).hint(connect_hint(error.kind())))
    };
    let denied = match UnixStream::connect(socket) {
        Ok(stream) => return Ok(stream),
        Err(error) if error.kind() == ErrorKind::PermissionDenied => error,
        Err(error) => return failed(socket, error),
    };
    // Members of the status group may use only that socket.
    let status = socket.with_file_name(STATUS_SOCKET);
    match UnixStream::connect(&status) {
        Ok(stream) => Ok(stream),
        Err(error) if matches!(error.kind(), ErrorKind::PermissionDenied | ErrorKind::NotFound) => {
            failed(socket, denied)
        }
        Err(error) => failed(&status, error),
    }
}

/// As [`follow`], on an open connection.
pub fn follow_on(
    mut stream: UnixStream,
    socket: &Path,
    request: Request<Target>,
    on_envelope: &mut dyn FnMut(&Envelope),
) -> Result<Envelope, Failure> {
    let unreachable = |what: &str, why: &dyn std::fmt::Display| unreachable(socket, what, why);
    let call = Call { version: VERSION, id: 1, request };
    let mut line = serde_json::to_vec(&call).map_err(|error| unreachable("write to", &error))?;
    line.push(b'\n');
    // A service that refuses a client sends an answer and closes the connection without reading. So a write error is reported only if
    // there is no answer.
    let written = stream.write_all(&line);
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = String::new();
        let length = reader.by_ref().take(ANSWER_LIMIT as u64).read_line(&mut line);
        let length = length.map_err(|error| unreachable("read from", &error))?;
        if let (0, Err(error)) = (length, &written) {
            return Err(unreachable("write to", error));
        }
        if length == 0 {
            return Err(unreachable("read from", &"it closed the connection before it answered"));
        }
        let envelope: Envelope =
            serde_json::from_str(&line).map_err(|error| unreachable("understand the answer of", &error))?;
        if envelope.ok.is_some() {
            return Ok(envelope);
        }
        on_envelope(&envelope);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hint_for_denied_permission_is_sudo_and_otherwise_how_to_start_the_service() {
        assert!(connect_hint(ErrorKind::PermissionDenied).contains("sudo"));
        for kind in [ErrorKind::NotFound, ErrorKind::ConnectionRefused] {
            assert!(connect_hint(kind).contains("systemctl start xpcid"), "{kind}");
        }
    }
}
