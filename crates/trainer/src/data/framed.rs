//! A host batch whose texts stand as the stage's model reads and writes them.

use std::ops::Range;

use blip2_data::HostBatch;

use crate::data::batch::TargetRule;

/// Rows of ids, padded on the right to a rectangle.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdRows {
    /// `[B, width]`, flat.
    pub ids: Vec<i64>,
    /// `[B]`: ids of each row without padding.
    pub lengths: Vec<usize>,
    /// Padded length.
    pub width: usize,
}

/// A batch and its texts; by default of no sample.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FramedBatch {
    /// The samples; `input_ids` are what the model reads.
    pub host: HostBatch,
    /// What an encoder-decoder's decoder writes; other models' targets are among what they read.
    pub written: Option<IdRows>,
}

impl IdRows {
    /// Pads rows to the longest, rounded up to `multiple`.
    ///
    /// # Panics
    /// When `multiple` is zero.
    pub(crate) fn padded(rows: &[Vec<i64>], pad_id: i64, multiple: usize) -> IdRows {
        let width = rows.iter().map(Vec::len).max().unwrap_or(0).next_multiple_of(multiple);
        let mut ids = Vec::with_capacity(rows.len() * width);
        for row in rows {
            let end = ids.len() + width;
            ids.extend(row);
            ids.resize(end, pad_id);
        }
        IdRows { ids, lengths: rows.iter().map(Vec::len).collect(), width }
    }

    /// Some of the rows, cut to the longest that is left, rounded up to `pad_to_multiple`.
    fn rows(&self, range: Range<usize>, pad_to_multiple: usize) -> IdRows {
        let lengths = self.lengths[range.clone()].to_vec();
        let longest = lengths.iter().copied().max().unwrap_or(0);
        let width = longest.next_multiple_of(pad_to_multiple).min(self.width);
        let ids = range.flat_map(|row| &self.ids[row * self.width..][..width]).copied().collect();
        IdRows { ids, lengths, width }
    }
}

impl From<HostBatch> for FramedBatch {
    fn from(host: HostBatch) -> FramedBatch {
        FramedBatch { host, written: None }
    }
}

impl FramedBatch {
    /// The samples of `range` as a batch of their own; texts are cut to the longest that is left, rounded up to `pad_to_multiple`.
    ///
    /// # Panics
    /// When the range reaches beyond the batch or `pad_to_multiple` is zero.
    pub fn rows(&self, range: Range<usize>, pad_to_multiple: usize) -> FramedBatch {
        FramedBatch {
            written: self.written.as_ref().map(|written| written.rows(range.clone(), pad_to_multiple)),
            host: self.host.rows(range, pad_to_multiple),
        }
    }

    /// The same with texts that are read padded up to `width`; wider ones stay.
    pub fn widened(mut self, width: usize, pad_id: i64) -> FramedBatch {
        let host = &mut self.host;
        if width > host.text_len {
            let rows = host.input_ids.chunks(host.text_len.max(1));
            let wider = |row: &[i64]| [row, &vec![pad_id; width - row.len()]].concat();
            host.input_ids = rows.flat_map(wider).collect();
            host.text_len = width;
        }
        self
    }

    /// The text that holds the targets: ids `[B, width]`, lengths, width.
    pub(crate) fn target_text(&self) -> (&[i64], &[usize], usize) {
        match &self.written {
            Some(written) => (&written.ids, &written.lengths, written.width),
            None => (&self.host.input_ids, &self.host.lengths, self.host.text_len),
        }
    }

    /// How many targets the texts have.
    pub(crate) fn target_count(&self, rule: TargetRule) -> usize {
        rule.count(self.target_text().1)
    }

    /// The target text with -100 at all that is no target, `[B, width]`.
    pub fn labels(&self, rule: TargetRule) -> Vec<i64> {
        let (ids, lengths, width) = self.target_text();
        let row = |(row, &length): (usize, &usize)| {
            (0..width).map(move |t| if (rule.untargeted..length).contains(&t) { ids[row * width + t] } else { -100 })
        };
        lengths.iter().enumerate().flat_map(row).collect()
    }
}
