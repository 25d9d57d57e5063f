//! What is no request, on the control socket.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;

use serde_json::Value;

use crate::daemon::{Daemon, LIMIT};
use crate::transcript::host;
use crate::wire::schema;

fn connect(daemon: &Daemon) -> UnixStream {
    let stream = UnixStream::connect(daemon.socket()).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.set_write_timeout(Some(LIMIT)).unwrap();
    stream
}

fn answer(stream: &UnixStream) -> Value {
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).unwrap();
    let answer = serde_json::from_str(&line).unwrap();
    assert_eq!(schema("answer").mistakes(&answer), [""; 0], "{line}");
    answer
}

fn assert_alive(daemon: &Daemon) {
    let output = daemon.xpci(&["status"]);
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn an_invalid_request_is_answered_with_an_error_and_the_connection_stays_open() {
    let daemon = Daemon::start(&host());
    let mut stream = connect(&daemon);
    for (line, id, said) in [
        (&b"GET / HTTP/1.0"[..], 0, "not JSON"),
        (b"\xff\xfe\x00", 0, "not JSON"),
        (b"", 0, "not JSON"),
        (b"[1, 2]", 0, "version 1"),
        (br#"{"id": 4}"#, 4, "version 1"),
        (br#"{"version": 2, "id": 5, "command": "status"}"#, 5, "version 1"),
        (br#"{"version": 1, "id": 6, "command": "dance"}"#, 6, "dance"),
        (br#"{"version": 1, "id": 7, "command": "pci-assignable-add"}"#, 7, "not understood"),
        (br#"{"version": 1, "id": -1, "command": "status"}"#, 0, "not understood"),
    ] {
        stream.write_all(&[line, b"\n"].concat()).unwrap();
        let answer = answer(&stream);
        let error = &answer["error"];
        assert_eq!((&answer["id"], &error["code"]), (&id.into(), &"usage".into()), "{answer}");
        assert!(error["message"].as_str().unwrap().contains(said), "{answer}");
    }
    stream.write_all(b"{\"version\": 1, \"id\": 9, \"command\": \"status\"}\n").unwrap();
    assert_eq!(answer(&stream)["ok"], true);
}

#[test]
fn a_line_that_is_too_long_is_refused() {
    let daemon = Daemon::start(&host());
    let mut stream = connect(&daemon);
    // Exactly one byte more than it takes: it answers without having left anything unread.
    stream.write_all(&vec![b'x'; toolstack::protocol::LINE_LIMIT + 1]).unwrap();
    let answer = answer(&stream);
    assert_eq!(answer["error"]["code"], "usage", "{answer}");
    assert!(answer["error"]["message"].as_str().unwrap().contains("longer than"), "{answer}");
    assert_alive(&daemon);
}

#[test]
fn a_client_that_disconnects_within_a_line_or_before_its_answer_is_dropped() {
    let daemon = Daemon::start(&host());
    for text in ["{\"version\": 1, \"id\"", "{\"version\": 1, \"id\": 1, \"command\": \"status\"}\n"] {
        connect(&daemon).write_all(text.as_bytes()).unwrap();
    }
    assert_alive(&daemon);
}

#[test]
fn excess_clients_are_refused_until_others_disconnect() {
    let daemon = Daemon::start(&host());
    let ask = b"{\"version\": 1, \"id\": 1, \"command\": \"status\"}\n";
    let clients: Vec<UnixStream> = (0..64)
        .map(|_| {
            let mut client = connect(&daemon);
            client.write_all(ask).unwrap();
            assert_eq!(answer(&client)["ok"], true);
            client
        })
        .collect();
    let output = daemon.xpci(&["status"]);
    assert_eq!(output.status.code(), Some(5), "{output:?}");
    drop(clients);
    // It notices that they left when it reads from them: a few tries are refused still.
    let served = (0..10_000).any(|_| daemon.xpci(&["status"]).status.success());
    assert!(served, "nobody is served though all have left");
}
