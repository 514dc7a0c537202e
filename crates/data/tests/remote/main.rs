//! Shards in an S3 server behind a faulty network give the samples that they give from disk.

mod cache;
mod faults;
#[path = "../fixture/mod.rs"]
mod fixture;
mod processes;
mod proxy;
mod room;
mod server;

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use blip2_data::{
    DataError, Dataset, Loader, LoaderOptions, OpenOptions, Pick, RemoteOptions, SampleError, reindex, write_manifest,
};
use cache::{QUICK, files, remote_options, until};
use fixture::{corpus, loader_options, open, shards, text};
use server::{BUCKET, Fate, Proxy, Request, Server};

/// The set that is in the bucket, through `endpoint`.
fn open_remote(pattern: &str, endpoint: SocketAddr, cache: &Path) -> Result<Dataset, DataError> {
    let pattern = format!("s3://{BUCKET}/{pattern}");
    Dataset::open(&[pattern], &remote_options(endpoint, cache, 1 << 30))
}

fn tars(name: &str) -> bool {
    name.ends_with(".tar")
}

/// Up to three of the first requests of every path meet with a fault, each another one by seed.
fn faults(seed: u64) -> impl Fn(&Request) -> Fate {
    move |request| {
        let text = format!("{seed} {} {} {}", request.method, request.path, request.number);
        let chance = u64::from_le_bytes(blake3::hash(text.as_bytes()).as_bytes()[..8].try_into().unwrap());
        if request.number >= 3 {
            return Fate::Pass;
        }
        [Fate::Drop, Fate::Truncate, Fate::Throttle, Fate::Stall(Duration::from_secs(1)), Fate::Pass, Fate::Pass]
            [(chance % 6) as usize]
    }
}

#[test]
fn ten_thousand_samples_come_in_the_same_order_through_a_faulty_network() {
    let folder = shards(&[1000; 10], |_| false);
    let server = Server::with(folder.path(), tars);
    let options = LoaderOptions { global_batch: 500, ..loader_options() };
    let mut whole = Loader::new(corpus(folder.path()), text(), options.clone()).unwrap();
    let expected: Vec<_> = (0..20).map(|_| whole.next_batch().unwrap()).collect();
    for seed in [1, 2] {
        let (proxy, cache) = (Proxy::start(server.address, faults(seed)), tempfile::tempdir().unwrap());
        let dataset = open_remote("{00..09}.tar", proxy.address, cache.path()).unwrap();
        assert_eq!(dataset.digest(), open(folder.path()).digest());
        let mut loader = Loader::new(Arc::new(dataset.into()), text(), options.clone()).unwrap();
        for expected in &expected {
            assert_eq!(&loader.next_batch().unwrap(), expected);
        }
        assert!(loader.bad().is_empty());
        let faulty = proxy.requests().iter().filter(|request| faults(seed)(request) != Fate::Pass).count();
        assert!(faulty > 10, "{faulty} faults");
        println!("seed {seed}: {} requests, {faulty} of them met with a fault", proxy.requests().len());
    }
}

#[test]
fn globs_sidecars_and_manifests_open_a_set_without_its_shards() {
    let folder = shards(&[3, 4, 5], |_| false);
    let local = open(folder.path());
    let server = Server::with(folder.path(), |_| true);
    server.put("other.txt", b"no shard");
    let (proxy, cache) = (Proxy::start(server.address, |_| Fate::Pass), tempfile::tempdir().unwrap());
    let dataset = open_remote("*.tar", proxy.address, cache.path()).unwrap();
    assert_eq!((dataset.counts(), dataset.digest()), (vec![3, 4, 5], local.digest()));
    assert!(proxy.fetches().is_empty(), "{:?}", proxy.requests());

    // The kept manifest: not one request, wherever relative paths would begin.
    let before = proxy.requests().len();
    assert_eq!(open_remote("*.tar", proxy.address, cache.path()).unwrap().digest(), local.digest());
    let elsewhere =
        OpenOptions { base_dir: folder.path().to_owned(), ..remote_options(proxy.address, cache.path(), 1 << 30) };
    let pattern = |pattern: &str| format!("s3://{BUCKET}/{pattern}");
    assert_eq!(Dataset::open(&[pattern("*.tar")], &elsewhere).unwrap().digest(), local.digest());
    assert_eq!(proxy.requests().len(), before);
    // With a path that is relative they are other sets.
    let mixed = [pattern("00.tar"), "01.tar".to_owned()];
    assert_eq!(Dataset::open(&mixed, &elsewhere).unwrap().counts(), [3, 4]);
    let nowhere = OpenOptions { base_dir: cache.path().to_owned(), ..elsewhere };
    assert!(matches!(Dataset::open(&mixed, &nowhere), Err(DataError::MissingShard { .. })));

    // A manifest in the store itself, and one on this machine.
    let options = remote_options(proxy.address, cache.path(), 1 << 30);
    let there = format!("s3://{BUCKET}/manifest.jsonl");
    write_manifest(dataset.shards(), &there, &options).unwrap();
    let here = folder.path().join("elsewhere.jsonl").to_str().unwrap().to_owned();
    write_manifest(dataset.shards(), &here, &options).unwrap();
    for manifest in [there, here] {
        let opened = Dataset::open(&[manifest], &options).unwrap();
        assert_eq!((opened.counts(), opened.digest()), (dataset.counts(), local.digest()));
        assert_eq!(opened.read(11, Pick::First).unwrap(), local.read(11, Pick::First).unwrap());
    }
    let error = write_manifest(dataset.shards(), "manifest.txt", &options).unwrap_err().to_string();
    assert!(error.contains("must end in .jsonl"), "{error}");
}

#[test]
fn what_is_needed_next_is_fetched_before_it_is_asked_for() {
    let folder = shards(&[3; 4], |_| false);
    open(folder.path());
    let server = Server::with(folder.path(), |_| true);
    let (proxy, cache) = (Proxy::start(server.address, |_| Fate::Pass), tempfile::tempdir().unwrap());
    let dataset = open_remote("*.tar", proxy.address, cache.path()).unwrap();
    dataset.prefetch(&[2, 0]);
    until("two shards are there", || files(cache.path(), "tar").len() == 2);
    assert_eq!(dataset.read(6, Pick::First).unwrap().key, "0006");
    assert_eq!(proxy.fetches().len(), 2);
    assert!(proxy.fetches().values().all(|&count| count == 1));
}

#[test]
fn a_small_cache_evicts_and_never_grows_beyond_its_size() {
    let folder = shards(&[40; 8], |_| false);
    let server = Server::with(folder.path(), tars);
    let (proxy, cache) = (Proxy::start(server.address, |_| Fate::Pass), tempfile::tempdir().unwrap());
    let bytes = fs::metadata(folder.path().join("00.tar")).unwrap().len();
    let options = LoaderOptions { global_batch: 16, window_shards: 2, ..loader_options() };
    let mut whole = Loader::new(corpus(folder.path()), text(), options.clone()).unwrap();

    let small = remote_options(proxy.address, cache.path(), 2 * bytes - 1);
    let dataset = Dataset::open(&[format!("s3://{BUCKET}/*.tar")], &small).unwrap();
    let error = Loader::new(Arc::new(dataset.into()), text(), options.clone()).err().unwrap();
    assert!(matches!(error, DataError::ShardCacheTooSmall { .. }), "{error}");
    assert!(error.to_string().contains("raise data.shard_cache.max_gib"), "{error}");

    let fits = remote_options(proxy.address, cache.path(), 2 * bytes);
    let dataset = Dataset::open(&[format!("s3://{BUCKET}/*.tar")], &fits).unwrap();
    let mut loader = Loader::new(Arc::new(dataset.into()), text(), options).unwrap();
    for _ in 0..40 {
        assert_eq!(loader.next_batch().unwrap(), whole.next_batch().unwrap());
        let held = |kind| files(cache.path(), kind).iter().filter_map(|p| fs::metadata(p).ok()).map(|m| m.len()).sum();
        let (whole, parts): (u64, u64) = (held("tar"), held("part"));
        assert!(whole.max(parts) <= 2 * bytes, "{whole} and {parts} of {bytes} each");
    }
    assert!(loader.bad().is_empty());
}

#[test]
fn a_shard_that_changed_is_told_so() {
    let folder = shards(&[3, 3, 3], |_| false);
    reindex(&["*.tar".to_owned()], &fixture::options(folder.path())).unwrap();
    let server = Server::with(folder.path(), |_| true);
    let (proxy, cache) = (Proxy::start(server.address, |_| Fate::Pass), tempfile::tempdir().unwrap());
    let dataset = open_remote("*.tar", proxy.address, cache.path()).unwrap();
    let mut other = fs::read(folder.path().join("00.tar")).unwrap();
    other[600] ^= 1;
    server.put("00.tar", &other);
    other.extend([0; 512]);
    server.put("01.tar", &other);
    for (sample, what) in [(0, "its etag is"), (3, "its length is")] {
        let error = dataset.read(sample, Pick::First).unwrap_err();
        assert!(matches!(error, SampleError::ShardChanged(_)), "{error}");
        assert!(error.to_string().contains(what), "{error}");
    }
    assert_eq!(dataset.read(6, Pick::First).unwrap().key, "0006");
}

#[test]
fn a_shard_that_stays_damaged_on_its_way_is_unreadable_and_its_samples_are_replaced() {
    let folder = shards(&[6, 6, 6], |_| false);
    reindex(&["*.tar".to_owned()], &fixture::options(folder.path())).unwrap();
    let server = Server::with(folder.path(), |_| true);
    let damage = |request: &Request| if request.path.ends_with("/01.tar") { Fate::Corrupt } else { Fate::Pass };
    let (proxy, cache) = (Proxy::start(server.address, damage), tempfile::tempdir().unwrap());
    let dataset = open_remote("*.tar", proxy.address, cache.path()).unwrap();
    let options = LoaderOptions { window_shards: 3, ..loader_options() };
    let mut loader = Loader::new(Arc::new(dataset.into()), text(), options).unwrap();
    for _ in 0..6 {
        let batch = loader.next_batch().unwrap();
        assert!(batch.sample_index.iter().all(|index| !(6..12).contains(index)), "{:?}", batch.sample_index);
    }
    let quarantined = loader.take_quarantined();
    assert_eq!(quarantined.len(), 6);
    for entry in quarantined {
        assert_eq!(entry.shard, "01.tar");
        assert!(entry.reason.contains("its BLAKE3 is") && entry.reason.contains("3 times"), "{}", entry.reason);
    }
    assert_eq!(proxy.fetches()[&format!("/{BUCKET}/01.tar")], 3);
}

#[test]
fn a_shard_behind_faults_that_last_is_given_up_once_for_all_its_samples() {
    let folder = shards(&[50, 6], |_| false);
    open(folder.path());
    let server = Server::with(folder.path(), |_| true);
    let dead = |request: &Request| {
        if request.path.ends_with("/00.tar") && request.is_fetch() { Fate::Throttle } else { Fate::Pass }
    };
    let (proxy, cache) = (Proxy::start(server.address, dead), tempfile::tempdir().unwrap());
    let dataset = open_remote("*.tar", proxy.address, cache.path()).unwrap();
    for sample in 0..50 {
        let error = dataset.read(sample, Pick::First).unwrap_err();
        assert!(matches!(error, SampleError::ShardUnreadable(_)), "{error}");
        let text = error.to_string();
        assert!(text.contains("SlowDown: Reduce your request rate. (given up after 8 tries"), "{text}");
        assert!(text.contains("s3://pairs/00.tar") && !text.contains('\n'), "{text}");
    }
    assert_eq!(proxy.fetches()[&format!("/{BUCKET}/00.tar")], 8);
    assert!(dataset.read(50, Pick::First).is_ok());
}

#[test]
fn what_cannot_be_reached_is_told_in_one_line_and_soon() {
    let server = Server::start();
    let cache = tempfile::tempdir().unwrap();
    let good = remote_options(server.address, cache.path(), 1 << 20);
    let with = |changes: &[(&str, Option<&str>)]| {
        let mut options = good.clone();
        for (key, value) in changes {
            options.remote.settings.retain(|(name, _)| name != key);
            options.remote.settings.extend(value.map(|value| ((*key).to_owned(), value.to_owned())));
        }
        options
    };
    let nobody = [
        ("aws_access_key_id", None),
        ("aws_secret_access_key", None),
        ("aws_metadata_endpoint", Some("http://127.0.0.1:1")),
    ];
    for (pattern, options, reason) in [
        ("s3://pairs/00.tar", good.clone(), "s3://pairs/00.tar: does not exist (404"),
        ("s3://pairs/*.tar", good.clone(), "matches no file in s3://pairs"),
        ("s3://nowhere/*.tar", good.clone(), "does not exist (404 Not Found, NoSuchBucket"),
        ("s3://pairs/*.tar", with(&[("aws_secret_access_key", Some("wrong"))]), "403 Forbidden, SignatureDoesNotMatch"),
        ("s3://pairs/*.tar", with(&nobody), "no credentials: the environment names none (AWS_ACCESS_KEY_ID"),
        ("s3://pairs/*.tar", with(&[("aws_endpoint", Some("http://127.0.0.1:1"))]), "given up after 8 tries"),
        ("s3://pairs/m.jsonl", good.clone(), "s3://pairs/m.jsonl: does not exist"),
        ("https://host/*.tar", good.clone(), "name the shards with braces"),
        ("http://127.0.0.1:1/0.tar", good.clone(), "given up after 8 tries"),
    ] {
        let begin = Instant::now();
        let error = Dataset::open(&[pattern.to_owned()], &options).err().unwrap().to_string();
        assert!(error.contains(reason) && !error.contains('\n'), "{pattern}: {error}");
        assert!(begin.elapsed() < Duration::from_secs(10), "{pattern}: {:?}", begin.elapsed());
    }
    let no_cache = OpenOptions { remote: RemoteOptions::default(), ..OpenOptions::default() };
    let error = Dataset::open(&["gs://b/0.tar".to_owned()], &no_cache).err().unwrap();
    assert!(matches!(error, DataError::NoShardCache { .. }), "{error}");
}
