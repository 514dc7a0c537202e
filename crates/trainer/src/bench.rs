//! `bench loader` is the data crate's, `bench pack` has a file of its own. `bench step`: seconds of a full-size training step behind the frozen image encoder, on random features.
//!
//! The model is the paper's: a bert-base Q-Former with 32 queries behind ViT-g's features. Captions have the lengths of
//! everyday ones (19, 16, 18, 17, 16, 12, 13, 15 word pieces, again and again), `[CLS]` and `[SEP]` included.

use std::time::Instant;

pub use crate::packing_speed::{PackingOptions, PackingReport, packing};
use blip2_data::HostBatch;
pub use blip2_data::{Augment, JpegSize, Throughput, ThroughputOptions, throughput};
use blip2_model::{Blip2Config, Stage1};
use blip2_torchx::adamw::{AdamW, AdamWConfig};
use blip2_torchx::params::ParamStore;
use blip2_torchx::{device, memory};
use serde::Serialize;
use serde_json::json;
use tch::{Device, Kind, Tensor};

use crate::config::Precision;
use crate::data::batch::{Batch, Share};
use crate::error::Error;
use crate::ranks::Alone;
use crate::task::{ForwardOptions, Stage1Task, Task};

const CAPTION_LENGTHS: [usize; 8] = [19, 16, 18, 17, 16, 12, 13, 15];
const SEED: u64 = 0;

/// What is measured.
#[derive(Debug, Clone)]
pub struct BenchOptions {
    /// Samples a step.
    pub batch: usize,
    /// Number format of the step.
    pub precision: Precision,
    /// Where to compute.
    pub device: Device,
    /// Steps measured, after one to warm up.
    pub steps: usize,
    /// Dropout of the Q-Former.
    pub dropout: f64,
    /// Width of the image features.
    pub width: i64,
    /// Tokens of an image.
    pub tokens: i64,
}

/// What was measured.
#[derive(Debug, Clone, Serialize)]
pub struct StepReport {
    /// The stage.
    pub stage: u8,
    /// Samples a step.
    pub batch: usize,
    /// Number format.
    pub precision: String,
    /// The device in words.
    pub device: String,
    /// Parameters trained.
    pub trainable_parameters: u64,
    /// Median of forward and backward, in seconds.
    pub median_s: f64,
    /// Its forward part.
    pub forward_s: f64,
    /// `batch / median_s`.
    pub samples_per_s: f64,
    /// Median of the optimizer's update, in seconds; not part of `median_s`.
    pub optimizer_s: f64,
    /// Whether the device has instructions for bf16; without, bf16 is tens of times slower than fp32.
    pub bf16_instructions: bool,
    /// Most memory in use on the device, in MiB, where it can be told.
    pub peak_memory_mib: Option<f64>,
}

/// Measures stage 1's step.
///
/// # Errors
/// When the device refuses.
pub fn stage1_step(options: &BenchOptions) -> Result<StepReport, Error> {
    options.precision.set_tf32();
    tch::manual_seed(SEED as i64);
    let device = options.device;
    let params = ParamStore::trainable(device);
    let config = stage1_config(options.width)?;
    let model = Stage1::new(&params.root(), &config);
    let task = Stage1Task { model, params, options: Default::default() };
    let o = AdamWConfig { betas: (0.9, 0.98), eps: 1e-8, weight_decay: 0.05 };
    let mut adamw = AdamW::new(task.params.entries(), o);
    let pass = ForwardOptions { autocast: options.precision.autocast(), dropout: options.dropout, seed: SEED };
    let features = Tensor::randn([options.batch as i64, options.tokens, options.width], (Kind::Float, device));
    memory::reset_peak(device);
    let (mut steps, mut forwards, mut updates) = (Vec::new(), Vec::new(), Vec::new());
    for step in 0..=options.steps {
        let host = host_batch(options.batch, (step * options.batch) as u64);
        let batch = Batch::new(&host.into(), features.shallow_clone(), task.target_rule(), Share::WHOLE, SEED)?;
        device::synchronize(device);
        let begin = Instant::now();
        let losses = task.forward(&batch, &pass, &Alone)?;
        device::synchronize(device);
        let forward = begin.elapsed().as_secs_f64();
        losses.total.backward();
        device::synchronize(device);
        let both = begin.elapsed().as_secs_f64();
        adamw.step(1e-4, None, None);
        device::synchronize(device);
        let update = begin.elapsed().as_secs_f64() - both;
        adamw.zero_grad();
        if step > 0 {
            steps.push(both);
            forwards.push(forward);
            updates.push(update);
        }
    }
    let median_s = median(steps);
    Ok(StepReport {
        stage: 1,
        batch: options.batch,
        precision: options.precision.to_string(),
        device: device::name(device),
        trainable_parameters: task.params.num_elements(),
        median_s,
        forward_s: median(forwards),
        samples_per_s: options.batch as f64 / median_s,
        optimizer_s: median(updates),
        bf16_instructions: device::multiplies_fast(device, Kind::BFloat16),
        peak_memory_mib: memory::stats(device).map(|m| m.peak_allocated_bytes as f64 / (1u64 << 20) as f64),
    })
}

/// The paper's stage 1 behind features of this width.
fn stage1_config(width: i64) -> Result<Blip2Config, Error> {
    let json = json!({
        "architectures": ["Blip2ForImageTextRetrieval"],
        "num_query_tokens": 32,
        "image_text_hidden_size": 256,
        "vision_config": {"hidden_size": width, "num_attention_heads": 1},
        "qformer_config": {"vocab_size": 30_523, "encoder_hidden_size": width},
    });
    Blip2Config::from_json(&json).map_err(|source| Error::Model { path: "bench".into(), source })
}

fn host_batch(size: usize, position: u64) -> HostBatch {
    let lengths: Vec<usize> = CAPTION_LENGTHS.iter().copied().cycle().take(size).collect();
    let text_len = lengths.iter().copied().max().unwrap_or(0);
    let ids = |row: usize| {
        let length = lengths[row];
        (0..text_len).map(move |t| if t < length { 1000 + ((row * 7919 + t * 104_729) % 29_000) as i64 } else { 0 })
    };
    let rows: Vec<u64> = (0..size as u64).map(|row| position + row).collect();
    HostBatch {
        position,
        size,
        image_size: 0,
        pixels: None,
        features: Vec::new(),
        input_ids: (0..size).flat_map(ids).collect(),
        text_len,
        sample_index: rows.clone(),
        image_id: rows.clone(),
        captions: vec![String::new(); size],
        answers: vec![Vec::new(); size],
        positions: rows,
        epoch: 0,
        lengths,
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_paper_s_stage_1_behind_vit_g_has_lavis_s_count_of_parameters() {
        for (width, count) in [(1408, 186_705_470), (1024, 183_165_758)] {
            let params = ParamStore::trainable(Device::Cpu);
            Stage1::new(&params.root(), &stage1_config(width).unwrap());
            assert_eq!(params.num_elements(), count);
        }
    }
}
