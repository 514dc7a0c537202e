//! Processes that share a cache, and one that is killed while it fetches.

use std::env;
use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use blip2_data::Pick;

use crate::server::{Fate, Proxy, Request, Server};
use crate::{files, fixture, open_remote, tars, until};

pub const ENDPOINT: &str = "BLIP2_TEST_ENDPOINT";
pub const CACHE: &str = "BLIP2_TEST_CACHE";

/// What a child does: reads every sample. Run by the tests below with the two variables set.
#[test]
#[ignore = "a child of other tests"]
fn child_reads_all() {
    let endpoint: SocketAddr = env::var(ENDPOINT).unwrap().parse().unwrap();
    let dataset = open_remote("{00..03}.tar", endpoint, Path::new(&env::var(CACHE).unwrap())).unwrap();
    for sample in 0..dataset.len() {
        dataset.read(sample, Pick::First).unwrap();
    }
}

fn child(endpoint: SocketAddr, cache: &Path) -> Child {
    child_with("processes::child_reads_all", endpoint, cache, &[])
}

/// A process that runs one of the tests that are ignored otherwise.
pub fn child_with(test: &str, endpoint: SocketAddr, cache: &Path, variables: &[(&str, &str)]) -> Child {
    Command::new(env::current_exe().unwrap())
        .args(["--exact", test, "--ignored"])
        .env(ENDPOINT, endpoint.to_string())
        .env(CACHE, cache)
        .envs(variables.iter().copied())
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

#[test]
fn processes_that_share_a_cache_fetch_each_shard_once() {
    let folder = fixture::shards(&[20; 4], |_| false);
    let server = Server::with(folder.path(), tars);
    let (proxy, cache) = (Proxy::start(server.address, |_| Fate::Pass), tempfile::tempdir().unwrap());
    let children: Vec<Child> = (0..3).map(|_| child(proxy.address, cache.path())).collect();
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    let fetches = proxy.fetches();
    assert_eq!(fetches.len(), 4);
    assert!(fetches.values().all(|&count| count == 1), "{fetches:?}");
    assert!(files(cache.path(), "part").is_empty());
}

#[test]
fn a_process_killed_while_it_fetches_leaves_nothing_that_counts() {
    let folder = fixture::shards(&[20; 4], |_| false);
    let server = Server::with(folder.path(), tars);
    let stall = |request: &Request| match request.is_fetch() && request.number == 0 {
        true => Fate::Stall(Duration::from_secs(3)),
        false => Fate::Pass,
    };
    let (proxy, cache) = (Proxy::start(server.address, stall), tempfile::tempdir().unwrap());
    let mut killed = child(proxy.address, cache.path());
    // Half of a shard is written by then, or is about to be.
    until("a part is begun", || {
        files(cache.path(), "part").iter().any(|part| fs::metadata(part).is_ok_and(|m| m.len() > 0))
    });
    killed.kill().unwrap();
    killed.wait().unwrap();
    assert!(!files(cache.path(), "part").is_empty());

    let local = fixture::open(folder.path());
    let dataset = open_remote("{00..03}.tar", proxy.address, cache.path()).unwrap();
    assert_eq!(dataset.digest(), local.digest());
    for sample in 0..local.len() {
        assert_eq!(dataset.read(sample, Pick::First).unwrap(), local.read(sample, Pick::First).unwrap());
    }
    assert!(files(cache.path(), "part").is_empty());
}
