//! A folder of fetched shards, shared by processes of one machine.
//!
//! A file `KEY.tar` is whole; `KEY.part` is being fetched. Whoever fetches holds an exclusive lock on the part file, and
//! whoever uses a whole file a shared one, by the file descriptor: locks end with their process, however it ends.
//! What is locked is not evicted; a part that nobody locks was left by a process that died, and is swept.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::ShardCache;

const WHOLE: &str = "tar";
const PART: &str = "part";
/// Locked by who waits for room.
const ASKED: &str = "asked.lock";
/// Locked by who evicts, or must not see anything evicted.
const ROOM: &str = "room.lock";

/// The folder.
pub(crate) struct Cache {
    pub(crate) dir: PathBuf,
    pub(crate) max_bytes: u64,
}

/// What the folder has for a key.
pub(crate) enum Entry {
    /// The file; as long as it is open it stays.
    Whole(File),
    /// Nothing: it is for the caller to fetch, and others wait.
    Missing(Part),
}

/// A file that is being filled; dropped before it is finished, it is gone.
pub(crate) struct Part {
    pub(crate) file: File,
    path: PathBuf,
    finished: bool,
}

impl Cache {
    /// Makes the folder, and sweeps what died processes left in it.
    pub(crate) fn open(cache: &ShardCache) -> io::Result<Cache> {
        fs::create_dir_all(&cache.dir)?;
        let cache = Cache { dir: cache.dir.clone(), max_bytes: cache.max_bytes };
        for (path, _) in cache.files(PART)? {
            remove_if_unused(&path)?;
        }
        Ok(cache)
    }

    /// The file of a key, or the right to make it. Waits while another fetches it.
    pub(crate) fn get(&self, key: &str) -> io::Result<Entry> {
        let (whole, part) = (self.path(key, WHOLE), self.path(key, PART));
        loop {
            if let Some(file) = existing(File::open(&whole))? {
                file.lock_shared()?;
                // It may have been evicted between the two.
                if is_at(&file, &whole)? {
                    // The time of last use. A file of another user keeps its own, which only makes it go earlier.
                    let _ = file.set_modified(SystemTime::now());
                    return Ok(Entry::Whole(file));
                }
                continue;
            }
            let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&part)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    // Until it is finished or given up. Not for a lock of one's own: by then it may be a whole file that
                    // others use for as long as they like.
                    file.lock_shared()?;
                    continue;
                }
                Err(TryLockError::Error(error)) => return Err(error),
            }
            // It may have been finished or swept between the two.
            if !is_at(&file, &part)? {
                continue;
            }
            let made = Part { file, path: part.clone(), finished: false };
            if !whole.exists() {
                made.file.set_len(0)?;
                return Ok(Entry::Missing(made));
            }
        }
    }

    /// Removes the whole file of a key, if there is one; who has it open reads on.
    pub(crate) fn discard(&self, key: &str) -> io::Result<()> {
        existing(fs::remove_file(self.path(key, WHOLE))).map(|_| ())
    }

    /// Makes room for a part of `bytes` by evicting what was used longest ago; false when what is in use leaves none.
    pub(crate) fn reserve(&self, part: &Part, bytes: u64) -> io::Result<bool> {
        // One at a time, so that two never count on the same room.
        let _turn = locked(&self.dir)?;
        let parts = self.files(PART)?.into_iter().filter(|(path, _)| *path != part.path);
        let mut used: u64 = parts.map(|(_, metadata)| metadata.len()).sum();
        let mut whole = self.files(WHOLE)?;
        used += whole.iter().map(|(_, metadata)| metadata.len()).sum::<u64>();
        whole.sort_by_key(|(path, metadata)| (metadata.modified().ok(), path.clone()));
        for (path, metadata) in whole {
            if used.saturating_add(bytes) <= self.max_bytes {
                break;
            }
            if remove_if_unused(&path)? {
                used -= metadata.len();
            }
        }
        if used.saturating_add(bytes) > self.max_bytes {
            return Ok(false);
        }
        // Others see its whole length from now on.
        part.file.set_len(bytes)?;
        Ok(true)
    }

    /// Tells all who use the folder that somebody waits for room, as long as the file is open; `None` where another tells
    /// so already, or somebody is just looking.
    pub(crate) fn ask(&self) -> io::Result<Option<File>> {
        let file = OpenOptions::new().write(true).create(true).truncate(false).open(self.dir.join(ASKED))?;
        match file.try_lock() {
            Ok(()) => Ok(Some(file)),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    fn path(&self, key: &str, kind: &str) -> PathBuf {
        self.dir.join(format!("{key}.{kind}"))
    }

    /// The files of a kind that are there.
    fn files(&self, kind: &str) -> io::Result<Vec<(PathBuf, fs::Metadata)>> {
        let mut files = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let path = entry?.path();
            // Others may remove it meanwhile.
            if path.extension() == Some(OsStr::new(kind))
                && let Some(metadata) = existing(fs::metadata(&path))?
            {
                files.push((path, metadata));
            }
        }
        Ok(files)
    }
}

impl Part {
    /// Makes it a whole file, safely on disk, and opens that; as long as it is open it stays.
    pub(crate) fn finish(mut self) -> io::Result<File> {
        self.file.sync_all()?;
        let (whole, folder) = (self.path.with_extension(WHOLE), self.path.parent().unwrap_or(Path::new(".")));
        // Between its two locks, of who fills it and of who uses it, it would be fair game.
        let _turn = locked(folder)?;
        fs::rename(&self.path, &whole)?;
        self.finished = true;
        File::open(folder)?.sync_all()?;
        self.file.unlock()?;
        let file = File::open(&whole)?;
        file.lock_shared()?;
        Ok(file)
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        if !self.finished {
            // Under its lock; where it cannot be removed, the next sweep tries again.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Nothing is evicted as long as the file is open.
fn locked(dir: &Path) -> io::Result<File> {
    let file = File::create(dir.join(ROOM))?;
    file.lock()?;
    Ok(file)
}

/// Whether somebody waits for room in a folder.
pub(crate) fn is_asked(dir: &Path) -> bool {
    let file = File::open(dir.join(ASKED));
    file.is_ok_and(|file| matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock)))
}

/// Removes a file that nobody has locked.
fn remove_if_unused(path: &Path) -> io::Result<bool> {
    let Some(file) = existing(OpenOptions::new().read(true).write(true).open(path))? else {
        return Ok(true);
    };
    match file.try_lock() {
        Ok(()) if is_at(&file, path)? => fs::remove_file(path).map(|()| true),
        Ok(()) => Ok(true),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// Whether a path still leads to an open file.
fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let open = file.metadata()?;
    let there = existing(fs::metadata(path))?;
    Ok(there.is_some_and(|there| (there.dev(), there.ino()) == (open.dev(), open.ino())))
}

fn existing<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    fn cache(dir: &Path, max_bytes: u64) -> Cache {
        Cache::open(&ShardCache { dir: dir.to_owned(), max_bytes }).unwrap()
    }

    fn make(cache: &Cache, key: &str, bytes: u64) -> bool {
        let Entry::Missing(part) = cache.get(key).unwrap() else { panic!("{key} is there") };
        let made = cache.reserve(&part, bytes).unwrap();
        if made {
            part.finish().unwrap();
        }
        made
    }

    fn open(cache: &Cache, key: &str) -> Option<File> {
        match cache.get(key).unwrap() {
            Entry::Whole(file) => Some(file),
            Entry::Missing(_) => None,
        }
    }

    fn names(dir: &Path) -> Vec<String> {
        let names = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<String> = names.filter(|name| name != ROOM).collect();
        names.sort();
        names
    }

    #[test]
    fn what_was_used_longest_ago_goes_first_and_what_is_open_stays() {
        let dir = tempfile::tempdir().unwrap();
        let cache = cache(dir.path(), 30);
        for key in ["a", "b", "c"] {
            assert!(make(&cache, key, 10));
            std::thread::sleep(Duration::from_millis(5));
        }
        drop(open(&cache, "a").unwrap());
        let b = open(&cache, "b").unwrap();
        assert!(make(&cache, "d", 10));
        assert_eq!(names(dir.path()), ["a.tar", "b.tar", "d.tar"]);
        // b was used before d, and is open.
        assert!(make(&cache, "e", 20));
        assert_eq!(names(dir.path()), ["b.tar", "e.tar"]);
        let e = open(&cache, "e").unwrap();
        assert!(!make(&cache, "f", 10));
        drop((b, e));
        assert!(make(&cache, "f", 30));
        assert_eq!(names(dir.path()), ["f.tar"]);
        assert!(!make(&cache, "g", 31));
    }

    #[test]
    fn what_was_just_fetched_is_not_evicted_before_it_is_used() {
        let dir = tempfile::tempdir().unwrap();
        let cache = cache(dir.path(), 10);
        std::thread::scope(|scope| {
            for thread in 0..2 {
                let cache = &cache;
                scope.spawn(move || {
                    for round in 0..300 {
                        let key = format!("{thread}-{round}");
                        let Entry::Missing(part) = cache.get(&key).unwrap() else { panic!("{key} is there") };
                        while !cache.reserve(&part, 10).unwrap() {
                            std::thread::yield_now();
                        }
                        let file = part.finish().unwrap();
                        assert!(is_at(&file, &cache.path(&key, WHOLE)).unwrap(), "{key} is gone");
                    }
                });
            }
        });
    }

    #[test]
    fn a_part_counts_from_its_reservation_on_and_goes_when_it_fails() {
        let dir = tempfile::tempdir().unwrap();
        let cache = cache(dir.path(), 30);
        let Entry::Missing(part) = cache.get("a").unwrap() else { panic!() };
        assert!(cache.reserve(&part, 20).unwrap());
        assert!(!make(&cache, "b", 20));
        drop(part);
        assert!(names(dir.path()).is_empty());
        assert!(make(&cache, "b", 20));
    }

    #[test]
    fn parts_of_dead_processes_are_swept_and_those_of_the_living_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let living = cache(dir.path(), 30);
        let Entry::Missing(part) = living.get("alive").unwrap() else { panic!() };
        fs::write(dir.path().join("dead.part"), "half").unwrap();
        fs::write(dir.path().join("note.txt"), "not ours").unwrap();
        cache(dir.path(), 30);
        assert_eq!(names(dir.path()), ["alive.part", "note.txt"]);
        drop(part);
    }

    #[test]
    fn who_asks_for_room_is_heard_until_the_answer() {
        let dir = tempfile::tempdir().unwrap();
        let cache = cache(dir.path(), 30);
        assert!(!is_asked(dir.path()));
        let asking = cache.ask().unwrap().unwrap();
        assert!(is_asked(dir.path()) && cache.ask().unwrap().is_none());
        drop(asking);
        assert!(!is_asked(dir.path()) && cache.ask().unwrap().is_some());
    }

    #[test]
    fn who_waits_for_a_file_does_not_wait_for_those_who_use_it() {
        let dir = tempfile::tempdir().unwrap();
        for round in 0..100 {
            let (cache, key) = (cache(dir.path(), 10_000), format!("{round}"));
            let Entry::Missing(part) = cache.get(&key).unwrap() else { panic!() };
            assert!(cache.reserve(&part, 10).unwrap());
            let (tell, told) = std::sync::mpsc::channel();
            std::thread::scope(|scope| {
                for _ in 0..3 {
                    let (tell, cache, key) = (tell.clone(), &cache, &key);
                    scope.spawn(move || {
                        // Each sends its file on, so that it stays in use.
                        let Entry::Whole(file) = cache.get(key).unwrap() else { panic!() };
                        tell.send(file).unwrap();
                    });
                }
                std::thread::sleep(Duration::from_millis(2));
                part.finish().unwrap();
                let files: Vec<File> = (0..3).map_while(|_| told.recv_timeout(Duration::from_secs(20)).ok()).collect();
                assert_eq!(files.len(), 3, "round {round}: a waiter still waits");
            });
        }
    }

    #[test]
    fn of_many_who_want_a_file_one_fetches_it() {
        let dir = tempfile::tempdir().unwrap();
        let fetched = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..16 {
                scope.spawn(|| {
                    let cache = cache(dir.path(), 1000);
                    for key in ["x", "y", "z"] {
                        loop {
                            match cache.get(key).unwrap() {
                                Entry::Whole(file) => break assert_eq!(file.metadata().unwrap().len(), 10),
                                Entry::Missing(part) => {
                                    assert!(cache.reserve(&part, 10).unwrap());
                                    std::thread::sleep(Duration::from_millis(20));
                                    fetched.fetch_add(1, Ordering::Relaxed);
                                    part.finish().unwrap();
                                }
                            }
                        }
                    }
                });
            }
        });
        assert_eq!(fetched.into_inner(), 3);
    }
}
