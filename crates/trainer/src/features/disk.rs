//! Image features from a store on disk: what is there is read, what is not is encoded, stored, and used as it was stored.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::num::NonZero;
use std::path::Path;
use std::sync::Arc;

use blip2_data::feature_store::{
    Description, FeatureStore, ImageSteps, RunFeatures, RunFeaturesOptions, StoredRow, Writer,
};
use blip2_data::{Corpus, HostBatch};
use rayon::prelude::*;
use tch::Tensor;

use crate::config::{Config, ImageConfig};
use crate::data::sets::DataSets;
use crate::error::Error;
use crate::features::encoder::ImageEncoder;
use crate::features::stored_numbers::StoredNumbers;
use crate::step::StepMetrics;

const GIB: f64 = (1u64 << 30) as f64;

/// A set's features in a store, as the steps of a run read and write them, or its evaluations.
pub(crate) struct DiskFeatures {
    rows: Arc<RunFeatures>,
    numbers: StoredNumbers,
    /// What lines call the set.
    name: &'static str,
    /// Rows of the step or evaluation that is being made: those that were there before it, and the others.
    counts: Cell<(u64, u64)>,
    refused: RefCell<Refusal>,
}

/// Whether the disk has refused a row.
enum Refusal {
    No,
    Unsaid(String),
    Said,
}

/// A row as a step or an evaluation finds it.
enum Found {
    /// There before it.
    There(Arc<StoredRow>),
    /// To be encoded; this run may have done so then already, before it was killed.
    Lacking(Option<Arc<StoredRow>>),
}

/// Whose rows they are, and how many are kept of each image.
struct Rows<'a> {
    name: &'static str,
    corpus: &'a Arc<Corpus>,
    image: ImageConfig,
    views: NonZero<u64>,
    writer: Writer,
    /// Rows that go before in what may be stored.
    before: u64,
}

impl DiskFeatures {
    /// The rows of the training sets in the store of `folder`, as `config` wants them. Those of the held-out set have their place first.
    ///
    /// # Errors
    /// When the store's folder cannot be made or is damaged.
    pub(crate) fn of_training(
        folder: &Path,
        config: &Config,
        encoder: &ImageEncoder,
        sets: &DataSets,
        writer: Writer,
    ) -> Result<DiskFeatures, Error> {
        let rows = Rows {
            name: "feature cache",
            corpus: &sets.train,
            image: config.data.image.clone(),
            views: views(config),
            writer,
            before: sets.held_out.as_ref().map_or(0, |set| set.len()),
        };
        DiskFeatures::open(folder, config, encoder, rows)
    }

    /// The rows of a held-out set, of which the evaluation transform makes a single view.
    ///
    /// # Errors
    /// As [`DiskFeatures::of_training`].
    pub(crate) fn of_held_out(
        folder: &Path,
        config: &Config,
        encoder: &ImageEncoder,
        corpus: &Arc<Corpus>,
        writer: Writer,
    ) -> Result<DiskFeatures, Error> {
        let (image, views) = (config.data.image.of_held_out(), NonZero::<u64>::MIN);
        let rows = Rows { name: "feature cache of the held-out set", corpus, image, views, writer, before: 0 };
        DiskFeatures::open(folder, config, encoder, rows)
    }

    fn open(folder: &Path, config: &Config, encoder: &ImageEncoder, rows: Rows<'_>) -> Result<DiskFeatures, Error> {
        let Rows { name, corpus, image, views, writer, before: rows_before } = rows;
        let description = description(config, encoder, &image)?;
        let numbers = StoredNumbers {
            format: description.stored_as,
            tokens: description.tokens as i64,
            width: description.width as i64,
        };
        let options = RunFeaturesOptions {
            views,
            writer,
            global_batch: NonZero::new(config.schedule.global_batch as u64).unwrap_or(NonZero::<u64>::MIN),
            max_bytes: config.data.feature_max_gib.map(|gib| (gib * GIB) as u64),
            rows_before,
        };
        let rows = Arc::new(RunFeatures::new(open_store(folder, &description)?, corpus.clone(), options));
        Ok(DiskFeatures { rows, numbers, name, counts: Cell::default(), refused: RefCell::new(Refusal::No) })
    }

    /// The rows, for whoever reads ahead.
    pub(crate) fn rows(&self) -> &Arc<RunFeatures> {
        &self.rows
    }

    /// How features become rows.
    pub(crate) fn numbers(&self) -> StoredNumbers {
        self.numbers
    }

    /// Features of a batch on the encoder's device, `f32 [B, N, width]`.
    ///
    /// What was not there before the step or evaluation is encoded as one batch, so that its bits depend on the stream position alone and not
    /// on when this run was interrupted.
    ///
    /// # Errors
    /// When the device refuses.
    pub(crate) fn of(&self, host: &HostBatch, encoder: &ImageEncoder) -> Result<Tensor, Error> {
        let rows = &*self.rows;
        let found: Vec<Found> = (0..host.size).into_par_iter().map(|at| find(rows, host, at)).collect();
        let lacking: Vec<usize> = (0..host.size).filter(|&at| matches!(found[at], Found::Lacking(_))).collect();
        let (there, not_there) = self.counts.get();
        self.counts.set((there + (host.size - lacking.len()) as u64, not_there + lacking.len() as u64));
        let stored_then: Option<Vec<Arc<StoredRow>>> = lacking
            .iter()
            .map(|&at| match &found[at] {
                Found::Lacking(Some(row)) if self.is_of(row, host) => Some(row.clone()),
                _ => None,
            })
            .collect();
        let mut made = match stored_then {
            Some(rows) => rows,
            None => self.encode(host, &lacking, encoder)?,
        }
        .into_iter();
        let mut bytes = Vec::with_capacity(host.size * self.rows.store().row_bytes());
        for found in found {
            match found {
                Found::There(row) => bytes.extend_from_slice(&row.payload),
                Found::Lacking(_) => made.by_ref().take(1).for_each(|row| bytes.extend_from_slice(&row.payload)),
            }
        }
        self.numbers.features_of(&bytes, host.size, encoder.device())
    }

    /// Whether a row was made together with those that this batch lacks.
    fn is_of(&self, row: &StoredRow, host: &HostBatch) -> bool {
        row.writer == self.rows.writer() && row.position == position(host)
    }

    /// Encodes rows of a batch together, each view of an image once, and stores them.
    fn encode(
        &self,
        host: &HostBatch,
        lacking: &[usize],
        encoder: &ImageEncoder,
    ) -> Result<Vec<Arc<StoredRow>>, Error> {
        let pixels = host.pixels.as_deref().ok_or(Error::NoPixels)?;
        let image_bytes = 3 * host.image_size * host.image_size;
        let (mut numbers, mut batch) = (HashMap::new(), Vec::new());
        for &at in lacking {
            numbers.entry((host.image_id[at], host.features[at].view)).or_insert_with(|| {
                batch.extend_from_slice(&pixels[at * image_bytes..][..image_bytes]);
                batch.len() / image_bytes - 1
            });
        }
        let features = encoder.features(&batch, numbers.len(), host.image_size)?;
        let payloads = self.numbers.to_rows(&features)?;
        let row_bytes = self.rows.store().row_bytes();
        let row = |&at: &usize| {
            let image = host.image_id[at];
            let payload = payloads[numbers[&(image, host.features[at].view)] * row_bytes..][..row_bytes].to_vec();
            Arc::new(StoredRow { image, writer: self.rows.writer(), position: position(host), payload })
        };
        let rows: Vec<Arc<StoredRow>> = lacking.iter().map(row).collect();
        let places = lacking.iter().map(|&at| (host.sample_index[at], host.features[at].view));
        self.store(places.zip(&rows).collect());
        Ok(rows)
    }

    /// Stores rows by sample and view. Where the disk refuses, training goes on without.
    fn store(&self, rows: BTreeMap<(u64, u64), &Arc<StoredRow>>) {
        if !matches!(*self.refused.borrow(), Refusal::No) {
            return;
        }
        let features = &*self.rows;
        let write = |((index, view), row): ((u64, u64), &Arc<StoredRow>)| match features.may_store(index, view) {
            true => features.write(index, view, row),
            false => Ok(()),
        };
        if let Err(error) = rows.into_par_iter().try_for_each(write) {
            self.refused.replace(Refusal::Unsaid(format!(
                "warning: {}: {error}; no more features are stored, those that are not there are computed each time",
                self.name
            )));
        }
    }

    /// How many rows since the last call were there before their step or evaluation, and how many were not.
    pub(crate) fn take_counts(&self) -> (u64, u64) {
        self.counts.take()
    }

    /// The parts of the last step's rows that were there before it and that were not.
    pub(crate) fn take_metrics(&self) -> StepMetrics {
        let (there, not_there) = self.take_counts();
        let all = (there + not_there).max(1) as f64;
        vec![("cache_hits", Tensor::from(there as f64 / all)), ("cache_misses", Tensor::from(not_there as f64 / all))]
    }

    /// That the disk has refused a row; said once.
    pub(crate) fn take_note(&self) -> Option<String> {
        let mut refused = self.refused.borrow_mut();
        match std::mem::replace(&mut *refused, Refusal::No) {
            Refusal::No => None,
            Refusal::Said => {
                *refused = Refusal::Said;
                None
            }
            Refusal::Unsaid(line) => {
                *refused = Refusal::Said;
                Some(line)
            }
        }
    }

    /// One line about place and size.
    pub(crate) fn introduction(&self) -> String {
        let (rows, stored) = (self.rows.rows(), self.rows.stored_rows());
        let size = |rows: u64| bytes_text(rows as f64 * self.rows.row_bytes() as f64);
        let mut line = format!(
            "{} {}: {} a view of a picture, {} when all {rows} are there",
            self.name,
            self.rows.store().folder().display(),
            size(1),
            size(rows)
        );
        if stored < rows {
            let left = rows - stored;
            line +=
                &format!("; data.feature_max_gib keeps {stored} in {}, {left} are computed each time", size(stored));
        }
        line
    }
}

/// What the rows bear that are encoded with this batch: its first stream position, or that of the evaluation.
fn position(host: &HostBatch) -> u64 {
    host.features.first().map_or(host.position, |row| row.position)
}

/// The row of a sample. What was there when it was read ahead holds; what was not may have come since.
fn find(rows: &RunFeatures, host: &HostBatch, at: usize) -> Found {
    let ahead = &host.features[at];
    let there = |row: &Arc<StoredRow>| rows.was_there(row, ahead.position);
    if let Some(row) = ahead.stored.clone().filter(there) {
        return Found::There(row);
    }
    match rows.read(host.sample_index[at], ahead.view, host.image_id[at]).map(Arc::new) {
        Some(row) if there(&row) => Found::There(row),
        other => Found::Lacking(other),
    }
}

/// Views of an image that the epochs take in turn.
pub(crate) fn views(config: &Config) -> NonZero<u64> {
    NonZero::new(config.data.feature_views).unwrap_or(NonZero::<u64>::MIN)
}

fn open_store(folder: &Path, description: &Description) -> Result<FeatureStore, Error> {
    FeatureStore::open(folder, description)
        .map_err(|source| Error::DataSet { key: "data.feature_cache".into(), source })
}

/// What the features are of images that are made so.
fn description(config: &Config, encoder: &ImageEncoder, image: &ImageConfig) -> Result<Description, Error> {
    let seen = encoder.preprocessing();
    let (tokens, width) = encoder.feature_shape();
    Ok(Description {
        encoder: encoder.stored_identity()?,
        image: ImageSteps::new(
            seen.size,
            seen.filter,
            seen.rescale_factor,
            seen.mean,
            seen.std,
            image.augment,
            image.jpegs,
        ),
        tokens: tokens as usize,
        width: width as usize,
        stored_as: config.data.feature_format,
    })
}

/// A size in the largest unit that leaves a number of at least one.
pub fn bytes_text(bytes: f64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let power = (bytes.max(1.0).log2() / 10.0).floor().min(units.len() as f64 - 1.0);
    let digits = if power == 0.0 { 0 } else { 1 };
    format!("{:.digits$} {}", bytes / 1024f64.powf(power), units[power as usize])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_in_words() {
        let texts = [0.0, 1023.0, 1024.0, 1536.0 * 1024.0, 2f64.powi(51)].map(bytes_text);
        assert_eq!(texts, ["0 B", "1023 B", "1.0 KiB", "1.5 MiB", "2048.0 TiB"]);
    }
}
