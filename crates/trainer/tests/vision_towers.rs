//! Every image encoder against `transformers`: hidden states of small random-weight models (`scripts/fixtures/vision.py`) within 1e-5
//! relative (2-norm of the difference over that of the reference), fp32; and what becomes of the tensors that no tower uses.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use blip2_data::Filter;
use blip2_model::vision::{VisionConfig, VisionTower};
use blip2_model::{Blip2Config, Frozen, Stage1};
use blip2_torchx::params::{LoadReport, ParamStore, TensorSource};
use blip2_trainer::blueprint::Blueprint;
use blip2_trainer::config::{AutoOr, Config};
use blip2_trainer::encoder::check_image_size;
use blip2_trainer::model_files::{ModelFiles, load_image_encoder};
use blip2_trainer::preprocessing::Preprocessing;
use blip2_weights::{
    DEFAULT_MAX_SHARD_BYTES, Export, ExportTask, ModelDir, Part, SafetensorsFile, Towers, plans, unused_modules,
};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/vision").join(name)
}

fn config(dir: &ModelDir) -> VisionConfig {
    VisionConfig::from_json(dir.part(Part::Vision).unwrap().config).unwrap()
}

fn load(dir: &ModelDir, depth: i64) -> (Frozen<VisionTower>, LoadReport) {
    let config = config(dir);
    let tower = Frozen::build(Device::Cpu, Kind::Float, |root| config.build(&root.pp("vision_model"), depth));
    let part = dir.part(Part::Vision).unwrap();
    let report = tower.params().load(&part.weights, &plans::vision_tower(depth as usize)).unwrap();
    (tower, report)
}

fn relative(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    let norm = |t: &Tensor| t.to_kind(Kind::Double).norm().double_value(&[]);
    norm(&(a - b)) / norm(b)
}

#[test]
fn hidden_states_equal_transformers() {
    let mut names: Vec<String> =
        fs::read_dir(golden("")).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names.len(), 18, "{names:?}");
    for name in names {
        let dir = ModelDir::open(&golden(&name)).unwrap();
        let config = config(&dir);
        let expected = SafetensorsFile::open(&golden(&name).join("expected.safetensors")).unwrap();
        let (mut worst, mut sizes, mut compared) = (0.0f64, Vec::new(), 0);
        for depth in 0..=config.num_hidden_layers() {
            let (tower, _) = load(&dir, depth);
            for (key, _) in expected.entries() {
                let Some(size) = key.strip_prefix("pixels.").map(|size| size.parse::<i64>().unwrap()) else { continue };
                config.check_size(size).unwrap();
                let features = tower.features(&expected.read(&key).unwrap());
                assert_eq!(features.size()[1], config.tokens(size), "{name} at {size}");
                let error = relative(&features, &expected.read(&format!("hidden.{size}.{depth}")).unwrap());
                assert!(error <= 1e-5, "{name} at {size}, hidden state {depth}: {error:e}");
                worst = worst.max(error);
                compared += 1;
                if depth == 0 {
                    sizes.push(size);
                }
            }
        }
        assert_eq!(compared, sizes.len() as i64 * (config.num_hidden_layers() + 1));
        println!("{name}: {worst:.1e} at sizes {sizes:?}");
    }
}

#[test]
fn what_a_tower_does_not_use_is_reported() {
    for (name, depth, unused) in [
        ("blip2_vit", 3, "post_layernorm (2)"),
        ("clip", 2, "encoder (16), post_layernorm (2)"),
        ("clip_with_projection", 3, "post_layernorm (2), visual_projection (1)"),
        (
            "clip_whole",
            3,
            "logit_scale (1), post_layernorm (2), text_model (20), text_projection (1), visual_projection (1)",
        ),
        ("siglip", 3, "head (11), post_layernorm (2)"),
        ("siglip_whole", 3, "head (11), logit_bias (1), logit_scale (1), post_layernorm (2), text_model (22)"),
        ("dinov2", 3, "embeddings (1), layernorm (2)"),
        ("dinov2_with_registers_classifier", 3, "classifier (2), embeddings (1), layernorm (2)"),
        ("dinov3_vit", 1, "embeddings (1), layer (34), norm (2)"),
        ("vit", 3, "layernorm (2), pooler (2)"),
        ("vit_classifier", 3, "classifier (2), layernorm (2)"),
        ("aimv2", 3, "head (5), rms_norm (1)"),
        ("aimv2_native", 3, "rms_norm (1)"),
        (
            "aimv2_whole",
            3,
            "head (5), logit_scale (1), rms_norm (1), text_model (12), text_projection (1), visual_projection (1)",
        ),
    ] {
        let (_, report) = load(&ModelDir::open(&golden(name)).unwrap(), depth);
        assert_eq!(unused_modules(&report).as_deref(), Some(unused), "{name}");
    }
}

/// A copy of a fixture's directory with another `config.json`.
fn with_config(name: &str, change: impl FnOnce(&mut Value)) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    fs::copy(golden(name).join("model.safetensors"), copy.path().join("model.safetensors")).unwrap();
    let mut config: Value = serde_json::from_slice(&fs::read(golden(name).join("config.json")).unwrap()).unwrap();
    change(&mut config);
    fs::write(copy.path().join("config.json"), config.to_string()).unwrap();
    copy
}

#[test]
fn a_whole_clip_may_leave_its_vision_model_type_to_the_class() {
    let copy = with_config("clip_whole", |config| {
        config["vision_config"].as_object_mut().unwrap().remove("model_type").unwrap();
    });
    let dir = ModelDir::open(copy.path()).unwrap();
    assert_eq!(dir.part(Part::Vision).unwrap().config["model_type"], "clip_vision_model");
    load(&dir, 3);
    let bare = with_config("clip_whole", |config| {
        config.as_object_mut().unwrap().remove("vision_config").unwrap();
    });
    let error = ModelDir::open(bare.path()).unwrap().part(Part::Vision).err().unwrap().to_string();
    assert!(error.ends_with("config.json: vision_config: expected an object, got nothing"), "{error}");
}

#[test]
fn a_tower_with_other_parts_than_its_config_says_is_refused_by_name() {
    let copy = with_config("dinov3_vit", |config| config["key_bias"] = json!(true));
    let dir = ModelDir::open(copy.path()).unwrap();
    let config = config(&dir);
    let tower = Frozen::build(Device::Cpu, Kind::Float, |root| config.build(&root.pp("vision_model"), 3));
    let error = tower.params().load(&dir.part(Part::Vision).unwrap().weights, &plans::vision_tower(3)).unwrap_err();
    assert!(error.to_string().contains("vision_model.layer.2.attention.k_proj.bias"), "{error}");
}

#[test]
fn a_size_that_patches_do_not_tile_is_refused() {
    for (name, size, expected) in [
        ("dinov2", 30, "data.image.size: expected a multiple of the image encoder's patch of 8 pixels, got 30"),
        ("siglip_untiled", 25, "data.image.size: expected a multiple of the image encoder's patch of 8 pixels, got 25"),
        (
            "aimv2",
            32,
            "data.image.size: expected 24, the image encoder's own size, to which its positions are bound, got 32",
        ),
    ] {
        let dir = ModelDir::open(&golden(name)).unwrap();
        assert_eq!(check_image_size(&config(&dir), size).unwrap_err().to_string(), expected);
    }
}

/// Stage 1 around a tower's first two blocks, with a ln_vision that is none of its norms.
fn export_of(tower: &ModelDir, out: &Path) -> Vec<(String, Tensor)> {
    let vision = config(tower);
    let qformer = json!({
        "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
        "max_position_embeddings": 16, "cross_attention_frequency": 2, "encoder_hidden_size": vision.hidden_size(),
    });
    let model = json!({
        "architectures": ["Blip2ForImageTextRetrieval"], "num_query_tokens": 4, "image_text_hidden_size": 8,
        "vision_config": tower.part(Part::Vision).unwrap().config, "qformer_config": qformer,
    });
    tch::manual_seed(3);
    let params = ParamStore::trainable(Device::Cpu);
    Stage1::new(&params.root(), &Blip2Config::from_json(&model).unwrap());
    let trained: Vec<(String, Tensor)> = params
        .entries()
        .into_iter()
        .map(|(name, tensor, _)| {
            let tensor = if name.contains("post_layernorm") { tensor.full_like(7.5) } else { tensor };
            (name, tensor.detach())
        })
        .collect();
    let image = Preprocessing::of(tower.path(), &vision, &AutoOr::Given(40)).unwrap();
    let export = Export {
        task: ExportTask::Stage1 { image_text_hidden_size: 8, decoder_start_token_id: 39 },
        trained: &trained,
        vision: tower,
        vision_depth: 2,
        positions: None,
        qformer_config: qformer,
        num_query_tokens: 4,
        image: image.exported(),
        tokenizer: None,
        towers: Towers::Copied,
        max_shard_bytes: DEFAULT_MAX_SHARD_BYTES,
    };
    export.write(out).unwrap();
    trained
}

fn export_of_clip(out: &Path) -> Vec<(String, Tensor)> {
    export_of(&ModelDir::open(&golden("clip_whole")).unwrap(), out)
}

#[test]
fn a_tower_that_leaves_its_number_of_blocks_to_its_class_goes_out_with_the_number_in_use() {
    for name in ["siglip_whole", "../stage1"] {
        let copy = with_config(name, |config| {
            config["vision_config"].as_object_mut().unwrap().remove("num_hidden_layers").unwrap();
        });
        let out = copy.path().join("out");
        export_of(&ModelDir::open(copy.path()).unwrap(), &out);
        let files = ModelFiles::open(&out).unwrap();
        assert_eq!(files.config.vision.num_hidden_layers(), 2, "{name}");
        files.image_encoder(Device::Cpu, Kind::Float).unwrap();
    }
}

/// Stage 1 that begins from `init`.
fn blueprint(vision: &Path, layer: &str, init: &Path) -> Result<Blueprint, String> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("config.yaml");
    let text = format!(
        "run: {{dir: {own}, name: a}}\ntask: {{stage: 1, max_text_tokens: 8}}\n\
         model: {{vision: {{weights: {}, layer: {layer}}}, qformer: {{init: {}, tokenizer: {own}, query_tokens: 4}}}}\n\
         data: {{train: [{{shards: s.tar}}]}}\n",
        vision.display(),
        init.display(),
        own = folder.path().display()
    );
    fs::write(&file, text).unwrap();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null, "pre_tokenizer": null, "decoder": null,
        "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]},
        "model": {"type": "WordLevel", "vocab": {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3}, "unk_token": "[UNK]"},
    });
    fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    Blueprint::open(&Config::load_resolved(&file).unwrap()).map_err(|error| error.to_string())
}

#[test]
fn a_tower_inside_a_whole_model_keeps_the_layer_that_the_model_was_trained_on() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("export");
    export_of_clip(&out);
    let again = blueprint(&out, "auto", &out).unwrap();
    assert_eq!((again.depth, &again.model_json["vision_feature_layer"]), (2, &json!(2)), "and not the layer before");
    let encoder = |b: &Blueprint| {
        let (tower, _) = load(&b.vision_dir, b.depth);
        let pixels = SafetensorsFile::open(&golden("clip_whole").join("expected.safetensors")).unwrap();
        tower.features(&pixels.read("pixels.40").unwrap())
    };
    // The tower's own directory has one block more, and its family's layer is the same.
    let alone = blueprint(&golden("clip_whole"), "auto", &out).unwrap();
    assert_eq!(alone.depth, 2);
    assert!(encoder(&again).equal(&encoder(&alone)));

    for (vision, layer, got) in [(&out, "1", 1), (&golden("clip_whole"), "-1", 3)] {
        let error = blueprint(vision, layer, &out).err().unwrap();
        assert!(
            error.starts_with("model.vision.layer: expected 2, the hidden state that model.qformer.init ("),
            "{error}"
        );
        assert!(error.contains(&format!(" was trained on, got {got}; ")) && error.lines().count() == 1, "{error}");
    }
    assert_eq!(blueprint(&out, "-1", &out).unwrap().depth, 2);
}

#[test]
fn clip_s_old_vision_config_dict_goes_before_vision_config() {
    let copy = with_config("clip_whole", |config| {
        let mut dict = config["vision_config"].clone();
        // Left to the class, whose default holds whatever vision_config says.
        dict.as_object_mut().unwrap().remove("hidden_act").unwrap();
        config["vision_config_dict"] = dict;
        config["vision_config"]["hidden_act"] = json!("gelu");
        config["vision_config"]["num_hidden_layers"] = json!(1);
    });
    let features = |dir: &ModelDir| {
        let (tower, _) = load(dir, config(dir).num_hidden_layers());
        let pixels = SafetensorsFile::open(&golden("clip_whole").join("expected.safetensors")).unwrap();
        tower.features(&pixels.read("pixels.40").unwrap())
    };
    let (ours, plain) = (ModelDir::open(copy.path()).unwrap(), ModelDir::open(&golden("clip_whole")).unwrap());
    assert_eq!(config(&ours).num_hidden_layers(), 3);
    assert!(features(&ours).equal(&features(&plain)));
    let alone = with_config("clip_whole", |config| {
        let section = config.as_object_mut().unwrap().remove("vision_config").unwrap();
        config["vision_config_dict"] = section;
    });
    assert!(features(&ModelDir::open(alone.path()).unwrap()).equal(&features(&plain)));
}

#[test]
fn clip_s_final_norm_is_never_taken_for_ln_vision() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("export");
    let trained: BTreeMap<String, Tensor> = export_of_clip(&out).into_iter().collect();
    let exported = ModelDir::open(&out).unwrap();
    let theirs = ModelDir::open(&golden("clip_whole")).unwrap();
    let name = "vision_model.post_layernorm.weight";
    let ln_vision = exported.part(Part::QFormer).unwrap().weights.read(name).unwrap();
    assert!(ln_vision.equal(&trained[name]) && !ln_vision.equal(&theirs.weights().read(name).unwrap()));
    assert!(exported.part(Part::Vision).unwrap().weights.read(name).is_err());
    // Nothing of the text half, of CLIP's final norm, of the third block.
    for (name, _) in exported.weights().entries() {
        let theirs = ["text_model.", "visual_projection.", "logit_scale", "vision_model.encoder.layers.2."];
        assert!(!theirs.iter().any(|part| name.starts_with(part)), "{name}");
    }

    let files = ModelFiles::open(&out).unwrap();
    let task = files.stage1_task(Device::Cpu, Default::default()).unwrap();
    assert!(task.params.get(name).unwrap().equal(&trained[name]));
    let encoder = files.image_encoder(Device::Cpu, Kind::Float).unwrap();
    let preprocessing = encoder.preprocessing().clone();
    let again = load_image_encoder(&exported, &config(&exported), 2, preprocessing, Device::Cpu, Kind::Float).unwrap();
    assert_eq!((again.1.dropped, again.1.dropped_modules), (0, None));
    assert_eq!(encoder.preprocessing().size, 40);
    let pixels =
        SafetensorsFile::open(&golden("clip_whole").join("expected.safetensors")).unwrap().read("pixels.40").unwrap();
    let (tower, _) = load(&theirs, 2);
    assert!(encoder.features_of_normalised(&pixels).equal(&tower.features(&pixels)));
}

#[test]
fn pixels_are_made_as_the_tower_s_directory_says_and_exported_so() {
    let copy = with_config("siglip", |_| {});
    let file = json!({
        "size": {"height": 16, "width": 16}, "resample": 2, "rescale_factor": 0.01, "image_mean": [0.5, 1.0, 1.5],
        "image_std": [0.25, 0.5, 1.0],
    });
    fs::write(copy.path().join("preprocessor_config.json"), file.to_string()).unwrap();
    let dir = ModelDir::open(copy.path()).unwrap();
    let config = config(&dir);
    let preprocessing = Preprocessing::of(copy.path(), &config, &AutoOr::Auto).unwrap();
    assert_eq!((preprocessing.size, preprocessing.filter), (16, Filter::Bilinear));
    let (encoder, _) = load_image_encoder(&dir, &config, 2, preprocessing.clone(), Device::Cpu, Kind::Float).unwrap();
    let bytes: Vec<u8> = [100u8, 150, 200].into_iter().flat_map(|value| [value; 256]).collect();
    let pixels = encoder.normalise(&bytes, 1, 16).unwrap();
    for (channel, expected) in [(0, 2.0), (1, 1.0), (2, 0.5)] {
        let off = (pixels.select(1, channel) - expected).abs().max().double_value(&[]);
        assert!(off < 1e-6, "channel {channel}: {off:e}");
    }
    let exported = preprocessing.exported();
    assert_eq!((exported.size, exported.resample, exported.rescale_factor), (16, 2, 0.01));
    assert_eq!((exported.mean, exported.std), ([0.5, 1.0, 1.5], [0.25, 0.5, 1.0]));
}
