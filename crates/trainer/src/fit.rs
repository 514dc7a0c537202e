//! What a path holds beside what a model of its configuration has: by names and shapes, without reading a tensor.

use std::fmt;
use std::path::Path;

use blip2_model::language::LanguageConfig;
use blip2_model::qformer::QFormerConfig;
use blip2_model::vision::VisionConfig;
use blip2_model::{Blip2Config, ConfigError};
use blip2_torchx::params::{LoadPlan, LoadProblem, ParamStore, TensorSource};
use blip2_weights::plans::{self, QFormerSource};
use blip2_weights::{FrozenElsewhere, ModelDir, ModelKind, Part, PartSource, WeightsError};
use serde::Serialize;
use serde_json::json;

use crate::assembly::declared;
use crate::assembly::loading::{IMAGE_ENCODER, LANGUAGE_MODEL, QFORMER};
use crate::error::Error;

/// Counts of one part's tensors.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct PartFit {
    /// `image encoder`, `Q-Former` or `language model`.
    pub part: String,
    /// Would be loaded.
    pub loaded: usize,
    /// Stored in half precision, so cast where it is used in fp32.
    pub half: usize,
    /// Of a frozen part that this path leaves to another directory.
    pub frozen_elsewhere: usize,
    /// Which that is, where it is named.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub named: Option<String>,
    /// Kept at initial values, for this kind of source cannot have them.
    pub fresh: usize,
    /// There, and not used.
    pub dropped: usize,
    /// Needed and not there.
    pub missing: usize,
    /// There, and of no known part.
    pub unexpected: usize,
    /// Of another shape or of no floating-point dtype.
    pub misshapen: usize,
    /// Each of the last three in words.
    pub problems: Vec<String>,
}

/// The parts of a directory or LAVIS file; `None` for what is no model or of a kind that is not known here.
///
/// # Errors
/// A configuration that no code here computes, files that are damaged.
pub fn fit(path: &Path) -> Result<Option<Vec<PartFit>>, Error> {
    let is_model = path.join("config.json").exists() || path.extension().is_some_and(|e| e == "pth" || e == "pt");
    if !is_model {
        return Ok(None);
    }
    let dir = match ModelDir::open(path) {
        // An optimizer's state, or whatever else PyTorch has written: a file of tensors and no model.
        Err(WeightsError::NotLavis { .. }) => return Ok(None),
        opened => opened?,
    };
    let wrong = |source| Error::Model { path: path.into(), source };
    let mut parts = Vec::new();
    match dir.kind() {
        ModelKind::WholeBlip2 => {
            let config = Blip2Config::from_json(dir.corrected_config()?).map_err(wrong)?;
            let depth = config.vision.depth(config.top.vision_feature_layer.or(Some(-1))).map_err(wrong)?;
            parts.push(match dir.frozen_elsewhere(Part::Vision) {
                None => vision(&dir.part(Part::Vision)?, &config.vision, depth),
                Some(named) => elsewhere(IMAGE_ENCODER, &declared::image_encoder(&config.vision, depth), Some(named)),
            });
            let width = config.language.as_ref().map(LanguageConfig::hidden_size);
            let qformer = dir.part(Part::QFormer)?;
            let plan = if width.is_none() { plans::stage1_from_whole(&qformer.weights) } else { LoadPlan::exact() };
            parts.push(trained(&qformer, &config, width, &plan));
            if let Some(model) = &config.language {
                parts.push(match dir.frozen_elsewhere(Part::Language) {
                    None => language(&dir.part(Part::Language)?, model),
                    Some(named) => elsewhere(LANGUAGE_MODEL, &declared::language_model(model), Some(named)),
                });
            }
        }
        ModelKind::LavisCheckpoint => {
            let part = dir.part(Part::QFormer)?;
            let plan = plans::from_lavis(&part.weights, LoadPlan::exact())?;
            let mut json = json!({"qformer_config": part.config, "num_query_tokens": dir.config()["num_query_tokens"]});
            if let Some(width) = dir.config()["image_text_hidden_size"].as_i64() {
                json["image_text_hidden_size"] = json!(width);
            }
            json["vision_config"] =
                json!({"hidden_size": part.config["encoder_hidden_size"], "num_attention_heads": 1});
            let stage1 = QFormerSource::detect(&part.weights) == Some(QFormerSource::Stage1);
            json["architectures"] = json!(["Blip2ForImageTextRetrieval"]);
            let config = Blip2Config::from_json(&json).map_err(wrong)?;
            let width = (!stage1).then(|| projected_width(&part)).flatten();
            parts.push(trained(&part, &config, width, &plan));
        }
        ModelKind::Tower(_) | ModelKind::LavisVit => {
            if let Ok(part) = dir.part(Part::Vision) {
                let config = VisionConfig::from_json(part.config).map_err(wrong)?;
                parts.push(vision(&part, &config, config.num_hidden_layers()));
            } else if let Ok(part) = dir.part(Part::Language) {
                parts.push(language(&part, &LanguageConfig::from_json(part.config).map_err(wrong)?));
            } else if let Ok(part) = dir.part(Part::QFormer) {
                let mut qformer = QFormerConfig::from_json(part.config).map_err(wrong)?;
                qformer.vocab_size += 1; // [DEC]
                let json = json!({
                    "architectures": ["Blip2ForImageTextRetrieval"], "num_query_tokens": 32, "vision_config": {},
                    "qformer_config": qformer,
                });
                let config = Blip2Config::from_json(&json).map_err(wrong)?;
                parts.push(trained(&part, &config, None, &plans::stage1_from_bert(&part.weights)?));
            } else {
                return Err(unknown_type(path, &dir));
            }
        }
    }
    Ok(Some(parts))
}

fn vision(part: &PartSource, config: &VisionConfig, depth: i64) -> PartFit {
    let (store, plan) = (declared::image_encoder(config, depth), plans::vision_tower(depth as usize));
    compare(IMAGE_ENCODER, &store, part, &plan, true)
}

fn language(part: &PartSource, config: &LanguageConfig) -> PartFit {
    let plan = plans::language_model(plans::tied_head(part.config));
    compare(LANGUAGE_MODEL, &declared::language_model(config), part, &plan, true)
}

fn trained(part: &PartSource, config: &Blip2Config, language_width: Option<i64>, plan: &LoadPlan) -> PartFit {
    compare(QFORMER, &declared::trained(config, language_width), part, plan, false)
}

/// Says of a configuration of no known kind which there are.
fn unknown_type(path: &Path, dir: &ModelDir) -> Error {
    let config = dir.config();
    let known = |error: Option<ConfigError>| match error {
        Some(ConfigError::Unsupported { supported, .. }) => supported,
        _ => "",
    };
    let vision = known(VisionConfig::from_json(config).err());
    let language = known(LanguageConfig::from_json(config).err());
    let message = format!(
        "model_type: got {}; known are bert, blip-2, image encoders ({vision}), language models ({language})",
        config["model_type"]
    );
    Error::file(path.join("config.json"), message)
}

/// A frozen part that this path names instead of holding it.
fn elsewhere(name: &str, store: &ParamStore, named: Option<&FrozenElsewhere>) -> PartFit {
    let named = named.map(|FrozenElsewhere { source, path, .. }| {
        let gone = if path.exists() { "" } else { ", which is not there" };
        format!("that of {source}, in {}{gone}", path.display())
    });
    PartFit { part: name.into(), frozen_elsewhere: store.names().len(), named, ..PartFit::default() }
}

fn projected_width(part: &PartSource) -> Option<i64> {
    let entries = part.weights.entries();
    let projection = entries.into_iter().find(|(name, _)| name == "language_projection.weight")?;
    projection.1.shape.first().copied()
}

fn compare(name: &str, store: &ParamStore, part: &PartSource, plan: &LoadPlan, frozen: bool) -> PartFit {
    if frozen && part.weights.entries().is_empty() {
        return elsewhere(name, store, None);
    }
    let mut fit = PartFit { part: name.into(), ..PartFit::default() };
    let audit = store.audit(&part.weights, plan);
    fit.loaded = audit.report.loaded.len();
    fit.half = audit.report.cast.len();
    fit.fresh = audit.report.fresh.len();
    fit.dropped = audit.report.unused.len();
    for problem in &audit.problems {
        match problem {
            LoadProblem::Missing { .. } | LoadProblem::Unreadable { .. } => fit.missing += 1,
            LoadProblem::Unexpected { .. } => fit.unexpected += 1,
            LoadProblem::Shape { .. } | LoadProblem::Kind { .. } => fit.misshapen += 1,
        }
        fit.problems.push(problem.to_string());
    }
    fit
}

/// The parts as a table, with what is wrong below it.
pub struct FitTable<'a>(pub &'a [PartFit]);

impl fmt::Display for FitTable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns = ["loaded", "half", "frozen elsewhere", "fresh", "dropped", "missing", "unexpected", "misshapen"];
        write!(f, "{:14}", "part")?;
        columns.iter().try_for_each(|column| write!(f, "  {column:>6}"))?;
        for fit in self.0 {
            write!(f, "\n{:14}", fit.part)?;
            let counts = [
                fit.loaded,
                fit.half,
                fit.frozen_elsewhere,
                fit.fresh,
                fit.dropped,
                fit.missing,
                fit.unexpected,
                fit.misshapen,
            ];
            for (column, count) in columns.iter().zip(counts) {
                write!(f, "  {count:>width$}", width = column.len().max(6))?;
            }
        }
        for (fit, named) in self.0.iter().filter_map(|fit| Some((fit, fit.named.as_ref()?))) {
            write!(f, "\n  {}: {named}", fit.part)?;
        }
        for problem in self.0.iter().flat_map(|fit| &fit.problems) {
            write!(f, "\n  {problem}")?;
        }
        Ok(())
    }
}
