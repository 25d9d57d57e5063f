//! Reading what a function is, for the filter and for the transactions.

use std::sync::Arc;

use pciback::Sbdf;
use pciback::config::{CapabilityList, FunctionSpec, Planes, Policy};
use pciback::platform::Host;

use crate::outcome::{ErrorCode, Failure};

/// What is asked of a function before anybody serves it.
pub trait SpecExt {
    /// Whether it has an MSI-X capability.
    fn has_msix(&self) -> bool;
    /// Whether it can send INTx.
    fn has_interrupt_pin(&self) -> bool;
}

/// Interrupt Pin (PCI Express 6.0, section 7.5.1.1.13); 0: the function uses none.
const INTERRUPT_PIN: usize = 0x3d;

impl SpecExt for FunctionSpec {
    fn has_msix(&self) -> bool {
        CapabilityList::walk(&self.bytes).legacy(pciback::spec::CapabilityId::MSI_X).is_some()
    }

    fn has_interrupt_pin(&self) -> bool {
        !self.is_virtual() && self.bytes.get(INTERRUPT_PIN).is_some_and(|pin| *pin != 0)
    }
}

/// Reads a function as hardware and host show it, a VF with the help of its PF.
pub fn function_spec(host: &dyn Host, address: Sbdf) -> Result<FunctionSpec, Failure> {
    let function = host.function(address)?;
    let hardware = host.config(address)?;
    let (pf, pf_hardware) = match function.physical_function {
        Some(pf) => (Some(host.function(pf)?), Some(host.config(pf)?)),
        None => (None, None),
    };
    FunctionSpec::read(&function, pf.as_ref(), hardware.as_ref(), pf_hardware.as_deref()).map_err(|error| {
        Failure::new(ErrorCode::Failed, format!("read what {address} is: {error}"))
            .on(address)
            .hint("a device that answers all ones may need a reset or a power cycle")
    })
}

/// Compiles the filter for a function.
pub fn planes(spec: &FunctionSpec) -> Result<Arc<Planes>, Failure> {
    let failed = |error: pciback::config::ConfigError| {
        Failure::new(ErrorCode::Failed, format!("build the filter of {}: {error}", spec.address))
            .on(spec.address)
    };
    Planes::compile(spec, &Policy::default()).map(Arc::new).map_err(failed)
}
