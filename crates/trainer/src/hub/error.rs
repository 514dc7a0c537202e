//! What can be wrong with a model on a hub.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

/// Why a model on a hub cannot be used, one line each.
#[derive(Debug, Error)]
#[allow(missing_docs)] // the variants say what their messages say
pub enum HubError {
    #[error("{0}")]
    Id(String),
    #[error(
        "{id}: not in {}, and nothing is fetched offline; unset HF_HUB_OFFLINE, or put the model there on a machine with a network",
        folder.display()
    )]
    Offline { id: String, folder: PathBuf },
    #[error("{id}: not in {}, and this program was built without the feature hub", folder.display())]
    NotBuilt { id: String, folder: PathBuf },
    #[error("{id}: {endpoint} has no such model; check the name, and set HF_TOKEN if it is private")]
    Absent { id: String, endpoint: String },
    #[error("{id}: this model has no revision {revision}")]
    NoRevision { id: String, revision: String },
    #[error(
        "{id}: its owner asks for consent; accept the conditions at {endpoint}/{repo} and set HF_TOKEN to a token of that account"
    )]
    Gated { id: String, endpoint: String, repo: String },
    #[error("{id}: {endpoint} asks for a token; set HF_TOKEN")]
    NeedsToken { id: String, endpoint: String },
    #[error("{id}: {endpoint} refuses the token in HF_TOKEN")]
    TokenRefused { id: String, endpoint: String },
    #[error("{id}: expected {expected} among its files, found neither; it has {found}")]
    NoFile { id: String, expected: &'static str, found: String },
    #[error("{id}: {url}: {message}")]
    Answer { id: String, url: String, message: String },
    #[error("{id}: {url} cannot be reached: {message}; HF_HUB_OFFLINE=1 takes what was fetched before")]
    Unreachable { id: String, url: String, message: String },
    #[error("{id}: {file}: interrupted after {done} of {size} bytes ({message}); the same command goes on from there")]
    Interrupted { id: String, file: String, done: u64, size: u64, message: String },
    #[error("{id}: {file}: expected {size} bytes, got more; what came was thrown away")]
    Size { id: String, file: String, size: u64 },
    #[error("{id}: {file}: expected the sha256 {expected}, got {got}; what came was thrown away, try again")]
    Digest { id: String, file: String, expected: String, got: String },
    #[error("{id}: {file}: got a Git LFS pointer instead of the file; {endpoint} does not serve large files")]
    Pointer { id: String, file: String, endpoint: String },
    #[error(
        "{id}: {needed_mib} MiB are to come, {} has {free_mib} MiB left; free some, or set HF_HOME to a folder on another disk",
        folder.display()
    )]
    DiskFull { id: String, folder: PathBuf, needed_mib: u64, free_mib: u64 },
    #[error("{id}: {}: {source}", path.display())]
    Io { id: String, path: PathBuf, source: io::Error },
}
