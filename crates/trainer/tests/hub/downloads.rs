//! What arrives, and what an interruption costs.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use blip2_trainer::hub::{Hub, HubError, HubEvent};

use crate::model::{COMMIT, Model};
use crate::server::{Answer, Request, Server};
use crate::{hub, repo_folder, settings};

fn folder(hub: &Hub) -> Result<PathBuf, HubError> {
    hub.folder(Path::new("hf://org/name"))
}

fn is_weights(request: &Request) -> bool {
    request.path.ends_with("/model.safetensors")
}

fn ranges(server: &Server) -> Vec<Option<String>> {
    server.requests().iter().filter(|r| is_weights(r)).map(|r| r.headers.get("range").cloned()).collect()
}

#[test]
fn a_model_lies_as_the_hubs_own_tools_lay_it_and_only_what_is_read_is_fetched() {
    let (home, model) = (tempfile::tempdir().unwrap(), Model::usual());
    let answering = model.clone();
    let server = Server::start(move |request| answering.answer(request));
    let snapshot = folder(&hub(home.path(), server.endpoint())).unwrap();
    assert_eq!(snapshot, repo_folder(home.path()).join("snapshots").join(COMMIT));
    let mut names: Vec<String> =
        fs::read_dir(&snapshot).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]);
    assert_eq!(fs::read(snapshot.join("model.safetensors")).unwrap(), model.weights());
    let link = fs::read_link(snapshot.join("model.safetensors")).unwrap();
    assert_eq!(link, Path::new("../../blobs").join(model.digest("model.safetensors")));
    assert_eq!(fs::read_to_string(repo_folder(home.path()).join("refs/main")).unwrap(), COMMIT);
    let theirs = hf_hub::Cache::new(repo_folder(home.path()).parent().unwrap().into()).model("org/name".into());
    assert_eq!(theirs.get("model.safetensors"), Some(snapshot.join("model.safetensors")));

    // Nothing is fetched twice: the second time only the branch is asked for.
    let before = server.requests().len();
    assert_eq!(folder(&hub(home.path(), server.endpoint())).unwrap(), snapshot);
    assert_eq!(server.requests().len(), before + 1);
    // A commit that is there needs no network at all.
    let pinned = format!("hf://org/name@{COMMIT}");
    assert_eq!(hub(home.path(), server.endpoint()).folder(Path::new(&pinned)).unwrap(), snapshot);
    assert_eq!(server.requests().len(), before + 1);
}

#[test]
fn a_snapshot_of_other_tools_is_completed_once_and_stays_usable_without_the_hub() {
    let (home, model) = (tempfile::tempdir().unwrap(), Model::usual());
    let answering = model.clone();
    let server = Server::start(move |request| answering.answer(request));
    let snapshot = repo_folder(home.path()).join("snapshots").join(COMMIT);
    fs::create_dir_all(&snapshot).unwrap();
    for name in ["config.json", "model.safetensors"] {
        fs::write(snapshot.join(name), &model.files[name]).unwrap();
    }
    let pinned = format!("hf://org/name#{COMMIT}");
    let ask = |endpoint: String| hub(home.path(), endpoint).folder(Path::new(&pinned)).unwrap();
    // A hub that has forgotten the model is no reason to stop.
    let gone = Server::start(|_| Answer::new(404, "Not Found"));
    assert_eq!(ask(gone.endpoint()), snapshot);
    assert!(!snapshot.join("tokenizer.json").exists());

    assert_eq!(ask(server.endpoint()), snapshot);
    assert_eq!(fs::read(snapshot.join("tokenizer.json")).unwrap(), b"{}");
    // It has no preprocessing, which is written down as the hub's own tools do.
    let noted = repo_folder(home.path()).join(".no_exist").join(COMMIT);
    assert!(noted.join("preprocessor_config.json").exists() && !noted.join("tokenizer.json").exists());
    assert!(!repo_folder(home.path()).join("refs").exists(), "a commit says nothing of the branch");
    let before = server.requests().len();
    assert_eq!(ask(server.endpoint()), snapshot);
    assert_eq!(server.requests().len(), before);
}

#[test]
fn shards_are_those_that_the_index_names() {
    let home = tempfile::tempdir().unwrap();
    let index =
        br#"{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}"#;
    let mut model = Model::new(&[
        ("config.json", b"{}"),
        ("model.safetensors.index.json", index),
        ("model-00001-of-00002.safetensors", b"first"),
        ("model-00002-of-00002.safetensors", b"second"),
        ("model-00003-of-00003.safetensors", b"of another index"),
    ]);
    let answering = model.clone();
    let server = Server::start(move |request| answering.answer(request));
    let snapshot = folder(&hub(home.path(), server.endpoint())).unwrap();
    assert_eq!(fs::read(snapshot.join("model-00002-of-00002.safetensors")).unwrap(), b"second");
    assert!(!snapshot.join("model-00003-of-00003.safetensors").exists());

    model.files.remove("model-00002-of-00002.safetensors");
    let (home, server) = (tempfile::tempdir().unwrap(), Server::start(move |request| model.answer(request)));
    let message = folder(&hub(home.path(), server.endpoint())).unwrap_err().to_string();
    assert!(
        message.contains("names the shard model-00002-of-00002.safetensors, which this model does not have"),
        "{message}"
    );
}

#[test]
fn files_on_another_host_arrive_and_it_never_sees_the_token() {
    let (home, model) = (tempfile::tempdir().unwrap(), Model::usual());
    let weights = model.weights().to_vec();
    let elsewhere = Server::start(move |request| Answer::file(request, &weights));
    let there = format!("http://localhost:{}/large", elsewhere.port);
    let answering = model.clone();
    let server = Server::start(move |request| match is_weights(request) {
        true => Answer::new(302, "").with("location", there.clone()),
        false => answering.answer(request),
    });
    let mut settings = settings(home.path(), server.endpoint());
    settings.token = Some("hf_secret".into());
    let snapshot = folder(&Hub::new(settings, Box::new(|_| {}))).unwrap();
    assert_eq!(fs::read(snapshot.join("model.safetensors")).unwrap(), model.weights());
    assert!(server.requests().iter().all(|request| request.headers["authorization"] == "Bearer hf_secret"));
    assert_eq!(elsewhere.requests().len(), 1);
    assert!(!elsewhere.requests()[0].headers.contains_key("authorization"));
}

#[test]
fn a_broken_connection_goes_on_from_the_last_byte() {
    let (home, model) = (tempfile::tempdir().unwrap(), Model::usual());
    let answering = model.clone();
    let mut breaks = 2;
    let server = Server::start(move |request| {
        let answer = answering.answer(request);
        if is_weights(request) && breaks > 0 {
            breaks -= 1;
            return answer.cut_after(70_000);
        }
        answer
    });
    let snapshot = folder(&hub(home.path(), server.endpoint())).unwrap();
    assert_eq!(fs::read(snapshot.join("model.safetensors")).unwrap(), model.weights());
    assert_eq!(ranges(&server), [None, Some("bytes=70000-".into()), Some("bytes=140000-".into())]);
}

#[test]
fn a_server_that_falls_silent_is_asked_again_from_the_last_byte() {
    let silent = |seconds: f64, answer: fn(Answer, usize) -> Answer| {
        let (home, model) = (tempfile::tempdir().unwrap(), Model::usual());
        let answering = model.clone();
        let mut asked = 0;
        let server = Server::start(move |request| {
            let whole = answering.answer(request);
            asked += usize::from(is_weights(request));
            if is_weights(request) { answer(whole, asked) } else { whole }
        });
        let mut settings = settings(home.path(), server.endpoint());
        settings.read_timeout = Duration::from_secs_f64(seconds);
        let folder = folder(&Hub::new(settings, Box::new(|_| {})));
        let came = folder.map(|folder| fs::read(folder.join("model.safetensors")).unwrap() == model.weights());
        (came.map_err(|error| error.to_string()), ranges(&server))
    };
    let once = silent(1.0, |answer, asked| if asked == 1 { answer.stall_after(70_000) } else { answer });
    assert_eq!(once, (Ok(true), vec![None, Some("bytes=70000-".into())]));

    let (always, _) = silent(0.5, |answer, asked| answer.stall_after(if asked == 1 { 50_000 } else { 0 }));
    let message = always.unwrap_err();
    assert!(message.contains("interrupted after 50000 of 200000 bytes (nothing came for 500ms)"), "{message}");
}

#[test]
fn the_next_command_goes_on_where_an_interrupted_one_stopped() {
    let (home, model) = (tempfile::tempdir().unwrap(), Model::usual());
    let answering = model.clone();
    let mut first = true;
    let server = Server::start(move |request| match is_weights(request) {
        true if std::mem::take(&mut first) => answering.answer(request).cut_after(50_000),
        true => answering.answer(request).cut_after(0),
        false => answering.answer(request),
    });
    let message = folder(&hub(home.path(), server.endpoint())).unwrap_err().to_string();
    assert!(message.contains("model.safetensors: interrupted after 50000 of 200000 bytes ("), "{message}");
    assert!(message.ends_with("; the same command goes on from there"), "{message}");

    let answering = model.clone();
    let server = Server::start(move |request| answering.answer(request));
    let events = Arc::new(Mutex::new(Vec::new()));
    let heard = events.clone();
    let next = Hub::new(settings(home.path(), server.endpoint()), Box::new(move |e| heard.lock().unwrap().push(e)));
    let snapshot = folder(&next).unwrap();
    assert_eq!(fs::read(snapshot.join("model.safetensors")).unwrap(), model.weights());
    assert_eq!(ranges(&server), [Some("bytes=50000-".into())]);
    let events = events.lock().unwrap();
    assert!(matches!(&events[0], HubEvent::Begins { files: 1, bytes: 150_000, .. }), "{events:?}");
    assert_eq!(events[events.len() - 2..], [HubEvent::Progress { done: 150_000, bytes: 150_000 }, HubEvent::Ends]);
}

#[test]
fn a_server_without_ranges_sends_the_whole_file_again() {
    let (home, model) = (tempfile::tempdir().unwrap(), Model::usual());
    let answering = model.clone();
    let mut breaks = 1;
    let server = Server::start(move |request| match is_weights(request) {
        true if breaks > 0 => {
            breaks -= 1;
            Answer::new(200, answering.weights()).cut_after(70_000)
        }
        true => Answer::new(200, answering.weights()),
        false => answering.answer(request),
    });
    let snapshot = folder(&hub(home.path(), server.endpoint())).unwrap();
    assert_eq!(fs::read(snapshot.join("model.safetensors")).unwrap(), model.weights());
    assert_eq!(ranges(&server), [None, Some("bytes=70000-".into())]);
}

#[test]
fn a_busy_hub_is_asked_again() {
    let (home, model) = (tempfile::tempdir().unwrap(), Model::usual());
    let mut busy = 3;
    let server = Server::start(move |request| match busy {
        0 => model.answer(request),
        _ => {
            busy -= 1;
            Answer::new(503, "later")
        }
    });
    folder(&hub(home.path(), server.endpoint())).unwrap();
}

#[test]
fn two_that_fetch_at_once_fetch_each_file_once() {
    let (home, model) = (tempfile::tempdir().unwrap(), Model::usual());
    let server = Server::start(move |request| model.answer(request));
    let fetch = || folder(&hub(home.path(), server.endpoint())).unwrap();
    std::thread::scope(|scope| {
        let other = scope.spawn(fetch);
        assert_eq!(fetch(), other.join().unwrap());
    });
    assert_eq!(ranges(&server), [None]);
}
