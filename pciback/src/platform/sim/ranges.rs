//! Sets of numbers as disjoint ranges: a BAR may have millions of page frames.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Numbers, by the first of each range with the one after its last.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Ranges(BTreeMap<u64, u64>);

impl Ranges {
    pub fn insert(&mut self, first: u64, end: u64) {
        let (mut start, mut stop) = (first, end);
        let joined: Vec<u64> = self
            .0
            .range(..=end)
            .rev()
            .take_while(|(_, stop)| **stop >= first)
            .map(|(start, _)| *start)
            .collect();
        for key in joined {
            if let Some(other) = self.0.remove(&key) {
                start = start.min(key);
                stop = stop.max(other);
            }
        }
        self.0.insert(start, stop);
    }

    pub fn remove(&mut self, first: u64, end: u64) {
        let cut: Vec<(u64, u64)> = self
            .0
            .range(..end)
            .rev()
            .take_while(|(_, stop)| **stop > first)
            .map(|(start, stop)| (*start, *stop))
            .collect();
        for (start, stop) in cut {
            self.0.remove(&start);
            if start < first {
                self.0.insert(start, first);
            }
            if stop > end {
                self.0.insert(end, stop);
            }
        }
    }

    pub fn iter(&self) -> impl Iterator<Item = (u64, u64)> {
        self.0.iter().map(|(start, end)| (*start, *end))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    proptest::proptest! {
        #[test]
        fn equals_a_set_of_single_numbers(steps in proptest::collection::vec((0u64..60, 1u64..20, proptest::bool::ANY), 0..40)) {
            let (mut ranges, mut naive) = (Ranges::default(), BTreeSet::new());
            for (first, count, insert) in steps {
                if insert {
                    ranges.insert(first, first + count);
                    naive.extend(first..first + count);
                } else {
                    ranges.remove(first, first + count);
                    naive.retain(|number| !(first..first + count).contains(number));
                }
            }
            let flat: Vec<u64> = ranges.iter().flat_map(|(start, end)| start..end).collect();
            assert_eq!(flat, naive.into_iter().collect::<Vec<_>>());
            let starts: Vec<_> = ranges.iter().collect();
            assert!(starts.windows(2).all(|pair| pair[0].1 < pair[1].0));
        }
    }
}
