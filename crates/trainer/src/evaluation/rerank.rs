//! The matching scores that retrieval is re-ranked by (BLIP-2, section 4.4): ITM's logit of "matches", the mean over the queries, as it is,
//! beside ITC's cosine without its temperature (LAVIS).
//!
//! Both directions' pairs are computed together, image after image: an image's keys are projected once and read by all texts that it is
//! matched with, in batches of bounded size.

use std::collections::HashSet;

use blip2_model::Stage1;
use blip2_model::qformer::TextBatch;
use blip2_torchx::autocast::autocast;
use tch::{Device, Kind, Tensor};

use crate::data::batch::Batch;

/// Pairs that are matched at once.
const PAIRS_AT_ONCE: usize = 128;

/// What matching takes of a held-out set: every image's features and every text.
#[derive(Debug, Default)]
pub struct Gallery {
    /// `[1, N, width]` each, in the host's memory and in a dtype that holds them exactly.
    images: Vec<Tensor>,
    seen: HashSet<u64>,
    /// As they came, on the device.
    texts: Vec<TextBatch>,
}

impl Gallery {
    /// Keeps a batch's texts, and its images but for those that were there before; `image_ids` are equal for the same image.
    ///
    /// An image takes `N * width` numbers: 0.7 MB behind ViT-g in bf16 at 224 pixels.
    pub fn add(&mut self, batch: &Batch, image_ids: &[u64]) {
        let features = batch.features.to_kind(batch.sent_as).to_device(Device::Cpu);
        for (image, &id) in features.split(1, 0).iter().zip(image_ids) {
            if self.seen.insert(id) {
                // A part of the batch would keep all of it.
                self.images.push(image.copy());
            }
        }
        self.texts.push(TextBatch { ids: batch.text.ids.shallow_clone(), mask: batch.text.mask.shallow_clone() });
    }

    /// Scores of each image with the texts that `pairs` names for it, in their order. Texts are numbered as they came, images by their
    /// first appearance. `tell` hears how many pairs are done of all.
    pub fn match_pairs(
        &self,
        model: &Stage1,
        pairs: &[Vec<usize>],
        precision: Option<Kind>,
        tell: &dyn Fn(u64, u64),
    ) -> Vec<Vec<f32>> {
        let device = model.temp.device();
        let texts = Texts::new(&self.texts);
        let all: usize = pairs.iter().map(Vec::len).sum();
        let mut done = 0;
        tell(0, all as u64);
        // One region keeps the casts of the parameters for all pairs.
        tch::no_grad(|| {
            autocast(device, precision, || {
                let of_image = |(features, wanted): (&Tensor, &Vec<usize>)| {
                    let keys = model.image_keys(&features.to_device(device).to_kind(Kind::Float));
                    let mut scores = vec![f32::NAN; wanted.len()];
                    // Texts of like length together, so that little is padding.
                    let mut order: Vec<usize> = (0..wanted.len()).collect();
                    order.sort_by_key(|&at| (texts.lengths[wanted[at]], at));
                    for places in order.chunks(PAIRS_AT_ONCE) {
                        let chosen: Vec<usize> = places.iter().map(|&at| wanted[at]).collect();
                        let logits = model.match_texts(&keys, &texts.select(&chosen)).select(1, 1);
                        let logits = Vec::<f32>::try_from(logits.to_device(Device::Cpu)).expect("f32 [P]");
                        places.iter().zip(logits).for_each(|(&at, logit)| scores[at] = logit);
                        done += places.len();
                        tell(done as u64, all as u64);
                    }
                    scores
                };
                self.images.iter().zip(pairs).map(of_image).collect()
            })
        })
    }
}

/// All texts in one batch.
struct Texts {
    all: TextBatch,
    lengths: Vec<i64>,
}

impl Texts {
    fn new(batches: &[TextBatch]) -> Texts {
        let width = batches.iter().map(TextBatch::tokens).max().unwrap_or(0);
        // Nothing attends to padding, so it may be any id.
        let batches: Vec<TextBatch> = batches.iter().map(|batch| batch.widened(width, 0)).collect();
        let all = TextBatch::cat(&batches.iter().collect::<Vec<_>>());
        let lengths = all.mask.sum_dim_intlist([1i64].as_slice(), false, Kind::Int64);
        Texts { lengths: Vec::try_from(lengths.to_device(Device::Cpu)).expect("i64 [texts]"), all }
    }

    /// These texts, as wide as their longest.
    fn select(&self, chosen: &[usize]) -> TextBatch {
        let longest = chosen.iter().map(|&text| self.lengths[text]).max().unwrap_or(0);
        let rows: Vec<i64> = chosen.iter().map(|&text| text as i64).collect();
        self.all.select(&Tensor::from_slice(&rows).to_device(self.all.ids.device())).truncated(longest.max(1))
    }
}
