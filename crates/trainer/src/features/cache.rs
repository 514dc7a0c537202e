//! What `blip2 cache` does: filling the store on disk ahead of time, and the data crate's functions on it.

use std::path::PathBuf;

use blip2_data::Quarantined;
use blip2_data::feature_store::{FillOptions, FillReader, StoredRow};
use serde::Serialize;
use tch::Device;

pub use crate::features::disk::bytes_text;
pub use blip2_data::feature_store::{BadRow, CacheStats, CacheVerification, stats, verify};

use crate::assembly::blueprint::Blueprint;
use crate::assembly::model_files::load_image_encoder;
use crate::config::{Config, FeatureCache};
use crate::data;
use crate::data::index_lines::SetOpening;
use crate::data::sets::open_training_sets;
use crate::error::Error;
use crate::features::ENCODE_BATCH;
use crate::features::disk::DiskFeatures;
use crate::ranks::Pulse;

/// The writer of rows that no run has written; a run's is never zero.
const AHEAD_OF_TIME: u64 = 0;

/// What filling a cache has done.
#[derive(Debug, Clone, Serialize)]
pub struct BuildReport {
    /// The folder of the features of this encoder and transform.
    pub folder: PathBuf,
    /// Pictures of the training set.
    pub pictures: u64,
    /// Views of each.
    pub views: u64,
    /// Rows that were stored already.
    pub there: u64,
    /// Rows that were stored now.
    pub stored: u64,
    /// Rows for which `data.feature_max_gib` leaves no place.
    pub no_place: u64,
    /// Bytes of a row with its record.
    pub row_bytes: u64,
    /// Views that could not be made, since their picture cannot be read.
    pub left_out: Vec<Quarantined>,
}

/// Fills the cache that `config` names with every view of its training set. What is there stays, so that a build that was interrupted goes
/// on where it was; `progress` hears of `(done, all)` rows.
///
/// # Errors
/// A configuration without a folder, parts that do not fit, shards that cannot be read, a disk that refuses.
pub fn build(config: &Config, device: Device, progress: &mut dyn FnMut(u64, u64)) -> Result<BuildReport, Error> {
    let FeatureCache::Directory(folder) = &config.data.feature_cache else {
        return Err(Error::key("data.feature_cache", "a folder to fill", "off or memory", ""));
    };
    let Blueprint { vision_dir, vision, depth, preprocessing, vision_dtype, .. } = Blueprint::open(config)?;
    let corpus = open_training_sets(config, SetOpening::default(), &Pulse::default())?;
    let (encoder, _) = load_image_encoder(&vision_dir, &vision, depth, preprocessing, device, vision_dtype)?;
    let features = DiskFeatures::open(folder, config, &encoder, &corpus, AHEAD_OF_TIME)?;
    let rows = features.rows();
    let mut reader = FillReader::new(
        rows.clone(),
        FillOptions {
            batch: ENCODE_BATCH,
            threads: data::threads(&config.data.loader.threads),
            prefetch: config.data.loader.prefetch,
            image_size: encoder.preprocessing().size,
            filter: encoder.preprocessing().filter,
            augment: config.data.image.augment,
        },
    )?;
    let (all, mut stored) = (rows.stored_rows(), 0);
    for batch in reader.by_ref() {
        let batch = batch?;
        if !batch.rows.is_empty() {
            let encoded = encoder.features(&batch.pixels, batch.rows.len(), encoder.preprocessing().size)?;
            let payloads = features.numbers().to_rows(&encoded)?;
            for (row, payload) in batch.rows.iter().zip(payloads.chunks_exact(rows.store().row_bytes())) {
                let made =
                    StoredRow { image: row.image, writer: AHEAD_OF_TIME, position: 0, payload: payload.to_vec() };
                rows.write(row.index, row.view, &made)?;
            }
            stored += batch.rows.len() as u64;
        }
        progress(batch.done, all);
    }
    let left_out = reader.take_quarantined();
    Ok(BuildReport {
        folder: rows.store().folder().to_owned(),
        pictures: corpus.len(),
        views: config.data.feature_views,
        there: all - stored - left_out.len() as u64,
        stored,
        no_place: rows.rows() - all,
        row_bytes: rows.row_bytes(),
        left_out,
    })
}
