//! The mailbox between the driver of a VF and the owner of its PF: data objects (PCI Express 6.0, section 6.30) through a Data Object
//! Exchange that hardware does not have. Pure: what a guest writes becomes requests, requests become messages in queues, and all of it
//! is in a mapped file, so that it survives a killed service.

mod image;
mod instance;
mod object;
mod queue;

pub use image::{InstanceImage, InstanceState, MAILBOX_BYTES, MailboxImageError, Origin, mailbox_memory};
pub use instance::{Exchanged, Instance, MOST_DWORDS};
pub use object::{DATA_LIMIT, Message, Request, Status, VENDOR};
pub use queue::{Direction, QUEUE_LENGTH, Queues};
