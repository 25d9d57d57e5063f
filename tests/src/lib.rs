//! System tests of xpci.
