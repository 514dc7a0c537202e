//! PyTorch files as PyTorch writes them, in every format it has had.

use std::collections::BTreeMap;
use std::fs;

use blip2_torchx::params::{Init, ParamStore, TensorSource};
use blip2_weights::plans::{self, QFormerSource};
use blip2_weights::{Contents, ModelDir, Part, SafetensorsFile, TorchFile, WeightsDir, WeightsFile, inspect};
use tch::Kind;

use crate::fixtures::{identical, line, names, store, torch_fixture};

/// Every tensor of the file has the bits that PyTorch saw in it.
fn holds_what_torch_saw(file: &dyn TensorSource, expected: &str) {
    let expected = SafetensorsFile::open(&torch_fixture(expected)).unwrap();
    assert_eq!(names(file), names(&expected));
    let infos: BTreeMap<_, _> = file.entries().into_iter().collect();
    for (name, info) in expected.entries() {
        assert_eq!(infos[&name], info, "{name}");
        assert!(identical(&file.read(&name).unwrap(), &expected.read(&name).unwrap()), "{name}");
    }
}

#[test]
fn every_format_and_protocol_of_torch_save() {
    for name in ["zip.pth", "protocol4.pth", "protocol5.pth", "legacy.pth"] {
        let file = TorchFile::open(&torch_fixture(name)).unwrap();
        holds_what_torch_saw(&file, "expected.safetensors");
        assert!(file.read("layer.norm.weight").is_ok() && file.read("absent").is_err(), "{name}");
    }
    holds_what_torch_saw(&TorchFile::open(&torch_fixture("oldest.tar")).unwrap(), "oldest_expected.safetensors");
    let float8 = TorchFile::open(&torch_fixture("float8.pth")).unwrap();
    assert_eq!(float8.read("weight").unwrap().kind(), Kind::Float8e4m3fn);
}

#[test]
fn a_trainer_s_checkpoint_is_its_model() {
    let file = TorchFile::open(&torch_fixture("trainer.pth")).unwrap();
    holds_what_torch_saw(&file, "trainer_expected.safetensors");
    assert_eq!(file.metadata(), &BTreeMap::from([("epoch".to_string(), "9".to_string())]));
    let beside: Vec<&str> = file.beside().map(|(name, _)| name).collect();
    assert!(beside.contains(&"optimizer.state.0.exp_avg_sq"), "{beside:?}");
    let file = TorchFile::open(&torch_fixture("state_dict.pth")).unwrap();
    holds_what_torch_saw(&file, "trainer_expected.safetensors");
    assert_eq!(file.metadata()["iters"], "7");
}

#[test]
fn inspect_shows_what_lies_in_a_checkpoint() {
    let found = inspect(&torch_fixture("trainer.pth")).unwrap();
    assert_eq!(found.contents, Contents::TorchFile);
    assert_eq!(found.metadata["trainer.pth: epoch"], "9");
    let count =
        |part: &str| found.groups.iter().filter(|group| group.part == part).map(|group| group.tensors).sum::<u64>();
    assert_eq!((count("0"), count("1"), count("optimizer")), (2, 2, 12));
    assert!(found.to_string().contains("PyTorch file"));
    let found = inspect(&torch_fixture("bert_old")).unwrap();
    assert_eq!(found.contents, Contents::TowerDirectory);
    assert!(found.groups.iter().all(|group| group.file == "pytorch_model.bin" && group.dtype == "F32"));
}

#[test]
fn safetensors_go_before_pytorch_and_a_file_before_its_index() {
    let directory = tempfile::tempdir().unwrap();
    let put = |from: &str, to: &str| fs::copy(torch_fixture(from), directory.path().join(to)).unwrap();
    let opened = || match &WeightsDir::open(directory.path()).unwrap().files()[0] {
        WeightsFile::Safetensors(file) => file.path().file_name().unwrap().to_owned(),
        WeightsFile::Torch(file) => file.path().file_name().unwrap().to_owned(),
    };
    put("state_dict.pth", "shard.bin");
    let held = names(&TorchFile::open(&torch_fixture("state_dict.pth")).unwrap());
    let map: BTreeMap<&str, &str> = held.iter().map(|name| (name.as_str(), "shard.bin")).collect();
    let index = serde_json::json!({"weight_map": map}).to_string();
    fs::write(directory.path().join("pytorch_model.bin.index.json"), index).unwrap();
    assert_eq!(opened(), "shard.bin");
    holds_what_torch_saw(&WeightsDir::open(directory.path()).unwrap(), "trainer_expected.safetensors");
    put("legacy.pth", "pytorch_model.bin");
    assert_eq!(opened(), "pytorch_model.bin");
    put("expected.safetensors", "model.safetensors");
    assert_eq!(opened(), "model.safetensors");
}

#[test]
fn an_index_of_pytorch_shards_that_names_a_missing_file() {
    let directory = tempfile::tempdir().unwrap();
    let index = directory.path().join("pytorch_model.bin.index.json");
    fs::write(&index, r#"{"weight_map": {"a": "pytorch_model-00001-of-00002.bin"}}"#).unwrap();
    assert!(line(WeightsDir::open(directory.path())).contains("shard pytorch_model-00001-of-00002.bin is missing"));
    fs::write(&index, r#"{"weight_map": {"a": "../model.bin"}}"#).unwrap();
    assert!(line(WeightsDir::open(directory.path())).contains("is not a plain file name"));
}

#[test]
fn a_file_where_a_directory_is_expected() {
    for name in ["expected.safetensors", "bert_old/pytorch_model.bin"] {
        let message = line(ModelDir::open(&torch_fixture(name)));
        assert!(message.contains("a Hugging Face directory is expected; give the folder"), "{message}");
        assert!(line(WeightsDir::open(&torch_fixture(name))).contains("give the folder"));
    }
    assert!(line(ModelDir::open(&torch_fixture("zip.pth"))).contains("neither a checkpoint of LAVIS"));
}

/// What stage 1 asks of a BERT of two layers.
fn stage1_of_bert(folder: &str) -> ParamStore {
    let directory = ModelDir::open(&torch_fixture(folder)).unwrap();
    let part = directory.part(Part::QFormer).unwrap();
    assert_eq!(QFormerSource::detect(&part.weights), Some(QFormerSource::Bert));
    let params = store(&[
        ("query_tokens", &[1, 4, 16]),
        ("embeddings.word_embeddings.weight", &[41, 16]),
        ("embeddings.position_embeddings.weight", &[20, 16]),
        ("qformer.layernorm.weight", &[16]),
        ("qformer.layernorm.bias", &[16]),
        ("cls.predictions.bias", &[41]),
        ("cls.predictions.transform.LayerNorm.weight", &[16]),
        ("cls.predictions.transform.LayerNorm.bias", &[16]),
        ("cls.predictions.transform.dense.weight", &[16, 16]),
        ("cls.predictions.transform.dense.bias", &[16]),
    ]);
    for layer in ["qformer.encoder.layer.0", "qformer.encoder.layer.1"] {
        let root = params.root();
        let linear = |name: &str, out: i64, width: i64| {
            let _ = root.param(&format!("{layer}.{name}.weight"), &[out, width], Init::Zeros);
            let _ = root.param(&format!("{layer}.{name}.bias"), &[out], Init::Zeros);
        };
        for projection in ["query", "key", "value"] {
            linear(&format!("attention.attention.{projection}"), 16, 16);
        }
        linear("attention.output.dense", 16, 16);
        for suffix in ["", "_query"] {
            linear(&format!("intermediate{suffix}.dense"), 24, 16);
            linear(&format!("output{suffix}.dense"), 16, 24);
        }
        for norm in ["attention.output", "output", "output_query"] {
            for parameter in ["weight", "bias"] {
                let _ = root.param(&format!("{layer}.{norm}.LayerNorm.{parameter}"), &[16], Init::Zeros);
            }
        }
    }
    let plan = plans::stage1_from_bert(&part.weights).unwrap();
    let report = params.load(&part.weights, &plan).unwrap();
    assert_eq!(report.fresh, ["query_tokens"], "{folder}");
    assert!(report.unused.iter().any(|name| name == "cls.predictions.decoder.weight") || folder == "bert");
    params
}

#[test]
fn a_bert_initialises_stage_1_from_either_format_and_age() {
    let (new, old) = (stage1_of_bert("bert"), stage1_of_bert("bert_old"));
    let file = TorchFile::open(&torch_fixture("bert_old/pytorch_model.bin")).unwrap();
    let raw = |name: &str| file.read(name).unwrap();
    for (name, tensor, _) in new.entries() {
        assert!(name == "query_tokens" || identical(&tensor, &old.get(&name).unwrap()), "{name}");
    }
    let ffn = "encoder.layer.1.intermediate";
    let copied = old.get(&format!("qformer.{ffn}_query.dense.weight")).unwrap();
    assert!(identical(&copied, &raw(&format!("bert.{ffn}.dense.weight"))));
    let words = old.get("embeddings.word_embeddings.weight").unwrap();
    assert!(identical(&words.narrow(0, 0, 40).contiguous(), &raw("bert.embeddings.word_embeddings.weight")));
    let norm = old.get("cls.predictions.transform.LayerNorm.weight").unwrap();
    assert!(identical(&norm, &raw("cls.predictions.transform.LayerNorm.gamma")));
}
