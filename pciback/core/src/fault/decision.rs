//! From an error to what is done about it.

use super::{Action, ErrorPolicy, Fault, Severity, Storms};
use crate::DomId;

/// Who has the function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// dom0, with a driver of its own.
    Host,
    /// Neither dom0 nor a guest: it is held, or quarantined.
    Neither,
    /// A guest.
    Guest {
        /// Which.
        domain: DomId,
        /// Whether its frontend is connected and says that it can be notified of errors.
        can_be_notified: bool,
    },
}

/// What an error has to do with the function that is decided about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Relation {
    /// It is the function's own.
    Own,
    /// It is of the function's PF, or of a port above it.
    Above,
    /// It is of another function below the same port.
    Beside,
}

/// What is done, beside noting it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Response {
    /// The action.
    pub action: Action,
    /// Whether the function's correctable errors are masked for a while.
    pub mask: bool,
}

/// A response and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// What is done.
    pub response: Response,
    /// Why, for people.
    pub reason: String,
}

/// Decides what is done about a function because of an error, its own or another's.
///
/// Errors of dom0's functions are only recorded, and a guest whose function is not the cause loses nothing: it is notified that the link
/// was reset, no more.
pub fn decide(
    fault: &Fault,
    relation: Relation,
    owner: Owner,
    policy: &ErrorPolicy,
    storms: Storms,
) -> Decision {
    let Owner::Guest { domain, can_be_notified } = owner else {
        let reason = match owner {
            Owner::Host => "it belongs to dom0, whose kernel handles it",
            _ => "no guest has it, and it is reset before one gets it",
        };
        return Decision {
            response: Response { action: Action::Log, mask: false },
            reason: reason.to_owned(),
        };
    };
    let mask = relation == Relation::Own && fault.severity == Severity::Correctable && storms.correctable;
    let (wished, reason) = wished(fault, relation, policy, storms);
    let (action, reason) = match wished {
        Action::TellGuest if !can_be_notified => {
            let instead = if relation == Relation::Own { policy.unanswered } else { Action::Log };
            (instead, format!("{reason}, but domain {domain} cannot be notified"))
        }
        action => (action, reason),
    };
    let reason = if mask {
        let (limit, seconds) = (policy.correctable_per_minute, policy.mask_seconds);
        format!("{reason}; more than {limit} within a minute: masked for {seconds} s")
    } else {
        reason
    };
    Decision { response: Response { action, mask }, reason }
}

fn wished(fault: &Fault, relation: Relation, policy: &ErrorPolicy, storms: Storms) -> (Action, String) {
    let severity = fault.severity;
    match relation {
        Relation::Own if severity != Severity::Correctable && (storms.function || storms.guest) => {
            let limit = if storms.function {
                format!("it had more than {} uncorrectable errors", policy.uncorrectable_per_hour)
            } else {
                format!("its guest's functions had more than {} uncorrectable errors", policy.guest_per_hour)
            };
            // A limit makes nothing milder.
            let action = policy.storm.max(policy.action(severity));
            (action, format!("{limit} within an hour"))
        }
        Relation::Own => (policy.action(severity), format!("the policy for {severity} errors")),
        // The kernel resets the link: what is below it has lost its state.
        _ if severity == Severity::Fatal => {
            let whose = if relation == Relation::Above { "above it" } else { "beside it" };
            (policy.link_reset, format!("its link is reset for the error of {} {whose}", fault.address))
        }
        _ => (Action::Log, format!("it is the error of {}, not its own", fault.address)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Detection;
    use super::*;
    use crate::Sbdf;

    const GUEST: Owner = Owner::Guest { domain: DomId(3), can_be_notified: true };
    const DEAF: Owner = Owner::Guest { domain: DomId(3), can_be_notified: false };
    const QUIET: Storms = Storms { correctable: false, function: false, guest: false };
    const FUNCTION: Storms = Storms { function: true, ..QUIET };
    const ALL: Storms = Storms { correctable: true, function: true, guest: true };

    fn fault(severity: Severity, detection: Detection) -> Fault {
        Fault { address: Sbdf::from_devfn(0, 1, 0x80), severity, status: 0, detection, count: 1 }
    }

    /// Error x severity x owner x policy x history.
    #[test]
    fn the_defaults_are_what_an_operator_expects() {
        use Action::{Log, Quarantine, TellGuest};
        use Relation::{Above, Beside, Own};
        use Severity::{Correctable, Fatal, NonFatal};
        for (severity, relation, owner, storms, action, mask) in [
            (Correctable, Own, GUEST, QUIET, Log, false),
            (Correctable, Own, GUEST, ALL, Log, true),
            (Correctable, Own, DEAF, ALL, Log, true),
            (NonFatal, Own, GUEST, QUIET, TellGuest, false),
            (NonFatal, Own, DEAF, QUIET, Quarantine, false),
            (NonFatal, Own, GUEST, FUNCTION, Quarantine, false),
            (NonFatal, Own, GUEST, Storms { guest: true, ..QUIET }, Quarantine, false),
            (Fatal, Own, GUEST, QUIET, Quarantine, false),
            (Fatal, Own, DEAF, ALL, Quarantine, false),
            // Another function's error: the guest is notified of a link reset, and loses nothing.
            (Correctable, Above, GUEST, ALL, Log, false),
            (NonFatal, Above, GUEST, ALL, Log, false),
            (NonFatal, Beside, GUEST, ALL, Log, false),
            (Fatal, Above, GUEST, ALL, TellGuest, false),
            (Fatal, Beside, GUEST, ALL, TellGuest, false),
            (Fatal, Beside, DEAF, ALL, Log, false),
            (Fatal, Above, DEAF, ALL, Log, false),
        ] {
            for detection in [Detection::Event, Detection::Counters, Detection::Containment] {
                let decision =
                    decide(&fault(severity, detection), relation, owner, &ErrorPolicy::default(), storms);
                let case = format!("{severity} {relation:?} {owner:?} {storms:?} {detection:?}");
                assert_eq!(decision.response, Response { action, mask }, "{case}: {}", decision.reason);
            }
        }
    }

    #[test]
    fn nothing_but_a_note_follows_for_what_no_guest_has_whatever_the_policy_says() {
        let harsh = ErrorPolicy {
            correctable: Action::DestroyGuest,
            non_fatal: Action::Reset,
            fatal: Action::Quarantine,
            link_reset: Action::Reset,
            storm: Action::DestroyGuest,
            ..ErrorPolicy::default()
        };
        for severity in Severity::ALL {
            for relation in [Relation::Own, Relation::Above, Relation::Beside] {
                for owner in [Owner::Host, Owner::Neither] {
                    let decision = decide(&fault(severity, Detection::Event), relation, owner, &harsh, ALL);
                    assert_eq!(decision.response, Response { action: Action::Log, mask: false });
                }
            }
        }
    }

    #[test]
    fn every_action_of_a_policy_is_carried_out_and_a_storm_makes_none_milder() {
        for (_, action) in Action::WORDS {
            for severity in Severity::ALL {
                let policy = ErrorPolicy {
                    correctable: *action,
                    non_fatal: *action,
                    fatal: *action,
                    storm: Action::Unplug,
                    ..ErrorPolicy::default()
                };
                let decided = |storms| {
                    decide(&fault(severity, Detection::Event), Relation::Own, GUEST, &policy, storms)
                        .response
                        .action
                };
                assert_eq!(decided(QUIET), *action);
                let stormy =
                    if severity == Severity::Correctable { *action } else { Action::Unplug.max(*action) };
                assert_eq!(decided(FUNCTION), stormy);
            }
        }
    }

    #[test]
    fn a_decision_says_why() {
        let policy = ErrorPolicy::default();
        let reason = |severity, relation, storms| {
            decide(&fault(severity, Detection::Event), relation, DEAF, &policy, storms).reason
        };
        assert_eq!(
            reason(Severity::NonFatal, Relation::Own, QUIET),
            "the policy for non-fatal errors, but domain 3 cannot be notified"
        );
        assert_eq!(
            reason(Severity::Fatal, Relation::Own, FUNCTION),
            "it had more than 10 uncorrectable errors within an hour"
        );
        assert_eq!(
            reason(Severity::Correctable, Relation::Own, ALL),
            "the policy for correctable errors; more than 60 within a minute: masked for 600 s"
        );
    }
}
