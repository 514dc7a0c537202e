//! LAVIS' names of what is trained, and ours.

/// What LAVIS calls the projection to the language model, by the model's family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Projection {
    /// `opt_proj`, of `Blip2OPT`.
    Opt,
    /// `t5_proj`, of `Blip2T5`.
    T5,
    /// `llm_proj`, of `Blip2VicunaInstruct`, here of every other decoder.
    Llm,
}

impl Projection {
    /// By the language model's `model_type`.
    pub fn of(model_type: &str) -> Projection {
        match model_type {
            "opt" => Projection::Opt,
            "t5" => Projection::T5,
            _ => Projection::Llm,
        }
    }

    fn module(self) -> &'static str {
        match self {
            Projection::Opt => "opt_proj.",
            Projection::T5 => "t5_proj.",
            Projection::Llm => "llm_proj.",
        }
    }
}

/// Parameters that belong to no module.
const ALONE: [&str; 2] = ["query_tokens", "temp"];
const LAYERS: (&str, &str) = ("Qformer.bert.encoder.layer.", "qformer.encoder.layer.");
/// Modules whose parameters keep their names: LAVIS' prefix and ours.
const MODULES: [(&str, &str); 8] = [
    ("ln_vision.", "vision_model.post_layernorm."),
    ("Qformer.bert.embeddings.LayerNorm.", "qformer.layernorm."),
    ("Qformer.bert.embeddings.word_embeddings.", "embeddings.word_embeddings."),
    ("Qformer.bert.embeddings.position_embeddings.", "embeddings.position_embeddings."),
    ("Qformer.cls.", "cls."),
    ("vision_proj.", "vision_projection."),
    ("text_proj.", "text_projection."),
    ("itm_head.", "itm_head."),
];
const LANGUAGE_PROJECTION: &str = "language_projection.";
/// Inside a layer, BERT's code calls the three projections of an attention `self`, Hugging Face's BLIP-2 `attention`.
const ATTENTIONS: [(&str, &str); 2] =
    [("attention.self.", "attention.attention."), ("crossattention.self.", "crossattention.attention.")];

/// Our name of a parameter that LAVIS trains; `None` for buffers, towers and what is none of LAVIS' names.
pub fn our_name(lavis: &str) -> Option<String> {
    let projections = [Projection::Opt, Projection::T5, Projection::Llm];
    if let Some(parameter) = projections.iter().find_map(|projection| lavis.strip_prefix(projection.module())) {
        return Some(format!("{LANGUAGE_PROJECTION}{parameter}"));
    }
    translate(lavis, |(theirs, ours)| (theirs, ours))
}

/// LAVIS' name of a parameter of ours, where `projection` tells the language model's family; `None` for what is no name of ours.
pub fn lavis_name(ours: &str, projection: Projection) -> Option<String> {
    if let Some(parameter) = ours.strip_prefix(LANGUAGE_PROJECTION) {
        return Some(format!("{}{parameter}", projection.module()));
    }
    translate(ours, |(theirs, ours)| (ours, theirs))
}

type Pair = (&'static str, &'static str);

/// One walk for both ways; `way` says which side of a pair is replaced by which.
fn translate(name: &str, way: impl Fn(Pair) -> Pair) -> Option<String> {
    if ALONE.contains(&name) {
        return Some(name.to_string());
    }
    let (from, to) = way(LAYERS);
    let Some(layer) = name.strip_prefix(from) else {
        let mut modules = MODULES.iter().map(|&pair| way(pair));
        return modules.find_map(|(from, to)| Some(format!("{to}{}", name.strip_prefix(from)?)));
    };
    let (index, below) = layer.split_once('.')?;
    index.parse::<usize>().ok()?;
    for (from_attention, to_attention) in ATTENTIONS.map(&way) {
        if let Some(parameter) = below.strip_prefix(from_attention) {
            return Some(format!("{to}{index}.{to_attention}{parameter}"));
        }
        // The other side's spelling is no name of this side.
        if below.starts_with(to_attention) {
            return None;
        }
    }
    Some(format!("{to}{layer}"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::names::{Stage, trained_names};

    #[test]
    fn the_names_are_those_of_lavis() {
        for (lavis, ours) in [
            ("query_tokens", "query_tokens"),
            ("temp", "temp"),
            ("ln_vision.weight", "vision_model.post_layernorm.weight"),
            ("Qformer.bert.embeddings.LayerNorm.bias", "qformer.layernorm.bias"),
            ("Qformer.bert.embeddings.word_embeddings.weight", "embeddings.word_embeddings.weight"),
            (
                "Qformer.bert.encoder.layer.11.attention.self.query.weight",
                "qformer.encoder.layer.11.attention.attention.query.weight",
            ),
            (
                "Qformer.bert.encoder.layer.0.crossattention.self.key.bias",
                "qformer.encoder.layer.0.crossattention.attention.key.bias",
            ),
            (
                "Qformer.bert.encoder.layer.0.crossattention.output.LayerNorm.weight",
                "qformer.encoder.layer.0.crossattention.output.LayerNorm.weight",
            ),
            (
                "Qformer.bert.encoder.layer.3.intermediate_query.dense.weight",
                "qformer.encoder.layer.3.intermediate_query.dense.weight",
            ),
            ("Qformer.cls.predictions.transform.dense.weight", "cls.predictions.transform.dense.weight"),
            ("vision_proj.weight", "vision_projection.weight"),
            ("itm_head.bias", "itm_head.bias"),
        ] {
            assert_eq!(our_name(lavis).as_deref(), Some(ours));
            assert_eq!(lavis_name(ours, Projection::Opt).as_deref(), Some(lavis));
        }
        for (projection, lavis) in
            [(Projection::Opt, "opt_proj.bias"), (Projection::T5, "t5_proj.bias"), (Projection::Llm, "llm_proj.bias")]
        {
            assert_eq!(our_name(lavis).as_deref(), Some("language_projection.bias"));
            assert_eq!(lavis_name("language_projection.bias", projection).as_deref(), Some(lavis));
        }
    }

    #[test]
    fn what_is_not_trained_has_no_name() {
        for name in [
            "visual_encoder.cls_token",
            "opt_model.lm_head.weight",
            "Qformer.bert.embeddings.position_ids",
            "Qformer.bert.encoder.layer.0.attention.attention.query.weight",
            "Qformer.bert.encoder.layer.x.output.dense.bias",
            "Qformer.bert.encoder.layer.0",
            "temperature",
            "",
        ] {
            assert_eq!(our_name(name), None, "{name}");
        }
        assert_eq!(lavis_name("qformer.encoder.layer.0.attention.self.query.weight", Projection::Llm), None);
    }

    proptest! {
        /// Ours to LAVIS' and back is the same name, and no two of ours become one.
        #[test]
        fn the_map_is_bijective_from_ours(layers in 1usize..14, frequency in 1usize..4, two in any::<bool>(), family in 0usize..3) {
            let stage = if two { Stage::Two } else { Stage::One };
            let projection = [Projection::Opt, Projection::T5, Projection::Llm][family];
            let ours = trained_names(stage, layers, frequency);
            let theirs: Vec<String> = ours.iter().map(|name| lavis_name(name, projection).unwrap()).collect();
            for (name, lavis) in ours.iter().zip(&theirs) {
                let back = our_name(lavis);
                prop_assert_eq!(back.as_ref(), Some(name));
            }
            let distinct: std::collections::BTreeSet<&String> = theirs.iter().collect();
            prop_assert_eq!(distinct.len(), ours.len());
        }

        /// LAVIS' to ours and back is the same name, for any name that is one of LAVIS'.
        #[test]
        fn the_map_is_bijective_from_lavis(module in 0usize..11, layer in 0usize..100, part in "[a-z_]{1,9}(\\.[a-zA-Z_]{1,9}){0,3}") {
            let name = match module {
                8 => format!("Qformer.bert.encoder.layer.{layer}.attention.self.{part}"),
                9 => format!("Qformer.bert.encoder.layer.{layer}.crossattention.{part}"),
                10 => format!("t5_proj.{part}"),
                module => format!("{}{part}", MODULES[module].0),
            };
            if let Some(ours) = our_name(&name) {
                prop_assert_eq!(lavis_name(&ours, Projection::T5), Some(name));
            } else {
                prop_assert!(name.contains("crossattention.attention."));
            }
        }

        /// Arbitrary text neither panics nor changes on the way there and back.
        #[test]
        fn any_text_maps_back_or_has_no_name(text in "(Qformer\\.bert\\.encoder\\.layer\\.)?[a-z0-9.]{0,40}") {
            if let Some(ours) = our_name(&text) {
                prop_assert_eq!(lavis_name(&ours, Projection::Opt), Some(text));
            }
        }
    }
}
