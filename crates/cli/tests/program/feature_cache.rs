//! The cache of image features on disk: what is trained on, who shares it, what a kill, damage or a full disk does to it.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::resume::{Random, changes, pace_of, run_with_kills};
use crate::tiny_run::{TinyRun, assert_same_end, checkpoint_bytes, metrics, train};
use crate::{Ended, blip2};

/// All six pictures in every step, so that a step is an epoch.
fn whole_epochs<'a>(tiny: &TinyRun, steps: u64) -> Vec<(&'a str, Value)> {
    vec![
        ("/data/feature_cache", json!(tiny.path("cache"))),
        ("/schedule/global_batch", json!(6)),
        ("/schedule/steps", json!(steps)),
        ("/eval/every", json!(100)),
    ]
}

fn with<'a>(changes: &[(&'a str, Value)], more: &[(&'a str, Value)]) -> Vec<(&'a str, Value)> {
    changes.iter().chain(more).cloned().collect()
}

/// The part of each step's features that was there before it.
fn hits(run: &Path) -> Vec<f64> {
    let steps: Vec<Value> = metrics(run).into_iter().filter(|record| record.get("loss").is_some()).collect();
    for step in &steps {
        assert_eq!(step["cache_hits"].as_f64().unwrap() + step["cache_misses"].as_f64().unwrap(), 1.0);
    }
    steps.iter().map(|step| step["cache_hits"].as_f64().unwrap()).collect()
}

/// The part of each evaluation's features that was there before it.
fn held_out_hits(run: &Path) -> Vec<f64> {
    metrics(run).iter().filter_map(|record| record["val_cache_hits"].as_f64()).collect()
}

/// What `cache stats` says of each key.
fn stats(folder: &Path) -> Vec<Value> {
    let printed = cache("stats", &[folder, Path::new("--json")]).success();
    printed.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn cache(command: &str, arguments: &[&Path]) -> Ended {
    blip2::<PathBuf>(["cache".into(), command.into()].into_iter().chain(arguments.iter().map(|a| a.to_path_buf())))
}

fn json_of(ended: Ended) -> Value {
    serde_json::from_str(&ended.success()).unwrap()
}

/// The files of rows below a cache.
fn files(folder: &Path) -> Vec<PathBuf> {
    let list = |path: &Path| fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).collect::<Vec<_>>();
    let mut files: Vec<PathBuf> = list(folder).iter().flat_map(|key| list(key)).collect();
    files.retain(|file| file.extension().is_some_and(|extension| extension == "feat"));
    files.sort();
    files
}

#[test]
fn killed_at_random_moments_a_run_with_a_cache_ends_in_the_same_bytes() {
    let tiny = TinyRun::new();
    // Half of the run fills the cache, the other half reads it.
    let changes = with(
        &changes(),
        &[
            ("/data/feature_cache", json!(tiny.path("cache"))),
            ("/data/feature_views", json!(8)),
            ("/data/feature_format", json!("int8")),
        ],
    );
    let (whole, killed) = (tiny.stage1("whole", &changes), tiny.stage1("killed", &changes));
    let pace = pace_of(&whole, &tiny.run("whole"));
    let found = hits(&tiny.run("whole"));
    assert!(found[0] == 0.0 && found[found.len() - 1] == 1.0, "{found:?}");
    assert_eq!(held_out_hits(&tiny.run("whole")), [0.0, 1.0]);
    fs::rename(tiny.path("cache"), tiny.path("cache of whole")).unwrap();

    let kills = std::env::var("BLIP2_KILLS").map_or(6, |kills| kills.parse().unwrap());
    run_with_kills(&killed, &tiny.run("killed"), kills, &pace, &mut Random(11));
    assert_same_end(&tiny.run("killed"), &tiny.run("whole"), 24);

    // The cache that it left is whole, and the same configuration finds its rows in another run's folder, too.
    let verified = json_of(cache("verify", &[&tiny.path("cache"), Path::new("--json")]));
    // Eight views of six pictures, and the held-out ones.
    assert_eq!((&verified["good"], &verified["bad"]), (&json!(48 + 6), &json!([])));
    let again = tiny.stage1("again", &changes);
    train(&again, &[]).success();
    assert_same_end(&tiny.run("again"), &tiny.run("whole"), 24);
}

#[test]
fn later_epochs_stages_and_runs_read_what_the_first_has_stored() {
    let tiny = TinyRun::new();
    let changes = whole_epochs(&tiny, 3);
    let ended = train(&tiny.stage1("stage1", &changes), &[]);
    assert!(
        ended.stderr.contains("feature cache ") && ended.stderr.contains("when all 6 are there"),
        "{}",
        ended.stderr
    );
    ended.success();
    assert_eq!(hits(&tiny.run("stage1")), [0.0, 1.0, 1.0]);
    train(&tiny.stage2("stage2", "stage1", &changes), &[]).success();
    assert_eq!(hits(&tiny.run("stage2")), [1.0, 1.0, 1.0]);

    // What is read is what the run that wrote it has trained on: a run that differs in name alone for the cache ends in the same weights.
    let reader = with(&changes, &[("/data/feature_max_gib", json!(1))]);
    train(&tiny.stage1("reader", &reader), &[]).success();
    assert_eq!(hits(&tiny.run("reader")), [1.0, 1.0, 1.0]);
    let [stage1, reader] = ["stage1", "reader"].map(|run| checkpoint_bytes(&tiny.run(run), 3));
    for name in ["model.safetensors", "optimizer.safetensors"] {
        assert!(stage1[name] == reader[name], "{name} differs");
    }

    // Another hidden state, another number format, other views: nothing of it is taken.
    let others: [&[(&str, Value)]; 4] = [
        &[("/model/vision/layer", json!(0))],
        &[("/model/vision/dtype", json!("bf16"))],
        &[("/data/feature_format", json!("int8"))],
        &[("/data/image/augment", json!("crop_flip"))],
    ];
    for (at, other) in others.iter().enumerate() {
        let name = format!("other{at}");
        train(&tiny.stage1(&name, &with(&changes, other)), &[]).success();
        assert_eq!(hits(&tiny.run(&name)), [0.0, 1.0, 1.0], "{other:?}");
    }
    let printed = cache("stats", &[&tiny.path("cache"), Path::new("--json")]).success();
    assert_eq!(printed.lines().count(), 5, "{printed}");
}

#[test]
fn held_out_features_are_stored_by_the_first_evaluation_and_read_by_all_others() {
    let tiny = TinyRun::new();
    let cached = |folder: &str| ("/data/feature_cache", json!(tiny.path(folder)));
    let more = [
        ("/data/feature_format", json!("int8")),
        // Training has other views, so that these rows are the evaluations' own.
        ("/data/image/augment", json!("crop_flip")),
        ("/eval/every", json!(2)),
    ];
    let changes = with(&more, &[cached("cache")]);
    let ended = train(&tiny.stage1("stage1", &changes), &[]);
    assert!(ended.stderr.contains("feature cache of the held-out set "), "{}", ended.stderr);
    ended.success();
    assert_eq!(held_out_hits(&tiny.run("stage1")), [0.0, 1.0]);
    let [none] = stats(&tiny.path("cache"))
        .into_iter()
        .filter(|key| key["description"]["image"]["augment"] == "none")
        .collect::<Vec<_>>()
        .try_into()
        .unwrap();
    assert_eq!(["pictures", "views", "rows"].map(|name| none[name].as_u64().unwrap()), [6, 1, 6]);
    train(&tiny.stage2("stage2", "stage1", &changes), &[]).success();
    assert_eq!(held_out_hits(&tiny.run("stage2")), [1.0, 1.0]);

    // What is measured is the stored value, whoever stored it.
    let loss_with = |changes: &[(&str, Value)]| {
        let arguments = ["evaluate", "--task", "caption", "--json", "--config"].map(PathBuf::from);
        let config = tiny.stage2("stage2", "stage1", changes);
        json_of(blip2(arguments.into_iter().chain([config])))["loss"].as_f64().unwrap()
    };
    let records = metrics(&tiny.run("stage2"));
    let measured = records.iter().filter_map(|record| record["val_loss"].as_f64()).next_back().unwrap();
    assert_eq!(loss_with(&changes), measured);
    let elsewhere = with(&more, &[cached("elsewhere")]);
    assert_eq!(loss_with(&elsewhere), measured, "stored now");
    let [none] = stats(&tiny.path("elsewhere")).try_into().unwrap();
    assert_eq!((&none["rows"], &none["description"]["image"]["augment"]), (&json!(6), &json!("none")));
    assert_eq!(loss_with(&elsewhere), measured, "read");
    assert_ne!(loss_with(&more[1..]), measured, "int8 rounds");
}

#[test]
fn held_out_rows_have_their_place_first() {
    let tiny = TinyRun::new();
    let changes = with(&whole_epochs(&tiny, 2), &[("/data/image/augment", json!("crop_flip"))]);
    train(&tiny.stage1("first", &changes), &[]).success();
    let row = stats(&tiny.path("cache"))[0]["bytes"].as_f64().unwrap() / 6.0;
    fs::remove_dir_all(tiny.path("cache")).unwrap();
    // Six held-out pictures, and two of the training set.
    let limited = with(&changes, &[("/data/feature_max_gib", json!(8.5 * row / f64::from(1 << 30)))]);
    train(&tiny.stage1("limited", &limited), &[]).success();
    assert_eq!(hits(&tiny.run("limited")), [0.0, 2.0 / 6.0]);
    let rows: u64 = stats(&tiny.path("cache")).iter().map(|key| key["rows"].as_u64().unwrap()).sum();
    assert_eq!(rows, 8);
}

#[test]
fn built_ahead_of_time_a_cache_is_full_from_the_first_step() {
    let tiny = TinyRun::new();
    let more = [("/data/feature_views", json!(2)), ("/data/image/augment", json!("crop_flip"))];
    let config = tiny.stage1("run", &with(&whole_epochs(&tiny, 3), &more));
    let build = || json_of(cache("build", &[Path::new("--config"), &config, Path::new("--json")]));
    let counts =
        |report: Value| ["pictures", "views", "there", "stored", "no_place"].map(|name| report[name].as_u64().unwrap());
    for (training, held_out) in [([6, 2, 0, 12, 0], [6, 1, 0, 6, 0]), ([6, 2, 12, 0, 0], [6, 1, 6, 0, 0])] {
        let report = build();
        assert_eq!((counts(report["held_out"].clone()), counts(report)), (held_out, training));
    }
    train(&config, &[]).success();
    assert_eq!(hits(&tiny.run("run")), [1.0, 1.0, 1.0]);
    assert_eq!(held_out_hits(&tiny.run("run")), [1.0]);

    let keys = stats(&tiny.path("cache"));
    let stats = keys.iter().find(|key| key["description"]["image"]["augment"] == "crop_flip").unwrap();
    assert_eq!(["pictures", "views", "rows"].map(|name| stats[name].as_u64().unwrap()), [6, 2, 12]);
    assert!(keys.len() == 2 && stats["bytes_per_picture"].as_f64().unwrap() > 0.0);
    let printed = cache("stats", &[&tiny.path("cache")]).success();
    for part in ["32 pixels, augment crop_flip", "6 pictures of 1 shards, 2 views, 12 rows", "a picture"] {
        assert!(printed.contains(part), "{part} is not in {printed}");
    }

    let off = tiny.stage1("off", &[]);
    let message = cache("build", &[Path::new("--config"), &off]).failure();
    assert!(message.contains("data.feature_cache: expected a folder"), "{message}");
    let message = cache("stats", &[&tiny.path("runs")]).failure();
    assert!(message.contains("expected a feature cache"), "{message}");
}

#[test]
fn damaged_rows_are_found_cleared_and_computed_again() {
    let tiny = TinyRun::new();
    let changes = whole_epochs(&tiny, 2);
    train(&tiny.stage1("first", &changes), &[]).success();
    let [file] = files(&tiny.path("cache")).try_into().unwrap();
    let mut bytes = fs::read(&file).unwrap();
    let row = (bytes.len() - 8192) / 6;
    for ordinal in [1, 4] {
        bytes[8192 + ordinal * row + row / 2] ^= 4;
    }
    fs::write(&file, &bytes).unwrap();

    let folder = tiny.path("cache");
    let found = cache("verify", &[&folder]);
    assert_eq!(found.code, Some(1));
    assert!(
        found.stdout.contains("row 1: its checksum") && found.stdout.contains("row 4: its checksum"),
        "{}",
        found.stdout
    );
    assert!(found.stdout.contains("4 good rows in 1 files, 2 damaged\n"), "{}", found.stdout);
    assert!(found.stderr.contains("error: 2 rows or files are damaged"), "{}", found.stderr);

    // A run needs no repair.
    let second = with(&changes, &[("/run/seed", json!(1))]);
    train(&tiny.stage1("second", &second), &[]).success();
    assert_eq!(hits(&tiny.run("second")), [4.0 / 6.0, 1.0]);
    assert!(cache("verify", &[&folder]).success().contains("6 good rows in 1 files, 0 damaged"));

    fs::write(&file, &bytes).unwrap();
    let repaired = cache("verify", &[&folder, Path::new("--repair")]).success();
    assert!(repaired.contains("4 good rows in 1 files, 2 damaged, cleared"), "{repaired}");
    assert!(cache("verify", &[&folder]).success().contains("4 good rows in 1 files, 0 damaged"));
    // A file that was cut holds what is left of it.
    fs::OpenOptions::new().write(true).open(&file).unwrap().set_len((8192 + 3 * row) as u64).unwrap();
    let third = with(&changes, &[("/run/seed", json!(2))]);
    train(&tiny.stage1("third", &third), &[]).success();
    assert_eq!(hits(&tiny.run("third")), [2.0 / 6.0, 1.0]);
}

#[test]
fn without_place_training_goes_on_and_says_so_once() {
    let tiny = TinyRun::new();
    // The held-out set is the training set, whose rows it would take the place of.
    let changes = with(&whole_epochs(&tiny, 3), &[("/data/val", Value::Null)]);
    train(&tiny.stage1("first", &changes), &[]).success();
    let row = stats(&tiny.path("cache"))[0]["bytes"].as_f64().unwrap() / 6.0;

    // A limit that half of the rows fit in.
    let [file] = files(&tiny.path("cache")).try_into().unwrap();
    fs::remove_file(&file).unwrap();
    let limited = with(&changes, &[("/data/feature_max_gib", json!(3.5 * row / f64::from(1 << 30)))]);
    let ended = train(&tiny.stage1("limited", &limited), &[]);
    assert!(ended.stderr.contains("data.feature_max_gib keeps 3 in "), "{}", ended.stderr);
    ended.success();
    assert_eq!(hits(&tiny.run("limited")), [0.0, 0.5, 0.5]);

    // A disk that refuses: nothing can be written where a folder is in the way.
    fs::remove_file(&file).unwrap();
    fs::create_dir(&file).unwrap();
    let refused = with(&changes, &[("/run/seed", json!(1))]);
    let ended = train(&tiny.stage1("refused", &refused), &[]);
    assert_eq!(ended.stderr.matches("no more features are stored").count(), 1, "{}", ended.stderr);
    ended.success();
    assert_eq!(hits(&tiny.run("refused")), [0.0, 0.0, 0.0]);

    // Evaluation goes on without, too, and says so for itself.
    let held_out = with(&whole_epochs(&tiny, 3), &[("/run/seed", json!(2)), ("/eval/every", json!(1))]);
    let ended = train(&tiny.stage1("held_out", &held_out), &[]);
    assert_eq!(ended.stderr.matches("feature cache of the held-out set: ").count(), 1, "{}", ended.stderr);
    ended.success();
    assert_eq!(held_out_hits(&tiny.run("held_out")), [0.0, 0.0, 0.0]);
}
