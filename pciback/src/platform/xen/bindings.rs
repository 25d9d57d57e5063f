//! The Xen libraries: loaded when a real host is opened, and checked to have every function that is used.

use std::sync::Arc;

use super::messages;
use crate::platform::{Cause, PlatformError, Result};

#[expect(
    clippy::allow_attributes,
    clippy::allow_attributes_without_reason,
    clippy::too_many_arguments,
    clippy::undocumented_unsafe_blocks,
    dead_code,
    non_camel_case_types,
    non_upper_case_globals,
    reason = "bindgen wrote this from C headers"
)]
mod generated {
    /// Types and constants, shared by the libraries.
    pub mod types {
        include!(concat!(env!("OUT_DIR"), "/types.rs"));
    }
    pub mod xenctrl {
        include!(concat!(env!("OUT_DIR"), "/xenctrl.rs"));
    }
    pub mod xencall {
        include!(concat!(env!("OUT_DIR"), "/xencall.rs"));
    }
    pub mod xengnttab {
        include!(concat!(env!("OUT_DIR"), "/xengnttab.rs"));
    }
    pub mod xenevtchn {
        include!(concat!(env!("OUT_DIR"), "/xenevtchn.rs"));
    }
    pub mod xendevicemodel {
        include!(concat!(env!("OUT_DIR"), "/xendevicemodel.rs"));
    }
    pub mod xenforeignmemory {
        include!(concat!(env!("OUT_DIR"), "/xenforeignmemory.rs"));
    }
    pub mod xenstore {
        include!(concat!(env!("OUT_DIR"), "/xenstore.rs"));
    }
}

pub use generated::types::*;
pub use generated::xencall::XenCall;
pub use generated::xenctrl::XenCtrl;
pub use generated::xendevicemodel::XenDeviceModel;
pub use generated::xenevtchn::XenEvtchn;
pub use generated::xenforeignmemory::XenForeignMemory;
pub use generated::xengnttab::XenGntTab;
pub use generated::xenstore::XenStore;

/// All Xen libraries. They stay loaded as long as one user of them exists.
pub struct Libraries {
    /// Domain control; its interface belongs to one release of Xen.
    pub ctrl: XenCtrl,
    /// Raw hypercalls.
    pub call: XenCall,
    /// Grant mappings.
    pub gnttab: XenGntTab,
    /// Event channels.
    pub evtchn: XenEvtchn,
    /// Ioreq servers.
    pub devicemodel: XenDeviceModel,
    /// Their pages.
    pub foreignmemory: XenForeignMemory,
    /// xenstore.
    pub store: XenStore,
    /// Where the libraries send what they have to say; set before anything else uses them.
    pub logger: *mut xentoollog_logger,
}

// SAFETY: the only raw pointer is that of a static which is never written.
unsafe impl Send for Libraries {}
// SAFETY: as for `Send`.
unsafe impl Sync for Libraries {}

/// Loads one library and checks its functions.
macro_rules! load {
    ($type:ident, $file:expr, $package:expr) => {{
        let file: &str = $file;
        // SAFETY: the initialisers of Xen's libraries have no preconditions, and the functions are bound by the
        // prototypes of the headers, which this library's version shares.
        let loaded = unsafe { $type::new(file) };
        let library = loaded.map_err(|error| unavailable(file, $package, &format!("cannot be loaded ({error})")))?;
        match library.missing() {
            None => library,
            Some(symbol) => {
                return Err(unavailable(file, $package, &format!("lacks the function {symbol}")));
            }
        }
    }};
}

impl Libraries {
    /// Loads the libraries for this version of Xen.
    pub fn load((major, minor): (u32, u32)) -> Result<Arc<Self>> {
        let (file, package) =
            (format!("libxenctrl.so.{major}.{minor}"), format!("libxenmisc{major}.{minor}"));
        Ok(Arc::new(Self {
            ctrl: load!(XenCtrl, &file, &package),
            call: load!(XenCall, "libxencall.so.1", "libxencall1"),
            gnttab: load!(XenGntTab, "libxengnttab.so.1", "libxengnttab1"),
            evtchn: load!(XenEvtchn, "libxenevtchn.so.1", "libxenevtchn1"),
            devicemodel: load!(XenDeviceModel, "libxendevicemodel.so.1", "libxendevicemodel1"),
            foreignmemory: load!(XenForeignMemory, "libxenforeignmemory.so.1", "libxenforeignmemory1"),
            store: load!(XenStore, "libxenstore.so.4", "libxenstore4"),
            logger: messages::logger(),
        }))
    }
}

fn unavailable(file: &str, package: &str, why: &str) -> PlatformError {
    let text = format!(
        "it {why}; install or update the package {package} (Debian's name), or use --platform sim:FILE"
    );
    PlatformError::new("load", file, Cause::Unavailable(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_is_an_error_that_names_it_and_its_package() {
        let error = Libraries::load((99, 1)).err().unwrap().to_string();
        assert!(error.starts_with("cannot load libxenctrl.so.99.1: it cannot be loaded"), "{error}");
        assert!(error.contains("libxenmisc99.1"), "{error}");
    }

    #[test]
    fn a_library_without_the_functions_is_an_error_that_names_the_first() {
        let load = || -> Result<XenStore> { Ok(load!(XenStore, "libc.so.6", "libc6")) };
        let error = load().err().unwrap().to_string();
        assert!(error.contains("load libc.so.6: it lacks the function xs_open"), "{error}");
    }
}
