//! The pages that are shared with a guest's driver or with Xen, as `xen/io/pciif.h` and `xen/hvm/ioreq.h` lay them out.

pub mod ioreq;
pub mod pciif;
