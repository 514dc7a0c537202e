//! What the rest of the crate sees of shards that lie elsewhere.

use std::collections::HashMap;
use std::fs::File;
use std::path::{self, Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Once, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rayon::{ThreadPool, ThreadPoolBuilder};

use super::background::{Ahead, Fetched};
use super::cache::{Cache, Entry};
use super::fetch::fetch;
use super::network::Network;
use super::retry::{Fault, Kind, Patience};
use super::{Object, RemoteOptions, Retries, Version};
use crate::index::{Digest, decode};
use crate::location::{Location, RemoteUrl};
use crate::scan::{Problem, scan_file};
use crate::shard::Shard;
use crate::{DataError, patterns};

/// How often it is looked whether the cache has room by now.
const ROOM_POLL: Duration = Duration::from_millis(20);

/// Stores, and the cache of what was fetched from them.
pub(crate) struct Remote {
    shared: Arc<Shared>,
    threads: Once,
    parallel: usize,
}

struct Shared {
    network: Network,
    cache: Cache,
    retries: Retries,
    stop: AtomicBool,
    ahead: Ahead,
    /// Why shards are not to be had: found out once, told to all who ask.
    failed: Mutex<HashMap<RemoteUrl, Failure>>,
}

/// Why a shard is not to be had.
#[derive(Clone)]
struct Failure {
    kind: Kind,
    reason: Arc<str>,
}

/// Who waits for room in the cache.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Need {
    /// A sample: what was fetched ahead gives way, and what is in use is waited for.
    Now,
    /// Nobody yet.
    Ahead,
}

/// A file to fetch.
struct Wanted<'a> {
    url: &'a RemoteUrl,
    version: &'a Version,
    fits: &'a dyn Fn(Digest, &File) -> Result<(), String>,
}

impl Remote {
    /// Starts the network for what `wanted_by` names.
    pub(crate) fn start(options: &RemoteOptions, wanted_by: &str) -> Result<Remote, DataError> {
        let refuse =
            |option: &'static str| DataError::Option { option, expected: "at least 1".to_owned(), got: "0".to_owned() };
        if options.parallel == 0 {
            return Err(refuse("parallel"));
        }
        if options.retries.tries == 0 {
            return Err(refuse("tries"));
        }
        let cache = options.cache.as_ref();
        let cache = cache.ok_or_else(|| DataError::NoShardCache { location: wanted_by.to_owned() })?;
        let network = Network::start(options).map_err(|error| DataError::Remote {
            location: wanted_by.to_owned(),
            reason: format!("cannot start the network: {error}"),
        })?;
        let shared = Shared {
            network,
            cache: Cache::open(cache).map_err(DataError::io(&cache.dir))?,
            retries: options.retries,
            stop: AtomicBool::new(false),
            ahead: Ahead::default(),
            failed: Mutex::default(),
        };
        Ok(Remote { shared: Arc::new(shared), threads: Once::new(), parallel: options.parallel })
    }

    /// Where the manifest of a pattern list is kept; a list of manifests alone needs none.
    pub(crate) fn kept_manifest(&self, patterns: &[String], base: &Path) -> Option<PathBuf> {
        let base = path::absolute(base).ok()?;
        let named = patterns.iter().filter(|pattern| !pattern.ends_with(".jsonl"));
        named.clone().any(|pattern| patterns::is_remote(pattern)).then(|| {
            let list = format!("{}\0{}", base.display(), patterns.join("\0"));
            self.shared.cache.dir.join(format!("{:.32}.jsonl", Digest::of(list.as_bytes()).to_string()))
        })
    }

    /// Threads for indexing: they wait for the network more than they compute.
    pub(crate) fn pool(&self) -> Result<ThreadPool, DataError> {
        let threads = self.parallel;
        let pool = ThreadPoolBuilder::new().num_threads(threads).thread_name(|thread| format!("index-{thread}"));
        pool.build().map_err(|error| DataError::Threads { threads, reason: error.to_string() })
    }

    /// The objects whose keys a glob matches, by key.
    pub(crate) fn list(&self, glob: &RemoteUrl) -> Result<Vec<Object>, DataError> {
        let refuse = |reason: String| DataError::Pattern { pattern: glob.to_string(), reason };
        let pattern = glob::Pattern::new(glob.key()).map_err(|error| refuse(error.to_string()))?;
        let fixed = &glob.key()[..glob.key().find(['*', '?', '[']).unwrap_or(0)];
        let folder = fixed.rsplit_once('/').map_or("", |(folder, _)| folder);
        let separate = glob::MatchOptions { require_literal_separator: true, ..glob::MatchOptions::new() };
        let (mut last, mut found) = (None, Vec::new());
        self.shared
            .patiently(|| {
                let after: Option<String> = last.clone();
                self.shared.network.list(glob, folder, after.as_deref(), &mut |key, version| {
                    if pattern.matches_with(&key, separate) {
                        found.push((key.clone(), version));
                    }
                    last = Some(key);
                })
            })
            .map_err(failed(glob))?;
        found.sort_by(|(a, _), (b, _)| a.cmp(b));
        let objects = found.into_iter().map(|(key, version)| {
            let url = RemoteUrl::parse(&format!("{}/{key}", glob.root())).map_err(refuse)?;
            Ok(Object { url, version: Some(version) })
        });
        objects.collect()
    }

    /// A small object, whole.
    pub(crate) fn read(&self, url: &RemoteUrl) -> Result<Vec<u8>, DataError> {
        self.shared.read(url).map_err(failed(url))
    }

    /// Writes a small object.
    pub(crate) fn write(&self, url: &RemoteUrl, bytes: Vec<u8>) -> Result<(), DataError> {
        self.shared.patiently(|| self.shared.network.put(url, bytes.clone())).map_err(failed(url))
    }

    /// What is in a shard: from the index beside it where that is there and fits, else from the shard itself.
    pub(crate) fn index(&self, object: &Object) -> Result<(Shard, Vec<Problem>), DataError> {
        let url = &object.url;
        let version = match &object.version {
            Some(version) if version.etag.is_some() => version.clone(),
            _ => self.shared.patiently(|| self.shared.network.head(url)).map_err(failed(url))?,
        };
        let location = Location::Remote(url.clone());
        let (index, digest, contents) = match self.sidecar(url, &version)? {
            Some((header, index)) => (index, header.digest, header.tar_digest),
            None => {
                let wanted = Wanted { url, version: &version, fits: &|_, _| Ok(()) };
                let file = self.shared.file(&wanted, Need::Now)?.ok_or_else(|| self.shared.too_small(&version))?;
                let index = scan_file(&file, &location.shown())?;
                let digest = index.digest();
                let contents = Digest::of_reader(rewound(&file).map_err(DataError::io(location.shown()))?);
                (index, digest, Some(contents.map_err(DataError::io(location.shown()))?))
            }
        };
        let shard = Shard {
            location,
            bytes: version.bytes,
            samples: index.samples.len() as u64,
            problems: index.problems.len() as u64,
            index: digest,
            contents,
            etag: version.etag,
        };
        Ok((shard, index.problems))
    }

    fn sidecar(
        &self,
        url: &RemoteUrl,
        version: &Version,
    ) -> Result<Option<(crate::IndexHeader, crate::Index)>, DataError> {
        let beside = RemoteUrl::parse(&format!("{url}.idx"));
        let beside = beside.map_err(|reason| DataError::Remote { location: url.to_string(), reason })?;
        match self.shared.read(&beside) {
            Ok(file) => Ok(decode(&file, version.bytes)),
            // Stores that may not be listed forbid what is not there.
            Err(fault) if matches!(fault.kind, Kind::NotFound | Kind::Lasting) => Ok(None),
            Err(fault) => Err(failed(&beside)(fault)),
        }
    }

    /// The shard's file, fetched where it is not in the cache.
    pub(crate) fn open(&self, shard: &Shard) -> Result<File, DataError> {
        self.shared.shard(shard, Need::Now)?.ok_or_else(|| self.shared.too_small(&version_of(shard)))
    }

    /// Fetches shards in the background, instead of those of the last call.
    pub(crate) fn prefetch(&self, shards: Vec<Shard>) {
        self.threads.call_once(|| {
            for number in 0..self.parallel {
                let shared = Arc::clone(&self.shared);
                // Without its threads all is fetched when it is needed.
                let _ = thread::Builder::new().name(format!("fetch-{number}")).spawn(move || shared.fetch_ahead());
            }
        });
        self.shared.ahead.want(shards);
    }

    /// The cache's folder, and what it may hold.
    pub(crate) fn capacity(&self) -> (&Path, u64) {
        (&self.shared.cache.dir, self.shared.cache.max_bytes)
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.shared.ahead.stop();
    }
}

impl Shared {
    fn patiently<T>(&self, request: impl FnMut() -> Result<T, Fault>) -> Result<T, Fault> {
        Patience::of(&self.retries, &self.stop, request)
    }

    fn read(&self, url: &RemoteUrl) -> Result<Vec<u8>, Fault> {
        self.patiently(|| {
            let (mut body, mut bytes) = (self.network.get(url, 0)?, Vec::new());
            while let Some(chunk) = body.next()? {
                bytes.extend_from_slice(&chunk);
            }
            match bytes.len() as u64 == body.version.bytes {
                true => Ok(bytes),
                false => Err(Fault::new(
                    Kind::Passing,
                    format!("it ended after {} of {} bytes", bytes.len(), body.version.bytes),
                )),
            }
        })
    }

    fn fetch_ahead(&self) {
        while let Some(shard) = self.ahead.next() {
            let fetched = match self.shard(&shard, Need::Ahead) {
                Ok(Some(file)) => Fetched::File(file),
                Ok(None) => Fetched::NoRoom,
                Err(_) => Fetched::Failed,
            };
            self.ahead.done(&shard, fetched);
        }
    }

    /// The file of an indexed shard; `None` without room for it.
    fn shard(&self, shard: &Shard, need: Need) -> Result<Option<File>, DataError> {
        let Location::Remote(url) = &shard.location else {
            return Err(DataError::Remote { location: shard.location.to_string(), reason: "not a URL".to_owned() });
        };
        let shown = shard.location.shown();
        let fits = |contents: Digest, file: &File| match shard.contents {
            Some(indexed) if indexed == contents => Ok(()),
            Some(indexed) => Err(format!("its BLAKE3 is {contents}, it was indexed with {indexed}")),
            None => match scan_file(file, &shown) {
                Ok(index) if index.digest() == shard.index => Ok(()),
                Ok(_) => Err("its samples are not those that were indexed".to_owned()),
                Err(error) => Err(error.to_string()),
            },
        };
        self.file(&Wanted { url, version: &version_of(shard), fits: &fits }, need)
    }

    fn file(&self, wanted: &Wanted<'_>, need: Need) -> Result<Option<File>, DataError> {
        let Wanted { url, version, fits } = *wanted;
        let io = || DataError::io(&self.cache.dir);
        if version.bytes > self.cache.max_bytes {
            return Err(self.too_small(version));
        }
        self.check(url)?;
        let key = format!("{url}\0{}\0{}", version.bytes, version.etag.as_deref().unwrap_or_default());
        let key = format!("{:.32}", Digest::of(key.as_bytes()).to_string());
        loop {
            let part = match self.cache.get(&key).map_err(io())? {
                Entry::Whole(file) => return Ok(Some(file)),
                Entry::Missing(part) => part,
            };
            // Whoever had the part before may have found out that it is not to be had.
            self.check(url)?;
            let begin = Instant::now();
            while !self.cache.reserve(&part, version.bytes).map_err(io())? {
                if need == Need::Ahead {
                    return Ok(None);
                }
                self.ahead.release();
                if begin.elapsed() > self.retries.give_up || self.stop.load(Ordering::Relaxed) {
                    return Ok(None);
                }
                thread::sleep(ROOM_POLL);
            }
            match fetch(&self.network, url, version, &part.file, &self.retries, &self.stop, fits) {
                Ok(()) => part.finish().map_err(io())?,
                Err(fault) => {
                    let failure = Failure { kind: fault.kind, reason: fault.reason.as_str().into() };
                    self.failed.lock().unwrap_or_else(PoisonError::into_inner).insert(url.clone(), failure);
                    return Err(failed(url)(fault));
                }
            }
        }
    }

    /// Whether a shard is known not to be had.
    fn check(&self, url: &RemoteUrl) -> Result<(), DataError> {
        let failures = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        match failures.get(url) {
            Some(failure) => Err(failed(url)(Fault::new(failure.kind, &*failure.reason))),
            None => Ok(()),
        }
    }

    fn too_small(&self, version: &Version) -> DataError {
        DataError::ShardCacheTooSmall {
            dir: self.cache.dir.clone(),
            max_bytes: self.cache.max_bytes,
            what: "one shard, with those that other processes use,".to_owned(),
            needed: version.bytes,
        }
    }
}

fn version_of(shard: &Shard) -> Version {
    Version { bytes: shard.bytes, etag: shard.etag.clone() }
}

fn rewound(mut file: &File) -> std::io::Result<&File> {
    use std::io::Seek;
    file.rewind()?;
    Ok(file)
}

fn failed(url: &RemoteUrl) -> impl FnOnce(Fault) -> DataError {
    let url = url.clone();
    move |Fault { kind, reason }| match kind {
        Kind::Changed => DataError::ShardChanged { shard: PathBuf::from(url.as_str()), reason },
        Kind::NotFound => DataError::Remote { location: url.to_string(), reason: format!("does not exist ({reason})") },
        _ => DataError::Remote { location: url.to_string(), reason },
    }
}
