//! Damaged files of a function that a guest has: its image, its mailbox.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::Ordering::Relaxed;

use pciback::config::{
    CapabilityList, Filter, FunctionImage, FunctionSpec, ImageOwner, MailboxPeers, MailboxWish, Policy, Rule,
    VirtualConfigSpace,
};
use pciback::mailbox::{MAILBOX_BYTES, mailbox_memory};
use pciback::memory::SharedWords;
use pciback::platform::{BarMemory, HvmDomains, IoreqServer, ServerId, SharedMemory};
use pciback::serve::hvm::wire::xen;
use pciback::serve::hvm::{ConfigPorts, Connection, Device, Unthreaded, trapped_bars};
use pciback::serve::pv::wire::{Command, MSIX_ENTRIES, MsixEntry, Op};
use pciback::serve::{FunctionMailbox, GuestFunction, Mailboxes};
use pciback::spec::{CapabilityId, doe};
use pciback::{DeviceNumber, DomId, Sbdf, dump};

use crate::byhand;
use crate::hvm::{Memory, Model, Page, Xen};
use crate::hypervisor::Counting;
use crate::space::{self, DOMAIN, Hardware, Kept};

const FUNCTION: &str = include_str!("../../../pciback/tests/dumps/qemu-igb.txt");
const PEERS: MailboxPeers = MailboxPeers { guest: true, dom0: true };
const SLOT: DeviceNumber = DeviceNumber::LAST;

struct Function {
    spec: FunctionSpec,
    filter: Arc<Filter>,
    guarded: Vec<u8>,
    /// The offset of MSI-X.
    msix: u16,
}

/// With a mailbox, and without one as an HVM guest has it.
fn functions() -> &'static [Function; 2] {
    static BOTH: OnceLock<[Function; 2]> = OnceLock::new();
    BOTH.get_or_init(|| {
        [true, false].map(|mailbox| {
            let mut spec = space::function(&dump::parse(FUNCTION).expect("a dump").remove(0).bytes);
            spec.address = Sbdf::from_devfn(0, 1, 0);
            space::place_bars(&mut spec);
            let rule = Rule::built_in("a test", "xpci");
            let wish = mailbox.then_some(MailboxWish { peers: PEERS, rule });
            let policy = Policy { mailbox: wish, ..Policy::default() };
            let filter = Arc::new(Filter::compile(&spec, &policy).expect("a function for a guest"));
            let list = CapabilityList::walk(&spec.bytes);
            let msix = list.legacy(CapabilityId(0x11)).expect("MSI-X").offset;
            let mut guarded = byhand::guarded_well_formed(&spec.bytes);
            guarded[4] &= !0x03;
            guarded[5] &= !0x04;
            guarded[0x30..0x34].fill(0);
            for control in [0x05, 0x11].map(|id| list.legacy(CapabilityId(id)).map(|found| found.offset)) {
                let control = usize::from(control.expect("both"));
                guarded[control + 2..control + 4].fill(0);
                // MSI's mask, with a message of 64 bits.
                guarded[control + 0x10..control + 0x14].fill(0);
            }
            Function { spec, filter, guarded, msix }
        })
    })
}

/// The first byte chooses the file and the kind of guest; each six more are a word of the file and what it is. The rest of the input is
/// what the guest does then.
pub fn image(data: &[u8]) {
    let [choice, count, rest @ ..] = data else { return };
    let (damage, requests) = rest.split_at(rest.len().min(6 * usize::from(count & 0x1f)));
    if choice & 3 == 3 {
        mailbox(damage, requests)
    } else {
        function(choice & 1 != 0, *choice, damage, requests)
    }
}

fn spoil(words: &Kept, damage: &[u8]) {
    for damage in damage.chunks_exact(6) {
        let at = usize::from(u16::from_le_bytes([damage[0], damage[1]]));
        let value = u32::from_le_bytes([damage[2], damage[3], damage[4], damage[5]]);
        let words = words.words();
        // The headers are small, and most of what matters is there.
        let at = if at & 0x8000 != 0 { at & 0x7f } else { at % words.len() };
        words[at].store(value, Relaxed);
    }
}

/// A guest, and the words that its functions' files hold.
fn function(hvm: bool, choice: u8, damage: &[u8], requests: &[u8]) {
    let function = &functions()[usize::from(hvm)];
    let Function { spec, filter, guarded, .. } = function;
    let bytes = if hvm { FunctionImage::HVM_BYTES } else { FunctionImage::BYTES };
    // A file that was made for the other kind of guest, or cut.
    let words = Kept::new(if choice & 4 != 0 { 4096 * usize::from(choice >> 3) } else { bytes });
    let hardware = Hardware::new(&spec.bytes);
    let hypervisor = Arc::new(Counting::default());
    let created = VirtualConfigSpace::create(spec, Arc::clone(filter), words.image());
    let Ok(space) = created else {
        assert!(words.words().len() * 4 < FunctionImage::BYTES);
        return;
    };
    let memory: BTreeMap<u8, Memory> =
        space.bars().iter().map(|bar| (bar.index, Memory::new(&space, bar))).collect();
    let xen = Arc::new(Xen::new(&hypervisor, [(spec, &space)].into_iter()));
    let guest = Guest { function, hvm, hardware, hypervisor, xen, memory, page: Page::new() };
    let (mut server, _) = guest.serve(space, false);
    guest.begin(&mut server);
    drop(server);
    spoil(&words, damage);
    guest.xen.forgive();
    guest.hypervisor.forgive();
    let before = guest.hardware.with(|state| state.bytes.clone());
    let resumed = VirtualConfigSpace::resume(spec, Arc::clone(filter), words.image(), &guest.hardware);
    let space = match resumed {
        Ok(space) => space,
        Err(error) => {
            let text = error.to_string();
            assert!(text.len() < 300 && !text.contains(char::is_control), "{text:?}");
            // Nothing was done.
            assert_eq!(guest.hardware.with(|state| state.bytes.clone()), before);
            return;
        }
    };
    let (mut server, entered) = guest.serve(space, true);
    for request in requests.chunks_exact(8).take(20) {
        guest.ask(&mut server, request);
    }
    if let Some(mut function) = server.stop() {
        // What is noted wrongly may be refused; it is tried to the end all the same.
        let quiesced = function.quiesce();
        assert!(!entered || quiesced.is_ok() || !damage.is_empty(), "{quiesced:?}");
    }
    guest.hardware.with(|state| {
        for (at, guarded) in guarded.iter().enumerate() {
            let changed = (state.bytes[at] ^ spec.bytes[at]) & guarded;
            assert_eq!(changed, 0, "guarded bits {changed:#x} at {at:#x} were written");
        }
    });
}

struct Guest {
    function: &'static Function,
    hvm: bool,
    hardware: Hardware,
    hypervisor: Arc<Counting>,
    xen: Arc<Xen>,
    memory: BTreeMap<u8, Memory>,
    page: Page,
}

/// Who serves it.
enum Server {
    Pv(Box<GuestFunction>),
    Hvm(Unthreaded),
}

impl Server {
    fn stop(self) -> Option<Box<GuestFunction>> {
        match self {
            Self::Pv(function) => Some(function),
            Self::Hvm(server) => server.stop().into_values().next(),
        }
    }
}

impl Guest {
    /// Serves it, and says whether all was as it should be at the beginning.
    fn serve(&self, space: VirtualConfigSpace, again: bool) -> (Server, bool) {
        let address = self.function.spec.address;
        let (hardware, hypervisor) = (Box::new(self.hardware.clone()), Arc::clone(&self.hypervisor));
        let mut function = Box::new(GuestFunction::new(DOMAIN, address, space, hardware, hypervisor, 11));
        let kept = function.keep_hardware().is_ok();
        if !self.hvm {
            return (Server::Pv(function), kept);
        }
        let trapped = trapped_bars(&function).into_iter();
        let memory: BTreeMap<u8, Box<dyn BarMemory>> =
            trapped.map(|bar| (bar, Box::new(self.memory[&bar].clone()) as _)).collect();
        let (domains, taken) = (Arc::clone(&self.xen) as Arc<dyn HvmDomains>, Arc::default());
        let device = Device::new(Arc::clone(&domains), ServerId(1), SLOT, Arc::clone(&taken), memory);
        let entered = device.enter(&mut function, again).is_ok();
        let ports = ConfigPorts::new(SharedMemory::anonymous(ConfigPorts::BYTES).expect("memory"));
        let server = Box::new(self.page.clone());
        let models = Model::new();
        let connection = Connection { server, ports, taken, domains, models, shared: false };
        let functions = BTreeMap::from([(SLOT.devfn(), function)]);
        (Server::Hvm(Unthreaded::start(DOMAIN, connection, functions, Box::new(drop))), kept && entered)
    }

    /// What a guest's driver does first.
    fn begin(&self, server: &mut Server) {
        let msix = self.function.msix;
        match server {
            Server::Pv(function) => {
                let mut op = op(Command::ENABLE_MSIX, 0, 0, 2);
                op.entries[1].entry = 3;
                function.execute(&op);
            }
            Server::Hvm(_) => {
                for (index, place) in
                    [0xf300_0000u32, 0xf301_0000, 0xc100, 0xf302_0000].into_iter().enumerate()
                {
                    self.request(server, &xen::config(SLOT.get(), 0x10 + 4 * index as u16, 4, Some(place)));
                }
                for (offset, value) in [(4, 3), (msix + 2, 0x8000)] {
                    self.request(server, &xen::config(SLOT.get(), offset, 2, Some(value)));
                }
                for (word, value) in [(0, 0xfee0_0000), (1, 0), (2, 0x41), (3, 0)] {
                    self.request(server, &xen::memory(0xf302_0000 + 4 * word, 4, Some(value)));
                }
            }
        }
    }

    fn request(&self, server: &mut Server, access: &xen::Access) {
        let Server::Hvm(server) = server else { return };
        xen::put_request(self.page.page(), 0, access);
        server.serve();
        assert!(xen::take_answer(self.page.page(), 0).is_some(), "{access:x?} is not answered");
    }

    fn ask(&self, server: &mut Server, request: &[u8]) {
        let offset = u16::from_le_bytes([request[2], request[3]]);
        let value = u32::from_le_bytes([request[4], request[5], request[6], request[7]]);
        let write = (request[0] & 1 != 0).then_some(value);
        match server {
            Server::Pv(function) => {
                let command = Command(u32::from(request[0] % 6));
                let mut op = op(command, offset.into(), u32::from(request[1] & 7), value & 0x7f);
                op.entries[0].entry = offset;
                function.execute(&op);
                function.sent(&op);
            }
            Server::Hvm(_) if request[1] & 0x80 != 0 => {
                let place = 0xf300_0000 + u64::from(request[1] & 3) * 0x1_0000;
                self.request(server, &xen::memory(place + u64::from(offset), 4, write.map(u64::from)));
            }
            Server::Hvm(_) => self.request(server, &xen::config(SLOT.get(), offset & 0xfff, 4, write)),
        }
    }
}

fn op(command: Command, offset: u32, size: u32, value: u32) -> Op {
    let entries = [MsixEntry::default(); MSIX_ENTRIES];
    Op { command, domain: 0, bus: 0, devfn: 0, offset, size, value, info: 1, entries }
}

/// The file of a mailbox.
fn mailbox(damage: &[u8], requests: &[u8]) {
    let Function { spec, filter, .. } = &functions()[0];
    let owner = ImageOwner { boot: 1, domain: DOMAIN };
    let kept = Kept::new(MAILBOX_BYTES);
    mailbox_memory(kept.clone(), owner, spec.address, Some(u32::MAX)).expect("a new one");
    spoil(&kept, damage);
    let words = match mailbox_memory(kept, owner, spec.address, None) {
        Ok(words) => words,
        Err(error) => {
            assert!(error.to_string().len() < 200);
            return;
        }
    };
    let all = Mailboxes::default();
    let hardware = Hardware::new(&spec.bytes);
    let space = space::create(spec, Arc::clone(filter));
    let (boxed, hypervisor) = (Box::new(hardware), Arc::new(Counting::default()));
    let mut function = GuestFunction::new(DOMAIN, spec.address, space, boxed, hypervisor, 0);
    function.set_mailbox(FunctionMailbox::open(&all, spec, DOMAIN, PEERS, &words));
    all.settle(spec.address, Some(DOMAIN));
    let offset = filter.mailbox().expect("a mailbox").offset;
    for request in requests.chunks_exact(6).take(200) {
        let value = u32::from_le_bytes([request[2], request[3], request[4], request[5]]);
        let register = u16::from(request[0] & 0x1c).min(0x14);
        let command = if request[1] & 1 == 0 { Command::CONF_WRITE } else { Command::CONF_READ };
        let op = op(command, u32::from(offset + register), 4, value);
        function.execute(&op);
        function.sent(&op);
        if request[1] & 0x80 != 0 {
            all.settle(spec.address, [Some(DOMAIN), None, Some(DomId(9))][usize::from(request[1] >> 1) % 3]);
        }
    }
    let status = function.execute(&op(Command::CONF_READ, u32::from(offset + doe::STATUS), 4, 0)).0;
    assert!(matches!(status.value, 0 | doe::READY | doe::ERROR), "DOE Status is {:#x}", status.value);
}
