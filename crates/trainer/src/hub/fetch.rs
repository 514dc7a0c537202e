//! Brings a model's files into the cache: what is there stays, what was interrupted goes on, what arrives is checked.

use std::cell::Cell;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::PoisonError;
use std::thread;
use std::time::Duration;

use blip2_weights::{WEIGHT_FILES, read_shard_index};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use ureq::http::StatusCode;

use super::cache::{PREPROCESSING, RepoCache};
use super::error::HubError;
use super::http::Client;
use super::id::{HubId, is_commit};
use super::{Hub, HubEvent};
use crate::ranks::Pulse;

/// What is taken beside the weights, where it exists.
const COMPANIONS: [&str; 4] =
    ["generation_config.json", PREPROCESSING[0], PREPROCESSING[1], "pretraining_heads.safetensors"];
/// What a file begins with that stands for a large one.
const POINTER: &[u8] = b"version https://git-lfs";
const MIB: u64 = 1 << 20;
/// How often is looked whether another process has fetched a file.
const LOCK_POLL: Duration = Duration::from_millis(200);

/// A model's files at one commit, as the hub lists them.
#[derive(Deserialize)]
struct Listing {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    #[serde(rename = "blobId")]
    blob_id: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    sha256: String,
    size: u64,
}

/// One file that is to be in the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Wanted {
    name: String,
    size: u64,
    /// The blob's name in the cache.
    digest: String,
    /// Whether that name is the content's SHA-256.
    checked: bool,
}

impl Hub {
    /// Fetches the files of a model that this program reads; returns the id at its commit, and the snapshot's folder.
    pub(super) fn fetch(&self, id: &HubId, cache: &RepoCache) -> Result<(HubId, PathBuf), HubError> {
        let client = Client::new(&self.settings, id);
        let revision = id.known_commit().unwrap_or(id.revision()).replace('/', "%2F");
        let url = format!("{}/api/models/{}/revision/{revision}?blobs=true", self.settings.endpoint, id.repo);
        let mut text = String::new();
        let answer = |message: String| HubError::Answer { id: id.to_string(), url: self.settings.shown(&url), message };
        let body = client.get(&url, 0)?.into_body().into_reader();
        body.take(16 * MIB).read_to_string(&mut text).map_err(|error| answer(client.broken(&error)))?;
        let listing: Listing = serde_json::from_str(&text).map_err(|error| answer(format!("invalid JSON: {error}")))?;
        if !is_commit(&listing.sha) {
            return Err(answer(format!("sha: expected a commit, got {:?}", listing.sha)));
        }
        let pinned = id.known_commit().is_some();
        let id = &id.at(&listing.sha);
        let fetch = Fetch { hub: self, client, id, cache, commit: &listing.sha };
        cache.make_folders(fetch.commit).map_err(fetch.io(cache.folder()))?;
        fetch.all(&listing.siblings)?;
        // What a commit holds says nothing of where a branch stands.
        if !pinned {
            cache.remember(id.revision(), fetch.commit).map_err(fetch.io(cache.folder()))?;
        }
        Ok((id.clone(), cache.snapshot(fetch.commit)))
    }
}

struct Fetch<'a> {
    hub: &'a Hub,
    client: Client<'a>,
    id: &'a HubId,
    cache: &'a RepoCache,
    commit: &'a str,
}

/// Why a stream ended early.
enum Stop {
    /// Going on from the last byte may help.
    Interrupted(String),
    Fatal(HubError),
}

impl Fetch<'_> {
    /// The configuration first, since without it nothing else is of use; then the rest, the sizes of which are told before.
    fn all(&self, siblings: &[Sibling]) -> Result<(), HubError> {
        let mut wanted = vec![self.require(siblings, &["config.json"], "config.json")?];
        let named = |name: &str| siblings.iter().any(|sibling| sibling.rfilename == name);
        let (present, absent): (Vec<&str>, Vec<&str>) =
            COMPANIONS.into_iter().chain(blip2_weights::TOKENIZER_FILES).partition(|name| named(name));
        for name in present {
            wanted.push(self.require(siblings, &[name], "it")?);
        }
        self.cache.note_absent(self.commit, absent.into_iter()).map_err(self.io(self.cache.folder()))?;
        let (single, index) =
            WEIGHT_FILES.into_iter().find(|(single, index)| named(single) || named(index)).unwrap_or(WEIGHT_FILES[0]);
        let expected = "model.safetensors or pytorch_model.bin, whole or in shards,";
        let weights = self.require(siblings, &[single, index], expected)?;
        if weights.name == index {
            self.bring(std::slice::from_ref(&weights))?;
            let path = self.cache.snapshot(self.commit).join(index);
            let shards = read_shard_index(&path).map_err(|error| self.answer(index, error.to_string()))?;
            for shard in shards.keys() {
                if !named(shard) {
                    return Err(self.answer(index, format!("names the shard {shard}, which this model does not have")));
                }
                wanted.push(self.require(siblings, &[shard], "it")?);
            }
        } else {
            wanted.push(weights);
        }
        self.bring(&wanted)
    }

    /// The first of `names` that the hub lists.
    fn require(&self, siblings: &[Sibling], names: &[&str], expected: &'static str) -> Result<Wanted, HubError> {
        let found = names.iter().find_map(|name| siblings.iter().find(|sibling| sibling.rfilename == *name));
        let Some(Sibling { rfilename, size, blob_id, lfs }) = found else {
            let mut found: Vec<&str> = siblings.iter().map(|sibling| sibling.rfilename.as_str()).take(10).collect();
            if siblings.len() > found.len() {
                found.push("...");
            }
            let found = if found.is_empty() { "none".into() } else { found.join(", ") };
            return Err(HubError::NoFile { id: self.id.to_string(), expected, found });
        };
        let (size, digest) = match lfs {
            Some(Lfs { sha256, size }) => (Some(*size), Some(sha256)),
            None => (*size, blob_id.as_ref()),
        };
        let hexadecimal =
            |digest: &&String| matches!(digest.len(), 40 | 64) && digest.chars().all(|c| c.is_ascii_hexdigit());
        match (size, digest.filter(hexadecimal)) {
            (Some(size), Some(digest)) => {
                Ok(Wanted { name: rfilename.clone(), size, digest: digest.clone(), checked: lfs.is_some() })
            }
            _ => Err(self.answer(rfilename, "the hub's list of files has no size or digest of it".into())),
        }
    }

    /// Has all of `wanted` in the cache and in the snapshot.
    fn bring(&self, wanted: &[Wanted]) -> Result<(), HubError> {
        let absent: Vec<&Wanted> = wanted.iter().filter(|file| !self.cache.blob(&file.digest).exists()).collect();
        let held = |file: &Wanted| fs::metadata(self.incomplete(file)).map_or(0, |meta| meta.len()).min(file.size);
        let bytes: u64 = absent.iter().map(|file| file.size - held(file)).sum();
        if !absent.is_empty() {
            self.check_space(bytes)?;
            let folder = self.cache.folder().to_path_buf();
            (self.hub.report)(HubEvent::Begins { id: self.id.clone(), files: absent.len(), bytes, folder });
            let (done, pulse) = (Cell::new(0), self.pulse());
            let arrived = |more: u64| {
                done.set(done.get() + more);
                (self.hub.report)(HubEvent::Progress { done: done.get(), bytes });
                pulse.beat();
            };
            absent.iter().try_for_each(|file| self.download(file, &arrived))?;
            (self.hub.report)(HubEvent::Ends);
        }
        for file in wanted {
            let linked = self.cache.link(self.commit, &file.name, &file.digest);
            linked.map_err(self.io(&self.cache.snapshot(self.commit).join(&file.name)))?;
        }
        Ok(())
    }

    fn check_space(&self, needed: u64) -> Result<(), HubError> {
        let folder = self.cache.folder();
        let space = rustix::fs::statvfs(folder).map_err(|error| self.io(folder)(error.into()))?;
        let free = space.f_bavail.saturating_mul(space.f_frsize);
        if needed <= free {
            return Ok(());
        }
        Err(self.disk_full(needed, free))
    }

    fn disk_full(&self, needed: u64, free: u64) -> HubError {
        let (needed_mib, free_mib) = (needed.div_ceil(MIB), free / MIB);
        HubError::DiskFull { id: self.id.to_string(), folder: self.cache.folder().to_path_buf(), needed_mib, free_mib }
    }

    /// Why `path` could not be written, of which `needed` bytes were to come.
    fn not_written(&self, path: &Path, error: io::Error, needed: u64) -> HubError {
        if blip2_data::is_disk_full(&error) { self.disk_full(needed, 0) } else { self.io(path)(error) }
    }

    /// One file, from where an earlier download stopped; several processes wait for each other.
    fn download(&self, file: &Wanted, arrived: &dyn Fn(u64)) -> Result<(), HubError> {
        let (blob, path) = (self.cache.blob(&file.digest), self.incomplete(file));
        let lock_path = self.cache.lock(&file.digest);
        let lock = File::create(&lock_path).map_err(self.io(&lock_path))?;
        let pulse = self.pulse();
        loop {
            match lock.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) => thread::sleep(LOCK_POLL),
                Err(TryLockError::Error(error)) => return Err(self.io(&lock_path)(error)),
            }
            // Whoever holds it goes on, or ends.
            pulse.beat();
        }
        if blob.exists() {
            return Ok(());
        }
        let mut partial = Partial::open(&path, file.size).map_err(self.io(&path))?;
        let mut pauses = self.client.pauses();
        while partial.done < file.size {
            let before = partial.done;
            match self.stream(file, &mut partial, arrived) {
                Ok(()) => {}
                Err(Stop::Fatal(error)) => return Err(error),
                Err(Stop::Interrupted(message)) => {
                    if partial.done > before {
                        pauses = self.client.pauses();
                    }
                    let Some(pause) = pauses.next() else {
                        let (id, done, size) = (self.id.to_string(), partial.done, file.size);
                        return Err(HubError::Interrupted { id, file: file.name.clone(), done, size, message });
                    };
                    thread::sleep(pause);
                }
            }
        }
        let got = format!("{:x}", partial.digest.finalize());
        // Some file systems find only now that a quota is used up.
        partial.file.sync_all().map_err(|error| self.not_written(&path, error, file.size))?;
        if file.checked && got != file.digest {
            fs::remove_file(&path).map_err(self.io(&path))?;
            let (id, expected) = (self.id.to_string(), file.digest.clone());
            return Err(HubError::Digest { id, file: file.name.clone(), expected, got });
        }
        fs::rename(&path, &blob).map_err(self.io(&blob))?;
        drop(lock);
        Ok(())
    }

    /// Appends what the hub sends, to the file's end or to where the connection breaks.
    fn stream(&self, file: &Wanted, partial: &mut Partial, arrived: &dyn Fn(u64)) -> Result<(), Stop> {
        let url = format!("{}/{}/resolve/{}/{}", self.hub.settings.endpoint, self.id.repo, self.commit, file.name);
        let path = self.incomplete(file);
        let io = |error| Stop::Fatal(self.io(&path)(error));
        let response = self.client.get(&url, partial.done).map_err(Stop::Fatal)?;
        if partial.done > 0 && response.status() != StatusCode::PARTIAL_CONTENT {
            // The server sends the whole file whatever it is asked for.
            partial.restart().map_err(io)?;
        }
        let mut body = response.into_body().into_reader();
        let mut buffer = vec![0; 1 << 16];
        loop {
            let n = match body.read(&mut buffer) {
                Ok(0) if partial.done < file.size => return Err(Stop::Interrupted("the connection ended".into())),
                Ok(0) => return Ok(()),
                Ok(n) => n,
                Err(error) => return Err(Stop::Interrupted(self.client.broken(&error))),
            };
            if partial.done == 0 && buffer[..n].starts_with(POINTER) {
                let settings = &self.hub.settings;
                let (id, endpoint) = (self.id.to_string(), settings.shown(&settings.endpoint));
                return Err(Stop::Fatal(HubError::Pointer { id, file: file.name.clone(), endpoint }));
            }
            if partial.done + n as u64 > file.size {
                fs::remove_file(&path).map_err(io)?;
                let size = file.size;
                return Err(Stop::Fatal(HubError::Size { id: self.id.to_string(), file: file.name.clone(), size }));
            }
            partial
                .append(&buffer[..n])
                .map_err(|error| Stop::Fatal(self.not_written(&path, error, file.size - partial.done)))?;
            arrived(n as u64);
        }
    }

    fn pulse(&self) -> Pulse {
        self.hub.pulse.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn incomplete(&self, file: &Wanted) -> PathBuf {
        self.cache.blob(&format!("{}.incomplete", file.digest))
    }

    fn answer(&self, file: &str, message: String) -> HubError {
        HubError::Answer { id: self.id.to_string(), url: file.into(), message }
    }

    fn io<'p>(&self, path: &'p Path) -> impl Fn(io::Error) -> HubError + use<'p> {
        let id = self.id.to_string();
        move |source| HubError::Io { id: id.clone(), path: path.to_path_buf(), source }
    }
}

/// A file that has come in part.
struct Partial {
    file: File,
    done: u64,
    digest: Sha256,
}

impl Partial {
    /// Takes up what an earlier download left; what is longer than the file can be is thrown away.
    fn open(path: &Path, size: u64) -> io::Result<Partial> {
        let file = OpenOptions::new().read(true).append(true).create(true).open(path)?;
        let mut partial = Partial { file, done: 0, digest: Sha256::new() };
        if partial.file.metadata()?.len() > size {
            partial.restart()?;
        }
        let held = partial.file.metadata()?.len();
        partial.done = io::copy(&mut (&partial.file).take(held), &mut partial.digest)?;
        Ok(partial)
    }

    fn restart(&mut self) -> io::Result<()> {
        self.file.set_len(0)?;
        (self.done, self.digest) = (0, Sha256::new());
        Ok(())
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)?;
        self.digest.update(bytes);
        self.done += bytes.len() as u64;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quota_that_is_used_up_is_told_as_a_full_disk() {
        let (hub, id) = (Hub::local(), "hf://org/name".parse().unwrap());
        let (cache, client) = (RepoCache::of(Path::new("/cache"), &id), Client::new(&hub.settings, &id));
        let fetch = Fetch { hub: &hub, client, id: &id, cache: &cache, commit: "" };
        let said =
            |code| fetch.not_written(Path::new("/cache/blob"), io::Error::from_raw_os_error(code), 3 * MIB).to_string();
        for code in [rustix::io::Errno::NOSPC, rustix::io::Errno::DQUOT] {
            let message = said(code.raw_os_error());
            assert!(message.contains("3 MiB are to come, /cache/models--org--name has 0 MiB left"), "{message}");
        }
        assert!(said(rustix::io::Errno::IO.raw_os_error()).starts_with("hf://org/name: /cache/blob: "));
    }
}
