//! The program writes the ids that the references write.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value, json};

fn golden(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(case)
}

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn caption(model: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_caption")).arg("--model").arg(model).args(arguments).output().unwrap()
}

fn lines(output: &Output) -> Vec<Value> {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Greedy ids of a golden case, which `transformers` computed with and without prompts of its own.
fn equal_transformers(case: &str, eos: u64) {
    let folder = golden(case);
    let expected = read_json(&folder.join("generate.json"));
    let texts = |key: &str| expected[key].as_array().unwrap().iter().map(|v| v.as_str().unwrap().to_string());
    let images: Vec<String> = texts("images").map(|image| folder.join(image).display().to_string()).collect();
    let prompts: Vec<String> = texts("prompts").collect();
    let numbers = ["max_new_tokens", "min_new_tokens"].map(|key| expected[key].to_string());
    let mut arguments = vec!["--max-new-tokens", &numbers[0], "--min-new-tokens", &numbers[1], "--image"];
    arguments.extend(images.iter().map(String::as_str));
    arguments.extend(prompts.iter().flat_map(|prompt| ["--prompt", prompt]));
    let got = lines(&caption(&folder, &arguments));
    let expected = expected["outputs"]["beams_1"].as_array().unwrap();
    assert_eq!(got.len(), expected.len());
    for ((got, expected), image) in got.iter().zip(expected).zip(&images) {
        let expected: Vec<&Value> = expected.as_array().unwrap().iter().take_while(|&id| *id != json!(eos)).collect();
        assert_eq!(got["image"], json!(image));
        assert_eq!(got["ids"], json!(expected), "{image}");
        let words = expected.iter().map(|id| format!("t{id}")).collect::<Vec<_>>().join(" ");
        assert_eq!(got["text"], json!(words), "{image}");
    }
}

#[test]
fn greedy_ids_of_a_llama_equal_transformers() {
    equal_transformers("stage2_llama", 3);
}

#[test]
fn greedy_ids_of_a_t5_equal_transformers() {
    equal_transformers("stage2_t5", 1);
}

#[test]
fn a_model_that_the_example_does_not_compute_is_told_by_name() {
    let folder = std::env::temp_dir().join(format!("blip2-candle-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let mut config = read_json(&golden("stage2_llama").join("config.json"));
    config["text_config"]["model_type"] = json!("gpt2");
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    fs::copy(golden("stage2_llama").join("model.safetensors"), folder.join("model.safetensors")).unwrap();
    let output = caption(&folder, &["--image", "none.png"]);
    fs::remove_dir_all(&folder).unwrap();
    assert!(!output.status.success());
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    let expected =
        "error: config.json: text_config.model_type: expected llama or t5, which this example computes, got gpt2\n";
    assert_eq!(message, expected);
}
