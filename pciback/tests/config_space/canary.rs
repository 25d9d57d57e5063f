//! The sign by which a reset is verified.

use pciback::live::Canary;

use crate::devices;

/// Message Control of MSI-X.
const CONTROL: u16 = 0x72;

#[test]
fn xen_sees_the_sign_being_taken_back_though_the_reset_has_cleared_it() {
    let mut hardware = devices::network_pf().hardware;
    let canary = Canary::set(&hardware).unwrap().unwrap();
    assert!(!canary.is_cleared(&hardware).unwrap());
    hardware.put16(CONTROL.into(), 9);
    assert!(canary.is_cleared(&hardware).unwrap());
    hardware.take_seen();
    canary.remove(&hardware).unwrap();
    let writes = hardware.take_seen().into_iter().filter(|seen| seen.write);
    assert_eq!(writes.map(|seen| seen.offset).collect::<Vec<_>>(), [CONTROL]);
}
