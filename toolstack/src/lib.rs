//! The xpci service and command.
