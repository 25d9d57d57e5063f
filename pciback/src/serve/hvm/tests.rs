//! Mapping a BAR of gigabytes, and orders that come meanwhile.

mod vfs;

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::Device;
use super::frames::AT_ONCE;
use super::requests::{Connection, start};
use super::{ConfigPorts, Taken, wire};
use crate::abi::ioreq::xen::{self, config};
use crate::config::Access;
use crate::platform::{
    Cause, DeviceModels, Edit, HvmDomains, IoreqServer, MsiMessage, PAGE, Pirq, PlatformError, Result,
    ServerId, SharedMemory,
};
use crate::serve::revocation::Revocation;
use crate::serve::test_machine::{DOMAIN, Machine};
use crate::serve::{Counters, GuestFunction, Server};
use crate::{Devfn, DeviceNumber, DomId, Sbdf};

const ADDRESS: Sbdf = Sbdf::from_devfn(0, 1, 0x10);
const OTHER: Sbdf = Sbdf::from_devfn(0, 1, 0x11);
const SLOT: u8 = 9;
const DEVFN: Devfn = Devfn(SLOT << 3);
const BYTES: u64 = 4 << 30;
/// But for two with the MSI-X table and its pending bits, which are behind two others.
const FRAMES: u64 = BYTES / PAGE - 2;
const PARTS: usize = 1 + (FRAMES - 2).div_ceil(AT_ONCE) as usize;
/// Where the guest places the BAR.
const PLACE: u64 = 0x10_0000_0000;
const COMMAND: u16 = 4;

/// What is done when memory is mapped, with the number of calls so far.
type Hook = Box<dyn FnMut(usize) + Send>;

/// What Xen has mapped: the guest's page frames, runs by their first one, and the calls that mapped.
#[derive(Default)]
struct Xen {
    mapped: Mutex<BTreeMap<u64, u64>>,
    calls: Mutex<Vec<u64>>,
    hook: Mutex<Option<Hook>>,
}

impl Xen {
    fn frames(&self) -> u64 {
        self.mapped.lock().unwrap().values().sum()
    }

    fn calls(&self) -> Vec<u64> {
        self.calls.lock().unwrap().clone()
    }
}

impl HvmDomains for Xen {
    fn servers(&self, _: DomId) -> Result<Vec<ServerId>> {
        Ok(Vec::new())
    }
    fn create_server(&self, _: DomId) -> Result<ServerId> {
        Ok(ServerId(1))
    }
    fn destroy_server(&self, _: DomId, _: ServerId) -> Result<()> {
        Ok(())
    }
    fn connect(&self, domain: DomId, _: ServerId) -> Result<Box<dyn IoreqServer>> {
        Err(PlatformError::new("connect to", domain, nix::errno::Errno::ENOSYS))
    }
    fn claim_function(&self, _: DomId, _: ServerId, _: Devfn, _: Edit) -> Result<()> {
        Ok(())
    }
    fn claim_memory(&self, _: DomId, _: ServerId, _: u64, _: u64, _: Edit) -> Result<()> {
        Ok(())
    }
    fn claim_ports(&self, _: DomId, _: ServerId, _: u16, _: u16, _: Edit) -> Result<()> {
        Ok(())
    }
    fn restart(&self, _: DomId) -> Result<()> {
        Ok(())
    }
    fn map_memory(&self, _: DomId, guest: u64, _: u64, frames: u64, edit: Edit) -> Result<()> {
        if edit == Edit::Remove {
            self.mapped.lock().unwrap().remove(&guest);
            return Ok(());
        }
        self.mapped.lock().unwrap().insert(guest, frames);
        self.calls.lock().unwrap().push(guest);
        let count = self.calls().len();
        if let Some(hook) = self.hook.lock().unwrap().as_mut() {
            hook(count);
        }
        Ok(())
    }
    fn map_ports(&self, _: DomId, _: u32, _: u32, _: u32, _: Edit) -> Result<()> {
        Ok(())
    }
    fn bind_msi(&self, _: DomId, _: Pirq, _: MsiMessage, _: u64, _: bool) -> Result<()> {
        Ok(())
    }
    fn unbind_msi(&self, _: DomId, _: Pirq) -> Result<()> {
        Ok(())
    }
    fn is_mapped(&self, _: DomId, _: Pirq) -> Result<bool> {
        Ok(false)
    }
    fn bind_line(&self, _: DomId, _: Pirq, _: DeviceNumber, _: u8, _: Edit) -> Result<()> {
        Ok(())
    }
}

/// The page of requests, which threads of the service come and go for.
#[derive(Clone)]
struct Page(Arc<SharedMemory>, Arc<EventFd>);

impl IoreqServer for Page {
    fn page(&self) -> &SharedMemory {
        &self.0
    }
    fn event_fd(&self) -> BorrowedFd<'_> {
        self.1.as_fd()
    }
    fn take_event(&self) -> Result<Option<u16>> {
        Ok(self.1.read().ok().map(|_| 0))
    }
    fn write_memory(&self, _: u64, _: &[u8]) -> Result<()> {
        Ok(())
    }
    fn bind_vcpus(&mut self) -> Result<()> {
        Ok(())
    }
    fn notify(&self, _: u16) -> Result<()> {
        Ok(())
    }
}

/// Nothing listens where the device model would; the guest may have ejected all that it was given.
#[derive(Default)]
struct NoModels {
    ejected: AtomicBool,
}

fn no_model<T>(domain: DomId) -> Result<T> {
    Err(PlatformError::new("ask the device model of", domain, Cause::Missing))
}

impl DeviceModels for NoModels {
    fn slots(&self, domain: DomId) -> Result<Vec<DeviceNumber>> {
        no_model(domain)
    }
    fn announce(&self, domain: DomId, _: DeviceNumber) -> Result<()> {
        no_model(domain)
    }
    fn request_eject(&self, domain: DomId, _: DeviceNumber, _: Duration) -> Result<bool> {
        no_model(domain)
    }
    fn has_ejected(&self, _: DomId, _: DeviceNumber, _: Duration) -> Result<bool> {
        Ok(self.ejected.load(Ordering::SeqCst))
    }
    fn forget(&self, _: DomId, _: DeviceNumber) {}
    fn eject(&self, domain: DomId, _: DeviceNumber) -> Result<()> {
        no_model(domain)
    }
    fn functions(&self, domain: DomId, _: Duration) -> Result<Vec<Devfn>> {
        no_model(domain)
    }
    fn read_config(&self, domain: DomId, _: Devfn, _: Access, _: Duration) -> Result<u32> {
        no_model(domain)
    }
    fn write_config(&self, domain: DomId, _: Devfn, _: Access, _: u32, _: Duration) -> Result<()> {
        no_model(domain)
    }
}

struct Guest {
    xen: Arc<Xen>,
    models: Arc<NoModels>,
    page: Page,
    revocation: Revocation,
}

/// A guest with a BAR of 4 GiB that is placed and does not decode yet, and the thread that serves it.
fn begin() -> (Guest, Server) {
    begin_with(Machine::new().open_large(ADDRESS, BYTES), |function| {
        for (offset, value) in [(0x10, PLACE as u32), (0x14, (PLACE >> 32) as u32)] {
            let access = Access::new(offset, 4).unwrap();
            assert!(!function.write_config(access, value).failed);
        }
    })
}

/// A guest with a function that something is done with before it is served.
fn begin_with(mut function: Box<GuestFunction>, prepare: impl FnOnce(&mut GuestFunction)) -> (Guest, Server) {
    let xen = Arc::new(Xen::default());
    enter(&xen, &mut function, false);
    prepare(&mut function);
    let memory = SharedMemory::anonymous(wire::PAGE_BYTES).unwrap();
    let event = EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK).unwrap();
    let guest = Guest {
        xen,
        models: Arc::default(),
        page: Page(Arc::new(memory), Arc::new(event)),
        revocation: function.revocation.clone(),
    };
    let server = guest.serve(BTreeMap::new());
    server.add(DEVFN, function);
    (guest, server)
}

fn enter(xen: &Arc<Xen>, function: &mut GuestFunction, again: bool) {
    let domains = Arc::clone(xen) as Arc<dyn HvmDomains>;
    Device::new(domains, ServerId(1), DEVFN.device(), Arc::default(), BTreeMap::new())
        .enter(function, again)
        .unwrap();
}

impl Guest {
    fn serve(&self, functions: BTreeMap<Devfn, Box<GuestFunction>>) -> Server {
        self.serve_with(functions, Arc::default())
    }

    fn serve_with(&self, functions: BTreeMap<Devfn, Box<GuestFunction>>, taken: Arc<Taken>) -> Server {
        let connection = Connection {
            server: Box::new(self.page.clone()),
            ports: ConfigPorts::new(SharedMemory::anonymous(ConfigPorts::BYTES).unwrap()),
            taken,
            domains: Arc::clone(&self.xen) as Arc<dyn HvmDomains>,
            models: Arc::clone(&self.models) as Arc<dyn DeviceModels>,
            shared: false,
        };
        start(DOMAIN, connection, functions, Arc::new(Counters::default()), Box::new(drop)).unwrap()
    }

    /// Switches decoding on, without waiting for the answer.
    fn decode(&self) {
        self.ask(0, &config(SLOT, COMMAND, 2, Some(2)));
    }

    /// A vCPU makes an access, and does not wait for the answer.
    fn ask(&self, vcpu: u16, access: &xen::Access) {
        xen::put_request(&self.page.0, vcpu, access);
        self.page.1.write(1).unwrap();
    }

    fn is_answered(&self) -> bool {
        xen::take_answer(&self.page.0, 0).is_some()
    }

    fn wait_for_answer(&self) {
        while !self.is_answered() {
            std::thread::yield_now();
        }
    }

    /// What the guest reads of its function.
    fn read(&self, offset: u16, bytes: u32) -> u64 {
        self.ask(0, &config(SLOT, offset, bytes, None));
        loop {
            if let Some(answer) = xen::take_answer(&self.page.0, 0) {
                return answer;
            }
            std::thread::yield_now();
        }
    }

    /// When so many parts are mapped, the thread says so and goes on when an order was sent.
    fn order_after(&self, parts: usize) -> mpsc::Receiver<()> {
        let (reached, is_reached) = mpsc::channel();
        let revocation = self.revocation.clone();
        *self.xen.hook.lock().unwrap() = Some(Box::new(move |calls| {
            if calls == parts {
                reached.send(()).unwrap();
                while !revocation.is_interrupted() {
                    std::thread::yield_now();
                }
            }
        }));
        is_reached
    }
}

#[test]
fn a_function_is_taken_in_the_middle_of_mapping_its_bar() {
    let (guest, server) = begin();
    let reached = guest.order_after(3);
    guest.decode();
    reached.recv().unwrap();
    let taken = server.take(DEVFN).unwrap().unwrap();
    taken.quiesced.unwrap();
    assert_eq!((guest.xen.calls().len(), guest.xen.frames()), (3, 0));
    guest.wait_for_answer();
}

#[test]
fn mapping_goes_on_after_an_order_and_the_guest_waits_for_all_of_it() {
    let (guest, server) = begin();
    let reached = guest.order_after(3);
    guest.decode();
    reached.recv().unwrap();
    assert!(!guest.is_answered());
    assert!(server.masked_writes(DEVFN).unwrap().is_some());
    guest.wait_for_answer();
    assert_eq!((guest.xen.calls().len(), guest.xen.frames()), (PARTS, FRAMES));
    server.stop().unwrap();
}

#[test]
fn a_guest_that_looks_for_devices_does_not_find_what_it_has_ejected() {
    let (guest, server) = begin();
    let (id, class) = (guest.read(0, 4), guest.read(8, 4));
    guest.models.ejected.store(true, Ordering::SeqCst);
    // As its reader sees it, by dword, word or byte, before the service has taken the function from the guest.
    assert_eq!(
        [guest.read(0, 4), guest.read(0, 2), guest.read(2, 2), guest.read(0, 1)],
        [u64::from(u32::MAX), 0xffff, 0xffff, 0xff]
    );
    guest.models.ejected.store(false, Ordering::SeqCst);
    assert_eq!((guest.read(0, 4), guest.read(8, 4)), (id, class));
    assert_ne!(id, u64::from(u32::MAX));
    server.stop().unwrap();
}

#[test]
fn the_next_thread_maps_what_is_left_and_nothing_again() {
    let (guest, server) = begin();
    let reached = guest.order_after(3);
    guest.decode();
    reached.recv().unwrap();
    let mut functions = server.stop().unwrap();
    assert!(!guest.is_answered());
    assert_eq!(guest.xen.calls().len(), 3);
    // As the engine does after a restart.
    functions.values_mut().for_each(|function| enter(&guest.xen, function, true));
    assert_eq!(guest.xen.calls().len(), 3, "the engine maps nothing");
    let server = guest.serve(functions);
    guest.wait_for_answer();
    assert_eq!((guest.xen.calls().len(), guest.xen.frames()), (PARTS, FRAMES));
    let mut functions = server.stop().unwrap();
    functions.values_mut().for_each(|function| enter(&guest.xen, function, true));
    let server = guest.serve(functions);
    guest.ask(0, &config(SLOT, 0, 2, None));
    guest.wait_for_answer();
    assert_eq!(guest.xen.calls().len(), PARTS, "what is mapped stays");
    server.stop().unwrap();
}

#[test]
fn a_bar_that_waits_for_a_place_does_not_get_it_from_another_one_by_a_restart() {
    let (guest, server) = begin();
    guest.decode();
    guest.wait_for_answer();
    let enter = |function: &mut GuestFunction, slot: u8, taken: &Arc<Taken>, again| {
        let (domains, slot) = (Arc::clone(&guest.xen) as Arc<dyn HvmDomains>, Devfn(slot << 3).device());
        let device = Device::new(domains, ServerId(1), slot, Arc::clone(taken), BTreeMap::new());
        device.enter(function, again).unwrap();
    };
    let ask = |access| {
        xen::put_request(&guest.page.0, 0, &access);
        guest.page.1.write(1).unwrap();
        guest.wait_for_answer();
    };
    // Another function of the guest, which comes first when a service starts, is placed there, too.
    let (mut functions, mut other) = (server.stop().unwrap(), Machine::new().open_large(OTHER, BYTES));
    let taken = Arc::default();
    enter(functions.get_mut(&DEVFN).unwrap(), SLOT, &taken, true);
    enter(&mut other, SLOT - 1, &taken, false);
    functions.insert(Devfn((SLOT - 1) << 3), other);
    let server = guest.serve_with(functions, taken);
    for (offset, value) in [(0x10, PLACE as u32), (0x14, (PLACE >> 32) as u32), (COMMAND, 2)] {
        ask(config(SLOT - 1, offset, 4, Some(value)));
    }
    assert_eq!(guest.xen.calls().len(), PARTS, "it is mapped over the other one");
    let (mut functions, taken) = (server.stop().unwrap(), Arc::default());
    for (devfn, function) in &mut functions {
        enter(function, devfn.device().get(), &taken, true);
    }
    let server = guest.serve_with(functions, taken);
    ask(config(SLOT, 0, 2, None));
    assert_eq!(guest.xen.calls().len(), PARTS, "it is mapped over the other one by the restart");
    // When the place is free it gets it.
    ask(config(SLOT, COMMAND, 2, Some(0)));
    assert_eq!((guest.xen.calls().len(), guest.xen.frames()), (2 * PARTS, FRAMES));
    server.stop().unwrap();
}
