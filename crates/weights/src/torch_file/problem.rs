//! What can be wrong with a file of `torch.save`.

use thiserror::Error;

/// What is wrong with a PyTorch file.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum TorchFileProblem {
    /// The bytes are of none of the three formats.
    #[error("not a file of torch.save: it begins like neither a zip archive nor a pickle nor a tar archive")]
    Unknown,
    /// The file ends too early.
    #[error("it ends inside {part}; it is truncated")]
    Truncated {
        /// What is incomplete.
        part: String,
    },
    /// The zip or tar archive is damaged.
    #[error("its archive is damaged: {message}")]
    Archive {
        /// How.
        message: String,
    },
    /// An entry needs a password.
    #[error("its entry {entry:?} is encrypted; decrypt the archive first")]
    Encrypted {
        /// The entry.
        entry: String,
    },
    /// An entry is compressed, which `torch.save` never does.
    #[error(
        "its entry {entry:?} is compressed (method {method}); torch.save stores entries as they are, so this file is not its work"
    )]
    Compressed {
        /// The entry.
        entry: String,
        /// Zip's number of the method.
        method: u16,
    },
    /// An archive of compiled code.
    #[error("a TorchScript archive, which holds a program; save the model's state_dict() with torch.save instead")]
    TorchScript,
    /// Numbers of the other byte order.
    #[error("its byte order is {got}; only little-endian files can be read")]
    ByteOrder {
        /// What it says.
        got: String,
    },
    /// The pickle does not follow the protocol.
    #[error("its pickle is damaged at byte {at}: {message}")]
    Pickle {
        /// Position in the pickle.
        at: usize,
        /// How.
        message: String,
    },
    /// The pickle refers to a class or function that a file of tensors does not need.
    #[error(
        "its pickle refers to {name}, which is none of the classes that files of tensors are made of; nothing of it was executed; save state_dict() alone, or as safetensors"
    )]
    Forbidden {
        /// `module.attribute`.
        name: String,
    },
    /// A known function with arguments that it does not take.
    #[error("its pickle calls {name} with {message}")]
    Call {
        /// `module.attribute`.
        name: &'static str,
        /// What is wrong with the arguments.
        message: String,
    },
    /// More than any model needs.
    #[error("its {what} exceed the limit of {limit}")]
    Limit {
        /// What there is too much of.
        what: &'static str,
        /// How much is allowed.
        limit: u64,
    },
    /// A storage that tensors refer to is not there, or not as large as they say.
    #[error("storage {key:?}: {message}")]
    Storage {
        /// The storage's key.
        key: String,
        /// What is wrong.
        message: String,
    },
    /// A tensor that its storage cannot hold.
    #[error("{name}: {message}")]
    Tensor {
        /// The tensor's dotted path.
        name: String,
        /// What is wrong.
        message: String,
    },
    /// A name that appears twice or cannot be printed.
    #[error("the tensor name {name:?} {message}")]
    Name {
        /// The name.
        name: String,
        /// What is wrong with it.
        message: &'static str,
    },
    /// There is nothing to load.
    #[error(
        "it holds no tensors by name; expected a dictionary of tensors, alone or under model, state_dict or module, got {got}"
    )]
    NoTensors {
        /// What is there.
        got: String,
    },
}
