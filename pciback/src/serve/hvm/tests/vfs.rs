//! Reads of VFs that the host is creating, and what the thread does meanwhile.

use super::*;
use crate::abi::ioreq::xen::{config_of, memory};
use crate::serve::VfRequests;
use crate::serve::hvm::ECAM_BASE;
use crate::serve::test_machine::SRIOV;
use crate::spec::{header, sriov};

const FIRST: Devfn = Devfn(DEVFN.0 + 1);

impl Guest {
    fn answer(&self, vcpu: u16) -> u64 {
        loop {
            if let Some(value) = xen::take_answer(&self.page.0, vcpu) {
                return value;
            }
            std::thread::yield_now();
        }
    }

    fn set(&self, register: u16, value: u64) {
        let address = ECAM_BASE + (u64::from(DEVFN.0) << 12) + u64::from(SRIOV + register);
        self.ask(0, &memory(address, 2, Some(value)));
        self.answer(0);
    }
}

/// A guest that has enabled two VFs, and whose first vCPU reads the header type of the first one, and what the engine answers it by.
fn reading() -> (Guest, Server, VfRequests) {
    let function = Machine::new().open_pf(ADDRESS);
    let requests = function.vf_requests().unwrap();
    let (guest, server) = begin_with(function, |function| function.space.show_own_number(DEVFN));
    guest.set(sriov::NUM_VFS, 2);
    guest.set(sriov::CONTROL, sriov::VF_ENABLE.into());
    guest.ask(0, &config_of(FIRST, header::HEADER_TYPE, 1, None));
    (guest, server, requests)
}

#[test]
fn other_vcpus_are_answered_while_one_reads_a_vf_that_the_host_is_creating() {
    let (guest, server, requests) = reading();
    guest.ask(1, &config(SLOT, header::VENDOR_ID, 2, None));
    assert_eq!(guest.answer(1) as u16, 0x8086);
    assert!(!guest.is_answered());
    let (number, wanted) = requests.take();
    assert_eq!(wanted, 2);
    requests.answer(number, true);
    // Nothing else wakes the thread.
    assert_eq!(guest.answer(0) & 0xff, 0);
    server.stop().unwrap();
}

#[test]
fn a_read_of_a_vf_is_left_to_the_next_thread() {
    let (guest, server, requests) = reading();
    let functions = server.stop().unwrap();
    assert!(!guest.is_answered());
    let server = guest.serve(functions);
    requests.answer(requests.take().0, true);
    assert_eq!(guest.answer(0) & 0xff, 0);
    server.stop().unwrap();
}

#[test]
fn a_guest_that_loses_the_pf_meanwhile_reads_all_ones() {
    let (guest, server, _requests) = reading();
    server.take(DEVFN).unwrap().unwrap().quiesced.unwrap();
    assert_eq!(guest.answer(0) & 0xff, 0xff);
    server.stop().unwrap();
}
