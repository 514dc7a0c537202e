//! Sets with a shard cache, and what lies in it.
#![allow(dead_code)] // Each test file uses a part.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use blip2_data::{OpenOptions, RemoteOptions, Retries, ShardCache};

/// Faults are found out soon.
pub const QUICK: Retries = Retries {
    tries: 8,
    give_up: Duration::from_secs(30),
    timeout: Duration::from_millis(700),
    first_wait: Duration::from_millis(2),
};

/// Stores at `endpoint`, and a cache.
pub fn remote_options(endpoint: SocketAddr, cache: &Path, max_bytes: u64) -> OpenOptions {
    let endpoint = format!("http://{endpoint}");
    let settings = [
        ("aws_endpoint", endpoint.as_str()),
        ("aws_allow_http", "true"),
        ("aws_region", "us-east-1"),
        ("aws_access_key_id", "key"),
        ("aws_secret_access_key", "secret"),
    ];
    let remote = RemoteOptions {
        cache: Some(ShardCache { dir: cache.to_owned(), max_bytes }),
        retries: QUICK,
        parallel: 4,
        settings: settings.map(|(key, value)| (key.to_owned(), value.to_owned())).into(),
    };
    OpenOptions { remote, ..OpenOptions::default() }
}

/// The files of a kind.
pub fn files(cache: &Path, extension: &str) -> Vec<PathBuf> {
    let paths = fs::read_dir(cache).unwrap().map(|entry| entry.unwrap().path());
    paths.filter(|path| path.extension().is_some_and(|found| found == extension)).collect()
}

/// Waits for something that is about to happen.
pub fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !holds() {
        assert!(begin.elapsed() < Duration::from_secs(20), "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
