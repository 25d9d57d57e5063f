//! Any line of a client.

use toolstack::protocol::{Call, Envelope, LINE_LIMIT, Request, message_data};

/// What is understood means the same when it is written again; what is not is answered by a line that a client reads.
pub fn control_line(data: &[u8]) {
    assert!(data.len() <= LINE_LIMIT);
    let call = match Call::parse(data) {
        Ok(call) => call,
        Err((id, failure)) => {
            assert!(!failure.message.is_empty());
            let answer = Envelope::done(id, "", Err(failure));
            let line = serde_json::to_vec(&answer).expect("an answer");
            assert!(!line.contains(&b'\n') && line.len() < 8 * data.len() + 1000, "{} bytes", line.len());
            assert_eq!(serde_json::from_slice::<Envelope>(&line).expect("an answer of ours"), answer);
            return;
        }
    };
    let line = serde_json::to_vec(&call).expect("a request");
    assert_eq!(Call::parse(&line).expect("a request of ours"), call);
    let _ = call.request.changes_nothing();
    match &call.request {
        Request::Restore { guest } => {
            if guest.check().is_ok() {
                assert!(guest.functions.len() <= 32 && guest.called().len() <= 255);
            }
        }
        Request::MailboxSend { data, .. } => {
            if let Some(bytes) = message_data(data) {
                assert_eq!(bytes.len() * 2, data.len());
            }
        }
        _ => {}
    }
}
