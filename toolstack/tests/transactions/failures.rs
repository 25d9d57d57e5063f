//! Each operation of the platform fails once: what was done is undone, and the next try works.

use nix::errno::Errno;
use pciback::platform::sim::Owner;
use pciback::{FunctionState, Sbdf};
use toolstack::outcome::ErrorCode;

use crate::frontend::Frontend;
use crate::world::{Service, WEB, World, bdf};

/// A PF has everything: memory, ports, a line, MSI, MSI-X.
fn everything() -> (World, Sbdf) {
    (World::without_vfs(), bdf("01:00.0"))
}

/// Fails the call after `after` good ones and returns whether there was such a call.
fn attach_with_failure(operation: &str, after: u32) -> bool {
    let (world, address) = everything();
    let _frontend = Frontend::load(&world, WEB);
    let service = world.start();
    service.hold(address).unwrap();
    world.fail(operation, None, Errno::EIO, after);
    let why = format!("{operation} failed after {after} calls");
    let outcome = service.attach(WEB, address);
    let injected = world.simulation.pending_failures() == 0;
    world.simulation.forget_failures();
    match outcome {
        Ok(_) => {
            assert_eq!(service.state(address), FunctionState::Attached, "{why}");
            // What is only looked at may be looked at again, and the next ring that the guest offers may do.
            let harmless = ["connect", "function", "read"].contains(&operation);
            assert!(!injected || harmless, "{why}, and attach says that all is well");
            return injected;
        }
        Err(failure) => assert_eq!(failure.code, ErrorCode::Failed, "{why}: {failure}"),
    }
    world.assert_held(&service, address, &why);
    let again = service.attach(WEB, address);
    assert!(again.is_ok(), "{why}, then: {again:?}");
    true
}

/// Lets each of the operation's calls fail, every one up to the eighth, then fewer and fewer.
fn whichever_call_fails(operation: &str) {
    let calls = (0..8).chain((3..16).map(|power| (1 << power) + 1));
    let failed = calls.take_while(|after| attach_with_failure(operation, *after)).count();
    assert!(failed > 0, "attach never calls {operation}: nothing is tested");
}

#[test]
fn a_function_without_an_accepted_reset_is_refused_and_stays_held() {
    let (world, address) = everything();
    let _frontend = Frontend::load(&world, WEB);
    // Linux takes the first of flr, pm and bus.
    let service = world.start_with_resets(&["pm", "bus"]);
    service.hold(address).unwrap();
    let failure = service.attach(WEB, address).unwrap_err();
    assert_eq!(failure.code, ErrorCode::Refused, "{failure}");
    assert!(failure.to_string().contains("Linux offers 'flr' first"), "{failure}");
    world.assert_held(&service, address, "refused");
    service.stop();
    let service = world.start_with_resets(&["flr", "bus"]);
    service.attach(WEB, address).unwrap();
}

/// A test for each operation: they run beside each other, and the name says which.
macro_rules! attach_survives_failures_of {
    ($($operation:ident)*) => {$(
        #[test]
        fn $operation() {
            super::whichever_call_fails(stringify!($operation));
        }
    )*};
}

mod an_attach_is_undone_and_can_be_tried_again_when_it_fails_at {
    attach_survives_failures_of! {
        function ports_above error_handled config config_read config_write reset prepare_msix assign iomem_permission ioport_permission
        map_gsi transaction watch read connect
    }
}

#[test]
fn an_undo_that_fails_quarantines_and_clearing_completes_it() {
    for (operation, after) in
        [("release_msix", 0), ("deassign", 0), ("iomem_permission", 3), ("reset", 1), ("reset", 2)]
    {
        let why = format!("{operation} failed after {after} calls");
        let (world, address) = everything();
        let _frontend = Frontend::load(&world, WEB);
        let service = world.start();
        service.hold(address).unwrap();
        // The last step but one fails, so that all before it have to be undone.
        world.fail("watch", None, Errno::EIO, 0);
        let after = if operation == "reset" { 1 } else { after };
        world.fail(operation, None, Errno::EIO, after);
        let failure = service.attach(WEB, address).unwrap_err();
        assert_eq!(failure.code, ErrorCode::Quarantined, "{why}: {failure}");
        assert_eq!(world.simulation.pending_failures(), 0, "{why}");
        assert_quarantined(&service, address, &why);
        assert!(world.record(address).unwrap().quarantine.is_some(), "{why}");
        drop(service);
        let service = world.start();
        assert_quarantined(&service, address, &format!("{why}, after a restart"));
        service.clear(address).unwrap();
        world.assert_held(&service, address, &why);
        service.attach(WEB, address).unwrap();
    }
}

/// It is reported as quarantined, with the reason, and no guest gets it.
fn assert_quarantined(service: &Service, address: Sbdf, why: &str) {
    let status = service.status();
    assert_eq!(service.state(address), FunctionState::Quarantined, "{why}");
    assert!(
        status.problems.iter().any(|problem| problem.message.contains("quarantined: ")),
        "{why}: {status:?}"
    );
    for refused in [service.attach(WEB, address), service.hold(address), service.release(address)] {
        assert_eq!(refused.unwrap_err().code, ErrorCode::Refused, "{why}");
    }
}

#[test]
fn a_detach_that_fails_quarantines_and_still_undoes_the_other_steps() {
    let operations =
        ["iomem_permission", "ioport_permission", "unmap_gsi", "deassign", "release_msix", "reset"];
    for operation in operations {
        let (world, address) = everything();
        let frontend = Frontend::load(&world, WEB);
        let service = world.start();
        service.hold(address).unwrap();
        service.attach(WEB, address).unwrap();
        assert_eq!(frontend.ask(&crate::frontend::msix_op(0, 3)).0, 0);
        world.fail(operation, None, Errno::EIO, 0);
        let failure = service.detach(WEB, address).unwrap_err();
        assert_eq!(failure.code, ErrorCode::Quarantined, "{operation}: {failure}");
        assert_quarantined(&service, address, operation);
        if operation != "deassign" {
            assert_eq!(world.simulation.owner(address), Some(Owner::Quarantine), "{operation}");
        }
        service.clear(address).unwrap();
        world.assert_held(&service, address, operation);
    }
}

#[test]
fn interrupts_that_cannot_be_switched_off_at_once_are_when_the_function_is_taken() {
    for operation in ["config_write", "unmap_pirq"] {
        let (world, address) = everything();
        let frontend = Frontend::load(&world, WEB);
        let service = world.start();
        service.hold(address).unwrap();
        service.attach(WEB, address).unwrap();
        assert_eq!(frontend.ask(&crate::frontend::msix_op(0, 3)).0, 0);
        // When the frontend closes; then once more before the function is withdrawn.
        world.fail(operation, None, Errno::EIO, 0);
        service.detach(WEB, address).unwrap();
        assert_eq!(world.simulation.pending_failures(), 0, "{operation}");
        world.assert_held(&service, address, operation);
    }
}

#[test]
fn a_hold_that_fails_at_any_call_gives_the_function_back_to_its_driver() {
    let address = bdf("02:00.0");
    let mut failed = 0;
    for operation in
        ["function", "set_driver_override", "unbind", "probe", "device_known", "assignable", "assign"]
    {
        for after in 0..8 {
            let world = World::without_vfs();
            let service = world.start();
            world.fail(operation, Some(address), Errno::EIO, after);
            let outcome = service.hold(address);
            if world.simulation.pending_failures() > 0 {
                assert!(after > 0, "hold never calls {operation}: nothing is tested");
                break;
            }
            if ["function", "device_known", "assignable"].contains(&operation) && outcome.is_ok() {
                // Looked at only for the answer, or to see whether all is in step now.
                continue;
            }
            failed += 1;
            let why = format!("{operation} failed after {after} calls");
            let failure = outcome.expect_err(&why);
            assert_eq!(failure.code, ErrorCode::Failed, "{why}: {failure}");
            world.assert_host(&service, address, Some("virtio-pci"), &why);
            service.hold(address).unwrap();
            world.assert_held(&service, address, &why);
        }
    }
    assert!(failed > 6, "{failed} calls failed");
}

#[test]
fn a_release_that_fails_quarantines_and_can_be_completed() {
    let address = bdf("02:00.0");
    for operation in ["deassign", "set_driver_override", "unbind", "probe"] {
        let world = World::without_vfs();
        let service = world.start();
        service.hold(address).unwrap();
        world.fail(operation, Some(address), Errno::EIO, 0);
        let failure = service.release(address).unwrap_err();
        assert_eq!(failure.code, ErrorCode::Quarantined, "{operation}: {failure}");
        assert_quarantined(&service, address, operation);
        service.clear(address).unwrap();
        world.assert_held(&service, address, operation);
        service.release(address).unwrap();
        world.assert_host(&service, address, Some("virtio-pci"), operation);
    }
}
