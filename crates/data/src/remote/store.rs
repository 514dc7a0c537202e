//! What the rest of the crate sees of shards that lie elsewhere.

use std::fs::File;
use std::path::{self, Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Once};
use std::thread;
use std::time::Instant;

use rayon::{ThreadPool, ThreadPoolBuilder};

use super::cache::Cache;
use super::network::Network;
use super::retry::{Fault, Kind};
use super::shared::{Had, Need, Shared, Wanted, failed, version_of};
use super::{CacheUse, Object, RemoteOptions, Version};
use crate::DataError;
use crate::shards::index::{Digest, decode, longest};
use crate::shards::location::{Location, RemoteUrl, names_manifest};
use crate::shards::patterns;
use crate::shards::scan::{Problem, scan_file};
use crate::shards::shard::{Indices, Shard};

/// No longer manifest is read: it would name millions of shards.
const MAX_MANIFEST_BYTES: u64 = 1 << 30;

/// Stores, and the cache of what was fetched from them.
pub(crate) struct Remote {
    shared: Arc<Shared>,
    threads: Once,
    parallel: usize,
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
        let cache = Cache::open(cache).map_err(|source| DataError::ShardCache { dir: cache.dir.clone(), source })?;
        let shared = Shared::new(network, cache, options.retries);
        Ok(Remote { shared, threads: Once::new(), parallel: options.parallel })
    }

    /// Where the manifest of a pattern list is kept; a list of manifests alone needs none.
    pub(crate) fn kept_manifest(&self, patterns: &[String], base: &Path) -> Option<PathBuf> {
        let mut named = patterns.iter().filter(|pattern| !names_manifest(pattern));
        if !named.any(|pattern| patterns::is_remote(pattern)) {
            return None;
        }
        // Only what is relative means something else elsewhere.
        let is_relative = |pattern: &String| !patterns::is_remote(pattern) && Path::new(pattern).is_relative();
        let base = match patterns.iter().any(is_relative) {
            true => path::absolute(base).ok()?,
            false => PathBuf::new(),
        };
        let list = format!("{}\0{}", base.display(), patterns.join("\0"));
        Some(self.shared.cache.dir.join(format!("{:.32}.jsonl", Digest::of(list.as_bytes()).to_string())))
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

    /// A manifest, whole.
    pub(crate) fn read(&self, url: &RemoteUrl) -> Result<Vec<u8>, DataError> {
        self.shared.read(url, MAX_MANIFEST_BYTES).map_err(failed(url))
    }

    /// Writes a small object.
    pub(crate) fn write(&self, url: &RemoteUrl, bytes: Vec<u8>) -> Result<(), DataError> {
        self.shared.patiently(|| self.shared.network.put(url, bytes.clone())).map_err(failed(url))
    }

    /// Waits for the turn that a file stands for, until it is closed, however its process ends.
    pub(crate) fn lock(&self, path: &Path) -> Result<File, DataError> {
        let locked = File::create(path).and_then(|file| file.lock().map(|()| file));
        locked.map_err(|error| self.shared.broken(error))
    }

    /// What is in a shard: from the index beside it where that is there and fits, unless shards are to be read again; else from the shard itself,
    /// which is fetched anew where indices are built anew.
    pub(crate) fn index(&self, object: &Object, indices: Indices) -> Result<(Shard, Vec<Problem>), DataError> {
        let url = &object.url;
        let version = match &object.version {
            Some(version) if version.etag.is_some() => version.clone(),
            _ => self.shared.patiently(|| self.shared.network.head(url)).map_err(failed(url))?,
        };
        let location = Location::Remote(url.clone());
        let beside = if indices == Indices::Rescan { None } else { self.sidecar(url, &version)? };
        let (index, digest, contents) = match beside {
            Some((header, index)) => (index, header.digest, header.tar_digest),
            None => {
                if indices != Indices::Keep {
                    self.shared.discard(url, &version)?;
                }
                let wanted = Wanted { url, version: &version, fits: &|_, _| Ok(()) };
                let had = self.shared.file(&wanted, Need::Now)?.ok_or_else(|| self.shared.too_small(&version))?;
                let index = scan_file(&had.file, &location.shown()).map_err(|e| e.in_shard_cache(self.capacity().0))?;
                let digest = index.digest();
                let contents = rewound(&had.file).and_then(Digest::of_reader).map_err(|e| self.shared.broken(e))?;
                (index, digest, Some(contents))
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
        let beside = url.with_suffix(".idx");
        match self.shared.read(&beside, longest(version.bytes)) {
            Ok(file) => Ok(decode(&file, version.bytes)),
            // Stores that may not be listed forbid what is not there; and what is too long is none.
            Err(fault) if matches!(fault.kind, Kind::NotFound | Kind::Lasting) => Ok(None),
            Err(fault) => Err(failed(&beside)(fault)),
        }
    }

    /// The shard's file, and whether it was fetched just now, not being in the cache.
    pub(crate) fn open(&self, shard: &Shard) -> Result<(File, bool), DataError> {
        let begin = Instant::now();
        let had = self.shared.shard(shard, Need::Now);
        self.shared.count(|usage| {
            usage.opened += 1;
            usage.hits += u64::from(had.as_ref().is_ok_and(|had| had.as_ref().is_some_and(|had| !had.fetched)));
            usage.wait_s += begin.elapsed().as_secs_f64();
        });
        let Had { file, fetched } = had?.ok_or_else(|| self.shared.too_small(&version_of(shard)))?;
        Ok((file, fetched))
    }

    /// Takes the shard's file out of the cache.
    pub(crate) fn discard(&self, shard: &Shard) -> Result<(), DataError> {
        match &shard.location {
            Location::Remote(url) => self.shared.discard(url, &version_of(shard)),
            Location::Local(_) => Ok(()),
        }
    }

    /// Keeps in mind that a shard is not what was indexed, and says so.
    pub(crate) fn changed(&self, url: &RemoteUrl, reason: &str) -> DataError {
        let fault = Fault::new(Kind::Changed, reason);
        self.shared.remember(url, &fault, Need::Now);
        failed(url)(fault)
    }

    /// Names what closes a shard that nobody reads, for whoever needs room; it says whether there was one.
    pub(crate) fn close_idle_with(&self, close: impl Fn() -> bool + Send + Sync + 'static) {
        // It is named once, when the set is made.
        let _ = self.shared.close_idle.set(Box::new(close));
    }

    /// Says how many bytes are in use at once; how many all sets of this process that share the cache have.
    pub(crate) fn claim(&self, bytes: u64) -> u64 {
        self.shared.needs.fetch_max(bytes, Ordering::Relaxed);
        self.shared.room.needs()
    }

    /// What the cache was good for.
    pub(crate) fn usage(&self) -> CacheUse {
        self.shared.usage()
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
        self.shared.stop();
    }
}

fn rewound(mut file: &File) -> std::io::Result<&File> {
    use std::io::Seek;
    file.rewind()?;
    Ok(file)
}
