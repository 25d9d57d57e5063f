//! The steps of hold, release, attach and detach, as the journal names them.
//!
//! There are two lists. [`HOLD`] takes a function from dom0, [`ATTACH`] attaches a held function to a guest. Release and detach are the
//! same lists backwards: they undo the steps.

use pciback::FunctionState;
use serde::{Deserialize, Serialize};

/// A list of steps and its direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// [`HOLD`], forwards.
    Hold,
    /// [`HOLD`], backwards.
    Release,
    /// [`ATTACH`], forwards.
    Attach,
    /// [`ATTACH`], backwards.
    Detach,
}

/// One step. Repeating it, or its undo, changes nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Step {
    /// The function is bound to the holding driver. Undo: to its original driver.
    Driver,
    /// Nothing: a VF keeps its network settings while it is held. Undo: what 'vf set' changed is restored.
    RestoreNetwork,
    /// `DOMID_IO` owns the function in Xen. Undo: dom0 owns it.
    Quarantine,
    /// The function shares nothing with another owner, except what a policy permits. Errors that it causes, those of its resets included,
    /// are reported and do not escalate. Undo: the earlier values are restored, unless another function below needs the new ones.
    ContainPath,
    /// The function is reset and answers, and its registers have the values from when it was first held. Undo: the same, because a guest
    /// has had it.
    Reset,
    /// Xen guards its MSI-X table. Undo: no longer.
    PrepareMsix,
    /// The guest owns the function in Xen. Undo: `DOMID_IO` owns it.
    Assign,
    /// The same as [`Self::ContainPath`], after [`Self::Assign`]: a step of earlier versions, whose journals name it.
    ContainErrors,
    /// The guest may map the BARs and, if policies give it to a PV guest, the expansion ROM, use the I/O ports and, unless another owner uses it, the INTx line. Undo: this is revoked, except what
    /// another function of the guest needs.
    Grant,
    /// The VF has the network settings of 'vf set' and of the service's settings. Undo: they are set again, and changes that the guest
    /// made are reported.
    ApplyNetwork,
    /// The image, the part of the virtual config space that survives a restart of the service, exists and is complete, so that it shows
    /// what the guest may reach from the next step on. So does the copy of an expansion ROM, if policies give one. Undo: both are
    /// removed.
    Image,
    /// The guest is served and notified. Undo: the guest is asked to release the function, which is then switched off, bus mastering and
    /// interrupts first.
    Serve,
}

/// Takes a function from dom0.
pub const HOLD: &[Step] = &[Step::Driver, Step::RestoreNetwork, Step::Quarantine];
/// Attaches a held function to a guest.
pub const ATTACH: &[Step] = &[
    Step::ContainPath,
    Step::Reset,
    Step::PrepareMsix,
    Step::Assign,
    Step::Grant,
    Step::ApplyNetwork,
    Step::Image,
    Step::Serve,
];

impl Kind {
    /// The steps, in forward order.
    pub const fn steps(self) -> &'static [Step] {
        match self {
            Self::Hold | Self::Release => HOLD,
            Self::Attach | Self::Detach => ATTACH,
        }
    }

    /// The state while a transaction of this kind runs.
    pub const fn state_during(self) -> FunctionState {
        match self {
            Self::Hold => FunctionState::Host,
            Self::Release => FunctionState::Held,
            Self::Attach => FunctionState::Attaching,
            Self::Detach => FunctionState::Detaching,
        }
    }

    /// The state after all steps are done.
    pub(crate) const fn state_when_forward(self) -> FunctionState {
        match self {
            Self::Hold | Self::Release => FunctionState::Held,
            Self::Attach | Self::Detach => FunctionState::Attached,
        }
    }

    /// The state after all steps are undone.
    pub(crate) const fn state_when_undone(self) -> FunctionState {
        match self {
            Self::Hold | Self::Release => FunctionState::Host,
            Self::Attach | Self::Detach => FunctionState::Held,
        }
    }
}

impl Step {
    /// The step from which a transaction of an older version, with another order of steps, is undone: all steps that may have been done
    /// are undone, and undoing one that was not done changes nothing.
    pub(crate) const fn of_this_version(self) -> Self {
        match self {
            // That version had done the steps up to [`Self::Assign`] before.
            Self::ContainErrors => Self::Assign,
            other => other,
        }
    }
}
