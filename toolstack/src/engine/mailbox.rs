//! Mailboxes between VFs and the owners of their PFs: who is on the side of a PF, doorbells of guests, and what dom0 sends and receives.

use log::warn;
use pciback::mailbox::{DATA_LIMIT, Message, Status};
use pciback::serve::pv::nodes;
use pciback::{DomId, Sbdf};

use super::Engine;
use crate::outcome::{ErrorCode, Failure};
use crate::protocol::{MessageView, Success, message_data};

/// How many messages one request receives at most.
const MOST_RECEIVED: usize = 64;

impl Engine {
    /// The guest of a function has changed, or may have: another owner of a PF gets nothing of the last one's.
    pub(super) fn settle_mailboxes(&self, address: Sbdf) {
        if let Some(pf) = self.mailboxes.pf_of(address) {
            self.mailboxes.settle(pf, self.functions.records().guest(pf));
        }
    }

    /// The earlier run may have been killed before it said who has a PF, or rang a doorbell.
    pub(super) fn resume_mailboxes(&self) {
        for pf in self.mailboxes.pfs() {
            self.mailboxes.settle(pf, self.functions.records().guest(pf));
        }
        self.ring_doorbells();
    }

    /// Notifies the guests of functions that have got messages.
    pub(super) fn ring_doorbells(&self) {
        for (address, waiting) in self.mailboxes.rung() {
            let Some(place) = self.functions.records().place(address) else { continue };
            let store = self.platform.store.as_ref();
            if let Err(error) = nodes::ring(store, place.domain, place.devfn, waiting) {
                warn!("{address}: notify domain {} of a message: {error}", place.domain);
            }
        }
    }

    /// Sends a message of dom0's to a VF.
    pub(super) fn send_message(
        &self,
        vf: Sbdf,
        (kind, sequence): (u16, u32),
        data: &str,
    ) -> Result<Success, Failure> {
        let data = message_data(data).ok_or_else(|| {
            let text =
                format!("cannot send to {vf}: the data is not at most {DATA_LIMIT} bytes in hexadecimal");
            Failure::new(ErrorCode::Usage, text)
        })?;
        let end = self.mailboxes.pf_of(vf).zip(self.mailboxes.number_of(vf));
        let (pf, number) = end.ok_or_else(|| self.no_mailbox("send to", vf))?;
        match self.mailboxes.send(pf, &Message { kind, vf: number, sequence, data }) {
            Status::Done => {
                self.ring_doorbells();
                Ok(Success::Changed {
                    message: format!("sent to {vf}"),
                    warnings: Vec::new(),
                    functions: Vec::new(),
                })
            }
            Status::Full => Err(Failure::refused(format!(
                "cannot send to {vf}: its guest has not received the last messages"
            ))
            .on(vf)
            .hint("try again")),
            _ => Err(self.no_mailbox("send to", vf)),
        }
    }

    /// Takes the messages for dom0 of a VF, or of all VFs of a PF.
    pub(super) fn receive_messages(&self, address: Sbdf) -> Result<Success, Failure> {
        let no_mailbox = || self.no_mailbox("receive from", address);
        let pf = self.mailboxes.pf_of(address).ok_or_else(no_mailbox)?;
        let vf = self.mailboxes.number_of(address);
        let mut messages = Vec::new();
        while messages.len() < MOST_RECEIVED {
            match self.mailboxes.receive(pf, vf) {
                Ok((vf, message)) => messages.push(MessageView::new(vf, &message)),
                Err(Status::NoPeer) if messages.is_empty() => return Err(no_mailbox()),
                Err(_) => break,
            }
        }
        Ok(Success::Messages { messages })
    }

    fn no_mailbox(&self, action: &str, address: Sbdf) -> Failure {
        let refused = |why: String| Failure::refused(format!("cannot {action} {address}: {why}")).on(address);
        let pf = self.mailboxes.pf_of(address);
        let owner = pf.and_then(|pf| self.functions.records().guest(pf));
        match (pf, owner) {
            (Some(pf), Some(DomId(domain))) => {
                refused(format!("domain {domain} has the PF {pf}, so that not dom0 is on its side"))
            }
            (Some(_), None) => refused("the policies of the VFs do not let dom0 use their mailboxes".to_owned())
                .hint("a policy for the VF needs 'mailbox: dom0'; see docs/mailbox.md"),
            (None, _) => refused("no guest has a mailbox there".to_owned()).hint(
                "a VF has one while a PV guest has it, if a policy for the VF says 'mailbox: dom0'; see docs/mailbox.md",
            ),
        }
    }
}
