//! xpci
fn main() {}
