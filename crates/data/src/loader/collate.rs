//! Samples side by side: the batch as the host holds it.

use std::ops::Range;

use crate::feature_store::FeatureRow;
use crate::loader::sample::Sample;

/// A batch in plain memory, before any tensor; by default of no sample.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostBatch {
    /// Stream position of the first sample; in evaluation its index in the data set.
    pub position: u64,
    /// Number of samples, B.
    pub size: usize,
    /// Side of the images, S.
    pub image_size: usize,
    /// `[B, 3, S, S]`; `None` when no image was decoded, their features being cached. Zeros where a sample's was not.
    pub pixels: Option<Vec<u8>>,
    /// `[B]` with a feature store, else empty.
    pub features: Vec<FeatureRow>,
    /// `[B, L]`, padded on the right.
    pub input_ids: Vec<i64>,
    /// `[B]`: tokens of each text without padding.
    pub lengths: Vec<usize>,
    /// Padded length, L.
    pub text_len: usize,
    /// `[B]`: the samples' indices in the data set, those of the replacements where samples were bad.
    pub sample_index: Vec<u64>,
    /// `[B]`: equal for the same image file.
    pub image_id: Vec<u64>,
    /// `[B]`: the cleaned captions.
    pub captions: Vec<String>,
    /// `[B]`: where captions are questions, people's answers to each.
    pub answers: Vec<Vec<String>>,
    /// `[B]`: the samples' stream positions; in evaluation their indices.
    pub positions: Vec<u64>,
    /// Epoch of the first sample.
    pub epoch: u64,
}

/// How texts become a rectangle.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Padding {
    pub(crate) id: i64,
    pub(crate) multiple: usize,
}

impl Padding {
    fn length(self, lengths: &[usize]) -> usize {
        lengths.iter().copied().max().unwrap_or(0).next_multiple_of(self.multiple)
    }
}

/// One batch of samples and their positions.
pub(crate) fn collate(samples: Vec<(u64, Sample)>, epoch: u64, image_size: usize, padding: Padding) -> HostBatch {
    let lengths: Vec<usize> = samples.iter().map(|(_, sample)| sample.ids.len()).collect();
    let text_len = padding.length(&lengths);
    let mut batch = HostBatch {
        position: samples.first().map_or(0, |(position, _)| *position),
        size: samples.len(),
        image_size,
        pixels: None,
        features: Vec::new(),
        input_ids: Vec::with_capacity(samples.len() * text_len),
        lengths,
        text_len,
        sample_index: Vec::with_capacity(samples.len()),
        image_id: Vec::with_capacity(samples.len()),
        captions: Vec::with_capacity(samples.len()),
        answers: Vec::with_capacity(samples.len()),
        positions: Vec::with_capacity(samples.len()),
        epoch,
    };
    let size = batch.size;
    for (row, (position, sample)) in samples.into_iter().enumerate() {
        let row_end = batch.input_ids.len() + text_len;
        batch.input_ids.extend(sample.ids.iter().map(|&id| i64::from(id)));
        batch.input_ids.resize(row_end, padding.id);
        if let Some(pixels) = sample.pixels {
            let all = batch.pixels.get_or_insert_with(|| vec![0; size * pixels.len()]);
            all[row * pixels.len()..][..pixels.len()].copy_from_slice(&pixels);
        }
        batch.features.extend(sample.features);
        batch.sample_index.push(sample.index);
        batch.image_id.push(sample.image_id);
        batch.captions.push(sample.caption);
        batch.answers.push(sample.answers);
        batch.positions.push(position);
    }
    batch
}

impl HostBatch {
    /// The rows `range` as a batch of their own, for accumulation; texts are cut to the longest that is left, rounded
    /// up to `pad_to_multiple`.
    ///
    /// # Panics
    /// When the range reaches beyond the batch or `pad_to_multiple` is zero.
    pub fn rows(&self, range: Range<usize>, pad_to_multiple: usize) -> HostBatch {
        let lengths = self.lengths[range.clone()].to_vec();
        let longest = lengths.iter().copied().max().unwrap_or(0);
        let text_len = longest.next_multiple_of(pad_to_multiple).min(self.text_len);
        let image_len = 3 * self.image_size * self.image_size;
        HostBatch {
            position: self.positions[range.start],
            size: range.len(),
            image_size: self.image_size,
            pixels: self.pixels.as_ref().map(|all| all[range.start * image_len..range.end * image_len].to_vec()),
            // Empty without a store.
            features: self.features.get(range.clone()).map(<[_]>::to_vec).unwrap_or_default(),
            input_ids: range
                .clone()
                .flat_map(|row| &self.input_ids[row * self.text_len..][..text_len])
                .copied()
                .collect(),
            lengths,
            text_len,
            sample_index: self.sample_index[range.clone()].to_vec(),
            image_id: self.image_id[range.clone()].to_vec(),
            captions: self.captions[range.clone()].to_vec(),
            answers: self.answers[range.clone()].to_vec(),
            positions: self.positions[range].to_vec(),
            epoch: self.epoch,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(index: u64, ids: &[u32]) -> (u64, Sample) {
        let sample = Sample {
            index,
            image_id: index + 100,
            pixels: Some(vec![index as u8; 3]),
            features: None,
            ids: ids.to_vec(),
            caption: format!("caption {index}"),
            answers: vec![format!("answer {index}")],
        };
        (index + 1000, sample)
    }

    fn batch() -> HostBatch {
        let samples = vec![sample(1, &[5, 6]), sample(2, &[7]), sample(3, &[8, 9, 10, 11, 12])];
        collate(samples, 4, 1, Padding { id: -1, multiple: 4 })
    }

    #[test]
    fn texts_are_padded_on_the_right_to_a_multiple() {
        let batch = batch();
        assert_eq!((batch.size, batch.text_len, batch.position, batch.epoch), (3, 8, 1001, 4));
        assert_eq!(batch.lengths, [2, 1, 5]);
        assert_eq!(batch.input_ids[..8], [5, 6, -1, -1, -1, -1, -1, -1]);
        assert_eq!(batch.input_ids[16..], [8, 9, 10, 11, 12, -1, -1, -1]);
        assert_eq!(batch.pixels.unwrap(), [1, 1, 1, 2, 2, 2, 3, 3, 3]);
    }

    #[test]
    fn rows_are_a_batch_of_their_own() {
        let rows = batch().rows(0..2, 2);
        assert_eq!((rows.size, rows.text_len, rows.position), (2, 2, 1001));
        assert_eq!(rows.input_ids, [5, 6, 7, -1]);
        assert_eq!(rows.pixels.unwrap(), [1, 1, 1, 2, 2, 2]);
        assert_eq!((rows.sample_index, rows.image_id, rows.positions), (vec![1, 2], vec![101, 102], vec![1001, 1002]));
        assert_eq!(rows.answers, [["answer 1"], ["answer 2"]]);
        assert_eq!(batch().rows(0..3, 4), batch());
    }
}
