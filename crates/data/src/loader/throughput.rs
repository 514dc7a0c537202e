//! How many images a second the loader hands out on this machine, and where the time goes.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use serde::Serialize;

use crate::loader::timings::Timings;
use crate::{
    Augment, BadSamples, Clean, Corpus, DataError, Dataset, Filter, JpegSize, Loader, LoaderOptions, OpenOptions,
    TextEncoder, TextError,
};

const SEED: u64 = 0;
const MAX_TOKENS: usize = 32;

/// Makes one token of any caption: what runs where no tokenizer is given.
const ONE_TOKEN: &[u8] = br#"{
    "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
    "normalizer": null, "pre_tokenizer": null, "post_processor": null, "decoder": null,
    "model": {"type": "WordLevel", "vocab": {"[UNK]": 0}, "unk_token": "[UNK]"}
}"#;

/// What is measured.
#[derive(Clone)]
pub struct ThroughputOptions {
    /// The shards.
    pub patterns: Vec<String>,
    /// How they are opened.
    pub open: OpenOptions,
    /// Decoding threads.
    pub threads: usize,
    /// Samples a batch.
    pub batch: usize,
    /// Batches decoded ahead.
    pub prefetch: usize,
    /// Side of the images.
    pub image_size: usize,
    /// What is done to the images.
    pub augment: Augment,
    /// The size at which JPEGs are decoded.
    pub jpegs: JpegSize,
    /// Folder of the tokenizer; without one captions are cleaned and not tokenised.
    pub tokenizer: Option<PathBuf>,
    /// Times that the set is read; the quickest is told.
    pub passes: usize,
}

/// What was measured: the quickest pass over the set.
#[derive(Debug, Clone, Serialize)]
pub struct Throughput {
    /// Samples handed out: those of the set, rounded up to whole batches.
    pub images: u64,
    /// Different samples that could not be used and were replaced.
    pub bad: usize,
    /// From the start of the threads to the last batch.
    pub seconds: f64,
    /// `images / seconds`.
    pub images_per_s: f64,
    /// Millions of bytes of image files a second.
    pub mb_per_s: f64,
    /// Decoding threads.
    pub threads: usize,
    /// Samples a batch.
    pub batch: usize,
    /// Side of the images.
    pub image_size: usize,
    /// Whether captions were tokenised.
    pub tokenised: bool,
    /// What the threads did, in seconds of all threads together.
    pub timings: Timings,
    /// `threads * seconds` less the seconds in `timings`: what is left is waiting for work and hashing.
    pub idle_s: f64,
    /// Seconds that whoever takes the batches waited for them.
    pub wait_s: f64,
}

/// Reads the shards with the training loader, `passes` times from the start, and keeps the time.
///
/// # Errors
/// As [`Dataset::open`] and [`Loader::new`]; when the tokenizer cannot be used, no pass is asked for, or a whole window
/// of samples cannot be read.
pub fn throughput(options: &ThroughputOptions) -> Result<Throughput, ThroughputError> {
    if options.passes == 0 {
        let (expected, got) = ("at least 1".to_owned(), "0".to_owned());
        return Err(DataError::Option { option: "passes", expected, got }.into());
    }
    let text = Arc::new(match &options.tokenizer {
        Some(folder) => TextEncoder::from_folder(folder, MAX_TOKENS, true)?,
        None => TextEncoder::from_bytes(ONE_TOKEN, Path::new("none"), MAX_TOKENS, false)?,
    });
    let dataset = Arc::new(Corpus::from(Dataset::open(&options.patterns, &options.open)?));
    let mut best = pass(&dataset, &text, options)?;
    for _ in 1..options.passes {
        let next = pass(&dataset, &text, options)?;
        if next.seconds < best.seconds {
            best = next;
        }
    }
    Ok(best)
}

fn pass(dataset: &Arc<Corpus>, text: &Arc<TextEncoder>, options: &ThroughputOptions) -> Result<Throughput, DataError> {
    let batches = dataset.len().div_ceil(options.batch.max(1) as u64);
    let images = batches * options.batch as u64;
    let begin = Instant::now();
    let mut loader = Loader::new(
        Arc::clone(dataset),
        Arc::clone(text),
        LoaderOptions {
            seed: SEED,
            global_batch: options.batch,
            rank: 0,
            world: 1,
            start: 0,
            end: Some(images),
            threads: options.threads,
            prefetch: options.prefetch,
            augment: options.augment,
            image_size: options.image_size,
            filter: Filter::Bicubic,
            jpegs: options.jpegs,
            pixels: true,
            views: None,
            clean: Clean::Blip,
            lanes: 1,
            window_shards: 8,
            max_bad_fraction: 1.0,
            pad_id: 0,
            pad_to_multiple: 1,
            bad: BadSamples::default(),
            left_out: Arc::default(),
        },
    )?;
    let mut wait_s = 0.0;
    for _ in 0..batches {
        loader.next_batch()?;
        wait_s += loader.last_wait_s();
    }
    let seconds = begin.elapsed().as_secs_f64();
    let timings = loader.timings();
    let busy_s = timings.read_s + timings.text_s + timings.decode_s + timings.resize_s;
    Ok(Throughput {
        images,
        bad: loader.bad().len(),
        seconds,
        images_per_s: images as f64 / seconds,
        mb_per_s: timings.image_bytes as f64 / 1e6 / seconds,
        threads: options.threads,
        batch: options.batch,
        image_size: options.image_size,
        tokenised: options.tokenizer.is_some(),
        timings,
        idle_s: (options.threads as f64 * seconds - busy_s).max(0.0),
        wait_s,
    })
}

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
pub enum ThroughputError {
    /// The shards or the options.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The tokenizer.
    #[error(transparent)]
    Text(#[from] TextError),
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture;

    fn options(folder: &Path) -> ThroughputOptions {
        ThroughputOptions {
            patterns: vec!["*.tar".to_owned()],
            open: fixture::options(folder),
            threads: 2,
            batch: 4,
            prefetch: 2,
            image_size: 8,
            augment: Augment::CropFlip,
            jpegs: JpegSize::Full,
            tokenizer: None,
            passes: 2,
        }
    }

    #[test]
    fn a_pass_counts_every_sample_and_adds_up() {
        let folder = fixture::shards(&[5, 5], |index| index == 3);
        let report = throughput(&options(folder.path())).unwrap();
        assert_eq!((report.images, report.bad, report.tokenised), (12, 1, false));
        assert!(report.timings.samples >= 12, "{report:?}");
        let t = &report.timings;
        assert!(t.decode_s > 0.0 && t.read_s > 0.0 && t.resize_s > 0.0 && t.text_s > 0.0, "{report:?}");
        assert!((report.images_per_s - 12.0 / report.seconds).abs() < 1e-6);
        assert!(report.mb_per_s > 0.0 && report.wait_s <= report.seconds);
    }

    #[test]
    fn no_pass_and_no_tokenizer_are_refused() {
        let folder = fixture::shards(&[2], |_| false);
        let none = ThroughputOptions { passes: 0, ..options(folder.path()) };
        assert!(throughput(&none).unwrap_err().to_string().contains("passes"));
        let missing = ThroughputOptions { tokenizer: Some(folder.path().to_owned()), ..options(folder.path()) };
        assert!(matches!(throughput(&missing), Err(ThroughputError::Text(_))));
    }
}
