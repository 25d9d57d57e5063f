//! The virtual config space of a function. Pure: bytes in, bytes out.

pub mod access;

pub use access::{Access, AccessError, ConfigSpace, Width};
