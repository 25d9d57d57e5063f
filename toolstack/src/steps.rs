//! The steps that hold, release, attach and detach consist of, as the journal names them.
//!
//! There are two lists. [`HOLD`] takes a function from dom0; [`ATTACH`] gives a held function to a guest. Forwards they are
//! hold and attach, backwards release and detach: what is done in one direction is undone in the other.

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

/// One step. Doing or undoing it when that was done already changes nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Step {
    /// The driver that only holds takes it. Undo: the driver it came from.
    Driver,
    /// Nothing: a VF keeps its network settings while it is held. Undo: what 'vf set' changed is as before.
    RestoreNetwork,
    /// `DOMID_IO` owns it in Xen. Undo: dom0.
    Quarantine,
    /// It shares nothing with another owner that no policy permits. Errors that it causes are reported and do not escalate, those of its
    /// resets included. Undo: as before, unless another function below
    /// needs it.
    ContainPath,
    /// It is reset and answers, and its registers are as they were when it was first held. Undo: the same, because a guest has had it.
    Reset,
    /// Xen guards its MSI-X table. Undo: no longer.
    PrepareMsix,
    /// The guest owns it in Xen. Undo: `DOMID_IO`.
    Assign,
    /// What [`Self::ContainPath`] does, after [`Self::Assign`]: a step of earlier versions, which their journals name.
    ContainErrors,
    /// The guest may map its BARs, use its ports and, unless another owner uses that, its INTx line. Undo: revokes this, except what
    /// another function of the guest needs.
    Grant,
    /// The VF's network settings are what 'vf set' and the service's settings ask for. Undo: they are so again, and what the guest had
    /// changed is reported.
    ApplyNetwork,
    /// Its image, the part of its virtual config space that outlives the service, is there and complete, so that from the next step on it
    /// tells what the guest may reach; so is the copy of an expansion ROM, where policies give one. Undo: gone.
    Image,
    /// The guest is notified and served. Undo: asked to let go, then cut off: bus mastering and interrupts first.
    Serve,
}

/// Takes a function from dom0.
pub const HOLD: &[Step] = &[Step::Driver, Step::RestoreNetwork, Step::Quarantine];
/// Gives a held function to a guest.
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
    /// The steps, in the order of going forwards.
    pub const fn steps(self) -> &'static [Step] {
        match self {
            Self::Hold | Self::Release => HOLD,
            Self::Attach | Self::Detach => ATTACH,
        }
    }

    /// The state while it runs, forwards.
    pub const fn state_during(self) -> FunctionState {
        match self {
            Self::Hold => FunctionState::Host,
            Self::Release => FunctionState::Held,
            Self::Attach => FunctionState::Attaching,
            Self::Detach => FunctionState::Detaching,
        }
    }

    /// The state when all steps are done.
    pub(crate) const fn state_when_forward(self) -> FunctionState {
        match self {
            Self::Hold | Self::Release => FunctionState::Held,
            Self::Attach | Self::Detach => FunctionState::Attached,
        }
    }

    /// The state when all steps are undone.
    pub(crate) const fn state_when_undone(self) -> FunctionState {
        match self {
            Self::Hold | Self::Release => FunctionState::Host,
            Self::Attach | Self::Detach => FunctionState::Held,
        }
    }
}

impl Step {
    /// From where on steps are undone that an older version did in another order: all that may have been done is undone, whatever was not
    /// is left as it is.
    pub(crate) const fn of_this_version(self) -> Self {
        match self {
            // It had reset, prepared and assigned the function before.
            Self::ContainErrors => Self::Assign,
            other => other,
        }
    }
}
