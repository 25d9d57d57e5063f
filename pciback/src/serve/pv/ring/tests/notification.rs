//! What a guest does when it is notified of errors, and what is reported to the engine.

use std::sync::mpsc::{Receiver, channel};

use super::*;

fn serving(machine: &Machine) -> (Serving, Receiver<ServerReport>) {
    let address = Sbdf::from_devfn(0, 1, 0);
    let functions = BTreeMap::from([(Devfn(0), machine.open(address))]);
    let (sender, reports) = channel();
    let report = Box::new(move |report| sender.send(report).unwrap());
    (super::serving(machine, functions, report), reports)
}

fn notification(serving: &Serving, request: AerRequest, limit: Duration) -> Notification {
    let recovery = Recovery::at(request, ChannelState::Normal, false);
    let conversation = Conversation { recovery, own: true, heard: Heard::Nothing };
    let attachment = serving.roster.functions[&Devfn(0)].attachment();
    Notification { devfn: Devfn(0), attachment, conversation, limit, resumed: false }
}

impl Serving {
    fn tell(&mut self, request: AerRequest, limit: Duration) {
        let notification = notification(self, request, limit);
        self.roster.obey(Order::Notify(notification));
    }
}

fn heard(reports: &Receiver<ServerReport>) -> Option<Result<Result<AerAnswer, u32>, NotNotified>> {
    match reports.try_recv() {
        Ok(ServerReport::Notified(_, heard)) => Some(heard),
        Ok(other) => panic!("{other:?}"),
        Err(_) => None,
    }
}

const LONG: Duration = Duration::from_secs(600);

#[test]
fn answers_arrive_one_after_the_other_while_requests_are_served() {
    let machine = Machine::new();
    let (mut serving, reports) = serving(&machine);
    frontend::set_aer_handler(machine.page(), true);
    for request in [AerRequest::Detected, AerRequest::Resume] {
        let notification = notification(&serving, request, LONG);
        assert!(serving.roster.obey(Order::Notify(notification)).is_none());
    }
    serving.hear();
    assert_eq!(frontend::take_aer(machine.page()), Some((6, 1, 0)));
    assert_eq!(serving.ask(&machine, &op(0, 0, 4, 0)).1, 0x10ca_8086, "served meanwhile");
    serving.hear();
    assert_eq!(heard(&reports), None);
    frontend::answer_aer(machine.page(), 3);
    serving.hear();
    assert_eq!(heard(&reports), Some(Ok(Ok(AerAnswer::NeedReset))));
    assert_eq!(frontend::take_aer(machine.page()), Some((7, 1, 0)));
    frontend::answer_aer(machine.page(), 77);
    serving.hear();
    assert_eq!(heard(&reports), Some(Ok(Err(77))));
    assert_eq!(frontend::take_aer(machine.page()), None);
}

/// The time is up, and a late answer is dropped.
#[test]
fn a_guest_that_is_silent_cannot_be_told_or_is_gone_is_reported_once() {
    let machine = Machine::new();
    let (mut serving, reports) = serving(&machine);
    serving.tell(AerRequest::Detected, LONG);
    serving.hear();
    assert_eq!(heard(&reports), Some(Err(NotNotified::NoHandler)));
    frontend::set_aer_handler(machine.page(), true);
    serving.tell(AerRequest::Detected, Duration::ZERO);
    serving.hear();
    serving.hear();
    assert_eq!(heard(&reports), Some(Err(NotNotified::Silent)));
    assert_eq!(frontend::take_aer(machine.page()), None, "taken back");
    frontend::answer_aer(machine.page(), 5);
    serving.hear();
    assert_eq!(heard(&reports), None);
    // A function that the guest does not have any more.
    serving.tell(AerRequest::Detected, LONG);
    serving.hear();
    let (taken, _taken) = channel();
    serving.roster.obey(Order::Take(Devfn(0), taken));
    frontend::answer_aer(machine.page(), 5);
    serving.hear();
    assert_eq!(heard(&reports), None);
}

/// The guest is asked about a function, and another question about it waits, when it gets another function in that place.
#[test]
fn an_answer_is_not_taken_for_that_of_the_next_function_in_the_same_place() {
    let machine = Machine::new();
    let (mut serving, reports) = serving(&machine);
    frontend::set_aer_handler(machine.page(), true);
    serving.tell(AerRequest::Detected, LONG);
    serving.tell(AerRequest::Resume, LONG);
    serving.hear();
    serving.roster.obey(Order::Take(Devfn(0), channel().0));
    serving.roster.obey(Order::Add(Devfn(0), machine.open(SECOND)));
    serving.tell(AerRequest::SlotReset, LONG);
    frontend::answer_aer(machine.page(), 4);
    serving.hear();
    assert_eq!(heard(&reports), None);
    assert_eq!(frontend::take_aer(machine.page()), Some((9, 1, 0)), "what waited was about the first one");
    frontend::answer_aer(machine.page(), 5);
    serving.hear();
    assert_eq!(heard(&reports), Some(Ok(Ok(AerAnswer::Recovered))));
}

#[test]
fn a_reset_by_the_host_keeps_what_the_guest_wrote_and_one_by_the_guest_does_not() {
    let machine = Machine::new();
    let (mut serving, reports) = serving(&machine);
    // The address of a message of MSI is the guest's own.
    let bar = |serving: &mut Serving| serving.ask(&machine, &op(0, 0x10, 4, 0)).1;
    serving.ask(&machine, &op(1, 0x10, 4, 0xfd00_0000));
    let written = bar(&mut serving);
    let (sender, begun) = channel();
    serving.roster.obey(Order::BeginReset(Devfn(0), sender));
    assert!(begun.recv().unwrap().is_ok());
    assert_eq!(bar(&mut serving), u32::MAX);
    serving.roster.obey(Order::ResetEnded(Devfn(0), true));
    assert_eq!(bar(&mut serving), written);
    assert!(reports.try_recv().is_err());
}

/// The service is killed at each step of telling the guest, and the next run goes on from the note: the driver is told once, at once or by it.
#[test]
fn a_request_is_told_once_by_a_service_that_is_killed_anywhere() {
    for answers_meanwhile in [false, true] {
        for steps in 0.. {
            let machine = Machine::new();
            // Of the conversation before.
            frontend::set_aer_handler(machine.page(), true);
            wire::put_aer(machine.page(), Devfn(0), AerRequest::Detected, ChannelState::Normal);
            frontend::answer_aer(machine.page(), 5);
            let (mut first, _reports) = serving(&machine);
            first.tell(AerRequest::Detected, LONG);
            machine.kill_after(Some(steps));
            let killed = catch_unwind(AssertUnwindSafe(|| first.hear())).is_err();
            machine.kill_after(None);
            let mut told = 0;
            let mut drive = || {
                if frontend::take_aer(machine.page()).is_some() {
                    told += 1;
                    frontend::answer_aer(machine.page(), 3);
                }
            };
            if answers_meanwhile {
                drive();
            }
            let (mut second, reports) = serving(&machine);
            let noted = second.roster.functions[&Devfn(0)].conversation();
            if let Some(conversation) = noted {
                let asked = notification(&second, AerRequest::Detected, LONG);
                second.roster.obey(Order::Notify(Notification { conversation, resumed: true, ..asked }));
            }
            second.hear();
            drive();
            second.hear();
            let expected = noted.map(|_| Ok(Ok(AerAnswer::NeedReset)));
            assert_eq!((told, heard(&reports)), (i32::from(noted.is_some()), expected), "{steps} steps");
            let noted = second.roster.functions[&Devfn(0)].conversation();
            assert!(noted.is_none_or(|noted| noted.heard == Heard::Answer(Ok(AerAnswer::NeedReset))));
            if !killed {
                assert!(steps > 3, "hardly a step");
                break;
            }
        }
    }
}
