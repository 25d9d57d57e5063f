//! What was measured, and how it is shown.

use std::fmt::Write as _;

/// Which way a figure should go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Better {
    /// A rate.
    More,
    /// A duration.
    Less,
}

/// One figure of both peers, a pair for each round.
#[derive(Debug)]
pub struct Comparison {
    name: &'static str,
    better: Better,
    ours: Vec<f64>,
    theirs: Vec<f64>,
}

impl Comparison {
    pub fn new(name: &'static str, better: Better) -> Self {
        Self { name, better, ours: Vec::new(), theirs: Vec::new() }
    }

    /// What one round showed.
    pub fn add(&mut self, ours: f64, theirs: f64) {
        self.ours.push(ours);
        self.theirs.push(theirs);
    }

    pub fn has_rounds(&self) -> bool {
        !self.ours.is_empty()
    }

    /// Of each round on its own: what disturbs a round disturbs both peers in it.
    fn ratios(&self) -> Vec<f64> {
        self.ours.iter().zip(&self.theirs).map(|(ours, theirs)| ours / theirs).collect()
    }
}

/// The least, the median and the greatest of some figures; `None` of none.
fn spread(values: &[f64]) -> Option<(f64, f64, f64)> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    let median = match sorted.len() % 2 {
        0 => f64::midpoint(*sorted.get(middle.checked_sub(1)?)?, sorted[middle]),
        _ => sorted[middle],
    };
    Some((*sorted.first()?, median, *sorted.last()?))
}

/// The median, and in parentheses the least and the greatest.
pub fn shown(values: &[f64], digits: usize) -> String {
    spread(values).map_or_else(
        || "-".to_owned(),
        |(least, median, most)| format!("{median:.digits$} ({least:.digits$}..{most:.digits$})"),
    )
}

/// All figures, one a line.
pub fn table(comparisons: &[Comparison]) -> String {
    let mut text =
        format!("{:<18}{:<24}{:<24}{:<24}{:<11}{}\n", "", "xpci", "xl", "xpci / xl", "better is", "rounds");
    for comparison in comparisons {
        _ = writeln!(
            text,
            "{:<18}{:<24}{:<24}{:<24}{:<11}{}",
            comparison.name,
            shown(&comparison.ours, 0),
            shown(&comparison.theirs, 0),
            shown(&comparison.ratios(), 2),
            match comparison.better {
                Better::More => "more",
                Better::Less => "less",
            },
            comparison.ours.len()
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_and_the_extremes_come_from_sorted_figures() {
        assert_eq!(spread(&[3.0, 1.0, 2.0]), Some((1.0, 2.0, 3.0)));
        assert_eq!(spread(&[4.0, 1.0, 2.0, 3.0]), Some((1.0, 2.5, 4.0)));
        assert_eq!(spread(&[]), None);
    }

    #[test]
    fn ratios_are_taken_within_a_round() {
        let mut figure = Comparison::new("figure", Better::Less);
        figure.add(1.0, 2.0);
        figure.add(30.0, 10.0);
        assert_eq!(figure.ratios(), [0.5, 3.0]);
        let table = table(&[figure]);
        assert!(table.contains("1.75 (0.50..3.00)"), "{table}");
    }
}
