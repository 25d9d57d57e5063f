//! xpcid
fn main() {}
