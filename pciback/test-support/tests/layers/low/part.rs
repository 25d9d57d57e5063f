//! Belongs to `low`, and names what is above that.

use super::super::high::{self as above, inner::Thing};
