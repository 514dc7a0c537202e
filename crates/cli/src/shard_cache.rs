//! The folder for fetched shards that the environment describes.

use std::env;
use std::path::PathBuf;

/// `blip2/shards` in the user's cache folder; `None` where there is neither `XDG_CACHE_HOME` nor `HOME`.
pub(crate) fn folder() -> Option<PathBuf> {
    let path = |variable: &str| env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = path("XDG_CACHE_HOME").or_else(|| Some(path("HOME")?.join(".cache")))?;
    Some(cache.join("blip2/shards"))
}
