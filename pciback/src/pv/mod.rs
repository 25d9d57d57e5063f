//! Serving PV guests: the pciif protocol, its xenstore handshake and the thread that serves one guest.
