//! Which samples of a data set are learned from: bounds on what the shards say of them.
//!
//! A filter is decided once, from numbers that are kept beside the shards' indices, so the samples that pass it are the
//! data set and the order law holds for them.

use std::fmt;
use std::ops::RangeInclusive;

use crate::dataset::attributes::{Attributes, Column};
use crate::text::caption::JsonPath;

/// Bounds of one number; a side that is not given is open.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Bounds {
    /// The smallest value that passes.
    pub min: Option<f64>,
    /// The largest value that passes.
    pub max: Option<f64>,
}

impl Bounds {
    /// Whether every value passes.
    pub fn is_open(&self) -> bool {
        *self == Bounds::default()
    }

    fn range(self) -> RangeInclusive<f64> {
        self.min.unwrap_or(f64::NEG_INFINITY)..=self.max.unwrap_or(f64::INFINITY)
    }
}

/// What a sample must be to be learned from.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SampleFilter {
    /// Pixels a row.
    pub width: Bounds,
    /// Rows.
    pub height: Bounds,
    /// Longer side over shorter side, at least 1.
    pub aspect: Bounds,
    /// Words of the caption as it stands in the shard; of several captions, the first.
    pub caption_words: Bounds,
    /// Numbers in the `.json` member; one that is missing does not pass.
    pub json: Vec<(JsonPath, Bounds)>,
}

/// How many samples a filter has let through.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Passed {
    /// Samples that pass.
    pub passed: u64,
    /// All samples.
    pub of: u64,
}

impl fmt::Display for Passed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} samples pass the filter", self.passed, self.of)
    }
}

impl SampleFilter {
    /// Whether every sample passes.
    pub fn is_open(&self) -> bool {
        self.columns().is_empty()
    }

    /// The numbers that it is decided by.
    pub(crate) fn columns(&self) -> Vec<Column> {
        let sides = !self.width.is_open() || !self.height.is_open() || !self.aspect.is_open();
        let sides = [Column::Width, Column::Height].into_iter().filter(|_| sides);
        let words = [Column::CaptionWords].into_iter().filter(|_| !self.caption_words.is_open());
        let json = self.json.iter().filter(|(_, bounds)| !bounds.is_open());
        sides.chain(words).chain(json.map(|(path, _)| Column::Json(path.clone()))).collect()
    }

    /// The places in a shard's index of the samples that pass.
    pub(crate) fn select(&self, attributes: &Attributes, samples: usize) -> Vec<u32> {
        let json: Vec<(Column, RangeInclusive<f64>)> =
            self.json.iter().map(|(path, bounds)| (Column::Json(path.clone()), bounds.range())).collect();
        let passes = |at: usize| {
            let within = |column: &Column, range: &RangeInclusive<f64>| {
                attributes.value(column, at).is_some_and(|value| range.contains(&value))
            };
            let holds = |column: Column, bounds: Bounds| bounds.is_open() || within(&column, &bounds.range());
            let aspect = || {
                let (width, height) = (attributes.value(&Column::Width, at)?, attributes.value(&Column::Height, at)?);
                Some(width.max(height) / width.min(height))
            };
            holds(Column::Width, self.width)
                && holds(Column::Height, self.height)
                && (self.aspect.is_open() || aspect().is_some_and(|aspect| self.aspect.range().contains(&aspect)))
                && holds(Column::CaptionWords, self.caption_words)
                && json.iter().all(|(column, range)| within(column, range))
        };
        (0..samples).filter(|&at| passes(at)).map(|at| at as u32).collect()
    }
}
