//! What the Q-Former starts from.

use std::path::{Path, PathBuf};

use blip2_model::qformer::QFormerConfig;
use blip2_model::vision::VisionConfig;
use blip2_torchx::params::LoadPlan;
use blip2_weights::plans::{self, QFormerSource};
use blip2_weights::{ModelDir, ModelKind, Part, PartView};

use crate::assembly::stage1_text::stage1_text;
use crate::checkpoint::{Checkpoint, CheckpointStore, Rejected};
use crate::config::{Config, QFormerConfig as QFormerKeys, Stage};
use crate::data::text::TextFrame;
use crate::error::{Error, Mistakes};
use crate::run::folder::RunFolder;

/// Width of ITC's embeddings (BLIP-2, section 3.2).
const IMAGE_TEXT_HIDDEN_SIZE: i64 = 256;

/// A source of the Q-Former's first weights, with its tokenizer.
pub struct QFormerInit {
    /// The directory or file that is read.
    pub path: PathBuf,
    /// The same, opened.
    pub dir: ModelDir,
    /// What it holds.
    pub kind: QFormerSource,
    /// The folder of the tokenizer's files.
    pub tokenizer: PathBuf,
    /// Newer checkpoints of the run that are damaged.
    pub rejected: Vec<Rejected>,
    /// The run that it is, where that has not come to its end.
    unfinished: Option<PathBuf>,
}

impl QFormerInit {
    /// A BERT directory, an export, a checkpoint, a `.pth` of LAVIS, or a run, of which the newest checkpoint is taken.
    ///
    /// # Errors
    /// Files that are missing or damaged, a run without a checkpoint, tensors of something else.
    pub fn open(config: &QFormerKeys) -> Result<QFormerInit, Error> {
        let path: &Path = &config.init;
        let parent = path.parent().unwrap_or(path).to_path_buf();
        let (folder, tokenizer, rejected) = if path.join("config.yaml").exists() {
            let newest = CheckpointStore::read_only(&path.join("checkpoints"), None).newest()?;
            let (checkpoint, rejected) = newest.or_none_of(path)?;
            (checkpoint.path().to_path_buf(), path.join("tokenizer"), rejected)
        } else if path.join("MANIFEST.json").exists() {
            Checkpoint::open(path)?;
            // runs/NAME/checkpoints/step_N; `.` and `..` hide the folders above.
            let whole = path.canonicalize().map_err(|error| Error::file(path, error))?;
            (path.to_path_buf(), whole.ancestors().nth(2).unwrap_or(path).join("tokenizer"), Vec::new())
        } else if path.is_file() {
            (path.to_path_buf(), parent, Vec::new())
        } else {
            (path.to_path_buf(), path.to_path_buf(), Vec::new())
        };
        let unfinished = RunFolder::is_unfinished(path).then(|| path.to_path_buf());
        let tokenizer = config.tokenizer.clone().unwrap_or(tokenizer);
        let dir = ModelDir::open(&folder)?;
        let kind = QFormerSource::detect(&dir.part(Part::QFormer)?.weights)
            .ok_or_else(|| Error::file(&folder, "expected a BERT's or a Q-Former's tensors; found neither"))?;
        Ok(QFormerInit { path: folder, dir, kind, tokenizer, rejected, unfinished })
    }

    /// What `stage` takes of the source.
    ///
    /// # Errors
    /// A source that the stage cannot begin from; a BERT whose head is not tied.
    pub fn plan(&self, stage: Stage, source: &PartView) -> Result<LoadPlan, Error> {
        let refused = |expected: &str, got: &str| {
            Err(Error::key("model.qformer.init", expected, format!("{got} ({})", self.path.display()), ""))
        };
        let plan = match (stage, self.kind) {
            (Stage::One, QFormerSource::Bert) => plans::stage1_from_bert(source)?,
            (Stage::Two, QFormerSource::Stage1) => plans::stage2_from_stage1(),
            (Stage::One, QFormerSource::Stage1) if self.dir.kind() == &ModelKind::WholeBlip2 => {
                plans::stage1_from_whole(source)
            }
            (Stage::One, QFormerSource::Stage1) | (Stage::Two, QFormerSource::Stage2) => LoadPlan::exact(),
            (Stage::One, QFormerSource::Stage2) => {
                return refused(
                    "a BERT or a stage-1 model for task.stage: 1",
                    "a stage-2 model, which has no text half",
                );
            }
            (Stage::Two, QFormerSource::Bert) => {
                return refused("a stage-1 or stage-2 model for task.stage: 2", "a BERT; train stage 1 first");
            }
        };
        Ok(if self.dir.kind() == &ModelKind::LavisCheckpoint { plans::from_lavis(source, plan)? } else { plan })
    }

    /// That a run is begun from before it is at its end, in words.
    pub fn unfinished(&self) -> Option<String> {
        let (run, path) = (self.unfinished.as_ref()?.display(), self.path.display());
        Some(format!("warning: model.qformer.init: the run {run} is not finished; {path} is taken"))
    }

    /// What stage 1 begins anew with though the source is a whole stage 1, in words.
    ///
    /// # Errors
    /// A configuration without the part.
    pub fn begins_anew(&self, stage: Stage) -> Result<Option<String>, Error> {
        let whole = self.kind == QFormerSource::Stage1 && self.dir.kind() == &ModelKind::WholeBlip2;
        if stage == Stage::Two || !whole || !plans::lacks_heads(&self.dir.part(Part::QFormer)?.weights) {
            return Ok(None);
        }
        let path = self.path.display();
        Ok(Some(format!(
            "model.qformer.init: {path} has no temperature and no ITG head, for which transformers has no names; they begin anew"
        )))
    }

    /// Stage 1's captions to ids of at most `max_tokens`, by the tokenizer beside the source.
    ///
    /// # Errors
    /// A configuration that does not parse; a tokenizer that does not suit the source's text half.
    pub fn text(&self, max_tokens: usize) -> Result<TextFrame, Error> {
        stage1_text(&self.tokenizer, max_tokens, &self.own_config()?)
    }

    /// What the source says of itself, `[DEC]` with it.
    fn own_config(&self) -> Result<QFormerConfig, Error> {
        let part = self.dir.part(Part::QFormer)?;
        let mut qformer =
            QFormerConfig::from_json(part.config).map_err(|source| Error::Model { path: self.path.clone(), source })?;
        if self.kind == QFormerSource::Bert {
            // It becomes the vocabulary's last entry.
            qformer.vocab_size += 1;
        }
        Ok(qformer)
    }

    /// The Q-Former that `config` asks for, checked against what the source has.
    ///
    /// # Errors
    /// A configuration that does not parse; a Q-Former of another width, other queries or cross-attention elsewhere.
    pub fn qformer_config(&self, config: &Config, vision: &VisionConfig) -> Result<QFormerConfig, Error> {
        let mut qformer = self.own_config()?;
        let wanted = &config.model.qformer;
        let width = vision.hidden_size();
        let frequency = wanted.cross_attention_frequency as i64;
        if self.kind == QFormerSource::Bert {
            qformer.encoder_hidden_size = width;
            qformer.cross_attention_frequency = frequency;
        } else {
            let queries = self.dir.config()["num_query_tokens"].as_u64().unwrap_or(0);
            let mut wrong = Mistakes::default();
            for (key, here, there) in [
                ("model.vision.weights: width of the image features", width, qformer.encoder_hidden_size),
                ("model.qformer.query_tokens", wanted.query_tokens as i64, queries as i64),
                ("model.qformer.cross_attention_frequency", frequency, qformer.cross_attention_frequency),
            ] {
                wrong.take(self.expect(key, here, there));
            }
            wrong.into_result()?;
        }
        qformer.hidden_dropout_prob = wanted.dropout;
        qformer.attention_probs_dropout_prob = wanted.dropout;
        Ok(qformer)
    }

    /// A value that must be what the source has.
    fn expect(&self, key: &str, here: i64, there: i64) -> Result<(), Error> {
        if here == there {
            return Ok(());
        }
        let path = self.path.display();
        Err(Error::Mismatch(format!("{key}: {here} here, but model.qformer.init ({path}) has {there}")))
    }

    /// Width of ITC's embeddings.
    pub fn embedding_width(&self) -> i64 {
        self.dir.config()["image_text_hidden_size"].as_i64().unwrap_or(IMAGE_TEXT_HIDDEN_SIZE)
    }

    /// `[DEC]`: the source's, or the last of the vocabulary.
    pub fn decoder_start(&self, qformer: &QFormerConfig) -> i64 {
        self.dir.config()["qformer_decoder_start_token_id"].as_i64().unwrap_or(qformer.vocab_size - 1)
    }
}
