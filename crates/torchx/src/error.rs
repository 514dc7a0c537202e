//! What can go wrong at the boundary to libtorch.

use std::{fmt, io};

use tch::{Device, Kind};

use crate::device::DeviceChoice;

/// An error of this crate; one line for people.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// libtorch threw an exception.
    #[error("libtorch: {op}: {message}")]
    Torch {
        /// The operation that was asked for.
        op: &'static str,
        /// The first line of the exception's text.
        message: String,
    },
    /// CUDA was asked for by name and is not there.
    #[error(
        "device {requested} was asked for, but libtorch finds no CUDA device; use cpu or auto, or install the CUDA libtorch and a driver for it"
    )]
    NoCuda {
        /// The device that was asked for.
        requested: DeviceChoice,
    },
    /// A CUDA device number beyond those that are there.
    #[error("device cuda:{requested} was asked for, but there are {count} CUDA devices, numbered from 0")]
    NoSuchCudaDevice {
        /// The number that was asked for.
        requested: usize,
        /// How many devices there are.
        count: usize,
    },
    /// A device name that cannot be read.
    #[error("unknown device {given:?}; expected auto, cpu, cuda or cuda:N")]
    UnknownDevice {
        /// The text that was given.
        given: String,
    },
    /// A tensor that does not fit into the bytes of a mapped file.
    #[error("bytes {offset}..{offset}+{len} hold no {kind:?} tensor of shape {shape:?} in a file of {file_len} bytes")]
    TensorOutOfFile {
        /// Where the tensor should begin.
        offset: usize,
        /// How many bytes it should have.
        len: usize,
        /// The length of the file.
        file_len: usize,
        /// The tensor's element type.
        kind: Kind,
        /// The tensor's shape.
        shape: Vec<i64>,
    },
    /// The system refused to read a tensor's bytes.
    #[error("bytes {offset}..{offset}+{len} cannot be read: {source}")]
    Read {
        /// Where the read began.
        offset: usize,
        /// How many bytes were asked for.
        len: usize,
        /// The system's reason.
        source: io::Error,
    },
    /// A tensor whose memory cannot be written from a file.
    #[error("a tensor of shape {shape:?} on {device:?} cannot be read into: expected a contiguous one on the CPU")]
    NotFillable {
        /// Where it lies.
        device: Device,
        /// Its shape.
        shape: Vec<i64>,
    },
    /// No store answered.
    #[error("no store answers at {host}:{port} within {seconds} s: {message}")]
    StoreUnreachable {
        /// The host that was asked.
        host: String,
        /// The port that was asked.
        port: u16,
        /// How long it was tried.
        seconds: f64,
        /// libtorch's words.
        message: String,
    },
    /// A store cannot be served, since another process listens on the port.
    #[error("port {port} is in use: choose another one, or end the program that listens on it")]
    PortInUse {
        /// The port.
        port: u16,
    },
    /// An operation of a store failed, a key that did not come in time included.
    #[error("store at {host}:{port}: {op} {key:?}: {message}")]
    Store {
        /// The store's host.
        host: String,
        /// The store's port.
        port: u16,
        /// What was asked of it.
        op: &'static str,
        /// For which key, with its prefix.
        key: String,
        /// libtorch's words.
        message: String,
    },
    /// The library through which ranks on GPUs speak is missing or another's.
    #[error(
        "NCCL, through which ranks on GPUs speak, cannot be loaded: {message}; scripts/nccl builds {library}, to be put beside the program"
    )]
    NoNccl {
        /// The library that was tried.
        library: String,
        /// The loader's words.
        message: String,
    },
    /// A collective failed: a peer is gone, late, or was asked for something else. The group is of no use any more.
    #[error("rank {rank} of {world}: {op}: {message}")]
    Collective {
        /// The operation.
        op: &'static str,
        /// This process's rank.
        rank: usize,
        /// The number of ranks.
        world: usize,
        /// libtorch's words; they name the peer's address where it is known.
        message: String,
    },
    /// Not all ranks came to a barrier in time.
    #[error("rank {rank} of {world}: barrier: {} within {seconds} s: {message}", absent(missing))]
    Barrier {
        /// This process's rank.
        rank: usize,
        /// The number of ranks.
        world: usize,
        /// How long it was waited.
        seconds: f64,
        /// The ranks that, by the store, had not come when the wait ended.
        missing: Vec<usize>,
        /// libtorch's words.
        message: String,
    },
    /// A backward pass left parameters without a gradient, so that nothing was averaged.
    #[error("parameters {params:?} got no gradient, so the ranks' gradients were not averaged; find_unused allows it")]
    NotReduced {
        /// Their places in the list that the reducer was made from; empty where libtorch did not say.
        params: Vec<usize>,
    },
    /// A saved state that does not fit the object it is loaded into; everything wrong is listed.
    #[error("the saved state does not fit: {}", StateProblem::list(problems))]
    State {
        /// All the problems, in the order of the keys.
        problems: Vec<StateProblem>,
    },
}

fn absent(missing: &[usize]) -> String {
    match missing {
        [] => "not everyone passed".to_owned(),
        [one] => format!("rank {one} did not come"),
        several => {
            let list: Vec<String> = several.iter().map(ToString::to_string).collect();
            format!("ranks {} did not come", list.join(", "))
        }
    }
}

/// One entry of a saved state that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StateProblem {
    /// The state has no such tensor.
    Missing {
        /// The tensor's key.
        key: String,
    },
    /// The tensor has another shape.
    Shape {
        /// The tensor's key.
        key: String,
        /// The shape it should have.
        expected: Vec<i64>,
        /// The shape it has.
        got: Vec<i64>,
    },
}

impl StateProblem {
    fn list(problems: &[StateProblem]) -> String {
        const SHOWN: usize = 5;
        let mut parts: Vec<String> = problems.iter().take(SHOWN).map(ToString::to_string).collect();
        if problems.len() > SHOWN {
            parts.push(format!("and {} more", problems.len() - SHOWN));
        }
        parts.join("; ")
    }
}

impl fmt::Display for StateProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StateProblem::Missing { key } => write!(f, "{key} is missing"),
            StateProblem::Shape { key, expected, got } => {
                write!(f, "{key} has shape {got:?}, expected {expected:?}")
            }
        }
    }
}
