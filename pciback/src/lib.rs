//! What a Xen guest may see and do with a PCI function, and how that is served.
