//! Exports: what Hugging Face's classes expect, and nothing lost.

use std::fs;
use std::path::{Path, PathBuf};

use blip2_torchx::params::{Init, LoadPlan, ParamStore, TensorSource};
use blip2_weights::{
    DEFAULT_MAX_SHARD_BYTES, Export, ExportTask, ImagePreprocessing, ModelDir, Part, Stage, Towers, WeightsError,
    pretraining_head, trained_names,
};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use crate::fixtures::{golden, identical, line, names, numbered, write_model};

pub fn trained(model: &ModelDir) -> Vec<(String, Tensor)> {
    let part = model.part(Part::QFormer).unwrap().weights;
    names(&part).into_iter().map(|name| (name.clone(), part.read(&name).unwrap())).collect()
}

pub fn export<'a>(task: ExportTask<'a>, trained: &'a [(String, Tensor)], vision: &'a ModelDir) -> Export<'a> {
    let qformer_config = json!({
        "vocab_size": 300, "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 96,
        "max_position_embeddings": 64, "cross_attention_frequency": 2, "encoder_hidden_size": 40,
    });
    Export {
        task,
        trained,
        vision,
        vision_depth: 3,
        positions: None,
        qformer_config,
        num_query_tokens: 8,
        image: ImagePreprocessing {
            size: 32,
            resample: 2,
            rescale_factor: 0.25,
            mean: [0.5, 0.4, 0.3],
            std: [0.2, 0.2, 0.1],
        },
        tokenizer: None,
        towers: Towers::Copied,
        max_shard_bytes: DEFAULT_MAX_SHARD_BYTES,
    }
}

fn stage1_task() -> ExportTask<'static> {
    ExportTask::Stage1 { image_text_hidden_size: 24, decoder_start_token_id: 299 }
}

pub fn stage2_task(language: &ModelDir) -> ExportTask<'_> {
    let text_config = language.part(Part::Language).unwrap().config;
    ExportTask::Stage2 { language, text_config, before_queries: Some(&[2]), image_token_index: Some(119) }
}

pub fn read_json(path: PathBuf) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn assert_same_tensors(a: &dyn TensorSource, b: &dyn TensorSource) {
    assert_eq!(names(a), names(b));
    for name in names(a) {
        assert!(identical(&a.read(&name).unwrap(), &b.read(&name).unwrap()), "{name}");
    }
}

/// Kept under the target directory, so that a person can load the result in `transformers`.
fn kept(name: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(name)
}

#[test]
fn stage_1_goes_there_and_back() {
    let model = ModelDir::open(&golden("stage1")).unwrap();
    let (out, trained) = (kept("export_stage1"), trained(&model));
    export(stage1_task(), &trained, &model).write(&out).unwrap();
    let read = ModelDir::open(&out).unwrap();
    assert_same_tensors(read.weights(), model.weights());

    let main = blip2_weights::SafetensorsFile::open(&out.join("model.safetensors")).unwrap();
    assert!(!names(&main).iter().any(|name| pretraining_head(name)), "transformers knows no such key");
    assert_eq!(main.metadata()["format"], "pt");
    let heads = blip2_weights::SafetensorsFile::open(&out.join("pretraining_heads.safetensors")).unwrap();
    let expected = trained_names(Stage::One, 4, 2).into_iter().filter(|name| pretraining_head(name));
    assert_eq!(names(&heads), expected.collect::<Vec<_>>());

    let config = read.config();
    assert_eq!(config["architectures"], json!(["Blip2ForImageTextRetrieval"]));
    assert_eq!(config["qformer_decoder_start_token_id"], 299);
    assert_eq!(config["image_text_hidden_size"], 24);
    assert_eq!(config["num_query_tokens"], 8);
    assert_eq!(config["qformer_config"]["use_qformer_text_input"], true);
    assert_eq!(config["dtype"], "float32");
    assert!(config.get("vision_feature_layer").is_none() && config.get("before_queries").is_none());
    let preprocessor = read_json(out.join("preprocessor_config.json"));
    assert_eq!(preprocessor["size"], json!({"height": 32, "width": 32}));
    assert_eq!(preprocessor["resample"], 2);
    assert_eq!(preprocessor["rescale_factor"], 0.25);
    assert_eq!(preprocessor["image_mean"], json!([0.5, 0.4, 0.3]));
}

#[test]
fn stage_2_goes_there_and_back_in_shards() {
    let model = ModelDir::open(&golden("stage2_llama")).unwrap();
    let (out, trained) = (kept("export_stage2_llama"), trained(&model));
    let export = Export {
        max_shard_bytes: 100_000,
        tokenizer: Some(model.path()),
        ..export(stage2_task(&model), &trained, &model)
    };
    export.write(&out).unwrap();
    let read = ModelDir::open(&out).unwrap();
    assert_same_tensors(read.weights(), model.weights());
    assert!(!out.join("model.safetensors").exists() && !out.join("pretraining_heads.safetensors").exists());

    let index = read_json(out.join("model.safetensors.index.json"));
    let files = read.weights().files();
    assert!(files.len() > 2);
    for (i, file) in files.iter().enumerate() {
        let name = format!("model-{:05}-of-{:05}.safetensors", i + 1, files.len());
        assert_eq!(file.path(), out.join(&name));
        assert!(names(file).iter().all(|tensor| index["weight_map"][tensor] == name.as_str()));
        let bytes = fs::metadata(file.path()).unwrap().len();
        assert!(bytes < 120_000, "{name} has {bytes} bytes");
    }
    assert_eq!(fs::read(out.join("tokenizer.json")).unwrap(), fs::read(model.path().join("tokenizer.json")).unwrap());
    let config = read.config();
    assert_eq!(config["architectures"], json!(["Blip2ForConditionalGeneration"]));
    assert_eq!(config["before_queries"], json!([2]));
    assert_eq!(config["image_token_index"], 119);
    assert_eq!(config["text_config"], model.config()["text_config"]);
    assert_eq!(config["qformer_config"]["use_qformer_text_input"], false);
    let generation = |directory: &Path| read_json(directory.join("generation_config.json"));
    assert_eq!(generation(&out), generation(model.path()));
}

/// A DINOv2 in bf16 and a llama with a tied head, as their own directories hold them.
fn towers(directory: &Path) -> (ModelDir, ModelDir) {
    let (vision, language) = (directory.join("dinov2"), directory.join("llama"));
    let blocks: Vec<String> = (0..4).map(|i| format!("encoder.layer.{i}.norm1.weight")).collect();
    let mut shapes: Vec<(&str, &[i64])> = blocks.iter().map(|name| (name.as_str(), &[40i64][..])).collect();
    shapes.extend([("embeddings.mask_token", &[1, 40][..]), ("layernorm.weight", &[40])]);
    let dinov2 = json!({
        "model_type": "dinov2", "num_hidden_layers": 4, "hidden_size": 40, "out_features": ["stage4"], "out_indices": [4],
        "stage_names": ["stem", "stage1", "stage2", "stage3", "stage4"],
    });
    write_model(&vision, &dinov2, &shapes);
    let bf16: Vec<(String, Tensor)> =
        shapes.iter().map(|(name, shape)| (name.to_string(), numbered(name, shape).to_kind(Kind::BFloat16))).collect();
    blip2_weights::save_safetensors(&bf16, &Default::default(), &vision.join("model.safetensors")).unwrap();
    let config = json!({"model_type": "llama", "tie_word_embeddings": true, "bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": null});
    let shapes: [(&str, &[i64]); 3] = [
        ("model.embed_tokens.weight", &[5, 32]),
        ("lm_head.weight", &[5, 32]),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", &[4]),
    ];
    write_model(&language, &config, &shapes);
    let embedding = "model.embed_tokens.weight";
    let tied = |name: &str| if name == "lm_head.weight" { embedding.to_string() } else { name.to_string() };
    let tensors: Vec<(String, Tensor)> =
        shapes.iter().map(|(name, shape)| (name.to_string(), numbered(&tied(name), shape))).collect();
    blip2_weights::save_safetensors(&tensors, &Default::default(), &language.join("model.safetensors")).unwrap();
    (ModelDir::open(&vision).unwrap(), ModelDir::open(&language).unwrap())
}

#[test]
fn the_end_of_what_was_trained_on_replaces_the_language_model_s_own() {
    let model = ModelDir::open(&golden("stage2_llama")).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let mut text_config = model.part(Part::Language).unwrap().config.clone();
    text_config["eos_token_id"] = json!(7);
    let (language, text_config) = (&model, &text_config);
    let task = ExportTask::Stage2 { language, text_config, before_queries: Some(&[]), image_token_index: None };
    let out = directory.path().join("export");
    export(task, &trained(&model), &model).write(&out).unwrap();
    assert_eq!(read_json(out.join("config.json"))["text_config"]["eos_token_id"], 7);
    let generation = read_json(out.join("generation_config.json"));
    assert_eq!((&generation["eos_token_id"], &generation["pad_token_id"]), (&json!(7), &json!(1)));
}

#[test]
fn other_towers_keep_their_dtype_and_only_what_is_used() {
    let directory = tempfile::tempdir().unwrap();
    let (vision, language) = towers(directory.path());
    let trained = trained(&ModelDir::open(&golden("stage2_llama")).unwrap());
    let out = directory.path().join("new").join("export");
    export(stage2_task(&language), &trained, &vision).write(&out).unwrap();

    let read = ModelDir::open(&out).unwrap();
    let part = |part| read.part(part).unwrap();
    assert_eq!(part(Part::Vision).config["num_hidden_layers"], 3);
    // What names the block that is gone would stop the class.
    for key in ["out_features", "out_indices", "stage_names"] {
        assert!(part(Part::Vision).config.get(key).is_none(), "{key}");
    }
    assert_eq!(read.config()["vision_feature_layer"], 3);
    assert_eq!(names(&part(Part::Language).weights), ["language_model.model.embed_tokens.weight"]);
    assert_eq!(read_json(out.join("generation_config.json")), json!({"bos_token_id": 1, "eos_token_id": [2, 3]}));
    assert_eq!(read_json(out.join("processor_config.json"))["num_query_tokens"], 8);

    let frozen = ParamStore::frozen(Device::Cpu, Kind::BFloat16);
    for i in 0..3 {
        let name = format!("vision_model.encoder.layer.{i}.norm1.weight");
        let _ = frozen.root().param(&name, &[40], Init::Zeros);
    }
    let report = frozen.load(&part(Part::Vision).weights, &LoadPlan::exact()).unwrap();
    assert!(report.cast.is_empty(), "stored as they were: {:?}", report.cast);
    let norm = numbered("encoder.layer.2.norm1.weight", &[40]).to_kind(Kind::BFloat16);
    assert!(identical(&frozen.get("vision_model.encoder.layer.2.norm1.weight").unwrap(), &norm));
}

#[test]
fn a_tower_shallower_than_asked_for() {
    let model = ModelDir::open(&golden("stage1")).unwrap();
    let trained = trained(&model);
    let directory = tempfile::tempdir().unwrap();
    for depth in [0, 4] {
        let export = Export { vision_depth: depth, ..export(stage1_task(), &trained, &model) };
        let message = line(export.write(&directory.path().join("out")));
        assert!(message.contains("num_hidden_layers: expected at least") && message.ends_with("got 3"), "{message}");
    }
}

#[test]
fn parameters_of_another_stage_are_refused() {
    let [one, two] = ["stage1", "stage2_llama"].map(|case| ModelDir::open(&golden(case)).unwrap());
    let trained = trained(&one);
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("out");
    match export(stage2_task(&two), &trained, &two).write(&out) {
        Err(WeightsError::TrainedNames { missing, unexpected, .. }) => {
            assert_eq!(missing, ["language_projection.bias", "language_projection.weight"]);
            assert!(unexpected.contains(&"temp".to_string()));
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn an_export_is_replaced_and_nothing_else_is() {
    let model = ModelDir::open(&golden("stage1")).unwrap();
    let trained = trained(&model);
    let write = |out: &Path| export(stage1_task(), &trained, &model).write(out);
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("out");
    fs::create_dir(&out).unwrap();
    write(&out).unwrap();
    write(&out).unwrap();
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "nothing is left beside it");

    fs::write(out.join("notes.txt"), "mine").unwrap();
    assert!(line(write(&out)).contains("it holds notes.txt"));
    fs::remove_file(out.join("notes.txt")).unwrap();
    fs::copy(golden("stage1").join("config.json"), out.join("config.json")).unwrap();
    assert!(line(write(&out)).contains("its config.json has no exported_by"), "a model of someone else's");
    assert!(line(write(&out.join("model.safetensors"))).contains("it is a file"));
    assert!(out.join("model.safetensors").exists());
}

#[test]
fn a_failed_export_leaves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let model = ModelDir::open(&golden("stage1")).unwrap();
    let mut trained = trained(&model);
    trained[0].1 = Tensor::zeros([1], (Kind::ComplexDouble, Device::Cpu));
    assert!(export(stage1_task(), &trained, &model).write(&directory.path().join("out")).is_err());
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
}
