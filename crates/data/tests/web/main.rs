//! Web servers, which know files and perhaps the time of their last change.

#[path = "../remote/cache.rs"]
mod cache;
#[path = "../fixture/mod.rs"]
mod fixture;
#[path = "../remote/proxy.rs"]
mod proxy;
mod server;
mod shared_cache;

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;

use blip2_data::{
    Corpus, DataError, Dataset, Loader, OpenOptions, Pick, SampleError, Shard, reindex, rescan, write_manifest,
};

use cache::{files, remote_options};
use fixture::{loader_options, open, png, shards, tar, text, write};
use proxy::{Fate, Proxy, Request};
use server::WebServer;

fn same_samples(dataset: &Dataset, folder: &Path) {
    let local = open(folder);
    assert_eq!(dataset.digest(), local.digest());
    for sample in 0..local.len() {
        assert_eq!(dataset.read(sample, Pick::First).unwrap(), local.read(sample, Pick::First).unwrap());
    }
}

/// That no file of a folder, by name or content, has a word in it.
fn nowhere_in(folder: &Path, word: &str) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let bytes = fs::read(&path).unwrap();
        let found = bytes.windows(word.len()).any(|window| window == word.as_bytes());
        assert!(!found && !path.to_string_lossy().contains(word), "{}", path.display());
    }
}

#[test]
fn a_web_server_serves_shards_too() {
    let folder = shards(&[30, 4], |_| false);
    let server = WebServer::start(folder.path(), |_| true);
    let cut = |request: &Request| if request.is_fetch() && request.number < 2 { Fate::Truncate } else { Fate::Pass };
    let (proxy, cache) = (Proxy::start(server.address, cut), tempfile::tempdir().unwrap());
    let options = remote_options(proxy.address, cache.path(), 1 << 20);
    let dataset = Dataset::open(&[format!("http://{}/set/{{00..01}}.tar", proxy.address)], &options).unwrap();
    same_samples(&dataset, folder.path());
}

#[test]
fn a_signed_url_is_sent_as_it_is_and_never_shown() {
    let folder = shards(&[3, 4], |_| false);
    // Signed for one way to read one file, as object stores sign.
    let server = WebServer::start(folder.path(), |head| {
        let mut words = head.split(' ');
        let is_get = words.next() == Some("GET");
        is_get && words.next().is_some_and(|path| path.ends_with(".tar?X-Sig=secret%2F1&e=a+b*[c]"))
    });
    let cache = tempfile::tempdir().unwrap();
    let options = remote_options(server.address, cache.path(), 1 << 20);
    let signed = |host: &str| [format!("http://{host}/set/{{00..01}}.tar?X-Sig=secret%2F1&e=a+b*[c]")];
    let patterns = signed(&server.address.to_string());
    let dataset = Dataset::open(&patterns, &options).unwrap();
    assert_eq!(dataset.shards()[1].name(), "01.tar");
    same_samples(&dataset, folder.path());
    nowhere_in(cache.path(), "secret");

    // From the kept manifest the URLs are whole again.
    let requests = server.requests();
    let again = Dataset::open(&patterns, &options).unwrap();
    assert_eq!(server.requests(), requests);
    files(cache.path(), "tar").iter().for_each(|file| fs::remove_file(file).unwrap());
    same_samples(&again, folder.path());

    let told = |error: DataError| {
        let told = error.to_string();
        assert!(told.contains("/set/") && !told.contains("secret") && !told.contains('\n'), "{told}");
    };
    told(Dataset::open(&signed("127.0.0.1:1"), &options).err().unwrap());
    told(Dataset::open(&[patterns[0].replace("01}", "02}")], &options).err().unwrap());
    told(Dataset::open(&[patterns[0].replace("00..", "9..")], &options).err().unwrap());
    told(write_manifest(again.shards(), cache.path().join("m.jsonl").to_str().unwrap(), &options).unwrap_err());
    told(write_manifest(again.shards(), &patterns[0], &options).unwrap_err());
    told(Dataset::open(&patterns, &OpenOptions::default()).err().unwrap());
    files(cache.path(), "tar").iter().for_each(|file| fs::remove_file(file).unwrap());
    let gone = Dataset::open(&patterns, &options).unwrap();
    fs::remove_file(folder.path().join("00.tar")).unwrap();
    let error = gone.read(0, Pick::First).unwrap_err().to_string();
    assert!(error.contains("/set/00.tar?...: does not exist") && !error.contains("secret"), "{error}");
}

#[test]
fn credentials_in_front_of_a_host_are_sent_and_never_shown() {
    let folder = shards(&[3, 4], |_| false);
    // Base64 of user:secret.
    let server = WebServer::start(folder.path(), |head| {
        head.to_lowercase().contains("authorization: basic dxnlcjpzzwnyzxq=\r\n")
    });
    let cache = tempfile::tempdir().unwrap();
    let options = remote_options(server.address, cache.path(), 1 << 20);
    let pattern = |who: &str| [format!("http://{who}@{}/set/{{00..01}}.tar", server.address)];
    let dataset = Dataset::open(&pattern("user:secret"), &options).unwrap();
    same_samples(&dataset, folder.path());
    nowhere_in(cache.path(), "secret");
    let requests = server.requests();
    assert_eq!(Dataset::open(&pattern("user:secret"), &options).unwrap().digest(), dataset.digest());
    assert_eq!(server.requests(), requests);
    let error = Dataset::open(&pattern("user:other"), &options).err().unwrap().to_string();
    assert!(error.contains("403 Forbidden") && !error.contains("other"), "{error}");
}

#[test]
fn a_change_that_keeps_the_length_is_noticed_by_its_time() {
    let folder = tempfile::tempdir().unwrap();
    let shard = |key: &str| tar(&[(&format!("{key}.png"), &png(3, 3, 0)), (&format!("{key}.txt"), b"text")]);
    write(folder.path(), "00.tar", &shard("old"));
    let server = WebServer::start(folder.path(), |_| true);
    let cache = tempfile::tempdir().unwrap();
    let options = remote_options(server.address, cache.path(), 1 << 20);
    let patterns = [format!("http://{}/set/00.tar", server.address)];
    let dataset = Dataset::open(&patterns, &options).unwrap();
    files(cache.path(), "tar").iter().for_each(|file| fs::remove_file(file).unwrap());

    write(folder.path(), "00.tar", &shard("new"));
    *server.modified.lock().unwrap() = "Wed, 02 Jan 2030 00:00:00 GMT";
    let error = dataset.read(0, Pick::First).unwrap_err();
    assert!(matches!(error, SampleError::ShardChanged(_)), "{error}");
    assert!(error.to_string().contains("its tag is last-modified: Wed, 2 Jan 2030"), "{error}");
    reindex(&patterns, &options).unwrap();
    assert_eq!(Dataset::open(&patterns, &options).unwrap().read(0, Pick::First).unwrap().key, "new");
}

#[test]
fn an_old_index_beside_a_shard_that_was_exchanged_is_passed_over_by_a_rescan() {
    let folder = tempfile::tempdir().unwrap();
    let shard = |key: &str| tar(&[(&format!("{key}.png"), &png(3, 3, 0)), (&format!("{key}.txt"), b"text")]);
    write(folder.path(), "00.tar", &shard("old"));
    reindex(&["00.tar".to_owned()], &fixture::options(folder.path())).unwrap();
    assert!(folder.path().join("00.tar.idx").exists());
    write(folder.path(), "00.tar", &shard("new"));

    let server = WebServer::start(folder.path(), |_| true);
    let cache = tempfile::tempdir().unwrap();
    let options = remote_options(server.address, cache.path(), 1 << 20);
    let patterns = [format!("http://{}/set/00.tar", server.address)];
    let read = || Dataset::open(&patterns, &options).unwrap().read(0, Pick::First);
    for _ in 0..2 {
        let error = read().unwrap_err();
        assert!(error.to_string().contains("blip2 shards index`, with --rescan"), "{error}");
        reindex(&patterns, &options).unwrap();
    }
    rescan(&patterns, &options).unwrap();
    assert_eq!(read().unwrap().key, "new");
}

/// A terabyte of zeros where an index should be.
#[test]
fn an_index_that_is_longer_than_its_shard_allows_is_not_fetched() {
    let folder = shards(&[3], |_| false);
    let bytes = fs::read(folder.path().join("00.tar")).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for mut client in listener.incoming().flatten() {
            let mut buffer = [0; 8192];
            let read = client.read(&mut buffer).unwrap_or(0);
            let head = String::from_utf8_lossy(&buffer[..read]).into_owned();
            let is_index = head.split(' ').nth(1).is_some_and(|path| path.ends_with(".idx"));
            let length = if is_index { 1 << 40 } else { bytes.len() };
            let head_lines = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
            let mut sent = client.write_all(head_lines.as_bytes());
            if !head.starts_with("HEAD") && !is_index {
                sent = sent.and_then(|()| client.write_all(&bytes));
            }
            while is_index && sent.is_ok() {
                sent = client.write_all(&[0; 1 << 16]);
            }
        }
    });
    let cache = tempfile::tempdir().unwrap();
    let options = remote_options(address, cache.path(), 1 << 20);
    let dataset = Dataset::open(&[format!("http://{address}/set/00.tar")], &options).unwrap();
    same_samples(&dataset, folder.path());
}

#[test]
fn lengths_in_a_manifest_that_cannot_be_added_up_are_too_much_for_the_cache() {
    let folder = shards(&[3, 4], |_| false);
    let server = WebServer::start(folder.path(), |_| true);
    let cache = tempfile::tempdir().unwrap();
    let options = remote_options(server.address, cache.path(), 1 << 20);
    let dataset = Dataset::open(&[format!("http://{}/set/{{00..01}}.tar", server.address)], &options).unwrap();
    let endless = |shard: &Shard| Shard { bytes: u64::MAX, ..shard.clone() };
    let shards: Vec<Shard> = dataset.shards().iter().map(endless).collect();
    let manifest = cache.path().join("endless.jsonl").to_str().unwrap().to_owned();
    write_manifest(&shards, &manifest, &options).unwrap();
    let corpus = Arc::new(Corpus::from(Dataset::open(&[manifest], &options).unwrap()));
    let error = Loader::new(corpus, text(), loader_options()).err().unwrap();
    assert!(matches!(error, DataError::ShardCacheTooSmall { needed: u64::MAX, .. }), "{error}");
}
