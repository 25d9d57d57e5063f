//! One connected guest: its ring, its functions, and how a request gets from one to the other and back.
//!
//! The life of a request: copied; noted as begun in the function's image; claimed on the page; carried out; noted as done, with
//! its answer; answered; the note cleared. A service that is killed anywhere on the way leaves the request flagged, and its
//! successor, going by claim and note, does the rest of it. Reads have no effects and are not noted.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::counters::Counters;
use super::function::{FunctionError, Outcome, ServedFunction};
use super::log_limit::LogLimit;
use super::wire::{Answer, Command, ErrorCode, Page, Request};
use crate::config::{InterruptMode, RequestRecord, RequestStage};
use crate::platform::{Pirq, PlatformError, Ring};
use crate::{DomId, Sbdf};

/// How often a kind of line that a guest can provoke is logged.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// What the service should know.
#[derive(Debug)]
pub enum GuestReport {
    /// A function does not answer any more; its guest reads all ones.
    Vanished {
        /// In the guest.
        devfn: u8,
        /// On the host.
        address: Sbdf,
        /// How it showed.
        cause: FunctionError,
    },
    /// The guest asked for a reset of a function: it has been begun.
    ResetStarted {
        /// In the guest.
        devfn: u8,
        /// On the host.
        address: Sbdf,
    },
    /// The reset is over. After a failure the function should go to nobody.
    ResetFinished {
        /// In the guest.
        devfn: u8,
        /// On the host.
        address: Sbdf,
        /// How it went.
        result: Result<(), ResetError>,
    },
    /// The guest's request changed which interrupts are mapped.
    Interrupts {
        /// In the guest.
        devfn: u8,
        /// Which kind.
        mode: InterruptMode,
        /// How many are mapped.
        count: usize,
    },
    /// A killed service had begun something with a function's interrupts that could not be finished.
    Unsettled {
        /// In the guest.
        devfn: u8,
        /// On the host.
        address: Sbdf,
        /// Why.
        cause: FunctionError,
    },
    /// A function is not served any more.
    Removed {
        /// In the guest.
        devfn: u8,
        /// The function, where one was served; it can be served again.
        function: Option<Box<ServedFunction>>,
        /// Whether it is quiet.
        quiesced: Result<(), FunctionError>,
    },
    /// The connection failed: nothing is served any more.
    RingFailed {
        /// Why.
        cause: PlatformError,
    },
}

/// Why a reset that a guest asked for failed.
#[derive(Debug, thiserror::Error)]
pub enum ResetError {
    /// The host could not do it.
    #[error(transparent)]
    Host(#[from] PlatformError),
    /// It was done, but the function could not be put back to where its guest expects it.
    #[error("after the reset: {0}")]
    After(#[source] FunctionError),
    /// Whoever was to do it went away without a word.
    #[error("the reset was given up")]
    Abandoned,
}

/// A point between two steps of serving, at which a killed service leaves something different behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stage {
    /// The request is copied, nothing is noted.
    Copied,
    /// It is noted as begun.
    Noted,
    /// It is claimed on the page.
    Claimed,
    /// It is carried out, but that is not noted.
    Executed,
    /// It is noted as done.
    Done,
    /// The page is handed back, but the guest was not notified and the note is not cleared.
    Answered,
    /// The guest is notified, the note is not cleared.
    Notified,
}

/// One connected guest.
pub struct Guest {
    domain: DomId,
    ring: Box<dyn Ring>,
    functions: BTreeMap<u8, ServedFunction>,
    counters: Arc<Counters>,
    log: LogLimit,
    reports: Vec<GuestReport>,
    token: u32,
    watch: Option<Box<dyn Fn(Stage) + Send>>,
}

impl Guest {
    /// A guest with the functions that it sees at these device and function numbers.
    pub fn new(
        domain: DomId,
        ring: Box<dyn Ring>,
        functions: BTreeMap<u8, ServedFunction>,
        counters: Arc<Counters>,
    ) -> Self {
        // Claims must differ from those of an earlier life that may still stand on the page.
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let token = (now.as_nanos() as u32) | 1;
        let log = LogLimit::new(LOG_INTERVAL);
        Self { domain, ring, functions, counters, log, reports: Vec::new(), token, watch: None }
    }

    /// Has `watch` called at every stage of every request, for tests that stop there.
    pub fn watch_stages(&mut self, watch: Box<dyn Fn(Stage) + Send>) {
        self.watch = Some(watch);
    }

    /// The ring.
    pub fn ring(&self) -> &dyn Ring {
        self.ring.as_ref()
    }

    /// What was to be reported since the last call.
    pub fn take_reports(&mut self) -> Vec<GuestReport> {
        std::mem::take(&mut self.reports)
    }

    /// Ends serving: the ring is disconnected, the functions are as the guest left them.
    pub fn into_functions(self) -> BTreeMap<u8, ServedFunction> {
        self.functions
    }

    /// Finishes what an earlier life of the service had begun, but for the request that waits. The result is which functions
    /// must be reset, because a reset was under way.
    pub fn settle(&mut self) -> Vec<(u8, Sbdf)> {
        let numbers: Vec<u8> = self.functions.keys().copied().collect();
        let mut resets = Vec::new();
        for devfn in numbers {
            let noted = self.noted();
            let Some(function) = self.functions.get_mut(&devfn) else { continue };
            if let Err(cause) = function.settle(&noted) {
                let address = function.address();
                self.reports.push(GuestReport::Unsettled { devfn, address, cause });
            }
            if function.image().resetting() {
                resets.push((devfn, function.address()));
            }
        }
        resets
    }

    fn noted(&self) -> BTreeSet<Pirq> {
        let states = self.functions.values().map(ServedFunction::vectors);
        states.flat_map(|state| state.entries).map(|(_, pirq)| Pirq(pirq)).collect()
    }

    /// Whether a function is served there.
    pub fn holds(&self, devfn: u8) -> bool {
        self.functions.contains_key(&devfn)
    }

    /// Serves one more function from now on. The one that was there comes back.
    pub fn add(&mut self, devfn: u8, function: ServedFunction) -> Option<ServedFunction> {
        self.functions.insert(devfn, function)
    }

    /// Stops serving a function and makes it quiet.
    pub fn remove(&mut self, devfn: u8) {
        let mut function = self.functions.remove(&devfn);
        let quiesced = function.as_mut().map_or(Ok(()), ServedFunction::quiesce);
        self.reports.push(GuestReport::Removed { devfn, function: function.map(Box::new), quiesced });
    }

    /// A function left the host: its guest reads all ones from here on.
    pub fn set_gone(&mut self, devfn: u8) {
        if let Some(function) = self.functions.get_mut(&devfn) {
            function.set_gone();
        }
    }

    /// A reset that was begun is over.
    pub fn reset_finished(&mut self, devfn: u8, address: Sbdf, result: Result<(), ResetError>) {
        let function = self.functions.get_mut(&devfn).filter(|function| function.address() == address);
        let result = match (result, function) {
            (Ok(()), Some(function)) => function.reset_done().map_err(ResetError::After),
            // After a failed reset the function stays as unreachable as during it.
            (result, _) => result,
        };
        self.reports.push(GuestReport::ResetFinished { devfn, address, result });
    }

    fn reached(&self, stage: Stage) {
        if let Some(watch) = &self.watch {
            watch(stage);
        }
    }

    /// Serves the request that waits. `None`: none waits. Otherwise the function that must be reset now, if one must.
    pub fn serve(&mut self) -> Result<Option<Option<(u8, Sbdf)>>, PlatformError> {
        let Some(request) = Page::new(self.ring.page()).request() else { return Ok(None) };
        self.reached(Stage::Copied);
        let (answer, token, reset) = self.carry_out(&request);
        let page = Page::new(self.ring.page());
        if page.claimed(token) {
            page.answer(&answer);
            self.reached(Stage::Answered);
            self.ring.notify()?;
            self.reached(Stage::Notified);
            self.count(request.command, answer.error);
        } else {
            Counters::add(&self.counters.late);
            let domain = self.domain;
            self.log
                .warn("late", || format!("guest {domain}: its frontend gave up a request before the answer"));
        }
        if request.command != Command::READ
            && let Some(function) = self.addressed(&request)
        {
            function.image_mut().clear_request();
        }
        Ok(Some(reset))
    }

    fn addressed(&mut self, request: &Request) -> Option<&mut ServedFunction> {
        if request.segment != 0 || request.bus != 0 {
            return None;
        }
        self.functions.get_mut(&u8::try_from(request.devfn).ok()?)
    }

    fn next_token(&mut self) -> u32 {
        self.token = self.token.wrapping_add(1).max(1);
        self.token
    }

    /// Carries out a request; with the answer come its claim, and the function that must be reset.
    fn carry_out(&mut self, request: &Request) -> (Answer, u32, Option<(u8, Sbdf)>) {
        let devfn = request.devfn as u8;
        let mut token = self.next_token();
        let noted = request.command != Command::READ;
        let record = RequestRecord {
            command: request.command.0,
            offset: request.offset,
            size: request.size,
            value: request.value,
            info: token,
            entries_hash: request.entries_hash(),
            stage: RequestStage::Begun,
        };
        let known = match self.addressed(request) {
            None => {
                Page::new(self.ring.page()).claim(token);
                let (domain, Request { segment, bus, devfn, .. }) = (self.domain, request);
                // Every scan of the bus asks for functions that are not there: this is worth a line only for debugging.
                log::trace!("guest {domain}: no function at {segment:x}:{bus:x}:{devfn:x}");
                let value = if request.command == Command::READ { u32::MAX } else { 0 };
                return (Answer { error: ErrorCode::NO_DEVICE, value, vectors: Vec::new() }, token, None);
            }
            Some(function) => function.image().request().filter(|known| {
                known.info != 0
                    && RequestRecord { info: request.info, stage: RequestStage::Begun, ..*known }
                        == RequestRecord { info: known.info, ..record }
            }),
        };
        if let Some(RequestRecord { stage: RequestStage::Done { error, value }, info, .. }) = known {
            // An earlier life did it all but for the answer.
            let vectors = self.vectors_for(request, error);
            return (Answer { error: ErrorCode(error), value, vectors }, info, None);
        }
        if let Some(known) = known {
            token = known.info;
        } else if noted && let Some(function) = self.addressed(request) {
            function.image_mut().begin_request(&record);
        }
        if noted {
            self.reached(Stage::Noted);
        }
        Page::new(self.ring.page()).claim(token);
        self.reached(Stage::Claimed);
        let Some(function) = self.addressed(request) else {
            return (Answer { error: ErrorCode::NO_DEVICE, value: 0, vectors: Vec::new() }, token, None);
        };
        let address = function.address();
        let outcome = function.execute(request);
        self.reached(Stage::Executed);
        let reset = outcome.reset.then_some((devfn, address));
        if reset.is_some() {
            self.reports.push(GuestReport::ResetStarted { devfn, address });
        }
        let answer = self.answer_to(devfn, address, request, outcome);
        if noted && let Some(function) = self.addressed(request) {
            function.image_mut().finish_request(answer.error.0, answer.value);
        }
        self.reached(Stage::Done);
        (answer, token, reset)
    }

    /// The vectors of a request that was done by an earlier life, from what is noted.
    fn vectors_for(&mut self, request: &Request, error: i32) -> Vec<u16> {
        if request.command != Command::ENABLE_MSIX || error != 0 {
            return Vec::new();
        }
        let noted = self.addressed(request).map(|function| function.vectors().entries).unwrap_or_default();
        let vector =
            |entry: &u16| noted.iter().find(|(known, _)| known == entry).map(|(_, pirq)| *pirq as u16);
        request.entries.iter().filter_map(vector).collect()
    }

    /// Turns what came of a request into an answer, and tells whom it concerns.
    fn answer_to(&mut self, devfn: u8, address: Sbdf, request: &Request, outcome: Outcome) -> Answer {
        let Outcome { value, vectors, error, .. } = outcome;
        let Some(error) = error else {
            self.report_interrupts(devfn, request.command);
            return Answer { error: ErrorCode::SUCCESS, value, vectors };
        };
        let code = error.code();
        let domain = self.domain;
        self.log.warn(error.kind(), || format!("guest {domain}: {error}"));
        if matches!(error, FunctionError::Hardware { .. })
            && let Some(function) = self.functions.get_mut(&devfn)
            && !function.gone()
        {
            function.set_gone();
            self.reports.push(GuestReport::Vanished { devfn, address, cause: error });
        }
        Answer { error: code, value, vectors }
    }

    fn report_interrupts(&mut self, devfn: u8, command: Command) {
        let interrupts =
            [Command::ENABLE_MSI, Command::DISABLE_MSI, Command::ENABLE_MSIX, Command::DISABLE_MSIX];
        if interrupts.contains(&command)
            && let Some(function) = self.functions.get(&devfn)
        {
            let state = function.vectors();
            let (mode, count) = (state.mode, state.entries.len());
            self.reports.push(GuestReport::Interrupts { devfn, mode, count });
        }
    }

    fn count(&self, command: Command, error: ErrorCode) {
        Counters::add(match command {
            Command::READ => &self.counters.reads,
            Command::WRITE => &self.counters.writes,
            _ => &self.counters.interrupts,
        });
        if error != ErrorCode::SUCCESS {
            Counters::add(&self.counters.errors);
        }
    }
}
