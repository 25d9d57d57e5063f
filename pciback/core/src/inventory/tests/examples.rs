//! One example for each repair.

use super::super::*;
use crate::{Devfn, DomId, Sbdf};

const GUEST: DomId = DomId(4);
const OTHER: DomId = DomId(5);
const PLACE: GuestPlace = GuestPlace { domain: GUEST, devfn: Devfn(8) };

fn pf() -> Sbdf {
    Sbdf::from_devfn(0, 1, 0)
}

fn vf(index: u8) -> Sbdf {
    Sbdf::from_devfn(0, 1, 0x80 + 2 * index)
}

/// A PF with two VFs that everybody knows, and two guests; nothing is wanted yet.
struct Example {
    observed: Observed,
    wanted: Wanted,
}

impl Example {
    fn new() -> Self {
        let mut observed = Observed { domains: [GUEST, OTHER].into(), ..Observed::default() };
        let vfs = vec![vf(0), vf(1)];
        let host =
            HostView { num_vfs: 2, virtual_functions: vfs.clone(), driver: true, ..HostView::default() };
        let function = Function { host: Some(host), physical_function: None, xen: Some(Owner::Host) };
        observed.functions.insert(pf(), function);
        for address in vfs {
            let host = HostView { msix: true, ..HostView::default() };
            let function =
                Function { host: Some(host), physical_function: Some(pf()), xen: Some(Owner::Host) };
            observed.functions.insert(address, function);
        }
        Self { observed, wanted: Wanted::default() }
    }

    fn want(mut self, address: Sbdf, want: Want) -> Self {
        let identity = Some(Identity::default());
        self.wanted.functions.insert(address, Intent { want, identity, msix_prepared: false });
        self
    }

    fn held(mut self, address: Sbdf) -> Self {
        (self.host(address).held, self.host(address).driver) = (true, true);
        self.owned(address, Owner::Quarantine).want(address, Want::Held)
    }

    fn attached(self, address: Sbdf) -> Self {
        self.held(address)
            .owned(address, Owner::Domain(GUEST))
            .published(address, PLACE)
            .want(address, Want::Attached(PLACE))
    }

    fn owned(mut self, address: Sbdf, owner: Owner) -> Self {
        self.function(address).xen = Some(owner);
        self
    }

    fn published(mut self, address: Sbdf, place: GuestPlace) -> Self {
        self.observed.published.insert(Published { address, place });
        self
    }

    fn function(&mut self, address: Sbdf) -> &mut Function {
        self.observed.functions.get_mut(&address).unwrap()
    }

    fn host(&mut self, address: Sbdf) -> &mut HostView {
        self.function(address).host.as_mut().unwrap()
    }

    fn with_host(mut self, address: Sbdf, change: impl FnOnce(&mut HostView)) -> Self {
        change(self.host(address));
        self
    }

    fn prepared(mut self, address: Sbdf) -> Self {
        self.wanted.functions.get_mut(&address).unwrap().msix_prepared = true;
        self
    }

    /// The functions leave, as if `sriov_numvfs` was written.
    fn leave(mut self, addresses: &[Sbdf]) -> Self {
        for address in addresses {
            self.function(*address).host = None;
        }
        if let Some(pf) = &mut self.function(pf()).host {
            pf.virtual_functions.retain(|vf| !addresses.contains(vf));
            pf.num_vfs = pf.virtual_functions.len() as u16;
        }
        self
    }

    fn unknown(mut self, address: Sbdf) -> Self {
        self.function(address).xen = None;
        self
    }

    fn dead(mut self, domain: DomId) -> Self {
        self.observed.domains.remove(&domain);
        self
    }

    fn plan(&self) -> Plan {
        plan(&self.observed, &self.wanted)
    }

    #[track_caller]
    fn repairs(&self, expected: &[Repair]) {
        let plan = self.plan();
        let found: Vec<Repair> = plan.steps.iter().map(|step| step.repair).collect();
        assert_eq!(found, expected, "{plan}");
    }

    #[track_caller]
    fn leaves(&self, address: Sbdf, remark: Remark) {
        let plan = self.plan();
        assert!(plan.left.contains(&Left { address, remark }), "{plan}");
    }
}

fn report(address: Sbdf) -> Repair {
    let kind = match address == pf() {
        true => ReportKind::Plain,
        false => ReportKind::Virtual { physical_function: pf() },
    };
    Repair::ReportToXen { address, kind }
}

fn withdraw(address: Sbdf) -> Repair {
    Repair::Withdraw { address, place: PLACE }
}

fn remove(address: Sbdf) -> Repair {
    Repair::RemoveFromXen { address }
}

fn hold(address: Sbdf) -> Repair {
    Repair::Hold { address }
}

fn quarantine(address: Sbdf) -> Repair {
    Repair::Quarantine { address }
}

fn forget(address: Sbdf) -> Repair {
    Repair::Forget { address }
}

#[test]
fn agreement_needs_nothing() {
    Example::new().repairs(&[]);
    let example = Example::new().held(vf(0)).attached(vf(1)).prepared(vf(1));
    example.repairs(&[]);
    assert_eq!(example.plan().to_string(), "nothing to do: sysfs, Xen and xenstore agree\n");
}

#[test]
fn a_pf_is_reported_before_its_vfs() {
    let example = Example::new().unknown(vf(0)).unknown(pf()).unknown(vf(1));
    example.repairs(&[report(pf()), report(vf(0)), report(vf(1))]);
    example.leaves(pf(), Remark::VfsEnabled);
}

#[test]
fn an_extended_function_is_reported_as_one() {
    let example = Example::new().unknown(pf()).with_host(pf(), |host| host.extended = true);
    example.repairs(&[Repair::ReportToXen { address: pf(), kind: ReportKind::Extended }]);
}

#[test]
fn vfs_are_removed_before_their_pf() {
    Example::new().leave(&[pf(), vf(0), vf(1)]).repairs(&[remove(vf(0)), remove(vf(1)), remove(pf())]);
}

#[test]
fn a_pf_that_left_stays_in_xens_list_while_a_vf_of_it_does() {
    let example = Example::new().leave(&[pf(), vf(0)]);
    example.repairs(&[remove(vf(0))]);
    example.leaves(pf(), Remark::VfsStay);
    let example = example.unknown(vf(1));
    example.repairs(&[remove(vf(0)), remove(pf())]);
    example.leaves(vf(1), Remark::PfMissing);
}

#[test]
fn a_vf_that_left_is_removed_only_while_xen_knows_its_pf() {
    let example = Example::new().leave(&[vf(0)]).unknown(pf());
    example.repairs(&[report(pf()), remove(vf(0))]);
    let example = Example::new().leave(&[pf(), vf(0), vf(1)]).unknown(pf());
    example.repairs(&[]);
    example.leaves(vf(0), Remark::PfUnknownToXen);
}

#[test]
fn vfs_that_somebody_else_made_or_unmade_are_adopted() {
    let example = Example::new().leave(&[vf(1)]).unknown(vf(0));
    example.repairs(&[remove(vf(1)), report(vf(0))]);
}

#[test]
fn what_xl_holds_or_gave_to_a_guest_is_left_alone() {
    let example = Example::new()
        .with_host(vf(0), |host| host.held = true)
        .owned(vf(0), Owner::Quarantine)
        .owned(vf(1), Owner::Domain(OTHER));
    example.repairs(&[]);
    example.leaves(vf(0), Remark::HeldByOthers);
    example.leaves(vf(1), Remark::GivenByOthers);
}

#[test]
fn a_held_function_is_held_again_when_its_holder_or_the_quarantine_domain_lost_it() {
    Example::new().held(vf(0)).with_host(vf(0), |host| host.held = false).repairs(&[hold(vf(0))]);
    Example::new().held(vf(0)).owned(vf(0), Owner::Host).repairs(&[hold(vf(0))]);
    Example::new().held(vf(0)).owned(vf(0), Owner::Free).repairs(&[]);
    Example::new().held(vf(0)).unknown(vf(0)).repairs(&[report(vf(0)), hold(vf(0))]);
}

#[test]
fn a_pf_with_vfs_is_not_taken_from_its_driver() {
    let example = Example::new().held(pf()).with_host(pf(), |host| host.held = false);
    example.repairs(&[]);
    example.leaves(pf(), Remark::VfsInTheWay);
}

#[test]
fn a_held_function_that_a_guest_owns_is_trusted_no_more() {
    for (owner, said) in
        [(Owner::Domain(OTHER), "domain 5 owns it"), (Owner::Guest, "another domain owns it")]
    {
        let example = Example::new().held(vf(0)).owned(vf(0), owner);
        example.repairs(&[quarantine(vf(0))]);
        assert!(example.plan().to_string().contains(said), "{}", example.plan());
    }
    let example = Example::new().held(vf(0)).owned(vf(0), Owner::Domain(OTHER)).dead(OTHER);
    example.repairs(&[]);
    example.leaves(vf(0), Remark::OwnerEnding);
}

#[test]
fn a_held_function_that_left_is_forgotten() {
    Example::new().held(vf(0)).leave(&[vf(0)]).repairs(&[remove(vf(0)), forget(vf(0))]);
}

#[test]
fn another_device_in_the_slot_of_a_held_one_is_dom0s() {
    let another = |host: &mut HostView| host.identity.serial = Some(2);
    let mut example = Example::new().held(vf(0)).with_host(vf(0), another);
    example.repairs(&[]);
    example.wanted.functions.get_mut(&vf(0)).unwrap().identity.as_mut().unwrap().serial = Some(1);
    example.repairs(&[forget(vf(0))]);
    let example = example.with_host(vf(0), |host| host.held = false);
    example.repairs(&[Repair::Release { address: vf(0) }, forget(vf(0))]);
}

#[test]
fn an_attached_function_that_left_is_withdrawn_before_xen_forgets_it() {
    let example = Example::new().attached(vf(0)).prepared(vf(0)).leave(&[vf(0), vf(1)]);
    let gone = Repair::MarkGone { address: vf(0) };
    example.repairs(&[withdraw(vf(0)), remove(vf(0)), remove(vf(1)), gone]);
    let example = Example::new().attached(pf()).leave(&[pf(), vf(0), vf(1)]);
    let plan = example.attached_left(vf(0)).plan();
    let first: Vec<Sbdf> = plan.steps.iter().take(2).map(|step| step.repair.address()).collect();
    assert_eq!(first, [vf(0), pf()], "VFs are withdrawn before their PF: {plan}");
}

impl Example {
    /// As [`Self::attached`], of a function that sysfs does not show.
    fn attached_left(self, address: Sbdf) -> Self {
        self.owned(address, Owner::Domain(GUEST))
            .published(address, PLACE)
            .want(address, Want::Attached(PLACE))
    }
}

#[test]
fn a_function_that_was_gone_and_is_back_is_dom0s() {
    Example::new().want(vf(0), Want::Gone).repairs(&[forget(vf(0))]);
    Example::new().want(vf(0), Want::Gone).leave(&[vf(0)]).unknown(vf(0)).repairs(&[]);
}

#[test]
fn another_device_in_the_slot_of_an_attached_one_is_distrusted_before_the_guest_loses_it() {
    let example = Example::new().attached(vf(0)).with_host(vf(0), |host| host.identity.device = 0xbad);
    example.repairs(&[quarantine(vf(0)), withdraw(vf(0))]);
}

#[test]
fn an_attached_function_that_xen_forgot_or_gave_away_is_withdrawn() {
    Example::new().attached(vf(0)).unknown(vf(0)).repairs(&[withdraw(vf(0)), report(vf(0)), hold(vf(0))]);
    Example::new().attached(vf(0)).owned(vf(0), Owner::Quarantine).repairs(&[withdraw(vf(0))]);
    for owner in [Owner::Host, Owner::Free] {
        Example::new().attached(vf(0)).owned(vf(0), owner).repairs(&[withdraw(vf(0)), hold(vf(0))]);
    }
    let example = Example::new().attached(vf(0)).owned(vf(0), Owner::Domain(OTHER));
    example.repairs(&[quarantine(vf(0)), withdraw(vf(0))]);
    for owner in [Owner::Guest, Owner::Unknown] {
        Example::new().attached(vf(0)).owned(vf(0), owner).repairs(&[]);
    }
}

#[test]
fn a_driver_of_dom0_under_a_guest_ends_the_attachment_and_no_driver_does_not() {
    let example = Example::new().attached(vf(0)).with_host(vf(0), |host| host.held = false);
    example.repairs(&[withdraw(vf(0)), hold(vf(0))]);
    let example = example.with_host(vf(0), |host| host.driver = false);
    example.repairs(&[]);
    example.leaves(vf(0), Remark::NoHolderUnderGuest);
}

#[test]
fn a_guest_that_ended_keeps_nothing() {
    let detach = Repair::DetachFromDead { address: vf(0), place: PLACE };
    let example = Example::new().attached(vf(0)).dead(GUEST);
    example.repairs(&[detach]);
    example.leave(&[vf(0)]).repairs(&[detach, remove(vf(0)), forget(vf(0))]);
}

#[test]
fn nodes_without_a_record_are_removed_and_what_their_guest_owns_is_distrusted() {
    let nodes = Repair::RemoveNodes { address: vf(0), place: PLACE };
    Example::new().published(vf(0), PLACE).repairs(&[nodes]);
    let example = Example::new().published(vf(0), PLACE).owned(vf(0), Owner::Domain(GUEST));
    example.repairs(&[quarantine(vf(0)), nodes]);
    example.dead(GUEST).repairs(&[nodes]);
    Example::new().published(vf(0), PLACE).leave(&[vf(0)]).repairs(&[nodes, remove(vf(0))]);
    let elsewhere = GuestPlace { domain: GUEST, devfn: Devfn(16) };
    let example = Example::new().attached(vf(0)).published(vf(0), elsewhere);
    example.repairs(&[Repair::RemoveNodes { address: vf(0), place: elsewhere }]);
}

#[test]
fn missing_nodes_are_written_again() {
    let mut example = Example::new().attached(vf(0));
    example.observed.published.clear();
    example.repairs(&[Repair::Publish { address: vf(0), place: PLACE }]);
}

#[test]
fn msix_is_released_only_where_xen_survives_it() {
    let release = Repair::ReleaseMsix { address: vf(0) };
    Example::new().held(vf(0)).prepared(vf(0)).repairs(&[release]);
    let example = Example::new().held(vf(0)).prepared(vf(0)).with_host(vf(0), |host| host.msix = false);
    example.repairs(&[]);
    let example = Example::new().held(vf(0)).prepared(vf(0)).owned(vf(0), Owner::Domain(OTHER));
    example.repairs(&[quarantine(vf(0))]);
    let example = Example::new().held(vf(0)).prepared(vf(0)).unknown(vf(0));
    example.repairs(&[report(vf(0)), hold(vf(0))]);
}

#[test]
fn a_quarantined_function_stays_so_and_its_guest_keeps_it_until_it_cannot() {
    let quarantined = |place| Example::new().attached(vf(0)).want(vf(0), Want::Quarantined(place));
    quarantined(Some(PLACE)).repairs(&[]);
    quarantined(Some(PLACE)).leave(&[vf(0)]).repairs(&[withdraw(vf(0)), remove(vf(0))]);
    quarantined(None).repairs(&[Repair::RemoveNodes { address: vf(0), place: PLACE }]);
}

#[test]
fn a_bridge_is_not_held() {
    let example = Example::new().held(vf(0)).with_host(vf(0), |host| host.bridge = true);
    example.repairs(&[quarantine(vf(0))]);
}

#[test]
fn what_a_transaction_has_is_left_alone_and_waited_for() {
    let mut example = Example::new().attached(vf(0)).leave(&[pf(), vf(0), vf(1)]);
    example.wanted.busy.insert(vf(0));
    example.repairs(&[remove(vf(1))]);
    example.leaves(pf(), Remark::VfsStay);
}

#[test]
fn vfs_that_are_being_changed_are_left_alone() {
    let mut example = Example::new().attached(vf(0)).leave(&[vf(0)]).unknown(vf(1));
    example.wanted.busy.insert(pf());
    example.repairs(&[]);
}

#[test]
fn families_that_cannot_be_are_left_alone() {
    let mut example = Example::new().unknown(vf(0)).leave(&[vf(1)]);
    for (one, other) in [(vf(0), vf(1)), (vf(1), vf(0)), (pf(), pf())] {
        example.function(one).physical_function = Some(other);
    }
    example.repairs(&[]);
    example.leaves(vf(0), Remark::PfMissing);
    example.leaves(vf(1), Remark::PfUnknownToXen);
}

#[test]
fn a_plan_reads_as_text_and_travels_as_json() {
    let example = Example::new().attached(vf(0)).leave(&[vf(0)]).owned(vf(1), Owner::Domain(OTHER));
    let plan = example.plan();
    assert_eq!(
        plan.to_string(),
        "1. withdraw 0000:01:10.0 from domain 4: it left the host\n\
         2. remove 0000:01:10.0 from Xen's list: Xen knows it, sysfs does not show it\n\
         3. mark 0000:01:10.0 as gone: it left the host\n\
         left as it is:\n  \
         0000:01:10.2: owned by a guest that did not get it from this service\n"
    );
    let json = serde_json::to_value(&plan).unwrap();
    let first = serde_json::json!({
        "repair": "withdraw", "address": "0000:01:10.0", "domain": 4, "devfn": 8, "reason": "left"
    });
    assert_eq!(json["steps"][0], first);
    assert_eq!(serde_json::from_value::<Plan>(json).unwrap(), plan);
    let example = Example::new().unknown(vf(0)).held(vf(1)).owned(vf(1), Owner::Domain(OTHER));
    let plan = example.plan();
    let json = serde_json::to_string(&plan).unwrap();
    assert_eq!(serde_json::from_str::<Plan>(&json).unwrap(), plan, "{json}");
}
