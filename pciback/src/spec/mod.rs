//! The PCI specification as data: offsets, ids and bits, with the section they come from. No behaviour.
