//! A run keeps the commits that it began with.

use std::fs;
use std::path::Path;

use blip2_trainer::config::{Config, WeightsSource};

use crate::model::{COMMIT, Model};
use crate::server::Server;
use crate::{hub, repo_folder};

const LATER: &str = "89abcdef0123456789abcdef0123456789abcdef";

fn config(home: &Path, name: &str) -> Config {
    let path = home.join("given.yaml");
    let text = format!(
        "run: {{dir: {}, name: {name}}}\ntask: {{stage: 1}}\n\
         model: {{vision: {{weights: 'hf://org/name'}}, qformer: {{init: {}}}}}\ndata: {{train: [{{shards: s.tar}}]}}\n",
        home.display(),
        home.display()
    );
    fs::write(&path, text).unwrap();
    Config::load_resolved(&path).unwrap()
}

fn vision_id(config: &Config) -> String {
    config.model.vision.weights.hub_id().unwrap().to_string()
}

#[test]
fn a_run_goes_on_from_its_commit_though_the_branch_has_moved() {
    let home = tempfile::tempdir().unwrap();
    let model = Model::usual();
    let server = Server::start(move |request| model.answer(request));
    let mut begun = config(home.path(), "a");
    hub(home.path(), server.endpoint()).resolve(&mut begun).unwrap();
    assert_eq!(vision_id(&begun), format!("hf://org/name#{COMMIT}"));
    let snapshot = repo_folder(home.path()).join("snapshots").join(COMMIT);
    assert_eq!(&*begun.model.vision.weights, snapshot);
    assert_eq!(begun.model.qformer.init, WeightsSource::from(home.path()));
    fs::create_dir(home.path().join("a")).unwrap();
    fs::write(home.path().join("a/config.yaml"), begun.to_yaml()).unwrap();

    let moved = Model { commit: LATER, ..Model::usual() };
    let server = Server::start(move |request| moved.answer(request));
    let later = hub(home.path(), server.endpoint());
    let mut resumed = config(home.path(), "a");
    later.keep_commits(&mut resumed);
    assert!(resumed.differences(&begun).is_empty(), "{:?}", resumed.differences(&begun));
    later.resolve(&mut resumed).unwrap();
    assert_eq!(resumed, begun);
    assert!(server.requests().is_empty(), "what a run began with is in the cache");

    // A new run of the same command takes what the command has used, one of another command what the branch is now.
    let mut together = config(home.path(), "b");
    later.resolve(&mut together).unwrap();
    assert_eq!(vision_id(&together), format!("hf://org/name#{COMMIT}"));
    let mut fresh = config(home.path(), "b");
    hub(home.path(), server.endpoint()).resolve(&mut fresh).unwrap();
    assert_eq!(vision_id(&fresh), format!("hf://org/name#{LATER}"));
    assert_ne!(fresh.digest(), begun.digest());
}

#[test]
fn the_towers_alone_can_be_located() {
    let home = tempfile::tempdir().unwrap();
    let model = Model::usual();
    let server = Server::start(move |request| model.answer(request));
    let mut config = config(home.path(), "a");
    // A model that the hub does not have.
    config.model.qformer.init = WeightsSource::located("hf://org/bert".parse().unwrap(), "hf://org/bert".into());
    let located = hub(home.path(), server.endpoint());
    located.resolve_towers(&mut config).unwrap();
    assert_eq!(vision_id(&config), format!("hf://org/name#{COMMIT}"));
    assert!(server.requests().iter().all(|request| !request.path.contains("bert")));
    assert!(located.resolve(&mut config).unwrap_err().to_string().contains("hf://org/bert"));
}

#[test]
fn another_revision_is_another_configuration() {
    let home = tempfile::tempdir().unwrap();
    let model = Model::usual();
    let server = Server::start(move |request| model.answer(request));
    let mut begun = config(home.path(), "a");
    hub(home.path(), server.endpoint()).resolve(&mut begun).unwrap();
    let mut other = begun.clone();
    let id = format!("hf://org/name@{LATER}").parse().unwrap();
    other.model.vision.weights = WeightsSource::located(id, home.path().into());
    let differences = other.differences(&begun);
    assert_eq!(differences.len(), 1);
    assert_eq!(differences[0].key, "model.vision.weights");
}

#[test]
fn the_resolved_configuration_reads_back() {
    let home = tempfile::tempdir().unwrap();
    let text = config(home.path(), "a").to_yaml();
    assert!(text.contains("weights: hf://org/name\n"), "{text}");
    let path = home.path().join("again.yaml");
    fs::write(&path, text.replace("hf://org/name", &format!("hf://org/name@v1#{COMMIT}"))).unwrap();
    assert_eq!(vision_id(&Config::load_resolved(&path).unwrap()), format!("hf://org/name@v1#{COMMIT}"));
}
