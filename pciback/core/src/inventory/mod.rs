//! Bringing sysfs, Xen and xenstore into step: what they say now, what is wanted, and the repairs that lead there.
//!
//! Pure: the caller reads the three lists into an [`Observed`], makes a [`Wanted`] of its records, and carries out the [`Plan`]
//! one step after the other. What the repairs do is said at [`Repair`]; which of Xen's rules their order respects, at [`plan`].
//! A plan that was carried out leads to lists over which the next plan is empty; one that was carried out in part, or over
//! lists that changed in between, is discarded and made again.
//!
//! ```
//! use xpci_core::Sbdf;
//! use xpci_core::inventory::{Function, HostView, Observed, Wanted, plan};
//! // sysfs shows a function that was never reported to Xen.
//! let pf: Sbdf = "0000:01:00.0".parse()?;
//! let mut observed = Observed::default();
//! observed.functions.insert(pf, Function { host: Some(HostView::default()), ..Function::default() });
//! let plan = plan(&observed, &Wanted::default());
//! assert_eq!(plan.to_string(), "1. report 0000:01:00.0 to Xen: sysfs shows it, Xen does not know it\n");
//! # Ok::<(), xpci_core::SbdfError>(())
//! ```

mod lists;
mod observed;
mod planner;
mod repair;
#[cfg(test)]
mod tests;
mod wanted;

pub use observed::{Function, HostView, Identity, Observed, Owner, Published};
pub use planner::plan;
pub use repair::{Left, Plan, Reason, Remark, Repair, ReportKind, Step};
pub use wanted::{GuestPlace, Intent, Want, Wanted};
