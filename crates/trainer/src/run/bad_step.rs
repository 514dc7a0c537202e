//! The record of a non-finite step: a model directory and a batch file that `blip2 replay` takes; with several ranks one model, which is the same on
//! all, and a batch of each. The model names its frozen towers: a long run may have many such steps, and no room for as many copies.

use std::collections::BTreeMap;
use std::path::Path;

use blip2_weights::save_safetensors;
use tch::Tensor;

use crate::assembly::Assembly;
use crate::config::Config;
use crate::data::framed::FramedBatch;
use crate::error::Error;
use crate::export::{FrozenTowers, export_model};
use crate::ranks::Ranks;

/// Writes `batch.safetensors` below `folder`, that of each of several ranks in its `rank_N/`; and `model/`, which the first rank does.
///
/// # Errors
/// When the disk refuses.
pub fn record(
    folder: &Path,
    config: &Config,
    assembly: &Assembly,
    batch: &FramedBatch,
    ranks: &dyn Ranks,
) -> Result<(), Error> {
    let own = match ranks.world() {
        1 => folder.to_path_buf(),
        _ => folder.join(format!("rank_{}", ranks.rank())),
    };
    std::fs::create_dir_all(&own).map_err(|e| Error::file(&own, e))?;
    let labels = batch.labels(assembly.task.target_rule());
    let target_tokens = batch.target_text().2 as i64;
    let batch = &batch.host;
    let (rows, tokens) = (batch.size as i64, batch.text_len as i64);
    let ids = Tensor::from_slice(&batch.input_ids).view([rows, tokens]);
    let mask: Vec<i64> =
        batch.lengths.iter().flat_map(|&l| (0..batch.text_len).map(move |t| i64::from(t < l))).collect();
    let mask = Tensor::from_slice(&mask).view([rows, tokens]);
    let labels = Tensor::from_slice(&labels).view([rows, target_tokens]);
    let pixels = batch.pixels.as_deref().ok_or(Error::NoPixels)?;
    let pixels = assembly.encoder.normalise(pixels, batch.size, batch.image_size)?;
    let entries = vec![
        ("attention_mask".to_string(), mask),
        ("input_ids".to_string(), ids),
        ("labels".to_string(), labels),
        ("pixel_values".to_string(), pixels.to_device(tch::Device::Cpu)),
    ];
    save_safetensors(&entries, &BTreeMap::new(), &own.join("batch.safetensors"))?;
    if !ranks.is_first() {
        return Ok(());
    }
    let trained = assembly.task.params().entries().into_iter().map(|(n, t, _)| (n, t)).collect::<Vec<_>>();
    let (json, tokenizer) = (&assembly.model_json, &assembly.tokenizer);
    export_model(config, json, tokenizer, &trained, FrozenTowers::Named, &folder.join("model"))?;
    Ok(())
}
