//! What goes over the control socket, checked against the schemas of the protocol.

use std::io::{self, BufRead, BufReader, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use serde_json::Value;
use xpci_test_support::schema::Schema;

/// One of the two schemas, `request` or `answer`.
pub fn schema(name: &str) -> Schema {
    Schema::read(Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../docs/schema/{name}.json"))).unwrap()
}

/// A socket that passes everything on to the service and back.
pub struct Wire {
    pub socket: PathBuf,
    seen: Arc<Mutex<Seen>>,
}

#[derive(Default)]
struct Seen {
    lines: usize,
    mistakes: Vec<String>,
}

impl Wire {
    /// One beside the service's, at this path.
    pub fn to(service: &Path, socket: PathBuf) -> Self {
        // A transcript may be played on a service twice.
        let _ = std::fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket).unwrap();
        let (service, seen) = (service.to_owned(), Arc::<Mutex<Seen>>::default());
        let noted = Arc::clone(&seen);
        thread::spawn(move || {
            let schemas = Arc::new([schema("request"), schema("answer")]);
            for client in listener.incoming().map_while(Result::ok) {
                let Ok(server) = UnixStream::connect(&service) else { continue };
                let ends = [(client.try_clone(), server.try_clone()), (Ok(server), Ok(client))];
                for (which, (from, to)) in ends.into_iter().enumerate() {
                    let (schemas, noted) = (Arc::clone(&schemas), Arc::clone(&noted));
                    thread::spawn(move || pass_on(from?, to?, &schemas[which], &noted));
                }
            }
        });
        Self { socket, seen }
    }

    /// Fails where a line was none of the protocol.
    pub fn assert_good(&self) {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        assert!(
            seen.mistakes.is_empty(),
            "the schemas in docs/schema do not fit:\n{}",
            seen.mistakes.join("\n")
        );
        assert!(seen.lines > 1, "nothing was asked and answered");
    }
}

/// Passes lines on, each checked before it goes on: when a client has its answer, that has been checked.
fn pass_on(from: UnixStream, mut to: UnixStream, schema: &Schema, seen: &Mutex<Seen>) -> io::Result<()> {
    for line in BufReader::new(from).lines() {
        let line = line?;
        let mistakes = match serde_json::from_str::<Value>(&line) {
            Ok(value) => schema.mistakes(&value),
            Err(error) => vec![error.to_string()],
        };
        {
            let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
            seen.lines += 1;
            seen.mistakes.extend(mistakes.into_iter().map(|mistake| format!("{mistake}: {line}")));
        }
        to.write_all(format!("{line}\n").as_bytes())?;
    }
    to.shutdown(Shutdown::Write)
}
