//! Mailboxes between VFs and the owners of their PFs: each function's own exchange ([`FunctionMailbox`]), served by its guest's thread, and
//! the queues of all ([`Mailboxes`]), which these threads and the engine share.
//!
//! What is behind the lock takes no longer than copying one message, and nobody waits for a message: it is asked for again.

mod exchange;
mod guest;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub use exchange::FunctionMailbox;

use crate::config::MailboxPeers;
use crate::mailbox::{Direction, Message, Origin, Queues, Status};
use crate::{DomId, Sbdf};

/// The mailboxes of all functions that guests have.
#[derive(Debug, Clone, Default)]
pub struct Mailboxes(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    /// By PF.
    rooms: BTreeMap<Sbdf, Room>,
    /// The engine was notified of messages and has not looked yet.
    reported: bool,
}

/// One PF with its VFs.
#[derive(Debug, Default)]
struct Room {
    /// The guest that has the PF, as the engine says; `None` inside: no guest.
    owner: Option<Option<DomId>>,
    pf: Option<PfEnd>,
    /// The VF that dom0 has received from last.
    last_vf: u16,
    /// By number, from 0.
    vfs: BTreeMap<u16, VfEnd>,
}

#[derive(Debug)]
struct PfEnd {
    key: Arc<()>,
    domain: DomId,
    peers: MailboxPeers,
    /// It has got a message since the engine looked.
    rings: bool,
}

#[derive(Debug)]
struct VfEnd {
    key: Arc<()>,
    address: Sbdf,
    peers: MailboxPeers,
    queues: Queues,
    /// It has got a message since the engine looked.
    rings: bool,
}

/// Which end of a mailbox a function is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// A PF.
    Pf(Sbdf),
    /// A VF of this PF, with this number.
    Vf(Sbdf, u16),
}

impl Room {
    /// Puts on the side of the PF who may be there.
    fn settle(&mut self) {
        let Some(owner) = self.owner else { return };
        let guest = self.pf.as_ref().filter(|pf| pf.peers.guest).map(|pf| pf.domain);
        for vf in self.vfs.values_mut() {
            let peer = match owner {
                Some(domain) => guest.filter(|guest| vf.peers.guest && *guest == domain),
                None => vf.peers.dom0.then_some(DomId::DOM0),
            };
            vf.queues.connect(peer.map(|domain| domain.0));
        }
    }
}

impl State {
    fn vf(&mut self, pf: Sbdf, number: u16) -> Option<&mut VfEnd> {
        self.rooms.get_mut(&pf)?.vfs.get_mut(&number)
    }

    /// What `domain`, on the side of the PF, sends to a VF.
    fn send_to_vf(&mut self, pf: Sbdf, domain: DomId, sent: u32, message: &Message) -> Status {
        match self.vf(pf, message.vf) {
            Some(vf) if vf.queues.peer() == Some(domain.0) => {
                let fits = vf.queues.push(Direction::ToVf, sent, message);
                vf.rings |= fits;
                if fits { Status::Done } else { Status::Full }
            }
            _ => Status::NoPeer,
        }
    }

    fn send_to_pf(&mut self, pf: Sbdf, sent: u32, message: &Message) -> Status {
        let Some(room) = self.rooms.get_mut(&pf) else { return Status::NoPeer };
        let vf = room.vfs.get_mut(&message.vf).filter(|vf| vf.queues.peer().is_some());
        let Some(vf) = vf else { return Status::NoPeer };
        if !vf.queues.push(Direction::ToPf, sent, message) {
            return Status::Full;
        }
        if let Some(pf) = &mut room.pf {
            pf.rings = true;
        }
        Status::Done
    }

    /// The oldest message of the VF that comes next after `after`, for `domain` on the side of the PF.
    fn first_for_pf(&self, pf: Sbdf, domain: DomId, after: u16) -> Result<(Origin, Message), Status> {
        let room = self.rooms.get(&pf).ok_or(Status::NoPeer)?;
        let of_domain = |(_, vf): &(&u16, &VfEnd)| vf.queues.peer() == Some(domain.0);
        if !room.vfs.iter().any(|vf| of_domain(&vf)) {
            return Err(Status::NoPeer);
        }
        let next = after.checked_add(1).map(|next| room.vfs.range(next..)).into_iter().flatten();
        let mut in_turn = next.chain(room.vfs.range(..=after)).filter(of_domain);
        let first = |(number, vf): (&u16, &VfEnd)| {
            let (message, found) = vf.queues.first(Direction::ToPf)?;
            Some((Origin { vf: *number, number: message }, found))
        };
        in_turn.find_map(first).ok_or(Status::Empty)
    }

    fn first_for_vf(&self, pf: Sbdf, number: u16) -> Result<(Origin, Message), Status> {
        let vf = self.rooms.get(&pf).and_then(|room| room.vfs.get(&number));
        let vf = vf.filter(|vf| vf.queues.peer().is_some()).ok_or(Status::NoPeer)?;
        let (message, found) = vf.queues.first(Direction::ToVf).ok_or(Status::Empty)?;
        Ok((Origin { vf: number, number: message }, found))
    }

    /// Whether the engine has to be notified of a message that was sent.
    fn report(&mut self, status: Status) -> bool {
        status == Status::Done && !std::mem::replace(&mut self.reported, true)
    }
}

impl Mailboxes {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where a function with a mailbox belongs: its PF, or itself.
    pub fn pf_of(&self, address: Sbdf) -> Option<Sbdf> {
        let state = self.lock();
        if state.rooms.contains_key(&address) {
            return Some(address);
        }
        let has_it = |room: &Room| room.vfs.values().any(|vf| vf.address == address);
        state.rooms.iter().find(|(_, room)| has_it(room)).map(|(pf, _)| *pf)
    }

    /// The number of a VF with a mailbox.
    pub fn number_of(&self, vf: Sbdf) -> Option<u16> {
        let state = self.lock();
        let mut ends = state.rooms.values().flat_map(|room| room.vfs.iter());
        ends.find(|(_, end)| end.address == vf).map(|(number, _)| *number)
    }

    /// The PFs of functions with mailboxes.
    pub fn pfs(&self) -> Vec<Sbdf> {
        self.lock().rooms.keys().copied().collect()
    }

    /// Says which guest has a PF; `None`: none, so that it is dom0's. Messages for or of another owner are dropped.
    pub fn settle(&self, pf: Sbdf, owner: Option<DomId>) {
        if let Some(room) = self.lock().rooms.get_mut(&pf) {
            room.owner = Some(owner);
            room.settle();
        }
    }

    /// Says with whom a function may exchange messages from now on.
    pub fn permit(&self, address: Sbdf, peers: MailboxPeers) {
        for (pf, room) in &mut self.lock().rooms {
            if *pf == address
                && let Some(end) = &mut room.pf
            {
                end.peers = peers;
            }
            for vf in room.vfs.values_mut().filter(|vf| vf.address == address) {
                vf.peers = peers;
            }
            room.settle();
        }
    }

    /// The functions that have got messages since the last call, each with the number of those that wait.
    pub fn rung(&self) -> Vec<(Sbdf, u32)> {
        let mut state = self.lock();
        state.reported = false;
        let mut rung = Vec::new();
        for (address, room) in &mut state.rooms {
            if room.pf.as_mut().is_some_and(|pf| std::mem::take(&mut pf.rings)) {
                let waiting = room.vfs.values().map(|vf| vf.queues.waiting(Direction::ToPf));
                rung.push((*address, waiting.sum()));
            }
            let vfs = room.vfs.values_mut();
            let rings = vfs.filter_map(|vf| std::mem::take(&mut vf.rings).then_some(&*vf));
            rung.extend(rings.map(|vf| (vf.address, vf.queues.waiting(Direction::ToVf))));
        }
        rung
    }

    /// Sends a message of dom0's to a VF.
    pub fn send(&self, pf: Sbdf, message: &Message) -> Status {
        self.lock().send_to_vf(pf, DomId::DOM0, 0, message)
    }

    /// Takes the oldest message for dom0, of one VF, or of all in turn; with the address of the VF.
    pub fn receive(&self, pf: Sbdf, of: Option<u16>) -> Result<(Sbdf, Message), Status> {
        let mut state = self.lock();
        let last = state.rooms.get(&pf).map_or(0, |room| room.last_vf);
        let after = of.map_or(last, |vf| vf.wrapping_sub(1));
        let (origin, message) = state.first_for_pf(pf, DomId::DOM0, after)?;
        if of.is_some_and(|vf| vf != origin.vf) {
            return Err(Status::Empty);
        }
        if let Some(room) = state.rooms.get_mut(&pf) {
            room.last_vf = origin.vf;
        }
        let vf = state.vf(pf, origin.vf).ok_or(Status::Empty)?;
        vf.queues.pop(Direction::ToPf, origin.number);
        Ok((vf.address, message))
    }
}
