//! An export is the run's checkpoint with its frozen towers, in a directory that works alone.

use std::fs;
use std::path::{Path, PathBuf};

use blip2_torchx::params::TensorSource;
use blip2_trainer::Error;
use blip2_trainer::captioner::{CaptionOptions, Captioner, Decoding};
use blip2_trainer::checkpoint::{CheckpointError, CheckpointStore, Metric};
use blip2_trainer::config::{BestMetric, Precision, Stage};
use blip2_trainer::export::{FrozenTowers, export_checkpoint};
use blip2_trainer::hub::Hub;
use blip2_trainer::model_files::ModelFiles;
use blip2_trainer::ranks::Alone;
use blip2_trainer::replay::{ReplayOptions, replay};
use blip2_weights::{ModelDir, Part, save_safetensors};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

fn golden(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(case)
}

/// A run whose checkpoints hold a golden case's trained half; its towers are the golden case's.
struct RunOf {
    folder: tempfile::TempDir,
    case: PathBuf,
}

impl RunOf {
    fn new(case: &str, stage: u8, more: &str) -> RunOf {
        RunOf::of(golden(case), stage, more)
    }

    fn of(case: PathBuf, stage: u8, more: &str) -> RunOf {
        let run = RunOf { folder: tempfile::tempdir().unwrap(), case };
        let case = run.case.display();
        let language = if stage == 2 { format!(", language: {{weights: {case}}}") } else { String::new() };
        let yaml = format!(
            "run: {{dir: {}, name: run}}\ntask: {{stage: {stage}}}\n\
             model: {{vision: {{weights: {case}}}, qformer: {{init: {case}, query_tokens: 8}}{language}}}\n\
             data: {{train: [{{shards: s.tar}}], image: {{size: 32}}}}\n{more}",
            run.folder.path().display()
        );
        fs::create_dir_all(run.path().join("tokenizer")).unwrap();
        fs::write(run.path().join("config.yaml"), yaml).unwrap();
        let tokenizer = golden("stage2_llama").join("tokenizer.json");
        fs::copy(tokenizer, run.path().join("tokenizer/tokenizer.json")).unwrap();
        run
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("run")
    }

    fn out(&self) -> PathBuf {
        self.folder.path().join("out")
    }

    fn step(&self, step: u64) -> PathBuf {
        self.path().join(format!("checkpoints/step_{step:08}"))
    }

    /// Writes a checkpoint in which every trained tensor is the golden one plus `shift`.
    fn checkpoint(&self, step: u64, metric: Option<f64>, shift: f64) {
        let model = ModelDir::open(&self.case).unwrap();
        let part = model.part(Part::QFormer).unwrap().weights;
        let trained: Vec<(String, Tensor)> =
            part.entries().into_iter().map(|(name, _)| (name.clone(), part.read(&name).unwrap() + shift)).collect();
        let file = self.folder.path().join("trained.safetensors");
        save_safetensors(&trained, &Default::default(), &file).unwrap();
        let mut config = model.config().clone();
        if config.get("text_config").is_some() {
            config["before_queries"] = json!([2]);
        }
        let metric = metric.map(|value| Metric { name: BestMetric::ValLoss.as_str().into(), value });
        let store = CheckpointStore::open(&self.path().join("checkpoints"), 10, None).unwrap();
        let write = |folder: &mut blip2_trainer::checkpoint::CheckpointFolder| -> Result<(), CheckpointError> {
            folder.file("model.safetensors", |out| out.write_all(&fs::read(&file)?))?;
            folder.file("config.json", |out| out.write_all(config.to_string().as_bytes()))
        };
        store.write(step, metric, write).unwrap();
    }
}

fn read_json(path: PathBuf) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

#[test]
fn stage_2_captions_as_the_model_it_came_from() {
    let run = RunOf::new("stage2_llama", 2, "");
    run.checkpoint(10, None, 0.0);
    let exported = export_checkpoint(&run.path(), &run.out(), FrozenTowers::Copied, &Hub::local()).unwrap();
    assert_eq!((exported.step, exported.rejected.len()), (10, 0));
    // Its tokenizer has a word there.
    let [remark] = exported.remarks.as_slice() else { panic!("{:?}", exported.remarks) };
    assert!(remark.starts_with("Blip2Processor does not put in the queries' places"), "{remark}");

    let config = read_json(run.out().join("config.json"));
    assert_eq!(config["before_queries"], json!([2]));
    assert_eq!(config["image_token_index"], read_json(golden("stage2_llama").join("config.json"))["image_token_index"]);
    let size = &read_json(run.out().join("preprocessor_config.json"))["size"];
    assert_eq!(size, &json!({"height": 32, "width": 32}));

    // The same weights with the same tokens in front, put together by hand.
    let by_hand = tempfile::tempdir().unwrap();
    for file in ["model.safetensors", "tokenizer.json", "generation_config.json"] {
        fs::copy(golden("stage2_llama").join(file), by_hand.path().join(file)).unwrap();
    }
    let mut config = read_json(golden("stage2_llama").join("config.json"));
    config["before_queries"] = json!([2]);
    fs::write(by_hand.path().join("config.json"), config.to_string()).unwrap();
    let images: Vec<PathBuf> = (0..6).map(|i| golden("stage2_llama").join(format!("image_{i}.png"))).collect();
    let options = CaptionOptions { max_new_tokens: 8, min_new_tokens: 0, decoding: Decoding::Greedy };
    let captions = |dir: &Path| -> Vec<_> {
        let captioner = Captioner::open(dir, Device::Cpu, None).unwrap();
        captioner.caption(&images, &[], &options).unwrap().flat_map(Result::unwrap).collect()
    };
    assert_eq!(captions(&run.out()), captions(by_hand.path()));
}

#[test]
fn trained_weights_alone_are_completed_from_the_towers_they_name() {
    let towers = tempfile::tempdir().unwrap();
    for file in ["model.safetensors", "tokenizer.json", "generation_config.json", "config.json"] {
        fs::copy(golden("stage2_llama").join(file), towers.path().join(file)).unwrap();
    }
    let run = RunOf::of(towers.path().to_path_buf(), 2, "");
    run.checkpoint(10, None, 0.0);
    let alone = run.folder.path().join("alone");
    export_checkpoint(&run.path(), &run.out(), FrozenTowers::Copied, &Hub::local()).unwrap();
    export_checkpoint(&run.path(), &alone, FrozenTowers::Named, &Hub::local()).unwrap();

    let weights = ModelDir::open(&alone).unwrap();
    let names: Vec<String> = weights.weights().entries().into_iter().map(|(name, _)| name).collect();
    let frozen = |name: &String| {
        name.starts_with("language_model.") || (name.starts_with("vision_model.") && !name.contains("post_layernorm"))
    };
    assert!(!names.is_empty() && !names.iter().any(frozen), "{names:?}");

    let images = [golden("stage2_llama").join("image_0.png"), golden("stage2_llama").join("image_1.png")];
    let options = CaptionOptions { max_new_tokens: 8, min_new_tokens: 0, decoding: Decoding::Greedy };
    let captions = |dir: &Path| -> Vec<_> {
        let captioner = Captioner::open(dir, Device::Cpu, None).unwrap();
        captioner.caption(&images, &[], &options).unwrap().flat_map(Result::unwrap).collect()
    };
    assert_eq!(captions(&alone), captions(&run.out()));
    let parts = blip2_trainer::fit::fit(&alone).unwrap().unwrap();
    assert!(parts[0].frozen_elsewhere > 0 && parts[2].frozen_elsewhere > 0 && parts[1].loaded > 0);

    let refused = || Captioner::open(&alone, Device::Cpu, None).err().unwrap().to_string();
    let config = read_json(alone.join("config.json"));
    let mut circular = config.clone();
    circular["frozen_weights"]["vision"]["path"] = json!(".");
    fs::write(alone.join("config.json"), circular.to_string()).unwrap();
    let said = "frozen_weights.vision.path: expected a folder that holds the image encoder, got ";
    assert!(refused().contains(said), "{}", refused());
    fs::write(alone.join("config.json"), config.to_string()).unwrap();
    let file = towers.path().join("model.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&file, bytes).unwrap();
    assert!(refused().contains("was trained with (BLAKE3 "), "{}", refused());
    drop(towers);
    let message = refused();
    assert!(
        message.contains("frozen_weights.vision.path: ") && message.contains(" is not there; it is the image encoder"),
        "{message}"
    );
}

#[test]
fn a_tower_used_at_another_size_leaves_with_its_positions_for_that_size() {
    let run = RunOf::new("stage2_llama", 2, "");
    let yaml = run.path().join("config.yaml");
    fs::write(&yaml, fs::read_to_string(&yaml).unwrap().replace("size: 32", "size: 48")).unwrap();
    run.checkpoint(10, None, 0.0);
    let alone = run.folder.path().join("alone");
    export_checkpoint(&run.path(), &run.out(), FrozenTowers::Copied, &Hub::local()).unwrap();
    export_checkpoint(&run.path(), &alone, FrozenTowers::Named, &Hub::local()).unwrap();
    assert_eq!(read_json(run.out().join("config.json"))["vision_config"]["image_size"], 48);
    let table = "vision_model.embeddings.position_embedding";
    assert_eq!(ModelDir::open(&run.out()).unwrap().weights().read(table).unwrap().size(), [1, 37, 40]);
    // A tower that is only named stays what it is.
    assert_eq!(read_json(alone.join("config.json"))["vision_config"]["image_size"], 32);

    let pixels = Tensor::randn([2, 3, 48, 48], (Kind::Float, Device::Cpu));
    let features = |dir: &Path| {
        let encoder = ModelFiles::open(dir).unwrap().image_encoder(Device::Cpu, Kind::Float).unwrap();
        encoder.features_of_normalised(&pixels)
    };
    let expected = features(&golden("stage2_llama"));
    assert!(features(&run.out()).equal(&expected) && features(&alone).equal(&expected));
}

#[test]
fn a_vocabulary_without_an_id_for_the_queries_is_told() {
    let case = tempfile::tempdir().unwrap();
    for file in ["model.safetensors", "generation_config.json"] {
        fs::copy(golden("stage2_llama").join(file), case.path().join(file)).unwrap();
    }
    let mut config = read_json(golden("stage2_llama").join("config.json"));
    config["image_token_index"] = Value::Null;
    fs::write(case.path().join("config.json"), config.to_string()).unwrap();
    let run = RunOf::of(case.path().to_path_buf(), 2, "");
    run.checkpoint(10, None, 0.0);
    let size = config["text_config"]["vocab_size"].as_i64().unwrap();
    let vocabulary: serde_json::Map<String, Value> = (0..size).map(|id| (format!("t{id}"), json!(id))).collect();
    let remarks = |more: Value| {
        let mut model = json!({"type": "BPE", "vocab": vocabulary});
        model.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let tokenizer = json!({"model": model, "added_tokens": []}).to_string();
        fs::write(run.path().join("tokenizer/tokenizer.json"), tokenizer).unwrap();
        let exported = export_checkpoint(&run.path(), &run.out(), FrozenTowers::Copied, &Hub::local()).unwrap();
        (read_json(run.out().join("config.json"))["image_token_index"].clone(), exported.remarks)
    };
    let (index, said) = remarks(json!({}));
    assert!(index.is_null() && said.len() == 1 && said[0].ends_with("no id left for the queries"), "{said:?}");
    // The golden case fills its batches with token 1.
    let (index, said) = remarks(json!({"byte_fallback": true, "unk_token": "t1"}));
    assert!(index == 1 && said.len() == 2 && said[0].contains("with which its tokenizer fills batches"), "{said:?}");
    let (index, said) = remarks(json!({"byte_fallback": true, "unk_token": "t0"}));
    assert!(
        index == 0
            && said.len() == 1
            && said[0].contains("put token 0 (image_token_index) before each prompt's ids, 8 times"),
        "{said:?}"
    );
}

/// A golden case whose language model has these end tokens, with a tokenizer that has a token for each id, the last two special.
fn with_ends(own: Option<Value>, of_generation: Value) -> (tempfile::TempDir, RunOf) {
    let case = tempfile::tempdir().unwrap();
    fs::copy(golden("stage2_llama").join("model.safetensors"), case.path().join("model.safetensors")).unwrap();
    let mut config = read_json(golden("stage2_llama").join("config.json"));
    config["image_token_index"] = Value::Null;
    let text = config["text_config"].as_object_mut().unwrap();
    text.remove("eos_token_id");
    text.extend(own.map(|own| ("eos_token_id".to_string(), own)));
    fs::write(case.path().join("config.json"), config.to_string()).unwrap();
    let generation = json!({"eos_token_id": of_generation, "pad_token_id": 1});
    fs::write(case.path().join("generation_config.json"), generation.to_string()).unwrap();
    let run = RunOf::of(case.path().to_path_buf(), 2, "");
    run.checkpoint(10, None, 0.0);
    let vocabulary: serde_json::Map<String, Value> = (0..120).map(|id| (format!("t{id}"), json!(id))).collect();
    let special = [118, 119].map(|id| json!({"id": id, "content": format!("t{id}"), "special": true}));
    let tokenizer = json!({"model": {"type": "BPE", "vocab": vocabulary}, "added_tokens": special});
    fs::write(run.path().join("tokenizer/tokenizer.json"), tokenizer.to_string()).unwrap();
    (case, run)
}

#[test]
fn a_text_ends_by_the_same_tokens_here_and_in_transformers() {
    for (own, of_generation, expected, image_token) in [
        (Some(json!(3)), json!(3), json!(3), 119),
        (Some(json!(3)), json!([119, 3]), json!([3, 119]), 118),
        (Some(json!([3, 5])), json!(7), json!([3, 5, 7]), 119),
        // Llama's own is 2.
        (None, json!(7), json!([2, 7]), 119),
    ] {
        let (_case, run) = with_ends(own, of_generation);
        export_checkpoint(&run.path(), &run.out(), FrozenTowers::Copied, &Hub::local()).unwrap();
        let config = read_json(run.out().join("config.json"));
        assert_eq!(config["text_config"]["eos_token_id"], expected);
        assert_eq!(read_json(run.out().join("generation_config.json"))["eos_token_id"], expected);
        assert_eq!(config["image_token_index"], image_token, "a token that ends texts is none for the queries");
    }
}

#[test]
fn a_t5_without_a_prompt_reads_behind_the_queries_what_it_was_trained_with_in_transformers_too() {
    let run = RunOf::new("stage2_t5", 2, "");
    run.checkpoint(10, None, 0.0);
    let exported = || {
        export_checkpoint(&run.path(), &run.out(), FrozenTowers::Copied, &Hub::local()).unwrap();
        let text = read_json(run.out().join("config.json"))["text_config"].take();
        (text["bos_token_id"].clone(), text["eos_token_id"].clone())
    };
    assert_eq!(exported(), (Value::Null, json!(1)), "this tokenizer adds nothing");
    let file = run.path().join("tokenizer/tokenizer.json");
    let mut tokenizer = read_json(file.clone());
    let (text, end) =
        (json!({"Sequence": {"id": "A", "type_id": 0}}), json!({"SpecialToken": {"id": "t1", "type_id": 0}}));
    tokenizer["post_processor"] = json!({
        "type": "TemplateProcessing", "single": [text, end], "pair": [text, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"t1": {"id": "t1", "ids": [1], "tokens": ["t1"]}},
    });
    fs::write(file, tokenizer.to_string()).unwrap();
    assert_eq!(exported(), (json!(1), json!(1)));
}

#[test]
fn a_tower_s_relative_path_is_not_handed_on() {
    let first = RunOf::new("stage2_llama", 2, "");
    first.checkpoint(10, None, 0.0);
    export_checkpoint(&first.path(), &first.out(), FrozenTowers::Named, &Hub::local()).unwrap();
    let towers = first.folder.path().join("towers");
    fs::create_dir(&towers).unwrap();
    for file in ["model.safetensors", "config.json"] {
        fs::copy(golden("stage2_llama").join(file), towers.join(file)).unwrap();
    }
    let mut config = read_json(first.out().join("config.json"));
    for part in ["vision", "language"] {
        config["frozen_weights"][part]["path"] = json!("../towers");
    }
    fs::write(first.out().join("config.json"), config.to_string()).unwrap();

    let second = RunOf::of(first.out(), 2, "");
    second.checkpoint(10, None, 0.0);
    export_checkpoint(&second.path(), &second.out(), FrozenTowers::Named, &Hub::local()).unwrap();
    let named = &read_json(second.out().join("config.json"))["frozen_weights"];
    for part in ["vision", "language"] {
        assert_eq!(Path::new(named[part]["path"].as_str().unwrap()), towers.canonicalize().unwrap(), "{part}");
    }
}

#[test]
fn stage_1_replays_as_the_model_it_came_from() {
    let run = RunOf::new("stage1", 1, "");
    run.checkpoint(10, None, 0.0);
    export_checkpoint(&run.path(), &run.out(), FrozenTowers::Copied, &Hub::local()).unwrap();
    let losses = |model: PathBuf| {
        replay(
            &ReplayOptions {
                model: model.into(),
                stage: Stage::One,
                batch: golden("stage1").join("batch.safetensors"),
                out: run.folder.path().join("replay.safetensors"),
                precision: Precision::Fp32,
                device: Device::Cpu,
            },
            &Alone,
        )
        .unwrap()
    };
    assert_eq!(losses(run.out()), losses(golden("stage1")));
}

#[test]
fn the_newest_checkpoint_is_taken_and_the_best_where_one_is_asked_for() {
    let newest = |more: &str| {
        let run = RunOf::new("stage2_llama", 2, more);
        run.checkpoint(10, Some(1.0), 0.0);
        run.checkpoint(20, Some(0.5), 0.01);
        run.checkpoint(30, Some(0.7), 0.02);
        let step = export_checkpoint(&run.path(), &run.out(), FrozenTowers::Copied, &Hub::local()).unwrap().step;
        (run, step)
    };
    assert_eq!(newest("").1, 30);
    let (run, step) = newest("checkpoint: {best: val_loss}\n");
    assert_eq!(step, 20);
    assert_eq!(export_checkpoint(&run.step(10), &run.out(), FrozenTowers::Copied, &Hub::local()).unwrap().step, 10);
    let exported = ModelDir::open(&run.out()).unwrap();
    let golden = ModelDir::open(&golden("stage2_llama")).unwrap();
    assert!(exported.weights().read("query_tokens").unwrap().equal(&golden.weights().read("query_tokens").unwrap()));
}

#[test]
fn a_damaged_checkpoint_is_passed_over_and_told() {
    let run = RunOf::new("stage2_llama", 2, "checkpoint: {best: val_loss}\n");
    run.checkpoint(10, None, 0.0);
    run.checkpoint(20, Some(0.5), 0.0);
    let file = run.step(20).join("model.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&file, bytes).unwrap();
    let exported = export_checkpoint(&run.path(), &run.out(), FrozenTowers::Copied, &Hub::local()).unwrap();
    assert_eq!((exported.step, exported.rejected.len()), (10, 1));
    assert_eq!(exported.rejected[0].path, run.step(20).canonicalize().unwrap());
    let error = export_checkpoint(&run.step(20), &run.out(), FrozenTowers::Copied, &Hub::local()).unwrap_err();
    assert!(matches!(error, Error::Checkpoint(CheckpointError::Damaged { .. })), "{error}");
}

#[test]
fn a_checkpoint_that_is_being_written_is_left_alone() {
    let run = RunOf::new("stage2_llama", 2, "");
    run.checkpoint(10, None, 0.0);
    let writing = run.path().join("checkpoints/.writing-step_00000020");
    fs::create_dir(&writing).unwrap();
    assert_eq!(export_checkpoint(&run.path(), &run.out(), FrozenTowers::Copied, &Hub::local()).unwrap().step, 10);
    assert!(writing.exists());
}

#[test]
fn a_run_without_a_checkpoint_is_told() {
    let run = RunOf::new("stage2_llama", 2, "");
    fs::create_dir(run.path().join("checkpoints")).unwrap();
    let message =
        export_checkpoint(&run.path(), &run.out(), FrozenTowers::Copied, &Hub::local()).unwrap_err().to_string();
    assert!(message.ends_with("expected a run with a checkpoint, found none; train it first"), "{message}");
}
