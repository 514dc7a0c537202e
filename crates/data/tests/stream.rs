//! From tar files to global batches: random corpora, mixtures, filters, threads, world sizes and stops.

mod fixture;

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use blip2_data::{
    Bounds, Corpus, Dataset, HostBatch, JsonPath, Loader, LoaderOptions, Mixture, OpenOptions, SampleFilter,
};
use fixture::{loader_options, options, png, tar, text, write};
use proptest::prelude::*;

/// A data set: the numbers of its samples, shard by shard, and the smallest number that passes.
#[derive(Debug, Clone)]
struct Set {
    shards: Vec<Vec<u8>>,
    min: Option<u8>,
    by: By,
    weight: u32,
}

/// What of a sample says its number.
#[derive(Debug, Clone, Copy)]
enum By {
    Width,
    Words,
    Json,
}

impl Set {
    fn write(&self, folder: &Path) {
        for (shard, numbers) in self.shards.iter().enumerate() {
            let members = |(at, &number): (usize, &u8)| {
                let words = format!("red{}", " apple".repeat(number.into()));
                [
                    (format!("{at}.png"), png(8 + u32::from(number), 8, (shard * 16 + at) as u8)),
                    (format!("{at}.txt"), words.into_bytes()),
                    (format!("{at}.json"), format!("{{\"number\": {number}}}").into_bytes()),
                ]
            };
            let members: Vec<(String, Vec<u8>)> = numbers.iter().enumerate().flat_map(members).collect();
            let members: Vec<(&str, &[u8])> = members.iter().map(|(name, data)| (&**name, &**data)).collect();
            write(folder, &format!("{shard}.tar"), &tar(&members));
        }
    }

    fn filter(&self) -> SampleFilter {
        let Some(min) = self.min else { return SampleFilter::default() };
        let at_least = |min: u8| Bounds { min: Some(min.into()), max: None };
        match self.by {
            By::Width => SampleFilter { width: at_least(8 + min), ..Default::default() },
            By::Words => SampleFilter { caption_words: at_least(1 + min), ..Default::default() },
            By::Json => SampleFilter { json: vec![(JsonPath::new("number"), at_least(min))], ..Default::default() },
        }
    }

    /// Shard and key of those that pass, in the order of the files.
    fn passing(&self) -> Vec<(String, String)> {
        let shards = self.shards.iter().enumerate();
        let samples = shards.flat_map(|(shard, all)| all.iter().enumerate().map(move |(at, n)| (shard, at, *n)));
        let passing = samples.filter(|(.., number)| self.min.is_none_or(|min| *number >= min));
        passing.map(|(shard, at, _)| (format!("{shard}.tar"), at.to_string())).collect()
    }
}

prop_compose! {
    fn set()(
        shards in prop::collection::vec(prop::collection::vec(0u8..4, 0..6), 1..4),
        min in prop::option::of(1u8..4),
        by in prop::sample::select(vec![By::Width, By::Words, By::Json]),
        weight in 1u32..4,
    ) -> Set {
        Set { shards, min, by, weight }
    }
}

fn corpus(sets: &[Set], folder: &Path) -> Arc<Corpus> {
    let open = |(number, set): (usize, &Set)| {
        let folder = folder.join(number.to_string());
        fs::create_dir(&folder).unwrap();
        set.write(&folder);
        let options = OpenOptions { filter: set.filter(), ..options(&folder) };
        (Dataset::open(&["*.tar".to_owned()], &options).unwrap(), f64::from(set.weight))
    };
    Arc::new(Corpus::new(sets.iter().enumerate().map(open).collect()).unwrap())
}

/// The batches from `start` on, put together from the slices of `world` ranks.
fn global_batches(corpus: &Arc<Corpus>, options: &LoaderOptions, world: usize, batches: usize) -> Vec<Vec<HostBatch>> {
    let rank = |rank| {
        let options = LoaderOptions { rank, world, ..options.clone() };
        let mut loader = Loader::new(Arc::clone(corpus), text(), options).unwrap();
        (0..batches).map(|_| loader.next_batch().unwrap()).collect::<Vec<_>>()
    };
    let ranks: Vec<Vec<HostBatch>> = (0..world).map(rank).collect();
    (0..batches).map(|batch| ranks.iter().map(|rank| rank[batch].clone()).collect()).collect()
}

/// All that is in the rows of a batch, whoever holds them.
type Row = (u64, u64, u64, String, Vec<u8>);

fn rows(slices: &[HostBatch]) -> Vec<Row> {
    let of = |slice: &HostBatch| {
        let pixels = slice.pixels.as_ref().unwrap();
        let of_a_row = pixels.len() / slice.size;
        let row = |row: usize| {
            let pixels = pixels[row * of_a_row..][..of_a_row].to_vec();
            let (position, index) = (slice.positions[row], slice.sample_index[row]);
            (position, index, slice.image_id[row], slice.captions[row].clone(), pixels)
        };
        (0..slice.size).map(row).collect::<Vec<_>>()
    };
    slices.iter().flat_map(of).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]
    #[test]
    fn every_sample_once_per_epoch_in_the_same_batches_for_anyone(
        sets in prop::collection::vec(set().prop_filter("none passes", |set| !set.passing().is_empty()), 1..4),
        seed: u64,
        lanes in 1usize..4,
        slots in 1usize..5,
        window_shards in 1usize..4,
        (threads, prefetch) in (1usize..5, 1usize..5),
        stop in 0.0..1.0f64,
    ) {
        let folder = tempfile::tempdir().unwrap();
        let corpus = corpus(&sets, folder.path());
        let global_batch = lanes * slots;
        let law = Mixture::new(&corpus.mixture(), seed, lanes, global_batch, window_shards).unwrap();
        let position = |batch: usize| (batch * global_batch) as u64;
        // Two epochs of every set in any lane.
        let long_enough = |batch: &usize| law.drawn(position(*batch)).iter().all(|set| set.samples > 2 * set.len);
        let batches = (1..).find(long_enough).unwrap() + 1;
        let options = LoaderOptions { seed, lanes, global_batch, window_shards, ..loader_options() };
        let alone = LoaderOptions { threads: 1, prefetch: 1, ..options.clone() };
        let whole: Vec<Vec<Row>> =
            global_batches(&corpus, &alone, 1, batches).iter().map(|batch| rows(batch)).collect();

        // Each set is gone through before any of its samples comes again.
        let mut seen: HashMap<(usize, u64), Vec<(String, String)>> = HashMap::new();
        for (at, (position, index, ..)) in whole.iter().flatten().enumerate() {
            prop_assert_eq!(*position, at as u64);
            let located = law.locate(*position);
            prop_assert_eq!(located.index, *index);
            let lens = sets.iter().map(|set| set.passing().len() as u64);
            let ends: Vec<u64> = lens.scan(0, |end, len| { *end += len; Some(*end) }).collect();
            let set = ends.partition_point(|end| end <= index);
            seen.entry((set, located.epoch)).or_default().push(corpus.key(*index).unwrap());
        }
        for (number, (set, drawn)) in sets.iter().zip(law.drawn(position(batches))).enumerate() {
            let mut passing = set.passing();
            passing.sort();
            prop_assert_eq!(drawn.len, passing.len() as u64);
            // Lanes may stand in different epochs around a seam.
            let epochs = (drawn.samples / drawn.len).saturating_sub(1);
            prop_assert!(epochs > 0);
            for epoch in 0..epochs {
                let mut keys = seen[&(number, epoch)].clone();
                keys.sort();
                prop_assert_eq!(&keys, &passing, "set {} in epoch {}", number, epoch);
            }
        }

        // Whoever decodes it, and wherever it begins.
        let stop = (stop * batches as f64) as usize;
        let resumed = LoaderOptions { start: position(stop), threads, prefetch, ..options.clone() };
        let begun = LoaderOptions { threads, prefetch, ..options };
        for world in (1..=global_batch).filter(|world| global_batch.is_multiple_of(*world)) {
            for (options, first) in [(&begun, 0), (&resumed, stop)] {
                let batches = global_batches(&corpus, options, world, batches - first);
                for (batch, expected) in batches.iter().zip(&whole[first..]) {
                    prop_assert!(&rows(batch) == expected, "world {} from batch {}", world, first);
                }
            }
        }
    }
}
