//! Opening a function for its guest: image, filter, config space.

use std::fs::OpenOptions;
use std::sync::Arc;

use pciback::DomId;
use pciback::config::{FunctionImage, Life, VirtualConfigSpace};
use pciback::platform::SharedMemory;
use pciback::pv::GuestFunction;

use super::tasks::Workshop;
use crate::journal::Record;
use crate::outcome::{ErrorCode, Failure};
use crate::spec;
use crate::transaction::image_path;

impl Workshop {
    /// Opens the image and the config space of a function for a guest; `again`: of an earlier life of the service.
    pub(super) fn open_function(
        &self,
        record: &Record,
        domain: DomId,
        again: bool,
    ) -> Result<Box<GuestFunction>, Failure> {
        let address = record.address;
        let failed = |what: &str, why: &dyn std::fmt::Display| {
            Failure::new(ErrorCode::Failed, format!("{what} of {address}: {why}")).on(address).of(domain)
        };
        let path = image_path(&self.settings.run_directory, address);
        let file = OpenOptions::new().read(true).write(true).open(&path);
        let file = file.map_err(|error| failed("open the image", &error))?;
        let memory = SharedMemory::map_file(&file, FunctionImage::BYTES);
        let memory = memory.map_err(|error| failed("map the image", &error))?;
        let image = FunctionImage::new(memory, Life { boot: boot_number(&record.boot), domain });
        let host = self.platform.host.as_ref();
        let spec = spec::function_spec(host, address)?;
        let planes = spec::planes(&spec)?;
        let space = match again {
            false => VirtualConfigSpace::create(&spec, planes, image),
            true => VirtualConfigSpace::resume(&spec, planes, image),
        };
        let space = space.map_err(|error| failed("take over the config space", &error))?;
        let hardware = host.config(address)?;
        let hypervisor = Arc::clone(&self.platform.hypervisor);
        Ok(Box::new(GuestFunction::new(domain, address, space, hardware, hypervisor, spec.gsi)))
    }
}

/// The boot as the image's header has it.
fn boot_number(boot: &str) -> u64 {
    boot.bytes()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}
