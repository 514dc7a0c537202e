//! LAVIS' checkpoints, in and out.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use blip2_torchx::params::{Init, LoadPlan, ParamStore, TensorSource};
use blip2_weights::plans::{self, QFormerSource};
use blip2_weights::{
    LavisCheckpoint, ModelDir, ModelKind, Part, Projection, Stage, TorchFile, WeightsDir, WeightsError, inspect,
    save_lavis, trained_names,
};
use serde_json::json;
use tch::{Device, Kind, Tensor};

use crate::fixtures::{golden, identical, line, names, torch_fixture};
use crate::torch_bytes::{Pickle, archive, zip};

const STAGE1: &str = "lavis_stage1.pth";
const STAGE2: &str = "lavis_stage2_opt.pth";

/// A store that has exactly what a stage trains, in the shapes that a source has for it.
fn store_of(source: &dyn TensorSource, stage: Stage, layers: usize) -> ParamStore {
    let shapes: BTreeMap<String, Vec<i64>> =
        source.entries().into_iter().map(|(name, info)| (name, info.shape)).collect();
    let params = ParamStore::trainable(Device::Cpu);
    for name in trained_names(stage, layers, 2) {
        let shape = shapes.get(&name).unwrap_or_else(|| panic!("{name} is not in the source"));
        let _ = params.root().param(&name, shape, Init::Zeros);
    }
    params
}

fn save(trained: &dyn TensorSource, stage: Stage, layers: usize, positions: i64, projection: Projection, path: &Path) {
    let checkpoint = LavisCheckpoint { trained, stage, layers, cross_attention_frequency: 2, positions, projection };
    save_lavis(&checkpoint, path).unwrap();
}

#[test]
fn a_stage_1_checkpoint_of_lavis_fills_stage_1() {
    let model = ModelDir::open(&torch_fixture(STAGE1)).unwrap();
    assert_eq!(model.kind(), &ModelKind::LavisCheckpoint);
    let part = model.part(Part::QFormer).unwrap();
    assert_eq!(QFormerSource::detect(&part.weights), Some(QFormerSource::Stage1));
    let params = store_of(&part.weights, Stage::One, 2);
    let report = params.load(&part.weights, &plans::from_lavis(&part.weights, LoadPlan::exact()).unwrap()).unwrap();
    assert_eq!((report.loaded.len(), report.fresh.len()), (trained_names(Stage::One, 2, 2).len(), 0));
    // What is not ours is said.
    for dropped in [
        "Qformer.bert.embeddings.position_ids",
        "cls.predictions.decoder.weight",
        "cls.predictions.decoder.bias",
        "visual_encoder.cls_token",
        "visual_encoder.blocks.0.attn.q_bias",
    ] {
        assert!(report.unused.iter().any(|name| name == dropped), "{dropped}");
    }
    let file = TorchFile::open(&torch_fixture(STAGE1)).unwrap();
    let pairs = [
        ("vision_model.post_layernorm.weight", "ln_vision.weight"),
        (
            "qformer.encoder.layer.1.attention.attention.value.weight",
            "Qformer.bert.encoder.layer.1.attention.self.value.weight",
        ),
        ("text_projection.bias", "text_proj.bias"),
        ("temp", "temp"),
    ];
    for (ours, theirs) in pairs {
        assert!(identical(&params.get(ours).unwrap(), &file.read(theirs).unwrap()), "{ours}");
    }
}

#[test]
fn the_configuration_follows_from_the_shapes() {
    let model = ModelDir::open(&torch_fixture(STAGE1)).unwrap();
    let config = model.config();
    assert_eq!((config["num_query_tokens"].as_i64(), config["image_text_hidden_size"].as_i64()), (Some(4), Some(16)));
    let qformer = model.part(Part::QFormer).unwrap().config;
    for (key, value) in [
        ("hidden_size", 64),
        ("num_hidden_layers", 2),
        ("num_attention_heads", 1),
        ("intermediate_size", 40),
        ("encoder_hidden_size", 24),
        ("cross_attention_frequency", 2),
        ("vocab_size", 37),
        ("max_position_embeddings", 20),
    ] {
        assert_eq!(qformer[key], value, "{key}");
    }
    // Stage 2 has no embeddings; the positions come from BERT's buffer.
    let model = ModelDir::open(&torch_fixture(STAGE2)).unwrap();
    assert_eq!(model.part(Part::QFormer).unwrap().config["max_position_embeddings"], 20);
    assert_eq!(inspect(&torch_fixture(STAGE1)).unwrap().metadata["lavis_stage1.pth: epoch"], "9");
}

#[test]
fn stage_2_begins_from_either_stage_of_lavis() {
    for (file, kind, fresh) in [(STAGE1, QFormerSource::Stage1, 2), (STAGE2, QFormerSource::Stage2, 0)] {
        let model = ModelDir::open(&torch_fixture(file)).unwrap();
        let part = model.part(Part::QFormer).unwrap();
        assert_eq!(QFormerSource::detect(&part.weights), Some(kind));
        let shapes = ModelDir::open(&torch_fixture(STAGE2)).unwrap();
        let params = store_of(&shapes.part(Part::QFormer).unwrap().weights, Stage::Two, 2);
        let plan = if kind == QFormerSource::Stage1 { plans::stage2_from_stage1() } else { LoadPlan::exact() };
        let report = params.load(&part.weights, &plans::from_lavis(&part.weights, plan).unwrap()).unwrap();
        assert_eq!(report.fresh.len(), fresh, "{file}");
    }
}

#[test]
fn the_language_projection_by_any_of_its_names() {
    for (projection, theirs) in
        [(Projection::Opt, "opt_proj.weight"), (Projection::T5, "t5_proj.weight"), (Projection::Llm, "llm_proj.weight")]
    {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("stage2.pth");
        let golden = ModelDir::open(&golden("stage2_llama")).unwrap();
        save(&golden.part(Part::QFormer).unwrap().weights, Stage::Two, 4, 24, projection, &path);
        assert!(names(&TorchFile::open(&path).unwrap()).iter().any(|name| name == theirs));
        fs::write(directory.path().join("config.json"), golden.config().to_string()).unwrap();
        let back = ModelDir::open(&path).unwrap();
        let (back, part) = (back.part(Part::QFormer).unwrap(), golden.part(Part::QFormer).unwrap());
        for (name, _) in part.weights.entries() {
            assert!(identical(&back.weights.read(&name).unwrap(), &part.weights.read(&name).unwrap()), "{name}");
        }
    }
}

#[test]
fn what_goes_out_comes_back_with_its_bits() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("stage1.pth");
    let golden = WeightsDir::open(&golden("stage1")).unwrap();
    let model = ModelDir::open(golden.path()).unwrap();
    save(&model.part(Part::QFormer).unwrap().weights, Stage::One, 4, 24, Projection::Llm, &path);
    fs::write(directory.path().join("config.json"), model.config().to_string()).unwrap();
    let back = ModelDir::open(&path).unwrap();
    let part = back.part(Part::QFormer).unwrap();
    for name in trained_names(Stage::One, 4, 2) {
        assert!(identical(&part.weights.read(&name).unwrap(), &golden.read(&name).unwrap()), "{name}");
    }
    for key in [
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "vocab_size",
        "cross_attention_frequency",
    ] {
        assert_eq!(part.config[key], model.config()["qformer_config"][key], "{key}");
    }
    plans::from_lavis(&part.weights, LoadPlan::exact()).unwrap();
    // The same tensors give the same bytes.
    let again = directory.path().join("again.pth");
    save(&model.part(Part::QFormer).unwrap().weights, Stage::One, 4, 24, Projection::Llm, &again);
    assert_eq!(fs::read(&path).unwrap(), fs::read(&again).unwrap());
}

#[test]
fn storages_are_aligned_and_tied_tensors_share_one() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("stage1.pth");
    let golden = ModelDir::open(&golden("stage1")).unwrap();
    save(&golden.part(Part::QFormer).unwrap().weights, Stage::One, 4, 24, Projection::Llm, &path);
    let bytes = fs::read(&path).unwrap();
    let headers: Vec<usize> = (0..bytes.len() - 4).filter(|&at| &bytes[at..at + 4] == b"PK\x03\x04").collect();
    let trained = trained_names(Stage::One, 4, 2).len();
    // Each parameter, position_ids, and the pickle, the byte order and the version.
    assert_eq!(headers.len(), trained + 1 + 3);
    for header in headers {
        let field = |at: usize| u16::from_le_bytes([bytes[header + at], bytes[header + at + 1]]) as usize;
        assert_eq!((header + 30 + field(26) + field(28)) % 64, 0);
    }
    assert_eq!(names(&TorchFile::open(&path).unwrap()).len(), trained + 1 + 2);
}

#[test]
fn names_that_are_not_the_stage_s_are_not_written() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("x.pth");
    let golden = ModelDir::open(&golden("stage1")).unwrap();
    let part = golden.part(Part::QFormer).unwrap();
    let wrong = LavisCheckpoint {
        trained: &part.weights,
        stage: Stage::Two,
        layers: 4,
        cross_attention_frequency: 2,
        positions: 24,
        projection: Projection::Opt,
    };
    assert!(line(save_lavis(&wrong, &path)).contains("missing [language_projection.bias"));
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn an_untied_head_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("stage1.pth");
    let mut bytes = fs::read(torch_fixture(STAGE1)).unwrap();
    // The tied tensors share a storage in LAVIS' file; here the decoder's bias gets another one of the same size.
    let name = b"Qformer.cls.predictions.decoder.bias";
    let at = bytes.windows(name.len()).position(|window| window == name).unwrap();
    bytes[at + name.len() - 4..at + name.len()].copy_from_slice(b"bios");
    fs::write(&path, bytes).unwrap();
    let model = ModelDir::open(&path).unwrap();
    let part = model.part(Part::QFormer).unwrap();
    // A name that nothing takes is unexpected, unless it lies under a dropped module.
    assert!(names(&part.weights).contains(&"cls.predictions.decoder.bios".to_string()));

    let mut source: BTreeMap<String, Tensor> = BTreeMap::new();
    for (name, _) in part.weights.entries() {
        source.insert(name.clone(), part.weights.read(&name).unwrap());
    }
    let decoder = source.get_mut("cls.predictions.decoder.weight").unwrap();
    *decoder = &*decoder + 1e-3;
    let message = line(plans::from_lavis(&source, LoadPlan::exact()));
    assert!(
        message.contains("cls.predictions.decoder.weight differs from embeddings.word_embeddings.weight"),
        "{message}"
    );
}

#[test]
fn the_vit_of_lavis_gets_one_bias_of_two() {
    let model = ModelDir::open(&torch_fixture("lavis_vit.pth")).unwrap();
    assert_eq!(model.kind(), &ModelKind::LavisVit);
    let part = model.part(Part::Vision).unwrap();
    let expected = json!({"model_type": "blip_2_vision_model", "hidden_size": 88, "intermediate_size": 132, "num_hidden_layers": 2,
        "num_attention_heads": 1, "image_size": 12, "patch_size": 4, "layer_norm_eps": 1e-6, "qkv_bias": true, "hidden_act": "gelu"});
    assert_eq!(part.config, &expected);
    let file = TorchFile::open(&torch_fixture("lavis_vit.pth")).unwrap();
    let bias = part.weights.read("vision_model.encoder.layers.1.self_attn.qkv.bias").unwrap();
    assert_eq!((bias.size(), bias.kind()), (vec![264], Kind::Half));
    assert!(identical(&bias.narrow(0, 0, 88).contiguous(), &file.read("blocks.1.attn.q_bias").unwrap()));
    assert_eq!(bias.narrow(0, 88, 88).abs().max().double_value(&[]), 0.0);
    assert!(identical(&bias.narrow(0, 176, 88).contiguous(), &file.read("blocks.1.attn.v_bias").unwrap()));
    assert!(line(model.part(Part::Language)).contains("this file of LAVIS holds no language model"));
}

/// A ViT of LAVIS as thin as can be: a name and one number for each tensor.
fn thin_vit(blocks: usize) -> (tempfile::TempDir, Result<ModelDir, WeightsError>) {
    let mut tensors: Vec<(String, &[i64])> = vec![
        ("cls_token".into(), &[1, 1, 88]),
        ("pos_embed".into(), &[1, 5, 88]),
        ("patch_embed.proj.weight".into(), &[88, 3, 2, 2]),
    ];
    for block in 0..blocks {
        tensors.push((format!("blocks.{block}.attn.qkv.weight"), &[264, 88]));
        tensors.push((format!("blocks.{block}.mlp.fc1.weight"), &[100, 88]));
    }
    let pickle = tensors.iter().fold(Pickle(vec![0x80, 2]).raw(b"}("), |pickle, (name, shape)| {
        assert!(shape.iter().product::<i64>() <= 1 << 16);
        pickle.text(name).tensor("0", 1 << 16, 0, shape, &row_major(shape))
    });
    let storage = vec![0; 4 << 16];
    let bytes = zip(&[("a/data.pkl", &pickle.raw(b"u.").0), ("a/data/0", &storage)]);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("eva_vit_g.pth");
    fs::write(&path, bytes).unwrap();
    let model = ModelDir::open(&path);
    (directory, model)
}

#[test]
fn the_fortieth_block_is_one_too_many() {
    let (_directory, model) = thin_vit(40);
    assert_eq!(model.unwrap().config()["num_hidden_layers"], 39);
    let unused = (plans::vision_tower(39).unused)("vision_model.encoder.layers.39.mlp.fc1.weight");
    assert!(unused && !(plans::vision_tower(39).unused)("vision_model.encoder.layers.38.mlp.fc1.weight"));
}

#[test]
fn more_layers_than_any_model_has() {
    let (_directory, model) = thin_vit(1001);
    assert!(line(model).ends_with("blocks.: expected at most 1000 layers, got 1001"));
}

fn row_major(shape: &[i64]) -> Vec<i64> {
    (0..shape.len()).map(|axis| shape[axis + 1..].iter().product()).collect()
}

#[test]
fn a_checkpoint_may_hold_the_image_encoder_too() {
    // Its width of 24 is no multiple of 88: the number of heads must be told.
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("stage1.pth");
    fs::copy(torch_fixture(STAGE1), &path).unwrap();
    let config = |heads: i64| {
        let vision = json!({"hidden_size": 24, "num_attention_heads": heads});
        json!({"model_type": "blip-2", "vision_config": vision, "qformer_config": {"hidden_size": 64, "num_attention_heads": 4}})
    };
    fs::write(directory.path().join("config.json"), config(2).to_string()).unwrap();
    let model = ModelDir::open(&path).unwrap();
    assert_eq!(model.part(Part::QFormer).unwrap().config["num_attention_heads"], 4);
    let vision = model.part(Part::Vision).unwrap();
    assert_eq!(vision.config["num_attention_heads"], 2);
    assert!(names(&vision.weights).contains(&"vision_model.encoder.layers.0.self_attn.qkv.bias".to_string()));
    fs::write(directory.path().join("config.json"), config(5).to_string()).unwrap();
    let model = ModelDir::open(&path).unwrap();
    assert!(line(model.part(Part::Vision)).ends_with("num_attention_heads: expected a divisor of 24, got 5"));
    assert!(model.part(Part::QFormer).is_ok());
    fs::remove_file(directory.path().join("config.json")).unwrap();
    let model = ModelDir::open(&path).unwrap();
    assert!(line(model.part(Part::Vision)).contains("how many attention heads? width 24 is no multiple of 88"));
    let without = ModelDir::open(&torch_fixture(STAGE2)).unwrap();
    assert!(line(without.part(Part::Vision)).contains("holds no image encoder"));
}

#[test]
fn a_configuration_beside_the_file_that_does_not_fit() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("stage2.pth");
    fs::copy(torch_fixture(STAGE2), &path).unwrap();
    for (config, expected) in [
        (json!({"model_type": "resnet"}), "model_type: expected bert or blip-2 beside a file of LAVIS"),
        (json!({"model_type": "bert", "hidden_size": 768}), "hidden_size: expected 64, the width of"),
        (
            json!({"model_type": "bert", "hidden_size": 64}),
            "num_attention_heads: expected a divisor of 64, got nothing",
        ),
    ] {
        fs::write(directory.path().join("config.json"), config.to_string()).unwrap();
        let message = line(ModelDir::open(&path));
        assert!(message.contains(expected), "{message}");
    }
    fs::write(
        directory.path().join("config.json"),
        r#"{"model_type": "bert", "hidden_size": 64, "num_attention_heads": 8}"#,
    )
    .unwrap();
    assert_eq!(ModelDir::open(&path).unwrap().part(Part::QFormer).unwrap().config["num_attention_heads"], 8);
}

#[test]
fn files_that_lack_what_tells_their_shape() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("x.pth");
    let names = ["query_tokens", "Qformer.bert.encoder.layer.0.attention.self.query.weight"];
    let pickle = names.iter().fold(Pickle(vec![0x80, 2]).raw(b"}("), |pickle, name| {
        pickle.text(name).tensor("0", 4, 0, &[1, 2, 2], &[4, 2, 1])
    });
    fs::write(&path, archive(&pickle.raw(b"u.").0)).unwrap();
    assert!(line(ModelDir::open(&path)).ends_with("missing ln_vision.weight"));
}
