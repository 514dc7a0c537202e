//! Everything that can go wrong is one line that says what to do.

use std::fs;
use std::path::Path;

use blip2_trainer::hub::Hub;

use crate::model::{COMMIT, Model};
use crate::server::{Answer, Request, Server};
use crate::{hub, repo_folder, settings};

fn message(hub: &Hub) -> String {
    let message = hub.folder(Path::new("hf://org/name")).unwrap_err().to_string();
    assert!(!message.contains('\n'), "{message}");
    message
}

/// What is said when the list of files is answered so.
fn said(token: Option<&str>, answer: impl Fn() -> Answer + Send + 'static) -> (String, String) {
    let home = tempfile::tempdir().unwrap();
    let server = Server::start(move |_| answer());
    let settings = blip2_trainer::hub::HubSettings {
        token: token.map(str::to_string),
        ..settings(home.path(), server.endpoint())
    };
    (message(&Hub::new(settings, Box::new(|_| {}))), server.endpoint())
}

#[test]
fn permissions_and_absence_say_what_to_do() {
    let (got, endpoint) = said(None, || Answer::new(401, ""));
    assert_eq!(got, format!("hf://org/name: {endpoint} asks for a token; set HF_TOKEN"));
    let (got, endpoint) = said(Some("hf_x"), || Answer::new(401, ""));
    assert_eq!(got, format!("hf://org/name: {endpoint} refuses the token in HF_TOKEN"));
    let (got, endpoint) = said(None, || Answer::new(401, "").with("x-error-code", "RepoNotFound"));
    let absent = |endpoint: &str| {
        format!("hf://org/name: {endpoint} has no such model; check the name, and set HF_TOKEN if it is private")
    };
    assert_eq!(got, absent(&endpoint));
    let (got, endpoint) = said(None, || Answer::new(404, "Not Found"));
    assert_eq!(got, absent(&endpoint));
    let (got, _) = said(None, || Answer::new(404, "").with("x-error-code", "RevisionNotFound"));
    assert_eq!(got, "hf://org/name: this model has no revision main");
    let (got, endpoint) = said(Some("hf_x"), || Answer::new(403, "").with("x-error-code", "GatedRepo"));
    let consent = format!(
        "hf://org/name: its owner asks for consent; accept the conditions at {endpoint}/org/name and set HF_TOKEN to a token of that account"
    );
    assert_eq!(got, consent);
    let (got, _) = said(None, || Answer::new(418, ""));
    assert!(got.ends_with("/revision/main?blobs=true: the answer is 418"), "{got}");
    let (got, _) = said(None, || Answer::new(200, "<html>"));
    assert!(got.contains("?blobs=true: invalid JSON: "), "{got}");
}

#[test]
fn the_credentials_of_an_endpoint_are_not_shown() {
    let home = tempfile::tempdir().unwrap();
    let server = Server::start(|_| Answer::new(418, ""));
    let endpoint = |user: &str| server.endpoint().replace("://", &format!("://{user}@"));
    let got = message(&hub(home.path(), endpoint("user:secret")));
    assert!(got.contains(&format!("{}/api/models/org/name", endpoint("..."))) && !got.contains("secret"), "{got}");
}

#[test]
fn a_gated_file_of_a_listed_model_says_so_too() {
    let (home, model) = (tempfile::tempdir().unwrap(), Model::usual());
    let server = Server::start(move |request| match request.path.contains("/resolve/") {
        true => Answer::new(401, "").with("x-error-code", "GatedRepo"),
        false => model.answer(request),
    });
    let got = message(&hub(home.path(), server.endpoint()));
    assert!(got.contains("its owner asks for consent; accept the conditions at "), "{got}");
}

#[test]
fn offline_the_folder_that_was_looked_in_is_named_and_what_is_there_is_taken() {
    let (home, model) = (tempfile::tempdir().unwrap(), Model::usual());
    let server = Server::start(move |request| model.answer(request));
    let offline = || {
        let settings = blip2_trainer::hub::HubSettings { offline: true, ..settings(home.path(), server.endpoint()) };
        Hub::new(settings, Box::new(|_| {}))
    };
    let expected =
        format!("hf://org/name: not in {}, and nothing is fetched offline; ", repo_folder(home.path()).display());
    assert!(message(&offline()).starts_with(&expected), "{}", message(&offline()));
    assert!(server.requests().is_empty());

    let snapshot = hub(home.path(), server.endpoint()).folder(Path::new("hf://org/name")).unwrap();
    let before = server.requests().len();
    assert_eq!(offline().folder(Path::new("hf://org/name")).unwrap(), snapshot);
    assert_eq!(server.requests().len(), before);

    // A snapshot without its weights is not the model.
    fs::remove_file(snapshot.join("model.safetensors")).unwrap();
    let expected = format!("not in {}", repo_folder(home.path()).join("snapshots").join(COMMIT).display());
    assert!(message(&offline()).contains(&expected), "{}", message(&offline()));
}

#[test]
fn a_hub_that_cannot_be_reached_names_its_address() {
    let home = tempfile::tempdir().unwrap();
    // Nothing listens there any more.
    let endpoint = Server::start(|_| Answer::new(200, "")).endpoint();
    let got = message(&hub(home.path(), endpoint.clone()));
    assert!(got.starts_with(&format!("hf://org/name: {endpoint}/api/models/org/name/")), "{got}");
    assert!(
        got.contains(" cannot be reached: ") && got.ends_with("; HF_HUB_OFFLINE=1 takes what was fetched before"),
        "{got}"
    );
}

/// What is said when the weights are answered so, and whether anything of them is left in the cache.
fn weights_answered(answer: impl Fn(&Model, &Request) -> Answer + Send + 'static) -> (String, bool) {
    let (home, model) = (tempfile::tempdir().unwrap(), Model::usual());
    let digest = model.digest("model.safetensors");
    let server = Server::start(move |request| match request.path.ends_with("/model.safetensors") {
        true => answer(&model, request),
        false => model.answer(request),
    });
    let got = message(&hub(home.path(), server.endpoint()));
    let blob = repo_folder(home.path()).join("blobs").join(&digest);
    assert!(!blob.exists());
    let partial = blob.with_extension("incomplete");
    (got, fs::metadata(partial).is_ok_and(|meta| meta.len() > 0))
}

#[test]
fn content_of_another_digest_is_thrown_away() {
    let (got, left) = weights_answered(|model, request| {
        let mut content = model.weights().to_vec();
        content[1234] ^= 1;
        Answer::file(request, &content)
    });
    assert!(got.starts_with("hf://org/name#0123"), "{got}");
    assert!(
        got.contains("model.safetensors: expected the sha256 ")
            && got.ends_with("; what came was thrown away, try again"),
        "{got}"
    );
    assert!(!left);
}

#[test]
fn more_bytes_than_the_file_has_are_refused() {
    let (got, left) = weights_answered(|model, request| Answer::file(request, &[model.weights(), b"x"].concat()));
    assert!(got.ends_with("model.safetensors: expected 200000 bytes, got more; what came was thrown away"), "{got}");
    assert!(!left);
}

#[test]
fn an_lfs_pointer_is_no_file() {
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 200000\n";
    let (got, left) = weights_answered(move |_, request| Answer::file(request, pointer.as_bytes()));
    assert!(got.contains("model.safetensors: got a Git LFS pointer instead of the file; http://127.0.0.1:"), "{got}");
    assert!(!left);
}

#[test]
fn a_full_disk_is_said_with_what_is_missing() {
    let (home, model) = (tempfile::tempdir().unwrap(), Model::usual());
    let digest = model.digest("model.safetensors");
    let server = Server::start(move |request| model.answer(request));
    let blobs = repo_folder(home.path()).join("blobs");
    fs::create_dir_all(&blobs).unwrap();
    // Every write to this device finds it full.
    std::os::unix::fs::symlink("/dev/full", blobs.join(format!("{digest}.incomplete"))).unwrap();
    let got = message(&hub(home.path(), server.endpoint()));
    assert!(
        got.contains(": 1 MiB are to come, ") && got.ends_with("free some, or set HF_HOME to a folder on another disk"),
        "{got}"
    );
}

#[test]
fn a_model_larger_than_the_disk_is_refused_before_it_is_fetched() {
    let home = tempfile::tempdir().unwrap();
    let listing = format!(
        r#"{{"sha": "{COMMIT}", "siblings": [{{"rfilename": "config.json", "size": 2, "blobId": "{COMMIT}"}},
            {{"rfilename": "model.safetensors", "lfs": {{"sha256": "{}", "size": 1000000000000000}}}}]}}"#,
        "0".repeat(64)
    );
    let server = Server::start(move |_| Answer::new(200, listing.clone()));
    let got = message(&hub(home.path(), server.endpoint()));
    assert!(got.contains(": 953674317 MiB are to come, "), "{got}");
    assert_eq!(server.requests().len(), 1);
}

#[test]
fn a_model_without_readable_weights_says_what_it_has() {
    let home = tempfile::tempdir().unwrap();
    let model = Model::new(&[("config.json", b"{}"), ("flax_model.msgpack", b"x")]);
    let server = Server::start(move |request| model.answer(request));
    let got = message(&hub(home.path(), server.endpoint()));
    let expected = "expected model.safetensors or pytorch_model.bin, whole or in shards, among its files, found neither; \
                    it has config.json, flax_model.msgpack";
    assert!(got.ends_with(expected), "{got}");
}

#[test]
fn lists_that_would_write_outside_the_cache_are_refused() {
    for (digest, name) in [("../../../../escape", "model.safetensors"), (COMMIT, "../escape")] {
        let home = tempfile::tempdir().unwrap();
        let index = format!(r#"{{"weight_map": {{"a": "{name}"}}}}"#);
        let listing = format!(
            r#"{{"sha": "{COMMIT}", "siblings": [{{"rfilename": "config.json", "size": 2, "blobId": "{digest}"}},
                {{"rfilename": "model.safetensors.index.json", "size": {}, "blobId": "{COMMIT}"}},
                {{"rfilename": "../escape", "size": 1, "blobId": "{COMMIT}"}}]}}"#,
            index.len()
        );
        let server = Server::start(move |request| match request.path.contains("/resolve/") {
            true => Answer::new(200, index.clone()),
            false => Answer::new(200, listing.clone()),
        });
        let got = message(&hub(home.path(), server.endpoint()));
        assert!(got.contains("has no size or digest of it") || got.contains("is not a plain file name"), "{got}");
    }
}

#[test]
fn what_is_no_id_is_told_by_its_form() {
    let home = tempfile::tempdir().unwrap();
    let got = hub(home.path(), String::new()).folder(Path::new("hf://a/b/c")).unwrap_err().to_string();
    assert_eq!(got, "expected hf://ORG/NAME or hf://ORG/NAME@REVISION, got hf://a/b/c");
}
