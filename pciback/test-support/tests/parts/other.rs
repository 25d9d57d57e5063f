//! Not a part of `parent`.
