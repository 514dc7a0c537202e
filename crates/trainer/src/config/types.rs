//! Every key of the configuration file, with its type, default and range: the one place where they are listed.
//!
//! One file is one stage of one run. A key without a default must be given; relative paths are relative to the current
//! directory.

use std::path::PathBuf;

pub use super::leaves::{
    Augment, AutoOr, BestMetric, Clean, Contrastive, DeviceChoice, FeatureCache, FeatureFormat, Gelu, GradientExchange,
    JpegSize, LanguageDropout, NegativeSamples, Precision, Prefix, Shape, Stage, TextField, TokenIds, TokenMean,
};
use super::node::Node;
use super::reader::Reader;
pub use super::source::WeightsSource;
pub use super::value::Keyed;
use super::value::{
    ConfigValue, at_least, below_one, field, has_place, not_negative, positive, rule, section, share, template,
};

section! {
    /// A whole configuration file.
    pub struct Config {
        /// The run's folder, seed and device.
        pub run: RunConfig,
        /// What is learned.
        pub task: TaskConfig,
        /// The three parts of the model.
        pub model: ModelConfig,
        /// What is learned from.
        pub data: DataConfig,
        /// AdamW.
        pub optimizer: OptimizerConfig,
        /// How long and in which batches.
        pub schedule: ScheduleConfig,
        /// When checkpoints are written and which are kept.
        pub checkpoint: CheckpointConfig,
        /// How often metrics are logged.
        pub log: LogConfig,
        /// What is measured on `data.val`.
        pub eval: EvalConfig,
    }
}

section! {
    /// The run's folder, seed and device.
    pub struct RunConfig {
        /// Name of the run's folder in `dir`; left out or empty: `stage1` or `stage2`.
        pub name: String = String::new() => rule("a name without / and \\ that does not begin with a dot", |name: &String| {
            !name.contains(['/', '\\', '\0']) && !name.starts_with('.')
        }),
        /// Folder of all runs.
        pub dir: PathBuf = PathBuf::from("runs"),
        /// Decides order, augmentation, dropout and initial values.
        pub seed: u64 = 0,
        /// Where to train.
        pub device: DeviceChoice = DeviceChoice::Auto,
        /// Number format of the arithmetic.
        pub precision: Precision = Precision::Bf16,
        /// How gradients travel between ranks.
        pub gradient_exchange: GradientExchange = GradientExchange::Fp32,
    }
}

section! {
    /// What is learned.
    pub struct TaskConfig {
        /// The pre-training stage.
        pub stage: Stage,
        /// Weights of stage 1's losses.
        pub losses: LossWeights,
        /// Label smoothing of ITC and ITG.
        pub label_smoothing: f64 = 0.1 => below_one(),
        /// Added to every sampling weight of ITM's hard negatives.
        pub itm_weight_floor: f64 = 0.0 => not_negative(),
        /// Longest caption in tokens, special tokens included.
        pub max_text_tokens: usize = 32 => at_least(2),
        /// What token means are over; on one process both are the same.
        pub token_mean: TokenMean = TokenMean::Global,
        /// What stage 1 contrasts where `schedule.micro_batch` cuts the batch: each part by itself, or all of it.
        pub contrastive: Contrastive = Contrastive::MicroBatch,
        /// Among whose samples stage 1 looks for negatives; on one process both are the same.
        pub negatives: NegativeSamples = NegativeSamples::Global,
    }
}

section! {
    /// Weights of stage 1's losses; 0 leaves one out.
    pub struct LossWeights {
        /// Image-text contrast.
        pub itc: f64 = 1.0 => not_negative(),
        /// Image-text matching.
        pub itm: f64 = 1.0 => not_negative(),
        /// Image-grounded text generation.
        pub itg: f64 = 1.0 => not_negative(),
    }
}

section! {
    /// The three parts of the model.
    pub struct ModelConfig {
        /// The frozen image encoder.
        pub vision: VisionConfig,
        /// The trained bridge.
        pub qformer: QFormerConfig,
        /// The frozen language model; stage 2 only.
        pub language: Option<LanguageConfig>,
    }
}

section! {
    /// The frozen image encoder.
    pub struct VisionConfig {
        /// Hugging Face directory of the tower alone or of a whole BLIP-2 model, or LAVIS' `eva_vit_g.pth`, or a hub id.
        pub weights: WeightsSource,
        /// The hidden state that serves as image features: 0 is the embeddings, -1 the last layer's; auto: -1 for BLIP-2's ViT, else -2.
        pub layer: AutoOr<i64> = AutoOr::Auto,
        /// Storage of the frozen weights.
        pub dtype: Precision = Precision::Bf16,
    }
}

section! {
    /// The trained bridge.
    pub struct QFormerConfig {
        /// A BERT directory or hub id, a checkpoint, a run, an export, or a `.pth` of LAVIS.
        pub init: WeightsSource,
        /// Folder of stage 1's tokenizer files; left out: that of `init`.
        pub tokenizer: Option<PathBuf>,
        /// Number of learned queries.
        pub query_tokens: usize = 32 => at_least(1),
        /// Every how many layers there is cross-attention to the image.
        pub cross_attention_frequency: usize = 2 => at_least(1),
        /// Dropout of hidden states and attention.
        pub dropout: f64 = 0.1 => below_one(),
    }
}

section! {
    /// The frozen language model.
    pub struct LanguageConfig {
        /// Hugging Face directory of the language model alone or of a whole BLIP-2 model, or its hub id.
        pub weights: WeightsSource,
        /// Storage of the frozen weights.
        pub dtype: Precision = Precision::Bf16,
        /// Dropout inside the frozen model while training; parity: the rates of its own `config.json`.
        pub dropout: LanguageDropout = LanguageDropout::Rate(0.0),
        /// Which GELU a T5 1.1 or FlanT5 computes.
        pub gelu: Gelu = Gelu::Config,
        /// Text between the queries and the caption; never a target.
        pub prompt: String = String::new(),
        /// What part of the caption is given; split is for encoder-decoders.
        pub prefix: Prefix = Prefix::None,
        /// Tokens in front of the queries of a decoder; auto: `bos_token_id`, none for OPT.
        pub before_queries: AutoOr<TokenIds> = AutoOr::Auto,
    }
}

section! {
    /// What is learned from.
    pub struct DataConfig {
        /// The training sets.
        pub train: Vec<TrainSetConfig> => rule("a list of at least one set", |sets: &Vec<TrainSetConfig>| !sets.is_empty()),
        /// The held-out set; without one nothing is evaluated.
        pub val: Option<ValSetConfig>,
        /// From picture to pixels.
        pub image: ImageConfig,
        /// From caption to tokens.
        pub text: TextConfig,
        /// Into how many streams the training data is cut, so that a host reads its own shards only.
        pub lanes: usize = 1 => at_least(1),
        /// Where the image encoder's output is kept, of training and of held-out pictures.
        pub feature_cache: FeatureCache = FeatureCache::Off,
        /// Augmented views of each image that a folder holds; epoch e trains on view e modulo this.
        pub feature_views: u64 = 1 => at_least(1),
        /// How a folder stores features, int8 with a scale for each token; training and evaluation see the stored values.
        pub feature_format: FeatureFormat = FeatureFormat::Bf16,
        /// What this run's features may take in a folder, in GiB, those of the held-out set before those of the training sets; null: no limit.
        pub feature_max_gib: Option<f64> => rule("null or a number above 0", |gib: &Option<f64>| gib.is_none_or(|gib| gib > 0.0)),
        /// Where shards are kept that lie in object stores or on web servers.
        pub shard_cache: ShardCacheConfig,
        /// How samples are read ahead.
        pub loader: LoaderConfig,
    }
}

section! {
    /// One training set.
    pub struct TrainSetConfig {
        /// Path pattern of tar shards: `*`, `?`, `[...]` and `{00000..00099}`.
        pub shards: String,
        /// How often it is drawn from, relative to the other sets.
        pub weight: f64 = 1.0 => positive(),
        /// What its metrics are called; left out: its place in the list.
        pub name: Option<String>,
        /// Where its captions are.
        pub text: TextField = TextField::Auto,
        /// Where each picture has several captions, of which one is drawn every time; goes before `text`.
        pub captions: Option<CaptionsConfig>,
        /// A text in which {} stands for the caption.
        pub template: Option<String> => template(),
        /// Which samples are learned from.
        pub filter: FilterConfig,
    }
}

section! {
    /// The held-out set.
    pub struct ValSetConfig {
        /// Path pattern of tar shards.
        pub shards: String,
        /// Where its captions are.
        pub text: TextField = TextField::Auto,
        /// Where each picture has several captions, of which the first counts; goes before `text`.
        pub captions: Option<CaptionsConfig>,
        /// A text in which {} stands for the caption.
        pub template: Option<String> => template(),
        /// Which samples are measured on.
        pub filter: FilterConfig,
    }
}

section! {
    /// Several captions a picture.
    pub struct CaptionsConfig {
        /// Field of the `.json` member that holds a list of texts.
        pub field: String,
        /// How many of the first are drawn from; null: all.
        pub top: Option<usize> => rule("null or a whole number of at least 1", |top| *top != Some(0)),
    }
}

section! {
    /// Bounds on what the shards say of a sample; decided once, before the order is made.
    pub struct FilterConfig {
        /// Pixels a row.
        pub width: BoundsConfig,
        /// Rows.
        pub height: BoundsConfig,
        /// Longer side over shorter side.
        pub aspect: BoundsConfig,
        /// Words of the caption as it stands in the shard.
        pub caption_words: BoundsConfig,
        /// Numbers in the `.json` member by their field, as `similarity: {min: 0.3}`.
        pub json: Keyed<BoundsConfig>,
    }
}

section! {
    /// The smallest and the largest value that pass; null: no bound.
    pub struct BoundsConfig {
        /// The smallest.
        pub min: Option<f64>,
        /// The largest.
        pub max: Option<f64>,
    }
}

section! {
    /// From picture to pixels; filter, scale, mean and deviation are the vision tower's.
    pub struct ImageConfig {
        /// Height and width in pixels; auto: the tower's own.
        pub size: AutoOr<usize> = AutoOr::Given(224) => rule("auto or a whole number from 1 to 8192", |size| !matches!(size, AutoOr::Given(0 | 8193..))),
        /// How training images are varied. `crop_flip`: random resized crop and horizontal flip. `none`: the evaluation transform.
        pub augment: Augment = Augment::CropFlip,
        /// How JPEGs are decoded for training. `full`: whole. `reduced`: at a half, quarter or eighth of their sides where the crop keeps twice `size`; faster for large ones, pixels differ a little. Held-out ones are always whole.
        pub jpegs: JpegSize = JpegSize::Full,
    }
}

section! {
    /// From caption to tokens.
    pub struct TextConfig {
        /// How captions are cleaned. `blip`: lower case, few marks, at most 50 words. `none`: case and marks stay.
        pub clean: Clean = Clean::Blip,
    }
}

section! {
    /// Where shards are kept that lie in object stores or on web servers.
    pub struct ShardCacheConfig {
        /// The folder; auto: `blip2/shards` in the user's cache folder.
        pub dir: AutoOr<PathBuf> = AutoOr::Auto,
        /// All shards in it take at most this; room for two windows of every lane is good.
        pub max_gib: f64 = 64.0 => positive(),
        /// Seconds without a new byte after which a shard counts as unreadable.
        pub give_up_s: f64 = 300.0 => positive(),
    }
}

section! {
    /// How samples are read ahead; none of it changes what is trained on but `window_shards`.
    pub struct LoaderConfig {
        /// Decoding threads; auto: as many as there are cores for this process.
        pub threads: AutoOr<usize> = AutoOr::Auto => rule("auto or a whole number of at least 1", |threads| *threads != AutoOr::Given(0)),
        /// Batches read ahead.
        pub prefetch: usize = 4 => at_least(1),
        /// How many shards are shuffled together.
        pub window_shards: usize = 8 => at_least(1),
        /// Share of unreadable samples in the last 10,000 that stops the run.
        pub max_bad_fraction: f64 = 0.01 => share(),
    }
}

/// Of the paper's recipe.
pub(super) const WARMUP_STEPS: u64 = 2000;

section! {
    /// AdamW; all parameters but vectors decay.
    pub struct OptimizerConfig {
        /// Learning rate after warmup.
        pub lr: f64 = 1e-4 => positive(),
        /// Learning rate at the end.
        pub min_lr: f64 = 1e-5 => not_negative(),
        /// Steps of linear warmup.
        pub warmup_steps: u64 = WARMUP_STEPS,
        /// Decay rates of the two moments.
        pub betas: [f64; 2] = [0.9, 0.98] => rule("two numbers from 0 to below 1", |betas: &[f64; 2]| {
            betas.iter().all(|beta| (0.0..1.0).contains(beta))
        }),
        /// Added to the second moment's root.
        pub eps: f64 = 1e-8 => positive(),
        /// Decoupled weight decay.
        pub weight_decay: f64 = 0.05 => not_negative(),
        /// Largest norm of the gradient; 0: no clipping.
        pub clip_norm: f64 = 0.0 => not_negative(),
        /// Learning rate at step 0.
        pub warmup_start_lr: f64 = 1e-6 => not_negative(),
    }
}

section! {
    /// How long and in which batches.
    pub struct ScheduleConfig {
        /// Optimizer steps.
        pub steps: u64 = 250_000 => at_least(1),
        /// Samples of one step over all processes.
        pub global_batch: usize = 1680 => rule("a whole number from 1 to 1048576", |batch| (1..=1 << 20).contains(batch)),
        /// Samples of one forward pass of one process; null: its share of the global batch, no accumulation.
        pub micro_batch: Option<usize> => rule("null or a whole number of at least 1", |batch| *batch != Some(0)),
        /// Course of the learning rate after warmup.
        pub shape: Shape = Shape::Cosine,
    }
}

section! {
    /// When checkpoints are written and which are kept.
    pub struct CheckpointConfig {
        /// Steps between checkpoints.
        pub every: u64 = 1000 => at_least(1),
        /// How many of the newest are kept.
        pub keep: usize = 3 => at_least(1),
        /// The metric whose best checkpoint is kept besides.
        pub best: Option<BestMetric>,
    }
}

section! {
    /// How often metrics are logged.
    pub struct LogConfig {
        /// Steps between records.
        pub every: u64 = 20 => at_least(1),
    }
}

section! {
    /// What is measured on `data.val`, while training and by `blip2 evaluate`.
    pub struct EvalConfig {
        /// Steps between evaluations.
        pub every: u64 = 2000 => at_least(1),
        /// Whether stage 1 measures retrieval recall.
        pub retrieval: bool = true,
        /// How many sample captions are logged.
        pub captions: usize = 8,
        /// Where `blip2 evaluate --task vqa` finds questions, and how it asks them.
        pub vqa: VqaConfig,
    }
}

section! {
    /// Questions about held-out pictures.
    pub struct VqaConfig {
        /// Field of the `.json` member that holds the question.
        pub question: String = "question".to_string() => field(),
        /// Field of the `.json` member that holds people's answers: a text, a list of texts, or a list of objects with a text `answer`.
        pub answers: String = "answers".to_string() => field(),
        /// What the language model reads, with {} in the question's place; auto: `Question: {} Answer:`, of an encoder-decoder
        /// `Question: {} Short answer:` (BLIP-2, section 4.1).
        pub prompt: AutoOr<String> = AutoOr::Auto => rule("auto or a text with {} in it", |prompt: &AutoOr<String>| match prompt {
            AutoOr::Auto => true,
            AutoOr::Given(text) => has_place(text),
        }),
    }
}

impl ImageConfig {
    /// The same for held-out images: not varied, and decoded whole.
    pub fn of_held_out(&self) -> ImageConfig {
        ImageConfig { augment: Augment::None, jpegs: JpegSize::Full, ..self.clone() }
    }
}

impl Config {
    /// Every key that takes a directory of weights.
    pub fn weights_sources(&self) -> impl Iterator<Item = &WeightsSource> {
        let ModelConfig { vision, qformer, language } = &self.model;
        [&vision.weights, &qformer.init].into_iter().chain(language.as_ref().map(|language| &language.weights))
    }

    /// The same, to be located.
    pub(crate) fn weights_sources_mut(&mut self) -> impl Iterator<Item = &mut WeightsSource> {
        let ModelConfig { vision, qformer, language } = &mut self.model;
        [&mut vision.weights, &mut qformer.init]
            .into_iter()
            .chain(language.as_mut().map(|language| &mut language.weights))
    }

    /// The run's folder.
    pub fn run_folder(&self) -> PathBuf {
        self.run.dir.join(&self.run.name)
    }

    /// Samples of one forward pass of one process; at most its share of the global batch is there.
    pub fn micro_batch(&self) -> usize {
        self.schedule.micro_batch.unwrap_or(self.schedule.global_batch)
    }
}
