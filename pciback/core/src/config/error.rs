//! Why a virtual config space cannot be built.

use thiserror::Error;

use super::records::ImageError;
use crate::Sbdf;

/// Why a virtual config space cannot be built or taken over.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The function reads all ones.
    #[error("{address}: the function does not answer: its config space reads all ones")]
    NoAnswer {
        /// The function.
        address: Sbdf,
    },
    /// Its header is not that of an ordinary function.
    #[error(
        "{address}: header type {header_type:#x} is a bridge's or unknown: only ordinary functions (type 0) go to guests"
    )]
    HeaderType {
        /// The function.
        address: Sbdf,
        /// Bits 6:0 of its header type.
        header_type: u8,
    },
    /// The bytes are fewer than a header.
    #[error("{address}: {bytes} bytes of config space, a header takes 64")]
    TooShort {
        /// The function.
        address: Sbdf,
        /// How many there are.
        bytes: usize,
    },
    /// A VF whose PF was not given, or cannot have it.
    #[error(
        "{address}: it is a virtual function of {physical_function}, whose SR-IOV capability cannot be read"
    )]
    NoPhysicalFunction {
        /// The function.
        address: Sbdf,
        /// Its PF.
        physical_function: Sbdf,
    },
    /// The filter was compiled for another layout.
    #[error(
        "{address}: the filter was compiled for another layout ({filter:#018x}) than the function has ({function:#018x})"
    )]
    LayoutMismatch {
        /// The function.
        address: Sbdf,
        /// The layout that the filter belongs to.
        filter: u64,
        /// The layout of the function.
        function: u64,
    },
    /// Hardware could not be read.
    #[error("{address}: reading config space: {source}")]
    Read {
        /// The function.
        address: Sbdf,
        /// Why.
        source: std::io::Error,
    },
    /// The state file cannot be taken over.
    #[error(transparent)]
    Image(#[from] ImageError),
}
