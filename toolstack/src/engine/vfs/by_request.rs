//! VFs that clients and the settings ask for: what is checked before the PF's driver changes them, on a thread.

use std::collections::BTreeSet;

use pciback::platform::{HostFunction, Platform};
use pciback::{FunctionState, Sbdf};

use super::at_start::WantedPf;
use super::driver::{create, destroy};
use super::unmanaged;
use crate::engine::functions::Functions;
use crate::engine::requests::known_pf;
use crate::engine::tasks::TaskContext;
use crate::outcome::Failure;
use crate::protocol::Success;
use crate::transaction::PF_STUB;

/// A change of the VFs of a PF.
#[derive(Debug, Clone, Copy)]
pub(super) enum Change {
    /// VFs are enabled on a PF that has none.
    Create { count: u16, unmanaged: bool },
    /// The VFs that a PF has are disabled, and as many as wanted are enabled.
    Replace { before: u16, count: u16, unmanaged: bool },
    /// All VFs are disabled.
    Destroy,
}

impl Change {
    /// Makes the change.
    pub fn make(self, pf: Sbdf, context: &TaskContext, progress: &dyn Fn(&str)) -> Result<Success, Failure> {
        match self {
            Self::Create { count, unmanaged } => {
                // Another program may have enabled some since: a failure here would disable those.
                refuse_present(&context.platform.host.function(pf)?)?;
                context.room_for(pf, count)?;
                create(context, pf, count, unmanaged, progress)
            }
            Self::Replace { before, count, .. } if before == count => {
                Ok(Success::Already { message: format!("{pf} has {count} VFs") })
            }
            Self::Replace { before, count, unmanaged } => {
                if count > 0 {
                    // Checked before the present VFs are disabled.
                    context.room_for(pf, count)?;
                }
                if before > 0 {
                    let gone = destroy(context, pf, progress)?;
                    if count == 0 {
                        return Ok(gone);
                    }
                }
                create(context, pf, count, unmanaged, progress)
            }
            Self::Destroy => destroy(context, pf, progress),
        }
    }
}

/// Refuses to enable VFs on a PF that has some.
fn refuse_present(pf: &HostFunction) -> Result<(), Failure> {
    match pf.num_vfs {
        0 => Ok(()),
        there => Err(Failure::refused(format!("{} has {there} VFs enabled already", pf.address))
            .on(pf.address)
            .hint("'xpci vf destroy' disables them first")),
    }
}

/// What decides about VFs and their settings.
pub(super) struct Context<'a> {
    pub platform: &'a Platform,
    pub functions: &'a Functions,
    /// PFs whose VFs are being changed.
    pub changing: &'a BTreeSet<Sbdf>,
}

impl Context<'_> {
    /// The change that enables this many VFs; `None`: the PF has them.
    pub fn creation(&self, address: Sbdf, count: u16, unmanaged: bool) -> Result<Option<Change>, Failure> {
        let pf = self.physical_function(address)?;
        if pf.num_vfs == count && count > 0 {
            return Ok(None);
        }
        refuse_present(&pf)?;
        self.refuse_held_pf(address)?;
        unmanaged::check(&pf, unmanaged)?;
        Ok(Some(Change::Create { count, unmanaged }))
    }

    /// The change to another number of VFs.
    pub fn replacement(&self, address: Sbdf, count: u16) -> Result<Change, Failure> {
        let pf = self.physical_function(address)?;
        let (before, unmanaged) = (pf.num_vfs, pf.driver.as_deref() == Some(PF_STUB));
        if before != count {
            if count > 0 {
                self.refuse_held_pf(address)?;
                unmanaged::check(&pf, unmanaged)?;
            }
            self.none_in_use(&pf)?;
        }
        Ok(Change::Replace { before, count, unmanaged })
    }

    /// The change that disables all VFs.
    pub fn removal(&self, address: Sbdf) -> Result<Change, Failure> {
        let pf = self.physical_function(address)?;
        self.none_in_use(&pf)?;
        Ok(Change::Destroy)
    }

    /// The change with which a PF gets the VFs that the settings ask for, as the PF was read at the start of the service.
    pub fn wanted(&self, wanted: &WantedPf) -> Result<Change, Failure> {
        let WantedPf { pf, count, unmanaged } = wanted;
        self.refuse_changing(pf.address)?;
        self.refuse_held_pf(pf.address)?;
        unmanaged::check(pf, *unmanaged)?;
        Ok(Change::Create { count: *count, unmanaged: *unmanaged })
    }

    /// Whether a PF that was left to pci-pf-stub can be taken back from it: nothing was begun with it since.
    pub fn is_left(&self, pf: Sbdf) -> bool {
        self.refuse_changing(pf).is_ok() && self.functions.records().state(pf) == FunctionState::Host
    }

    fn physical_function(&self, address: Sbdf) -> Result<HostFunction, Failure> {
        let function = known_pf(self.platform.host.as_ref(), address)?;
        self.refuse_changing(address)?;
        Ok(function)
    }

    fn refuse_changing(&self, address: Sbdf) -> Result<(), Failure> {
        if self.changing.contains(&address) || self.functions.is_busy(address) {
            return Err(Failure::refused(format!("{address} is being changed right now"))
                .on(address)
                .hint("try again"));
        }
        Ok(())
    }

    /// Refuses a PF without its driver, which enables the VFs, because it is held or a guest has it.
    fn refuse_held_pf(&self, address: Sbdf) -> Result<(), Failure> {
        let state = self.functions.records().state(address);
        if state == FunctionState::Host {
            return Ok(());
        }
        let text = format!("cannot enable VFs of {address}: it is {state}, so that no driver of dom0 has it");
        Err(Failure::refused(text)
            .on(address)
            .hint(format!("'xpci pci-assignable-remove {address}' returns it to its driver")))
    }

    /// Refuses while a VF is held or attached, because the kernel would remove it.
    fn none_in_use(&self, pf: &HostFunction) -> Result<(), Failure> {
        let used = |address: &&Sbdf| self.functions.records().state(**address) != FunctionState::Host;
        let users: Vec<String> =
            pf.virtual_functions.iter().filter(used).map(|vf| self.describe_user(*vf)).collect();
        if users.is_empty() {
            return Ok(());
        }
        Err(Failure::refused(format!("VFs of {} are in use: {}", pf.address, users.join(", ")))
            .on(pf.address)
            .hint("detach them with 'xpci pci-detach', then 'xpci pci-assignable-remove'"))
    }

    fn describe_user(&self, vf: Sbdf) -> String {
        let record = self.functions.records().get_or_new(vf);
        match record.guest {
            Some(guest) => format!("{vf} ({}, domain {})", record.state, guest.domain),
            None => format!("{vf} ({})", record.state),
        }
    }
}
