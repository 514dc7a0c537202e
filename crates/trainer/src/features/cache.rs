//! What `blip2 cache` does: filling the store on disk ahead of time, and the data crate's functions on it.

use std::path::PathBuf;

use blip2_data::Quarantined;
use blip2_data::feature_store::{FillOptions, FillReader, StoredRow, Writer};
use serde::Serialize;
use tch::Device;

pub use crate::features::disk::bytes_text;
pub use blip2_data::feature_store::{BadRow, CacheStats, CacheVerification, stats, verify};

use crate::assembly::blueprint::Blueprint;
use crate::assembly::model_files::load_image_encoder;
use crate::config::{Config, FeatureCache, ImageConfig};
use crate::data;
use crate::data::index_lines::SetOpening;
use crate::data::sets::DataSets;
use crate::error::Error;
use crate::features::ENCODE_BATCH;
use crate::features::disk::DiskFeatures;
use crate::features::encoder::ImageEncoder;
use crate::ranks::Alone;

/// What filling a cache has done.
#[derive(Debug, Clone, Serialize)]
pub struct BuildReport {
    /// Of the training sets.
    #[serde(flatten)]
    pub training: SetReport,
    /// Of the held-out set, where there is one.
    pub held_out: Option<SetReport>,
}

/// What filling a cache has done for the training sets or the held-out one.
#[derive(Debug, Clone, Serialize)]
pub struct SetReport {
    /// The folder of the features of this encoder and transform.
    pub folder: PathBuf,
    /// Pictures of the set.
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
    /// Pictures that cannot be read.
    pub left_out: Vec<Quarantined>,
}

/// Fills the cache that `config` names with the held-out set and every view of the training sets. What is there stays, so that a build that
/// was interrupted goes on where it was; `progress` hears of `(done, all)` rows.
///
/// # Errors
/// A configuration without a folder, parts that do not fit, shards that cannot be read, a disk that refuses.
pub fn build(config: &Config, device: Device, progress: &mut dyn FnMut(u64, u64)) -> Result<BuildReport, Error> {
    let FeatureCache::Directory(folder) = &config.data.feature_cache else {
        return Err(Error::key("data.feature_cache", "a folder to fill", "off or memory", ""));
    };
    let Blueprint { vision_dir, vision, depth, preprocessing, vision_dtype, .. } = Blueprint::open(config)?;
    let sets = DataSets::open(config, SetOpening::default(), &Alone)?;
    let (encoder, _) = load_image_encoder(&vision_dir, &vision, depth, preprocessing, device, vision_dtype)?;
    let training = DiskFeatures::of_training(folder, config, &encoder, &sets, Writer::NoRun)?;
    let held_out = sets.held_out.as_ref();
    let held_out = held_out.map(|set| DiskFeatures::of_held_out(folder, config, &encoder, set, Writer::NoRun));
    let held_out = held_out.transpose()?;
    let first = held_out.as_ref().map_or(0, |features| features.rows().stored_rows());
    let all = first + training.rows().stored_rows();
    let held_out = match &held_out {
        Some(features) => {
            Some(fill(config, &encoder, features, &config.data.image.of_held_out(), &mut |done| progress(done, all))?)
        }
        None => None,
    };
    let training = fill(config, &encoder, &training, &config.data.image, &mut |done| progress(first + done, all))?;
    Ok(BuildReport { training, held_out })
}

/// Encodes and stores what a set lacks; `tell` hears of the rows that are done.
fn fill(
    config: &Config,
    encoder: &ImageEncoder,
    features: &DiskFeatures,
    image: &ImageConfig,
    tell: &mut dyn FnMut(u64),
) -> Result<SetReport, Error> {
    let (rows, size) = (features.rows(), encoder.preprocessing().size);
    let mut reader = FillReader::new(
        rows.clone(),
        FillOptions {
            batch: ENCODE_BATCH,
            threads: data::threads(&config.data.loader.threads),
            prefetch: config.data.loader.prefetch,
            image_size: size,
            filter: encoder.preprocessing().filter,
            augment: image.augment,
            jpegs: image.jpegs,
        },
    )?;
    let (mut there, mut stored) = (0, 0);
    for batch in reader.by_ref() {
        let batch = batch?;
        // An image may have more views than are encoded at once.
        let parts = batch.pixels.chunks(ENCODE_BATCH * 3 * size * size);
        for (lacking, pixels) in batch.rows.chunks(ENCODE_BATCH).zip(parts) {
            let encoded = encoder.features(pixels, lacking.len(), size)?;
            let payloads = features.numbers().to_rows(&encoded)?;
            for (row, payload) in lacking.iter().zip(payloads.chunks_exact(rows.store().row_bytes())) {
                let (image, writer, payload) = (row.image, rows.writer(), payload.to_vec());
                rows.write(row.index, row.view, &StoredRow { image, writer, position: 0, payload })?;
            }
        }
        there += batch.there;
        stored += batch.rows.len() as u64;
        tell(batch.done);
    }
    Ok(SetReport {
        folder: rows.store().folder().to_owned(),
        pictures: rows.pictures(),
        views: rows.views(),
        there,
        stored,
        no_place: rows.rows() - rows.stored_rows(),
        row_bytes: rows.row_bytes(),
        left_out: reader.take_quarantined(),
    })
}
