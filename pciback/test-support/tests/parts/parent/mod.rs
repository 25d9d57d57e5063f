//! Names its parts, as it may.

mod first;
mod second;

pub use first::Thing;
