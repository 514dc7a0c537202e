//! Model directories and the names of their parts.

use std::fs;

use blip2_torchx::params::TensorSource;
use blip2_weights::{ModelDir, ModelKind, Part, Stage, WeightsError, trained_names};
use serde_json::json;

use crate::fixtures::{golden, identical, line, names, numbered, write_model};

fn tower_names(model_type: &str, part: Part, theirs: &[&str]) -> Vec<String> {
    let directory = tempfile::tempdir().unwrap();
    let shapes: Vec<(&str, &[i64])> = theirs.iter().map(|name| (*name, &[1i64][..])).collect();
    // Their values differ, which a head that is tied may not.
    let config = json!({"model_type": model_type, "tie_word_embeddings": false});
    write_model(directory.path(), &config, &shapes);
    let model = ModelDir::open(directory.path()).unwrap();
    assert_eq!(model.kind(), &ModelKind::Tower(model_type.into()));
    names(&model.part(part).unwrap().weights)
}

#[test]
fn a_whole_model_falls_into_three_parts() {
    let model = ModelDir::open(&golden("stage2_llama")).unwrap();
    assert_eq!(model.kind(), &ModelKind::WholeBlip2);
    let [vision, language, qformer] = [Part::Vision, Part::Language, Part::QFormer].map(|p| model.part(p).unwrap());
    assert_eq!(vision.config["hidden_size"], 40);
    assert_eq!(language.config["model_type"], "llama");
    assert_eq!(qformer.config["hidden_size"], 48);
    assert_eq!(names(&qformer.weights), trained_names(Stage::Two, 4, 2));
    let vision = names(&vision.weights);
    assert!(vision.contains(&"vision_model.encoder.layers.2.self_attn.qkv.weight".to_string()));
    assert!(!vision.iter().any(|name| name.contains("post_layernorm")));
    let language = names(&language.weights);
    assert!(language.contains(&"language_model.model.layers.1.mlp.up_proj.weight".to_string()));
    assert_eq!(vision.len() + language.len() + trained_names(Stage::Two, 4, 2).len(), names(model.weights()).len());
}

#[test]
fn stage_1_names_are_those_of_the_golden_cases() {
    for case in ["stage1", "stage1_2rank"] {
        let model = ModelDir::open(&golden(case)).unwrap();
        assert_eq!(names(&model.part(Part::QFormer).unwrap().weights), trained_names(Stage::One, 4, 2), "{case}");
    }
}

#[test]
fn a_dinov2_with_or_without_its_prefix() {
    let ours = ["vision_model.embeddings.cls_token", "vision_model.encoder.layer.0.norm1.weight"];
    let plain = tower_names("dinov2", Part::Vision, &["embeddings.cls_token", "encoder.layer.0.norm1.weight"]);
    assert_eq!(plain, ours);
    let classifier = ["dinov2.embeddings.cls_token", "dinov2.encoder.layer.0.norm1.weight", "classifier.weight"];
    let headed = tower_names("dinov2", Part::Vision, &classifier);
    assert_eq!(headed[0], "vision_model.classifier.weight");
    assert_eq!(headed[1..], ours);
}

#[test]
fn towers_of_every_family_lie_below_vision_model() {
    let block = "vision_model.encoder.layers.0.layer_norm1.weight";
    for (model_type, theirs, ours) in [
        ("clip_vision_model", block, block),
        ("siglip_vision_model", "vision_model.head.probe", "vision_model.head.probe"),
        ("dinov2_with_registers", "dinov2_with_registers.layernorm.bias", "vision_model.layernorm.bias"),
        ("dinov3_vit", "layer.0.norm1.weight", "vision_model.layer.0.norm1.weight"),
        ("vit", "vit.embeddings.cls_token", "vision_model.embeddings.cls_token"),
        ("vit", "decoder.0.weight", "vision_model.decoder.0.weight"),
        ("aimv2_vision_model", "embeddings.rms_norm.weight", "vision_model.embeddings.rms_norm.weight"),
        ("aimv2_vision_model", "vision_model.rms_norm.weight", "vision_model.rms_norm.weight"),
    ] {
        assert_eq!(tower_names(model_type, Part::Vision, &[theirs]), [ours], "{model_type}");
    }
}

#[test]
fn an_image_text_model_gives_its_image_encoder() {
    for (whole, vision) in
        [("aimv2", "aimv2_vision_model"), ("clip", "clip_vision_model"), ("siglip", "siglip_vision_model")]
    {
        let directory = tempfile::tempdir().unwrap();
        let config = json!({"model_type": whole, "vision_config": {"hidden_size": 8}, "text_config": {}});
        let theirs = ["logit_scale", "text_model.embeddings.token_embedding.weight", "vision_model.a.weight"];
        write_model(directory.path(), &config, &theirs.map(|name| (name, &[1i64][..])));
        let model = ModelDir::open(directory.path()).unwrap();
        let part = model.part(Part::Vision).unwrap();
        assert_eq!(part.config, &json!({"model_type": vision, "hidden_size": 8}));
        assert_eq!(names(&part.weights), theirs);
        assert!(line(model.part(Part::QFormer)).contains("has no Q-Former or BERT; supported: bert, blip-2"));
    }
}

#[test]
fn a_chat_model_gives_its_language_model() {
    let ours = ["language_model.lm_head.weight", "language_model.model.norm.weight"];
    let files = ["language_model.lm_head.weight", "language_model.model.norm.weight", "vision_tower.a.weight"];
    let classes = ["lm_head.weight", "model.language_model.norm.weight", "model.vision_tower.a.weight"];
    for (whole, language) in [("gemma3", "gemma3_text"), ("llava", "llama"), ("mistral3", "mistral")] {
        for theirs in [files, classes] {
            let directory = tempfile::tempdir().unwrap();
            let config = json!({"model_type": whole, "text_config": {"hidden_size": 8}, "vision_config": {}});
            write_model(directory.path(), &config, &theirs.map(|name| (name, &[1i64][..])));
            let model = ModelDir::open(directory.path()).unwrap();
            let part = model.part(Part::Language).unwrap();
            assert_eq!(part.config, &json!({"model_type": language, "hidden_size": 8}));
            assert_eq!(names(&part.weights), ours, "{whole}");
            assert!(line(model.part(Part::Vision)).contains(&format!("model_type \"{whole}\" has no image encoder")));
        }
    }
    let directory = tempfile::tempdir().unwrap();
    let config = json!({"model_type": "llava", "text_config": {"model_type": "rwkv"}});
    write_model(directory.path(), &config, &[("language_model.model.norm.weight", &[1])]);
    let message = line(ModelDir::open(directory.path()).unwrap().part(Part::Language));
    assert!(message.contains("model_type \"rwkv\" has no language model; supported: llama, mistral,"), "{message}");
}

#[test]
fn a_t5_with_its_shared_embedding_once_or_thrice() {
    let names = ["shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"];
    let ours = tower_names("t5", Part::Language, &names);
    assert_eq!(
        ours,
        [
            "language_model.decoder.embed_tokens.weight",
            "language_model.encoder.embed_tokens.weight",
            "language_model.lm_head.weight",
            "language_model.shared.weight",
        ]
    );
}

#[test]
fn a_head_is_compared_with_the_embedding_when_the_language_model_is_asked_for() {
    let directory = tempfile::tempdir().unwrap();
    let config = json!({"model_type": "blip-2", "vision_config": {}, "text_config": {"model_type": "t5"}});
    let ours: [(&str, &[i64]); 3] = [
        ("language_model.lm_head.weight", &[2]),
        ("language_model.shared.weight", &[2]),
        ("vision_model.embeddings.class_embedding", &[1]),
    ];
    write_model(directory.path(), &config, &ours);
    let model = ModelDir::open(directory.path()).unwrap();
    assert_eq!(names(&model.part(Part::Vision).unwrap().weights), [ours[2].0]);
    for message in [line(model.part(Part::Language)), line(model.corrected_config())] {
        assert!(message.contains("lm_head.weight differs from language_model.shared.weight"), "{message}");
    }

    let mut own = config.clone();
    own["text_config"]["scale_decoder_outputs"] = json!(false);
    write_model(directory.path(), &own, &ours);
    let model = ModelDir::open(directory.path()).unwrap();
    assert_eq!(model.config(), &own);
    assert_eq!(model.part(Part::Language).unwrap().config["tie_word_embeddings"], false);
    assert_eq!(model.corrected_config().unwrap()["text_config"]["tie_word_embeddings"], false);
}

#[test]
fn a_llama_with_head_or_base_alone() {
    let headed = tower_names("llama", Part::Language, &["lm_head.weight", "model.norm.weight"]);
    assert_eq!(headed, ["language_model.lm_head.weight", "language_model.model.norm.weight"]);
    assert_eq!(tower_names("llama", Part::Language, &["norm.weight"]), ["language_model.model.norm.weight"]);
}

#[test]
fn an_opt_of_any_age_and_a_gpt2() {
    let expected = ["language_model.lm_head.weight", "language_model.model.decoder.embed_tokens.weight"];
    assert_eq!(tower_names("opt", Part::Language, &["lm_head.weight", "model.decoder.embed_tokens.weight"]), expected);
    assert_eq!(tower_names("opt", Part::Language, &["decoder.embed_tokens.weight"]), expected[1..]);
    let expected = ["language_model.transformer.h.0.attn.c_attn.weight"];
    assert_eq!(tower_names("gpt2", Part::Language, &["transformer.h.0.attn.c_attn.weight"]), expected);
    assert_eq!(tower_names("gpt2", Part::Language, &["h.0.attn.c_attn.weight"]), expected);
}

#[test]
fn a_bert_of_any_age() {
    let expected = ["cls.predictions.transform.LayerNorm.bias", "embeddings.LayerNorm.weight"];
    let old = ["cls.predictions.transform.LayerNorm.beta", "bert.embeddings.LayerNorm.gamma"];
    assert_eq!(tower_names("bert", Part::QFormer, &old), expected);
    let new = ["cls.predictions.transform.LayerNorm.bias", "embeddings.LayerNorm.weight"];
    assert_eq!(tower_names("bert", Part::QFormer, &new), expected);
}

#[test]
fn a_part_reads_the_file_s_tensor() {
    let directory = tempfile::tempdir().unwrap();
    write_model(directory.path(), &json!({"model_type": "bert"}), &[("bert.embeddings.LayerNorm.gamma", &[3])]);
    let model = ModelDir::open(directory.path()).unwrap();
    let part = model.part(Part::QFormer).unwrap();
    let read = part.weights.read("embeddings.LayerNorm.weight").unwrap();
    assert!(identical(&read, &numbered("bert.embeddings.LayerNorm.gamma", &[3])));
}

#[test]
fn two_tensors_of_one_name() {
    let directory = tempfile::tempdir().unwrap();
    let twice: [(&str, &[i64]); 2] = [("bert.pooler.dense.bias", &[1]), ("pooler.dense.bias", &[1])];
    write_model(directory.path(), &json!({"model_type": "bert"}), &twice);
    let model = ModelDir::open(directory.path()).unwrap();
    assert!(matches!(model.part(Part::QFormer), Err(WeightsError::RepeatedTensor { .. })));
}

#[test]
fn a_part_that_is_not_there() {
    let directory = tempfile::tempdir().unwrap();
    write_model(directory.path(), &json!({"model_type": "resnet"}), &[("a", &[1])]);
    let model = ModelDir::open(directory.path()).unwrap();
    let message = line(model.part(Part::Vision));
    assert!(message.contains(
        r#"model_type "resnet" has no image encoder; supported: aimv2_vision_model, blip_2_vision_model, clip_vision_model, dinov2, dinov2_with_registers, dinov3_vit, siglip_vision_model, vit, aimv2, clip, siglip, blip-2 (SigLIP 2"#
    ));
    write_model(directory.path(), &json!({"model_type": "blip-2", "text_config": 3}), &[("a", &[1])]);
    let model = ModelDir::open(directory.path()).unwrap();
    assert!(line(model.part(Part::Language)).ends_with("text_config: expected an object, got 3"));
    assert!(line(model.part(Part::Vision)).ends_with("vision_config: expected an object, got nothing"));
}

#[test]
fn a_directory_without_a_valid_config() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    assert!(line(ModelDir::open(&path.join("absent"))).ends_with("no such file or directory"));
    assert!(line(ModelDir::open(path)).contains("no config.json"));
    for (config, expected) in [
        ("", "invalid JSON"),
        ("{\"model_type\": \"a\", \"model_type\": \"b\"}", "key \"model_type\" appears twice"),
        ("{}", "model_type: expected a string, got nothing"),
        ("{\"model_type\": 7}", "model_type: expected a string, got 7"),
        ("version https://git-lfs.github.com/spec/v1", "git lfs pull"),
    ] {
        fs::write(path.join("config.json"), config).unwrap();
        let message = line(ModelDir::open(path));
        assert!(message.contains(expected), "{message}");
    }
    fs::write(path.join("config.json"), [b'{', 0xff]).unwrap();
    assert!(line(ModelDir::open(path)).contains("invalid JSON"));
}
