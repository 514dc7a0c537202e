//! Outages that pass, and faults of this machine: neither may cost a sample.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use blip2_data::{Corpus, DataError, Dataset, Loader, LoaderOptions, Pick, Retries, SampleError};

use crate::fixture::{corpus, loader_options, open, shards, text};
use crate::room::eval_reader;
use crate::server::{BUCKET, Fate, Proxy, Request, Server};
use crate::{QUICK, files, remote_options, until};

/// Three shards with their indices behind a proxy that refuses their bytes until it is told otherwise.
fn outage() -> (Server, Proxy, Arc<AtomicBool>) {
    let folder = shards(&[3, 3, 3], |_| false);
    open(folder.path());
    let server = Server::with(folder.path(), |_| true);
    let over = Arc::new(AtomicBool::new(false));
    let is_over = Arc::clone(&over);
    let refuse = move |request: &Request| match request.is_fetch() && !is_over.load(Ordering::Relaxed) {
        true => Fate::Throttle,
        false => Fate::Pass,
    };
    let proxy = Proxy::start(server.address, refuse);
    (server, proxy, over)
}

fn open_with(retries: Retries, proxy: &Proxy, cache: &Path) -> Dataset {
    let mut options = remote_options(proxy.address, cache, 1 << 30);
    options.remote.retries = retries;
    Dataset::open(&[format!("s3://{BUCKET}/*.tar")], &options).unwrap()
}

#[test]
fn what_could_not_be_fetched_ahead_is_tried_again_when_it_is_needed() {
    let (_server, proxy, over) = outage();
    let cache = tempfile::tempdir().unwrap();
    let dataset = open_with(Retries { tries: 3, ..QUICK }, &proxy, cache.path());
    dataset.prefetch(&[0, 2]);
    let given_up = || proxy.fetches().values().filter(|&&count| count == 3).count() == 2;
    until("both are given up", || given_up() && files(cache.path(), "part").is_empty());
    over.store(true, Ordering::Relaxed);
    assert_eq!(dataset.read(0, Pick::First).unwrap().key, "0000");
    assert_eq!(dataset.read(6, Pick::First).unwrap().key, "0006");
}

#[test]
fn a_shard_that_was_given_up_is_tried_again_after_a_while() {
    let (_server, proxy, over) = outage();
    let cache = tempfile::tempdir().unwrap();
    let dataset = open_with(Retries { tries: 2, give_up: Duration::from_millis(50), ..QUICK }, &proxy, cache.path());
    assert!(matches!(dataset.read(0, Pick::First), Err(SampleError::ShardUnreadable(_))));
    over.store(true, Ordering::Relaxed);
    until("it is tried again", || dataset.read(0, Pick::First).is_ok());
}

#[test]
fn an_outage_is_waited_for_and_a_wrong_name_is_not() {
    let (_server, proxy, over) = outage();
    let cache = tempfile::tempdir().unwrap();
    let retries = Retries { tries: u32::MAX, ..QUICK };
    let dataset = open_with(retries, &proxy, cache.path());
    std::thread::scope(|scope| {
        let read = scope.spawn(|| dataset.read(0, Pick::First));
        // Far more than a fixed number of tries, all of which fail at once.
        until("it is tried on", || proxy.fetches().values().any(|&count| count > 12));
        over.store(true, Ordering::Relaxed);
        assert_eq!(read.join().unwrap().unwrap().key, "0000");
    });
    let mut nowhere = remote_options("127.0.0.1:1".parse().unwrap(), cache.path(), 1 << 30);
    nowhere.remote.retries = retries;
    let error = Dataset::open(&["s3://wrong/*.tar".to_owned()], &nowhere).err().unwrap().to_string();
    assert!(error.contains("given up after 8 tries"), "{error}");
}

#[test]
fn a_cache_folder_that_is_gone_stops_the_stream_and_costs_no_sample() {
    let folder = shards(&[8; 6], |_| false);
    open(folder.path());
    let server = Server::with(folder.path(), |_| true);
    let place = tempfile::tempdir().unwrap();
    let (cache, away) = (place.path().join("cache"), place.path().join("away"));
    let options = LoaderOptions { window_shards: 1, prefetch: 1, ..loader_options() };
    let mut whole = Loader::new(corpus(folder.path()), text(), options.clone()).unwrap();
    let shards = format!("s3://{BUCKET}/*.tar");
    let set = Dataset::open(std::slice::from_ref(&shards), &remote_options(server.address, &cache, 1 << 30)).unwrap();
    let mut loader = Loader::new(Arc::new(set.into()), text(), options).unwrap();
    assert_eq!(loader.next_batch().unwrap(), whole.next_batch().unwrap());

    fs::rename(&cache, &away).unwrap();
    let mut expected = whole.next_batch().unwrap();
    let error = loop {
        match loader.next_batch() {
            // Of a shard that was open already.
            Ok(batch) => assert_eq!(batch, std::mem::replace(&mut expected, whole.next_batch().unwrap())),
            Err(error) => break error,
        }
    };
    assert!(matches!(error, DataError::ShardCache { .. }), "{error}");
    let told = error.to_string();
    assert!(told.contains(cache.to_str().unwrap()) && !told.contains('\n'), "{told}");
    // As long as it lasts, and whoever reads.
    assert!(loader.next_batch().is_err());
    let held_out = remote_options(server.address, &place.path().join("other"), 1 << 30);
    let held_out = Arc::new(Corpus::from(Dataset::open(&[shards], &held_out).unwrap()));
    fs::rename(place.path().join("other"), place.path().join("another")).unwrap();
    let mut reader = eval_reader(&held_out);
    assert!(matches!(reader.next(), Some(Err(DataError::ShardCache { .. }))));
    assert!(reader.next().is_none() && reader.take_quarantined().is_empty());

    fs::rename(&away, &cache).unwrap();
    for _ in 0..12 {
        assert_eq!(loader.next_batch().unwrap(), expected);
        expected = whole.next_batch().unwrap();
    }
    assert!(loader.bad().is_empty() && loader.take_quarantined().is_empty());
}

#[test]
fn a_shard_of_this_machine_that_is_gone_is_still_replaced() {
    let folder = shards(&[6, 6], |_| false);
    let dataset = corpus(folder.path());
    fs::remove_file(folder.path().join("01.tar")).unwrap();
    let mut loader = Loader::new(dataset, text(), loader_options()).unwrap();
    (0..3).for_each(|_| drop(loader.next_batch().unwrap()));
    assert_eq!(loader.bad().indices().collect::<Vec<_>>(), [6, 7, 8, 9, 10, 11]);
}
