//! A Hugging Face directory out of what was trained and the frozen towers.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use blip2_torchx::params::{TensorInfo, TensorSource};
use serde_json::{Value, json};
use tch::Tensor;

use crate::directory::{ModelDir, Part};
use crate::error::WeightsError;
use crate::export_config::{
    ImagePreprocessing, PRODUCER_KEY, copy_present, dtype_name, generation_config, model_config, preprocessor_config,
    unsigned_in, write_json,
};
use crate::export_tokenizer::write_tokenizer;
use crate::frozen_elsewhere::FrozenElsewhere;
use crate::json_file::read_object;
use crate::names::{Stage, check_trained, pretraining_head};
use crate::plans::{language_unused, tied_head, vision_unused};
use crate::save::{in_memory, stored_bytes, write_safetensors};
use crate::staging::{write_directory, write_file};
use crate::weights_dir::{HEADS_FILE, INDEX_FILE, WEIGHTS_FILE};

/// Above this the weights are cut into shards, as `transformers` does.
pub const DEFAULT_MAX_SHARD_BYTES: u64 = 5_000_000_000;

/// The files that a tokenizer may consist of.
pub const TOKENIZER_FILES: [&str; 9] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
];

/// What becomes a Hugging Face directory that `transformers` loads with no key missing and none unexpected (where the image encoder is
/// BLIP-2's own ViT; its classes know no other).
///
/// The frozen towers are streamed from their files in the dtype they have there. Only what the model uses is written: the first
/// `vision_depth` blocks of the image encoder, no second copy of a tied head.
pub struct Export<'a> {
    /// The stage and what it alone has.
    pub task: ExportTask<'a>,
    /// Every parameter of the stage: [`trained_names`](crate::trained_names).
    pub trained: &'a [(String, Tensor)],
    /// Where the frozen image encoder comes from.
    pub vision: &'a ModelDir,
    /// How many of its blocks run before the Q-Former looks.
    pub vision_depth: usize,
    /// The image encoder's table of positions, by our name, brought to images of `image.size` pixels; `None` where that is its own size.
    /// It is written with a copied tower, whose `image_size` is then `image.size`: `transformers` resizes only when it is told to.
    pub positions: Option<&'a (String, Tensor)>,
    /// `qformer_config`, as `Blip2QFormerConfig` has it.
    pub qformer_config: Value,
    /// How many query tokens there are.
    pub num_query_tokens: usize,
    /// How pictures become pixels.
    pub image: ImagePreprocessing,
    /// The directory of the tokenizer's files.
    pub tokenizer: Option<&'a Path>,
    /// The frozen towers: copied, or only named.
    pub towers: Towers<'a>,
    /// Size of a shard at most; [`DEFAULT_MAX_SHARD_BYTES`]. A larger tensor gets a shard of its own.
    pub max_shard_bytes: u64,
}

/// What an export does with the frozen towers.
pub enum Towers<'a> {
    /// Their tensors are written with the trained ones.
    Copied,
    /// Only what was trained is written; readers complete it from these places, of which each has a part of its own.
    Named(&'a [FrozenElsewhere]),
}

/// What each stage adds to an export.
pub enum ExportTask<'a> {
    /// `Blip2ForImageTextRetrieval`, with `temp` and the ITG head in `pretraining_heads.safetensors`.
    Stage1 {
        /// Width of ITC's projections.
        image_text_hidden_size: usize,
        /// `[DEC]`, which starts the ITG text.
        decoder_start_token_id: i64,
    },
    /// `Blip2ForConditionalGeneration`.
    Stage2 {
        /// Where the frozen language model comes from.
        language: &'a ModelDir,
        /// Its configuration as it was trained with. Its `eos_token_id`, by which `transformers` ends a text, becomes that of
        /// `generation_config.json`, by which we do.
        text_config: &'a Value,
        /// Token ids in front of the queries; `None` where they stand as `transformers` has them.
        before_queries: Option<&'a [i64]>,
        /// The id whose places `transformers` fills with the queries; must be below the vocabulary's size.
        image_token_index: Option<i64>,
    },
}

impl Export<'_> {
    /// Writes the directory beside `out`, then puts it there; an earlier export at `out` is replaced.
    ///
    /// # Errors
    /// The trained names are not those of the stage, the towers cannot be read, `out` holds something that is not an export, or the
    /// system refuses to write.
    pub fn write(&self, out: &Path) -> Result<(), WeightsError> {
        may_replace(out)?;
        self.check_trained()?;
        let trained = in_memory(self.trained)?;
        let resized = in_memory(self.resized_positions().map_or(&[], std::slice::from_ref))?;
        let vision = self.vision.part(Part::Vision)?;
        let language = match &self.task {
            ExportTask::Stage1 { .. } => None,
            ExportTask::Stage2 { language, .. } => Some(language.part(Part::Language)?.weights),
        };

        let copied = matches!(self.towers, Towers::Copied);
        let mut all = Union::default();
        all.add(&trained, |name| !pretraining_head(name), true);
        let replaced = |name: &str| resized.contains_key(name);
        all.add(&resized, |_| true, copied);
        let frozen =
            all.add(&vision.weights, |name| !vision_unused(name, self.vision_depth) && !replaced(name), copied);
        let frozen = match (&language, &self.task) {
            (Some(language), ExportTask::Stage2 { text_config, .. }) => {
                let tied = tied_head(text_config);
                all.add(language, |name| !language_unused(name, tied), copied)
            }
            _ => frozen,
        };
        let mut config = model_config(self)?;
        if let Some(dtype) = frozen.and_then(|info| dtype_name(info.kind)) {
            config["dtype"] = json!(dtype);
        }

        write_directory(out, |directory| {
            write_json(&directory.join("config.json"), &config)?;
            write_json(&directory.join("preprocessor_config.json"), &preprocessor_config(&self.image))?;
            let mut image_token = None;
            if let ExportTask::Stage2 { language: model, text_config, image_token_index, .. } = &self.task {
                image_token = *image_token_index;
                let name = "generation_config.json";
                copy_present(model.path(), directory, &[name])?;
                if !directory.join(name).exists() {
                    write_json(&directory.join(name), &generation_config(text_config))?;
                }
                let ends = &config["text_config"]["eos_token_id"];
                let mut generation = read_object(&directory.join(name))?;
                if !ends.is_null() && generation["eos_token_id"] != *ends {
                    generation["eos_token_id"] = ends.clone();
                    write_json(&directory.join(name), &generation)?;
                }
            }
            let image_token_is_named = match self.tokenizer {
                Some(tokenizer) => write_tokenizer(tokenizer, directory, image_token)?,
                None => image_token.is_some(),
            };
            if image_token_is_named {
                let queries = self.num_query_tokens;
                let processor = json!({"processor_class": "Blip2Processor", "num_query_tokens": queries});
                write_json(&directory.join("processor_config.json"), &processor)?;
            }
            write_weights(&all, self.max_shard_bytes, directory)?;
            let heads: Vec<String> = trained.keys().filter(|name| pretraining_head(name)).cloned().collect();
            if !heads.is_empty() {
                write_one(&trained, &heads, &directory.join(HEADS_FILE))?;
            }
            Ok(())
        })
    }

    /// The table of positions that takes the place of the image encoder's own.
    pub(crate) fn resized_positions(&self) -> Option<&(String, Tensor)> {
        self.positions.filter(|_| matches!(self.towers, Towers::Copied))
    }

    fn check_trained(&self) -> Result<(), WeightsError> {
        let stage = match self.task {
            ExportTask::Stage1 { .. } => Stage::One,
            ExportTask::Stage2 { .. } => Stage::Two,
        };
        let origin = Path::new("qformer_config");
        let layers = unsigned_in(origin, &self.qformer_config, "num_hidden_layers")?;
        let frequency = unsigned_in(origin, &self.qformer_config, "cross_attention_frequency")?;
        let given: BTreeSet<String> = self.trained.iter().map(|(name, _)| name.clone()).collect();
        check_trained(stage, layers, frequency, &given)
    }
}

/// Several sources as one, each with the names taken from it.
#[derive(Default)]
struct Union<'a> {
    tensors: BTreeMap<String, (&'a dyn TensorSource, TensorInfo)>,
}

impl<'a> Union<'a> {
    /// Takes what passes the filter if it is `copied`, and returns the largest of those tensors.
    fn add(&mut self, source: &'a dyn TensorSource, takes: impl Fn(&str) -> bool, copied: bool) -> Option<TensorInfo> {
        let taken: Vec<_> = source.entries().into_iter().filter(|(name, _)| takes(name)).collect();
        let largest = taken.iter().map(|(_, info)| info).max_by_key(|info| stored_bytes(info)).cloned();
        let kept = taken.into_iter().filter(|_| copied);
        self.tensors.extend(kept.map(|(name, info)| (name, (source, info))));
        largest
    }
}

impl TensorSource for Union<'_> {
    fn origin(&self) -> String {
        "the exported model".into()
    }

    fn entries(&self) -> Vec<(String, TensorInfo)> {
        self.tensors.iter().map(|(name, (_, info))| (name.clone(), info.clone())).collect()
    }

    fn read(&self, name: &str) -> Result<Tensor, String> {
        let (source, _) = self.tensors.get(name).ok_or("no such tensor")?;
        source.read(name)
    }
}

fn write_weights(source: &Union, max_shard_bytes: u64, directory: &Path) -> Result<(), WeightsError> {
    let mut shards: Vec<Vec<String>> = vec![Vec::new()];
    let (mut shard_bytes, mut total) = (0u64, 0u64);
    for (name, (_, info)) in &source.tensors {
        let bytes = stored_bytes(info);
        if shard_bytes > 0 && shard_bytes + bytes > max_shard_bytes {
            shards.push(Vec::new());
            shard_bytes = 0;
        }
        shards.last_mut().into_iter().for_each(|shard| shard.push(name.clone()));
        shard_bytes += bytes;
        total += bytes;
    }
    if let [all] = shards.as_slice() {
        return write_one(source, all, &directory.join(WEIGHTS_FILE));
    }
    let mut places = BTreeMap::new();
    for (i, names) in shards.iter().enumerate() {
        let shard = format!("model-{:05}-of-{:05}.safetensors", i + 1, shards.len());
        write_one(source, names, &directory.join(&shard))?;
        places.extend(names.iter().map(|name| (name.clone(), shard.clone())));
    }
    write_json(&directory.join(INDEX_FILE), &json!({"metadata": {"total_size": total}, "weight_map": places}))
}

fn write_one(source: &dyn TensorSource, names: &[String], path: &Path) -> Result<(), WeightsError> {
    // transformers refuses a file that does not say which framework's layout it has.
    let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    write_file(path, |file| write_safetensors(source, names, &metadata, file, path))
}

/// An output directory may be new, empty, or an earlier export with no file added to it.
fn may_replace(out: &Path) -> Result<(), WeightsError> {
    let occupied = |reason: String| Err(WeightsError::Occupied { path: out.to_path_buf(), reason });
    if !out.exists() {
        return Ok(());
    }
    if !out.is_dir() {
        return occupied("it is a file".into());
    }
    let unreadable = |source| WeightsError::Read { path: out.to_path_buf(), source };
    let mut names = Vec::new();
    for entry in fs::read_dir(out).map_err(unreadable)? {
        names.push(entry.map_err(unreadable)?.file_name().to_string_lossy().into_owned());
    }
    if names.is_empty() {
        return Ok(());
    }
    names.sort();
    if let Some(foreign) = names.iter().find(|name| !written_by_export(name)) {
        return occupied(format!("it holds {foreign}"));
    }
    match read_object(&out.join("config.json")) {
        Ok(config) if config.get(PRODUCER_KEY).is_some() => Ok(()),
        _ => occupied(format!("its config.json has no {PRODUCER_KEY}")),
    }
}

fn written_by_export(name: &str) -> bool {
    let others = [
        "config.json",
        "preprocessor_config.json",
        "processor_config.json",
        "generation_config.json",
        WEIGHTS_FILE,
        INDEX_FILE,
        HEADS_FILE,
    ];
    let shard = name.starts_with("model-") && name.ends_with(".safetensors");
    shard || others.contains(&name) || TOKENIZER_FILES.contains(&name)
}
