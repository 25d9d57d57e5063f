//! What the tests of several crates share. It is for tests only: no crate of the product depends on it but for its tests.

pub mod layers;
pub mod meaning;
pub mod oracle;
pub mod reviewed;
pub mod schema;
