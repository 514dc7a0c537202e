//! Models named by a hub id, through the programs.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::json;

use crate::model::{COMMIT, Model};
use crate::server::Server;
use crate::tiny_run::TinyRun;
use crate::{Ended, golden, program_command};

const LATER: &str = "89abcdef0123456789abcdef0123456789abcdef";

/// The golden case's directory as a hub has it at a commit.
fn served(case: &str, commit: &'static str) -> Model {
    let files: BTreeMap<String, Vec<u8>> = fs::read_dir(golden(case))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.file_name().unwrap().to_str().unwrap().to_string(), fs::read(&path).unwrap()))
        .collect();
    Model { commit, files }
}

/// Runs a program whose hub is `server` and whose cache lies in `home`.
fn run(program: &str, home: &Path, server: &Server, more: &[(&str, &str)], arguments: &[PathBuf]) -> Ended {
    let mut command = program_command(program);
    for variable in ["HF_HUB_CACHE", "HF_TOKEN", "HF_HUB_OFFLINE"] {
        command.env_remove(variable);
    }
    command.env("HF_HOME", home).env("HF_ENDPOINT", server.endpoint());
    Ended::of(command.envs(more.iter().copied()).args(arguments).output().unwrap())
}

#[test]
fn a_model_on_a_hub_captions_as_its_directory_does() {
    let home = tempfile::tempdir().unwrap();
    let model = served("stage2_llama", COMMIT);
    let server = Server::start(move |request| model.answer(request));
    let generate = |model: &str, more: &[(&str, &str)]| {
        let image = golden("stage2_llama").join("image_0.png");
        let arguments = ["generate", "--device", "cpu", "--json", "--model", model, "--image"].map(PathBuf::from);
        run(env!("CARGO_BIN_EXE_blip2"), home.path(), &server, more, &[arguments.as_slice(), &[image]].concat())
    };
    let offline = [("HF_HUB_OFFLINE", "1")];
    let message = generate("hf://org/name", &offline).failure();
    let folder = home.path().join("hub/models--org--name");
    assert!(message.starts_with(&format!("error: hf://org/name: not in {}, ", folder.display())), "{message}");

    let expected = generate(golden("stage2_llama").to_str().unwrap(), &[]).success();
    let fetched = generate("hf://org/name", &[("HF_TOKEN", "hf_mine")]);
    let told = format!("hf://org/name#{COMMIT}: 4 files, 1 MiB, to come into {}", folder.display());
    assert!(fetched.stderr.contains(&told), "{}", fetched.stderr);
    assert_eq!(fetched.success(), expected);
    assert!(server.requests().iter().all(|request| request.headers["authorization"] == "Bearer hf_mine"));
    assert_eq!(generate("hf://org/name", &offline).success(), expected);

    let message = generate("hf://org/absent", &[]).failure();
    assert!(message.contains("hf://org/absent: ") && message.contains(" has no such model; "), "{message}");
    let message = generate("hf://a/b/c", &[]).failure();
    assert_eq!(message, "error: expected hf://ORG/NAME or hf://ORG/NAME@REVISION, got hf://a/b/c");
}

#[test]
fn a_run_keeps_the_commit_of_its_tower_and_goes_on_with_it() {
    let (tiny, home) = (TinyRun::new(), tempfile::tempdir().unwrap());
    let tower = json!({"weights": "hf://org/name", "dtype": "fp32"});
    let config = tiny.stage1("hub", &[("/model/vision", tower)]);
    let train = |server: &Server, more: &[&str]| {
        let arguments = ["--config".into(), config.clone()].into_iter().chain(more.iter().map(PathBuf::from));
        run(env!("CARGO_BIN_EXE_train"), home.path(), server, &[], &arguments.collect::<Vec<_>>())
    };
    let model = served("stage1", COMMIT);
    let server = Server::start(move |request| model.answer(request));
    train(&server, &[]).success();
    let kept = fs::read_to_string(tiny.run("hub").join("config.yaml")).unwrap();
    assert!(kept.contains(&format!("weights: hf://org/name#{COMMIT}\n")), "{kept}");

    // The branch moves on; the run does not, and asks for nothing.
    let model = served("stage1", LATER);
    let server = Server::start(move |request| model.answer(request));
    assert!(train(&server, &[]).stderr.contains("finished already"));
    train(&server, &["--set", "schedule.steps=6"]).success();
    let kept = fs::read_to_string(tiny.run("hub").join("config.yaml")).unwrap();
    assert!(kept.contains(&format!("weights: hf://org/name#{COMMIT}\n")), "{kept}");
    let out = tiny.path("out");
    let arguments = ["export".into(), "--checkpoint".into(), tiny.run("hub"), "--out".into(), out.clone()];
    run(env!("CARGO_BIN_EXE_blip2"), home.path(), &server, &[], &arguments).success();
    assert!(out.join("model.safetensors").exists());
    assert!(server.requests().is_empty());
}

#[test]
fn an_export_of_trained_weights_alone_is_completed_from_the_hub_on_another_machine() {
    let (tiny, home) = (TinyRun::new(), tempfile::tempdir().unwrap());
    let model = served("stage2_llama", COMMIT);
    let server = Server::start(move |request| model.answer(request));
    let changes = [
        ("/model/qformer/init", json!(golden("stage2_llama"))),
        ("/model/vision/weights", json!("hf://org/name")),
        ("/model/language/weights", json!("hf://org/name")),
    ];
    let config = tiny.stage2("hub", "none", &changes);
    run(env!("CARGO_BIN_EXE_train"), home.path(), &server, &[], &["--config".into(), config]).success();
    let export = |more: &[&str]| {
        let out = tiny.path(&format!("out{}", more.len()));
        let arguments = ["export".into(), "--checkpoint".into(), tiny.run("hub"), "--out".into(), out.clone()];
        let more: Vec<PathBuf> = more.iter().map(PathBuf::from).collect();
        run(env!("CARGO_BIN_EXE_blip2"), home.path(), &server, &[], &[arguments.as_slice(), &more].concat()).success();
        out
    };
    let (whole, alone) = (export(&[]), export(&["--trained-only"]));
    let generate = |home: &Path, model: &Path, more: &[(&str, &str)]| {
        let arguments = ["generate", "--device", "cpu", "--json", "--image"].map(PathBuf::from);
        let image = golden("stage2_llama").join("image_0.png");
        let arguments = [arguments.as_slice(), &[image, "--model".into(), model.into()]].concat();
        run(env!("CARGO_BIN_EXE_blip2"), home, &server, more, &arguments)
    };
    let expected = generate(home.path(), &whole, &[]).success();
    // The other machine has neither the folders that the export names nor a cache.
    drop(home);
    let other = tempfile::tempdir().unwrap();
    let message = generate(other.path(), &alone, &[("HF_HUB_OFFLINE", "1")]).failure();
    let snapshot = other.path().join(format!("hub/models--org--name/snapshots/{COMMIT}"));
    assert!(message.contains(&format!("hf://org/name#{COMMIT}: not in {}, ", snapshot.display())), "{message}");
    assert_eq!(generate(other.path(), &alone, &[]).success(), expected);
    assert_eq!(generate(other.path(), &alone, &[("HF_HUB_OFFLINE", "1")]).success(), expected);

    // Other weights under the same name are refused.
    let weights = snapshot.join("model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&weights, bytes).unwrap();
    let message = generate(other.path(), &alone, &[]).failure();
    assert!(message.contains("was trained with (BLAKE3 "), "{message}");
}

#[test]
fn a_mistyped_id_is_told_with_its_key() {
    let (tiny, home) = (TinyRun::new(), tempfile::tempdir().unwrap());
    let config = tiny.stage1("hub", &[("/model/vision", json!({"weights": "hf://org"}))]);
    let server = Server::start(|_| crate::server::Answer::new(404, ""));
    let message =
        run(env!("CARGO_BIN_EXE_train"), home.path(), &server, &[], &["--config".into(), config.clone()]).failure();
    assert!(message.contains("hf://org: ") && message.contains(" has no such model; "), "{message}");
    let set = ["--config".into(), config, "--set".into(), "model.vision.weights=hf://a/b/c".into()];
    let message = run(env!("CARGO_BIN_EXE_train"), home.path(), &server, &[], &set).failure();
    let expected = "model.vision.weights: expected a path or hf://ORG/NAME[@REVISION], got \"hf://a/b/c\"";
    assert!(message.contains(expected), "{message}");
}
