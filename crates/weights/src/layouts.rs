//! How families of models name their tensors, and where a model of several parts keeps each of them.

use serde_json::Value;

use crate::directory::Part;

/// How a family of models names its tensors when it stands alone. A new tower is a new row of [`LAYOUTS`].
pub(crate) struct Layout {
    model_type: &'static str,
    part: Part,
    /// What stands in front of the base model's names in files of classes with a head; a base model's own file lacks it.
    base_prefix: &'static str,
    /// Top-level names of those heads.
    heads: &'static [&'static str],
    /// What our store puts in front of the base model's names.
    our_base: &'static str,
    /// What it puts in front of the heads' names.
    our_head: &'static str,
}

/// What the text half of an image-text model and what joins the halves are called.
const TEXT_HALF: &[&str] = &["text_model.", "visual_projection.", "text_projection.", "logit_scale", "logit_bias"];

/// Models of several parts that hold one of ours as a section of their configuration, with the section's `model_type` where the file leaves
/// it to the class.
const OF_PARTS: &[(&str, Part, &str)] = &[
    ("aimv2", Part::Vision, "aimv2_vision_model"),
    ("clip", Part::Vision, "clip_vision_model"),
    ("siglip", Part::Vision, "siglip_vision_model"),
    ("gemma3", Part::Language, "gemma3_text"),
    ("llava", Part::Language, "llama"),
    ("llava_next", Part::Language, "llama"),
    ("mistral3", Part::Language, "mistral"),
];

/// The row of [`LAYOUTS`] of a tower whose classes put `base_prefix` in front.
const fn vision_tower(
    model_type: &'static str,
    base_prefix: &'static str,
    heads: &'static [&'static str],
    our_head: &'static str,
) -> Layout {
    Layout { model_type, part: Part::Vision, base_prefix, heads, our_base: "vision_model.", our_head }
}

const LAYOUTS: &[Layout] = &[
    vision_tower("aimv2_vision_model", "vision_model.", TEXT_HALF, ""),
    vision_tower("blip_2_vision_model", "vision_model.", &[], "vision_model."),
    vision_tower("clip_vision_model", "vision_model.", TEXT_HALF, ""),
    vision_tower("dinov2", "dinov2.", &["classifier."], "vision_model."),
    vision_tower("dinov2_with_registers", "dinov2_with_registers.", &["classifier."], "vision_model."),
    vision_tower("dinov3_vit", "dinov3_vit.", &[], "vision_model."),
    vision_tower("siglip_vision_model", "vision_model.", TEXT_HALF, ""),
    vision_tower("vit", "vit.", &["classifier.", "decoder."], "vision_model."),
    Layout {
        model_type: "bert",
        part: Part::QFormer,
        base_prefix: "bert.",
        heads: &["cls."],
        our_base: "",
        our_head: "",
    },
    decoder("llama"),
    decoder("mistral"),
    decoder("qwen2"),
    decoder("qwen3"),
    decoder("smollm3"),
    decoder("phi3"),
    decoder("gemma"),
    decoder("gemma2"),
    decoder("gemma3_text"),
    // OPT's base model lies below `decoder.`, which is part of its names.
    decoder("opt"),
    Layout { base_prefix: "transformer.", our_base: "language_model.transformer.", ..decoder("gpt2") },
    Layout { base_prefix: "", heads: &[], our_base: "language_model.", ..decoder("t5") },
];

/// Most decoders: the base model below `model.`, the head beside it.
const fn decoder(model_type: &'static str) -> Layout {
    Layout {
        model_type,
        part: Part::Language,
        base_prefix: "model.",
        heads: &["lm_head."],
        our_base: "language_model.model.",
        our_head: "language_model.",
    }
}

/// Whether a model of this type holds the part as a section of its configuration.
pub(crate) fn has_section(model_type: &str, part: Part) -> bool {
    OF_PARTS.iter().any(|&(whole, its, _)| whole == model_type && its == part)
}

/// The keys that decide what CLIP's image encoder computes.
const CLIP_VISION_KEYS: [&str; 9] = [
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
];

/// Writes into the sections of a model of several parts what its class takes for granted.
pub(crate) fn name_sections(config: &mut Value, model_type: &str) {
    if model_type == "clip" {
        replace_by_dict(config);
    }
    for (_, part, section_type) in OF_PARTS.iter().filter(|(whole, ..)| *whole == model_type) {
        if let Some(section) = config.get_mut(part.section()).and_then(Value::as_object_mut) {
            section.entry("model_type").or_insert_with(|| (*section_type).into());
        }
    }
}

/// CLIP's class lets the old `vision_config_dict`, with its own defaults for what that leaves out, go before `vision_config`.
fn replace_by_dict(config: &mut Value) {
    let Some(Value::Object(dict)) = config.get("vision_config_dict").cloned() else { return };
    let section = &mut config[Part::Vision.section()];
    if section.is_null() {
        *section = Value::Object(Default::default());
    }
    if let Some(section) = section.as_object_mut() {
        section.retain(|key, _| !CLIP_VISION_KEYS.contains(&key.as_str()));
        section.extend(dict);
    }
}

/// A tensor's name in a file of the language model alone; `None` for the other parts of the model that holds it.
///
/// Files have `language_model.model.…` and `language_model.lm_head.…`; classes since `transformers` 4.52 say `model.language_model.…` and
/// `lm_head.…`.
pub(crate) fn in_language_model(name: &str) -> Option<&str> {
    let stripped = ["language_model.", "model.language_model."].iter().find_map(|prefix| name.strip_prefix(prefix));
    stripped.or_else(|| name.starts_with("lm_head.").then_some(name))
}

impl Layout {
    pub(crate) fn of(part: Part, model_type: &str) -> Option<&'static Layout> {
        LAYOUTS.iter().find(|layout| layout.part == part && layout.model_type == model_type)
    }

    /// Every `model_type` that has the part, for messages.
    pub(crate) fn supported(part: Part) -> String {
        let towers = LAYOUTS.iter().filter(|layout| layout.part == part).map(|layout| layout.model_type);
        let whole = OF_PARTS.iter().filter(|(_, its, _)| *its == part).map(|(whole, ..)| *whole);
        let supported = towers.chain(whole).chain(["blip-2"]).collect::<Vec<_>>().join(", ");
        match part {
            Part::Vision => {
                format!("{supported} (SigLIP 2 by its checkpoints of fixed resolution, whose model_type is siglip)")
            }
            Part::Language | Part::QFormer => supported,
        }
    }

    /// The name of our parameter for a tensor of a file of this family alone.
    pub(crate) fn our_name(&self, theirs: &str) -> String {
        if self.heads.iter().any(|head| theirs.starts_with(head)) {
            return self.spelled(format!("{}{theirs}", self.our_head));
        }
        let base = theirs.strip_prefix(self.base_prefix).unwrap_or(theirs);
        self.spelled(format!("{}{base}", self.our_base))
    }

    /// BERT files that were converted from TensorFlow call the LayerNorms' parameters gamma and beta.
    fn spelled(&self, name: String) -> String {
        match (name.strip_suffix("LayerNorm.gamma"), name.strip_suffix("LayerNorm.beta")) {
            (Some(module), _) if self.part == Part::QFormer => format!("{module}LayerNorm.weight"),
            (_, Some(module)) if self.part == Part::QFormer => format!("{module}LayerNorm.bias"),
            _ => name,
        }
    }
}
