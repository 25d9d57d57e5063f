//! Names what is below it, and what both belong to.

use super::Thing;
use crate::other;
use crate::parent::first;
