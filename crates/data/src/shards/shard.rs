//! The shards of a set: what is known of each without opening it, and how one is opened.

use std::collections::HashSet;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;

use crate::remote::Remote;
use crate::shards::index::{Digest, Index, IndexedShard, Places, Stamp};
use crate::shards::location::{Location, RemoteUrl, redacted};
use crate::shards::manifest;
use crate::shards::patterns::{self, Named};
use crate::shards::scan::{Problem, scan_file};
use crate::{DataError, OpenOptions};

/// One shard as it was when it was indexed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shard {
    /// The tar file.
    pub location: Location,
    /// Its length.
    pub bytes: u64,
    /// Samples with an image and a caption.
    pub samples: u64,
    /// What in it cannot be used.
    pub problems: u64,
    /// Of its index.
    pub index: Digest,
    /// Of the tar file, where it was read whole.
    pub contents: Option<Digest>,
    /// What its store calls this version of it.
    pub etag: Option<Box<str>>,
}

impl Shard {
    /// Its file name.
    pub fn name(&self) -> String {
        self.location.name()
    }

    fn of_file(indexed: &IndexedShard) -> Shard {
        let header = &indexed.header;
        Shard {
            location: Location::Local(indexed.path.as_path().into()),
            bytes: header.tar_bytes,
            samples: header.samples,
            problems: header.problems,
            index: header.digest,
            contents: header.tar_digest,
            etag: None,
        }
    }

    pub(crate) fn is_remote(&self) -> bool {
        matches!(self.location, Location::Remote(_))
    }

    /// Refuses an open shard that has more or fewer samples than was said of it: a manifest's digests are of what its lines
    /// say, whether that is true or not.
    fn counted(&self, open: OpenShard) -> Result<OpenShard, DataError> {
        match open.index.samples.len() as u64 {
            samples if samples == self.samples => Ok(open),
            samples => Err(DataError::ShardChanged {
                shard: self.location.shown(),
                reason: format!("it has {samples} samples, its manifest says {}", self.samples),
            }),
        }
    }

    /// What a manifest can say of its problems.
    fn summary(&self) -> Option<Problem> {
        let reason = format!("{} problems were found when it was indexed", self.problems);
        (self.problems > 0).then(|| Problem { shard: self.name(), key: String::new(), reason })
    }
}

/// An open shard.
pub(crate) struct OpenShard {
    pub(crate) file: File,
    pub(crate) index: Index,
}

/// All shards of a set.
pub(crate) struct Shards {
    pub(crate) all: Vec<Shard>,
    pub(crate) problems: Vec<Problem>,
    /// Where indices lie, and go.
    pub(crate) places: Places,
    /// There where a shard is not of this machine.
    remote: Option<Remote>,
}

/// Whether indices that are there are believed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Indices {
    Keep,
    /// Built anew from local shards; those beside shards that lie elsewhere are believed where they fit.
    Rebuild,
    /// Built anew from all shards.
    Rescan,
}

impl Shards {
    /// What `patterns` name, with indices and manifests that are missing built.
    pub(crate) fn open(patterns: &[String], options: &OpenOptions, indices: Indices) -> Result<Shards, DataError> {
        let remote = match patterns.iter().find(|pattern| patterns::is_remote(pattern)) {
            Some(pattern) => Some(Remote::start(&options.remote, &redacted(pattern))?),
            None => None,
        };
        let places = Places { write_beside: options.write_beside, elsewhere: options.cache_dir.clone() };
        let kept = remote.as_ref().and_then(|remote| remote.kept_manifest(patterns, &options.base_dir));
        // Where credentials cannot be told apart nothing is kept, for want of which others would wait.
        let kept = kept.filter(|_| patterns::with_credentials(Vec::new(), patterns).is_some());
        let read = || {
            // One that is missing or damaged is no error: it is built.
            let all = manifest::read_file(kept.as_deref().filter(|_| indices == Indices::Keep)?).ok()?;
            patterns::with_credentials(all, patterns)
        };
        let found = read();
        // Of those who share the cache one builds it, and the others find it then.
        let _turn = match (&found, &remote, &kept) {
            (None, Some(remote), Some(kept)) => Some(remote.lock(&kept.with_extension("lock"))?),
            _ => None,
        };
        if let Some(all) = found.or_else(read) {
            let problems = all.iter().filter_map(Shard::summary).collect();
            return Ok(Shards { all, problems, places, remote });
        }
        let list = |url: &_| match &remote {
            Some(remote) => remote.list(url),
            None => Ok(Vec::new()),
        };
        let named = patterns::expand(patterns, &options.base_dir, &list)?;
        let mut shards = Shards { all: Vec::new(), problems: Vec::new(), places, remote };
        let whole = shards.add(named, options, indices)?;
        if let Some(kept) = kept.as_ref().filter(|_| whole) {
            let written = patterns::without_credentials(&shards.all);
            if patterns::with_credentials(written.clone(), patterns).as_ref() == Some(&shards.all) {
                manifest::write_file(&written, kept)?;
            }
        }
        Ok(shards)
    }

    /// Adds what is named, and says whether nothing of it was passed over.
    fn add(&mut self, named: Vec<Named>, options: &OpenOptions, indices: Indices) -> Result<bool, DataError> {
        let (done, all) = (AtomicUsize::new(0), named.len());
        let tell = || {
            let done = done.fetch_add(1, Ordering::Relaxed) + 1;
            if let Some(progress) = &options.progress {
                progress(done, all);
            }
        };
        let open = |named: &Named| -> Result<(Vec<Shard>, Vec<Problem>), DataError> {
            let opened = match named {
                Named::Local(path) => self.index_file(path, indices),
                Named::Remote(object) => {
                    let indexed = self.remote_for(&object.url)?.index(object, indices);
                    indexed.map(|(shard, problems)| (vec![shard], problems))
                }
                Named::Manifest(location) if indices != Indices::Keep => Err(DataError::Manifest {
                    manifest: location.shown(),
                    reason: "it only repeats what was found when it was written; name its shards by patterns"
                        .to_owned(),
                }),
                Named::Manifest(location) => self.read_manifest(location).map(|shards| {
                    let problems = shards.iter().filter_map(Shard::summary).collect();
                    (shards, problems)
                }),
            };
            tell();
            opened
        };
        let opened = self.side_by_side(|| named.par_iter().map(open).collect::<Vec<_>>())?;
        let (mut errors, mut whole) = (Vec::new(), true);
        for (named, result) in named.iter().zip(opened) {
            match result {
                Ok((shards, problems)) => {
                    self.all.extend(shards);
                    self.problems.extend(problems);
                }
                Err(error) if options.tolerate_unreadable && !error.is_of_this_machine() => {
                    whole = false;
                    let shard = named.location().name();
                    self.problems.push(Problem { shard, key: String::new(), reason: error.to_string() });
                }
                Err(error) => errors.push(error),
            }
        }
        let mut seen = HashSet::new();
        let twice = self.all.iter().filter(|shard| !seen.insert(&shard.location));
        errors.extend(twice.map(|shard| DataError::DuplicateShard { path: shard.location.shown() }));
        if self.remote.is_none() && self.all.iter().any(Shard::is_remote) {
            let first = self.all.iter().find(|shard| shard.is_remote());
            let wanted_by = first.map_or(String::new(), |shard| shard.location.to_string());
            self.remote = Some(Remote::start(&options.remote, &wanted_by)?);
        }
        if errors.is_empty() { Ok(whole) } else { Err(DataError::from_list(errors)) }
    }

    /// Runs what looks at many shards: where some lie elsewhere on threads of its own, which wait for the network more than
    /// they compute.
    pub(crate) fn side_by_side<T: Send>(&self, run: impl FnOnce() -> T + Send) -> Result<T, DataError> {
        Ok(match self.remote.as_ref().map(Remote::pool).transpose()? {
            Some(pool) => pool.install(run),
            None => run(),
        })
    }

    fn index_file(&self, path: &Path, indices: Indices) -> Result<(Vec<Shard>, Vec<Problem>), DataError> {
        let indexed = match indices {
            Indices::Keep => IndexedShard::open_in(path, &self.places)?,
            Indices::Rebuild | Indices::Rescan => IndexedShard::rebuild(path, &self.places)?,
        };
        let problems = match indexed.header.problems {
            0 => Vec::new(),
            _ => indexed.load()?.problems,
        };
        Ok((vec![Shard::of_file(&indexed)], problems))
    }

    fn read_manifest(&self, location: &Location) -> Result<Vec<Shard>, DataError> {
        match location {
            Location::Local(path) => manifest::read_file(path),
            Location::Remote(url) => manifest::read(self.remote_for(url)?.read(url)?.as_slice(), location),
        }
    }

    /// The shard's file and index, which are those that the set was made of.
    pub(crate) fn load(&self, number: usize) -> Result<OpenShard, DataError> {
        let shard = &self.all[number];
        let changed = |reason: String| DataError::ShardChanged { shard: shard.location.shown(), reason };
        match &shard.location {
            Location::Local(path) => {
                let indexed = IndexedShard::open_in(path, &self.places)?;
                let bytes = indexed.header.tar_bytes;
                if bytes != shard.bytes {
                    return Err(changed(format!("it has {bytes} bytes, it was indexed with {}", shard.bytes)));
                }
                if indexed.header.digest != shard.index {
                    return Err(changed(OTHER_SAMPLES.to_owned()));
                }
                let file = File::open(path).map_err(DataError::io(&**path))?;
                let index = indexed.load().or_else(|damaged| found_anew(shard, &file, path, damaged))?;
                shard.counted(OpenShard { file, index })
            }
            Location::Remote(url) => load_remote(self.remote_for(url)?, shard, url),
        }
    }

    /// Where numbers of a shard's samples may be kept: beside it, or where indices go whose folder is read-only; of one
    /// that lies elsewhere, in the shard cache. The names are the shards' own, since shards may have equal indices. Behind
    /// them those of the places where they may be written.
    pub(crate) fn attributes_places(&self, number: usize) -> (Vec<PathBuf>, Vec<PathBuf>) {
        let (known, writable) = match &self.all[number].location {
            Location::Local(path) => (self.places.of(path), self.places.writable(path)),
            Location::Remote(url) => {
                let name = format!("{:.32}.idx", Digest::of(url.as_str().as_bytes()));
                let cache = self.remote.as_ref().map(|remote| remote.capacity().0);
                let folders = [cache, self.places.elsewhere.as_deref()];
                let known: Vec<PathBuf> = folders.into_iter().flatten().map(|dir| dir.join(&name)).collect();
                (known.clone(), known)
            }
        };
        let attributes =
            |places: Vec<PathBuf>| places.into_iter().map(|place| place.with_extension("attributes")).collect();
        (attributes(known), attributes(writable))
    }

    /// What is known of a shard's contents without reading it; what was read from it belongs to that.
    pub(crate) fn version(&self, number: usize) -> Result<String, DataError> {
        let shard = &self.all[number];
        Ok(match &shard.location {
            Location::Local(path) => {
                let Stamp { bytes, mtime_ns } = Stamp::of(path).map_err(DataError::io(&**path))?;
                format!("{} {bytes} bytes {mtime_ns} ns", shard.index)
            }
            Location::Remote(_) => {
                let contents = shard.contents.map_or("-".to_owned(), |contents| contents.to_string());
                let etag = shard.etag.as_deref().unwrap_or("-");
                format!("{} {} bytes contents {contents} etag {etag}", shard.index, shard.bytes)
            }
        })
    }

    fn remote_for(&self, url: &RemoteUrl) -> Result<&Remote, DataError> {
        let reason = || "no network was started for it".to_owned();
        self.remote.as_ref().ok_or_else(|| DataError::Remote { location: url.to_string(), reason: reason() })
    }

    /// The store's side, where a shard is remote.
    pub(crate) fn remote(&self) -> Option<&Remote> {
        self.remote.as_ref()
    }
}

/// The index that a shard's own bytes give where the file of its index is damaged: no sample is lost with that.
fn found_anew(shard: &Shard, file: &File, path: &Path, damaged: DataError) -> Result<Index, DataError> {
    if !matches!(damaged, DataError::BadIndex { .. }) {
        return Err(damaged);
    }
    match scan_file(file, path)? {
        index if index.digest() == shard.index => Ok(index),
        _ => Err(damaged),
    }
}

/// Why a shard counts as changed whose index is not the one that is known.
const OTHER_SAMPLES: &str = "its samples are not those that were indexed";

/// The file and index of a shard that lies elsewhere. Where those of its file in the cache are not those that were indexed,
/// that file may be damaged: the shard is fetched once more before it is said to have changed.
fn load_remote(remote: &Remote, shard: &Shard, url: &RemoteUrl) -> Result<OpenShard, DataError> {
    let mut tried = false;
    loop {
        let (file, fetched) = remote.open(shard)?;
        let index = scan_file(&file, &shard.location.shown());
        let reason = match index.map_err(|error| error.in_shard_cache(remote.capacity().0)) {
            Ok(index) if index.digest() == shard.index => return shard.counted(OpenShard { file, index }),
            Ok(_) => OTHER_SAMPLES.to_owned(),
            Err(error) if error.is_of_this_machine() => return Err(error),
            Err(error) => error.to_string(),
        };
        if fetched || tried {
            return Err(remote.changed(url, &reason));
        }
        remote.discard(shard)?;
        tried = true;
    }
}
