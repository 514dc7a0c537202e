//! What can be wrong with shards and samples, as values that carry the file, the key and what to do about it.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::dataset::filter::Passed;
use crate::image::{DecodeError, EncodeError};
use crate::order::OrderError;
use crate::text::TextError;

/// Why a data set cannot be opened, packed or read on.
#[derive(Debug, Error)]
pub enum DataError {
    /// Several things are wrong; all of them are listed.
    #[error("{} problems with the shards: {}", .0.len(), join(.0))]
    Many(Vec<DataError>),
    /// A shard pattern cannot be parsed.
    #[error("shard pattern \"{pattern}\": {reason}")]
    Pattern {
        /// The pattern as it was given.
        pattern: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A shard pattern matches no file.
    #[error("shard pattern \"{pattern}\" matches no file in {}", .folder.display())]
    NoMatch {
        /// The pattern as it was given.
        pattern: String,
        /// The folder that relative patterns start from.
        folder: PathBuf,
    },
    /// A shard that is named does not exist.
    #[error("shard {} does not exist (from pattern \"{pattern}\")", .path.display())]
    MissingShard {
        /// The file that was expected.
        path: PathBuf,
        /// The pattern that names it.
        pattern: String,
    },
    /// Two patterns name one shard, whose samples would then come twice an epoch.
    #[error("shard {} is named twice; remove one of the patterns", .path.display())]
    DuplicateShard {
        /// The file.
        path: PathBuf,
    },
    /// A file cannot be read or written.
    #[error("{}: {source}{}", .path.display(), way_out(.source))]
    Io {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// A shard of zero bytes.
    #[error("shard {} has zero bytes; fetch it again", .path.display())]
    EmptyShard {
        /// The file.
        path: PathBuf,
    },
    /// A shard that is the text stub Git LFS leaves in place of the file.
    #[error("shard {} is a Git LFS pointer, not the data; run `git lfs pull`", .path.display())]
    GitLfsPointer {
        /// The file.
        path: PathBuf,
    },
    /// A shard that does not begin as a tar archive does.
    #[error("shard {} is not an uncompressed tar archive: {reason}", .path.display())]
    NotATar {
        /// The file.
        path: PathBuf,
        /// What was found instead.
        reason: String,
    },
    /// No place to keep a shard's index.
    #[error("cannot write the index of shard {} to {} ({source}); name a cache folder that is writable", .shard.display(), .path.display())]
    IndexNotWritable {
        /// The shard.
        shard: PathBuf,
        /// Where its index was to go.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// The shards hold no sample with both an image and a caption.
    #[error("no usable sample in {shards} shards ({problems} problems; the first: {first})")]
    NoSamples {
        /// Number of shards.
        shards: usize,
        /// Number of problems found in them.
        problems: usize,
        /// The first of them.
        first: String,
    },
    /// No sample passes the data set's filter.
    #[error("{0}; loosen the filter")]
    NothingPasses(Passed),
    /// Indices or manifests that say of more samples than can be counted.
    #[error(
        "the shards are said to hold more than 2^64 samples: an index or a manifest is damaged; index them anew with `blip2 shards index`"
    )]
    TooManySamples,
    /// The order law's parameters contradict each other.
    #[error(transparent)]
    Order(#[from] OrderError),
    /// The tokenizer failed.
    #[error(transparent)]
    Text(#[from] TextError),
    /// A loader option is out of range or contradicts another.
    #[error("loader option {option}: expected {expected}, got {got}")]
    Option {
        /// Its name.
        option: &'static str,
        /// What it must be.
        expected: String,
        /// What it is.
        got: String,
    },
    /// The stream was bounded and has been read to its end.
    #[error("the stream ends at position {end}")]
    EndOfStream {
        /// The bound.
        end: u64,
    },
    /// Every sample of a window is bad.
    #[error("none of the {samples} samples around stream position {position} can be read; the last: {last}")]
    WindowUnreadable {
        /// The position that needed a sample.
        position: u64,
        /// How many samples its window holds.
        samples: u64,
        /// Shard, key and reason of the last one.
        last: String,
    },
    /// More samples fail than the run allows.
    #[error(
        "{found} of the last {window} samples could not be read, more than max_bad_fraction {max_fraction} allows; the last: {last}"
    )]
    TooManyBad {
        /// Bad samples found.
        found: usize,
        /// Number of samples looked back over.
        window: u64,
        /// The limit.
        max_fraction: f64,
        /// Shard, key and reason of the last one.
        last: String,
    },
    /// A sample index beyond the data set's end.
    #[error("sample {index} is beyond the {len} samples of the data set")]
    OutOfRange {
        /// The index.
        index: u64,
        /// Number of samples.
        len: u64,
    },
    /// A shard's index can no longer be read.
    #[error("index of shard {}: {reason}; delete it and start again", .shard.display())]
    BadIndex {
        /// The shard.
        shard: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A shard is no longer what it was when the set was made.
    #[error("shard {} changed: {reason}; index it anew with `blip2 shards index`, with --rescan where an old index lies beside it", .shard.display())]
    ShardChanged {
        /// The shard.
        shard: PathBuf,
        /// What is different.
        reason: String,
    },
    /// A manifest cannot be used.
    #[error("manifest {}: {reason}; write it anew with `blip2 shards index --manifest`", .manifest.display())]
    Manifest {
        /// The file.
        manifest: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Something that lies elsewhere cannot be reached or used.
    #[error("{location}: {reason}")]
    Remote {
        /// Its URL.
        location: String,
        /// What is wrong.
        reason: String,
    },
    /// The program cannot read what lies elsewhere.
    #[error("{location} is not on this machine, and this program was built without the feature `remote`")]
    NoRemoteFeature {
        /// The URL.
        location: String,
    },
    /// No folder for fetched shards.
    #[error("{location} is not on this machine: a shard cache is needed to fetch it; set data.shard_cache.dir")]
    NoShardCache {
        /// The URL.
        location: String,
    },
    /// The cache's folder cannot be read or written.
    #[error("the shard cache {} cannot be used: {source}{}; mend the folder (data.shard_cache.dir) and go on", .dir.display(), way_out(.source))]
    ShardCache {
        /// Its folder.
        dir: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// The cache cannot hold what is in use at once.
    #[error(
        "the shard cache {} holds {max_bytes} bytes, but {what} can take {needed}; raise data.shard_cache.max_gib, or, for a new run, lower data.loader.window_shards", .dir.display()
    )]
    ShardCacheTooSmall {
        /// Its folder.
        dir: PathBuf,
        /// What it may hold.
        max_bytes: u64,
        /// What is in use at once.
        what: String,
        /// The bytes of that.
        needed: u64,
    },
    /// The decoding threads could not be started.
    #[error("cannot start {threads} decoding threads: {reason}")]
    Threads {
        /// How many.
        threads: usize,
        /// What the pool said.
        reason: String,
    },
    /// A decoding thread went away without an answer.
    #[error("a decoding thread ended without an answer at stream position {position}")]
    LostThread {
        /// The position it was working on.
        position: u64,
    },
    /// What is to be packed cannot be used.
    #[error("{}: {reason}", .path.display())]
    Source {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it, and what to do.
        reason: String,
    },
    /// No row of what is to be packed can be used.
    #[error("nothing to pack: none of {left_out} rows can be used; the first: {first}")]
    NothingToPack {
        /// Rows that were left out.
        left_out: u64,
        /// Place and reason of the first of them.
        first: String,
    },
    /// The folder holds the shards of other arguments or inputs.
    #[error("{} is of another packing ({}); choose an empty folder, or the same arguments to go on", .path.display(), .differences.join("; "))]
    OtherPacking {
        /// The folder's `pack.json`.
        path: PathBuf,
        /// Each difference: there, and now.
        differences: Vec<String>,
    },
    /// The shards in a folder are no longer those that were packed.
    #[error("{}: {reason}; delete the folder's shards and its pack.json, and pack again", .path.display())]
    PackDamaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A folder of cached features is not what it should be.
    #[error("feature cache {}: {reason}", .path.display())]
    FeatureCache {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Another process packs into the folder.
    #[error("another packing is at work in {}", .folder.display())]
    PackLocked {
        /// The folder.
        folder: PathBuf,
    },
    /// What packing or repairing would write is already there.
    #[error("{} already exists; shards are never overwritten: choose an empty folder", .path.display())]
    WouldOverwrite {
        /// What is in the way.
        path: PathBuf,
    },
}

impl DataError {
    /// One error from a non-empty list: itself when it is alone.
    pub(crate) fn from_list(mut errors: Vec<DataError>) -> DataError {
        match errors.len() {
            1 => errors.swap_remove(0),
            _ => DataError::Many(errors),
        }
    }

    /// Whether this machine or its shard cache is at fault, and not a shard: whatever else is read next fails as well.
    pub(crate) fn is_of_this_machine(&self) -> bool {
        match self {
            Self::ShardCache { .. } | Self::ShardCacheTooSmall { .. } | Self::IndexNotWritable { .. } => true,
            Self::Io { source, .. } => is_of_this_machine(source),
            Self::Many(errors) => errors.iter().any(DataError::is_of_this_machine),
            _ => false,
        }
    }

    /// The error of something in the shard cache, whose folder is what a person can do something about.
    pub(crate) fn in_shard_cache(self, dir: &Path) -> DataError {
        match self {
            Self::Io { source, .. } => Self::ShardCache { dir: dir.to_owned(), source },
            error => error,
        }
    }

    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> DataError {
        let path = path.into();
        move |source| DataError::Io { path, source }
    }
}

/// Whether a file cannot be used for want of something that is not the file's: a full disk, too many open files.
fn is_of_this_machine(error: &io::Error) -> bool {
    // ENFILE and EMFILE have no kind.
    is_disk_full(error) || error.kind() == io::ErrorKind::OutOfMemory || matches!(error.raw_os_error(), Some(23 | 24))
}

/// Whether there is no space left on the disk or for this user.
pub fn is_disk_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// What to do about an error of the operating system, where it says enough.
fn way_out(error: &io::Error) -> &'static str {
    if is_disk_full(error) { "; free some space" } else { "" }
}

fn join(errors: &[DataError]) -> String {
    errors.iter().map(DataError::to_string).collect::<Vec<_>>().join("; ")
}

/// Why one sample cannot be used.
#[derive(Debug, Error)]
pub enum SampleError {
    /// Its bytes cannot be read from the shard.
    #[error("cannot read the shard: {0}")]
    Io(#[from] io::Error),
    /// The shard, or its index, is no longer what it was when the set was opened.
    #[error("the shard changed while it was in use: {0}")]
    ShardChanged(String),
    /// This machine cannot read it, whatever the sample is: that is no reason to leave it out.
    #[error(transparent)]
    Machine(Box<DataError>),
    /// Its shard could not be fetched; told once for all of the shard's samples.
    #[error("the shard cannot be fetched: {0}")]
    ShardUnreadable(String),
    /// The sample's index is out of range.
    #[error("no such sample: {0}")]
    NoSuchSample(u64),
    /// A member larger than any image or caption that would be used.
    #[error("its {extension} has {bytes} bytes; at most {max} are read")]
    MemberTooLarge {
        /// What it is.
        extension: &'static str,
        /// Its length.
        bytes: u64,
        /// The longest one that is read.
        max: u64,
    },
    /// The image cannot be decoded.
    #[error("image: {0}")]
    Image(#[from] DecodeError),
    /// The image cannot be encoded again.
    #[error("image: {0}")]
    Encode(#[from] EncodeError),
    /// The caption is not UTF-8.
    #[error("caption is not UTF-8 (byte {0})")]
    CaptionNotUtf8(usize),
    /// The caption's JSON cannot be parsed.
    #[error("caption: not valid JSON: {0}")]
    CaptionNotJson(String),
    /// The caption's JSON has no such text field.
    #[error("caption: the JSON has no text field \"{0}\"")]
    CaptionField(String),
    /// The caption's JSON has no such list of texts.
    #[error("caption: the JSON has no list of texts \"{0}\"")]
    CaptionList(String),
    /// The sample's JSON has no such question.
    #[error("question: the JSON has no text field \"{0}\"")]
    Question(String),
    /// The sample's JSON has no such answers.
    #[error("answers: the JSON has no text, list of texts or list of objects with a text \"answer\" in \"{0}\"")]
    Answers(String),
    /// The data set's captions lie in a member that the sample lacks.
    #[error("the sample has no .{0} member")]
    NoMember(&'static str),
    /// Nothing is left of the caption after cleaning.
    #[error("caption is empty")]
    CaptionEmpty,
    /// The tokenizer refused the caption.
    #[error("caption: {0}")]
    Text(#[from] TextError),
    /// The decoder panicked.
    #[error("the decoder panicked: {0}")]
    Panic(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_want_of_the_machine_is_told_from_a_file_that_is_gone() {
        let of = |code| DataError::io("/shards/0.tar")(io::Error::from_raw_os_error(code));
        // ENOENT, EACCES, EIO; then ENFILE, EMFILE, ENOSPC.
        assert!([2, 13, 5].into_iter().all(|code| !of(code).is_of_this_machine()));
        assert!([23, 24, 28].into_iter().all(|code| of(code).is_of_this_machine()));
        let error = of(5).in_shard_cache(Path::new("/cache"));
        assert!(error.is_of_this_machine() && error.to_string().starts_with("the shard cache /cache cannot be used: "));
    }
}
