//! Background threads for work that may wait for hardware, the kernel, Xen or a guest.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use log::error;

use super::inbox::Inbox;
use super::problems::Problem;
use super::{Engine, Event};
use crate::outcome::{ErrorCode, Failure};
use crate::protocol::Cause;

impl Inbox {
    /// Runs `work` on a new thread, and passes its result to `report` on that thread. If the thread cannot be started, `report` gets the
    /// failure at once, on the calling thread. A panic of `work` becomes a problem in `xpci status`; what it worked on stays busy until
    /// the service is restarted, because its state is unknown.
    pub(super) fn background<T>(
        &self,
        name: &str,
        work: impl FnOnce() -> T + Send + 'static,
        report: impl FnOnce(Result<T, Failure>) + Send + 'static,
    ) {
        // Shared, because a failed spawn drops the closure and everything moved into it.
        let report = Arc::new(Mutex::new(Some(report)));
        let taken = Arc::clone(&report);
        let take = |report: &Mutex<Option<_>>| report.lock().unwrap_or_else(PoisonError::into_inner).take();
        let (inbox, named) = (self.clone(), name.to_owned());
        let task = move || {
            let done = catch_unwind(AssertUnwindSafe(|| {
                let done = work();
                if let Some(report) = take(&taken) {
                    report(Ok(done));
                }
            }));
            if let Err(panic) = done {
                let text = format!("{named}: it ended by a bug in xpcid; restart xpcid and report its log");
                inbox.send(Event::Problem(Problem::new(Cause::Service, text)));
                resume_unwind(panic);
            }
        };
        if let Err(problem) = thread::Builder::new().name(name.to_owned()).spawn(task) {
            error!("{name}: start a thread: {problem}");
            if let Some(report) = take(&report) {
                let text = format!("cannot start a thread ({name}): {problem}");
                report(Err(Failure::new(ErrorCode::Failed, text).hint("see how many threads dom0 allows")));
            }
        }
    }
}

impl Inbox {
    /// Runs a task on a thread; the task itself sends its result.
    pub(super) fn run(&self, name: &str, task: impl FnOnce() + Send + 'static) {
        let inbox = self.clone();
        self.background(name, task, move |started| {
            // A failure to start drops the task and with it its reply, so that a waiting client gets an error.
            if let Err(failure) = started {
                inbox.send(Event::Problem(Problem::failed(Cause::Service, &failure)));
            }
        });
    }
}

impl Engine {
    /// [`Inbox::run`].
    pub(super) fn background(&self, name: &str, task: impl FnOnce() + Send + 'static) {
        self.inbox.run(name, task);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(60);

    #[test]
    fn the_result_of_the_work_is_reported() {
        let (sender, reports) = mpsc::channel();
        Inbox::new().unwrap().0.background("test", || 7, move |done| sender.send(done).unwrap());
        assert_eq!(reports.recv_timeout(LIMIT).unwrap().unwrap(), 7);
    }

    #[test]
    fn work_that_panics_is_a_problem_in_the_status() {
        let (inbox, events) = Inbox::new().unwrap();
        inbox.background("test", || resume_unwind(Box::new("a fault")), |_: Result<(), _>| ());
        let Ok(Event::Problem(problem)) = events.recv_timeout(LIMIT) else {
            panic!("no problem is reported")
        };
        let text = problem.view().message;
        assert!(text.contains("test") && text.contains("restart xpcid"), "{text}");
    }
}
