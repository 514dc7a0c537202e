//! From a shard to its file: out of the cache, or fetched into it.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use super::background::{Ahead, Fetched};
use super::cache::{Cache, Entry, Part, is_asked};
use super::fetch::{Failed, fetch};
use super::network::Network;
use super::retry::{Fault, Kind, Patience};
use super::room::{Member, Room};
use super::{CacheUse, Retries, Version};
use crate::DataError;
use crate::shards::index::Digest;
use crate::shards::location::{Location, RemoteUrl};
use crate::shards::scan::scan_file;
use crate::shards::shard::Shard;

/// How often it is looked whether the cache has room by now.
const ROOM_POLL: Duration = Duration::from_millis(20);

/// Requests that may bring nothing as long as nothing was ever had of the stores: a name that was written wrongly should
/// be told so soon.
const FIRST_TRIES: u32 = 8;

/// What the threads that fetch and those that read share.
pub(super) struct Shared {
    pub(super) network: Network,
    pub(super) cache: Cache,
    retries: Retries,
    /// Whether a store has answered.
    reached: AtomicBool,
    stop: AtomicBool,
    pub(super) ahead: Ahead,
    pub(super) room: Arc<Room>,
    /// Closes a shard that nobody reads; false when there is none.
    pub(super) close_idle: OnceLock<CloseIdle>,
    /// Bytes that are in use at once.
    pub(super) needs: AtomicU64,
    /// Why shards are not to be had: found out once, told to all who ask.
    failed: Mutex<HashMap<RemoteUrl, Failure>>,
    usage: Mutex<CacheUse>,
}

pub(super) type CloseIdle = Box<dyn Fn() -> bool + Send + Sync>;

/// Why a shard is not to be had.
#[derive(Clone)]
struct Failure {
    kind: Kind,
    reason: Arc<str>,
    at: Instant,
}

/// Who waits for room in the cache.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Need {
    /// A sample: what nobody reads gives way, and what is in use is waited for.
    Now,
    /// Nobody yet.
    Ahead,
}

/// A file of the cache.
pub(super) struct Had {
    pub(super) file: File,
    /// Whether it was not there before.
    pub(super) fetched: bool,
}

/// A file to fetch.
pub(super) struct Wanted<'a> {
    pub(super) url: &'a RemoteUrl,
    pub(super) version: &'a Version,
    pub(super) fits: &'a dyn Fn(Digest, &File) -> Result<(), String>,
}

impl Member for Shared {
    fn release_ahead(&self) -> bool {
        self.ahead.release()
    }

    fn release_idle(&self) -> bool {
        self.close_idle.get().is_some_and(|close| close())
    }

    fn needs(&self) -> u64 {
        self.needs.load(Ordering::Relaxed)
    }
}

impl Shared {
    pub(super) fn new(network: Network, cache: Cache, retries: Retries) -> Arc<Shared> {
        let shared = Arc::new(Shared {
            network,
            retries,
            reached: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            ahead: Ahead::default(),
            room: Room::of(&cache.dir),
            cache,
            close_idle: OnceLock::new(),
            needs: AtomicU64::new(0),
            failed: Mutex::default(),
            usage: Mutex::default(),
        });
        shared.room.join(Arc::downgrade(&shared) as Weak<dyn Member>);
        shared
    }

    /// Ends the threads that fetch; nothing is held or claimed any more.
    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
        self.ahead.stop();
        self.needs.store(0, Ordering::Relaxed);
    }

    /// Tries a request until it succeeds or is to be given up.
    pub(super) fn patiently<T>(&self, request: impl FnMut() -> Result<T, Fault>) -> Result<T, Fault> {
        let mut retries = self.retries;
        if !self.reached.load(Ordering::Relaxed) {
            retries.tries = retries.tries.min(FIRST_TRIES);
        }
        let answer = Patience::of(&retries, &self.stop, request)?;
        self.reached.store(true, Ordering::Relaxed);
        Ok(answer)
    }

    pub(super) fn usage(&self) -> CacheUse {
        *self.usage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn count(&self, add: impl FnOnce(&mut CacheUse)) {
        add(&mut self.usage.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// The error of the cache's folder.
    pub(super) fn broken(&self, source: io::Error) -> DataError {
        DataError::ShardCache { dir: self.cache.dir.clone(), source }
    }

    /// A small object, whole; it may have `most` bytes.
    pub(super) fn read(&self, url: &RemoteUrl, most: u64) -> Result<Vec<u8>, Fault> {
        self.patiently(|| {
            let (mut body, mut bytes) = (self.network.get(url, 0)?, Vec::new());
            let promised = body.version.bytes;
            if promised > most {
                return Err(Fault::new(
                    Kind::Lasting,
                    format!("it has {promised} bytes, of which at most {most} are read"),
                ));
            }
            while let Some(chunk) = body.next()? {
                bytes.extend_from_slice(&chunk);
                if bytes.len() as u64 > promised {
                    let reason = format!("more than the {promised} bytes that were promised arrived");
                    return Err(Fault::new(Kind::Passing, reason));
                }
            }
            match bytes.len() as u64 == promised {
                true => Ok(bytes),
                false => Err(Fault::new(Kind::Passing, format!("it ended after {} of {promised} bytes", bytes.len()))),
            }
        })
    }

    /// What a thread does that fetches ahead.
    pub(super) fn fetch_ahead(&self) {
        while let Some(shard) = self.ahead.next() {
            let fetched = match self.shard(&shard, Need::Ahead) {
                Ok(Some(had)) => Fetched::File(had.file),
                Ok(None) => Fetched::NoRoom,
                Err(_) => Fetched::Failed,
            };
            self.ahead.done(&shard, fetched);
        }
    }

    /// The file of an indexed shard; `None` without room for it.
    pub(super) fn shard(&self, shard: &Shard, need: Need) -> Result<Option<Had>, DataError> {
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

    /// The file of an object, as long as it is of the version wanted; `None` without room for it.
    pub(super) fn file(&self, wanted: &Wanted<'_>, need: Need) -> Result<Option<Had>, DataError> {
        let Wanted { url, version, fits } = *wanted;
        if version.bytes > self.cache.max_bytes {
            return Err(self.too_small(version));
        }
        self.check(url)?;
        let key = key_of(url, version);
        let mut waited = Duration::ZERO;
        loop {
            let begin = Instant::now();
            let part = match self.cache.get(&key).map_err(|error| self.broken(error))? {
                Entry::Whole(file) => match file.metadata().map_err(|error| self.broken(error))?.len() {
                    bytes if bytes == version.bytes => return Ok(Some(Had { file, fetched: false })),
                    // Damaged: another length is in its key.
                    _ => {
                        self.discard(url, version)?;
                        continue;
                    }
                },
                Entry::Missing(part) => part,
            };
            waited += begin.elapsed();
            // Whoever had the part before may have found out that it is not to be had.
            self.check(url)?;
            if !self.make_room(&part, version.bytes, need).map_err(|error| self.broken(error))? {
                return Ok(None);
            }
            // Who has waited while another tried in vain has that much less patience.
            let patience = Patience::new(&self.retries, &self.stop).having_waited(waited);
            let file = match fetch(&self.network, url, version, &part.file, patience, &self.stop, fits) {
                Ok(()) => part.finish().map_err(|error| self.broken(error))?,
                Err(Failed::Here(error)) => return Err(self.broken(error)),
                Err(Failed::There(fault)) => {
                    self.remember(url, &fault, need);
                    return Err(failed(url)(fault));
                }
            };
            self.reached.store(true, Ordering::Relaxed);
            self.count(|usage| {
                usage.fetched += 1;
                usage.fetched_bytes += version.bytes;
            });
            return Ok(Some(Had { file, fetched: true }));
        }
    }

    /// Takes the file of an object out of the cache; who reads it reads on.
    pub(super) fn discard(&self, url: &RemoteUrl, version: &Version) -> Result<(), DataError> {
        self.cache.discard(&key_of(url, version)).map_err(|error| self.broken(error))
    }

    /// Makes room for a part; false when what is in use leaves none.
    fn make_room(&self, part: &Part, bytes: u64, need: Need) -> io::Result<bool> {
        if need == Need::Ahead {
            // Not what somebody is waiting for.
            return Ok(!is_asked(&self.cache.dir) && self.cache.reserve(part, bytes)?);
        }
        let (begin, mut asking) = (Instant::now(), None);
        while !self.cache.reserve(part, bytes)? {
            if begin.elapsed() > self.retries.give_up || self.stop.load(Ordering::Relaxed) {
                return Ok(false);
            }
            if self.room.give_way() {
                continue;
            }
            if asking.is_none() {
                asking = self.cache.ask()?;
            }
            thread::sleep(ROOM_POLL);
        }
        Ok(true)
    }

    /// Keeps in mind that a shard is not to be had.
    pub(super) fn remember(&self, url: &RemoteUrl, fault: &Fault, need: Need) {
        // By the time that a sample needs it, what passes may have passed.
        if need == Need::Now || !passes(fault.kind) {
            let failure = Failure { kind: fault.kind, reason: fault.reason.as_str().into(), at: Instant::now() };
            self.failed.lock().unwrap_or_else(PoisonError::into_inner).insert(url.clone(), failure);
        }
    }

    /// Whether a shard is known not to be had.
    fn check(&self, url: &RemoteUrl) -> Result<(), DataError> {
        let mut failures = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(failure) = failures.get(url) else { return Ok(()) };
        // As long again as it was tried for.
        if passes(failure.kind) && failure.at.elapsed() > self.retries.give_up {
            failures.remove(url);
            return Ok(());
        }
        Err(failed(url)(Fault::new(failure.kind, &*failure.reason)))
    }

    pub(super) fn too_small(&self, version: &Version) -> DataError {
        DataError::ShardCacheTooSmall {
            dir: self.cache.dir.clone(),
            max_bytes: self.cache.max_bytes,
            what: "one shard, with those that are being read,".to_owned(),
            needed: version.bytes,
        }
    }
}

/// Whether what went wrong may go well another time.
fn passes(kind: Kind) -> bool {
    matches!(kind, Kind::Passing | Kind::NoCredentials)
}

/// Names an object's file in the cache.
fn key_of(url: &RemoteUrl, version: &Version) -> String {
    let key = format!("{}\0{}\0{}", url.as_str(), version.bytes, version.etag.as_deref().unwrap_or_default());
    format!("{:.32}", Digest::of(key.as_bytes()).to_string())
}

pub(super) fn version_of(shard: &Shard) -> Version {
    Version { bytes: shard.bytes, etag: shard.etag.clone() }
}

/// What is told of a fault.
pub(super) fn failed(url: &RemoteUrl) -> impl FnOnce(Fault) -> DataError {
    let url = url.clone();
    move |Fault { kind, reason }| match kind {
        Kind::Changed => DataError::ShardChanged { shard: PathBuf::from(url.to_string()), reason },
        Kind::NotFound => DataError::Remote { location: url.to_string(), reason: format!("does not exist ({reason})") },
        _ => DataError::Remote { location: url.to_string(), reason },
    }
}
