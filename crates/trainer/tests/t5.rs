//! T5, T5 1.1, FlanT5's exact GELU and UL2's SiLU equal `transformers` on small random models: hidden states, logits, generated ids; and every way
//! of decoding does with a decoder, too.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use blip2_model::language::{
    Decoding, EarlyStopping, GenerateOptions, LanguageConfig, LanguageModel, Prompt, T5, generate,
};
use blip2_model::{Dropout, Frozen};
use blip2_torchx::params::TensorSource;
use blip2_trainer::model_files::load_language_model;
use blip2_weights::{ModelDir, Part, SafetensorsFile};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

const CASES: [&str; 5] = ["t5", "t5_v1_1", "t5_exact_gelu", "t5_gelu", "t5_silu"];

fn case(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/language").join(name)
}

fn expected(name: &str) -> impl Fn(&str) -> Tensor {
    let file = SafetensorsFile::open(&case(name).join("expected.safetensors")).unwrap();
    move |key| file.read(key).unwrap_or_else(|error| panic!("{key}: {error}"))
}

fn model(name: &str, kind: Kind) -> Frozen<LanguageModel> {
    let dir = ModelDir::open(&case(name)).unwrap();
    let config = LanguageConfig::from_json(dir.part(Part::Language).unwrap().config).unwrap();
    load_language_model(&dir, &config, Device::Cpu, kind).unwrap().0
}

fn t5(model: &LanguageModel) -> &T5 {
    let LanguageModel::T5(t5) = model else { panic!("no T5") };
    t5
}

fn relative(a: &Tensor, b: &Tensor) -> f64 {
    let norm = |t: &Tensor| t.to_kind(Kind::Double).norm().double_value(&[]);
    norm(&(a.to_kind(Kind::Double) - b)) / norm(b)
}

/// Encoder states at tokens, and logits of the written tokens: relative errors.
fn errors(name: &str, kind: Kind, suffix: &str) -> (f64, f64) {
    let expected = expected(name);
    let mask = expected("attention_mask").to_kind(Kind::Bool);
    let labels = expected("labels");
    let targets = labels.not_equal(-100);
    let model = model(name, kind);
    let t5 = t5(&model);
    let read = expected("inputs_embeds").to_kind(kind);
    let at = |hidden: &Tensor| hidden.index(&[Some(mask.shallow_clone())]);
    let hidden = t5.encode(&read, &mask, &Dropout::off());
    let written = labels.masked_fill(&labels.eq(-100), 0);
    let logits = t5.logits(&t5.forward(&read, &mask, &written, &Dropout::off()));
    let labelled = |logits: &Tensor| logits.index(&[Some(targets.shallow_clone())]);
    let errors = (
        relative(&at(&hidden), &at(&expected(&format!("encoder_hidden{suffix}")))),
        relative(&labelled(&logits), &labelled(&expected(&format!("logits{suffix}")))),
    );
    if kind == Kind::Float {
        let loss = blip2_losses::lm::loss(&labelled(&logits), &labels.masked_select(&targets));
        let reference = expected("loss").double_value(&[]);
        assert!((loss.double_value(&[]) - reference).abs() < 1e-5 * reference, "{name}: loss");
    }
    println!("{name} {kind:?}: encoder {:.1e}, logits {:.1e}", errors.0, errors.1);
    errors
}

#[test]
fn hidden_states_and_logits_equal_transformers() {
    for name in CASES {
        let (encoder, logits) = errors(name, Kind::Float, "");
        assert!(encoder < 1e-5 && logits < 1e-5, "{name}: {encoder:e}, {logits:e}");
    }
}

/// A fixture's directory with keys of its configuration changed, and its configuration as it is read.
fn with_keys(name: &str, keys: &[(&str, Value)]) -> (tempfile::TempDir, Result<ModelDir, String>) {
    let folder = tempfile::tempdir().unwrap();
    fs::copy(case(name).join("model.safetensors"), folder.path().join("model.safetensors")).unwrap();
    let mut config: Value = serde_json::from_slice(&fs::read(case(name).join("config.json")).unwrap()).unwrap();
    keys.iter().for_each(|(key, value)| config[*key] = value.clone());
    fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let dir = ModelDir::open(folder.path()).map_err(|error| error.to_string());
    (folder, dir)
}

fn logits(name: &str, model: &LanguageModel) -> Tensor {
    let expected = expected(name);
    let (read, mask) = (expected("inputs_embeds"), expected("attention_mask").to_kind(Kind::Bool));
    let labels = expected("labels");
    let written = labels.masked_fill(&labels.eq(-100), 0);
    let t5 = t5(model);
    t5.logits(&t5.forward(&read, &mask, &written, &Dropout::off()))
}

#[test]
fn a_head_that_version_5_calls_tied_and_is_not_is_the_model_s_own() {
    let loaded = |dir: &ModelDir| {
        let config = LanguageConfig::from_json(dir.part(Part::Language).unwrap().config).unwrap();
        load_language_model(dir, &config, Device::Cpu, Kind::Float).unwrap().0
    };
    let (tied, unscaled) = (("tie_word_embeddings", json!(true)), ("scale_decoder_outputs", json!(false)));
    let (_folder, dir) = with_keys("t5_v1_1", &[tied.clone(), unscaled.clone()]);
    let dir = dir.unwrap();
    assert_eq!(dir.corrected_config().unwrap()["tie_word_embeddings"], false, "as version 4 says it");
    assert!(logits("t5_v1_1", &loaded(&dir)).equal(&logits("t5_v1_1", &model("t5_v1_1", Kind::Float))));

    let (_folder, dir) = with_keys("t5_v1_1", &[tied]);
    let error = dir.unwrap().part(Part::Language).err().unwrap().to_string();
    assert!(error.contains("language_model.lm_head.weight differs from language_model.shared.weight, but "), "{error}");

    // A head that is the embedding, and an output that is not scaled before it.
    let (_folder, dir) = with_keys("t5", &[unscaled]);
    let ratio = logits("t5", &loaded(&dir.unwrap())) / logits("t5", &model("t5", Kind::Float));
    let width = 24f64;
    assert!((ratio - width.sqrt()).abs().max().double_value(&[]) < 1e-2);
}

#[test]
fn in_half_precision_it_is_transformers_to_its_rounding() {
    for name in CASES {
        for (kind, suffix, tolerance) in [(Kind::BFloat16, "_bf16", 3e-2), (Kind::Half, "_fp16", 4e-3)] {
            let (encoder, logits) = errors(name, kind, suffix);
            assert!(encoder < tolerance && logits < tolerance, "{name} {kind:?}: {encoder:e}, {logits:e}");
        }
    }
}

#[test]
fn what_leaves_the_range_of_fp16_is_kept_in_fp32() {
    let (encoder, logits) = errors("t5_overflow", Kind::Half, "_fp16");
    assert!(encoder < 1e-2 && logits < 1e-2, "{encoder:e}, {logits:e}");
}

fn options(json: &Value, max_new_tokens: usize) -> GenerateOptions {
    let early_stopping = match &json["early_stopping"] {
        Value::Bool(true) => EarlyStopping::On,
        Value::String(never) if never == "never" => EarlyStopping::Never,
        _ => EarlyStopping::Off,
    };
    let decoding = match json["num_beams"].as_u64().unwrap() as usize {
        1 => Decoding::Greedy,
        beams => {
            let length_penalty = json["length_penalty"].as_f64().unwrap_or(1.0);
            Decoding::Beam { beams, length_penalty, early_stopping }
        }
    };
    let eos = serde_json::from_value(json["eos_token_id"].clone()).unwrap_or_else(|_| vec![1]);
    GenerateOptions { max_new_tokens, min_new_tokens: min_new_tokens(json), eos, decoding }
}

fn min_new_tokens(json: &Value) -> usize {
    json["min_new_tokens"].as_u64().unwrap_or(0) as usize
}

fn recorded(name: &str) -> Value {
    serde_json::from_slice(&fs::read(case(name).join("generate.json")).unwrap()).unwrap()
}

#[test]
fn generated_ids_equal_transformers() {
    for name in CASES.iter().copied().chain(["decoder_beams"]) {
        let given = expected(name);
        let (embeds, mask) = (given("inputs_embeds"), given("attention_mask").to_kind(Kind::Bool));
        let prefixes: Vec<Prompt> =
            (0..embeds.size()[0]).map(|row| embeds.get(row).index(&[Some(mask.get(row))])).collect();
        let json = recorded(name);
        let max_new_tokens = json["max_new_tokens"].as_u64().unwrap() as usize;
        let mut lengths = BTreeSet::new();
        let model = model(name, Kind::Float);
        for output in json["outputs"].as_array().unwrap() {
            let options = options(output, max_new_tokens);
            let ids: Vec<Vec<i64>> = serde_json::from_value(output["ids"].clone()).unwrap();
            assert_eq!(generate(&model, &prefixes, &options), ids, "{name}: {output}");
            for (prefix, ids) in prefixes.iter().zip(ids) {
                lengths.insert(ids.len());
                let alone = generate(&model, std::slice::from_ref(prefix), &options);
                assert_eq!(alone, [ids], "{name}, without the others' padding: {output}");
            }
        }
        assert!(lengths.len() > 1, "{name}: every text has the same length, so no end token was tried");
    }
}

/// One token behind many copies of a prefix, against the probabilities by which `transformers` draws it.
#[test]
fn tokens_are_drawn_with_the_probabilities_of_transformers() {
    const DRAWS: usize = 2000;
    let prefix = expected("decoder_beams")("inputs_embeds").get(0);
    let prefixes: Vec<Prompt> = (0..DRAWS).map(|_| prefix.shallow_clone()).collect();
    let model = model("decoder_beams", Kind::Float);
    let recorded = recorded("decoder_beams");
    for (sampling, seed) in recorded["samplings"].as_array().unwrap().iter().zip(0..) {
        let number = |key: &str| sampling[key].as_f64().unwrap();
        let top_k = Some(number("top_k") as usize).filter(|&top_k| top_k > 0);
        let decoding = Decoding::Nucleus { top_k, top_p: number("top_p"), temperature: number("temperature"), seed };
        let min_new_tokens = min_new_tokens(sampling);
        let options = GenerateOptions { max_new_tokens: 1, min_new_tokens, eos: vec![1], decoding };
        let mut drawn: BTreeMap<i64, f64> = BTreeMap::new();
        for ids in generate(&model, &prefixes, &options) {
            // Nothing in front of the end token.
            *drawn.entry(ids.first().copied().unwrap_or(1)).or_default() += 1.0;
        }
        for id in 0..48 {
            let count = drawn.get(&id).copied().unwrap_or(0.0);
            match sampling["probabilities"][id.to_string()].as_f64() {
                None => assert_eq!(count, 0.0, "token {id} is not among those that are kept: {sampling}"),
                Some(p) => {
                    let (mean, deviation) = (p * DRAWS as f64, (p * (1.0 - p) * DRAWS as f64).sqrt());
                    let off = (count - mean).abs();
                    assert!(
                        off < 4.5 * deviation + 2.0,
                        "token {id}: {count} of {DRAWS} draws, expected {mean}: {sampling}"
                    );
                }
            }
        }
    }
}
