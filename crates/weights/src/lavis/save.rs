//! A checkpoint that LAVIS loads.

use std::collections::BTreeSet;
use std::path::Path;

use blip2_torchx::params::{TensorInfo, TensorSource};
use tch::{Device, Kind, Tensor};

use super::POSITION_IDS;
use super::names::{Projection, lavis_name};
use crate::error::WeightsError;
use crate::names::{Stage, check_trained};
use crate::torch_file::{Entry, write_torch_file};

/// Tied to the word embedding and to the head's bias; LAVIS' models list them once more.
const TIED: [(&str, &str); 2] = [
    ("Qformer.cls.predictions.decoder.weight", "embeddings.word_embeddings.weight"),
    ("Qformer.cls.predictions.decoder.bias", "cls.predictions.bias"),
];

/// What a checkpoint for LAVIS is made of.
pub struct LavisCheckpoint<'a> {
    /// Every parameter of the stage: [`trained_names`](crate::trained_names).
    pub trained: &'a dyn TensorSource,
    /// The stage.
    pub stage: Stage,
    /// The Q-Former's layers.
    pub layers: usize,
    /// Every how many layers there is cross-attention.
    pub cross_attention_frequency: usize,
    /// The Q-Former's `max_position_embeddings`.
    pub positions: i64,
    /// The language model's family; of no meaning in stage 1.
    pub projection: Projection,
}

/// Writes `{"model": …}` with LAVIS' names to `path`: what it trains, as its own checkpoints hold it. `torch.load(weights_only=True)` reads the
/// file, and LAVIS' model without its frozen towers loads it with `strict=True`. Tensors are streamed from their source, one at a time.
///
/// # Errors
/// The trained names are not those of the stage; what the source or the system refuses.
pub fn save_lavis(checkpoint: &LavisCheckpoint, path: &Path) -> Result<(), WeightsError> {
    let LavisCheckpoint { trained, stage, layers, cross_attention_frequency, positions, projection } = *checkpoint;
    let given: BTreeSet<String> = trained.entries().into_iter().map(|(name, _)| name).collect();
    check_trained(stage, layers, cross_attention_frequency, &given)?;
    let position_ids = Tensor::arange(positions, (Kind::Int64, Device::Cpu)).unsqueeze(0);
    let mut entries = vec![Entry { name: POSITION_IDS.into(), source_name: POSITION_IDS }];
    for ours in &given {
        let name = lavis_name(ours, projection)
            .ok_or_else(|| WeightsError::Tensor { name: ours.clone(), message: "LAVIS has no name for it".into() })?;
        entries.push(Entry { name, source_name: ours });
    }
    if stage == Stage::One {
        entries.extend(TIED.map(|(name, source_name)| Entry { name: name.into(), source_name }));
    }
    write_torch_file(&WithPositions { trained, position_ids }, &entries, path)
}

/// The trained parameters and BERT's buffer.
struct WithPositions<'a> {
    trained: &'a dyn TensorSource,
    position_ids: Tensor,
}

impl TensorSource for WithPositions<'_> {
    fn origin(&self) -> String {
        self.trained.origin()
    }

    fn entries(&self) -> Vec<(String, TensorInfo)> {
        let info = TensorInfo { kind: self.position_ids.kind(), shape: self.position_ids.size() };
        let mut entries = self.trained.entries();
        entries.push((POSITION_IDS.into(), info));
        entries
    }

    fn read(&self, name: &str) -> Result<Tensor, String> {
        if name == POSITION_IDS { Ok(self.position_ids.shallow_clone()) } else { self.trained.read(name) }
    }
}
