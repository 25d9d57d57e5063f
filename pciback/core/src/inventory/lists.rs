//! Xen's list against sysfs: what is reported, what is removed, in an order that Xen accepts.

use std::collections::{BTreeMap, BTreeSet};

use super::{Function, Left, Observed, Owner, Reason, Remark, Repair, ReportKind, Step, Wanted};
use crate::Sbdf;

/// The repairs of Xen's list, in the order of the fields.
#[derive(Default)]
pub struct Lists {
    /// PFs and functions of their own. First: a VF that left is removed, and one that is there is reported, only while Xen
    /// knows its PF.
    pub report_plain: Vec<Step>,
    /// VFs that left, then what else left.
    pub remove: Vec<Step>,
    pub report_vfs: Vec<Step>,
    pub left: Vec<Left>,
    reported: BTreeSet<Sbdf>,
}

impl Lists {
    pub fn new(observed: &Observed, wanted: &Wanted) -> Self {
        let mut lists = Self::default();
        lists.report(observed, wanted, false);
        lists.remove(observed, wanted);
        lists.report(observed, wanted, true);
        lists
    }

    /// Who owns a function in Xen once its list is repaired; `None` where Xen does not know it then.
    pub fn owner(&self, address: Sbdf, function: &Function) -> Option<Owner> {
        function.xen.or_else(|| self.reported.contains(&address).then_some(Owner::Host))
    }

    fn report(&mut self, observed: &Observed, wanted: &Wanted, vfs: bool) {
        for (&address, function) in &observed.functions {
            let Some(host) = &function.host else { continue };
            if function.xen.is_some()
                || function.physical_function.is_some() != vfs
                || wanted.is_busy(address, function.physical_function)
            {
                continue;
            }
            let kind = match function.physical_function {
                None if host.extended => ReportKind::Extended,
                None => ReportKind::Plain,
                Some(physical_function) if self.is_known_pf(observed, physical_function) => {
                    ReportKind::Virtual { physical_function }
                }
                Some(_) => {
                    self.left.push(Left { address, remark: Remark::PfMissing });
                    continue;
                }
            };
            if !vfs && host.num_vfs > 0 {
                self.left.push(Left { address, remark: Remark::VfsEnabled });
            }
            let repair = Repair::ReportToXen { address, kind };
            let steps = if vfs { &mut self.report_vfs } else { &mut self.report_plain };
            steps.push(Step { repair, reason: Reason::UnknownToXen });
            self.reported.insert(address);
        }
    }

    /// Whether VFs of this PF may be reported: it is there, is no VF itself, and Xen knows it by now.
    fn is_known_pf(&self, observed: &Observed, pf: Sbdf) -> bool {
        observed.get(pf).is_some_and(|function| {
            function.host.is_some()
                && function.physical_function.is_none()
                && (function.xen.is_some() || self.reported.contains(&pf))
        })
    }

    fn remove(&mut self, observed: &Observed, wanted: &Wanted) {
        // How many VFs of each function Xen knows and is going to keep.
        let mut staying: BTreeMap<Sbdf, usize> = BTreeMap::new();
        for function in observed.functions.values().filter(|function| function.xen.is_some()) {
            if let Some(pf) = function.physical_function {
                *staying.entry(pf).or_default() += 1;
            }
        }
        for vfs in [true, false] {
            for (&address, function) in &observed.functions {
                let leaves = function.host.is_none() && function.xen.is_some();
                if !leaves
                    || function.physical_function.is_some() != vfs
                    || wanted.is_busy(address, function.physical_function)
                {
                    continue;
                }
                let pf = function.physical_function;
                let remark = if pf.is_some_and(|pf| !self.has_whole_pf(observed, pf)) {
                    Some(Remark::PfUnknownToXen)
                } else if staying.get(&address).is_some_and(|count| *count > 0) {
                    Some(Remark::VfsStay)
                } else {
                    None
                };
                if let Some(remark) = remark {
                    self.left.push(Left { address, remark });
                    continue;
                }
                self.remove
                    .push(Step { repair: Repair::RemoveFromXen { address }, reason: Reason::OnlyInXen });
                if let Some(count) = pf.and_then(|pf| staying.get_mut(&pf)) {
                    *count -= 1;
                }
            }
        }
    }

    /// Whether Xen knows the PF of a VF that left. Where it does not, the report of that VF may have failed half-way.
    fn has_whole_pf(&self, observed: &Observed, pf: Sbdf) -> bool {
        observed.get(pf).is_some_and(|function| {
            function.physical_function.is_none() && (function.xen.is_some() || self.reported.contains(&pf))
        })
    }
}
