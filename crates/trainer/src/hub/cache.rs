//! The folder in which Hugging Face's tools keep what they downloaded, shared with them.
//!
//! ```text
//! hub/models--org--name/
//!   blobs/<digest>                    a file's content; <digest>.incomplete while it arrives
//!   snapshots/<commit>/config.json    a link to its blob
//!   refs/main                         the commit that the branch stood at
//!   .no_exist/<commit>/vocab.txt      an empty file: the model has none of this name
//! ```

use std::fs;
#[cfg(feature = "hub")]
use std::io;
use std::path::{Path, PathBuf};

use blip2_weights::{TOKENIZER_FILES, WEIGHT_FILES, read_shard_index};
use hf_hub::{Cache, CacheRepo, Repo, RepoType};

use super::id::{HubId, is_commit};

/// The files that may say how pixels are made.
pub(super) const PREPROCESSING: [&str; 2] = ["preprocessor_config.json", "processor_config.json"];

/// One model's folder. `hf-hub` says where things are in it; what it leaves out (atomic writes, locks, what is absent) is ours.
pub(super) struct RepoCache {
    folder: PathBuf,
    layout: CacheRepo,
}

impl RepoCache {
    /// The folder of a model below the cache's.
    pub fn of(cache: &Path, id: &HubId) -> RepoCache {
        let repo = Repo::with_revision(id.repo.clone(), RepoType::Model, id.revision().to_string());
        let folder = cache.join(repo.folder_name());
        RepoCache { folder, layout: Cache::new(cache.to_path_buf()).repo(repo) }
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    pub fn snapshot(&self, commit: &str) -> PathBuf {
        self.layout.pointer_path(commit)
    }

    #[cfg(feature = "hub")]
    pub fn blob(&self, digest: &str) -> PathBuf {
        self.folder.join("blobs").join(digest)
    }

    /// Where the locks of this model's files are: `.locks/models--org--name` beside the models.
    #[cfg(feature = "hub")]
    fn locks(&self) -> PathBuf {
        let name = self.folder.file_name().unwrap_or_default();
        self.folder.with_file_name(".locks").join(name)
    }

    /// The file that a process holds locked while it fetches a blob.
    #[cfg(feature = "hub")]
    pub fn lock(&self, digest: &str) -> PathBuf {
        self.locks().join(format!("{digest}.lock"))
    }

    #[cfg(feature = "hub")]
    pub fn make_folders(&self, commit: &str) -> io::Result<()> {
        let folders = [self.folder.join("blobs"), self.snapshot(commit), self.locks()];
        folders.iter().try_for_each(fs::create_dir_all)
    }

    /// The commit that a branch or tag stood at when it was last asked for.
    pub fn commit_of(&self, revision: &str) -> Option<String> {
        let text = fs::read_to_string(self.folder.join("refs").join(revision)).ok()?;
        Some(text.trim().to_string()).filter(|commit| is_commit(commit))
    }

    /// Writes down where a branch or tag stands.
    #[cfg(feature = "hub")]
    pub fn remember(&self, revision: &str, commit: &str) -> io::Result<()> {
        let path = self.folder.join("refs").join(revision);
        fs::create_dir_all(path.parent().unwrap_or(&self.folder))?;
        // One writer at a time, whatever the branch: the new file has one name until it takes the old one's place.
        let lock = fs::File::create(self.locks().join("refs.lock"))?;
        lock.lock()?;
        blip2_data::write_file(&path, commit.as_bytes())
    }

    /// Puts a blob into a snapshot under its name.
    #[cfg(feature = "hub")]
    pub fn link(&self, commit: &str, name: &str, digest: &str) -> io::Result<()> {
        let link = self.snapshot(commit).join(name);
        match std::os::unix::fs::symlink(Path::new("../../blobs").join(digest), &link) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            other => other,
        }
    }

    /// Whether it is known of tokenizer and preprocessing that a snapshot has them or that the model has none. A snapshot that other tools have
    /// made may lack them.
    pub fn knows_companions(&self, commit: &str) -> bool {
        let (snapshot, absent) = (self.snapshot(commit), self.absent(commit));
        [PREPROCESSING.as_slice(), &TOKENIZER_FILES].iter().all(|names| {
            names.iter().any(|name| snapshot.join(name).exists()) || names.iter().all(|name| absent.join(name).exists())
        })
    }

    fn absent(&self, commit: &str) -> PathBuf {
        self.folder.join(".no_exist").join(commit)
    }

    /// Writes down which of these files the model does not have.
    #[cfg(feature = "hub")]
    pub fn note_absent<'n>(&self, commit: &str, mut names: impl Iterator<Item = &'n str>) -> io::Result<()> {
        let folder = self.absent(commit);
        fs::create_dir_all(&folder)?;
        names.try_for_each(|name| fs::write(folder.join(name), b""))
    }

    /// The snapshot of a commit where it has a configuration and weights with all their shards.
    pub fn complete_snapshot(&self, commit: &str) -> Option<PathBuf> {
        let snapshot = self.snapshot(commit);
        let has = |name: &str| snapshot.join(name).is_file();
        let weights = WEIGHT_FILES.iter().any(|(single, index)| {
            let shards = || read_shard_index(&snapshot.join(index)).ok();
            has(single) || shards().is_some_and(|shards| shards.keys().all(|shard| has(shard)))
        });
        (weights && has("config.json")).then_some(snapshot)
    }
}
