//! What can be wrong with a file of weights or a model directory.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::torch_file::TorchFileProblem;

/// Why weights could not be read or written; one line for people.
#[derive(Debug, Error)]
pub enum WeightsError {
    /// Nothing lies there.
    #[error("{}: no such file or directory", path.display())]
    NotFound {
        /// The path asked for.
        path: PathBuf,
    },
    /// A path that should be a file is something else.
    #[error("{}: expected a file", path.display())]
    NotAFile {
        /// The path asked for.
        path: PathBuf,
    },
    /// The system refused to read.
    #[error("{}: cannot be read: {source}", path.display())]
    Read {
        /// The file or directory.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The file could not be mapped into memory.
    #[error("{}: cannot be mapped: {message}", path.display())]
    Map {
        /// The file.
        path: PathBuf,
        /// Why.
        message: String,
    },
    /// The large file was never fetched.
    #[error("{}: a Git LFS pointer instead of the file itself; run `git lfs pull` in its directory", path.display())]
    LfsPointer {
        /// The pointer file.
        path: PathBuf,
    },
    /// The safetensors header is damaged or hostile.
    #[error("{}: not a valid safetensors file: {problem}", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong with its header.
        problem: HeaderProblem,
    },
    /// The file of `torch.save` is damaged, hostile or of another kind.
    #[error("{}: {problem}", path.display())]
    TorchFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: TorchFileProblem,
    },
    /// A file of weights where a directory is expected.
    #[error("{}: a file, but a Hugging Face directory is expected; give the folder that holds it beside config.json", path.display())]
    FileForDirectory {
        /// The file.
        path: PathBuf,
    },
    /// A PyTorch file, whole, that is not of LAVIS.
    #[error("{}: neither a checkpoint of LAVIS (query_tokens, Qformer.bert…) nor its ViT (cls_token, blocks…); of a Hugging Face model give the folder", path.display())]
    NotLavis {
        /// The file.
        path: PathBuf,
    },
    /// A checkpoint in LAVIS' format from which no model can be told.
    #[error("{}: {message}", path.display())]
    Lavis {
        /// The file.
        path: PathBuf,
        /// What is missing or contradicts itself.
        message: String,
    },
    /// A tensor's dtype has no counterpart in libtorch's Rust binding.
    #[error("{}: {name} has dtype {dtype}, which is not supported; store it as F32, F16 or BF16", path.display())]
    Dtype {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Its dtype as the file calls it.
        dtype: String,
    },
    /// A JSON file does not parse.
    #[error("{}: invalid JSON: {message}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// The parser's reason with line and column.
        message: String,
    },
    /// A key of a JSON file is absent or has the wrong type or value.
    #[error("{}: {key}: expected {expected}, got {got}", path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// The key's path inside the file.
        key: String,
        /// What should be there.
        expected: String,
        /// What is there.
        got: String,
    },
    /// A model directory without `config.json`.
    #[error("{}: no config.json; expected a Hugging Face model directory", path.display())]
    NoConfig {
        /// The directory.
        path: PathBuf,
    },
    /// A directory without weights.
    #[error("{}: no model.safetensors, no pytorch_model.bin and no index of either{hint}", path.display())]
    NoWeights {
        /// The directory.
        path: PathBuf,
        /// What lies there instead, if known.
        hint: String,
    },
    /// The index names a shard outside its own directory.
    #[error("{}: shard {shard:?} is not a plain file name", index.display())]
    ShardName {
        /// The index file.
        index: PathBuf,
        /// The name it gives.
        shard: String,
    },
    /// The index names a shard that is not there.
    #[error("{}: shard {shard} is missing; download it again", index.display())]
    ShardMissing {
        /// The index file.
        index: PathBuf,
        /// The shard's file name.
        shard: String,
    },
    /// A shard holds a tensor that the index does not place there.
    #[error("{}: {shard} holds {name}, which the index does not place there; index and shards are of different models", index.display())]
    IndexLacks {
        /// The index file.
        index: PathBuf,
        /// The tensor.
        name: String,
        /// The shard's file name.
        shard: String,
    },
    /// One parameter has two values.
    #[error("{}: {name} appears twice, as {first} and as {second}", path.display())]
    RepeatedTensor {
        /// The directory.
        path: PathBuf,
        /// The parameter.
        name: String,
        /// Where it appears first.
        first: String,
        /// Where it appears again.
        second: String,
    },
    /// A frozen tower that an export names is not there.
    #[error("{}: {key}: {} is not there; it is the {part} that was trained with ({source_name}): fetch it, or write its folder there", path.display(), got.display())]
    FrozenGone {
        /// The export's `config.json`.
        path: PathBuf,
        /// The key that names the tower's folder.
        key: String,
        /// The tower.
        part: &'static str,
        /// The folder.
        got: PathBuf,
        /// What it was trained with.
        source_name: String,
    },
    /// The directory does not hold the part asked for.
    #[error("{}: model_type {model_type:?} has no {part}; supported: {supported}", path.display())]
    NoPart {
        /// The directory.
        path: PathBuf,
        /// The part asked for.
        part: &'static str,
        /// The directory's `model_type`.
        model_type: String,
        /// The `model_type`s that have this part.
        supported: String,
    },
    /// A BERT file whose vocabulary head does not share the word embeddings.
    #[error("{origin}: {name} differs from {tied_to}; the ITG head must be tied to the word embeddings")]
    UntiedHead {
        /// The source.
        origin: String,
        /// The head's tensor.
        name: String,
        /// The tensor that it must equal.
        tied_to: String,
    },
    /// A language model whose head is called tied, and is not.
    #[error(
        "{origin}: {name} differs from {tied_to}, but config.json calls the head tied; write tie_word_embeddings: false there if it is the model's own, else remove it"
    )]
    ForeignHead {
        /// The source.
        origin: String,
        /// The head.
        name: String,
        /// The embedding that it should equal.
        tied_to: String,
    },
    /// A tensor that is looked at before loading cannot be read.
    #[error("{origin}: {name}: {message}")]
    Unreadable {
        /// The source.
        origin: String,
        /// The tensor.
        name: String,
        /// Why.
        message: String,
    },
    /// The system refused to write.
    #[error("{}: cannot be written: {source}", path.display())]
    Write {
        /// The file or directory.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A tensor to be written could not be had.
    #[error("{name}: cannot be stored: {message}")]
    Tensor {
        /// The tensor.
        name: String,
        /// Why.
        message: String,
    },
    /// The trained parameters are not those of the stage.
    #[error("the trained parameters are not those of {stage}: missing [{}], unexpected [{}]", missing.join(", "), unexpected.join(", "))]
    TrainedNames {
        /// The stage to be exported.
        stage: &'static str,
        /// Names that the stage has and the export was not given.
        missing: Vec<String>,
        /// Names that the export was given and the stage does not have.
        unexpected: Vec<String>,
    },
    /// The output directory holds something that an export would destroy.
    #[error("{}: not overwritten, for it is not an export of this program ({reason}); choose another directory", path.display())]
    Occupied {
        /// The output directory.
        path: PathBuf,
        /// What was found.
        reason: String,
    },
}

/// What is wrong with a safetensors header.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum HeaderProblem {
    /// Fewer bytes than the length field.
    #[error("{got} bytes are less than the 8 of its length field; it is truncated")]
    TooShort {
        /// The file's length.
        got: u64,
    },
    /// The length field exceeds the format's limit.
    #[error("its header claims {length} bytes, the limit is {limit}; is it a safetensors file?")]
    TooLarge {
        /// The claimed header length.
        length: u64,
        /// The format's limit.
        limit: u64,
    },
    /// The length field points past the end.
    #[error("its header claims {length} bytes, the file has {available} behind the length field; it is truncated")]
    BeyondFile {
        /// The claimed header length.
        length: u64,
        /// What the file has.
        available: u64,
    },
    /// The header is not text.
    #[error("its header is not UTF-8")]
    NotUtf8,
    /// The header does not parse.
    #[error("its header does not parse: {message}")]
    NotJson {
        /// The parser's reason.
        message: String,
    },
    /// A name appears twice.
    #[error("its header names {name:?} twice")]
    RepeatedName {
        /// The name.
        name: String,
    },
    /// Offsets overlap, leave a gap, or run backwards.
    #[error("the offsets of {name:?} overlap, leave a gap or run backwards")]
    Offsets {
        /// The tensor.
        name: String,
    },
    /// Dtype and shape do not give the number of bytes between the offsets, or overflow.
    #[error("the shape of {name:?} does not fit its bytes: expected {expected}, got {got}")]
    Size {
        /// The tensor.
        name: String,
        /// Bytes by dtype and shape.
        expected: String,
        /// Bytes between the offsets.
        got: u64,
    },
    /// The data are shorter or longer than the header says.
    #[error("its header describes {expected} bytes of data, the file has {got}{}", if got < expected { "; it is truncated" } else { "" })]
    DataLength {
        /// Bytes that the header describes.
        expected: u64,
        /// Bytes behind the header.
        got: u64,
    },
}
