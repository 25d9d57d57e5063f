//! Names what is above it.

use crate::high;
