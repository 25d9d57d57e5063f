//! `xpci mailbox`.

use clap::Subcommand;
use pciback::mailbox::DATA_LIMIT;

use super::Step;
use crate::outcome::{ErrorCode, Failure};
use crate::protocol::{Request, message_data};
use crate::target::Target;

/// Commands for the mailboxes of VFs whose PF no guest has: dom0 is on its side then.
#[derive(Debug, Subcommand)]
pub enum Mailbox {
    /// Sends a message to the guest of a VF.
    Send {
        /// The type of the message, 0-65535, as the driver of the VF knows it.
        #[arg(long = "type", value_name = "TYPE", default_value_t = 0)]
        kind: u16,
        /// A number for the driver of the VF.
        #[arg(long, default_value_t = 0)]
        sequence: u32,
        /// DATA is bytes in hexadecimal, and not text.
        #[arg(long)]
        hex: bool,
        /// The VF.
        #[arg(value_name = "VF")]
        address: Target,
        /// The data, at most 256 bytes.
        #[arg(default_value = "")]
        data: String,
    },
    /// Receives the messages that guests of VFs have sent. Each is received once.
    Receive {
        /// Continues with each new message until interrupted, also when xpcid restarts; with --json, one object for each answer.
        #[arg(long)]
        follow: bool,
        /// The VF, or the PF for all of its VFs.
        #[arg(value_name = "VF|PF")]
        address: Target,
    },
}

impl Mailbox {
    pub(super) fn step(self) -> Result<Step, Failure> {
        match self {
            Self::Send { kind, sequence, hex, address, data } => {
                let data = if hex { data } else { data.bytes().map(|byte| format!("{byte:02x}")).collect() };
                if message_data(&data).is_none() {
                    let text = match hex {
                        true => format!("the data is not at most {DATA_LIMIT} bytes in hexadecimal"),
                        false => format!("the data has more than {DATA_LIMIT} bytes"),
                    };
                    return Err(Failure::new(ErrorCode::Usage, format!("cannot send it: {text}")));
                }
                Ok(Step::Ask(Request::MailboxSend { address, kind, sequence, data }))
            }
            Self::Receive { follow: false, address } => Ok(Step::Ask(Request::MailboxReceive { address })),
            Self::Receive { follow: true, address } => {
                Ok(Step::FollowMessages(Request::MailboxReceive { address }))
            }
        }
    }
}
