//! Twenty operators at once: each gets an answer, and it is true.

use std::sync::{Arc, Barrier, mpsc};
use std::thread;
use std::time::Instant;

use pciback::platform::sim::Owner;
use pciback::{DomId, FunctionState, Sbdf};
use toolstack::outcome::{ErrorCode, Failure};
use toolstack::protocol::{Request, Scope, Success};

use crate::world::{DB, LIMIT, Operator, Service, WEB, World, attachment, bdf, name};

const OPERATORS: usize = 20;

fn host() -> String {
    "drivers: [i40e, iavf, pci-stub]
functions:
  - {address: '01:00.0', model: many-vfs, interfaces: [eth0], num-vfs: 20}
domains:
  - {id: 1, name: web, type: pv, passthrough: true}
  - {id: 2, name: db, type: pv, passthrough: true}
"
    .to_owned()
}

fn vfs(world: &World) -> Vec<Sbdf> {
    world.host().function(bdf("01:00.0")).unwrap().virtual_functions
}

/// All begin at the same moment; what they return, by their number. One that gets no answer fails the test.
fn at_once<T: Send + 'static>(
    service: &Service,
    deed: impl Fn(usize, &Operator) -> T + Send + Sync + 'static,
) -> Vec<T> {
    let (barrier, deed) = (Arc::new(Barrier::new(OPERATORS)), Arc::new(deed));
    let (sender, done) = mpsc::channel();
    for number in 0..OPERATORS {
        let (barrier, deed, sender) = (Arc::clone(&barrier), Arc::clone(&deed), sender.clone());
        let operator = service.operator();
        thread::spawn(move || {
            barrier.wait();
            let _ = sender.send((number, deed(number, &operator)));
        });
    }
    drop(sender);
    let deadline = Instant::now() + LIMIT;
    let mut all: Vec<(usize, T)> = (0..OPERATORS)
        .map(|count| {
            let left = deadline.saturating_duration_since(Instant::now());
            done.recv_timeout(left).unwrap_or_else(|error| {
                panic!("{count} of {OPERATORS} operators have finished within {LIMIT:?}: {error}")
            })
        })
        .collect();
    all.sort_by_key(|(number, _)| *number);
    all.into_iter().map(|(_, result)| result).collect()
}

fn hold(address: Sbdf) -> Request {
    Request::PciAssignableAdd { address, force: false, persist: false, managed: false, dry_run: false }
}

fn release(address: Sbdf) -> Request {
    Request::PciAssignableRemove { address, force: false, trust_former_owner: false }
}

fn detachment(domain: DomId, address: Sbdf) -> Request {
    Request::PciDetach { domain: name(domain), address, force: false, scope: Scope::All }
}

fn guest_of(number: usize) -> DomId {
    if number.is_multiple_of(2) { WEB } else { DB }
}

/// How many answers said that something was changed; all others said that it is so already, or were refusals.
fn changes(answers: &[Result<Success, Failure>]) -> usize {
    for answer in answers {
        match answer {
            Ok(Success::Changed { .. } | Success::Already { .. }) => {}
            Err(failure) if matches!(failure.code, ErrorCode::Refused | ErrorCode::NotFound) => {}
            other => panic!("{other:?}"),
        }
    }
    answers.iter().filter(|answer| matches!(answer, Ok(Success::Changed { .. }))).count()
}

#[test]
fn answers_to_concurrent_requests_match_xen_and_the_host() {
    let world = World::of(&host());
    let (vfs, service) = (vfs(&world), world.start());
    let (simulation, platform) = (world.simulation.clone(), world.host());
    let mine = vfs.clone();
    at_once(&service, move |number, operator| {
        let (vf, domain) = (mine[number], guest_of(number));
        let owner = || simulation.owner(vf);
        let driver = || platform.function(vf).unwrap().driver;
        let before = driver();
        for round in 0..3 {
            operator.call(hold(vf)).unwrap();
            assert_eq!(
                (owner(), driver().as_deref()),
                (Some(Owner::Quarantine), Some("pci-stub")),
                "{round}"
            );
            operator.call(attachment(domain, vf)).unwrap();
            assert_eq!(owner(), Some(Owner::Guest(domain)), "{round}");
            operator.call(detachment(domain, vf)).unwrap();
            assert_eq!(owner(), Some(Owner::Quarantine), "{round}");
            operator.call(release(vf)).unwrap();
            assert_eq!((owner(), driver()), (Some(Owner::Host), before.clone()), "{round}");
        }
    });
    for domain in [WEB, DB] {
        assert!(world.simulation.grants(domain).is_empty());
    }
    assert_eq!(service.problems(), [""; 0]);
}

#[test]
fn of_concurrent_requests_for_one_function_only_one_changes_it() {
    let world = World::of(&host());
    let (vf, service) = (vfs(&world)[0], world.start());
    for round in 0..3 {
        let held = at_once(&service, move |_, operator| operator.call(hold(vf)));
        assert_eq!(changes(&held), 1, "{round}: {held:?}");
        let attached =
            at_once(&service, move |number, operator| operator.call(attachment(guest_of(number), vf)));
        assert_eq!(changes(&attached), 1, "{round}: {attached:?}");
        let winner = attached.iter().position(|answer| matches!(answer, Ok(Success::Changed { .. })));
        let domain = guest_of(winner.unwrap());
        assert_eq!(world.simulation.owner(vf), Some(Owner::Guest(domain)), "{round}");
        let detached = at_once(&service, move |_, operator| operator.call(detachment(domain, vf)));
        assert_eq!(changes(&detached), 1, "{round}: {detached:?}");
        world.assert_nothing_granted(&service, vf, "detached");
        let released = at_once(&service, move |_, operator| operator.call(release(vf)));
        assert_eq!(changes(&released), 1, "{round}: {released:?}");
        assert_eq!(world.simulation.owner(vf), Some(Owner::Host), "{round}");
    }
}

#[test]
fn conflicting_requests_leave_every_function_with_one_owner() {
    let world = World::of(&host());
    let (all, service) = (vfs(&world), world.start());
    let few: Vec<Sbdf> = all[..3].to_vec();
    let wanted = few.clone();
    let answers = at_once(&service, move |number, operator| {
        let mut choice = number as u64 + 1;
        (0..12)
            .map(|_| {
                // Numerical Recipes' generator: any order will do, and it is the same each time.
                choice = choice.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let vf = wanted[(choice >> 8) as usize % wanted.len()];
                operator.call(match (choice >> 16) % 6 {
                    0 => hold(vf),
                    1 => attachment(WEB, vf),
                    2 => attachment(DB, vf),
                    3 => detachment(WEB, vf),
                    4 => detachment(DB, vf),
                    _ => release(vf),
                })
            })
            .collect::<Vec<_>>()
    });
    let answers: Vec<Result<Success, Failure>> = answers.into_iter().flatten().collect();
    assert!(changes(&answers) > 0, "{answers:?}");
    for vf in few {
        let view = service.view(vf);
        let owner = world.simulation.owner(vf).unwrap();
        let expected = match view.as_ref().map_or(FunctionState::Host, |view| view.state) {
            FunctionState::Host => Owner::Host,
            FunctionState::Held => Owner::Quarantine,
            FunctionState::Attached => Owner::Guest(view.as_ref().unwrap().domain.unwrap()),
            other => panic!("{vf} is {other}"),
        };
        assert_eq!(owner, expected, "{view:?}");
        if let Owner::Guest(domain) = owner {
            service.detach(domain, vf).unwrap();
        }
    }
    for domain in [WEB, DB] {
        assert!(world.simulation.grants(domain).is_empty());
    }
}
