//! What torchrun and its kin say in the environment.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

/// The rank of this process, 0 where nobody launched several.
///
/// # Errors
/// A `RANK` that is no number.
pub(crate) fn rank() -> Result<usize> {
    number("RANK").map(|rank| rank.unwrap_or(0))
}

/// Refuses a launch of several processes.
///
/// # Errors
/// A `WORLD_SIZE` above 1, or that is no number.
pub(crate) fn require_single_process(command: &str) -> Result<()> {
    match number("WORLD_SIZE")? {
        None | Some(1) => Ok(()),
        Some(size) => bail!("{command}: WORLD_SIZE: expected 1, got {size}; start a single process"),
    }
}

/// The path with `{rank}` replaced by the rank.
pub(crate) fn path_of_rank(path: &Path, rank: usize) -> PathBuf {
    match path.to_str() {
        Some(text) => PathBuf::from(text.replace("{rank}", &rank.to_string())),
        None => path.to_path_buf(),
    }
}

fn number(variable: &str) -> Result<Option<usize>> {
    let Some(value) = env::var_os(variable) else { return Ok(None) };
    match value.to_str().and_then(|text| text.parse().ok()) {
        Some(number) => Ok(Some(number)),
        None => bail!("{variable}: expected a number, got {}", value.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rank_has_its_own_file() {
        assert_eq!(path_of_rank(Path::new("a/batch.rank{rank}.st"), 3), Path::new("a/batch.rank3.st"));
        assert_eq!(path_of_rank(Path::new("a/batch.st"), 3), Path::new("a/batch.st"));
    }
}
