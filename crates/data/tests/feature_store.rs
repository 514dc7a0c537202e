//! The contract of the feature store: a row that is read is the row that was written, whatever happened to the files in between.

mod fixture;

use std::fs::{self, OpenOptions};
use std::num::NonZero;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use blip2_data::feature_store::{
    Description, EncoderIdentity, FeatureFormat, FeatureRow, FeatureStore, FillOptions, FillReader, ImageSteps,
    RunFeatures, RunFeaturesOptions, StoredRow, Writer, stats, verify,
};
use blip2_data::{
    Augment, Clean, Corpus, Dataset, EvalFeatures, EvalOptions, EvalReader, Filter, HostBatch, ImageViews, JpegSize,
    Loader, LoaderOptions,
};
use fixture::{corpus, loader_options, shards, text};
use proptest::prelude::*;

/// Row of 3 x 4 numbers.
const ROW_BYTES: usize = 24;
const RUN: Writer = Writer::Steps(77);

fn description() -> Description {
    Description {
        encoder: EncoderIdentity { weights: "abc".into(), layer: 2, dtype: "bf16".into() },
        image: ImageSteps::new(4, Filter::Bicubic, 1.0 / 255.0, [0.0; 3], [1.0; 3], Augment::CropFlip, JpegSize::Full),
        tokens: 3,
        width: 4,
        stored_as: FeatureFormat::Bf16,
    }
}

/// Of a single view that nobody's steps need.
const NO_RUN: RunFeaturesOptions = RunFeaturesOptions {
    views: NonZero::<u64>::MIN,
    writer: Writer::NoRun,
    global_batch: NonZero::<u64>::MIN,
    max_bytes: None,
    rows_before: 0,
};

fn run_features(cache: &Path, dataset: &Arc<Corpus>, views: u64, max_bytes: Option<u64>) -> Arc<RunFeatures> {
    let store = FeatureStore::open(cache, &description()).unwrap();
    let (views, global_batch) = (NonZero::new(views).unwrap(), NonZero::new(8).unwrap());
    let options = RunFeaturesOptions { views, writer: RUN, global_batch, max_bytes, ..NO_RUN };
    Arc::new(RunFeatures::new(store, dataset.clone(), options))
}

fn row(image: u64, fill: u8) -> StoredRow {
    let payload = (0..ROW_BYTES).map(|at| fill.wrapping_add(at as u8)).collect();
    StoredRow { image, writer: RUN.id(), position: 16, payload }
}

fn only_file(cache: &Path) -> PathBuf {
    let folder = cache.join(description().key());
    let named = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "feat");
    let files: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).filter(named).collect();
    assert_eq!(files.len(), 1, "{files:?}");
    files[0].clone()
}

#[test]
fn a_row_is_read_by_whoever_knows_shard_view_and_image() {
    let (folder, cache) = (shards(&[3, 4], |_| false), tempfile::tempdir().unwrap());
    let set = corpus(folder.path());
    run_features(cache.path(), &set, 2, None).write(4, 1, &row(9, 1)).unwrap();

    // Another set that holds the shard, by another pattern.
    let part = Arc::new(Corpus::from(Dataset::open(&["01.tar".into()], &fixture::options(folder.path())).unwrap()));
    assert_eq!(run_features(cache.path(), &part, 2, None).read(1, 1, 9), Some(row(9, 1)));
    let whole = run_features(cache.path(), &set, 2, None);
    assert_eq!(whole.read(4, 1, 9), Some(row(9, 1)));
    assert!(whole.holds(4, 1, 9) && !whole.holds(4, 0, 9));
    for (index, view, image) in [(3, 1, 9), (4, 0, 9), (4, 1, 8), (7, 0, 9)] {
        assert_eq!(whole.read(index, view, image), None);
    }
    assert!(whole.write(7, 0, &row(9, 1)).is_err());
    let short = StoredRow { payload: vec![0; 3], ..row(9, 1) };
    assert!(whole.write(4, 1, &short).is_err());
    assert_eq!(whole.read(4, 1, 9), Some(row(9, 1)));
}

#[test]
fn another_encoder_s_rows_are_never_seen() {
    let (folder, cache) = (shards(&[3], |_| false), tempfile::tempdir().unwrap());
    let set = corpus(folder.path());
    run_features(cache.path(), &set, 1, None).write(0, 0, &row(9, 1)).unwrap();
    let other = Description { width: 2, ..description() };
    assert_ne!(other.key(), description().key());
    let other = RunFeatures::new(FeatureStore::open(cache.path(), &other).unwrap(), set, NO_RUN);
    assert_eq!(other.read(0, 0, 9), None);
    assert_eq!(stats(cache.path()).unwrap().iter().map(|key| key.rows).sum::<u64>(), 1);
}

#[test]
fn a_folder_that_says_it_is_something_else_is_refused() {
    let cache = tempfile::tempdir().unwrap();
    FeatureStore::open(cache.path(), &description()).unwrap();
    fs::write(cache.path().join(description().key()).join("cache.json"), "{}").unwrap();
    for message in [
        FeatureStore::open(cache.path(), &description()).unwrap_err().to_string(),
        stats(cache.path()).unwrap_err().to_string(),
    ] {
        assert!(message.contains("cache.json: it does not describe") && message.lines().count() == 1, "{message}");
    }
    let message = stats(&cache.path().join(description().key())).unwrap_err().to_string();
    assert!(message.contains("expected a feature cache"), "{message}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Any byte of a file may change and any part of its end may be lost: a row is then there as it was written, or not at all.
    #[test]
    fn a_damaged_row_is_no_row(at in 0usize..4096 + 4096 + 5 * ROW_BYTES, bits in 1u8.., cut: bool) {
        let (folder, cache) = (shards(&[5], |_| false), tempfile::tempdir().unwrap());
        let set = corpus(folder.path());
        let features = run_features(cache.path(), &set, 1, None);
        let written: Vec<StoredRow> = (0..5).map(|index| row(index, 10 * index as u8)).collect();
        for (index, row) in (0..).zip(&written) {
            features.write(index, 0, row).unwrap();
        }
        let path = only_file(cache.path());
        let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        if cut {
            file.set_len(at as u64).unwrap();
        } else {
            let mut byte = [0];
            file.read_exact_at(&mut byte, at as u64).unwrap();
            file.write_all_at(&[byte[0] ^ bits], at as u64).unwrap();
        }
        // One that has the file open already, and one that opens it now.
        for reader in [&features, &run_features(cache.path(), &set, 1, None)] {
            let mut lost = 0;
            for (index, row) in (0..).zip(&written) {
                match reader.read(index, 0, row.image) {
                    Some(found) => prop_assert_eq!(&found, row),
                    None => lost += 1,
                }
            }
            let most = if cut || at < 4096 { 5 } else { 1 };
            prop_assert!(lost <= most);
        }
        // What was lost can be written again, and then everything is there.
        let again = run_features(cache.path(), &set, 1, None);
        for (index, row) in (0..).zip(&written) {
            again.write(index, 0, row).unwrap();
        }
        let after = run_features(cache.path(), &set, 1, None);
        for (index, row) in (0..).zip(&written) {
            let found = after.read(index, 0, row.image);
            prop_assert_eq!(found.as_ref(), Some(row));
        }
        let report = verify(cache.path(), false, |_, _| {}).unwrap();
        prop_assert_eq!((report.good, report.bad), (5, vec![]));
    }
}

#[test]
fn of_several_writers_one_wins_or_none() {
    let (folder, cache) = (shards(&[2], |_| false), tempfile::tempdir().unwrap());
    let set = corpus(folder.path());
    // A payload that takes more than one write of a page.
    let description = Description { tokens: 64, width: 512, ..description() };
    let rows: Vec<StoredRow> = (0..4)
        .map(|writer| StoredRow { image: 5, writer, position: 0, payload: vec![writer as u8; 1 << 16] })
        .collect();
    let open_store = || RunFeatures::new(FeatureStore::open(cache.path(), &description).unwrap(), set.clone(), NO_RUN);
    std::thread::scope(|scope| {
        for row in &rows {
            // Each has a store of its own, as another process would.
            let features = open_store();
            let rows = &rows;
            scope.spawn(move || {
                for _ in 0..100 {
                    features.write(1, 0, row).unwrap();
                    if let Some(found) = features.read(1, 0, 5) {
                        assert!(rows.contains(&found), "a mixture of {} was taken for whole", found.writer);
                    }
                }
            });
        }
    });
    open_store().write(1, 0, &rows[2]).unwrap();
    assert_eq!(open_store().read(1, 0, 5).as_ref(), Some(&rows[2]));
}

#[test]
fn the_limit_lets_first_views_in_first_and_is_kept_to_the_row() {
    let (folder, cache) = (shards(&[3, 4], |_| false), tempfile::tempdir().unwrap());
    let set = corpus(folder.path());
    let stored = |max_bytes: Option<u64>| {
        let features = run_features(cache.path(), &set, 2, max_bytes);
        let rows: Vec<(u64, u64)> = (0..2)
            .flat_map(|view| (0..7).map(move |index| (view, index)))
            .filter(|&(v, i)| features.may_store(i, v))
            .collect();
        assert_eq!(rows.len() as u64, features.stored_rows());
        assert_eq!(features.rows(), 14);
        rows
    };
    let row_bytes = ROW_BYTES as u64 + 32;
    assert_eq!(stored(None).len(), 14);
    assert_eq!(stored(Some(u64::MAX)).len(), 14);
    assert_eq!(stored(Some(8 * row_bytes)), [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (0, 5), (0, 6), (1, 0)]);
    assert_eq!(stored(Some(8 * row_bytes - 1)).len(), 7);
    assert_eq!(stored(Some(0)), []);
    // Another set's rows have their place first.
    for (rows_before, left) in [(3, 5), (8, 0), (9, 0)] {
        let store = FeatureStore::open(cache.path(), &description()).unwrap();
        let options = RunFeaturesOptions { max_bytes: Some(8 * row_bytes), rows_before, ..NO_RUN };
        let features = RunFeatures::new(store, set.clone(), options);
        assert_eq!(features.stored_rows(), left);
        assert_eq!((0..7).filter(|&index| features.may_store(index, 0)).count() as u64, left);
    }
}

/// The stream with views whose features `features` holds.
fn batches(set: &Arc<Corpus>, views: u64, features: Option<Arc<RunFeatures>>, count: usize) -> Vec<HostBatch> {
    let views = Some(ImageViews { count: NonZero::new(views).unwrap(), features });
    let mut loader = Loader::new(set.clone(), text(), LoaderOptions { views, ..loader_options() }).unwrap();
    (0..count).map(|_| loader.next_batch().unwrap()).collect()
}

#[test]
fn images_whose_features_are_there_are_not_decoded() {
    let (folder, cache) = (shards(&[8], |_| false), tempfile::tempdir().unwrap());
    let set = corpus(folder.path());
    let features = run_features(cache.path(), &set, 2, None);
    // Two epochs of eight: of view 0 every third sample is stored by another run, of view 1 one by this run in the batch that needs it.
    let plain = batches(&set, 2, None, 3);
    for batch in &plain {
        assert!(batch.features.is_empty());
    }
    let image = |index: u64| plain[0].image_id[plain[0].sample_index.iter().position(|&i| i == index).unwrap()];
    for index in [0, 3, 6] {
        features.write(index, 0, &StoredRow { writer: 1, ..row(image(index), index as u8) }).unwrap();
    }
    features.write(5, 1, &StoredRow { position: 8, ..row(image(5), 50) }).unwrap();
    let cached = batches(&set, 2, Some(features), 3);
    for (epoch, (plain, cached)) in plain.iter().zip(&cached).enumerate() {
        let (without, with) = (plain.pixels.as_ref().unwrap(), cached.pixels.as_ref().unwrap());
        for at in 0..8 {
            let (index, view) = (cached.sample_index[at], epoch as u64 % 2);
            let pixels = 48 * at..48 * (at + 1);
            let there = view == 0 && [0, 3, 6].contains(&index);
            let expected = if there { &[0; 48][..] } else { &without[pixels.clone()] };
            assert_eq!(&with[pixels], expected, "epoch {epoch}, sample {index}");
            let FeatureRow { view: found, position, stored } = &cached.features[at];
            assert_eq!((*found, stored.is_some()), (view, there || (view, index) == (1, 5)), "epoch {epoch}, {index}");
            assert_eq!(*position, cached.positions[at]);
        }
        let without = HostBatch { pixels: None, features: Vec::new(), ..cached.clone() };
        assert_eq!(without, HostBatch { pixels: None, ..plain.clone() });
    }
    // Epoch 2 has the views of epoch 0.
    let by_sample = |batch: &HostBatch| {
        let pixels = batch.pixels.clone().unwrap();
        let mut rows: Vec<_> =
            (0..8).map(|at| (batch.sample_index[at], pixels[48 * at..48 * (at + 1)].to_vec())).collect();
        rows.sort();
        rows
    };
    assert_eq!(by_sample(&plain[0]), by_sample(&plain[2]));
}

/// A held-out set as the evaluation at stream position `position` of a run reads it.
fn held_out(set: &Arc<Corpus>, features: Option<EvalFeatures>) -> Vec<HostBatch> {
    let options = EvalOptions {
        range: 0..u64::MAX,
        batch: 5,
        threads: 2,
        prefetch: 2,
        image_size: 4,
        filter: Filter::Bicubic,
        pixels: true,
        features,
        clean: Clean::Blip,
        pad_id: 0,
        pad_to_multiple: 1,
        left_out: Arc::default(),
    };
    EvalReader::new(set.clone(), text(), options).unwrap().map(Result::unwrap).collect()
}

#[test]
fn held_out_images_whose_features_were_there_before_the_evaluation_are_not_decoded() {
    let (folder, cache) = (shards(&[3, 4], |_| false), tempfile::tempdir().unwrap());
    let set = corpus(folder.path());
    let plain = held_out(&set, None);
    let image: Vec<u64> = plain.iter().flat_map(|batch| batch.image_id.clone()).collect();
    let writer = Writer::Evaluations(77);
    let rows = Arc::new(RunFeatures::new(
        FeatureStore::open(cache.path(), &description()).unwrap(),
        set.clone(),
        RunFeaturesOptions { writer, global_batch: NonZero::new(8).unwrap(), ..NO_RUN },
    ));
    // Of the evaluation before, of this one before it was killed, of a step before it, of a step of a process that was killed later.
    for (index, writer, position) in [(0, writer, 8), (2, writer, 16), (4, RUN, 14), (5, RUN, 16)] {
        let row = StoredRow { writer: writer.id(), position, ..row(image[index as usize], index as u8) };
        rows.write(index, 0, &row).unwrap();
    }
    let cached = held_out(&set, Some(EvalFeatures { rows, position: 16 }));
    for (plain, cached) in plain.iter().zip(&cached) {
        for at in 0..plain.size {
            let index = plain.sample_index[at];
            let pixels = 48 * at..48 * (at + 1);
            let there = [0, 4].contains(&index);
            let expected = if there { &[0; 48][..] } else { &plain.pixels.as_ref().unwrap()[pixels.clone()] };
            assert_eq!(&cached.pixels.as_ref().unwrap()[pixels], expected, "sample {index}");
            let FeatureRow { view, position, stored } = &cached.features[at];
            assert_eq!((*view, *position, stored.is_some()), (0, 16, [0, 2, 4, 5].contains(&index)), "sample {index}");
        }
        let without = HostBatch { pixels: None, features: Vec::new(), ..cached.clone() };
        assert_eq!(without, HostBatch { pixels: None, ..plain.clone() });
    }
}

#[test]
fn a_shard_whose_images_changed_under_the_same_index_finds_none_of_the_old_rows() {
    let cache = tempfile::tempdir().unwrap();
    let folder = shards(&[8], |_| false);
    let set = corpus(folder.path());
    let features = run_features(cache.path(), &set, 1, None);
    let first = &batches(&set, 1, None, 1)[0];
    for (&index, &image) in first.sample_index.iter().zip(&first.image_id) {
        features.write(index, 0, &StoredRow { writer: 1, ..row(image, 0) }).unwrap();
    }
    assert_eq!(batches(&set, 1, Some(features), 1)[0].pixels, None);

    // The pictures trade places: lengths, keys and places are those of before, and so is the index.
    let path = folder.path().join("00.tar");
    let bytes = fs::read(&path).unwrap();
    let places: Vec<usize> =
        bytes.windows(8).enumerate().filter(|(_, w)| w.starts_with(b"\x89PNG\r\n\x1a\n")).map(|(at, _)| at).collect();
    let length = places[1] - places[0] - 512 - 1024;
    let mut swapped = bytes.clone();
    swapped[places[0]..][..length].copy_from_slice(&bytes[places[1]..][..length]);
    swapped[places[1]..][..length].copy_from_slice(&bytes[places[0]..][..length]);
    assert_ne!(swapped, bytes);
    fs::write(&path, swapped).unwrap();
    fs::remove_file(folder.path().join("00.tar.idx")).unwrap();
    let changed = corpus(folder.path());
    assert_eq!(changed.digest(), set.digest());
    let batch = &batches(&changed, 1, Some(run_features(cache.path(), &changed, 1, None)), 1)[0];
    let absent: Vec<u64> =
        (0..8).filter(|&at| batch.features[at].stored.is_none()).map(|at| batch.sample_index[at]).collect();
    assert_eq!(absent.len(), 2);
}

#[test]
fn filling_reads_what_is_lacking_and_nothing_twice() {
    let (folder, cache) = (shards(&[3, 4], |index| index == 2), tempfile::tempdir().unwrap());
    let set = corpus(folder.path());
    let options = FillOptions {
        batch: 4,
        threads: 2,
        prefetch: 2,
        image_size: 4,
        filter: Filter::Bicubic,
        augment: Augment::CropFlip,
        jpegs: JpegSize::Full,
    };
    let fill = |max_bytes: Option<u64>, most: usize| {
        let features = run_features(cache.path(), &set, 2, max_bytes);
        let mut reader = FillReader::new(features.clone(), options).unwrap();
        let (mut rows, mut there, mut done) = (Vec::new(), 0, 0);
        for batch in reader.by_ref().take(most) {
            let batch = batch.unwrap();
            assert_eq!(batch.pixels.len(), 48 * batch.rows.len());
            there += batch.there;
            done = batch.done;
            for lacking in batch.rows {
                features.write(lacking.index, lacking.view, &row(lacking.image, 0)).unwrap();
                rows.push((lacking.view, lacking.index));
            }
        }
        let bad: Vec<u64> = reader.take_quarantined().iter().map(|bad| bad.index).collect();
        (rows, there, done, bad)
    };
    // A batch of four has two views of two images each.
    assert_eq!(fill(None, 1), (vec![(0, 0), (1, 0), (0, 1), (1, 1)], 0, 4, vec![]));
    // The limit leaves a second view to the first image alone.
    let limit = 8 * (ROW_BYTES as u64 + 32);
    assert_eq!(fill(Some(limit), 9), (vec![(0, 3), (0, 4), (0, 5), (0, 6)], 3, 8, vec![2]));
    assert_eq!(fill(None, 9), (vec![(1, 3), (1, 4), (1, 5), (1, 6)], 8, 14, vec![2]));
    assert_eq!(fill(None, 9), (vec![], 12, 14, vec![2]));
    // And no image that has no place is looked at.
    assert_eq!(fill(Some(limit / 4), 9), (vec![], 2, 2, vec![]));
    assert_eq!(
        FillReader::new(run_features(cache.path(), &set, 1, None), FillOptions { batch: 0, ..options })
            .err()
            .unwrap()
            .to_string(),
        "loader option batch: expected at least 1, got 0"
    );
}

/// Whoever fills the cache, the values are those of the same view.
#[test]
fn filling_makes_the_views_that_training_makes() {
    let folder = tempfile::tempdir().unwrap();
    let members: Vec<(String, Vec<u8>)> = (0..6u32)
        .flat_map(|at| {
            let picture = fixture::jpeg(&fixture::gradient(40 + 7 * at, 60 - 5 * at));
            [(format!("{at}.jpg"), picture), (format!("{at}.txt"), b"a red apple".to_vec())]
        })
        .collect();
    let members: Vec<(&str, &[u8])> = members.iter().map(|(name, data)| (name.as_str(), data.as_slice())).collect();
    fixture::write(folder.path(), "00.tar", &fixture::tar(&members));
    let set = corpus(folder.path());
    let views = JpegSize::ALL.map(|jpegs| {
        let (trained, filled) = (trained_views(&set, jpegs), filled_views(&set, jpegs));
        assert_eq!(filled.len(), 18);
        assert!(filled == trained, "{jpegs:?}");
        assert!(filled[0].2 != filled[1].2 || filled[1].2 != filled[2].2, "the views do not differ");
        filled
    });
    assert_ne!(views[0], views[1]);
}

/// Index, view and pixels of what three epochs of training see.
fn trained_views(set: &Arc<Corpus>, jpegs: JpegSize) -> Vec<(u64, u64, Vec<u8>)> {
    let views = Some(ImageViews { count: NonZero::new(3).unwrap(), features: None });
    let options = LoaderOptions { global_batch: 6, views, jpegs, ..loader_options() };
    let mut loader = Loader::new(set.clone(), text(), options).unwrap();
    let mut trained = Vec::new();
    for view in 0..3 {
        let batch = loader.next_batch().unwrap();
        let rows = batch.sample_index.iter().zip(batch.pixels.as_ref().unwrap().chunks_exact(48));
        trained.extend(rows.map(|(&index, pixels)| (index, view, pixels.to_vec())));
    }
    trained.sort();
    trained
}

/// The same of what fills a cache for them.
fn filled_views(set: &Arc<Corpus>, jpegs: JpegSize) -> Vec<(u64, u64, Vec<u8>)> {
    let cache = tempfile::tempdir().unwrap();
    let (filter, augment) = (Filter::Bicubic, Augment::CropFlip);
    let options = FillOptions { batch: 32, threads: 2, prefetch: 2, image_size: 4, filter, augment, jpegs };
    let mut filled = Vec::new();
    for batch in FillReader::new(run_features(cache.path(), set, 3, None), options).unwrap() {
        let batch = batch.unwrap();
        let rows = batch.rows.iter().zip(batch.pixels.chunks_exact(48));
        filled.extend(rows.map(|(row, pixels)| (row.index, row.view, pixels.to_vec())));
    }
    filled
}

/// Numbers from files decide about offsets and memory.
#[test]
fn a_file_that_claims_more_than_can_be_is_damaged_and_never_read() {
    let (folder, cache) = (shards(&[3], |_| false), tempfile::tempdir().unwrap());
    let features = run_features(cache.path(), &corpus(folder.path()), 1, None);
    features.write(0, 0, &row(9, 1)).unwrap();
    let path = only_file(cache.path());
    let whole = fs::read(&path).unwrap();
    let header: serde_json::Value = serde_json::from_slice(&whole[..4096]).unwrap();
    for samples in [1u64 << 34, u64::MAX] {
        let mut claims = header.clone();
        claims["samples"] = samples.into();
        let mut line = claims.to_string().into_bytes();
        line.resize(4095, b' ');
        line.push(b'\n');
        fs::write(&path, &line).unwrap();
        // A file with holes takes no place on the disk.
        OpenOptions::new().write(true).open(&path).unwrap().set_len(1 << 40).unwrap();
        assert_eq!(stats(cache.path()).unwrap()[0].damaged_files, std::slice::from_ref(&path), "{samples} samples");
        let report = verify(cache.path(), false, |_, _| {}).unwrap();
        assert_eq!((report.good, report.bad.len()), (0, 1));
        let other = run_features(cache.path(), &corpus(folder.path()), 1, None);
        assert_eq!(other.read(0, 0, 9), None);
    }
    let other = run_features(cache.path(), &corpus(folder.path()), 1, None);
    other.write(0, 0, &row(9, 1)).unwrap();
    assert_eq!(other.read(0, 0, 9), Some(row(9, 1)));
    // The same of what the folder says of itself.
    let description = path.with_file_name("cache.json");
    OpenOptions::new().write(true).open(&description).unwrap().set_len(1 << 40).unwrap();
    let error = stats(cache.path()).unwrap_err().to_string();
    assert!(error.contains("it does not describe"), "{error}");
}

#[test]
fn figures_of_a_cache_and_its_repair() {
    let (folder, cache) = (shards(&[3, 4], |_| false), tempfile::tempdir().unwrap());
    let set = corpus(folder.path());
    let features = run_features(cache.path(), &set, 2, None);
    for (index, view) in [(0, 0), (1, 0), (1, 1), (5, 0)] {
        features.write(index, view, &row(index, 0)).unwrap();
    }
    let key = &stats(cache.path()).unwrap()[0];
    assert_eq!((key.shards, key.pictures, key.views, key.rows), (2, 3, 2, 4));
    assert_eq!((key.bytes, &key.description), (4 * 56, &description()));
    assert!(key.damaged_files.is_empty() && key.disk_bytes > 0);
    assert_eq!(key.bytes_per_picture, key.disk_bytes as f64 / 3.0);

    let path = cache.path().join(&key.key);
    let mut files: Vec<PathBuf> = fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|file| file.extension().is_some_and(|extension| extension == "feat"));
    files.sort();
    assert_eq!(files.len(), 3);
    // A payload byte in the first view of the first shard, the header of the second shard's only file.
    let write =
        |path: &Path, at: u64| OpenOptions::new().write(true).open(path).unwrap().write_all_at(b"!", at).unwrap();
    write(&files[0], 8192 + ROW_BYTES as u64 + 3);
    write(&files[2], 0);
    fs::write(path.join(".writing-left"), "").unwrap();
    let damaged = stats(cache.path()).unwrap();
    assert_eq!((damaged[0].rows, &damaged[0].damaged_files), (3, &vec![files[2].clone()]));
    for repair in [false, true] {
        let report = verify(cache.path(), repair, |_, _| {}).unwrap();
        assert_eq!((report.keys, report.files, report.good, report.repaired), (1, 3, 2, repair));
        let bad: Vec<_> = report.bad.iter().map(|bad| (&bad.file, bad.row)).collect();
        assert_eq!(bad, [(&files[0], Some(1)), (&files[2], None)]);
    }
    let report = verify(cache.path(), false, |_, _| {}).unwrap();
    assert_eq!((report.files, report.good, report.bad), (2, 2, vec![]));
    assert!(!path.join(".writing-left").exists());
    let after = run_features(cache.path(), &set, 2, None);
    assert_eq!((after.read(1, 0, 1), after.read(1, 1, 1)), (None, Some(row(1, 0))));
}
