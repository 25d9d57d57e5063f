use std::sync::atomic::AtomicU32;

use super::*;
use crate::Sbdf;
use crate::config::{FunctionKind, Identity, ImageOwner};
use crate::mailbox::{MAILBOX_BYTES, VENDOR, mailbox_memory};
use crate::platform::Resource;
use crate::spec::doe;

const BOTH: MailboxPeers = MailboxPeers { guest: true, dom0: true };
const SEND: u32 = VENDOR as u32 | 1 << 16;
const RECEIVE: u32 = VENDOR as u32 | 2 << 16;
/// Guests: with the PF, with VFs.
const OWNER: DomId = DomId(1);
const USER: DomId = DomId(2);

fn pf() -> Sbdf {
    Sbdf::from_devfn(0, 1, 0)
}

fn spec(vf: Option<u16>) -> FunctionSpec {
    let kind = match vf {
        None => FunctionKind::Physical,
        Some(index) => FunctionKind::Virtual { physical_function: pf(), pf_bytes: Vec::new(), index },
    };
    let address = vf.map_or(pf(), |vf| Sbdf::from_devfn(0, 1, 0x80 + vf as u8));
    let resources = [Resource::default(); 13];
    FunctionSpec {
        address,
        bytes: Vec::new(),
        resources,
        identity: Identity::default(),
        kind,
        gsi: 0,
        rom: None,
    }
}

fn words(vf: Option<u16>, domain: DomId) -> Words {
    let memory: Box<[AtomicU32]> = (0..MAILBOX_BYTES / 4).map(|_| AtomicU32::new(0)).collect();
    mailbox_memory(memory, ImageOwner { boot: 1, domain }, spec(vf).address, Some(7)).unwrap()
}

fn open(all: &Mailboxes, vf: Option<u16>) -> FunctionMailbox {
    let domain = if vf.is_some() { USER } else { OWNER };
    FunctionMailbox::open(all, &spec(vf), domain, BOTH, &words(vf, domain))
}

/// A PF's guest with a VF's.
fn pair() -> (Mailboxes, FunctionMailbox, FunctionMailbox) {
    let all = Mailboxes::default();
    let (pf_end, vf_end) = (open(&all, None), open(&all, Some(2)));
    all.settle(pf(), Some(OWNER));
    (all, pf_end, vf_end)
}

/// Writes an object and reads the response.
fn exchange(end: &mut FunctionMailbox, now: Instant, words: &[u32]) -> Vec<u32> {
    put(end, now, words);
    read(end, now)
}

fn put(end: &mut FunctionMailbox, now: Instant, words: &[u32]) {
    for word in words {
        end.write((doe::WRITE_DATA, *word, u32::MAX), 0, now);
    }
    end.write((doe::CONTROL, doe::GO, u32::MAX), 0, now);
}

fn read(end: &mut FunctionMailbox, now: Instant) -> Vec<u32> {
    let mut read = Vec::new();
    while end.shown().0 & doe::READY != 0 {
        read.push(end.shown().1);
        end.write((doe::READ_DATA, 0, u32::MAX), 0, now);
    }
    read
}

fn send(end: &mut FunctionMailbox, now: Instant, vf: u32, sequence: u32) -> u32 {
    let response = exchange(end, now, &[SEND, 6, 5 | vf << 16, sequence, 3, 0x0063_6261]);
    assert_eq!((response[0], response[3]), (SEND, sequence));
    response[2]
}

fn receive(end: &mut FunctionMailbox, now: Instant) -> Result<(u32, u32), u32> {
    match exchange(end, now, &[RECEIVE, 2])[2..] {
        [0, kind, sequence, 3, 0x0063_6261] => Ok((kind >> 16, sequence)),
        [status] => Err(status),
        ref other => panic!("{other:x?}"),
    }
}

#[test]
fn a_vf_and_the_owner_of_its_pf_exchange_messages_and_the_vf_cannot_say_that_it_is_another() {
    let (_all, mut pf, mut vf) = pair();
    let now = Instant::now();
    assert_eq!(receive(&mut pf, now), Err(Status::Empty as u32));
    assert_eq!(send(&mut vf, now, 5, 70), 0);
    assert_eq!(receive(&mut pf, now), Ok((2, 70)));
    assert_eq!(receive(&mut pf, now), Err(Status::Empty as u32));
    assert_eq!(send(&mut pf, now, 2, 71), 0);
    assert_eq!(send(&mut pf, now, 3, 72), Status::NoPeer as u32, "there is no such VF");
    assert_eq!(receive(&mut vf, now), Ok((2, 71)));
}

#[test]
fn a_message_stays_until_its_last_dword_has_been_read() {
    let (_all, mut pf, mut vf) = pair();
    let now = Instant::now();
    send(&mut vf, now, 0, 1);
    put(&mut pf, now, &[RECEIVE, 2]);
    pf.write((doe::READ_DATA, 0, u32::MAX), 0, now);
    pf.write((doe::CONTROL, doe::ABORT, u32::MAX), 0, now);
    assert_eq!(receive(&mut pf, now), Ok((2, 1)), "again");
    send(&mut vf, now, 0, 2);
    put(&mut pf, now, &[RECEIVE, 2]);
    pf.reset();
    assert_eq!(pf.shown(), (0, 0));
    assert_eq!(receive(&mut pf, now), Ok((2, 2)));
}

#[test]
fn vfs_are_received_from_in_turn_and_one_that_floods_fills_only_its_own_queue() {
    let (all, mut pf_end, mut one) = pair();
    let mut other = open(&all, Some(4));
    all.settle(pf(), Some(OWNER));
    let now = Instant::now();
    let statuses: Vec<u32> = (0..200).map(|sequence| send(&mut one, now, 0, sequence)).collect();
    let count = |status: Status| statuses.iter().filter(|found| **found == status as u32).count();
    assert_eq!((count(Status::Done), count(Status::Full), count(Status::TooMany)), (8, 92, 100));
    assert_eq!(send(&mut other, now, 0, 1000), 0);
    let received: Vec<_> = std::iter::from_fn(|| receive(&mut pf_end, now).ok()).collect();
    assert_eq!(received.len(), 9);
    assert!(received[..2].contains(&(4, 1000)), "the other one is not the last: {received:?}");
    assert_eq!(send(&mut one, now, 0, 1), Status::TooMany as u32);
    assert_eq!(send(&mut one, now + PERIOD, 0, 1), 0, "in the next period");
}

#[test]
fn an_access_that_a_killed_service_carried_out_is_not_carried_out_again() {
    let all = Mailboxes::default();
    let (pf_words, vf_words) = (words(None, OWNER), words(Some(2), USER));
    let mut pf_end = FunctionMailbox::open(&all, &spec(None), OWNER, BOTH, &pf_words);
    let open = || FunctionMailbox::open(&all, &spec(Some(2)), USER, BOTH, &vf_words);
    let mut vf = open();
    all.settle(pf(), Some(OWNER));
    let now = Instant::now();
    let writes = [SEND, 6, 5, 1, 3, 0x0063_6261].map(|word| (doe::WRITE_DATA, word, u32::MAX));
    let mut claim = 100;
    let mut twice = |vf: &mut FunctionMailbox, write| {
        claim += 1;
        vf.write(write, claim, now);
        drop(std::mem::replace(vf, open()));
        vf.write(write, claim, now);
    };
    writes.into_iter().for_each(|write| twice(&mut vf, write));
    twice(&mut vf, (doe::CONTROL, doe::GO, u32::MAX));
    let mut response = Vec::new();
    while vf.shown().0 & doe::READY != 0 {
        response.push(vf.shown().1);
        twice(&mut vf, (doe::READ_DATA, 0, u32::MAX));
    }
    assert_eq!(response, [SEND, 4, 0, 1]);
    assert_eq!(receive(&mut pf_end, now), Ok((2, 1)));
    assert_eq!(receive(&mut pf_end, now), Err(Status::Empty as u32));
}

#[test]
fn dom0_is_on_the_side_of_a_pf_that_no_guest_has_and_gets_nothing_of_an_earlier_owner() {
    let (all, pf_end, mut vf) = pair();
    let now = Instant::now();
    send(&mut vf, now, 0, 1);
    assert_eq!(all.receive(pf(), None).map(|(_, message)| message), Err(Status::NoPeer));
    drop(pf_end);
    all.settle(pf(), None);
    assert_eq!(all.receive(pf(), None).map(|(_, message)| message), Err(Status::Empty));
    assert_eq!(send(&mut vf, now, 0, 2), 0);
    let (address, message) = all.receive(pf(), Some(2)).unwrap();
    assert_eq!(address, spec(Some(2)).address);
    assert_eq!((message.vf, message.kind, message.sequence, message.data.as_slice()), (2, 5, 2, &b"abc"[..]));
    assert_eq!(all.send(pf(), &Message { vf: 2, sequence: 3, ..message }), Status::Done);
    assert_eq!(all.rung(), [(spec(Some(2)).address, 1)]);
    assert_eq!(receive(&mut vf, now), Ok((2, 3)));
}

#[test]
fn nobody_is_there_without_both_policies() {
    let none = MailboxPeers::default();
    for (of_pf, of_vf) in [(none, BOTH), (BOTH, none), (BOTH, MailboxPeers { guest: false, dom0: true })] {
        let (all, mut pf_end, mut vf) = pair();
        let now = Instant::now();
        send(&mut vf, now, 0, 1);
        all.permit(pf(), of_pf);
        all.permit(spec(Some(2)).address, of_vf);
        assert_eq!(receive(&mut pf_end, now), Err(Status::NoPeer as u32));
        assert_eq!(send(&mut vf, now, 0, 2), Status::NoPeer as u32);
        assert_eq!(receive(&mut vf, now), Err(Status::NoPeer as u32));
        all.permit(pf(), BOTH);
        all.permit(spec(Some(2)).address, BOTH);
        assert_eq!(receive(&mut pf_end, now), Err(Status::Empty as u32), "what was sent before is dropped");
    }
}
