//! Several data sets as one stream: shares, epochs, filters and captions under the order law.

mod fixture;

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use blip2_data::{
    Bounds, CaptionRule, CaptionSource, Corpus, DataError, Dataset, JsonPath, Loader, LoaderOptions, Mixture,
    MixtureSet, OpenOptions, Pick, SampleFilter,
};
use fixture::{loader_options, options, png, tar, text, write};
use proptest::prelude::*;
use rayon::prelude::*;

#[derive(Debug, Clone)]
struct Law {
    sets: Vec<MixtureSet>,
    seed: u64,
    lanes: usize,
    global_batch: usize,
    window_shards: usize,
}

impl Law {
    fn mixture(&self) -> Mixture {
        Mixture::new(&self.sets, self.seed, self.lanes, self.global_batch, self.window_shards).unwrap()
    }

    fn lens(&self) -> Vec<u64> {
        self.sets.iter().map(|set| set.counts.iter().sum()).collect()
    }

    /// The set that an index belongs to, and the index in there.
    fn set_of(&self, index: u64) -> (usize, u64) {
        let mut start = 0;
        for (set, len) in self.lens().into_iter().enumerate() {
            if index < start + len {
                return (set, index - start);
            }
            start += len;
        }
        panic!("index {index} is beyond all sets");
    }
}

prop_compose! {
    fn law()(
        sets in prop::collection::vec(
            (prop::collection::vec(0u64..25, 1..6).prop_filter("no sample", |c| c.iter().sum::<u64>() > 0), 1u32..12),
            1..5,
        ),
        seed: u64,
        lanes in 1usize..5,
        slots in 1usize..6,
        window_shards in 1usize..5,
    ) -> Law {
        let sets = sets.into_iter().map(|(counts, weight)| MixtureSet { counts, weight: f64::from(weight) / 4.0 });
        Law { sets: sets.collect(), seed, lanes, global_batch: lanes * slots, window_shards }
    }
}

proptest! {
    #[test]
    fn each_set_is_a_stream_of_its_own_with_every_sample_once_per_epoch(law in law()) {
        let mixture = law.mixture();
        let mut drawn: HashMap<(usize, u64), Vec<u64>> = HashMap::new();
        let batches = 600 / law.global_batch as u64 + 1;
        let positions = batches * law.global_batch as u64;
        for position in 0..positions {
            let located = mixture.locate(position);
            let (set, own) = law.set_of(located.index);
            drawn.entry((set, located.epoch)).or_default().push(own);
        }
        let progress = mixture.drawn(positions);
        for (set, len) in law.lens().into_iter().enumerate() {
            let count: usize = drawn.iter().filter(|((s, _), _)| *s == set).map(|(_, list)| list.len()).sum();
            prop_assert_eq!(progress[set].samples, count as u64);
            // Lanes may stand in different epochs around a seam; those before it are whole.
            for epoch in 0..(count as u64 / len).saturating_sub(1) {
                let mut list = drawn[&(set, epoch)].clone();
                list.sort_unstable();
                prop_assert_eq!(list, (0..len).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn at_every_prefix_of_a_lane_each_set_has_its_share_to_within_a_draw(law in law()) {
        let mixture = law.mixture();
        let total: f64 = law.sets.iter().map(|set| set.weight).sum();
        let lane_batch = law.global_batch / law.lanes;
        for lane in 0..law.lanes {
            let mut counts = vec![0.0; law.sets.len()];
            let own = (0..400 * law.lanes as u64).filter(|p| (*p as usize % law.global_batch) / lane_batch == lane);
            for (drawn, position) in own.enumerate() {
                counts[law.set_of(mixture.locate(position).index).0] += 1.0;
                for (set, count) in counts.iter().enumerate() {
                    let share = (drawn + 1) as f64 * law.sets[set].weight / total;
                    prop_assert!((count - share).abs() < 1.0, "{} draws of set {}, its share is {}", count, set, share);
                }
            }
        }
    }

    #[test]
    fn seeking_equals_having_run_there(law in law(), skip in 0u64..3000) {
        let (ran, sought) = (law.mixture(), law.mixture());
        (0..skip).step_by(7).for_each(|position| { ran.locate(position); });
        for position in (skip..skip + 20).rev() {
            prop_assert_eq!(sought.locate(position), ran.locate(position));
            let window = |mixture: &Mixture| mixture.window(position).collect::<Vec<_>>();
            prop_assert_eq!(window(&sought), window(&ran));
        }
    }

    #[test]
    fn a_set_alone_has_the_order_of_a_plain_data_set(law in law(), from in 0u64..500) {
        let alone = Law { sets: law.sets[..1].to_vec(), ..law };
        let counts = &alone.sets[0].counts;
        let plain =
            blip2_data::Order::new(counts, alone.seed, alone.lanes, alone.global_batch, alone.window_shards).unwrap();
        let mixture = alone.mixture();
        for position in from..from + 50 {
            prop_assert_eq!(mixture.locate(position), plain.locate(position));
        }
    }
}

/// A set of `count` pictures; sample `i` is `10 + i` wide, 10 high, and has `i` in its metadata.
fn set(folder: &Path, name: &str, count: usize) {
    let members: Vec<(String, Vec<u8>)> = (0..count)
        .flat_map(|i| {
            let json = serde_json::json!({"similarity": i as f64 / 10.0, "texts": ["a red", "red apple", "apple a"],
                "quality": {"watermark": i.to_string()}});
            [
                (format!("{i:03}.png"), png(10 + i as u32, 10, i as u8)),
                (format!("{i:03}.txt"), format!("red{}", " apple".repeat(i)).into_bytes()),
                (format!("{i:03}.json"), json.to_string().into_bytes()),
            ]
        })
        .collect();
    let members: Vec<(&str, &[u8])> = members.iter().map(|(name, data)| (name.as_str(), data.as_slice())).collect();
    write(folder, name, &tar(&members));
}

fn at_least(min: f64) -> Bounds {
    Bounds { min: Some(min), max: None }
}

fn filtered(folder: &Path, filter: SampleFilter) -> Result<Dataset, DataError> {
    Dataset::open(&["*.tar".to_owned()], &OpenOptions { filter, ..options(folder) })
}

fn keys(dataset: &Dataset) -> Vec<String> {
    (0..dataset.len()).map(|index| dataset.key(index).unwrap().1).collect()
}

#[test]
fn a_filter_decides_by_sides_words_and_metadata() {
    let folder = tempfile::tempdir().unwrap();
    set(folder.path(), "0.tar", 6);
    let json = |path: &str, bounds| SampleFilter { json: vec![(JsonPath::new(path), bounds)], ..Default::default() };
    let at_most = |max: f64| Bounds { min: None, max: Some(max) };
    for (filter, expected) in [
        (SampleFilter { width: at_least(13.0), ..Default::default() }, &["003", "004", "005"][..]),
        (SampleFilter { height: at_most(10.0), width: at_most(11.0), ..Default::default() }, &["000", "001"]),
        (SampleFilter { aspect: at_least(1.45), ..Default::default() }, &["005"]),
        (
            SampleFilter { caption_words: Bounds { min: Some(2.0), max: Some(3.0) }, ..Default::default() },
            &["001", "002"],
        ),
        (json("similarity", at_least(0.4)), &["004", "005"]),
        (json("quality.watermark", at_most(1.0)), &["000", "001"]),
    ] {
        let dataset = filtered(folder.path(), filter.clone()).unwrap();
        assert_eq!(keys(&dataset), expected, "{filter:?}");
        assert_eq!((dataset.passed().passed, dataset.passed().of), (expected.len() as u64, 6));
        assert_eq!(dataset.counts(), [expected.len() as u64]);
        let first = dataset.read(0, Pick::First).unwrap();
        assert_eq!(first.key, expected[0]);
        assert_eq!(dataset.place(0).unwrap().1, expected[0].parse::<u64>().unwrap());
    }
    let error = filtered(folder.path(), json("similarity", at_least(2.0))).err().unwrap();
    assert_eq!(error.to_string(), "0 of 6 samples pass the filter; loosen the filter");
    let error = filtered(folder.path(), json("missing", at_least(-1e9))).err().unwrap();
    assert!(matches!(error, DataError::NothingPasses(_)));
}

#[test]
fn what_a_filter_asks_is_measured_once_and_again_when_the_shard_changes() {
    let folder = tempfile::tempdir().unwrap();
    set(folder.path(), "0.tar", 4);
    let wide = SampleFilter { width: at_least(12.0), ..Default::default() };
    let attributes = folder.path().join("0.tar.attributes");
    assert_eq!(filtered(folder.path(), wide.clone()).unwrap().len(), 2);
    let written = fs::read_to_string(&attributes).unwrap();
    // What is read back is what was written, not the shard.
    fs::write(&attributes, written.replace("13.0", "1.0")).unwrap();
    assert_eq!(filtered(folder.path(), wide.clone()).unwrap().len(), 1);
    // Another column is added to those that are there.
    let both = SampleFilter { caption_words: at_least(1.0), ..wide.clone() };
    assert_eq!(filtered(folder.path(), both).unwrap().len(), 1);
    // A new shard has a new index, which the numbers do not belong to.
    set(folder.path(), "0.tar", 5);
    assert_eq!(filtered(folder.path(), wide.clone()).unwrap().len(), 3);
    // Damage is no answer.
    fs::write(&attributes, "{").unwrap();
    assert_eq!(filtered(folder.path(), wide).unwrap().len(), 3);
}

/// A shard whose samples have these scores, written with as many digits whatever they are.
fn scored(path: &Path, scores: [f64; 3]) {
    let image = png(10, 10, 1);
    let members: Vec<(String, Vec<u8>)> = (0..3)
        .flat_map(|i| {
            let json = format!("{{\"score\": {:.3}}}", scores[i]);
            [
                (format!("{i}.png"), image.clone()),
                (format!("{i}.txt"), b"red".into()),
                (format!("{i}.json"), json.into()),
            ]
        })
        .collect();
    let members: Vec<(&str, &[u8])> = members.iter().map(|(name, data)| (name.as_str(), data.as_slice())).collect();
    write(path.parent().unwrap(), path.file_name().unwrap().to_str().unwrap(), &tar(&members));
}

fn score(min: f64) -> SampleFilter {
    SampleFilter { json: vec![(JsonPath::new("score"), at_least(min))], ..Default::default() }
}

/// Scores of as many digits leave the index of a shard what it was.
#[test]
fn a_shard_scored_anew_is_measured_anew() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("0.tar");
    scored(&path, [0.1, 0.5, 0.9]);
    let before = filtered(folder.path(), score(0.4)).unwrap();
    assert_eq!(keys(&before), ["1", "2"]);
    scored(&path, [0.9, 0.5, 0.1]);
    // Whatever the clock's grain.
    let later = std::time::SystemTime::now() + std::time::Duration::from_secs(5);
    fs::File::options().append(true).open(&path).unwrap().set_modified(later).unwrap();
    let after = filtered(folder.path(), score(0.4)).unwrap();
    assert_eq!(before.shards()[0].index, after.shards()[0].index);
    assert_eq!(keys(&after), ["0", "1"]);
    assert_ne!(before.digest(), after.digest());
}

#[test]
fn shards_with_equal_indices_have_numbers_of_their_own() {
    let (a, b, cache) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let open = |folder: &Path| {
        // The numbers cannot lie beside the shard.
        fs::create_dir_all(folder.join("0.tar.attributes")).unwrap();
        let cache_dir = Some(cache.path().to_owned());
        Dataset::open(&["0.tar".to_owned()], &OpenOptions { filter: score(0.4), cache_dir, ..options(folder) }).unwrap()
    };
    scored(&a.path().join("0.tar"), [0.1, 0.5, 0.9]);
    scored(&b.path().join("0.tar"), [0.9, 0.1, 0.1]);
    // Not even their times differ.
    for folder in [&a, &b] {
        let file = fs::File::options().append(true).open(folder.path().join("0.tar")).unwrap();
        file.set_modified(std::time::UNIX_EPOCH + std::time::Duration::from_secs(1 << 30)).unwrap();
    }
    for _ in 0..2 {
        assert_eq!((keys(&open(a.path())), keys(&open(b.path()))), (vec!["1".into(), "2".into()], vec!["0".into()]));
    }
    assert_eq!(fs::read_dir(cache.path()).unwrap().count(), 2);
}

#[test]
fn a_digest_says_which_samples_pass() {
    let folder = tempfile::tempdir().unwrap();
    scored(&folder.path().join("0.tar"), [0.1, 0.5, 0.9]);
    scored(&folder.path().join("1.tar"), [0.9, 0.5, 0.1]);
    let digest = |filter: SampleFilter| filtered(folder.path(), filter).unwrap().digest();
    let below = |max: f64| SampleFilter {
        json: vec![(JsonPath::new("score"), Bounds { min: None, max: Some(max) })],
        ..Default::default()
    };
    // As it always was, where there is no filter: runs go on.
    let all = filtered(folder.path(), SampleFilter::default()).unwrap();
    let lines: String = all.shards().iter().map(|s| format!("{}\0{}\0{}\n", s.name(), s.bytes, s.index)).collect();
    assert_eq!(all.digest(), blake3::hash(lines.as_bytes()).to_hex().to_string());
    assert_ne!(digest(score(0.4)), all.digest());
    assert_eq!(digest(score(0.4)), digest(score(0.45)));
    // Two of three in each shard, and four of six in all: but others.
    assert_ne!(digest(score(0.4)), digest(below(0.6)));
    let mixture = |filter: SampleFilter| {
        let set = |filter| (filtered(folder.path(), filter).unwrap(), 1.0);
        Corpus::new(vec![set(SampleFilter::default()), set(filter)]).unwrap().digest()
    };
    assert_ne!(mixture(score(0.4)), mixture(below(0.6)));
}

#[test]
fn numbers_that_change_while_a_set_is_open_do_not_move_its_samples() {
    let folder = tempfile::tempdir().unwrap();
    scored(&folder.path().join("0.tar"), [0.1, 0.5, 0.9]);
    let open = filtered(folder.path(), score(0.4)).unwrap();
    let attributes = folder.path().join("0.tar.attributes");
    let written = fs::read_to_string(&attributes).unwrap();
    fs::write(&attributes, written.replace("0.5", "0.3")).unwrap();
    let error = open.read(1, Pick::First).unwrap_err().to_string();
    assert!(error.contains("lets other samples pass"), "{error}");
    assert!(open.key(0).is_err() && open.place(0).is_none());
}

/// Whoever measures a shard has its lock; a thread that takes up other work meanwhile must not come to that lock.
#[test]
fn reading_a_filtered_set_on_few_threads_does_not_wait_for_itself() {
    let folder = tempfile::tempdir().unwrap();
    set(folder.path(), "0.tar", 60);
    let (tell, told) = std::sync::mpsc::channel();
    let path = folder.path().to_owned();
    std::thread::spawn(move || {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
        for _ in 0..20 {
            let open = filtered(&path, SampleFilter { width: at_least(11.0), ..Default::default() }).unwrap();
            fs::remove_file(path.join("0.tar.attributes")).unwrap();
            pool.install(|| {
                (0..open.len()).into_par_iter().for_each(|index| drop(open.read(index, Pick::First).unwrap()));
            });
        }
        tell.send(()).unwrap();
    });
    assert!(told.recv_timeout(std::time::Duration::from_secs(60)).is_ok(), "it hangs");
}

#[test]
fn a_picture_with_an_empty_caption_among_its_captions_is_never_lost() {
    let folder = tempfile::tempdir().unwrap();
    let image = png(9, 9, 1);
    let json = br#"{"texts": ["", "a red apple", " ...", "red"]}"#;
    write(folder.path(), "0.tar", &tar(&[("a.png", &image), ("a.json", json), ("b.png", &image), ("b.json", json)]));
    let captions = CaptionSource::Drawn { field: JsonPath::new("texts"), top: None };
    let captions = CaptionRule { source: captions, template: None };
    let corpus = corpus(&[(folder.path(), 1.0, OpenOptions { captions, ..options(folder.path()) })]);
    let mut loader = Loader::new(corpus, text(), loader_options()).unwrap();
    let drawn: Vec<String> = (0..10).flat_map(|_| loader.next_batch().unwrap().captions).collect();
    assert!(loader.bad().is_empty(), "{:?}", loader.take_quarantined());
    for caption in ["a red apple", "red"] {
        assert!((25..56).contains(&drawn.iter().filter(|drawn| *drawn == caption).count()), "{drawn:?}");
    }
}

fn corpus(folders: &[(&Path, f64, OpenOptions)]) -> Arc<Corpus> {
    let open = |(_, weight, options): &(&Path, f64, OpenOptions)| {
        (Dataset::open(&["*.tar".to_owned()], options).unwrap(), *weight)
    };
    Arc::new(Corpus::new(folders.iter().map(open).collect()).unwrap())
}

#[test]
fn the_loader_draws_from_a_mixture_alike_for_any_threads_and_ranks() {
    let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    set(a.path(), "0.tar", 9);
    set(a.path(), "1.tar", 7);
    set(b.path(), "0.tar", 5);
    let drawn = CaptionSource::Drawn { field: JsonPath::new("texts"), top: Some(2) };
    let b_options = OpenOptions {
        captions: CaptionRule { source: drawn, template: Some("a {}".into()) },
        filter: SampleFilter { width: at_least(11.0), ..Default::default() },
        ..options(b.path())
    };
    let corpus = corpus(&[(a.path(), 0.75, options(a.path())), (b.path(), 0.25, b_options)]);
    assert_eq!(corpus.len(), 16 + 4);

    let run = |options: LoaderOptions| -> Vec<_> {
        let mut loader = Loader::new(corpus.clone(), text(), options).unwrap();
        (0..12).map(|_| loader.next_batch().unwrap()).collect()
    };
    let whole = run(LoaderOptions { threads: 1, prefetch: 1, ..loader_options() });
    assert_eq!(run(LoaderOptions { threads: 4, prefetch: 5, ..loader_options() }), whole);
    for rank in 0..2 {
        for (slice, batch) in run(LoaderOptions { rank, world: 2, ..loader_options() }).iter().zip(&whole) {
            assert_eq!(slice.sample_index, batch.sample_index[rank * 4..][..4]);
            assert_eq!(slice.captions, batch.captions[rank * 4..][..4]);
        }
    }
    // A quarter of each batch of 8 comes from b, whose captions are two of three, in a template.
    let mut captions: Vec<&str> = Vec::new();
    for batch in &whole {
        let of_b = (0..8).filter(|&row| batch.sample_index[row] >= 16);
        let of_b: Vec<usize> = of_b.collect();
        assert_eq!(of_b.len(), 2);
        captions.extend(of_b.iter().map(|&row| batch.captions[row].as_str()));
    }
    captions.sort_unstable();
    captions.dedup();
    assert_eq!(captions, ["a a red", "a red apple"]);
    let loader = Loader::new(corpus, text(), loader_options()).unwrap();
    let drawn = loader.drawn(96);
    assert_eq!((drawn[0].samples, drawn[1].samples, drawn[1].len), (72, 24, 4));
    assert_eq!(drawn[1].epochs(), 6.0);
}

#[test]
fn a_bad_sample_of_a_mixture_is_replaced_from_its_own_set() {
    let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    set(a.path(), "0.tar", 6);
    let good = png(9, 9, 1);
    let members: [(&str, &[u8]); 4] =
        [("x.png", b"\x89PNG no"), ("x.txt", b"red"), ("y.png", &good), ("y.txt", b"red")];
    write(b.path(), "0.tar", &tar(&members));
    let corpus = corpus(&[(a.path(), 1.0, options(a.path())), (b.path(), 1.0, options(b.path()))]);
    let mut loader = Loader::new(corpus, text(), LoaderOptions { max_bad_fraction: 1.0, ..loader_options() }).unwrap();
    let batch = loader.next_batch().unwrap();
    assert_eq!(batch.sample_index.iter().filter(|&&index| index == 7).count(), 4);
    let quarantined = loader.take_quarantined();
    assert_eq!((quarantined.len(), quarantined[0].index, quarantined[0].key.as_str()), (1, 6, "x"));
}
