//! `xpci metrics`: metrics in Prometheus' text format (exposition format 0.0.4).

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::time::Duration;

use pciback::FunctionState;
use serde::Serialize;

use crate::client;
use crate::outcome::{ErrorCode, Failure};
use crate::protocol::{GuestView, ListFilter, ListedView, Request, StatusView, Success};

/// The contents of the file while the service does not answer.
const DOWN: &str = "# HELP xpci_up Whether xpcid answers.\n# TYPE xpci_up gauge\nxpci_up 0\n";

/// All states, so that a state without functions has a sample with value 0 for graphs and alerts.
const STATES: [FunctionState; 8] = [
    FunctionState::Host,
    FunctionState::Held,
    FunctionState::Attaching,
    FunctionState::Attached,
    FunctionState::Detaching,
    FunctionState::Resetting,
    FunctionState::Gone,
    FunctionState::Quarantined,
];

/// Reads metrics from the service, and writes them to a file or returns them as text.
///
/// # Errors
/// A failure of the service or the file. If the service does not answer, the file is still written, with `xpci_up 0`.
pub fn gather(socket: &Path, file: Option<&Path>) -> Result<Success, Failure> {
    let found = ask(socket);
    let Some(file) = file else { return found.map(|text| Success::Metrics { text }) };
    let down = found.as_ref().is_err_and(|failure| failure.code == ErrorCode::Unreachable);
    match (&found, down) {
        (Ok(text), _) => replace(file, text)?,
        (Err(_), true) => replace(file, DOWN)?,
        (Err(_), false) => {}
    }
    let message = format!("the metrics are in {}", file.display());
    found.map(|_| Success::Changed { message, warnings: Vec::new(), functions: Vec::new() })
}

/// Replaces a file atomically, so that readers see either the old or the new metrics.
fn replace(file: &Path, text: &str) -> Result<(), Failure> {
    // A rename would remove a device node, for example.
    if fs::metadata(file).is_ok_and(|found| !found.is_file()) {
        let text = format!("cannot write the metrics to {}: that is not a regular file", file.display());
        return Err(Failure::refused(text).hint("without '--write', 'xpci metrics' prints them"));
    }
    let new = file.with_extension("new");
    fs::write(&new, text).and_then(|()| fs::rename(&new, file)).map_err(|error| {
        Failure::new(ErrorCode::Failed, format!("cannot write the metrics to {}: {error}", file.display()))
    })
}

fn ask(socket: &Path) -> Result<String, Failure> {
    let answer = |request| {
        let envelope = client::call(socket, request, &mut |_| ())?;
        match (envelope.result, envelope.error) {
            (Some(success), _) => Ok(success),
            (None, error) => Err(error.unwrap_or_else(|| {
                Failure::new(ErrorCode::Failed, "xpcid's answer has neither result nor error")
            })),
        }
    };
    match (answer(Request::Status)?, answer(Request::List { filter: ListFilter::default() })?) {
        (Success::Status(status), Success::Listed { functions }) => Ok(text(&status, &functions)),
        _ => Err(Failure::new(ErrorCode::Failed, "xpcid's answer does not match the request")
            .hint("compare the versions: 'xpci --version', 'xpcid --version'")),
    }
}

/// One metric with its samples: labels and value.
fn metric(into: &mut String, name: &str, kind: &str, help: &str, samples: &[(Vec<(&str, String)>, u64)]) {
    if samples.is_empty() {
        return;
    }
    let _ = writeln!(into, "# HELP {name} {help}\n# TYPE {name} {kind}");
    for (labels, value) in samples {
        let labels: Vec<String> =
            labels.iter().map(|(label, value)| format!("{label}=\"{}\"", escaped(value))).collect();
        let braces = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
        let _ = writeln!(into, "{name}{braces} {value}");
    }
}

/// The durations of guests' requests, as a histogram.
fn histogram(into: &mut String, name: &str, help: &str, guests: &[GuestView]) {
    let timed = || guests.iter().filter(|guest| !guest.times.buckets.is_empty());
    if timed().next().is_none() {
        return;
    }
    let _ = writeln!(into, "# HELP {name} {help}\n# TYPE {name} histogram");
    for guest in timed() {
        let labels = format!(
            "domain=\"{}\",name=\"{}\"",
            guest.domain,
            escaped(guest.name.as_deref().unwrap_or_default())
        );
        let mut requests = 0;
        for bucket in &guest.times.buckets {
            requests += bucket.requests;
            let bound = match bucket.up_to_microseconds {
                Some(microseconds) => seconds(Duration::from_micros(microseconds)),
                None => "+Inf".to_owned(),
            };
            let _ = writeln!(into, "{name}_bucket{{{labels},le=\"{bound}\"}} {requests}");
        }
        let total = seconds(Duration::from_nanos(guest.times.total_nanoseconds));
        let _ = writeln!(into, "{name}_sum{{{labels}}} {total}\n{name}_count{{{labels}}} {requests}");
    }
}

/// A duration in seconds, in Prometheus' format.
fn seconds(time: Duration) -> String {
    let text = format!("{}.{:09}", time.as_secs(), time.subsec_nanos());
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// Escapes a label's value: guests choose their names, which may have any characters.
fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// The protocol's word for a value.
fn word(value: impl Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

fn text(status: &StatusView, functions: &[ListedView]) -> String {
    let mut text = String::new();
    metric(&mut text, "xpci_up", "gauge", "Whether xpcid answers.", &[(Vec::new(), 1)]);
    let info = vec![("version", status.service.clone()), ("platform", status.platform.clone())];
    metric(&mut text, "xpci_info", "gauge", "The version of xpcid and what it runs on.", &[(info, 1)]);
    let mut states: BTreeMap<String, u64> = STATES.iter().map(|state| (state.to_string(), 0)).collect();
    let gone = status.functions.iter().filter(|function| function.state == FunctionState::Gone);
    for state in functions.iter().map(|listed| listed.function.state).chain(gone.map(|one| one.state)) {
        *states.entry(state.to_string()).or_default() += 1;
    }
    let states: Vec<_> = states.into_iter().map(|(state, count)| (vec![("state", state)], count)).collect();
    metric(&mut text, "xpci_functions", "gauge", "PCI functions of the host by state.", &states);
    let pf = |count: fn(&ListedView) -> Option<u16>| -> Vec<_> {
        let of = |listed: &ListedView| {
            count(listed).map(|count| (vec![("pf", listed.function.address.to_string())], count.into()))
        };
        functions.iter().filter_map(of).collect()
    };
    let (enabled, total) = (pf(|listed| listed.enabled_vfs), pf(|listed| listed.total_vfs));
    metric(&mut text, "xpci_vfs_enabled", "gauge", "Enabled VFs of a PF.", &enabled);
    metric(&mut text, "xpci_vfs_total", "gauge", "VFs that a PF can have.", &total);
    let guest = |count: &dyn Fn(&GuestView) -> u64| -> Vec<_> {
        let of = |guest: &GuestView| {
            let name = guest.name.clone().unwrap_or_default();
            (vec![("domain", guest.domain.to_string()), ("name", name)], count(guest))
        };
        status.guests.iter().map(of).collect()
    };
    let has = |guest: &GuestView| {
        status.functions.iter().filter(|function| function.domain == Some(guest.domain)).count() as u64
    };
    metric(&mut text, "xpci_guest_functions", "gauge", "Functions that a guest has.", &guest(&has));
    let help = "Requests of a guest answered since xpcid started or the guest connected first.";
    metric(&mut text, "xpci_guest_requests_total", "counter", help, &guest(&|guest| guest.requests));
    let help = "Those answered with an error, except reads of functions that do not exist.";
    metric(&mut text, "xpci_guest_errors_total", "counter", help, &guest(&|guest| guest.errors));
    let help = "How long every 16th of a guest's requests took, from being taken to its answer.";
    histogram(&mut text, "xpci_guest_request_seconds", help, &status.guests);
    let mut problems: BTreeMap<String, u64> = BTreeMap::new();
    for problem in &status.problems {
        *problems.entry(word(problem.cause)).or_default() += 1;
    }
    let problems: Vec<_> =
        problems.into_iter().map(|(cause, count)| (vec![("cause", cause)], count)).collect();
    let all = [(Vec::new(), status.problems.len() as u64)];
    metric(&mut text, "xpci_problems", "gauge", "Problems in 'xpci status'.", &all);
    metric(&mut text, "xpci_problems_by_cause", "gauge", "Problems in 'xpci status' by cause.", &problems);
    let errors: Vec<_> = status
        .device_errors
        .iter()
        .map(|errors| {
            (vec![("severity", word(errors.severity)), ("action", word(errors.action))], errors.count)
        })
        .collect();
    let help = "Errors of guests' functions since xpcid started, by severity and the action decided.";
    metric(&mut text, "xpci_device_errors_total", "counter", help, &errors);
    text
}

#[cfg(test)]
mod tests {
    use pciback::DomId;

    use super::*;
    use crate::protocol::{RequestTimes, TimeBucket};

    #[test]
    fn a_name_that_a_guest_chose_stays_within_its_label() {
        let mut text = String::new();
        metric(&mut text, "m", "gauge", "h", &[(vec![("name", "a\"} 7\n\\".to_owned())], 1)]);
        assert_eq!(text.lines().last(), Some(r#"m{name="a\"} 7\n\\"} 1"#));
        assert_eq!(text.lines().count(), 3);
    }

    #[test]
    fn a_histogram_has_how_many_requests_took_no_longer_than_each_bound() {
        let bucket = |up_to_microseconds, requests| TimeBucket { up_to_microseconds, requests };
        let buckets = vec![bucket(Some(5), 3), bucket(Some(1_000_000), 0), bucket(None, 1)];
        let times = RequestTimes { buckets, total_nanoseconds: 2_000_001_500 };
        let (domain, name) = (DomId(7), Some("w\"b".to_owned()));
        let guest = GuestView { domain, name, frontend: String::new(), requests: 4, errors: 0, times };
        let older = GuestView { times: RequestTimes::default(), ..guest.clone() };
        let mut text = String::new();
        histogram(&mut text, "t", "h", &[guest, older]);
        let labels = r#"domain="7",name="w\"b""#;
        let expected = format!(
            "# HELP t h\n# TYPE t histogram\n\
             t_bucket{{{labels},le=\"0.000005\"}} 3\n\
             t_bucket{{{labels},le=\"1\"}} 3\n\
             t_bucket{{{labels},le=\"+Inf\"}} 4\n\
             t_sum{{{labels}}} 2.0000015\n\
             t_count{{{labels}}} 4\n"
        );
        assert_eq!(text, expected);
    }

    #[test]
    fn only_regular_files_are_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("socket");
        let _socket = std::os::unix::net::UnixListener::bind(&file).unwrap();
        let failure = gather(&directory.path().join("control"), Some(&file)).unwrap_err();
        assert!(failure.message.ends_with("that is not a regular file"), "{failure}");
        assert!(!fs::metadata(&file).unwrap().is_file());
    }

    #[test]
    fn the_file_shows_a_service_that_does_not_answer() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("xpci.prom");
        let failure = gather(&directory.path().join("control"), Some(&file)).unwrap_err();
        assert_eq!(failure.code, ErrorCode::Unreachable);
        assert!(fs::read_to_string(&file).unwrap().ends_with("xpci_up 0\n"));
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "nothing else is left");
    }
}
