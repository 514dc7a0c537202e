//! Generation from image files equals `transformers`' on the golden cases: greedy and beams, batched, fp32.

use std::fs;
use std::path::{Path, PathBuf};

use blip2_trainer::captioner::{Caption, CaptionOptions, Captioner, Decoding, EarlyStopping};
use serde_json::{Value, json};
use tch::Device;

/// The golden cases, one a kind of language model, each with its end token.
const CASES: [(&str, i64); 3] = [("stage2_llama", 3), ("stage2_opt", 3), ("stage2_t5", 1)];

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(name)
}

struct Case {
    folder: PathBuf,
    eos: i64,
    images: Vec<PathBuf>,
    prompts: Vec<String>,
    max_new_tokens: usize,
    min_new_tokens: usize,
    length_penalty: f64,
    outputs: Value,
}

fn case(name: &str) -> Case {
    case_of(*CASES.iter().find(|case| case.0 == name).unwrap())
}

fn case_of((name, eos): (&str, i64)) -> Case {
    let folder = folder(name);
    let json: Value = serde_json::from_slice(&fs::read(folder.join("generate.json")).unwrap()).unwrap();
    let texts = |key: &str| json[key].as_array().unwrap().iter().map(|v| v.as_str().unwrap().to_string());
    Case {
        eos,
        images: texts("images").map(|name| folder.join(name)).collect(),
        prompts: texts("prompts").collect(),
        max_new_tokens: json["max_new_tokens"].as_u64().unwrap() as usize,
        min_new_tokens: json["min_new_tokens"].as_u64().unwrap() as usize,
        length_penalty: json["length_penalty"].as_f64().unwrap(),
        outputs: json["outputs"].clone(),
        folder,
    }
}

fn captions(captioner: &Captioner, images: &[PathBuf], prompts: &[String], options: &CaptionOptions) -> Vec<Caption> {
    captioner.caption(images, prompts, options).unwrap().flat_map(Result::unwrap).collect()
}

impl Case {
    fn captioner(&self) -> Captioner {
        Captioner::open(&self.folder, Device::Cpu, None).unwrap()
    }

    fn options(&self, decoding: Decoding) -> CaptionOptions {
        CaptionOptions { max_new_tokens: self.max_new_tokens, min_new_tokens: self.min_new_tokens, decoding }
    }

    fn check(&self, output: &str, decoding: Decoding) {
        let captioner = self.captioner();
        let options = self.options(decoding);
        let got = captions(&captioner, &self.images, &self.prompts, &options);
        let expected = self.outputs[output].as_array().unwrap();
        assert_eq!(got.len(), expected.len());
        for ((caption, ids), prompt) in got.iter().zip(expected).zip(&self.prompts) {
            let until_eos: Vec<&Value> =
                ids.as_array().unwrap().iter().take_while(|&id| id != &json!(self.eos)).collect();
            assert_eq!(json!(caption.ids), json!(until_eos), "{}", caption.image.display());
            let words: Vec<String> = caption.ids.iter().map(|id| format!("t{id}")).collect();
            assert_eq!(caption.text, words.join(" "));
            // Alone, without the others' padding, it is the same.
            let alone =
                captions(&captioner, std::slice::from_ref(&caption.image), std::slice::from_ref(prompt), &options);
            assert_eq!(alone[0].ids, caption.ids);
        }
    }
}

#[test]
fn greedy_ids_equal_transformers() {
    for case in CASES.map(case_of) {
        case.check("beams_1", Decoding::Greedy);
    }
}

#[test]
fn beam_ids_equal_transformers() {
    for case in CASES.map(case_of) {
        let (length_penalty, early_stopping) = (case.length_penalty, EarlyStopping::Off);
        case.check("beams_3", Decoding::Beam { beams: 3, length_penalty, early_stopping });
    }
}

#[test]
fn prompts_of_different_lengths_share_a_batch() {
    for case in CASES.map(case_of) {
        let captioner = case.captioner();
        let options = case.options(Decoding::Greedy);
        let prompts: Vec<String> = (0..case.images.len()).map(|i| vec!["t7"; i].join(" ")).collect();
        let together = captions(&captioner, &case.images, &prompts, &options);
        for (i, caption) in together.iter().enumerate() {
            let alone = captions(&captioner, &case.images[i..=i], &prompts[i..=i], &options);
            assert_eq!(alone[0].ids, caption.ids, "prompt of {i} words");
        }
    }
}

#[test]
fn sampling_is_a_function_of_the_seed() {
    let case = case("stage2_llama");
    let captioner = case.captioner();
    // More than one batch.
    let images: Vec<PathBuf> = case.images.iter().cycle().take(20).cloned().collect();
    let draw = |seed| {
        let options = case.options(Decoding::Nucleus { top_k: None, top_p: 0.95, temperature: 2.0, seed });
        captions(&captioner, &images, &[], &options).into_iter().map(|c| c.ids).collect::<Vec<_>>()
    };
    assert_eq!(draw(1), draw(1));
    assert_ne!(draw(1), draw(2));
    assert_ne!(draw(1)[0], draw(1)[18], "the same image in another batch is another draw");
}

#[test]
fn a_number_of_prompts_that_fits_nothing_is_refused() {
    let case = case("stage2_llama");
    let captioner = case.captioner();
    let error = captioner.caption(&case.images, &case.prompts[..2], &case.options(Decoding::Greedy)).err().unwrap();
    assert_eq!(error.to_string(), "prompts: expected none, one, or one for each of the 6 images, got 2");
}

/// A copy of the golden model with one JSON file rewritten.
fn changed(name: &str, change: impl FnOnce(&mut Value)) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for file in ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"] {
        fs::copy(case("stage2_llama").folder.join(file), folder.path().join(file)).unwrap();
    }
    let path = folder.path().join(name);
    let mut json: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut json);
    fs::write(path, json.to_string()).unwrap();
    folder
}

#[test]
fn tokens_outside_the_vocabulary_are_refused() {
    for (file, key, value) in
        [("config.json", "before_queries", json!([2, 120])), ("generation_config.json", "eos_token_id", json!([3, -1]))]
    {
        let folder = changed(file, |json| json[key] = value);
        let error = Captioner::open(folder.path(), Device::Cpu, None).err().unwrap().to_string();
        assert!(error.contains(&format!("{key}: expected ids below the vocabulary's size of 120, got ")), "{error}");
    }
}

#[test]
fn sizes_that_no_file_has_are_refused_before_they_are_built() {
    let most = 1 << 24;
    for (pointer, value, expected) in [
        ("/num_query_tokens", json!(-1), "top level.num_query_tokens: got -1, supported: 1 to 2^24"),
        ("/num_query_tokens", json!(1_000_000_000_000_000i64), "num_query_tokens: got 1000000000000000"),
        ("/num_query_tokens", json!(most), "query_tokens"),
        ("/qformer_config/hidden_size", json!(most), "expected shape [32, 16777216]"),
        ("/text_config/hidden_size", json!(most), "language_projection.weight"),
        ("/vision_config/hidden_size", json!(most), "vision_model."),
    ] {
        let folder = changed("config.json", |json| *json.pointer_mut(pointer).unwrap() = value.clone());
        let error = Captioner::open(folder.path(), Device::Cpu, None).err().unwrap().to_string();
        assert!(error.contains(expected), "{pointer}: {error}");
    }
}

#[test]
fn the_key_before_queries_decides_what_an_empty_prompt_is() {
    let case = case("stage2_llama");
    let options = case.options(Decoding::Greedy);
    let ids = |dir: &Path, prompt: &str| {
        let captioner = Captioner::open(dir, Device::Cpu, None).unwrap();
        captions(&captioner, &case.images, &[prompt.to_string()], &options)
            .into_iter()
            .map(|c| c.ids)
            .collect::<Vec<_>>()
    };
    // transformers puts BOS (here t2) behind the queries; with the key nothing stands there.
    assert_eq!(ids(&case.folder, ""), ids(&case.folder, "t2"));
    let ours = changed("config.json", |json| json["before_queries"] = json!([]));
    assert_ne!(ids(ours.path(), ""), ids(ours.path(), "t2"));
    assert_eq!(ids(ours.path(), "t2"), ids(&case.folder, "t2"));
}

#[test]
fn opt_trained_here_has_its_bos_in_front_of_every_prompt() {
    let case = case("stage2_opt");
    let folder = tempfile::tempdir().unwrap();
    for file in ["generation_config.json", "model.safetensors", "tokenizer.json"] {
        fs::copy(case.folder.join(file), folder.path().join(file)).unwrap();
    }
    let mut config: Value = serde_json::from_slice(&fs::read(case.folder.join("config.json")).unwrap()).unwrap();
    config["before_queries"] = json!([]);
    fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let ours = Captioner::open(folder.path(), Device::Cpu, None).unwrap();
    let options = case.options(Decoding::Greedy);
    let ids = |captioner: &Captioner, prompt: &str| {
        let captions = captions(captioner, &case.images, &[prompt.to_string()], &options);
        captions.into_iter().map(|caption| caption.ids).collect::<Vec<_>>()
    };
    // The golden tokenizer adds no </s> (here t2), so there it has to be said.
    assert_eq!(ids(&ours, "t30 t7"), ids(&case.captioner(), "t2 t30 t7"));
    assert_eq!(ids(&ours, ""), ids(&case.captioner(), "t2"));
}

#[test]
fn texts_beyond_learned_positions_are_refused() {
    let case = case("stage2_opt");
    let captioner = case.captioner();
    let options = CaptionOptions { max_new_tokens: 87, min_new_tokens: 1, decoding: Decoding::Greedy };
    let error = captioner.caption(&case.images, &case.prompts, &options).err().unwrap().to_string();
    // 96 positions, of which 8 queries and a prompt of two tokens take their part.
    let expected = "the language model has 88 positions behind the queries, expected prompt and max_new_tokens within them, got 89; ask for fewer tokens, or with a shorter prompt";
    assert_eq!(error, expected);
}
