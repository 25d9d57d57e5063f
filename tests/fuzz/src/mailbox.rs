//! Any writes of the guests on both sides of a mailbox, services that are killed between them, and owners that change.

use std::sync::{Arc, OnceLock};

use pciback::config::{
    Filter, FunctionKind, FunctionSpec, ImageOwner, MailboxPeers, MailboxWish, Policy, Rule,
};
use pciback::mailbox::{MAILBOX_BYTES, QUEUE_LENGTH, VENDOR, mailbox_memory};
use pciback::memory::Words;
use pciback::platform::SharedMemory;
use pciback::serve::pv::wire::{Command, MSIX_ENTRIES, MsixEntry, Op};
use pciback::serve::{FunctionMailbox, GuestFunction, Mailboxes};
use pciback::spec::doe;
use pciback::{DomId, Sbdf, dump};

use crate::hypervisor::Counting;
use crate::space::{self, DOMAIN, Hardware};

const PF: &str = include_str!("../../../pciback/tests/dumps/qemu-igb.txt");
const VF: &str = include_str!("../../../pciback/tests/dumps/qemu-igbvf.txt");
const PEERS: MailboxPeers = MailboxPeers { guest: true, dom0: true };
const SEND: u32 = VENDOR as u32 | 1 << 16;
const RECEIVE: u32 = VENDOR as u32 | 2 << 16;
/// Words that objects and registers are made of.
const WORDS: [u32; 16] =
    [0, 1, 2, 3, 4, 5, 6, 7, SEND, RECEIVE, 256, 257, doe::GO, doe::ABORT, u32::MAX, 0x4_0002];

struct Device {
    spec: FunctionSpec,
    filter: Arc<Filter>,
}

/// The PF, and its VF.
fn devices() -> &'static [Device; 2] {
    static BOTH: OnceLock<[Device; 2]> = OnceLock::new();
    BOTH.get_or_init(|| {
        let bytes = |text: &str| dump::parse(text).expect("a dump").remove(0).bytes;
        let address = Sbdf::from_devfn(0, 1, 0);
        let kind = FunctionKind::Virtual { physical_function: address, pf_bytes: bytes(PF), index: 0 };
        [
            FunctionSpec { address, ..space::function(&bytes(PF)) },
            FunctionSpec { address: Sbdf::from_devfn(0, 1, 0x80), kind, ..space::function(&bytes(VF)) },
        ]
        .map(|spec| {
            let rule = Rule::built_in("a test", "xpci");
            let policy = Policy { mailbox: Some(MailboxWish { peers: PEERS, rule }), ..Policy::default() };
            let filter = Arc::new(Filter::compile(&spec, &policy).expect("a function for a guest"));
            assert!(filter.mailbox().is_some());
            Device { spec, filter }
        })
    })
}

struct Side {
    device: &'static Device,
    words: Words,
    function: GuestFunction,
}

impl Side {
    fn new(all: &Mailboxes, device: &'static Device) -> Self {
        let memory = SharedMemory::anonymous(MAILBOX_BYTES).expect("memory");
        let owner = ImageOwner { boot: 1, domain: DOMAIN };
        let words = mailbox_memory(memory, owner, device.spec.address, Some(u32::MAX)).expect("a new one");
        let function = GuestFunction::new(
            DOMAIN,
            device.spec.address,
            space::create(&device.spec, Arc::clone(&device.filter)),
            Box::new(Hardware::new(&device.spec.bytes)),
            Arc::new(Counting::default()),
            11,
        );
        let mut side = Self { device, words, function };
        side.open(all);
        side
    }

    /// As a service does that takes over from a killed one.
    fn open(&mut self, all: &Mailboxes) {
        let mailbox = FunctionMailbox::open(all, &self.device.spec, DOMAIN, PEERS, &self.words);
        self.function.set_mailbox(mailbox);
    }

    fn access(&mut self, command: Command, register: u16, size: u32, value: u32) -> u32 {
        let offset = self.device.filter.mailbox().expect("a mailbox").offset + register;
        let entries = [MsixEntry::default(); MSIX_ENTRIES];
        let op =
            Op { command, domain: 0, bus: 0, devfn: 0, offset: offset.into(), size, value, info: 0, entries };
        let (answer, _) = self.function.execute(&op);
        self.function.sent(&op);
        answer.value
    }

    fn read(&mut self, register: u16) -> u32 {
        self.access(Command::CONF_READ, register, 4, 0)
    }

    fn write(&mut self, register: u16, value: u32) {
        self.access(Command::CONF_WRITE, register, 4, value);
    }
}

/// Two bytes each are a step of one side.
pub fn mailbox(data: &[u8]) {
    let all = Mailboxes::default();
    let pf = devices()[0].spec.address;
    let mut sides = devices().each_ref().map(|device| Side::new(&all, device));
    all.settle(pf, Some(DOMAIN));
    for step in data.chunks_exact(2).take(2000) {
        let side = &mut sides[usize::from(step[0] & 1)];
        let word = WORDS[usize::from(step[1] & 15)];
        match step[0] >> 1 & 15 {
            0..=5 => side.write(doe::WRITE_DATA, word),
            6..=8 => side.write(doe::CONTROL, doe::GO),
            9..=11 => side.write(doe::READ_DATA, word),
            12 => side.write(u16::from(step[1] & 0x1c).min(0x14), word),
            13 => drop(side.access(
                Command::CONF_WRITE,
                u16::from(step[1] & 0x17),
                1 + u32::from(step[1] >> 5),
                word,
            )),
            14 => side.open(&all),
            _ => all.settle(pf, [Some(DOMAIN), None, Some(DomId(9))][usize::from(step[1] % 3)]),
        }
        let status = side.read(doe::STATUS);
        assert!(matches!(status, 0 | doe::READY | doe::ERROR), "DOE Status is {status:#x}");
        assert!(status == doe::READY || side.read(doe::READ_DATA) == 0, "data without an object");
    }
    for (_, waiting) in all.rung() {
        assert!(waiting <= QUEUE_LENGTH, "{waiting} messages wait");
    }
    // Whatever came before, an abort leads to a mailbox that answers.
    for side in &mut sides {
        side.write(doe::CONTROL, doe::ABORT);
        [1, 3, 0].into_iter().for_each(|word| side.write(doe::WRITE_DATA, word));
        side.write(doe::CONTROL, doe::GO);
        let mut response = Vec::new();
        while side.read(doe::STATUS) == doe::READY {
            response.push(side.read(doe::READ_DATA));
            side.write(doe::READ_DATA, 0);
        }
        assert_eq!(response, [1, 3, 0x0100_0001]);
    }
}
