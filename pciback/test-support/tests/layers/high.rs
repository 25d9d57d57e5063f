//! Names nothing.
