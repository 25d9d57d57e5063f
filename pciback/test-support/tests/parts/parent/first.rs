//! Names what is above it.

use super::second::Other;
