//! The names of what each stage trains.

use std::collections::BTreeSet;

use crate::error::WeightsError;

/// A training stage of BLIP-2.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Vision-language representation learning (section 3.2 of the paper): `Blip2ForImageTextRetrieval` and two heads more.
    One,
    /// Vision-to-language generative learning (section 3.3): the trained half of `Blip2ForConditionalGeneration`.
    Two,
}

impl Stage {
    /// "stage 1" or "stage 2".
    pub fn label(self) -> &'static str {
        match self {
            Stage::One => "stage 1",
            Stage::Two => "stage 2",
        }
    }
}

/// Whether `transformers` has no place for this stage-1 parameter: the temperature and the ITG head.
pub fn pretraining_head(name: &str) -> bool {
    name == "temp" || name.starts_with("cls.predictions.")
}

/// Whether this Q-Former parameter serves text rows only, which stage 2 does not have.
pub(crate) fn text_branch(name: &str) -> bool {
    let below_layer = name.strip_prefix("qformer.encoder.layer.").and_then(|rest| rest.split_once('.'));
    name.starts_with("embeddings.")
        || below_layer.is_some_and(|(_, rest)| rest.starts_with("intermediate.") || rest.starts_with("output."))
}

/// The sorted names of all that a stage trains, for a Q-Former of `layers` layers with cross-attention in every
/// `cross_attention_frequency`-th, beginning with the first.
pub fn trained_names(stage: Stage, layers: usize, cross_attention_frequency: usize) -> Vec<String> {
    let mut names = vec!["query_tokens".to_string()];
    let mut linear = |module: String| names.extend([format!("{module}.weight"), format!("{module}.bias")]);
    linear("vision_model.post_layernorm".into());
    linear("qformer.layernorm".into());
    for i in 0..layers {
        let layer = format!("qformer.encoder.layer.{i}");
        let crossed = cross_attention_frequency > 0 && i % cross_attention_frequency == 0;
        for attention in if crossed { &["attention", "crossattention"][..] } else { &["attention"] } {
            for projection in ["query", "key", "value"] {
                linear(format!("{layer}.{attention}.attention.{projection}"));
            }
            linear(format!("{layer}.{attention}.output.dense"));
            linear(format!("{layer}.{attention}.output.LayerNorm"));
        }
        for suffix in if stage == Stage::One { &["", "_query"][..] } else { &["_query"] } {
            linear(format!("{layer}.intermediate{suffix}.dense"));
            linear(format!("{layer}.output{suffix}.dense"));
            linear(format!("{layer}.output{suffix}.LayerNorm"));
        }
    }
    match stage {
        Stage::One => {
            for module in ["vision_projection", "text_projection", "itm_head"] {
                linear(module.into());
            }
            for module in ["cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm"] {
                linear(module.into());
            }
            names.extend(
                [
                    "temp",
                    "cls.predictions.bias",
                    "embeddings.word_embeddings.weight",
                    "embeddings.position_embeddings.weight",
                ]
                .map(String::from),
            );
        }
        Stage::Two => linear("language_projection".into()),
    }
    names.sort();
    names
}

/// Refuses other names than those that a stage trains.
pub(crate) fn check_trained(
    stage: Stage,
    layers: usize,
    cross_attention_frequency: usize,
    given: &BTreeSet<String>,
) -> Result<(), WeightsError> {
    let expected: BTreeSet<String> = trained_names(stage, layers, cross_attention_frequency).into_iter().collect();
    if expected == *given {
        return Ok(());
    }
    Err(WeightsError::TrainedNames {
        stage: stage.label(),
        missing: expected.difference(given).cloned().collect(),
        unexpected: given.difference(&expected).cloned().collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stage_2_keeps_stage_1_without_text_and_heads() {
        let one = trained_names(Stage::One, 4, 2);
        let mut kept: Vec<String> = one.into_iter().filter(|n| !text_branch(n) && !pretraining_head(n)).collect();
        kept.retain(|n| !["vision_projection", "text_projection", "itm_head"].iter().any(|m| n.starts_with(m)));
        kept.extend(["language_projection.bias".to_string(), "language_projection.weight".to_string()]);
        kept.sort();
        assert_eq!(kept, trained_names(Stage::Two, 4, 2));
    }

    #[test]
    fn cross_attention_stands_in_every_second_layer() {
        let names = trained_names(Stage::Two, 3, 2);
        let crossed = |i: usize| names.contains(&format!("qformer.encoder.layer.{i}.crossattention.output.dense.bias"));
        assert_eq!([crossed(0), crossed(1), crossed(2)], [true, false, true]);
    }
}
