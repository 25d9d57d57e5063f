//! The filter of an attached function.

use std::sync::Arc;

use pciback::config::{Filter, FunctionSpec};
use pciback::policy::PolicySet;

/// The filter of an attached function, and what it was compiled from.
#[derive(Clone)]
pub struct CompiledFilter {
    /// The function's specification.
    pub spec: Arc<FunctionSpec>,
    /// The compiled filter.
    pub filter: Arc<Filter>,
    /// The policies that it was compiled from.
    pub policies: Arc<PolicySet>,
}
