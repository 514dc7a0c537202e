//! What stands for the network in a build without the feature `remote`: nothing, and the error that says so.

use std::fs::File;
use std::path::{Path, PathBuf};

use rayon::ThreadPool;

use super::{CacheUse, Object, RemoteOptions};
use crate::DataError;
use crate::shards::location::RemoteUrl;
use crate::shards::scan::Problem;
use crate::shards::shard::{Indices, Shard};

/// Never made.
pub(crate) enum Remote {}

impl Remote {
    pub(crate) fn start(_: &RemoteOptions, wanted_by: &str) -> Result<Remote, DataError> {
        Err(DataError::NoRemoteFeature { location: wanted_by.to_owned() })
    }

    pub(crate) fn kept_manifest(&self, _: &[String], _: &Path) -> Option<PathBuf> {
        match *self {}
    }

    pub(crate) fn pool(&self) -> Result<ThreadPool, DataError> {
        match *self {}
    }

    pub(crate) fn list(&self, _: &RemoteUrl) -> Result<Vec<Object>, DataError> {
        match *self {}
    }

    pub(crate) fn read(&self, _: &RemoteUrl) -> Result<Vec<u8>, DataError> {
        match *self {}
    }

    pub(crate) fn write(&self, _: &RemoteUrl, _: Vec<u8>) -> Result<(), DataError> {
        match *self {}
    }

    pub(crate) fn lock(&self, _: &Path) -> Result<File, DataError> {
        match *self {}
    }

    pub(crate) fn index(&self, _: &Object, _: Indices) -> Result<(Shard, Vec<Problem>), DataError> {
        match *self {}
    }

    pub(crate) fn open(&self, _: &Shard) -> Result<(File, bool), DataError> {
        match *self {}
    }

    pub(crate) fn discard(&self, _: &Shard) -> Result<(), DataError> {
        match *self {}
    }

    pub(crate) fn changed(&self, _: &RemoteUrl, _: &str) -> DataError {
        match *self {}
    }

    pub(crate) fn close_idle_with(&self, _: impl Fn() -> bool + Send + Sync + 'static) {
        match *self {}
    }

    pub(crate) fn claim(&self, _: u64) -> u64 {
        match *self {}
    }

    pub(crate) fn usage(&self) -> CacheUse {
        match *self {}
    }

    pub(crate) fn prefetch(&self, _: Vec<Shard>) {
        match *self {}
    }

    pub(crate) fn capacity(&self) -> (&Path, u64) {
        match *self {}
    }
}
