//! The page frames of a BAR that are mapped into the guest, in the parts in which that is done.

use super::bars::{self, Part};
use crate::config::{Bar, BarKind, MsixCapability};
use crate::platform::PAGE;

/// How many page frames are mapped at once, 16 MiB: Xen is asked for each of them, which takes milliseconds.
pub(super) const AT_ONCE: u64 = 4096;

/// Page frames that are mapped at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    /// Where they begin in the BAR, in bytes.
    pub offset: u64,
    /// How many they are.
    pub count: u64,
}

/// The page frames of a BAR that are mapped, in order.
pub(super) struct Frames(Vec<Part>);

impl Frames {
    pub fn of(bar: &Bar, msix: Option<&MsixCapability>) -> Self {
        if bar.kind == BarKind::Io {
            return Self(Vec::new());
        }
        Self(bars::parts(bar, msix).mapped)
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.0.iter().map(|part| part.bytes / PAGE).sum()
    }

    /// Those that come after the first `done`.
    pub fn next(&self, done: u64) -> Option<Run> {
        let mut skipped = done;
        for Part { offset, bytes } in &self.0 {
            let count = bytes / PAGE;
            if skipped < count {
                return Some(Run { offset: offset + skipped * PAGE, count: (count - skipped).min(AT_ONCE) });
            }
            skipped -= count;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_mapped_in_bounded_runs_that_leave_the_msix_table_out() {
        let bar =
            Bar { index: 0, kind: BarKind::Memory64, prefetchable: true, start: 1 << 40, size: 64 << 20 };
        let msix = MsixCapability {
            offset: 0x70,
            table_size: 8,
            table_bar: 0,
            table_offset: 0x100_1000,
            pba_bar: 0,
            pba_offset: 0x100_1800,
        };
        let frames = Frames::of(&bar, Some(&msix));
        assert_eq!(frames.count(), (64 << 20) / PAGE - 1);
        let (mut runs, mut done) = (Vec::new(), 0);
        while let Some(run) = frames.next(done) {
            done += run.count;
            runs.push((run.offset, run.count));
        }
        assert_eq!(
            runs,
            [
                (0, AT_ONCE),
                (0x100_0000, 1),
                (0x100_2000, AT_ONCE),
                (0x200_2000, AT_ONCE),
                (0x300_2000, AT_ONCE - 2),
            ]
        );
        let io = Bar { kind: BarKind::Io, ..bar };
        assert_eq!((Frames::of(&io, None).count(), Frames::of(&io, None).next(0)), (0, None));
    }
}
