//! A micro-batch on the device: what a task's forward pass takes.

use blip2_model::Dropout;
use blip2_model::dropout::DropoutRates;
use blip2_model::qformer::TextBatch;
use blip2_torchx::pinned::to_device;
use blip2_torchx::rng::finalise;
use tch::{Device, Kind, Tensor};

use crate::data::framed::FramedBatch;
use crate::error::Error;

/// Samples, ready for a forward pass.
#[derive(Debug)]
pub struct Batch {
    /// Output of the frozen image encoder, `[B, N, width]`.
    pub features: Tensor,
    /// What the model reads, right-padded.
    pub text: TextBatch,
    /// Rows with a target, and the targets.
    pub targets: Targets,
    /// Equal for the same image, `i64 [B]`.
    pub image_ids: Tensor,
    /// Stream positions, which key dropout, `i64 [B]`.
    pub positions: Tensor,
    /// What hard negatives are drawn with.
    pub negatives: Negatives,
    /// How the means over this micro-batch weigh in the global batch.
    pub share: Share,
    /// A dtype that holds the features exactly, in which they are sent to other ranks.
    pub sent_as: Kind,
}

/// The text that holds the targets, and which of its tokens they are.
#[derive(Debug)]
pub struct Targets {
    /// Right-padded ids, `i64 [B, T]`: what the model reads, but for an encoder-decoder, whose decoder writes another text.
    pub ids: Tensor,
    /// Flat positions in `[B, T]` of the labelled tokens, `i64 [M]`.
    pub positions: Tensor,
    /// The tokens there, `i64 [M]`.
    pub labels: Tensor,
    /// M.
    pub count: usize,
}

/// Hard negatives of ITM.
#[derive(Debug)]
pub enum Negatives {
    /// Drawn by similarity: uniform numbers in [0, 1) for images and for texts, `f32 [B]` each.
    Sample(Tensor, Tensor),
    /// Given (replay): indices of images and of texts, `i64 [B]` each.
    Given(Tensor, Tensor),
}

/// A micro-batch's part of the global batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Share {
    /// Its samples over all samples.
    pub samples: f64,
    /// Its labelled tokens over all labelled tokens.
    pub tokens: f64,
}

impl Share {
    /// All of it.
    pub const WHOLE: Share = Share { samples: 1.0, tokens: 1.0 };
}

/// Where the targets of a text lie, by stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TargetRule {
    /// Tokens at the beginning of each text that are no targets: 1 in stage 1 (`[DEC]`), the prompt's length in stage 2.
    pub untargeted: usize,
}

impl TargetRule {
    /// How many targets these texts have.
    pub fn count(self, lengths: &[usize]) -> usize {
        lengths.iter().map(|l| l.saturating_sub(self.untargeted)).sum()
    }
}

impl Batch {
    /// Moves a host batch to the device.
    ///
    /// # Errors
    /// When the device refuses.
    pub fn new(
        framed: &FramedBatch,
        features: Tensor,
        rule: TargetRule,
        share: Share,
        seed: u64,
    ) -> Result<Batch, Error> {
        let device = features.device();
        let host = &framed.host;
        let (rows, tokens) = (host.size as i64, host.text_len as i64);
        let ids = to_device(&host.input_ids, &[rows, tokens], device)?;
        let lengths: Vec<i64> = host.lengths.iter().map(|&l| l as i64).collect();
        let mask = Tensor::arange(tokens, (Kind::Int64, device)).unsqueeze(0).lt_tensor(&to_device(
            &lengths,
            &[rows, 1],
            device,
        )?);
        let as_i64 = |values: &[u64]| values.iter().map(|&v| v as i64).collect::<Vec<_>>();
        let uniform = |direction: u64| -> Vec<f32> {
            host.positions.iter().map(|&p| keyed_uniform(seed, p, direction)).collect()
        };
        Ok(Batch {
            targets: Targets::new(framed.target_text(), rule, device)?,
            text: TextBatch { ids, mask },
            image_ids: to_device(&as_i64(&host.image_id), &[rows], device)?,
            positions: to_device(&as_i64(&host.positions), &[rows], device)?,
            negatives: Negatives::Sample(
                to_device(&uniform(0), &[rows], device)?,
                to_device(&uniform(1), &[rows], device)?,
            ),
            sent_as: features.kind(),
            features,
            share,
        })
    }

    /// The same with features that are sent to other ranks in this dtype, which holds them exactly.
    pub fn sent_as(self, kind: Kind) -> Batch {
        Batch { sent_as: kind, ..self }
    }

    /// Samples.
    pub fn size(&self) -> i64 {
        self.text.batch()
    }

    /// The dropout of this batch's forward pass.
    pub fn dropout(&self, p: f64, seed: u64) -> Dropout {
        Dropout::keyed(p, seed, self.positions.shallow_clone())
    }

    /// The dropout inside the frozen language model.
    pub(crate) fn language_dropout(&self, rates: DropoutRates, seed: u64) -> Dropout {
        Dropout::keyed_in_language_model(rates, seed, self.positions.shallow_clone())
    }
}

impl Targets {
    fn new(
        (ids, lengths, width): (&[i64], &[usize], usize),
        rule: TargetRule,
        device: Device,
    ) -> Result<Targets, Error> {
        let positions: Vec<i64> = lengths
            .iter()
            .enumerate()
            .flat_map(|(row, &length)| (rule.untargeted..length).map(move |t| (row * width + t) as i64))
            .collect();
        let labels: Vec<i64> = positions.iter().map(|&p| ids[p as usize]).collect();
        let count = positions.len();
        Ok(Targets {
            ids: to_device(ids, &[lengths.len() as i64, width as i64], device)?,
            positions: to_device(&positions, &[count as i64], device)?,
            labels: to_device(&labels, &[count as i64], device)?,
            count,
        })
    }

    /// From labels `i64 [B, T]` in which -100 marks what is no target; `pad_id` takes its place where the labels are read as a text.
    pub fn from_labels(labels: &Tensor, pad_id: i64) -> Targets {
        let positions = blip2_model::stage2::labelled_positions(labels, -100);
        let count = positions.size()[0] as usize;
        let ids = labels.masked_fill(&labels.eq(-100), pad_id);
        Targets { ids, labels: labels.flatten(0, 1).index_select(0, &positions), positions, count }
    }
}

/// A number in [0, 1) that is a function of seed, stream position and direction (splitmix64's finaliser, 24 bits).
pub(crate) fn keyed_uniform(seed: u64, position: u64, direction: u64) -> f32 {
    let z = (seed ^ 0x1F83_D9AB_FB41_BD6B)
        .wrapping_mul(0x9E37_79B9_7F4A_7C15)
        .wrapping_add(position.wrapping_mul(2).wrapping_add(direction).wrapping_mul(0xD1B5_4A32_D192_ED03));
    (finalise(z) >> 40) as f32 / (1u32 << 24) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uniform_numbers_fill_the_unit_interval_and_directions_differ() {
        let draws: Vec<f32> = (0..10_000).map(|p| keyed_uniform(7, p, 0)).collect();
        assert!(draws.iter().all(|u| (0.0..1.0).contains(u)));
        let mean = draws.iter().sum::<f32>() / 1e4;
        assert!((mean - 0.5).abs() < 0.01, "{mean}");
        assert_ne!(keyed_uniform(7, 3, 0), keyed_uniform(7, 3, 1));
        assert_ne!(keyed_uniform(7, 3, 0), keyed_uniform(8, 3, 0));
    }

    #[test]
    fn targets_are_the_tokens_behind_the_untargeted_ones() {
        let ids = [9, 1, 2, 0, 9, 3, 0, 0];
        let targets = Targets::new((&ids, &[3, 2], 4), TargetRule { untargeted: 1 }, Device::Cpu).unwrap();
        assert_eq!(Vec::<i64>::try_from(&targets.positions).unwrap(), [1, 2, 5]);
        assert_eq!(Vec::<i64>::try_from(&targets.labels).unwrap(), [1, 2, 3]);
        assert_eq!(TargetRule { untargeted: 1 }.count(&[3, 2]), 3);
    }
}
