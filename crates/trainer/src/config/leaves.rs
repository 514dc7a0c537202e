//! The values of single keys that are neither numbers, texts nor plain choices.

use std::fmt;
use std::path::PathBuf;

pub use blip2_data::feature_store::FeatureFormat;
pub use blip2_data::{Augment, Clean, JpegSize};
pub use blip2_torchx::device::DeviceChoice;

use super::node::Node;
use super::value::{Leaf, choice, words};

choice! {
    /// Number format of activations (`run.precision`) or of a frozen tower's weights (`dtype`).
    pub enum Precision {
        /// 32-bit floats.
        Fp32 = "fp32",
        /// bfloat16.
        Bf16 = "bf16",
        /// IEEE half precision; as `run.precision` with dynamic loss scaling.
        Fp16 = "fp16",
    }
}

choice! {
    /// What the mean over caption tokens is taken over.
    pub enum TokenMean {
        /// All labelled tokens of the global batch.
        Global = "global",
        /// The mean of each rank's mean, as in LAVIS.
        Rank = "rank",
    }
}

choice! {
    /// Among whose samples stage 1 looks for negatives.
    pub enum NegativeSamples {
        /// Those of all ranks.
        Global = "global",
        /// Those of the own rank.
        Local = "local",
    }
}

choice! {
    /// What ITC contrasts and ITM draws negatives from, where a batch is computed in parts.
    pub enum Contrastive {
        /// The samples of a micro-batch.
        MicroBatch = "micro_batch",
        /// Those of the global batch, with its exact gradient, for a second forward pass (GradCache).
        Cached = "cached",
    }
}

choice! {
    /// How gradients are added up, over the micro-batches of a rank and over ranks.
    pub enum GradientExchange {
        /// Without rounding between them: who computed which micro-batch does not show.
        Exact = "exact",
        /// As they are.
        Fp32 = "fp32",
        /// Rounded to bfloat16: half the bytes.
        Bf16 = "bf16",
    }
}

// What the data crate names itself.
words!(Augment, FeatureFormat, Clean, JpegSize);

choice! {
    /// What part of a caption stage 2 gives to the language model.
    pub enum Prefix {
        /// None of it: the whole caption is the target.
        None = "none",
        /// A random first part is given, the rest is the target (BLIP-2, section 3.3).
        Split = "split",
    }
}

choice! {
    /// Which GELU a language model with T5's approximated one computes.
    pub enum Gelu {
        /// The one that its `config.json` names.
        Config = "config",
        /// GELU by its definition, as in LAVIS.
        Exact = "exact",
    }
}

choice! {
    /// Course of the learning rate after warmup.
    pub enum Shape {
        /// Half a cosine down to `optimizer.min_lr`.
        Cosine = "cosine",
    }
}

choice! {
    /// The held-out metric by which the best checkpoint is kept.
    pub enum BestMetric {
        /// Mean of both directions' recall at 1.
        RetrievalR1 = "retrieval_r1",
        /// Mean of both directions' recall at 5.
        RetrievalR5 = "retrieval_r5",
        /// Mean of both directions' recall at 10.
        RetrievalR10 = "retrieval_r10",
        /// The weighted loss on `data.val`; lower is better.
        ValLoss = "val_loss",
    }
}

impl BestMetric {
    /// Whether it is computed by retrieval, which only stage 1 has.
    pub(crate) fn is_retrieval(self) -> bool {
        self != Self::ValLoss
    }

    /// Whether `value` is better than `other`.
    pub(crate) fn prefers(self, value: f64, other: f64) -> bool {
        if self.is_retrieval() { value > other } else { value < other }
    }
}

/// The two pre-training stages (BLIP-2, sections 3.2 and 3.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Representation learning with the frozen image encoder: ITC, ITM, ITG.
    One,
    /// Generative learning through the frozen language model.
    Two,
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if *self == Self::One { "1" } else { "2" })
    }
}

impl Leaf for Stage {
    fn expected() -> String {
        "1 | 2".into()
    }

    fn read(node: &Node) -> Option<Self> {
        match node {
            Node::Int(1) => Some(Self::One),
            Node::Int(2) => Some(Self::Two),
            _ => None,
        }
    }

    fn encode(&self) -> Node {
        Node::Int(if *self == Self::One { 1 } else { 2 })
    }

    fn fallback() -> Self {
        Self::One
    }
}

impl Leaf for DeviceChoice {
    fn expected() -> String {
        "auto | cpu | cuda | cuda:N".into()
    }

    fn read(node: &Node) -> Option<Self> {
        let Node::Text(text) = node else { return None };
        text.parse().ok()
    }

    fn encode(&self) -> Node {
        Node::Text(self.to_string())
    }

    fn fallback() -> Self {
        Self::Auto
    }
}

/// Dropout inside the frozen language model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum LanguageDropout {
    /// This rate wherever the model drops; 0: nowhere.
    Rate(f64),
    /// The rates of the model's own configuration, as LAVIS trains.
    Parity,
}

impl fmt::Display for LanguageDropout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rate(rate) => write!(f, "{rate}"),
            Self::Parity => f.write_str("parity"),
        }
    }
}

impl Leaf for LanguageDropout {
    fn expected() -> String {
        "a number from 0 to below 1, or parity".into()
    }

    fn read(node: &Node) -> Option<Self> {
        match node {
            Node::Text(text) if text == "parity" => Some(Self::Parity),
            other => f64::read(other).filter(|rate| (0.0..1.0).contains(rate)).map(Self::Rate),
        }
    }

    fn encode(&self) -> Node {
        match self {
            Self::Rate(rate) => Leaf::encode(rate),
            Self::Parity => Node::Text("parity".into()),
        }
    }

    fn fallback() -> Self {
        Self::Rate(0.0)
    }
}

/// Where the frozen image encoder's output is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FeatureCache {
    /// Nowhere: the encoder runs in every step.
    Off,
    /// In memory; for an unaugmented set that fits.
    Memory,
    /// In a folder.
    Directory(PathBuf),
}

impl Leaf for FeatureCache {
    fn expected() -> String {
        "off | memory | a folder".into()
    }

    fn read(node: &Node) -> Option<Self> {
        match node {
            Node::Text(text) if text == "off" => Some(Self::Off),
            Node::Text(text) if text == "memory" => Some(Self::Memory),
            other => PathBuf::read(other).map(Self::Directory),
        }
    }

    fn encode(&self) -> Node {
        match self {
            Self::Off => Node::Text("off".into()),
            Self::Memory => Node::Text("memory".into()),
            Self::Directory(path) => Leaf::encode(path),
        }
    }

    fn fallback() -> Self {
        Self::Off
    }
}

/// A value that the program chooses unless it is given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AutoOr<T> {
    /// `auto` in the file.
    Auto,
    /// The value in the file.
    Given(T),
}

impl<T: Leaf> Leaf for AutoOr<T> {
    fn expected() -> String {
        format!("auto or {}", T::expected())
    }

    fn read(node: &Node) -> Option<Self> {
        match node {
            Node::Text(text) if text == "auto" => Some(Self::Auto),
            other => T::read(other).map(Self::Given),
        }
    }

    fn encode(&self) -> Node {
        match self {
            Self::Auto => Node::Text("auto".into()),
            Self::Given(value) => value.encode(),
        }
    }

    fn fallback() -> Self {
        Self::Auto
    }
}

/// Where a data set's captions are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TextField {
    /// The `.txt` member, where there is none the field `caption` of the `.json` member.
    Auto,
    /// The `.txt` member.
    Txt,
    /// A field of the `.json` member; dots lead into objects.
    Json(String),
}

impl Leaf for TextField {
    fn expected() -> String {
        "auto | txt | json.FIELD".into()
    }

    fn read(node: &Node) -> Option<Self> {
        let Node::Text(text) = node else { return None };
        match text.as_str() {
            "auto" => Some(Self::Auto),
            "txt" => Some(Self::Txt),
            other => other.strip_prefix("json.").filter(|field| !field.is_empty()).map(|f| Self::Json(f.into())),
        }
    }

    fn encode(&self) -> Node {
        match self {
            Self::Auto => Node::Text("auto".into()),
            Self::Txt => Node::Text("txt".into()),
            Self::Json(field) => Node::Text(format!("json.{field}")),
        }
    }

    fn fallback() -> Self {
        Self::Auto
    }
}

/// Token ids of the language model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenIds(pub Vec<u64>);

impl Leaf for TokenIds {
    fn expected() -> String {
        "a list of token ids".into()
    }

    fn read(node: &Node) -> Option<Self> {
        match node {
            Node::List(items) => items.iter().map(u64::read).collect::<Option<_>>().map(Self),
            _ => None,
        }
    }

    fn encode(&self) -> Node {
        Node::List(self.0.iter().map(Leaf::encode).collect())
    }

    fn fallback() -> Self {
        Self(Vec::new())
    }
}
