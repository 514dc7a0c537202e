//! LAVIS' ViT (`eva_vit_g.pth`, or `visual_encoder.` of a checkpoint) under our names.

use std::collections::{BTreeMap, BTreeSet};

use crate::part_view::Recipe;

/// Names outside the blocks: LAVIS' prefix and ours. The last ones are of no use to BLIP-2 and bear the names that a load plan passes over.
const OUTSIDE: [(&str, &str); 7] = [
    ("cls_token", "embeddings.class_embedding"),
    ("pos_embed", "embeddings.position_embedding"),
    ("patch_embed.proj.", "embeddings.patch_embedding."),
    ("mask_token", "embeddings.mask_token"),
    ("norm.", "layernorm."),
    ("fc_norm.", "layernorm.fc_norm."),
    ("head.", "classifier."),
];
/// Modules of a block.
const INSIDE: [(&str, &str); 6] = [
    ("norm1.", "layer_norm1."),
    ("norm2.", "layer_norm2."),
    ("attn.qkv.", "self_attn.qkv."),
    ("attn.proj.", "self_attn.projection."),
    ("mlp.fc1.", "mlp.fc1."),
    ("mlp.fc2.", "mlp.fc2."),
];

/// What each of our tensors is made of. The biases of queries and values become one; a tensor with no place in ours keeps its own name.
pub(crate) fn vit_recipes<'a>(names: impl Iterator<Item = &'a str>, prefix: &str) -> BTreeMap<String, Recipe> {
    let names: BTreeSet<&str> = names.filter_map(|name| name.strip_prefix(prefix)).collect();
    let mut recipes = BTreeMap::new();
    for &name in &names {
        let theirs = format!("{prefix}{name}");
        let bias = ["q_bias", "v_bias"].iter().find_map(|bias| name.strip_suffix(bias));
        let pair = bias.filter(|attention| {
            ["q_bias", "v_bias"].iter().all(|bias| names.contains(format!("{attention}{bias}").as_str()))
        });
        if let Some((attention, ours)) =
            pair.and_then(|attention| Some((attention, our_name(&format!("{attention}qkv.bias"))?)))
        {
            let [query, value] = ["q_bias", "v_bias"].map(|bias| format!("{prefix}{attention}{bias}"));
            recipes.insert(ours, Recipe::QkvBias { query, value });
        } else {
            recipes.insert(our_name(name).unwrap_or_else(|| theirs.clone()), Recipe::Tensor(theirs));
        }
    }
    recipes
}

fn our_name(name: &str) -> Option<String> {
    if let Some((index, below)) = name.strip_prefix("blocks.").and_then(|rest| rest.split_once('.')) {
        index.parse::<usize>().ok()?;
        let mut inside = INSIDE.iter();
        return inside.find_map(|(theirs, ours)| {
            Some(format!("vision_model.encoder.layers.{index}.{ours}{}", below.strip_prefix(theirs)?))
        });
    }
    OUTSIDE.iter().find_map(|(theirs, ours)| {
        let rest = name.strip_prefix(theirs)?;
        (theirs.ends_with('.') || rest.is_empty()).then(|| format!("vision_model.{ours}{rest}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_biases_become_one_and_the_rest_keeps_its_tensor() {
        let names = ["cls_token", "blocks.1.attn.q_bias", "blocks.1.attn.v_bias", "blocks.1.attn.proj.bias", "rel_pos"];
        let recipes = vit_recipes(names.into_iter(), "");
        let tensor = |name: &str| Recipe::Tensor(name.into());
        let expected = [
            ("rel_pos", tensor("rel_pos")),
            ("vision_model.embeddings.class_embedding", tensor("cls_token")),
            ("vision_model.encoder.layers.1.self_attn.projection.bias", tensor("blocks.1.attn.proj.bias")),
            (
                "vision_model.encoder.layers.1.self_attn.qkv.bias",
                Recipe::QkvBias { query: "blocks.1.attn.q_bias".into(), value: "blocks.1.attn.v_bias".into() },
            ),
        ];
        assert_eq!(recipes, expected.map(|(name, recipe)| (name.to_string(), recipe)).into());
    }

    #[test]
    fn a_bias_without_its_fellow_keeps_its_own_name() {
        let recipes = vit_recipes(["v.blocks.0.attn.q_bias", "other.x"].into_iter(), "v.");
        assert_eq!(recipes.keys().collect::<Vec<_>>(), ["v.blocks.0.attn.q_bias"]);
    }
}
