//! Transactions on a simulated host: whatever fails, and whenever the service dies, no function ends up half with a guest.

mod crashes;
mod failures;
mod frontend;
mod guests;
mod world;
