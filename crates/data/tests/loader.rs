//! What the loader hands out depends on seed, position, files and the list of bad samples; on nothing else.

mod fixture;

use std::sync::Arc;
use std::time::{Duration, Instant};

use blip2_data::{BadSamples, Corpus, DataError, EvalOptions, EvalReader, HostBatch, Loader, LoaderOptions, Order};
use fixture::{corpus, loader_options, open, shards, text};
use proptest::prelude::*;

const COUNTS: [usize; 4] = [7, 0, 12, 5];

fn broken(index: usize) -> bool {
    index % 6 == 1
}

fn loader(dataset: &Arc<Corpus>, options: LoaderOptions) -> Loader {
    Loader::new(Arc::clone(dataset), text(), options).unwrap()
}

fn run(loader: &mut Loader, batches: usize) -> Vec<HostBatch> {
    (0..batches).map(|_| loader.next_batch().unwrap()).collect()
}

#[test]
fn a_batch_holds_what_the_order_law_says() {
    let folder = shards(&COUNTS, |_| false);
    let dataset = corpus(folder.path());
    let options = loader_options();
    let order = Order::new(&open(folder.path()).counts(), options.seed, 1, 8, options.window_shards).unwrap();
    for batch in run(&mut loader(&dataset, options), 9) {
        let expected: Vec<u64> = batch.positions.iter().map(|&p| order.locate(p).index).collect();
        assert_eq!(batch.sample_index, expected);
        assert_eq!(batch.epoch, order.locate(batch.position).epoch);
        for row in 0..batch.size {
            let words = batch.captions[row].split(' ').count();
            assert_eq!(words, 3 + batch.sample_index[row] as usize % 5);
            assert_eq!(batch.lengths[row], words + 2);
            // One colour all over, whatever the crop: the sample's index is its red.
            let pixels = batch.pixels.as_ref().unwrap();
            assert!(pixels[row * 48..row * 48 + 16].iter().all(|&red| u64::from(red) == batch.sample_index[row]));
        }
    }
}

#[test]
fn threads_and_prefetch_do_not_change_the_batches() {
    let folder = shards(&COUNTS, broken);
    let dataset = corpus(folder.path());
    let mut seen = None;
    for (threads, prefetch) in [(1, 1), (2, 4), (5, 2)] {
        let mut loader = loader(&dataset, LoaderOptions { threads, prefetch, ..loader_options() });
        let steps: Vec<_> =
            (0..8).map(|_| (loader.next_batch().unwrap(), loader.bad(), loader.take_quarantined())).collect();
        assert_eq!(steps.last().unwrap().1.len(), 4);
        assert!(steps.iter().all(|(batch, ..)| batch.sample_index.iter().all(|&i| !broken(i as usize))));
        assert_eq!(seen.get_or_insert(steps.clone()), &steps);
    }
}

#[test]
fn ranks_take_contiguous_slices_of_the_same_batch() {
    let folder = shards(&COUNTS, broken);
    let dataset = corpus(folder.path());
    let whole = run(&mut loader(&dataset, LoaderOptions { lanes: 4, ..loader_options() }), 6);
    for world in [2, 4, 8] {
        for rank in 0..world {
            let options = LoaderOptions { lanes: 4, rank, world, ..loader_options() };
            for (slice, batch) in run(&mut loader(&dataset, options), 6).iter().zip(&whole) {
                let rows = batch.rows(rank * 8 / world..(rank + 1) * 8 / world, 1);
                assert_eq!(slice.sample_index, rows.sample_index);
                assert_eq!((&slice.pixels, &slice.input_ids), (&rows.pixels, &rows.input_ids));
            }
        }
    }
}

#[test]
fn the_bad_list_holds_what_was_handed_out_and_nothing_decoded_ahead() {
    let folder = shards(&COUNTS, broken);
    let dataset = corpus(folder.path());
    let mut patient = loader(&dataset, LoaderOptions { prefetch: 1, ..loader_options() });
    let mut hasty = loader(&dataset, LoaderOptions { prefetch: 6, ..loader_options() });
    assert!(hasty.bad().is_empty());
    for _ in 0..6 {
        assert_eq!(patient.next_batch().unwrap(), hasty.next_batch().unwrap());
        assert_eq!(patient.bad(), hasty.bad());
        assert_eq!(patient.take_quarantined(), hasty.take_quarantined());
    }
}

#[test]
fn a_resumed_stream_is_the_uninterrupted_one() {
    let folder = shards(&COUNTS, broken);
    let dataset = corpus(folder.path());
    let mut whole = loader(&dataset, loader_options());
    let mut states = vec![(0, whole.bad())];
    let mut batches = Vec::new();
    for step in 1..10 {
        batches.push(whole.next_batch().unwrap());
        states.push((step, whole.bad()));
    }
    for (step, bad) in states.iter().take(8) {
        let options = LoaderOptions { start: *step as u64 * 8, bad: bad.clone(), ..loader_options() };
        let mut resumed = loader(&dataset, options);
        assert_eq!(run(&mut resumed, 9 - step), batches[*step..]);
        assert_eq!(resumed.bad(), states[9].1);
    }
}

#[test]
fn a_sample_in_the_bad_list_is_not_tried_again_though_it_could_be_read() {
    let folder = shards(&COUNTS, |_| false);
    let dataset = corpus(folder.path());
    let mut bad = BadSamples::default();
    bad.insert(1, 0);
    let mut loader = loader(&dataset, LoaderOptions { bad, ..loader_options() });
    let batches = run(&mut loader, 9);
    assert!(batches.iter().all(|batch| !batch.sample_index.contains(&1)));
    assert!(loader.take_quarantined().is_empty());
}

#[test]
fn too_many_bad_samples_stop_the_stream_and_say_why() {
    let folder = shards(&[40], |index| index % 2 == 0);
    let dataset = corpus(folder.path());
    let mut loader = loader(&dataset, LoaderOptions { max_bad_fraction: 0.0005, ..loader_options() });
    let error = (0..5).find_map(|_| loader.next_batch().err()).unwrap();
    assert!(matches!(error, DataError::TooManyBad { found: 6.., .. }), "{error}");
    let text = error.to_string();
    assert!(text.contains("shard 00.tar, key 00") && text.contains("damaged PNG"), "{text}");
    assert!(!loader.take_quarantined().is_empty());
}

#[test]
fn a_window_without_a_readable_sample_is_an_error() {
    let folder = shards(&[3], |_| true);
    let dataset = corpus(folder.path());
    let error = loader(&dataset, loader_options()).next_batch().unwrap_err();
    assert!(matches!(error, DataError::WindowUnreadable { position: 0, samples: 3, .. }), "{error}");
    assert!(error.to_string().contains("damaged PNG"), "{error}");
}

#[test]
fn a_bounded_stream_ends() {
    let folder = shards(&COUNTS, |_| false);
    let dataset = corpus(folder.path());
    let mut loader = loader(&dataset, LoaderOptions { start: 8, end: Some(24), ..loader_options() });
    assert_eq!(run(&mut loader, 2)[1].position, 16);
    assert!(matches!(loader.next_batch(), Err(DataError::EndOfStream { end: 24 })));
}

#[test]
fn without_pixels_the_same_samples_come_without_images() {
    let folder = shards(&COUNTS, |_| false);
    let dataset = corpus(folder.path());
    let with = loader(&dataset, loader_options()).next_batch().unwrap();
    let without = loader(&dataset, LoaderOptions { pixels: false, ..loader_options() }).next_batch().unwrap();
    assert_eq!(without, HostBatch { pixels: None, ..with });
}

#[test]
fn one_image_with_two_captions_has_one_id() {
    let folder = tempfile::tempdir().unwrap();
    let (same, other) = (fixture::png(5, 5, 1), fixture::png(5, 5, 2));
    let members: [(&str, &[u8]); 6] = [
        ("a.png", &same),
        ("a.txt", b"red"),
        ("b.png", &other),
        ("b.txt", b"red"),
        ("c.png", &same),
        ("c.txt", b"apple"),
    ];
    fixture::write(folder.path(), "0.tar", &fixture::tar(&members));
    let dataset = corpus(folder.path());
    let batch = EvalReader::new(dataset, text(), eval_options(0..3)).unwrap().next().unwrap().unwrap();
    assert_eq!(batch.image_id[0], batch.image_id[2]);
    assert_ne!(batch.image_id[0], batch.image_id[1]);
}

#[test]
fn a_dropped_loader_does_not_decode_on() {
    let folder = shards(&[200], |_| false);
    let dataset = corpus(folder.path());
    let options = LoaderOptions { global_batch: 200, prefetch: 500, threads: 1, image_size: 512, ..loader_options() };
    let loader = loader(&dataset, options);
    let begin = Instant::now();
    drop(loader);
    // 100,000 images were queued. The threads hold the data set until the queue is empty.
    while Arc::strong_count(&dataset) > 1 {
        assert!(begin.elapsed() < Duration::from_secs(5), "threads are still at work");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn all_wrong_options_are_listed_at_once() {
    let folder = shards(&[4], |_| false);
    let options =
        LoaderOptions { world: 3, rank: 5, start: 3, threads: 0, max_bad_fraction: f64::NAN, ..loader_options() };
    let error = Loader::new(corpus(folder.path()), text(), options).err().unwrap().to_string();
    for option in ["world", "rank", "start", "threads", "max_bad_fraction"] {
        assert!(error.contains(&format!("option {option}:")), "{error}");
    }
}

/// More than are kept where nobody says how many are read in turn.
#[test]
fn as_many_shards_stay_open_as_a_window_has() {
    let folder = shards(&[1; 100], |_| false);
    let options = LoaderOptions { window_shards: 100, ..loader_options() };
    let mut loader = loader(&corpus(folder.path()), options);
    run(&mut loader, 13);
    let links =
        std::fs::read_dir("/proc/self/fd").unwrap().filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok());
    assert_eq!(links.filter(|file| file.starts_with(folder.path())).count(), 100);
}

fn eval_options(range: std::ops::Range<u64>) -> EvalOptions {
    EvalOptions {
        range,
        batch: 5,
        threads: 2,
        prefetch: 2,
        image_size: 4,
        filter: blip2_data::Filter::Bicubic,
        pixels: true,
        features: None,
        clean: blip2_data::Clean::Blip,
        pad_id: 0,
        pad_to_multiple: 1,
        left_out: Arc::default(),
    }
}

#[test]
fn evaluation_reads_in_order_and_leaves_bad_samples_out() {
    let folder = shards(&COUNTS, broken);
    let dataset = corpus(folder.path());
    let mut reader = EvalReader::new(dataset, text(), eval_options(2..1000)).unwrap();
    let indices: Vec<u64> = reader.by_ref().flat_map(|batch| batch.unwrap().sample_index).collect();
    assert_eq!(indices, (2..24).filter(|&i| !broken(i as usize)).collect::<Vec<_>>());
    let bad: Vec<u64> = reader.take_quarantined().iter().map(|bad| bad.index).collect();
    assert_eq!(bad, [7, 13, 19]);

    let left_out = Arc::new([3, 13].into());
    let options = EvalOptions { pixels: false, left_out, ..eval_options(2..1000) };
    let mut reader = EvalReader::new(corpus(folder.path()), text(), options).unwrap();
    let indices: Vec<u64> = reader.by_ref().flat_map(|batch| batch.unwrap().sample_index).collect();
    assert_eq!(indices, (2..24).filter(|i| ![3, 13].contains(i)).collect::<Vec<_>>());
    assert!(reader.take_quarantined().is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    #[test]
    fn seeking_equals_running_for_any_threads(seed: u64, threads in 1usize..5, step in 0usize..6, lanes in prop::sample::select(vec![1usize, 2, 4])) {
        let folder = shards(&COUNTS, broken);
        let dataset = corpus(folder.path());
        let options = LoaderOptions { seed, lanes, ..loader_options() };
        let ran = run(&mut loader(&dataset, LoaderOptions { threads: 1, ..options.clone() }), 7);
        let mut sought = loader(&dataset, LoaderOptions { start: step as u64 * 8, threads, ..options });
        prop_assert_eq!(run(&mut sought, 7 - step), &ran[step..]);
    }
}
