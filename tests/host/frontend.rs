//! What the frontend of our own in a PV guest (`tests/frontend`) is told to be a frontend.

/// The program, in a machine with the guest program `frontend`.
pub const PROGRAM: &str = "/lab/frontend";
/// How long the backend may take to follow, in milliseconds.
const FOLLOWS: u32 = 30_000;

/// What a frontend does.
#[derive(Debug, Clone, Copy)]
pub enum Step {
    /// It goes to a state.
    Go(u8),
    /// It waits for the backend's.
    Await(u8),
    /// It names its page, its port and the protocol.
    Publish,
}

/// From whatever was before.
pub const CONNECT: [Step; 6] =
    [Step::Go(1), Step::Await(3), Step::Publish, Step::Go(3), Step::Await(4), Step::Go(4)];

impl Step {
    /// The order for it, and its answer.
    pub fn order(self) -> (String, String) {
        match self {
            Self::Go(state) => (format!("node state {}", hex(state.to_string())), "ok".to_owned()),
            Self::Await(state) => (format!("await {state} {FOLLOWS}"), state.to_string()),
            Self::Publish => ("publish".to_owned(), "ok".to_owned()),
        }
    }
}

/// Text as the frontend takes it for a node.
pub fn hex(text: impl AsRef<[u8]>) -> String {
    text.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}
