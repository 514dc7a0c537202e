//! Tiny runs: the golden cases' models and six pictures, so that a stage trains in a moment.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{Ended, blip2, copied, golden, program_command};

/// A folder with shards, a model to begin from, configurations, and `runs/`.
pub struct TinyRun {
    folder: TempDir,
    init: TempDir,
}

impl TinyRun {
    pub fn new() -> TinyRun {
        let (folder, init) = (tempfile::tempdir().unwrap(), copied("stage1"));
        fs::write(init.path().join("tokenizer.json"), tokenizer().to_string()).unwrap();
        let tiny = TinyRun { folder, init };
        tiny.pack(&tiny.path("shards"), 6);
        tiny
    }

    /// Packs so many samples into shards, of six pictures in turn.
    pub fn pack(&self, out: &Path, samples: usize) {
        let captions = self.path("captions.tsv");
        let rows = (0..samples)
            .map(|i| format!("image_{}.png\tt{} t{} t{}\n", i % 6, 10 + i % 200, 20 + i % 200, 30 + i % 200));
        fs::write(&captions, rows.collect::<String>()).unwrap();
        let images = golden("stage2_llama");
        let arguments = ["--captions".into(), captions, "--images".into(), images, "--out".into(), out.to_path_buf()];
        blip2(["shards".into(), "pack".into()].into_iter().chain::<[PathBuf; 6]>(arguments)).success();
    }

    /// A path in the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The model that stage 1 begins from, with tokenizer.
    pub fn init(&self) -> &Path {
        self.init.path()
    }

    /// The folder of a run.
    pub fn run(&self, name: &str) -> PathBuf {
        self.path("runs").join(name)
    }

    /// The configuration of a run of stage 1, with `changes` by JSON pointer, in a file called after it.
    pub fn stage1(&self, name: &str, changes: &[(&str, Value)]) -> PathBuf {
        self.config(name, 1, self.init(), changes)
    }

    /// The same of stage 2, from the newest checkpoint of the run `stage1`.
    pub fn stage2(&self, name: &str, stage1: &str, changes: &[(&str, Value)]) -> PathBuf {
        let language = json!({"weights": golden("stage2_llama"), "dtype": "fp32"});
        let own = [("/model/language", language), ("/eval/retrieval", json!(false))];
        let changes: Vec<_> = own.into_iter().chain(changes.iter().cloned()).collect();
        self.config(name, 2, &self.run(stage1), &changes)
    }

    fn config(&self, name: &str, stage: u8, init: &Path, changes: &[(&str, Value)]) -> PathBuf {
        let shards = self.path("shards/*.tar");
        let mut config = json!({
            "run": {"dir": self.path("runs"), "name": name, "device": "cpu", "precision": "fp32"},
            "task": {"stage": stage, "max_text_tokens": 12},
            "model": {"vision": {"weights": golden("stage1"), "dtype": "fp32"}, "qformer": {"init": init, "query_tokens": 8}},
            "data": {"train": [{"shards": shards}], "val": {"shards": shards}, "image": {"size": 32, "augment": "none"}, "loader": {"threads": 1}},
            "optimizer": {"lr": 1e-3, "warmup_steps": 1},
            "schedule": {"steps": 4, "global_batch": 4},
            "checkpoint": {"every": 2}, "log": {"every": 1}, "eval": {"every": 4, "captions": 2},
        });
        for (pointer, value) in changes {
            let (section, key) = pointer.rsplit_once('/').unwrap();
            config.pointer_mut(section).unwrap()[key] = value.clone();
        }
        let path = self.path(&format!("{name}.yaml"));
        fs::write(&path, config.to_string()).unwrap(); // JSON is YAML
        path
    }
}

fn command(config: &Path, more: &[&str]) -> Command {
    let mut command = program_command(env!("CARGO_BIN_EXE_train"));
    command.arg("--config").arg(config).args(more);
    command
}

/// Trains until the program ends.
pub fn train(config: &Path, more: &[&str]) -> Ended {
    Ended::of(command(config, more).output().unwrap())
}

/// Begins to train.
pub fn start(config: &Path) -> Child {
    command(config, &[]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Waits until `holds`, and says whether the program still runs then.
pub fn runs_until(child: &mut Child, holds: impl Fn() -> bool) -> bool {
    let begun = Instant::now();
    while !holds() {
        if child.try_wait().unwrap().is_some() {
            return false;
        }
        assert!(begun.elapsed() < Duration::from_secs(300), "nothing happens");
        thread::sleep(Duration::from_millis(2));
    }
    child.try_wait().unwrap().is_none()
}

/// The error of a start that was refused: the last line, after whatever the start had said, with the list below it where it has one;
/// no panic, nothing on standard output.
pub fn refused(ended: Ended) -> String {
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(1), ""), "{}", ended.stderr);
    assert_no_panic(&ended.stderr);
    let (_, error) = ended.stderr.split_once("error: ").unwrap_or_else(|| panic!("no error: {}", ended.stderr));
    assert!(error.lines().skip(1).all(|line| line.starts_with("  ")) && !error.contains("error: "), "{error}");
    error.trim_end().to_string()
}

pub fn assert_no_panic(stderr: &str) {
    for noise in ["panicked", "a defect of this program", "backtrace", "frame #"] {
        assert!(!stderr.contains(noise), "{stderr}");
    }
}

/// What a run has recorded, without the times, which no two runs share.
pub fn metrics(run: &Path) -> Vec<Value> {
    let mut records: Vec<Value> = json_lines(&run.join("metrics.jsonl"));
    for record in &mut records {
        let timed = |name: &String| {
            ["step_s", "samples_per_s", "data_wait_s"].contains(&name.as_str()) || name.starts_with("shard_cache/")
        };
        record.as_object_mut().unwrap().retain(|name, _| !timed(name));
    }
    records
}

/// The last step of which a run has a whole record.
pub fn recorded_step(run: &Path) -> u64 {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap_or_default();
    let record = text.split_inclusive('\n').rfind(|line| line.ends_with('\n'));
    record.map_or(0, |line| serde_json::from_str::<Value>(line).unwrap()["step"].as_u64().unwrap())
}

pub fn json_lines(path: &Path) -> Vec<Value> {
    fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The folder of a checkpoint.
pub fn checkpoint(run: &Path, step: u64) -> PathBuf {
    run.join(format!("checkpoints/step_{step:08}"))
}

/// Every file of a checkpoint but its manifest, which is their digests.
pub fn checkpoint_bytes(run: &Path, step: u64) -> BTreeMap<&'static str, Vec<u8>> {
    let read = |name| (name, fs::read(checkpoint(run, step).join(name)).unwrap());
    ["model.safetensors", "optimizer.safetensors", "state.json"].map(read).into()
}

/// Fails where two runs do not end in the same bytes and records.
pub fn assert_same_end(run: &Path, whole: &Path, steps: u64) {
    for ((name, found), expected) in
        checkpoint_bytes(run, steps).into_iter().zip(checkpoint_bytes(whole, steps).values())
    {
        assert!(found == *expected, "{name} differs");
    }
    assert_eq!(metrics(run), metrics(whole));
}

/// A word-level tokenizer with BERT's frame around every text.
fn tokenizer() -> Value {
    let special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"];
    let words = special.iter().map(|token| token.to_string()).chain((4..299).map(|i| format!("t{i}")));
    let vocabulary: serde_json::Map<String, Value> = words.enumerate().map(|(id, word)| (word, json!(id))).collect();
    let added = special.iter().enumerate().map(|(id, token)| {
        json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true})
    });
    let part = |token: &str| json!({"SpecialToken": {"id": token, "type_id": 0}});
    let template = json!([part("[CLS]"), {"Sequence": {"id": "A", "type_id": 0}}, part("[SEP]")]);
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "decoder": null,
        "added_tokens": added.collect::<Vec<_>>(),
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": {"type": "TemplateProcessing", "single": template, "pair": template, "special_tokens": {
            "[CLS]": {"id": "[CLS]", "ids": [2], "tokens": ["[CLS]"]}, "[SEP]": {"id": "[SEP]", "ids": [3], "tokens": ["[SEP]"]},
        }},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"},
    })
}
