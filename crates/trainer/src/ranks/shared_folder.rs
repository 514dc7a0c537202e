//! A run's folder that hosts do not share is found before models load, and not by the first checkpoint that cannot be read.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use super::meeting::draw_name;
use super::{Ranks, share};
use crate::error::Error;
use crate::run::folder::host_name;

/// A network file system may show a new file to other hosts as late as this: NFS keeps what it knows of a folder for a minute.
pub(crate) const SHOWN_WITHIN: Duration = Duration::from_secs(65);
const POLL: Duration = Duration::from_millis(100);

/// Makes sure that all ranks see the folder in which the first one writes.
///
/// # Errors
/// The ranks that do not see within `patience` what the first one has written, on all ranks.
pub(crate) fn check_shared(folder: &Path, patience: Duration, ranks: &dyn Ranks) -> Result<(), Error> {
    if ranks.world() == 1 {
        return Ok(());
    }
    let name = share(ranks, &format!(".shared-{}", draw_name()))?.swap_remove(0);
    let file = folder.join(name);
    if ranks.is_first() {
        fs::write(&file, b"").map_err(|error| Error::file(&file, error))?;
    }
    // It is there now, and stays until everyone has answered.
    ranks.any(false)?;
    let begun = Instant::now();
    let mut seen = file.exists();
    while !seen && begun.elapsed() < patience {
        thread::sleep(POLL);
        seen = file.exists();
    }
    let all: Vec<(bool, String)> = share(ranks, &(seen, host_name()))?;
    if ranks.is_first() {
        // A file that stays is of no harm.
        let _ = fs::remove_file(&file);
    }
    let blind: Vec<String> = all
        .iter()
        .enumerate()
        .filter(|(_, (seen, _))| !seen)
        .map(|(rank, (_, host))| format!("rank {rank} on {host}"))
        .collect();
    if blind.is_empty() {
        return Ok(());
    }
    Err(Error::Mismatch(format!(
        "{}: {} cannot see what rank 0 on {} has written there; run.dir must be a folder that all hosts share",
        folder.display(),
        blind.join(", "),
        all[0].1
    )))
}
