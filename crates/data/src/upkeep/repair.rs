//! Rewrites damaged shards without the samples that cannot be used.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde::Serialize;

use crate::shards::index::IndexedShard;
use crate::shards::location::Location;
use crate::shards::members::{BLOCK, walk};
use crate::shards::scan::scan_file;
use crate::upkeep::verify::{Found, check_all};
use crate::{Clean, DataError, Dataset, VerifyReport, atomic};

/// What an archive ends with.
const END: [u8; 2 * BLOCK as usize] = [0; 2 * BLOCK as usize];

/// What a repair found and wrote.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RepairReport {
    /// What a whole pass over the original found; every problem but those of whole shards is a sample that was dropped.
    pub found: VerifyReport,
    /// The shards, in the order of the data set.
    pub shards: Vec<RepairedShard>,
}

/// What became of a shard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RepairedShard {
    /// Its file name.
    pub shard: String,
    /// How it came into the folder.
    pub outcome: Outcome,
    /// Samples that it holds there.
    pub samples: u64,
}

/// How a shard came into the folder of repaired ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// Nothing is wrong with it: a hard link to the original.
    Linked,
    /// Nothing is wrong with it: a copy, since the folder is on another file system.
    Copied,
    /// Written anew without what cannot be used.
    Rewritten,
    /// No sample was left, so there is no such shard.
    Dropped,
}

/// Reads, decodes and cleans every sample as [`crate::verify`] does, and fills the folder `out` with the set's shards,
/// each with its index: whole ones as hard links, damaged ones written anew with the members of their good samples, byte
/// for byte and in their order. The originals are only read.
///
/// # Errors
/// When two shards have one name, `out` has a shard of such a name already, or a file cannot be read or written.
pub fn repair(
    dataset: &Dataset,
    clean: Clean,
    out: &Path,
    progress: impl Fn(u64, u64) + Sync,
) -> Result<RepairReport, DataError> {
    let mut names = HashSet::new();
    for shard in dataset.shards() {
        let path = out.join(shard.name());
        if !names.insert(shard.name()) {
            let reason = "has the name of another shard of the set; repair the folders one by one".to_owned();
            return Err(DataError::Source { path: shard.location.shown(), reason });
        }
        if path.symlink_metadata().is_ok() {
            return Err(DataError::WouldOverwrite { path });
        }
        if !matches!(shard.location, Location::Local(_)) {
            let reason = "lies elsewhere; fetch the shards and repair the copies".to_owned();
            return Err(DataError::Source { path: shard.location.shown(), reason });
        }
    }
    let Found { failed, report } = check_all(dataset, clean, progress)?;
    let (mut first, mut shards) = (0, Vec::new());
    fs::create_dir_all(out).map_err(DataError::io(out))?;
    for shard in dataset.shards() {
        let Location::Local(original) = &shard.location else { continue };
        let end = first + shard.samples;
        let bad = &failed[failed.partition_point(|&index| index < first)..failed.partition_point(|&index| index < end)];
        let target = out.join(shard.name());
        let samples = shard.samples - bad.len() as u64;
        let outcome = match (bad.is_empty() && shard.problems == 0, samples) {
            (true, _) => pass_on(original, &target)?,
            (false, 0) => Outcome::Dropped,
            (false, _) => {
                let bad: HashSet<usize> = bad.iter().map(|index| (index - first) as usize).collect();
                rewrite(&IndexedShard::open(original, dataset.cache_dir())?, &bad, &target, samples)?;
                Outcome::Rewritten
            }
        };
        if outcome != Outcome::Dropped {
            IndexedShard::open(&target, None)?;
        }
        shards.push(RepairedShard { shard: shard.name(), outcome, samples });
        first = end;
    }
    Ok(RepairReport { found: report, shards })
}

/// A second name for the file, or a copy where the folder is on another file system.
fn pass_on(path: &Path, target: &Path) -> Result<Outcome, DataError> {
    // A link to a symbolic link would break when the folder moves.
    let original = fs::canonicalize(path).map_err(DataError::io(path))?;
    match fs::hard_link(&original, target) {
        Ok(()) => Ok(Outcome::Linked),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            Err(DataError::WouldOverwrite { path: target.to_owned() })
        }
        // Another file system, or one without links.
        Err(_) => {
            let mut file = File::open(path).map_err(DataError::io(path))?;
            let copied = atomic::stage(target, |out| io::copy(&mut file, out)).and_then(|(staged, _)| staged.create());
            copied.map_err(DataError::io(target))?;
            Ok(Outcome::Copied)
        }
    }
}

/// A shard's bytes from a member's first header block to the end of its data; long names have headers in front.
struct Block {
    start: u64,
    end: u64,
    /// The number of the member's sample, where it belongs to one.
    sample: Option<usize>,
    /// Where its data begins.
    data: u64,
}

/// Writes the members of good samples, and those that belong to none, and makes sure that as many samples are found in
/// there as should be.
fn rewrite(shard: &IndexedShard, bad: &HashSet<usize>, target: &Path, samples: u64) -> Result<(), DataError> {
    let index = shard.load()?;
    let good = index.samples.iter().enumerate().filter(|(at, _)| !bad.contains(at));
    let good: HashSet<u64> = good.map(|(_, sample)| sample.image.offset).collect();
    let file = File::open(&shard.path).map_err(DataError::io(&shard.path))?;
    let blocks = blocks(&file).map_err(DataError::io(&shard.path))?;
    let kept: HashSet<usize> =
        blocks.iter().filter(|block| good.contains(&block.data)).filter_map(|block| block.sample).collect();
    let staged = atomic::stage(target, |out| {
        for block in blocks.iter().filter(|block| block.sample.is_none_or(|sample| kept.contains(&sample))) {
            copy_block(&file, block, out)?;
        }
        out.write_all(&END)?;
        out.flush()?;
        // While it has no name, so that nobody takes it for a whole one.
        let found = scan_file(out.get_ref(), target).map_err(io::Error::other)?.samples.len() as u64;
        match found == samples {
            true => Ok(()),
            false => Err(io::Error::other(format!(
                "written anew it would hold {found} samples instead of {samples}; keep {}, in which they can be read",
                shard.path.display()
            ))),
        }
    });
    staged.and_then(|(staged, ())| staged.create()).map_err(DataError::io(target))
}

fn copy_block(file: &File, block: &Block, out: &mut BufWriter<&File>) -> io::Result<()> {
    let mut buffer = vec![0; 1 << 16];
    let mut at = block.start;
    while at < block.end {
        let length = buffer.len().min((block.end - at) as usize);
        file.read_exact_at(&mut buffer[..length], at)?;
        out.write_all(&buffer[..length])?;
        at += length as u64;
    }
    // The padding of a last member may be cut.
    let padding = block.end.next_multiple_of(BLOCK) - block.end;
    out.write_all(&END[..padding as usize])
}

/// The members in front of a cut or a damaged header. The scan has said what is wrong there.
fn blocks(file: &File) -> io::Result<Vec<Block>> {
    let (mut blocks, mut samples, mut open) = (Vec::new(), 0, None);
    walk(file, |member| {
        // As in the scan, a sample goes on behind members that belong to none.
        let sample = member.part().map(|(key, _)| {
            if open.as_deref() != Some(key) {
                open = Some(key.to_owned());
                samples += 1;
            }
            samples
        });
        blocks.push(Block { start: member.start, end: member.end, sample, data: member.data });
    })?;
    Ok(blocks)
}
