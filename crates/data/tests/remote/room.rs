//! Sets and processes that share a cache which cannot hold all that each would keep.

use std::env;
use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Child;
use std::sync::Arc;

use blip2_data::{Corpus, DataError, Dataset, EvalOptions, EvalReader, Filter, Loader, LoaderOptions, Pick};

use crate::fixture::{corpus, loader_options, shards, text};
use crate::processes::{CACHE, ENDPOINT, child_with};
use crate::server::{BUCKET, Fate, Proxy, Server};
use crate::{files, remote_options, tars, until};

/// A bucket of `count` shards of 20 samples, and the length of the longest.
fn bucket(count: usize) -> (tempfile::TempDir, Server, Proxy, u64) {
    let folder = shards(&vec![20; count], |_| false);
    let server = Server::with(folder.path(), tars);
    let proxy = Proxy::start(server.address, |_| Fate::Pass);
    let lengths = files(folder.path(), "tar").into_iter().map(|path| fs::metadata(path).unwrap().len());
    let bytes = lengths.max().unwrap();
    (folder, server, proxy, bytes)
}

fn open(pattern: &str, proxy: &Proxy, cache: &Path, max_bytes: u64) -> Dataset {
    let options = remote_options(proxy.address, cache, max_bytes);
    Dataset::open(&[format!("s3://{BUCKET}/{pattern}")], &options).unwrap()
}

fn loader(corpus: impl Into<Corpus>, options: &LoaderOptions) -> Loader {
    Loader::new(Arc::new(corpus.into()), text(), options.clone()).unwrap()
}

pub fn eval_reader(corpus: &Arc<Corpus>) -> EvalReader {
    let options = EvalOptions {
        range: 0..u64::MAX,
        batch: 8,
        threads: 2,
        prefetch: 2,
        image_size: 4,
        filter: Filter::Bicubic,
        pixels: true,
        features: None,
        clean: loader_options().clean,
        pad_id: 0,
        pad_to_multiple: 1,
        left_out: Arc::default(),
    };
    EvalReader::new(Arc::clone(corpus), text(), options).unwrap()
}

#[test]
fn two_sets_read_in_turn_from_a_cache_that_holds_half_of_one() {
    let (_folder, _server, proxy, bytes) = bucket(16);
    let cache = tempfile::tempdir().unwrap();
    let options = LoaderOptions { window_shards: 1, ..loader_options() };
    let mut a = loader(open("0{0..7}.tar", &proxy, cache.path(), 4 * bytes), &options);
    let mut b = loader(open("{08,09,10,11,12,13,14,15}.tar", &proxy, cache.path(), 4 * bytes), &options);
    for _ in 0..20 {
        a.next_batch().unwrap();
        b.next_batch().unwrap();
    }
    // A whole epoch of each.
    assert!(a.bad().is_empty() && b.bad().is_empty());
}

#[test]
fn held_out_shards_are_read_between_batches_and_let_go() {
    let (folder, _server, proxy, bytes) = bucket(12);
    let cache = tempfile::tempdir().unwrap();
    let options = LoaderOptions { window_shards: 2, ..loader_options() };
    let mut train = loader(open("0{0..7}.tar", &proxy, cache.path(), 4 * bytes), &options);
    let val = Arc::new(Corpus::from(open("{08,09,10,11}.tar", &proxy, cache.path(), 4 * bytes)));
    let mut whole = loader_of(folder.path(), &options);
    for step in 0..20 {
        assert_eq!(train.next_batch().unwrap(), whole.next_batch().unwrap());
        if step % 5 == 0 {
            let mut reader = eval_reader(&val);
            let samples: usize = reader.by_ref().map(|batch| batch.unwrap().size).sum();
            assert_eq!((samples, reader.take_quarantined().len()), (80, 0));
        }
    }
    assert!(train.bad().is_empty());
}

/// The first eight shards of a folder of this machine.
fn loader_of(folder: &Path, options: &LoaderOptions) -> Loader {
    let local = Dataset::open(&["0{0..7}.tar".to_owned()], &crate::fixture::options(folder)).unwrap();
    loader(local, options)
}

#[test]
fn a_cache_must_hold_what_all_sets_have_in_use() {
    let (_folder, _server, proxy, bytes) = bucket(8);
    let cache = tempfile::tempdir().unwrap();
    let options = LoaderOptions { window_shards: 2, ..loader_options() };
    let two = |max_bytes| {
        let sets = ["{00..03}.tar", "{04..07}.tar"].map(|set| (open(set, &proxy, cache.path(), max_bytes), 1.0));
        Loader::new(Arc::new(Corpus::new(sets.into()).unwrap()), text(), options.clone())
    };
    let error = two(4 * bytes - 1).err().unwrap();
    let DataError::ShardCacheTooSmall { needed, .. } = error else { panic!("{error}") };
    assert_eq!(needed, 4 * bytes);
    assert!(two(4 * bytes).is_ok());

    // Two windows of training and a shard of the held-out set.
    let train = |max_bytes| {
        let set = open("{00..03}.tar", &proxy, cache.path(), max_bytes);
        Loader::new(Arc::new(set.into()), text(), options.clone())
    };
    let val = Arc::new(Corpus::from(open("{04..07}.tar", &proxy, cache.path(), 3 * bytes)));
    drop(eval_reader(&val));
    let error = train(3 * bytes - 1).err().unwrap();
    assert!(error.to_string().contains("with what else this process reads"), "{error}");
    assert!(train(3 * bytes).is_ok());
    drop(val);
    assert!(train(2 * bytes).is_ok());
}

const DONE: &str = "BLIP2_TEST_DONE";
const MAX: &str = "BLIP2_TEST_MAX";

/// Reads from two shards, has a third ahead of its use, and then does nothing until it is told.
#[test]
#[ignore = "a child of another test"]
fn child_holds_shards() {
    let variable = |name: &str| env::var(name).unwrap();
    let endpoint: SocketAddr = variable(ENDPOINT).parse().unwrap();
    let options = remote_options(endpoint, Path::new(&variable(CACHE)), variable(MAX).parse().unwrap());
    let dataset = Dataset::open(&[format!("s3://{BUCKET}/{{00..02}}.tar")], &options).unwrap();
    dataset.prefetch(&[0, 1, 2]);
    for sample in [0, 20] {
        dataset.read(sample, Pick::First).unwrap();
    }
    let done = variable(DONE);
    fs::write(format!("{done}.holds"), "").unwrap();
    until("the other has read", || fs::exists(&done).unwrap());
    dataset.read(40, Pick::First).unwrap();
}

#[test]
fn a_process_that_waits_makes_another_give_way() {
    let (folder, _server, proxy, bytes) = bucket(6);
    let (cache, signs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let done = signs.path().join("done");
    let max = (3 * bytes).to_string();
    let variables = [(DONE, done.to_str().unwrap()), (MAX, max.as_str())];
    let mut other: Child = child_with("room::child_holds_shards", proxy.address, cache.path(), &variables);
    until("the other holds its shards", || fs::exists(signs.path().join("done.holds")).unwrap());

    let dataset = open("{03..05}.tar", &proxy, cache.path(), 3 * bytes);
    let local = corpus(folder.path());
    for sample in 0..60 {
        assert_eq!(dataset.read(sample, Pick::First).unwrap(), local.read(60 + sample, Pick::First).unwrap());
    }
    fs::write(&done, "").unwrap();
    assert!(other.wait().unwrap().success());
}
