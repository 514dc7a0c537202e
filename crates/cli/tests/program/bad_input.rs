//! Hostile and broken inputs: one clear line, exit code 1.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;

use crate::tiny_run::{TinyRun, refused, train};
use crate::{blip2, copied, golden};

fn generate(model: &Path, image: PathBuf) -> crate::Ended {
    blip2([
        "generate".into(),
        "--model".into(),
        model.to_path_buf(),
        "--image".into(),
        image,
        "--device".into(),
        "cpu".into(),
    ])
}

fn inspect(path: &Path) -> crate::Ended {
    blip2([Path::new("inspect"), path])
}

#[test]
fn a_directory_without_config_json() {
    let model = copied("stage2_llama");
    fs::remove_file(model.path().join("config.json")).unwrap();
    let message = generate(model.path(), golden("stage2_llama/image_0.png")).failure();
    assert!(message.contains("no config.json"), "{message}");
}

#[test]
fn captions_longer_than_the_q_former_are_refused_before_a_model_is_loaded() {
    let tiny = TinyRun::new();
    let ended = train(&tiny.stage1("long", &[("/task/max_text_tokens", json!(65))]), &[]);
    assert!(!ended.stderr.contains("loading models"), "{}", ended.stderr);
    let expected = "task.max_text_tokens: expected at most the Q-Former's max_position_embeddings of 64, got 65";
    let message = refused(ended);
    assert!(message.contains(expected), "{message}");
}

#[test]
fn what_does_not_depend_on_each_other_is_told_at_once() {
    let tiny = TinyRun::new();
    let changes = [("/task/max_text_tokens", json!(65)), ("/data/image/size", json!(33))];
    let ended = train(&tiny.stage1("two", &changes), &[]);
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    for key in ["data.image.size: expected ", "task.max_text_tokens: expected "] {
        assert!(ended.stderr.lines().any(|line| line.starts_with(&format!("error: {key}"))), "{}", ended.stderr);
    }
}

#[test]
fn weights_that_are_a_git_lfs_pointer() {
    let model = copied("stage2_llama");
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 123\n";
    fs::write(model.path().join("model.safetensors"), pointer).unwrap();
    for ended in [generate(model.path(), golden("stage2_llama/image_0.png")), inspect(model.path())] {
        let message = ended.failure();
        assert!(message.contains("Git LFS pointer") && message.contains("git lfs pull"), "{message}");
    }
}

#[test]
fn truncated_weights() {
    let model = copied("stage2_llama");
    let path = model.path().join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    for keep in [0, 7, 100, bytes.len() - 1] {
        fs::write(&path, &bytes[..keep]).unwrap();
        for ended in [generate(model.path(), golden("stage2_llama/image_0.png")), inspect(&path)] {
            let message = ended.failure();
            assert!(message.contains("model.safetensors") && message.contains("truncated"), "{keep} bytes: {message}");
        }
    }
}

#[test]
fn a_header_that_claims_more_than_memory() {
    let model = copied("stage2_llama");
    fs::write(model.path().join("model.safetensors"), u64::MAX.to_le_bytes()).unwrap();
    let message = inspect(model.path()).failure();
    assert!(message.contains("its header claims"), "{message}");
}

#[test]
fn a_stage_1_model_cannot_caption() {
    let message = generate(&golden("stage1"), golden("stage2_llama/image_0.png")).failure();
    assert!(message.contains("Blip2ForConditionalGeneration"), "{message}");
}

#[test]
fn images_that_are_none() {
    let folder = tempfile::tempdir().unwrap();
    let (absent, text) = (folder.path().join("absent.png"), folder.path().join("text.png"));
    fs::write(&text, "not a picture").unwrap();
    for (image, reason) in [(absent, "cannot be read"), (text, "neither JPEG, PNG nor WebP")] {
        let message = generate(&golden("stage2_llama"), image.clone()).failure();
        assert!(message.contains(image.to_str().unwrap()) && message.contains(reason), "{message}");
    }
}

#[test]
fn a_batch_that_does_not_fit_is_refused() {
    let out = tempfile::tempdir().unwrap();
    let arguments = ["replay", "--task", "stage2", "--model"].map(PathBuf::from).into_iter().chain([
        golden("stage2_llama"),
        "--batch".into(),
        golden("stage2_llama/model.safetensors"),
        "--out".into(),
        out.path().join("out.safetensors"),
    ]);
    let message = blip2(arguments).failure();
    assert!(message.contains("pixel_values: expected f32 [B, 3, S, S], got nothing"), "{message}");
    assert_eq!(fs::read_dir(out.path()).unwrap().count(), 0);
}

#[test]
fn ranks_without_a_place_to_meet() {
    let program = Command::new(env!("CARGO_BIN_EXE_blip2"))
        .args(["replay", "--task", "stage1", "--model", "m", "--batch", "b", "--out", "o"])
        .envs([("RANK", "0"), ("WORLD_SIZE", "2")])
        .output()
        .unwrap();
    assert_eq!(program.status.code(), Some(1));
    let said = String::from_utf8_lossy(&program.stderr);
    let missing = |name: &str| said.lines().any(|line| line.starts_with(&format!("error: {name}: expected")));
    assert!(said.lines().count() == 2 && missing("MASTER_ADDR") && missing("MASTER_PORT"), "{said}");
}

#[test]
fn every_mistake_of_a_configuration_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bad.yaml");
    fs::write(&path, "task: {stage: 3}\noptimiser: {}\n").unwrap();
    let ended = blip2([Path::new("train"), Path::new("--config"), &path]);
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    let lines: Vec<&str> = ended.stderr.lines().collect();
    assert!(lines.len() > 3 && lines.iter().all(|line| line.starts_with("error: ")), "{}", ended.stderr);
    assert!(lines.iter().any(|line| line.contains("optimiser: expected a known key")), "{}", ended.stderr);
}

#[test]
fn an_export_of_what_is_no_run() {
    let folder = tempfile::tempdir().unwrap();
    for (source, reason) in
        [(folder.path().to_path_buf(), "expected a run's folder"), ("/absent".into(), "No such file")]
    {
        let arguments = ["export".into(), "--checkpoint".into(), source, "--out".into(), folder.path().join("out")];
        let message = blip2(arguments).failure();
        assert!(message.contains(reason), "{message}");
    }
    assert!(!folder.path().join("out").exists());
}
