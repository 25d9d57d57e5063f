//! The compiled filter of a function: what each bit of its config space is.

use super::error::ConfigError;
use super::function::FunctionSpec;
use super::policy::Policy;

/// The compiled filter, shared by all functions with the same layout and policy.
#[derive(Debug)]
pub struct Planes {
    layout: u64,
}

impl Planes {
    /// Compiles the built-in rules with `policy` laid over them.
    pub fn compile(_spec: &FunctionSpec, _policy: &Policy) -> Result<Self, ConfigError> {
        Ok(Self { layout: 1 })
    }

    /// A hash of everything that the filter does: functions with the same hash can share it, and a shadow that was made
    /// for one hash means nothing for another.
    pub fn layout_hash(&self) -> u64 {
        self.layout
    }
}
