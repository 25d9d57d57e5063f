//! Mailboxes: the guests of VFs exchange messages with the guest that has their PF, or with dom0.

use pciback::mailbox::VENDOR;
use pciback::platform::StoreOps;
use pciback::serve::pv::nodes;
use pciback::spec::doe;
use pciback::{DomId, FunctionState, Sbdf};
use toolstack::outcome::{ErrorCode, Failure};
use toolstack::protocol::{MessageView, Request, Success};

use crate::frontend::{Frontend, write_op};
use crate::world::{DB, Service, WEB, World, bdf, wait_until, warnings};

const POLICY: &str = "match: {vendor: 8086}\npermit: [physical-function, untrusted-vf]\nvirtual-functions: {by-guest: 3}\n\
                      mailbox: [guest, dom0]\n";
/// Where guests find the capability.
const AT: u32 = 0xfe8;
const SEND: u32 = VENDOR as u32 | 1 << 16;
const RECEIVE: u32 = VENDOR as u32 | 2 << 16;
/// Statuses of responses.
const DONE: u32 = 0;
const EMPTY: u32 = 1;
const FULL: u32 = 2;
const NO_PEER: u32 = 3;
const MALFORMED: u32 = 4;

fn pf() -> Sbdf {
    bdf("01:00.0")
}

fn vf() -> Sbdf {
    bdf("01:10.0")
}

fn at(register: u16) -> u32 {
    AT + u32::from(register)
}

fn put(guest: &Frontend, words: &[u32]) {
    for word in words {
        guest.ask(&write_op(0, at(doe::WRITE_DATA), 4, *word));
    }
}

fn go(guest: &Frontend) {
    guest.ask(&write_op(0, at(doe::CONTROL), 4, doe::GO));
}

fn read(guest: &Frontend) -> Vec<u32> {
    let mut response = Vec::new();
    while guest.read(0, at(doe::STATUS), 4) & doe::READY != 0 {
        response.push(guest.read(0, at(doe::READ_DATA), 4));
        guest.ask(&write_op(0, at(doe::READ_DATA), 4, 0));
    }
    response
}

fn exchange(guest: &Frontend, words: &[u32]) -> Vec<u32> {
    put(guest, words);
    go(guest);
    read(guest)
}

/// Sends three bytes; the status.
fn send(guest: &Frontend, vf: u32, sequence: u32) -> u32 {
    exchange(guest, &[SEND, 6, 5 | vf << 16, sequence, 3, 0x0063_6261])[2]
}

/// The number of the VF and the sequence of the next message, or the status.
fn receive(guest: &Frontend) -> Result<(u32, u32), u32> {
    match exchange(guest, &[RECEIVE, 2])[2..] {
        [DONE, kind, sequence, 3, 0x0063_6261] => Ok((kind >> 16, sequence)),
        [status] => Err(status),
        ref other => panic!("{other:x?}"),
    }
}

/// A guest with the PF has created a VF, which another guest has.
fn two_guests(world: &World) -> (Frontend, Frontend, Service) {
    let owner = Frontend::load(world, WEB);
    let service = world.start_with(&[POLICY]);
    service.hold(pf()).unwrap();
    service.persist(WEB, pf()).unwrap();
    owner.ask(&write_op(0, 0x170, 2, 1));
    owner.ask(&write_op(0, 0x168, 2, 9));
    service.wait_for_state(vf(), FunctionState::Held);
    let user = Frontend::load(world, DB);
    service.attach(DB, vf()).unwrap();
    (owner, user, service)
}

/// A guest has a VF whose PF dom0 has.
fn with_dom0(world: &World) -> (Frontend, Service) {
    let user = Frontend::load(world, WEB);
    let service = world.start_with(&[POLICY]);
    service.hold(vf()).unwrap();
    service.attach(WEB, vf()).unwrap();
    (user, service)
}

fn received(service: &Service, address: Sbdf) -> Result<Vec<MessageView>, Failure> {
    match service.call(Request::MailboxReceive { address })? {
        Success::Messages { messages } => Ok(messages),
        other => panic!("{other:?}"),
    }
}

fn sent(service: &Service, address: Sbdf, sequence: u32) -> Result<Success, Failure> {
    service.call(Request::MailboxSend { address, kind: 5, sequence, data: "616263".into() })
}

fn doorbell(world: &World, domain: DomId) -> Option<String> {
    let path = format!("{}/mailbox-00-0", nodes::backend_directory(domain));
    let store = world.simulation.store(domain).unwrap();
    // A guest may not even ask for what is not in its own directory any more.
    store.read(&path).unwrap_or_default().map(|value| String::from_utf8(value).unwrap())
}

#[test]
fn the_guest_of_a_vf_and_that_of_the_pf_exchange_messages() {
    let world = World::without_vfs();
    let (owner, user, service) = two_guests(&world);
    assert_eq!(exchange(&user, &[1, 3, 0]), [1, 3, 0x0100_0001], "discovery");
    assert_eq!(receive(&owner), Err(EMPTY));
    assert_eq!(send(&user, 9, 70), DONE);
    assert_eq!(receive(&owner), Ok((0, 70)), "it says which VF it is from, whatever its guest wrote");
    assert_eq!(send(&owner, 0, 71), DONE);
    assert_eq!(receive(&user), Ok((0, 71)));
    assert_eq!(send(&owner, 1, 72), NO_PEER, "no such VF is in use");
    assert_eq!(service.problems(), [""; 0]);
}

#[test]
fn a_guest_reads_in_xenstore_that_a_message_waits_until_it_loses_the_function() {
    let world = World::without_vfs();
    let (owner, user, service) = two_guests(&world);
    assert_eq!((doorbell(&world, WEB), doorbell(&world, DB)), (None, None));
    send(&user, 0, 1);
    send(&user, 0, 2);
    wait_until("the guest with the PF is notified", || doorbell(&world, WEB).as_deref() == Some("2"));
    send(&owner, 0, 3);
    wait_until("the guest with the VF is notified", || doorbell(&world, DB).as_deref() == Some("1"));
    service.detach(DB, vf()).unwrap();
    assert_eq!(doorbell(&world, DB), None);
}

#[test]
fn a_guest_that_floods_fills_its_queue_and_no_more() {
    let world = World::without_vfs();
    let (owner, user, _service) = two_guests(&world);
    let done = (0..40).filter(|sequence| send(&user, 0, *sequence) == DONE).count();
    assert_eq!(done, 8);
    assert_eq!(send(&user, 0, 99), FULL);
    for sequence in 0..8 {
        assert_eq!(receive(&owner), Ok((0, sequence)));
    }
    assert_eq!(receive(&owner), Err(EMPTY));
}

#[test]
fn objects_that_stop_in_the_middle_are_aborted_or_nonsense_harm_nobody() {
    let world = World::without_vfs();
    let (owner, user, _service) = two_guests(&world);
    put(&user, &[SEND, 6, 5]);
    assert_eq!(send(&owner, 0, 1), DONE, "the other side does not wait");
    user.ask(&write_op(0, at(doe::CONTROL), 4, doe::ABORT));
    assert_eq!(receive(&user), Ok((0, 1)));
    for words in [&[SEND, 60, 5][..], &[SEND, 0], &[SEND], &[0xffff_ffff, 2], &[SEND + 0x7_0000, 2]] {
        assert_eq!(exchange(&user, words), [0; 0], "{words:x?}");
    }
    assert_eq!(exchange(&user, &[SEND, 5, 5, 7, 257]), [SEND, 4, MALFORMED, 7]);
    put(&user, &[0; 100]);
    go(&user);
    assert_eq!(user.read(0, at(doe::STATUS), 4), doe::ERROR);
    user.ask(&write_op(0, at(doe::CONTROL), 4, doe::ABORT));
    assert_eq!((send(&user, 0, 2), receive(&owner)), (DONE, Ok((0, 2))));
}

#[test]
fn an_exchange_goes_on_where_it_was_when_the_service_is_killed() {
    let world = World::without_vfs();
    let (owner, user, service) = two_guests(&world);
    let mut running = Some(service);
    let mut restart = || {
        running.take().unwrap().kill();
        running = Some(world.start_with(&[POLICY]));
    };
    let words = [SEND, 6, 5, 70, 3, 0x0063_6261];
    put(&user, &words[..4]);
    restart();
    put(&user, &words[4..]);
    restart();
    go(&user);
    restart();
    assert_eq!(read(&user), [SEND, 4, DONE, 70]);
    restart();
    exchange_halfway(&owner);
    restart();
    let rest = read(&owner);
    assert_eq!(rest, [DONE, 5, 70, 3, 0x0063_6261]);
    restart();
    assert_eq!(receive(&owner), Err(EMPTY), "it was received once");
    put(&user, &[0; 100]);
    go(&user);
    restart();
    assert_eq!(user.read(0, at(doe::STATUS), 4), doe::ERROR);
    user.ask(&write_op(0, at(doe::CONTROL), 4, doe::ABORT));
    assert_eq!(send(&owner, 0, 71), DONE);
    restart();
    assert_eq!(receive(&user), Ok((0, 71)));
}

/// Asks for a message and reads the first two dwords of the response.
fn exchange_halfway(guest: &Frontend) {
    put(guest, &[RECEIVE, 2]);
    go(guest);
    for _ in 0..2 {
        guest.ask(&write_op(0, at(doe::READ_DATA), 4, 0));
    }
}

#[test]
fn dom0_exchanges_messages_with_the_guest_of_a_vf_across_a_kill() {
    let world = World::new();
    let (user, service) = with_dom0(&world);
    assert_eq!(received(&service, vf()).unwrap(), []);
    assert_eq!(send(&user, 0, 70), DONE);
    service.kill();
    let service = world.start_with(&[POLICY]);
    let messages = received(&service, pf()).unwrap();
    let expected = MessageView { address: vf(), index: 0, kind: 5, sequence: 70, data: "616263".to_owned() };
    assert_eq!(messages, [expected]);
    assert_eq!(messages[0].to_string(), "0000:01:10.0 type 5 sequence 70: 616263 'abc'");
    sent(&service, vf(), 71).unwrap();
    assert_eq!(doorbell(&world, WEB).as_deref(), Some("1"));
    service.kill();
    let service = world.start_with(&[POLICY]);
    assert_eq!(receive(&user), Ok((0, 71)));
    for sequence in 0..8 {
        sent(&service, vf(), sequence).unwrap();
    }
    let failure = sent(&service, vf(), 8).unwrap_err();
    assert_eq!(failure.code, ErrorCode::Refused);
    assert!(failure.message.contains("has not received the last messages"), "{failure}");
    let failure = service
        .call(Request::MailboxSend { address: vf(), kind: 0, sequence: 0, data: "0".into() })
        .unwrap_err();
    assert_eq!(failure.code, ErrorCode::Usage);
}

#[test]
fn dom0_is_not_on_the_side_of_a_pf_that_a_guest_has() {
    let world = World::without_vfs();
    let (_owner, user, service) = two_guests(&world);
    assert_eq!(send(&user, 0, 70), DONE);
    for failure in [received(&service, vf()).unwrap_err(), sent(&service, vf(), 1).unwrap_err()] {
        assert_eq!(failure.code, ErrorCode::Refused);
        assert!(failure.message.contains("(domain 1) has the PF 0000:01:00.0"), "{failure}");
    }
}

#[test]
fn the_next_owner_of_the_pf_gets_nothing_that_was_sent_to_the_last_one() {
    let world = World::without_vfs();
    let (_owner, user, service) = two_guests(&world);
    assert_eq!(send(&user, 0, 70), DONE);
    world.simulation.destroy(WEB);
    let again = DomId(11);
    let uuid = "00000000-0000-0000-0000-000000000001".parse().unwrap();
    world.simulation.create_guest(again, "web", "pv", uuid).unwrap();
    let owner = Frontend::load(&world, again);
    wait_until("the new domain has the PF", || {
        service
            .view(pf())
            .is_some_and(|view| view.state == FunctionState::Attached && view.domain == Some(again))
    });
    assert_eq!(receive(&owner), Err(EMPTY));
    assert_eq!((send(&user, 0, 71), receive(&owner)), (DONE, Ok((0, 71))));
}

#[test]
fn the_next_guest_of_a_vf_gets_nothing_that_was_sent_to_the_last_one() {
    let world = World::new();
    let (_user, service) = with_dom0(&world);
    sent(&service, vf(), 70).unwrap();
    service.detach(WEB, vf()).unwrap();
    assert_eq!(sent(&service, vf(), 71).unwrap_err().code, ErrorCode::Refused);
    let next = Frontend::load(&world, DB);
    service.attach(DB, vf()).unwrap();
    assert_eq!(receive(&next), Err(EMPTY));
}

#[test]
fn without_a_policy_there_is_no_mailbox_and_without_both_no_peer() {
    let world = World::new();
    let user = Frontend::load(&world, WEB);
    let service = world.start_with(&["match: {vendor: 8086}\npermit: [untrusted-vf]\n"]);
    service.hold(vf()).unwrap();
    service.attach(WEB, vf()).unwrap();
    assert_eq!(user.read(0, AT, 4), 0);
    let failure = received(&service, vf()).unwrap_err();
    assert!(failure.message.contains("no guest has a mailbox there"), "{failure}");
    service.detach(WEB, vf()).unwrap();
    service.kill();
    let service = world.start_with(&["match: {vendor: 8086}\nmailbox: guest\n"]);
    service.attach(WEB, vf()).unwrap();
    assert_eq!(send(&user, 0, 1), NO_PEER, "dom0 has the PF");
    let failure = received(&service, vf()).unwrap_err();
    assert!(failure.hint.as_deref().is_some_and(|hint| hint.contains("'mailbox: dom0'")), "{failure:?}");
}

#[test]
fn a_policy_that_is_taken_back_ends_the_talk_at_once_and_leaves_the_capability() {
    let world = World::new();
    let (user, service) = with_dom0(&world);
    assert_eq!(send(&user, 0, 70), DONE);
    // There are no files, so that nothing says who may talk.
    service.call(Request::PolicyReload).unwrap();
    assert_eq!(send(&user, 0, 71), NO_PEER);
    assert_eq!(received(&service, vf()).unwrap_err().code, ErrorCode::Refused);
    service.detach(WEB, vf()).unwrap();
    service.attach(WEB, vf()).unwrap();
    assert_eq!(user.read(0, AT, 4), 0, "the next attach gives none");
}

#[test]
fn a_function_that_cannot_have_one_is_attached_without_and_the_answer_says_so() {
    let world = World::new();
    let service = world.start_with(&["match: {vendor: 1af4}\nmailbox: dom0\n"]);
    let function = bdf("02:00.0");
    service.hold(function).unwrap();
    let said = warnings(service.attach(WEB, function));
    assert!(said.contains("0000:02:00.0 cannot have a mailbox: it is neither a VF nor a PF"), "{said}");
}

#[test]
fn a_mailbox_whose_file_is_damaged_begins_anew_and_the_status_says_so() {
    let world = World::new();
    let (user, service) = with_dom0(&world);
    assert_eq!(send(&user, 0, 70), DONE);
    service.kill();
    let file = world.settings().run_directory.join("mailboxes/0000:01:10.0");
    let mut bytes = std::fs::read(&file).unwrap();
    bytes[4] = 99;
    std::fs::write(&file, bytes).unwrap();
    let service = world.start_with(&[POLICY]);
    let problems = service.problems();
    assert!(problems.iter().any(|text| text.contains("its version is 0x63 instead of 0x1")), "{problems:?}");
    assert_eq!(received(&service, vf()).unwrap(), []);
    assert_eq!(send(&user, 0, 71), DONE);
    assert_eq!(received(&service, vf()).unwrap().len(), 1);
}
