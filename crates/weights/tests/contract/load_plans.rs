//! Load plans: what each kind of source may lack and may have too much, and nothing else.

use std::collections::BTreeMap;

use blip2_torchx::params::{LoadError, LoadPlan, LoadProblem, LoadReport, ParamStore};
use blip2_weights::plans::{
    QFormerSource, language_model, stage1_from_bert, stage1_from_whole, stage2_from_stage1, tied_head, vision_tower,
};
use blip2_weights::{ModelDir, Part, Stage, WeightsDir, WeightsError, pretraining_head, trained_names};
use serde_json::json;
use tch::{Kind, Tensor};

use crate::fixtures::{golden, identical, numbered, source, store, write_model};

type Shapes<'a> = Vec<(&'a str, &'a [i64])>;

fn missing(result: Result<LoadReport, LoadError>) -> Vec<String> {
    let problems = result.unwrap_err().problems.into_iter();
    problems
        .map(|problem| match problem {
            LoadProblem::Missing { name, .. } => name,
            other => panic!("{other}"),
        })
        .collect()
}

fn unexpected(result: Result<LoadReport, LoadError>) -> Vec<String> {
    let problems = result.unwrap_err().problems.into_iter();
    problems
        .map(|problem| match problem {
            LoadProblem::Unexpected { name } => name,
            other => panic!("{other}"),
        })
        .collect()
}

/// A stage's store with every parameter of one element, but for what is given.
fn stage_store(stage: Stage, given: &BTreeMap<&str, Vec<i64>>) -> ParamStore {
    let names = trained_names(stage, 2, 2);
    let shape = |name: &str| given.get(name).cloned().unwrap_or(vec![1]);
    let shapes: Vec<(String, Vec<i64>)> = names.into_iter().map(|n| (n.clone(), shape(&n))).collect();
    let shapes: Shapes = shapes.iter().map(|(n, s)| (n.as_str(), s.as_slice())).collect();
    store(&shapes)
}

#[test]
fn stage_1_begins_without_the_heads_that_transformers_has_no_names_for() {
    let names = trained_names(Stage::One, 2, 2);
    let heads: Vec<&String> = names.iter().filter(|name| pretraining_head(name)).collect();
    assert_eq!(heads.len(), 6);
    let of = |names: Vec<&String>| -> BTreeMap<String, Tensor> {
        names.into_iter().map(|name| (name.clone(), numbered(name, &[1]))).collect()
    };
    let stage1 = stage_store(Stage::One, &BTreeMap::new());
    let bare = of(names.iter().filter(|name| !pretraining_head(name)).collect());
    let report = stage1.load(&bare, &stage1_from_whole(&bare)).unwrap();
    assert_eq!(report.fresh.iter().collect::<Vec<_>>(), heads);
    // A source that has some of them has lost the others.
    let torn = of(names.iter().filter(|name| !pretraining_head(name) || *name == "temp").collect());
    assert_eq!(missing(stage1.load(&torn, &stage1_from_whole(&torn))).len(), 5);
    let lame = of(names.iter().filter(|name| !pretraining_head(name) && *name != "query_tokens").collect());
    assert_eq!(missing(stage1.load(&lame, &stage1_from_whole(&lame))), ["query_tokens"]);
}

#[test]
fn vision_tower_takes_the_first_blocks_only() {
    let ours: [(&str, &[i64]); 2] =
        [("vision_model.embeddings.cls_token", &[1, 1, 4]), ("vision_model.encoder.layer.0.norm1.weight", &[4])];
    let mut offered = ours.to_vec();
    let extra: Shapes = vec![
        ("logit_bias", &[1]),
        ("text_model.embeddings.position_ids", &[1]),
        ("vision_model.classifier.weight", &[2, 8]),
        ("vision_model.embeddings.mask_token", &[1, 4]),
        ("vision_model.embeddings.position_ids", &[1]),
        ("vision_model.encoder.layer.1.norm1.weight", &[4]),
        ("vision_model.encoder.layer.10.norm1.weight", &[4]),
        ("vision_model.head.probe", &[1, 1, 4]),
        ("vision_model.layernorm.weight", &[4]),
        ("vision_model.norm.weight", &[4]),
        ("vision_model.pooler.dense.weight", &[4, 4]),
        ("vision_model.post_layernorm.weight", &[4]),
        ("vision_model.rms_norm.weight", &[4]),
    ];
    offered.extend(extra.clone());
    let tower = store(&ours);
    let report = tower.load(&source(&offered), &vision_tower(1)).unwrap();
    assert_eq!(report.loaded.len(), 2);
    assert_eq!(report.unused, extra.iter().map(|(n, _)| n.to_string()).collect::<Vec<_>>());
    let loaded = tower.get(ours[0].0).unwrap();
    assert!(identical(&loaded, &numbered(ours[0].0, ours[0].1)));

    assert_eq!(
        unexpected(tower.load(&source(&offered), &vision_tower(2))),
        ["vision_model.encoder.layer.1.norm1.weight"],
        "a block inside the depth must be taken"
    );
    assert_eq!(missing(tower.load(&source(&ours[1..]), &vision_tower(1))), [ours[0].0]);
    offered.push(("vision_model.encoder.pos_embed", &[1]));
    assert_eq!(unexpected(tower.load(&source(&offered), &vision_tower(1))), ["vision_model.encoder.pos_embed"]);
}

#[test]
fn language_model_ignores_a_tied_head_s_copy_and_rotary_buffers() {
    let ours: Shapes = vec![("language_model.model.embed_tokens.weight", &[5, 2])];
    let mut offered = ours.clone();
    offered.push(("language_model.model.layers.0.self_attn.rotary_emb.inv_freq", &[1]));
    let lm = store(&ours);
    assert_eq!(lm.load(&source(&offered), &language_model(false)).unwrap().unused.len(), 1);
    offered.push(("language_model.lm_head.weight", &[5, 2]));
    assert_eq!(lm.load(&source(&offered), &language_model(true)).unwrap().unused.len(), 2);
    assert_eq!(unexpected(lm.load(&source(&offered), &language_model(false))), ["language_model.lm_head.weight"]);
    let untied = store(&[ours[0], ("language_model.lm_head.weight", &[5, 2])]);
    assert_eq!(missing(untied.load(&source(&ours), &language_model(false))), ["language_model.lm_head.weight"]);
}

#[test]
fn language_model_ignores_what_a_t5_s_file_repeats() {
    let ours: Shapes = vec![("language_model.shared.weight", &[5, 2])];
    let mut offered = ours.clone();
    for copy in [
        "language_model.encoder.embed_tokens.weight",
        "language_model.decoder.embed_tokens.weight",
        "language_model.decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
    ] {
        offered.push((copy, &[5, 2]));
    }
    let lm = store(&ours);
    assert_eq!(lm.load(&source(&offered), &language_model(false)).unwrap().unused.len(), 3);
    offered.push(("language_model.decoder.block.1.layer.1.EncDecAttention.relative_attention_bias.weight", &[5, 2]));
    assert_eq!(unexpected(lm.load(&source(&offered), &language_model(false))), [offered[4].0]);
}

#[test]
fn heads_are_tied_by_config_or_by_family() {
    assert!(!tied_head(&json!({"model_type": "llama"})));
    assert!(tied_head(&json!({"model_type": "llama", "tie_word_embeddings": true})));
    assert!(tied_head(&json!({"model_type": "opt"})));
    assert!(tied_head(&json!({"model_type": "t5"})));
    assert!(!tied_head(&json!({"model_type": "t5", "tie_word_embeddings": false})));
    assert!(tied_head(&json!({"model_type": "gemma3_text"})) && !tied_head(&json!({"model_type": "phi3"})));
}

#[test]
fn buffers_of_old_language_models_go_unused() {
    let ours: [(&str, &[i64]); 1] = [("language_model.transformer.h.0.attn.c_attn.bias", &[3])];
    let buffers: [(&str, &[i64]); 3] = [
        ("language_model.transformer.h.0.attn.bias", &[1, 1, 4, 4]),
        ("language_model.transformer.h.0.attn.masked_bias", &[1]),
        ("language_model.model.decoder.version", &[1]),
    ];
    let offered = [ours.as_slice(), buffers.as_slice()].concat();
    let report = store(&ours).load(&source(&offered), &language_model(true)).unwrap();
    assert_eq!(report.unused.len(), 3);
    assert_eq!(report.loaded, ["language_model.transformer.h.0.attn.c_attn.bias"]);
}

/// A BERT of two layers as [`Part::QFormer`] names it; every parameter has one element but the vocabulary's.
fn bert(with_head: bool) -> BTreeMap<String, Tensor> {
    let mut names: Vec<String> =
        ["LayerNorm.weight", "LayerNorm.bias", "position_embeddings.weight", "token_type_embeddings.weight"]
            .map(|name| format!("embeddings.{name}"))
            .to_vec();
    for layer in 0..2 {
        for module in [
            "attention.self.query",
            "attention.self.key",
            "attention.self.value",
            "attention.output.dense",
            "attention.output.LayerNorm",
            "intermediate.dense",
            "output.dense",
            "output.LayerNorm",
        ] {
            names.extend(["weight", "bias"].map(|leaf| format!("encoder.layer.{layer}.{module}.{leaf}")));
        }
    }
    names.extend(["pooler.dense.weight", "pooler.dense.bias"].map(String::from));
    if with_head {
        for module in ["transform.dense", "transform.LayerNorm"] {
            names.extend(["weight", "bias"].map(|leaf| format!("cls.predictions.{module}.{leaf}")));
        }
        names.push("cls.seq_relationship.weight".into());
    }
    let mut tensors: BTreeMap<String, Tensor> =
        names.into_iter().map(|name| (name.clone(), numbered(&name, &[1]))).collect();
    tensors.insert("embeddings.word_embeddings.weight".into(), numbered("words", &[6, 2]));
    tensors.insert("embeddings.position_ids".into(), Tensor::arange(3, (Kind::Int64, tch::Device::Cpu)));
    if with_head {
        tensors.insert("cls.predictions.bias".into(), numbered("bias", &[6]));
        tensors.insert("cls.predictions.decoder.weight".into(), numbered("words", &[6, 2]));
        tensors.insert("cls.predictions.decoder.bias".into(), numbered("bias", &[6]));
    }
    tensors
}

fn stage1_with_dec() -> ParamStore {
    stage_store(
        Stage::One,
        &BTreeMap::from([
            ("embeddings.word_embeddings.weight", vec![7, 2]),
            ("cls.predictions.bias", vec![7]),
            ("temp", vec![]),
        ]),
    )
}

const CREATED: [&str; 19] = [
    "itm_head.bias",
    "itm_head.weight",
    "qformer.encoder.layer.0.crossattention.attention.key.bias",
    "qformer.encoder.layer.0.crossattention.attention.key.weight",
    "qformer.encoder.layer.0.crossattention.attention.query.bias",
    "qformer.encoder.layer.0.crossattention.attention.query.weight",
    "qformer.encoder.layer.0.crossattention.attention.value.bias",
    "qformer.encoder.layer.0.crossattention.attention.value.weight",
    "qformer.encoder.layer.0.crossattention.output.LayerNorm.bias",
    "qformer.encoder.layer.0.crossattention.output.LayerNorm.weight",
    "qformer.encoder.layer.0.crossattention.output.dense.bias",
    "qformer.encoder.layer.0.crossattention.output.dense.weight",
    "query_tokens",
    "temp",
    "text_projection.bias",
    "text_projection.weight",
    "vision_model.post_layernorm.bias",
    "vision_model.post_layernorm.weight",
    "vision_projection.bias",
];

#[test]
fn stage_1_from_a_bert_with_its_head() {
    let (bert, store) = (bert(true), stage1_with_dec());
    assert_eq!(QFormerSource::detect(&bert), Some(QFormerSource::Bert));
    let report = store.load(&bert, &stage1_from_bert(&bert).unwrap()).unwrap();
    let mut created = CREATED.to_vec();
    created.push("vision_projection.weight");
    assert_eq!(report.fresh, created);
    assert_eq!(
        report.unused,
        [
            "cls.predictions.decoder.bias",
            "cls.predictions.decoder.weight",
            "cls.seq_relationship.weight",
            "embeddings.position_ids",
            "embeddings.token_type_embeddings.weight",
            "pooler.dense.bias",
            "pooler.dense.weight",
        ]
    );
    let same = |ours: &str, theirs: &str| assert!(identical(&store.get(ours).unwrap(), &bert[theirs]), "{ours}");
    same("qformer.layernorm.weight", "embeddings.LayerNorm.weight");
    for layer in 0..2 {
        let (ours, theirs) = (format!("qformer.encoder.layer.{layer}"), format!("encoder.layer.{layer}"));
        same(&format!("{ours}.attention.attention.key.weight"), &format!("{theirs}.attention.self.key.weight"));
        same(&format!("{ours}.attention.output.dense.bias"), &format!("{theirs}.attention.output.dense.bias"));
        for rows in ["", "_query"] {
            same(&format!("{ours}.intermediate{rows}.dense.weight"), &format!("{theirs}.intermediate.dense.weight"));
            same(&format!("{ours}.output{rows}.dense.weight"), &format!("{theirs}.output.dense.weight"));
            same(&format!("{ours}.output{rows}.LayerNorm.bias"), &format!("{theirs}.output.LayerNorm.bias"));
        }
    }
    same("cls.predictions.transform.dense.weight", "cls.predictions.transform.dense.weight");
    let words = store.get("embeddings.word_embeddings.weight").unwrap();
    assert!(identical(&words.narrow(0, 0, 6), &bert["embeddings.word_embeddings.weight"]));
    assert_eq!(words.get(6).abs().sum(Kind::Float).double_value(&[]), 0.0, "[DEC] keeps its fresh row");
}

#[test]
fn stage_1_from_a_bert_without_a_head_starts_one() {
    let (bert, store) = (bert(false), stage1_with_dec());
    let report = store.load(&bert, &stage1_from_bert(&bert).unwrap()).unwrap();
    let mut created = CREATED.to_vec();
    created.extend([
        "vision_projection.weight",
        "cls.predictions.bias",
        "cls.predictions.transform.LayerNorm.bias",
        "cls.predictions.transform.LayerNorm.weight",
        "cls.predictions.transform.dense.bias",
        "cls.predictions.transform.dense.weight",
    ]);
    created.sort();
    assert_eq!(report.fresh, created);
}

#[test]
fn a_bert_with_half_a_head_or_a_missing_layer_is_refused() {
    let store = stage1_with_dec();
    let mut half = bert(true);
    half.remove("cls.predictions.transform.dense.weight");
    assert_eq!(
        missing(store.load(&half, &stage1_from_bert(&half).unwrap())),
        ["cls.predictions.transform.dense.weight"]
    );
    let mut short = bert(false);
    short.remove("encoder.layer.1.output.dense.weight");
    let lacking = missing(store.load(&short, &stage1_from_bert(&short).unwrap()));
    assert_eq!(lacking, ["encoder.layer.1.output.dense.weight"; 2], "text rows and query rows read it");
    let mut other = bert(false);
    other.insert("encoder.layer.2.output.dense.weight".into(), numbered("x", &[1]));
    let left_over = unexpected(store.load(&other, &stage1_from_bert(&other).unwrap()));
    assert_eq!(left_over, ["encoder.layer.2.output.dense.weight"]);
}

#[test]
fn a_bert_whose_decoder_is_not_its_word_embedding_is_refused() {
    for (name, value) in [
        ("cls.predictions.decoder.weight", numbered("other words", &[6, 2])),
        ("cls.predictions.decoder.bias", numbered("other bias", &[6])),
    ] {
        let mut untied = bert(true);
        untied.insert(name.into(), value);
        match stage1_from_bert(&untied) {
            Err(WeightsError::UntiedHead { name: found, .. }) => assert_eq!(found, name),
            _ => panic!("{name} was accepted"),
        }
    }
}

#[test]
fn an_old_bert_file_fills_stage_1() {
    let directory = tempfile::tempdir().unwrap();
    let old: Shapes = vec![("bert.embeddings.LayerNorm.gamma", &[4]), ("bert.embeddings.LayerNorm.beta", &[4])];
    write_model(directory.path(), &json!({"model_type": "bert"}), &old);
    let model = ModelDir::open(directory.path()).unwrap();
    let bert = model.part(Part::QFormer).unwrap().weights;
    let store = store(&[("qformer.layernorm.weight", &[4]), ("qformer.layernorm.bias", &[4])]);
    store.load(&bert, &stage1_from_bert(&bert).unwrap()).unwrap();
    assert!(identical(&store.get("qformer.layernorm.weight").unwrap(), &numbered(old[0].0, &[4])));
    assert!(identical(&store.get("qformer.layernorm.bias").unwrap(), &numbered(old[1].0, &[4])));
}

#[test]
fn stage_2_from_stage_1_lacks_the_projection_only() {
    let trained: BTreeMap<String, Tensor> =
        trained_names(Stage::One, 2, 2).into_iter().map(|name| (name.clone(), numbered(&name, &[1]))).collect();
    assert_eq!(QFormerSource::detect(&trained), Some(QFormerSource::Stage1));
    let store = stage_store(Stage::Two, &BTreeMap::new());
    let report = store.load(&trained, &stage2_from_stage1()).unwrap();
    assert_eq!(report.fresh, ["language_projection.bias", "language_projection.weight"]);
    assert_eq!(report.loaded.len() + report.unused.len(), trained.len());
    assert!(report.unused.contains(&"qformer.encoder.layer.1.output.dense.weight".to_string()));
    assert!(report.loaded.contains(&"vision_model.post_layernorm.weight".to_string()));

    let mut lacking = trained;
    lacking.remove("query_tokens");
    assert_eq!(missing(store.load(&lacking, &stage2_from_stage1())), ["query_tokens"]);
}

#[test]
fn whole_models_and_checkpoints_load_exactly() {
    for (case, stage) in [("stage1", Stage::One), ("stage2_llama", Stage::Two), ("stage2_t5", Stage::Two)] {
        let model = ModelDir::open(&golden(case)).unwrap();
        let part = model.part(Part::QFormer).unwrap().weights;
        let expected = match stage {
            Stage::One => QFormerSource::Stage1,
            Stage::Two => QFormerSource::Stage2,
        };
        assert_eq!(QFormerSource::detect(&part), Some(expected));
        let infos = blip2_torchx::params::TensorSource::entries(&part);
        let shapes: Shapes = infos.iter().map(|(name, info)| (name.as_str(), info.shape.as_slice())).collect();
        let trained = store(&shapes);
        let report = trained.load(&part, &LoadPlan::exact()).unwrap();
        assert_eq!(report.loaded, trained_names(stage, 4, 2));

        let checkpoint = tempfile::tempdir().unwrap();
        let entries: Vec<(String, Tensor)> = trained.entries().into_iter().map(|(n, t, _)| (n, t)).collect();
        let path = checkpoint.path().join("model.safetensors");
        blip2_weights::save_safetensors(&entries, &BTreeMap::new(), &path).unwrap();
        let again = store(&shapes);
        again.load(&WeightsDir::open(checkpoint.path()).unwrap(), &LoadPlan::exact()).unwrap();
        for (name, tensor) in entries {
            assert!(identical(&again.get(&name).unwrap(), &tensor), "{name}");
        }
        let more = store(&[shapes.as_slice(), &[("prompt_tokens", &[1])]].concat());
        assert_eq!(missing(more.load(&part, &LoadPlan::exact())), ["prompt_tokens"]);
    }
}

#[test]
fn a_source_of_something_else_is_none_of_them() {
    assert_eq!(QFormerSource::detect(&source(&[("a", &[1])])), None);
}
