//! Image-text retrieval on held-out data (BLIP-2, section 4.4): every image against every text.

use std::collections::HashSet;

use blip2_losses::itc;
use blip2_metrics::Shortlists;
use blip2_torchx::autocast::autocast;
use tch::{Device, Kind, Tensor};

use super::{Evaluation, Gallery, HeldOut, Means, RECALL_RANKS, SampleText};
use crate::error::Error;
use crate::ranks::{Alone, gather_uneven, share};
use crate::task::{ForwardOptions, Stage1Task, Task};

/// Images whose similarities to all texts are computed at once.
const RETRIEVAL_ROWS: i64 = 256;

/// Stage 1's losses, and recall by ITC similarity over all of the set; by ITC and ITM where that is asked for.
///
/// # Errors
/// When held-out samples cannot be read, or a rank is lost.
pub(crate) fn retrieval(task: &Stage1Task, held_out: &mut HeldOut, pass: &ForwardOptions) -> Result<Evaluation, Error> {
    tch::no_grad(|| {
        let pass = ForwardOptions { dropout: 0.0, ..*pass };
        let mut means = Means::default();
        let mut gallery = (held_out.rerank() > 0).then(Gallery::default);
        let (mut images, mut texts, mut captions, mut indices, mut ids) = (vec![], vec![], vec![], vec![], vec![]);
        while let Some(batch) = held_out.next_batch() {
            let (batch, host) = batch?;
            // A batch of one has no negative.
            if host.size > 1 {
                means.add(&task.forward(&batch, &pass, &Alone)?.metrics, host.size);
            }
            let device = batch.features.device();
            autocast(device, pass.autocast, || {
                images.push(task.model.embed_images(&batch.features));
                texts.push(task.model.embed_texts(&batch.text));
            });
            if let Some(gallery) = &mut gallery {
                gallery.add(&batch, &host.image_id);
            }
            captions.extend(host.captions);
            indices.extend(host.sample_index);
            ids.extend(host.image_id);
        }
        let ranks = held_out.ranks();
        let device = task.model.temp.device();
        let (images, texts) = (gather_uneven(ranks, &images, device)?, gather_uneven(ranks, &texts, device)?);
        let captions: Vec<String> = share(ranks, &captions)?.concat();
        let (indices, ids): (Vec<u64>, Vec<u64>) = (share(ranks, &indices)?.concat(), share(ranks, &ids)?.concat());
        let scalars = means.finish(ranks)?;
        let mut evaluation = Evaluation { samples: captions.len(), scalars, ..Default::default() };
        // What follows is for the one who writes it down.
        if captions.is_empty() || !held_out.retrieval() || !ranks.is_first() {
            return Ok(evaluation);
        }
        let distinct = first_of_each(&ids);
        let image_ids: Vec<u64> = distinct.iter().map(|&row| ids[row as usize]).collect();
        let images = images.index_select(0, &Tensor::from_slice(&distinct).to_device(device));
        let rows = images.split(RETRIEVAL_ROWS, 0);
        let rows: Vec<Tensor> = rows.iter().map(|images| itc::best_query(images, &texts)).collect();
        let similarity = Tensor::cat(&rows, 0);
        let best = similarity.argmax(1, false);
        for (image, &row) in distinct.iter().enumerate().take(held_out.captions()) {
            let found = best.int64_value(&[image as i64]) as usize;
            evaluation.texts.push(SampleText {
                index: indices[row as usize],
                truth: captions[row as usize].clone(),
                said: captions[found].clone(),
            });
        }
        let similarity = to_host(&similarity)?;
        evaluation.images = distinct.len();
        evaluation.add_recall(&similarity, &image_ids, &ids)?;
        if let Some(gallery) = gallery {
            let lists = Shortlists::new(held_out.rerank(), &similarity, &image_ids, &ids)?;
            let tell = |done, all| held_out.tell("pairs", done, all);
            let scores = gallery.match_pairs(&task.model, lists.pairs(), pass.autocast, &tell);
            evaluation.reranked = lists.recall(&RECALL_RANKS, &scores)?;
        }
        Ok(evaluation)
    })
}

/// Where each id stands first: a set with several captions an image may hold the image as often, and it is one candidate.
fn first_of_each(ids: &[u64]) -> Vec<i64> {
    let mut seen = HashSet::new();
    (0..).zip(ids).filter(|(_, id)| seen.insert(**id)).map(|(row, _)| row).collect()
}

/// A matrix, row after row.
fn to_host(matrix: &Tensor) -> Result<Vec<f32>, Error> {
    let flat = matrix.to_kind(Kind::Float).to_device(Device::Cpu).flatten(0, 1);
    Ok(Vec::<f32>::try_from(flat)?)
}
