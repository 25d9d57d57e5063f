//! The thread that serves one HVM guest.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Instant;

use log::warn;

use super::device::{ECAM_BASE, ECAM_BYTES};
use super::ports::ConfigPorts;
use super::wire::{self, IoRequest, Place, VCPUS};
use crate::DomId;
use crate::platform::{IoreqServer, PlatformError};
use crate::pv::function::{Demand, GuestFunction};
use crate::pv::roster::Roster;
use crate::pv::server::{BURST, EVENTS, Order, SPIN, Turn, revocations};
use crate::pv::{Attachment, Counters, NotTold, Server, ServerReport};

impl Server {
    /// Starts to serve an HVM guest, of which `ports` has what it wrote to port CF8; `functions` are those of an earlier life, by
    /// device and function number. Requests that have waited since are answered first. Reports go to `report`, which must not block.
    pub fn start_hvm(
        domain: DomId,
        server: Box<dyn IoreqServer>,
        ports: ConfigPorts,
        functions: BTreeMap<u8, Box<GuestFunction>>,
        counters: Arc<Counters>,
        report: Box<dyn Fn(ServerReport) + Send>,
    ) -> io::Result<Self> {
        let revocations = revocations(&functions);
        let roster = Roster::new(domain, functions, &counters, report);
        let mut serving = Serving { roster, server, ports };
        Self::spawn(domain, counters, revocations, move |orders, wake| serving.run(&orders, wake.as_fd()))
    }
}

struct Serving {
    roster: Roster,
    server: Box<dyn IoreqServer>,
    ports: ConfigPorts,
}

impl Serving {
    fn run(&mut self, orders: &mpsc::Receiver<Order>, wake: BorrowedFd<'_>) {
        let mut turn = self.serve_all(true, orders);
        loop {
            if turn == Turn::Stopped || self.roster.take_orders(orders) {
                return;
            }
            // There is no protocol for it.
            self.roster.tell_nothing(NotTold::NoHandler);
            if turn == Turn::Idle
                && let Err(error) = self.wait(wake)
            {
                return self.roster.fail(&error, orders);
            }
            turn = self.serve_while_busy(orders);
        }
    }

    fn wait(&mut self, wake: BorrowedFd<'_>) -> Result<(), PlatformError> {
        self.roster.sleep(self.server.event_fd(), wake, None)?;
        for _ in 0..EVENTS {
            if self.server.take_event()?.is_none() {
                break;
            }
        }
        self.server.bind_vcpus()
    }

    /// Answers requests until none has come for a moment.
    fn serve_while_busy(&mut self, orders: &mpsc::Receiver<Order>) -> Turn {
        let mut last = Instant::now();
        for _ in 0..BURST {
            loop {
                match self.serve_all(false, orders) {
                    Turn::Busy => break,
                    Turn::Stopped => return Turn::Stopped,
                    Turn::Idle if last.elapsed() >= SPIN => return Turn::Idle,
                    Turn::Idle => std::hint::spin_loop(),
                }
            }
            last = Instant::now();
        }
        Turn::Busy
    }

    /// Answers what waits, for each vCPU once. A request that an earlier thread took and did not answer is answered where it is `resumed`.
    fn serve_all(&mut self, resumed: bool, orders: &mpsc::Receiver<Order>) -> Turn {
        let mut turn = Turn::Idle;
        for vcpu in 0..VCPUS {
            if let Some(request) = wire::take_request(self.server.page(), vcpu, resumed) {
                if self.roster.take_orders(orders) {
                    return Turn::Stopped;
                }
                self.serve(vcpu, &request);
                turn = Turn::Busy;
            }
        }
        turn
    }

    fn serve(&mut self, vcpu: u16, request: &IoRequest) {
        let (data, known, demand, attachment) = self.execute(request);
        let data = request.write.is_none().then(|| data & value_mask(request.bytes));
        wire::put_answer(self.server.page(), vcpu, data);
        if let Err(error) = self.server.notify(vcpu) {
            warn!("domain {}: {error}", self.roster.domain);
        }
        let trouble = self.roster.functions.values_mut().find_map(|function| function.take_trouble());
        self.roster.counters.count(!known || trouble.is_some());
        if !known || trouble.is_some() {
            self.complain(request, trouble);
        }
        self.roster.tell(demand, attachment);
    }

    /// What is read, whether the request made sense, and what it asks of the service.
    fn execute(&mut self, request: &IoRequest) -> (u64, bool, Option<Demand>, Option<Attachment>) {
        if request.bytes == 0 {
            return (u64::MAX, false, None, None);
        }
        match request.place {
            Place::Config { slot, offset } => {
                let bytes = wire::reached_by_ports(offset, request.bytes);
                self.config(slot << 3, offset, bytes, request.write)
            }
            Place::Memory { address } => match address.checked_sub(ECAM_BASE) {
                Some(at) if at < ECAM_BYTES => {
                    self.config((at >> 12) as u8, at as u16 & 0xfff, request.bytes, request.write)
                }
                _ => self.memory(address, request),
            },
            Place::Port { port } => {
                let (value, resets) = self.ports.access(port, request.bytes, request.write);
                if resets {
                    (self.roster.report)(ServerReport::RestartWanted);
                }
                (value, true, None, None)
            }
            Place::Other => (u64::MAX, false, None, None),
        }
    }

    /// Config space; where there is no function of ours, nobody answers.
    fn config(
        &mut self,
        devfn: u8,
        offset: u16,
        bytes: u8,
        write: Option<u64>,
    ) -> (u64, bool, Option<Demand>, Option<Attachment>) {
        let Some(function) = self.roster.functions.get_mut(&devfn) else {
            return (u64::MAX, true, None, None);
        };
        let attachment = Some(function.attachment());
        match write {
            None => {
                let (value, demand) = function.config_read(offset, bytes);
                (value, true, demand, attachment)
            }
            Some(value) => {
                let before = function.places_released();
                let demand = function.config_write(offset, bytes, value);
                if function.places_released() != before {
                    self.place_others();
                }
                (value, true, demand, attachment)
            }
        }
    }

    /// A place has become free, for which another BAR may wait.
    fn place_others(&mut self) {
        for function in self.roster.functions.values_mut() {
            if let Err(error) = function.place_bars(false) {
                function.note_trouble(&error);
            }
        }
    }

    fn memory(
        &mut self,
        address: u64,
        request: &IoRequest,
    ) -> (u64, bool, Option<Demand>, Option<Attachment>) {
        let functions = self.roster.functions.values_mut();
        let value = match request.write {
            None => functions.filter_map(|function| function.memory_read(address, request.bytes)).next(),
            Some(value) => functions
                .filter_map(|function| function.memory_write(address, request.bytes, value))
                .next()
                .map(|()| value),
        };
        // A BAR may have moved while the request was on its way.
        (value.unwrap_or(u64::MAX), true, None, None)
    }

    fn complain(&mut self, request: &IoRequest, trouble: Option<String>) {
        if let Some(unsaid) = self.roster.counters.may_complain() {
            let trouble =
                trouble.unwrap_or_else(|| "it makes no sense, or is a string instruction".to_owned());
            warn!(
                "domain {}: {request:x?}: {trouble}; {unsaid} more of its requests failed since the last such line",
                self.roster.domain
            );
        }
    }
}

fn value_mask(bytes: u8) -> u64 {
    match bytes {
        0 | 8 => u64::MAX,
        bytes => (1 << (8 * u32::from(bytes))) - 1,
    }
}
