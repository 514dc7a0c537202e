//! Parity of every decoder family with `transformers` 4.57.1 on tiny random-weight models (`scripts/fixtures/language.py`), fp32.
//!
//! Hidden states and logits within 1e-5 relative (2-norm of the difference over that of the reference), gradients within 1e-4, generated ids
//! equal, all on batches of different lengths.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use blip2_model::dropout::DropoutRates;
use blip2_model::language::{
    Decoder, DecoderConfig, Decoding, EarlyStopping, GenerateOptions, LanguageConfig, LanguageModel, generate,
};
use blip2_model::{Dropout, Frozen};
use blip2_torchx::params::TensorSource;
use blip2_trainer::model_files::load_language_model;
use blip2_weights::{ModelDir, Part, SafetensorsFile, plans, save_safetensors};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

/// Each case's folder.
const FAMILIES: [&str; 22] = [
    "opt",
    "opt_350m",
    "galactica",
    "gpt2",
    "llama_bias",
    "llama_linear",
    "llama3",
    "llama_yarn",
    "llama_yarn_mscale",
    "llama_longrope",
    "llama_longrope_factor",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen3_window",
    "smollm3",
    "smollm3_window",
    "phi3",
    "phi3_long",
    "gemma",
    "gemma2",
    "gemma3",
];

struct Case {
    folder: PathBuf,
    model: Frozen<LanguageModel>,
    expected: SafetensorsFile,
}

impl Case {
    fn open(family: &str, kind: Kind) -> Case {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/language").join(family);
        let dir = ModelDir::open(&folder).unwrap();
        let config = LanguageConfig::from_json(dir.part(Part::Language).unwrap().config).unwrap();
        let (model, _) =
            load_language_model(&dir, &config, Device::Cpu, kind).unwrap_or_else(|error| panic!("{family}: {error}"));
        let expected = SafetensorsFile::open(&folder.join("expected.safetensors")).unwrap();
        Case { folder, model, expected }
    }

    fn decoder(&self) -> &Decoder {
        match &*self.model {
            LanguageModel::Decoder(decoder) => decoder,
            LanguageModel::T5(_) => panic!("{} is no decoder", self.folder.display()),
        }
    }

    fn tensor(&self, name: &str) -> Tensor {
        self.expected.read(name).unwrap()
    }

    /// Rows of tokens of `x [B, L, ..]`, others zero.
    fn tokens(&self, x: &Tensor) -> Tensor {
        x * self.tensor("mask").to_kind(Kind::Float).unsqueeze(-1)
    }

    fn generated(&self, decoding: Decoding) -> Value {
        let options: Value = self.json("generate.json");
        let size = |key: &str| options[key].as_u64().unwrap() as usize;
        let options = GenerateOptions {
            max_new_tokens: size("max_new_tokens"),
            min_new_tokens: size("min_new_tokens"),
            eos: vec![options["eos"].as_i64().unwrap()],
            decoding,
        };
        let (prefix, mask) = (self.tensor("prefix"), self.tensor("prefix_mask"));
        let (rows, longest, _) = prefix.size3().unwrap();
        let unpadded = |row: i64| {
            let length = mask.get(row).sum(Kind::Int64).int64_value(&[]);
            prefix.get(row).narrow(0, longest - length, length)
        };
        let prefixes: Vec<Tensor> = (0..rows).map(unpadded).collect();
        json!(generate(&self.model, &prefixes, &options))
    }

    fn json(&self, name: &str) -> Value {
        serde_json::from_slice(&fs::read(self.folder.join(name)).unwrap()).unwrap()
    }
}

fn relative(ours: &Tensor, theirs: &Tensor) -> f64 {
    let norm = |t: &Tensor| t.to_kind(Kind::Double).norm().double_value(&[]);
    norm(&(ours.to_kind(Kind::Double) - theirs.to_kind(Kind::Double))) / norm(theirs).max(1e-30)
}

#[test]
fn hidden_states_logits_and_gradients_equal_transformers() {
    let mut worst: BTreeMap<&str, f64> = BTreeMap::new();
    for family in FAMILIES {
        let case = Case::open(family, Kind::Float);
        let embeds = case.tensor("embeds").set_requires_grad(true);
        let hidden = case.decoder().forward(&embeds, &Dropout::off());
        let logits = case.decoder().logits(&hidden);
        (&logits * case.tensor("probe")).sum(Kind::Float).backward();
        let figures = [
            ("embedded", relative(&case.model.embed(&case.tensor("ids")), &case.tensor("embedded")), 1e-6),
            ("hidden", relative(&case.tokens(&hidden), &case.tensor("hidden")), 1e-5),
            ("logits", relative(&case.tokens(&logits), &case.tensor("logits")), 1e-5),
            ("gradient", relative(&embeds.grad(), &case.tensor("gradient")), 1e-4),
        ];
        let line: Vec<String> = figures.iter().map(|(name, error, _)| format!("{name} {error:.1e}")).collect();
        println!("{family:<21} {}", line.join("  "));
        for (name, error, tolerance) in figures {
            assert!(error <= tolerance, "{family}: {name} differs by {error:e}");
            let worst = worst.entry(name).or_default();
            *worst = worst.max(error);
        }
    }
    let worst: Vec<String> = worst.iter().map(|(name, error)| format!("{name} {error:.1e}")).collect();
    println!("worst                 {}", worst.join("  "));
}

/// The language model of a chat model that sees, under the names that its files have on the hub and under those of the classes.
#[test]
fn a_chat_model_s_language_model_is_the_one_alone() {
    let of_files = |name: &str| format!("language_model.{name}");
    let of_classes = |name: &str| match name.strip_prefix("model.") {
        Some(base) => format!("model.language_model.{base}"),
        None => name.to_string(),
    };
    let spellings: [&dyn Fn(&str) -> String; 2] = [&of_files, &of_classes];
    for (family, whole) in [("gemma3", "gemma3"), ("llama_linear", "llava"), ("mistral", "mistral3")] {
        let alone = Case::open(family, Kind::Float);
        let hidden = alone.decoder().forward(&alone.tensor("embeds"), &Dropout::off());
        let weights = SafetensorsFile::open(&alone.folder.join("model.safetensors")).unwrap();
        for spelled in spellings {
            let mut tensors: Vec<(String, Tensor)> = (weights.entries().into_iter())
                .map(|(name, _)| (spelled(&name), weights.read(&name).unwrap()))
                .collect();
            tensors.push((
                "vision_tower.vision_model.embeddings.patch_embedding.bias".into(),
                Tensor::zeros([2], (Kind::Float, Device::Cpu)),
            ));
            let folder = tempfile::tempdir().unwrap();
            let config = json!({"model_type": whole, "text_config": alone.json("config.json"), "vision_config": {}});
            fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
            save_safetensors(&tensors, &BTreeMap::new(), &folder.path().join("model.safetensors")).unwrap();
            let dir = ModelDir::open(folder.path()).unwrap();
            let config = LanguageConfig::from_json(dir.part(Part::Language).unwrap().config).unwrap();
            let (model, _) = load_language_model(&dir, &config, Device::Cpu, Kind::Float).unwrap();
            let LanguageModel::Decoder(decoder) = &*model else { panic!("{whole} is no decoder") };
            assert!(decoder.forward(&alone.tensor("embeds"), &Dropout::off()).equal(&hidden), "{whole}");
        }
    }
}

/// The configuration as `transformers` 5 saves it.
fn of_version_5(config: &Value) -> Value {
    let mut json = config.clone();
    let keys = json.as_object_mut().unwrap();
    let (theta, local) = (keys.remove("rope_theta").unwrap(), keys.remove("rope_local_base_freq"));
    let mut table = match keys.remove("rope_scaling") {
        Some(Value::Object(table)) => table,
        _ => Default::default(),
    };
    let rope_type = table.remove("type").or(table.remove("rope_type")).unwrap_or(json!("default"));
    table.insert("rope_type".into(), rope_type);
    table.insert("rope_theta".into(), theta);
    for key in ["partial_rotary_factor", "original_max_position_embeddings"] {
        table.extend(keys.remove(key).map(|value| (key.to_string(), value)));
    }
    json["rope_parameters"] = match local {
        None => Value::Object(table),
        Some(theta) => {
            json!({"full_attention": table, "sliding_attention": {"rope_type": "default", "rope_theta": theta}})
        }
    };
    json
}

#[test]
fn configurations_of_version_5_compute_what_those_of_version_4_do() {
    let mut compared = Vec::new();
    for family in FAMILIES {
        let case = Case::open(family, Kind::Float);
        let older = case.json("config.json");
        if older.get("rope_theta").is_none() {
            continue;
        }
        let newer = of_version_5(&older);
        let dir = ModelDir::open(&case.folder).unwrap();
        let config = LanguageConfig::from_json(&newer).unwrap_or_else(|error| panic!("{family}: {error}"));
        let (model, _) = load_language_model(&dir, &config, Device::Cpu, Kind::Float).unwrap();
        let LanguageModel::Decoder(decoder) = &*model else { panic!("{family} is no decoder") };
        let hidden = decoder.forward(&case.tensor("embeds"), &Dropout::off());
        let error = relative(&case.tokens(&hidden), &case.tensor("hidden"));
        assert!(error <= 1e-5, "{family}: hidden differs by {error:e}");
        // What an export says is what version 4 has said.
        let written = DecoderConfig::with_older_keys(&newer).unwrap();
        for key in ["rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor", "rope_parameters"] {
            let said = |json: &Value| json.get(key).filter(|value| !value.is_null()).cloned();
            assert_eq!(said(&written), said(&older), "{family}: {key}");
        }
        compared.push(family);
    }
    assert!(["llama3", "llama_yarn", "phi3", "phi3_long", "gemma3", "qwen3"].iter().all(|f| compared.contains(f)));
}

/// A fixture's directory with a head beside the embedding that it is tied to.
fn with_head(family: &str, head: impl FnOnce(&Tensor) -> Tensor) -> tempfile::TempDir {
    let case = Case::open(family, Kind::Float);
    let weights = SafetensorsFile::open(&case.folder.join("model.safetensors")).unwrap();
    let mut tensors: Vec<(String, Tensor)> =
        weights.entries().into_iter().map(|(name, _)| (name.clone(), weights.read(&name).unwrap())).collect();
    tensors.push(("lm_head.weight".into(), head(&weights.read("model.embed_tokens.weight").unwrap())));
    let folder = tempfile::tempdir().unwrap();
    fs::copy(case.folder.join("config.json"), folder.path().join("config.json")).unwrap();
    save_safetensors(&tensors, &BTreeMap::new(), &folder.path().join("model.safetensors")).unwrap();
    folder
}

#[test]
fn a_head_beside_the_embedding_that_it_is_tied_to_must_be_the_same() {
    let foreign = with_head("llama3", |embedding| embedding + 1);
    let refused = |path| ModelDir::open(path).unwrap().part(Part::Language).err().unwrap().to_string();
    let error = refused(foreign.path());
    let expected = "language_model.lm_head.weight differs from language_model.model.embed_tokens.weight, but config.json calls the head tied";
    assert!(error.contains(expected) && error.lines().count() == 1, "{error}");
    let narrow = with_head("llama3", |embedding| embedding.narrow(0, 0, 3));
    assert!(refused(narrow.path()).contains(expected));

    let same = with_head("llama3", |embedding| embedding.copy());
    let dir = ModelDir::open(same.path()).unwrap();
    let config = LanguageConfig::from_json(dir.part(Part::Language).unwrap().config).unwrap();
    let (_, loaded) = load_language_model(&dir, &config, Device::Cpu, Kind::Float).unwrap();
    assert_eq!(loaded.dropped_modules.as_deref(), Some("language_model (1)"));
}

#[test]
fn greedy_and_beam_ids_equal_transformers() {
    for family in FAMILIES {
        let case = Case::open(family, Kind::Float);
        let expected = &case.json("generate.json")["outputs"];
        assert_eq!(case.generated(Decoding::Greedy), expected["beams_1"], "{family}, greedy");
        let beams = Decoding::Beam { beams: 3, length_penalty: 1.0, early_stopping: EarlyStopping::Off };
        assert_eq!(case.generated(beams), expected["beams_3"], "{family}, three beams");
    }
}

#[test]
fn a_pass_behind_a_cache_equals_the_whole_pass() {
    for family in FAMILIES {
        let case = Case::open(family, Kind::Float);
        let embeds = case.tensor("embeds");
        let (batch, rows, _) = embeds.size3().unwrap();
        let whole = case.decoder().forward(&embeds, &Dropout::off());
        let mut cache = Default::default();
        let mask = |rows: i64| Tensor::ones([batch, rows], (Kind::Bool, Device::Cpu));
        let mut parts = vec![case.decoder().forward_cached(&embeds.narrow(1, 0, 8), &mask(8), &mut cache)];
        for row in 8..rows {
            parts.push(case.decoder().forward_cached(&embeds.narrow(1, row, 1), &mask(row + 1), &mut cache));
        }
        let error = relative(&Tensor::cat(&parts, 1), &whole);
        assert!(error < 1e-5, "{family}: {error:e}");
    }
}

#[test]
fn bf16_stays_close_to_fp32() {
    for family in FAMILIES {
        let case = Case::open(family, Kind::BFloat16);
        let hidden = case.decoder().forward(&case.tensor("embeds"), &Dropout::off());
        assert_eq!(hidden.kind(), Kind::BFloat16, "{family}");
        let error =
            relative(&case.tokens(&case.decoder().logits(&hidden).to_kind(Kind::Float)), &case.tensor("logits"));
        assert!(error < 0.1, "{family}: {error:e}");
    }
}

#[test]
fn dropout_is_a_function_of_the_stream_position_and_zero_rates_cost_nothing() {
    for family in FAMILIES {
        let case = Case::open(family, Kind::Float);
        let embeds = case.tensor("embeds");
        let with = |p: f64, seed: u64, rows: &[i64]| {
            let index = Tensor::from_slice(rows);
            let positions = index.shallow_clone() + 40;
            case.decoder().forward(&embeds.index_select(0, &index), &Dropout::keyed(p, seed, positions))
        };
        let together = with(0.2, 5, &[0, 1, 2]);
        assert!(
            relative(&together, &case.decoder().forward(&embeds, &Dropout::off())) > 1e-3,
            "{family} drops nothing"
        );
        assert!(relative(&together, &with(0.2, 6, &[0, 1, 2])) > 1e-3, "{family}: the seed changes nothing");
        // In another order and another batch the same sample has the same mask.
        let alone = with(0.2, 5, &[2]);
        assert!(relative(&alone.get(0), &together.get(2)) < 1e-5, "{family}");
        assert_eq!(with(0.0, 5, &[0, 1, 2]), case.decoder().forward(&embeds, &Dropout::off()), "{family}");
    }
}

#[test]
fn a_model_s_own_rates_drop_where_its_configuration_says() {
    for (family, drops) in [("opt", true), ("gpt2", true), ("llama_bias", false), ("gemma2", false)] {
        let case = Case::open(family, Kind::Float);
        let rates = DecoderConfig::from_json(&case.json("config.json")).unwrap().unwrap().dropout;
        assert_eq!(rates != DropoutRates::default(), drops, "{family}");
        let positions = Tensor::arange(3, (Kind::Int64, Device::Cpu));
        let dropped =
            case.decoder().forward(&case.tensor("embeds"), &Dropout::keyed_in_language_model(rates, 1, positions));
        let whole = case.decoder().forward(&case.tensor("embeds"), &Dropout::off());
        assert_eq!(dropped != whole, drops, "{family}");
    }
}

#[test]
fn heads_are_tied_by_the_same_rule_when_weights_are_read_and_when_the_model_is_built() {
    for family in FAMILIES {
        let mut config = Case::open(family, Kind::Float).json("config.json");
        for tied in [Value::Null, json!(true), json!(false)] {
            config["tie_word_embeddings"] = tied.clone();
            if tied.is_null() {
                config.as_object_mut().unwrap().remove("tie_word_embeddings");
            }
            let decoder = DecoderConfig::from_json(&config).unwrap().unwrap();
            assert_eq!(plans::tied_head(&config), decoder.tied_head, "{family}, tie_word_embeddings: {tied}");
        }
    }
}

#[test]
fn an_unknown_model_type_lists_the_known_ones() {
    let error = |json: Value| LanguageConfig::from_json(&json).unwrap_err().to_string();
    let message = error(json!({"model_type": "mamba"}));
    assert!(message.contains("text_config.model_type: got mamba, supported: opt, gpt2, llama, mistral,"), "{message}");
    assert!(error(json!({})).contains("model_type: got none"));
    assert!(error(json!({"model_type": 7})).contains("model_type: got 7"));
}
