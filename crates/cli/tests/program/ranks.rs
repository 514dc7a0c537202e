//! Several processes train one run: on any number of them it is the same run.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::tiny_run::{TinyRun, assert_no_panic, checkpoint, json_lines, metrics, recorded_step, runs_until, train};
use crate::{Ended, golden, program_command};

const STEPS: u64 = 16;

/// What could make ranks differ is all there: dropout, augmentation, negatives of others, clipping.
fn changes() -> [(&'static str, Value); 7] {
    [
        ("/model/qformer/dropout", json!(0.1)),
        ("/data/image/augment", json!("crop_flip")),
        ("/schedule/steps", json!(STEPS)),
        ("/checkpoint/every", json!(4)),
        ("/log/every", json!(1)),
        ("/optimizer/clip_norm", json!(1.0)),
        ("/eval/every", json!(8)),
    ]
}

/// A port that was free a moment ago.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// One process of a launch, as a launcher without a store of its own starts it.
fn rank_command(program: &str, rank: usize, world: usize, port: u16) -> Command {
    let mut command = program_command(program);
    command.env("RANK", rank.to_string()).env("WORLD_SIZE", world.to_string()).env("LOCAL_RANK", rank.to_string());
    command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", port.to_string());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Begins to train on ranks, each with its own configuration.
fn start_with(configs: &[&Path]) -> Vec<Child> {
    let port = free_port();
    let start = |(rank, config): (usize, &&Path)| {
        let mut command = rank_command(env!("CARGO_BIN_EXE_train"), rank, configs.len(), port);
        command.arg("--config").arg(config).spawn().unwrap()
    };
    configs.iter().enumerate().map(start).collect()
}

fn start(config: &Path, world: usize) -> Vec<Child> {
    start_with(&vec![config; world])
}

fn ends(children: Vec<Child>) -> Vec<Ended> {
    children.into_iter().map(|child| Ended::of(child.wait_with_output().unwrap())).collect()
}

/// Trains to the end; what the first rank says of it.
fn train_on(config: &Path, world: usize) -> String {
    let ended = if world == 1 { vec![train(config, &[])] } else { ends(start(config, world)) };
    let said = ended[0].stderr.clone();
    ended.into_iter().for_each(|ended| drop(ended.success()));
    said
}

/// The true captions beside the sample captions that a run has said.
fn captioned(said: &str) -> Vec<&str> {
    said.lines().filter_map(|line| Some(line.strip_prefix("    ")?.split_once(" -> ")?.0)).collect()
}

/// The error of each rank: one, without a panic.
fn errors(ended: Vec<Ended>) -> Vec<String> {
    let error = |ended: Ended| {
        assert_eq!(ended.code, Some(1), "{}", ended.stderr);
        assert_no_panic(&ended.stderr);
        ended.stderr.split_once("error: ").unwrap_or_else(|| panic!("no error: {}", ended.stderr)).1.to_owned()
    };
    ended.into_iter().map(error).collect()
}

/// Every number that two runs recorded, but times and what is of ranks.
fn numbers(run: &Path) -> Vec<(u64, String, f64)> {
    let own =
        ["slowest_rank", "slowest_rank_s", "fastest_rank_s", "gathered_mib", "fetched_mib", "gradients_mib", "step"];
    let number = |(name, value): (&String, &Value), step: u64| {
        let shared = !own.contains(&name.as_str()) && !name.starts_with("rank_s/");
        shared.then(|| (step, name.clone(), value.as_f64().unwrap_or(f64::NAN)))
    };
    let of_record = |record: Value| -> Vec<_> {
        let step = record["step"].as_u64().unwrap();
        record.as_object().unwrap().iter().filter_map(|entry| number(entry, step)).collect()
    };
    metrics(run).into_iter().flat_map(of_record).collect()
}

fn assert_same_run(run: &Path, whole: &Path, tolerance: f64) {
    let (numbers, expected) = (numbers(run), numbers(whole));
    assert_eq!(numbers.len(), expected.len());
    for ((step, name, value), (_, _, expected)) in numbers.iter().zip(&expected) {
        let error = (value - expected).abs() / expected.abs().max(1e-3);
        assert!(error < tolerance, "step {step}: {name} is {value}, expected {expected}: {error:e}");
    }
}

#[test]
fn replay_on_two_ranks_equals_lavis_on_two() {
    replay_equals("stage1_2rank", 2, "batch.rank{rank}", "expected.rank{rank}");
}

#[test]
fn a_group_of_one_exchanges_with_itself_and_changes_nothing() {
    replay_equals("stage1", 1, "batch", "expected");
}

/// The losses and gradients of a golden case, computed by a group of ranks; `{rank}` in the files' names is the rank.
fn replay_equals(case: &str, world: usize, batch: &str, expected: &str) {
    let (folder, case, port) = (tempfile::tempdir().unwrap(), golden(case), free_port());
    let start = |rank| {
        let mut command = rank_command(env!("CARGO_BIN_EXE_blip2"), rank, world, port);
        command.env("BLIP2_GROUP_OF_ONE", "1").args(["replay", "--task", "stage1", "--model"]).arg(&case);
        command.arg("--batch").arg(case.join(format!("{batch}.safetensors")));
        command.arg("--out").arg(folder.path().join("out.rank{rank}.safetensors")).spawn().unwrap()
    };
    ends((0..world).map(start).collect()).into_iter().for_each(|ended| drop(ended.success()));
    for rank in 0..world {
        let ours = tensors(&folder.path().join(format!("out.rank{rank}.safetensors")));
        let theirs = tensors(&case.join(format!("{}.safetensors", expected.replace("{rank}", &rank.to_string()))));
        assert!(theirs.keys().filter(|key| key.starts_with("grad/")).count() > 50);
        for (key, expected) in &theirs {
            let got = &ours[key];
            let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>().sqrt();
            let size = norm(&mut expected.iter().copied());
            let error = norm(&mut expected.iter().zip(got).map(|(a, b)| a - b));
            let tolerance = if key.starts_with("grad/") { 1e-4 } else { 1e-5 };
            // A gradient that is zero by mathematics (a key's bias) is rounding noise on both sides.
            let noise = size < 1e-6 && norm(&mut got.iter().copied()) < 1e-6;
            assert!(error <= tolerance * size || noise, "rank {rank}, {key}: {error:e} of {size:e}");
        }
    }
}

/// The f32 tensors of a safetensors file.
fn tensors(path: &Path) -> BTreeMap<String, Vec<f64>> {
    let bytes = fs::read(path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: serde_json::Map<String, Value> = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let data = &bytes[8 + length..];
    let values = |entry: &Value| {
        let offset = |at: usize| entry["data_offsets"][at].as_u64().unwrap() as usize;
        assert_eq!(entry["dtype"], "F32");
        data[offset(0)..offset(1)].chunks(4).map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap()))).collect()
    };
    header.iter().filter(|(name, _)| *name != "__metadata__").map(|(n, entry)| (n.clone(), values(entry))).collect()
}

#[test]
fn on_any_number_of_ranks_it_is_the_same_run() {
    let tiny = TinyRun::new();
    let mut said = Vec::new();
    for world in [1, 2, 4] {
        train_on(&tiny.stage1(&format!("stage1_{world}"), &changes()), world);
        let stage2 = tiny.stage2(&format!("stage2_{world}"), "stage1_1", &changes());
        said.push(train_on(&stage2, world));
    }
    // Two batches of held-out pictures: of four ranks two have none, the first one among them.
    assert_eq!(captioned(&said[0]).len(), 4, "two pictures in each of two evaluations: {}", said[0]);
    for more in &said[1..] {
        assert_eq!(captioned(more), captioned(&said[0]));
    }
    for world in [2, 4] {
        for stage in [1, 2] {
            let run = |world| tiny.run(&format!("stage{stage}_{world}"));
            assert_same_run(&run(world), &run(1), 1e-3);
        }
    }
    let record = &json_lines(&tiny.run("stage1_2").join("metrics.jsonl"))[0];
    let names = ["slowest_rank", "slowest_rank_s", "fastest_rank_s", "rank_s/0", "rank_s/1"];
    for name in names.into_iter().chain(["gathered_mib", "fetched_mib", "gradients_mib"]) {
        assert!(record[name].as_f64().is_some_and(|value| value >= 0.0), "{name}: {record}");
    }
}

#[test]
fn image_features_in_memory_are_shared_out_and_the_same() {
    let tiny = TinyRun::new();
    let memory = [("/data/feature_cache", json!("memory")), ("/data/image/augment", json!("none"))];
    let memory = [&changes()[..], &memory].concat();
    for world in [1, 2, 4] {
        train_on(&tiny.stage1(&format!("memory_{world}"), &memory), world);
    }
    for world in [2, 4] {
        assert_same_run(&tiny.run(&format!("memory_{world}")), &tiny.run("memory_1"), 1e-3);
    }
}

#[test]
fn what_the_cache_on_disk_was_good_for_is_said_of_all_ranks() {
    let tiny = TinyRun::new();
    let hits = |world: usize| -> Vec<f64> {
        let name = format!("cached_{world}");
        let cache = [("/data/feature_cache", json!(tiny.path(&name))), ("/data/image/augment", json!("none"))];
        // Records of two steps, between which there are checkpoints.
        let parts = [("/log/every", json!(2)), ("/checkpoint/every", json!(1)), ("/schedule/steps", json!(4))];
        train_on(&tiny.stage1(&name, &[&changes()[..], &cache, &parts].concat()), world);
        let records = json_lines(&tiny.run(&name).join("metrics.jsonl"));
        records.iter().filter_map(|record| record["cache_hits"].as_f64()).collect()
    };
    let alone = hits(1);
    // Six pictures in batches of four: the last two of the second batch were there, and they are the second rank's.
    assert_eq!(alone, [0.25, 1.0]);
    assert_eq!(hits(2), alone);

    // Each rank stores the held-out features of its share, and all of them are there the next time.
    let cache = [("/data/feature_cache", json!(tiny.path("held out"))), ("/eval/every", json!(2))];
    let config = tiny.stage1("held_out", &[&changes()[..], &cache, &[("/schedule/steps", json!(4))]].concat());
    train_on(&config, 2);
    let records = json_lines(&tiny.run("held_out").join("metrics.jsonl"));
    let held_out: Vec<f64> = records.iter().filter_map(|record| record["val_cache_hits"].as_f64()).collect();
    assert_eq!(held_out, [0.0, 1.0]);
}

#[test]
fn accumulation_sends_gradients_once_a_step() {
    let tiny = TinyRun::new();
    let parts = [&changes()[..], &[("/schedule/micro_batch", json!(2)), ("/task/negatives", json!("local"))]].concat();
    // With negatives of the own micro-batch, two micro-batches of two on one rank are one of two on two ranks.
    train_on(&tiny.stage1("one", &parts), 1);
    train_on(&tiny.stage1("two", &parts), 2);
    assert_same_run(&tiny.run("two"), &tiny.run("one"), 1e-3);
    let sent = |name: &str| json_lines(&tiny.run(name).join("metrics.jsonl"))[0]["gradients_mib"].as_f64();
    train_on(
        &tiny.stage1(
            "four",
            &[&changes()[..], &[("/schedule/global_batch", json!(8)), ("/schedule/micro_batch", json!(2))]].concat(),
        ),
        2,
    );
    assert_eq!(sent("two"), sent("four"), "as many bytes in two micro-batches a rank as in one");
}

#[test]
fn under_cached_contrast_the_parts_do_not_matter_either() {
    let tiny = TinyRun::new();
    let config = |name: &str, more: &[(&'static str, Value)]| {
        let batch = [("/schedule/global_batch", json!(8)), ("/schedule/steps", json!(8))];
        tiny.stage1(name, &[&changes()[..], &batch, more].concat())
    };
    let parts = [("/schedule/micro_batch", json!(2)), ("/task/contrastive", json!("cached"))];
    train_on(&config("whole", &[]), 1);
    train_on(&config("parts_1", &parts), 1);
    train_on(&config("parts_2", &parts), 2);
    let losses = |name: &str| -> Vec<f64> {
        json_lines(&tiny.run(name).join("metrics.jsonl"))
            .iter()
            .filter_map(|record| record["loss_itc"].as_f64())
            .collect()
    };
    for name in ["parts_1", "parts_2"] {
        for (step, (a, b)) in losses(name).iter().zip(losses("whole")).enumerate() {
            assert!((a - b).abs() < 1e-3 * b, "{name}, step {step}: {a}, expected {b}");
        }
    }
}

#[test]
fn a_run_goes_on_on_another_number_of_ranks() {
    let tiny = TinyRun::new();
    // A learning rate that does not depend on how long the run is.
    let config = |name: &str, steps: u64| {
        let flat = [("/optimizer/min_lr", json!(1e-3)), ("/schedule/steps", json!(steps))];
        tiny.stage1(name, &[&changes()[..], &flat].concat())
    };
    for (steps, world) in [(4, 2), (8, 1), (12, 4), (STEPS, 2)] {
        train_on(&config("moved", steps), world);
    }
    train_on(&config("still", STEPS), 1);
    let losses = |name: &str| -> Vec<f64> {
        json_lines(&tiny.run(name).join("metrics.jsonl")).iter().filter_map(|record| record["loss"].as_f64()).collect()
    };
    let (moved, still) = (losses("moved"), losses("still"));
    assert_eq!(moved.len(), STEPS as usize);
    for (step, (a, b)) in moved.iter().zip(&still).enumerate() {
        assert!((a - b).abs() < 1e-3 * b.abs(), "step {step}: {a}, expected {b}");
    }
}

#[test]
fn a_run_folder_that_hosts_do_not_share_is_told() {
    let tiny = TinyRun::new();
    // Of hosts with a disk of their own: the same path, and another folder.
    let hosts = [tiny.path("here"), tiny.path("there")];
    hosts.iter().for_each(|host| fs::create_dir(host).unwrap());
    let config = |name: &str, steps: u64| {
        tiny.stage1(
            name,
            &[("/run/dir", json!("runs")), ("/schedule/steps", json!(steps)), ("/optimizer/min_lr", json!(1e-3))],
        )
    };
    start_in(&hosts[..1], &config("begun", 4)).pop().unwrap().success();
    // Whether there is something to go on from or not.
    for config in [config("begun", 8), config("new", 8)] {
        for error in errors(start_in(&hosts, &config)) {
            for part in ["runs/", "rank 1 on ", "cannot see what rank 0 on ", "a folder that all hosts share"] {
                assert!(error.contains(part), "{error}");
            }
        }
    }
    let left = fs::read_dir(hosts[0].join("runs/new")).unwrap().map(|entry| entry.unwrap().file_name());
    assert!(left.into_iter().all(|name| !name.to_string_lossy().starts_with(".shared")));
}

/// Trains one configuration on ranks that each begin in a folder of their own.
fn start_in(folders: &[PathBuf], config: &Path) -> Vec<Ended> {
    let port = free_port();
    let start = |(rank, folder): (usize, &PathBuf)| {
        let mut command = rank_command(env!("CARGO_BIN_EXE_train"), rank, folders.len(), port);
        // So long they wait for each other, and for what a shared folder shows late.
        command.env("BLIP2_JOIN_TIMEOUT_S", "10");
        command.current_dir(folder).arg("--config").arg(config).spawn().unwrap()
    };
    ends(folders.iter().enumerate().map(start).collect())
}

#[test]
fn other_shards_and_other_weights_on_a_rank_are_told() {
    let tiny = TinyRun::new();
    let hosts = [tiny.path("here"), tiny.path("there")];
    let copy = |from: &Path, to: &Path| {
        fs::create_dir_all(to).unwrap();
        for entry in fs::read_dir(from).unwrap() {
            let path = entry.unwrap().path();
            fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
        }
    };
    let shards = tiny.path("shards");
    for host in &hosts {
        for (from, to) in [(shards.as_path(), "shards"), (&shards, "held out"), (tiny.init(), "init")] {
            copy(from, &host.join(to));
        }
    }
    let changes = [
        ("/data/train", json!([{"shards": "shards/*.tar"}])),
        ("/data/val/shards", json!("held out/*.tar")),
        ("/model/qformer/init", json!("init")),
        ("/data/feature_cache", json!("memory")),
    ];
    let config = tiny.stage1("a", &changes);
    let told = |part: &str| {
        for error in errors(start_in(&hosts, &config)) {
            for part in [part, " on rank 0, ", " on rank 1"] {
                assert!(error.contains(part), "{error}");
            }
            assert!(!error.contains("image features"), "found before the cache is filled: {error}");
        }
    };
    // The last bytes of the file are a parameter's.
    let weights = hosts[1].join("init/model.safetensors");
    let good = fs::read(&weights).unwrap();
    let mut other = good.clone();
    *other.last_mut().unwrap() ^= 1;
    fs::write(&weights, other).unwrap();
    told("weights: ");
    fs::write(&weights, good).unwrap();
    for (set, key) in [("shards", "data.train's shards: "), ("held out", "data.val's shards: ")] {
        let folder = hosts[1].join(set);
        fs::remove_dir_all(&folder).unwrap();
        tiny.pack(&folder, 5);
        told(key);
        fs::remove_dir_all(&folder).unwrap();
        copy(&shards, &folder);
    }
    assert!(!tiny.run("a").join("config.yaml").exists());
}

#[test]
fn another_program_on_a_rank_is_told() {
    let tiny = TinyRun::new();
    let config = tiny.stage1("a", &changes());
    let program = Path::new(env!("CARGO_BIN_EXE_train"));
    let libraries = program.parent().unwrap().join("../libtorch/lib");
    // The same version, and other bytes.
    let other = tiny.path("train");
    fs::copy(program, &other).unwrap();
    fs::OpenOptions::new().append(true).open(&other).unwrap().write_all(b"x").unwrap();
    let port = free_port();
    let start = |(rank, program): (usize, &Path)| {
        let mut command = rank_command(program.to_str().unwrap(), rank, 2, port);
        command.env("LD_LIBRARY_PATH", &libraries).arg("--config").arg(&config).spawn().unwrap()
    };
    for error in errors(ends([program, &other].into_iter().enumerate().map(start).collect())) {
        assert!(error.contains("program's BLAKE3: "), "{error}");
        assert!(!error.contains("libtorch: "), "{error}");
    }
}

#[test]
fn a_step_that_is_not_finite_is_skipped_on_all_ranks_and_each_records_its_part() {
    let tiny = TinyRun::new();
    // Step 0 is good and throws the weights so far away that no later one is.
    let rates = ["lr", "min_lr", "warmup_start_lr"].map(|rate| format!("/optimizer/{rate}"));
    let absurd: Vec<(&str, Value)> = rates.iter().map(|rate| (rate.as_str(), json!(1e30))).collect();
    let few = [("/schedule/steps", json!(3)), ("/eval/every", json!(100))];
    let config = tiny.stage1("a", &[&absurd[..], &few].concat());
    let ended = ends(start(&config, 2));
    assert!(ended[0].stderr.contains("step 2: not finite, skipped; recorded in "), "{}", ended[0].stderr);
    ended.into_iter().for_each(|ended| drop(ended.success()));
    let folder = |step: u64| tiny.run("a").join(format!("bad_steps/step_{step:08}"));
    for step in [1, 2] {
        let entries = fs::read_dir(folder(step)).unwrap().map(|entry| entry.unwrap().file_name());
        let mut names: Vec<_> = entries.map(|name| name.into_string().unwrap()).collect();
        names.sort();
        assert_eq!(names, ["model", "rank_0", "rank_1"], "the model once for all ranks");
        for rank in ["rank_0", "rank_1"] {
            let files = fs::read_dir(folder(step).join(rank)).unwrap().map(|entry| entry.unwrap().file_name());
            assert_eq!(files.collect::<Vec<_>>(), ["batch.safetensors"]);
        }
    }
    // As the program's help has it.
    let port = free_port();
    let replay = |rank| {
        let mut command = rank_command(env!("CARGO_BIN_EXE_blip2"), rank, 2, port);
        command.args(["replay", "--task", "stage1", "--model"]).arg(folder(2).join("model"));
        command.arg("--batch").arg(folder(2).join("rank_{rank}/batch.safetensors"));
        command.arg("--out").arg(tiny.path("out.rank_{rank}.safetensors")).spawn().unwrap()
    };
    for ended in ends((0..2).map(replay).collect()) {
        let printed = ended.success();
        let loss: f64 = printed.lines().find_map(|line| line.strip_prefix("loss ")).unwrap().parse().unwrap();
        assert!(!loss.is_finite(), "{printed}");
    }
    assert!(checkpoint(&tiny.run("a"), 3).join("MANIFEST.json").exists());
}

#[test]
fn a_signal_leaves_one_checkpoint_and_asks_the_launcher_to_go_on() {
    let tiny = TinyRun::new();
    for world in [1, 2] {
        let name = format!("on_{world}");
        let config = tiny.stage1(&name, &[&changes()[..], &[("/schedule/steps", json!(2000))]].concat());
        let mut children = start(&config, world);
        assert!(runs_until(&mut children[0], || recorded_step(&tiny.run(&name)) >= 3));
        for child in &children {
            kill_process(Pid::from_child(child), Signal::TERM).unwrap();
        }
        let ended = ends(children);
        for rank in &ended {
            assert_eq!(rank.code, Some(75), "{}", rank.stderr);
            assert_no_panic(&rank.stderr);
        }
        let step = ended[0].stdout.strip_prefix("stopped after step ").unwrap().split_once(',').unwrap().0;
        assert!(ended[1..].iter().all(|rank| rank.stdout.is_empty()), "the first rank speaks for all");
        assert!(checkpoint(&tiny.run(&name), step.parse().unwrap()).join("MANIFEST.json").exists());
    }
}

#[test]
fn whoever_is_killed_is_named_by_the_others() {
    for killed in [0, 2] {
        let tiny = TinyRun::new();
        let longer = [("/schedule/steps", json!(5000)), ("/schedule/global_batch", json!(6))];
        let config = tiny.stage1("a", &[&changes()[..], &longer].concat());
        let mut children = start(&config, 3);
        assert!(runs_until(&mut children[0], || recorded_step(&tiny.run("a")) >= 3));
        let mut gone = children.remove(killed);
        gone.kill().unwrap();
        gone.wait().unwrap();
        let begun = Instant::now();
        for error in errors(ends(children)) {
            // Where rank 0 serves the store, its end is all that the others see.
            let named = if killed == 0 { "rank 0" } else { "rank 2" };
            assert!(error.contains(named), "{killed}: {error}");
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", begun.elapsed());
    }
}

#[test]
fn ranks_that_were_started_with_different_things_are_told_so() {
    let tiny = TinyRun::new();
    let other = [("/schedule/global_batch", json!(8)), ("/optimizer/lr", json!(2e-3))];
    let configs = [tiny.stage1("a", &changes()), tiny.stage1("b", &[&changes()[..], &other].concat())];
    let ended = errors(ends(start_with(&[&configs[0], &configs[1]])));
    for error in &ended {
        for part in ["schedule.global_batch: 4 on rank 0, 8 on rank 1", "optimizer.lr", "run.name"] {
            assert!(error.contains(part), "{error}");
        }
    }
    assert!(!tiny.run("a").join("config.yaml").exists());
    let three = errors(ends(start(&configs[0], 3)));
    assert!(
        three
            .iter()
            .any(|error| error.contains("schedule.global_batch: expected a multiple of the number of ranks, 3, got 4")),
        "{three:?}"
    );
}

#[test]
fn ranks_that_do_not_come_are_waited_for_and_named() {
    let tiny = TinyRun::new();
    let config = tiny.stage1("a", &changes());
    let alone = |rank: usize, port: u16| {
        let mut command = rank_command(env!("CARGO_BIN_EXE_train"), rank, 2, port);
        let begun = Instant::now();
        let ended = command.env("BLIP2_JOIN_TIMEOUT_S", "2").arg("--config").arg(&config).output().unwrap();
        assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
        Ended::of(ended).failure()
    };
    let port = free_port();
    let first = alone(0, port);
    assert!(
        first.contains("rank 1 of 2 did not come") && first.contains(&format!("127.0.0.1:{port} within 2 s")),
        "{first}"
    );
    let second = alone(1, port);
    assert!(second.contains(&format!("127.0.0.1:{port}")) && second.contains("2 s"), "{second}");
    let taken = TcpListener::bind("0.0.0.0:0").unwrap();
    let used = alone(0, taken.local_addr().unwrap().port());
    assert!(used.contains("in use"), "{used}");
    let mut command = program_command(env!("CARGO_BIN_EXE_train"));
    let ended = Ended::of(command.env("RANK", "1").arg("--config").arg(&config).output().unwrap()).failure();
    assert!(ended.contains("WORLD_SIZE: expected the number of processes"), "{ended}");
}
