//! Requests of an HVM guest: Xen sends what its vCPUs do with our functions to an ioreq server.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::warn;

use super::emulated::Emulated;
use super::ports::ConfigPorts;
use super::recovery::recover_interrupted;
use super::wire::{self, IoRequest, Place, VCPUS};
use super::{ECAM_BASE, ECAM_BYTES, Taken};
use crate::config::Width;
use crate::fault::AerAnswer;
use crate::platform::{self, DeviceModels, HvmDomains, IoreqServer, PlatformError};
use crate::serve::device::GuestDevice;
use crate::serve::guest_vfs::Patience;
use crate::serve::worker::{EVENTS, RequestSource, Turn};
use crate::serve::{
    Attachment, Counters, Demand, GuestFunction, NotNotified, Notification, Roster, Server, ServerReport,
};
use crate::{Devfn, DomId};

/// How long a read of a VF that the host is creating waits, while the thread answers other vCPUs. Linux has interrupts off meanwhile, and takes
/// a processor for stuck after 10 seconds of that.
const VF_LIMIT: Duration = Duration::from_secs(3);

/// A connected server of an HVM guest, and what the guest has besides its functions.
pub struct Connection {
    /// Who answers for the guest's functions.
    pub server: Box<dyn IoreqServer>,
    /// What the guest wrote to port CF8.
    pub ports: ConfigPorts,
    /// What its functions have of it.
    pub taken: Arc<Taken>,
    /// Where the guest's physical interrupts are looked up.
    pub domains: Arc<dyn HvmDomains>,
    /// Where the guest's other functions are.
    pub models: Arc<dyn DeviceModels>,
    /// Whether the guest has functions from another toolstack, too.
    pub shared: bool,
}

/// Starts to serve an HVM guest; `functions` are those of a previous process, by device and function. Requests that have waited since
/// are answered first. Reports go to `report`, which must not block.
pub fn start(
    domain: DomId,
    connection: Connection,
    functions: BTreeMap<Devfn, Box<GuestFunction>>,
    counters: Arc<Counters>,
    report: Box<dyn Fn(ServerReport) + Send>,
) -> io::Result<Server> {
    Server::start(domain, IoreqRequests::new(domain, connection), functions, counters, report)
}

/// A guest that is served by the caller's thread and not by one of its own, for the fuzz targets: what happens depends on their input alone.
#[cfg(fuzzing)]
pub struct Unthreaded {
    roster: Roster,
    source: IoreqRequests,
}

#[cfg(fuzzing)]
impl Unthreaded {
    /// As [`start`], and what the thread does first.
    pub fn start(
        domain: DomId,
        connection: Connection,
        functions: BTreeMap<Devfn, Box<GuestFunction>>,
        report: Box<dyn Fn(ServerReport) + Send>,
    ) -> Self {
        let (_, orders) = std::sync::mpsc::channel();
        let mut roster = Roster::new(domain, functions, &Arc::default(), report, orders);
        let mut source = IoreqRequests::new(domain, connection);
        source.recover(&mut roster);
        Self { roster, source }
    }

    /// Answers each vCPU that has a request.
    pub fn serve(&mut self) {
        while matches!(self.source.serve(&mut self.roster), Turn::Busy) {}
    }

    /// The reset that a guest asked for has ended.
    pub fn reset_ended(&mut self, devfn: Devfn, verified: bool) {
        self.roster.reset_ended(devfn, verified);
    }

    /// The functions, as the thread gives them back.
    pub fn stop(self) -> BTreeMap<Devfn, Box<GuestFunction>> {
        self.roster.functions
    }
}

/// The requests to an ioreq server.
struct IoreqRequests {
    server: Box<dyn IoreqServer>,
    ports: ConfigPorts,
    taken: Arc<Taken>,
    domains: Arc<dyn HvmDomains>,
    emulated: Emulated,
    shared: bool,
    /// Requests that an earlier thread took and did not answer are answered, too.
    resumes: bool,
    /// Reads of VFs that the host is creating, by vCPU. On the page they are marked as begun: the next thread finds them there.
    waiting: BTreeMap<u16, Begun>,
}

/// A request that was taken from the page.
struct Begun {
    request: IoRequest,
    /// When that was, if it is timed.
    taken: Option<Instant>,
    /// When it is answered all the same, if it waits for the host.
    due: Option<Instant>,
}

impl Begun {
    fn patience(&self) -> Patience {
        match self.due {
            Some(due) if due <= Instant::now() => Patience::Over,
            _ => Patience::Left,
        }
    }
}

impl RequestSource for IoreqRequests {
    fn recover(&mut self, roster: &mut Roster) {
        recover_interrupted(roster, self.domains.as_ref(), self.shared);
        // What is mapped comes first, of all functions: a BAR that waits for its place would otherwise be mapped over the one that has it.
        on_each(roster, |device, function| device.take_over_bars(function));
        on_each(roster, |device, function| device.place_bars(function));
    }

    fn serve(&mut self, roster: &mut Roster) -> Turn {
        if self.resumes && finish_placing(roster) {
            return Turn::Stopped;
        }
        let mut turn = Turn::Idle;
        for vcpu in 0..VCPUS {
            if let Some(request) = wire::take_request(self.server.page(), vcpu, self.resumes) {
                if roster.take_orders() {
                    return Turn::Stopped;
                }
                let begun = Begun { request, taken: roster.counters.taken(), due: None };
                match self.answer(roster, vcpu, begun) {
                    Turn::Stopped => return Turn::Stopped,
                    _ => turn = Turn::Busy,
                }
            }
        }
        self.resumes = false;
        if !self.waiting.is_empty() && roster.take_orders() {
            return Turn::Stopped;
        }
        for (vcpu, begun) in std::mem::take(&mut self.waiting) {
            match self.answer(roster, vcpu, begun) {
                Turn::Idle => {}
                other => turn = other,
            }
            if turn == Turn::Stopped {
                break;
            }
        }
        turn
    }

    fn due(&self) -> Option<Instant> {
        self.waiting.values().filter_map(|begun| begun.due).min()
    }

    fn event_fd(&self) -> BorrowedFd<'_> {
        self.server.event_fd()
    }

    fn take_events(&mut self) -> Result<(), PlatformError> {
        for _ in 0..EVENTS {
            if self.server.take_event()?.is_none() {
                break;
            }
        }
        self.server.bind_vcpus()
    }

    /// There is no protocol for it.
    fn tell(&mut self, _: &Notification, _: &mut GuestFunction) -> Result<(), NotNotified> {
        Err(NotNotified::NoHandler)
    }

    fn take_answer(&mut self) -> Option<Result<AerAnswer, u32>> {
        None
    }

    fn withdraw(&mut self) {}
}

/// Maps something of each function, and reports what cannot be mapped.
fn on_each(roster: &mut Roster, map: impl Fn(&dyn GuestDevice, &mut GuestFunction) -> platform::Result<()>) {
    for function in roster.functions.values_mut() {
        if let Err(error) = map(function.device().as_ref(), function) {
            (roster.report)(ServerReport::NotPlaced(function.attachment(), error.to_string()));
        }
    }
}

/// What a request has come to.
struct Done {
    /// What is read.
    value: u64,
    /// Whether the request made sense.
    known: bool,
    /// What it asks of the service, and for which function.
    demand: Option<Demand>,
    attachment: Option<Attachment>,
    /// What went wrong.
    trouble: Option<String>,
    /// It is not done: the host is creating the VF that it reads.
    waits: bool,
}

impl Done {
    fn value(value: u64) -> Self {
        Self { value, known: true, demand: None, attachment: None, trouble: None, waits: false }
    }

    fn waits() -> Self {
        Self { waits: true, ..Self::value(u64::MAX) }
    }

    /// The request is one that nothing answers.
    fn nonsense() -> Self {
        Self { known: false, ..Self::value(u64::MAX) }
    }
}

impl IoreqRequests {
    fn new(domain: DomId, connection: Connection) -> Self {
        let Connection { server, ports, taken, domains, models, shared } = connection;
        let emulated = Emulated::new(domain, models);
        let waiting = BTreeMap::new();
        Self { server, ports, taken, domains, emulated, shared, resumes: true, waiting }
    }

    /// Carries a request out and answers it. Idle: it waits. Stopped: the thread was ordered to stop before it was done, and the next one does
    /// it again.
    fn answer(&mut self, roster: &mut Roster, vcpu: u16, begun: Begun) -> Turn {
        let request = &begun.request;
        let (data, done) = match request.place {
            // What is read is in the guest's memory then.
            Place::Items { address, to, count, down } if request.bytes != 0 => {
                let items = items(roster, address, (count, request.bytes), down);
                let lowest = if down { to.wrapping_sub(distance(count - 1, request.bytes)) } else { to };
                let trouble = self.server.write_memory(lowest, &items).err().map(|error| error.to_string());
                (None, Done { trouble, ..Done::value(u64::MAX) })
            }
            _ => {
                let done = self.execute(roster, request, begun.patience());
                (request.write.is_none().then(|| done.value & value_mask(request.bytes)), done)
            }
        };
        if done.waits {
            let due = begun.due.or_else(|| Some(Instant::now() + VF_LIMIT));
            self.waiting.insert(vcpu, Begun { due, ..begun });
            return Turn::Idle;
        }
        let Done { known, demand, attachment, trouble, .. } = done;
        // The guest goes on when its BAR is there.
        if finish_placing(roster) {
            return Turn::Stopped;
        }
        wire::put_answer(self.server.page(), vcpu, data);
        if let Err(error) = self.server.notify(vcpu) {
            warn!("domain {}: {error}", roster.domain);
        }
        let took = begun.taken.map(|taken| taken.elapsed());
        // A BAR that has moved concerns the guest's other functions, too: what fails for them fails for this request.
        let troubles = roster.functions.values_mut().filter_map(|function| function.take_trouble());
        let troubles: Vec<String> = troubles.chain(trouble).collect();
        let trouble = (!troubles.is_empty()).then(|| troubles.join("; "));
        roster.counters.answered(!known || trouble.is_some(), took);
        if !known || trouble.is_some() {
            complain(roster, request, trouble);
        }
        roster.tell(demand, attachment);
        Turn::Busy
    }

    fn execute(&mut self, roster: &mut Roster, request: &IoRequest, patience: Patience) -> Done {
        if request.bytes == 0 {
            return Done::nonsense();
        }
        match request.place {
            Place::Config { function, offset } => {
                let bytes = wire::reached_by_ports(offset, request.bytes);
                // Where there is no function of ours, nothing answers: Xen sends what is the device model's to that.
                let done = self.config(roster, function, offset, bytes, request.write, patience);
                done.unwrap_or(Done::value(u64::MAX))
            }
            Place::Memory { address } => match address.checked_sub(ECAM_BASE) {
                Some(at) if at < ECAM_BYTES => {
                    let (devfn, offset) = (Devfn((at >> 12) as u8), at as u16 & 0xfff);
                    let done = self.config(roster, devfn, offset, request.bytes, request.write, patience);
                    done.unwrap_or_else(|| {
                        let (value, trouble) =
                            self.emulated.access(devfn, offset, request.bytes, request.write);
                        Done { trouble, ..Done::value(value) }
                    })
                }
                _ => Done::value(access_memory(roster, address, request.bytes, request.write)),
            },
            Place::Port { port } => {
                let (value, resets) = self.ports.access(port, request.bytes, request.write);
                if resets {
                    (roster.report)(ServerReport::RestartWanted);
                }
                Done::value(value)
            }
            Place::Items { .. } | Place::Other => Done::nonsense(),
        }
    }

    /// Config space of a function of ours, or of a VF that the guest has created, if there is one.
    fn config(
        &mut self,
        roster: &mut Roster,
        devfn: Devfn,
        offset: u16,
        bytes: u8,
        write: Option<u64>,
        patience: Patience,
    ) -> Option<Done> {
        // A guest that looks for devices reads these first (PCI 3.0, section 6.1). What it has ejected is not there, also before the service
        // has seen that.
        if offset < 4 && write.is_none() && self.emulated.has_ejected(devfn.device()) {
            return Some(Done::value(u64::MAX));
        }
        let Some(function) = roster.functions.get_mut(&devfn) else {
            return of_vf(roster, devfn, offset, bytes, write, patience);
        };
        let attachment = Some(function.attachment());
        let (value, demand) = match write {
            None => config_read(function, offset, bytes),
            Some(value) => {
                let before = self.taken.addresses.released();
                let demand = config_write(function, offset, bytes, value);
                if self.taken.addresses.released() != before {
                    place_others(roster);
                }
                (value, demand)
            }
        };
        Some(Done { demand, attachment, ..Done::value(value) })
    }
}

/// A VF that the guest has created. Writes of it change nothing.
fn of_vf(
    roster: &Roster,
    devfn: Devfn,
    offset: u16,
    bytes: u8,
    write: Option<u64>,
    patience: Patience,
) -> Option<Done> {
    let pf = roster.pf_of_vf(devfn.0.into())?;
    let mut value = write.unwrap_or(u64::MAX);
    for (access, distance) in wire::pieces(offset, bytes).filter(|_| write.is_none()) {
        let Some(piece) = pf.read_vf(access, patience) else { return Some(Done::waits()) };
        value = with_piece(value, access.width(), distance, piece);
    }
    Some(Done::value(value))
}

/// Reads config space as a request of any alignment does; `bytes` of it, at most four.
fn config_read(function: &mut GuestFunction, offset: u16, bytes: u8) -> (u64, Option<Demand>) {
    let (mut value, mut demand) = (u64::MAX, None);
    for (access, distance) in wire::pieces(offset, bytes) {
        let piece = function.read_config(access);
        value = with_piece(value, access.width(), distance, piece.value);
        demand = demand.or(piece.demand);
    }
    (value, demand)
}

/// Writes config space likewise.
fn config_write(function: &mut GuestFunction, offset: u16, bytes: u8, value: u64) -> Option<Demand> {
    let mut demand = None;
    for (access, distance) in wire::pieces(offset, bytes) {
        let piece = (value >> (8 * u32::from(distance))) as u32;
        demand = demand.or(function.write_config(access, piece).demand);
    }
    demand
}

/// A value with some of its bytes replaced.
fn with_piece(value: u64, width: Width, distance: u8, piece: u32) -> u64 {
    let shift = 8 * u32::from(distance);
    let mask = u64::from(width.mask()) << shift;
    value & !mask | (u64::from(piece) << shift & mask)
}

/// Obeys the orders for which the mapping of BARs has paused, and maps the rest; `true`: the thread is to stop.
fn finish_placing(roster: &mut Roster) -> bool {
    while roster.is_interrupted() {
        if roster.take_orders() {
            return true;
        }
        place_others(roster);
    }
    false
}

/// A place has become free, for which another BAR may wait, or mapping one goes on.
fn place_others(roster: &mut Roster) {
    for function in roster.functions.values_mut() {
        if let Err(error) = function.device().place_bars(function) {
            function.note_trouble(&error);
        }
    }
}

/// What a string instruction reads, in the order of addresses. Of config space, it reads all ones.
fn items(roster: &mut Roster, address: u64, (count, bytes): (u16, u8), down: bool) -> Vec<u8> {
    let mut items = Vec::with_capacity(usize::from(count) * usize::from(bytes));
    let lowest = if down { address.wrapping_sub(distance(count - 1, bytes)) } else { address };
    for index in 0..count {
        let value = access_memory(roster, lowest.wrapping_add(distance(index, bytes)), bytes, None);
        items.extend(&value.to_le_bytes()[..usize::from(bytes)]);
    }
    items
}

/// How far apart items of a string are.
fn distance(items: u16, bytes: u8) -> u64 {
    u64::from(items) * u64::from(bytes)
}

/// Memory of a BAR. Where there is none nothing answers: it may have moved while the request was on its way.
fn access_memory(roster: &mut Roster, address: u64, bytes: u8, write: Option<u64>) -> u64 {
    let mut functions = roster.functions.values_mut();
    let value =
        functions.find_map(|function| function.device().access_memory(function, address, bytes, write));
    value.unwrap_or(u64::MAX)
}

fn complain(roster: &Roster, request: &IoRequest, trouble: Option<String>) {
    if let Some(unsaid) = roster.counters.may_complain() {
        let trouble = trouble.unwrap_or_else(|| "it is invalid, or a string instruction".to_owned());
        warn!(
            "domain {}: {request:x?}: {trouble}; {unsaid} more of its requests failed since the last such line",
            roster.domain
        );
    }
}

fn value_mask(bytes: u8) -> u64 {
    match bytes {
        0 | 8 => u64::MAX,
        bytes => (1 << (8 * u32::from(bytes))) - 1,
    }
}
