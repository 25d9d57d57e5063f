//! Anything that a device model says, cut into any pieces.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use pciback::Devfn;
use pciback::config::Access;
use pciback::platform::xen::converse;

/// How long a conversation may take. None is waited for: the device model has said everything before.
const LIMIT: Duration = Duration::from_secs(5);
/// The most pieces that fit into a socket.
const PIECES: usize = 120;
/// The largest piece, in bytes: what is read at once.
const PIECE: usize = 4096;

/// The first byte says what is asked, the second into how large pieces the answers are cut.
pub fn qmp(data: &[u8]) {
    let [what, cut, said @ ..] = data else { return };
    // Each piece is a packet, so that they stay apart.
    let pair = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::empty());
    let (ours, mut theirs) =
        pair.map(|(ours, theirs)| (UnixStream::from(ours), UnixStream::from(theirs))).expect("sockets");
    let piece = (1 + usize::from(*cut)).max(said.len() / PIECES + 1).min(PIECE);
    for piece in said.chunks(piece) {
        theirs.write_all(piece).expect("room in the socket");
    }
    theirs.shutdown(Shutdown::Write).expect("a connected socket");
    let function = Devfn(what / 6 << 3);
    let access = Access::new(u32::from(*cut & 0xfc), 1 << (cut & 3).min(2)).expect("a register");
    match converse(ours, LIMIT, *what, function, access) {
        Ok(came) => assert!(came.len() < 100, "{came}"),
        Err(cause) => {
            let text = cause.to_string();
            assert!(text.chars().count() < 400 && !text.contains(char::is_control), "{text:?}");
        }
    }
    // What QEMU is told is one object a line, and not much.
    let mut heard = vec![0; PIECE];
    for told in 0.. {
        let Ok(length @ 1..) = theirs.read(&mut heard) else { break };
        assert!(told < 10, "QEMU is told too much");
        let command: serde_json::Value = serde_json::from_slice(&heard[..length]).expect("a line of JSON");
        assert!(command["execute"].is_string() && command["arguments"].is_object(), "{command}");
    }
}
