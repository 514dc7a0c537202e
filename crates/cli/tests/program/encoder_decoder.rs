//! Stage 2 with a T5 through the programs: split captions, dropout, resumption, a bad step, export, captions.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::tiny_run::{
    TinyRun, assert_same_end, checkpoint, json_lines, metrics, recorded_step, refused, runs_until, start, train,
};
use crate::{blip2, golden};

fn t5(more: Value) -> (&'static str, Value) {
    let mut language = json!({"weights": golden("stage2_t5"), "dtype": "fp32"});
    for (key, value) in more.as_object().unwrap() {
        language[key] = value.clone();
    }
    ("/model/language", language)
}

/// A folder in which a stage-1 run has ended.
fn with_stage1() -> TinyRun {
    let tiny = TinyRun::new();
    train(&tiny.stage1("stage1", &[("/schedule/steps", json!(1))]), &[]).success();
    tiny
}

#[test]
fn from_pictures_to_captions() {
    let tiny = with_stage1();
    let config = tiny.stage2("stage2", "stage1", &[t5(json!({"prefix": "split", "gelu": "exact"}))]);
    train(&config, &["--dry-run"]).success();
    train(&config, &[]).success();
    let records = metrics(&tiny.run("stage2"));
    assert_eq!(records.iter().filter(|record| record.get("loss_lm").is_some()).count(), 4);
    assert!(records.iter().any(|record| record.get("val_loss").is_some()));

    let evaluated = blip2::<PathBuf>([
        "evaluate".into(),
        "--config".into(),
        config,
        "--task".into(),
        "caption".into(),
        "--json".into(),
    ]);
    let evaluated: Value = serde_json::from_str(&evaluated.success()).unwrap();
    let expected: Vec<&Value> = evaluated["captions"].as_array().unwrap().iter().map(|pair| &pair["caption"]).collect();
    assert_eq!(expected.len(), 6);

    let out = tiny.path("export");
    blip2::<PathBuf>(["export".into(), "--checkpoint".into(), tiny.run("stage2"), "--out".into(), out.clone()])
        .success();
    let written: Value = serde_json::from_slice(&fs::read(out.join("config.json")).unwrap()).unwrap();
    assert_eq!(written["text_config"]["model_type"], "t5");
    assert_eq!(written["text_config"]["dense_act_fn"], "gelu", "what was trained with");
    assert!(written.get("before_queries").is_none());
    let said = |more: &[&str]| -> Vec<Value> {
        let mut arguments: Vec<PathBuf> =
            ["generate", "--json", "--device", "cpu", "--min-new-tokens", "1", "--model"].map(PathBuf::from).to_vec();
        arguments.push(out.clone());
        arguments.push("--image".into());
        arguments.extend((0..6).map(|i| golden("stage2_llama").join(format!("image_{i}.png")))); // the shards'
        arguments.extend(more.iter().map(PathBuf::from));
        let printed = blip2(arguments).success();
        printed.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["text"].clone()).collect()
    };
    // What the run said of its held-out pictures when it was evaluated.
    assert_eq!(said(&[]).iter().collect::<Vec<_>>(), expected);
    assert_ne!(said(&["--prompt", "t20 t21 t22 t23"]).iter().collect::<Vec<_>>(), expected);
    let beams = said(&["--num-beams", "3"]);
    assert_eq!(beams, said(&["--num-beams", "3", "--early-stopping", "false"]));
    assert_eq!(said(&["--num-beams", "3", "--early-stopping", "never"]).len(), 6);
}

#[test]
fn a_batch_in_parts_and_an_interruption_change_nothing() {
    let tiny = with_stage1();
    let language = t5(json!({"prefix": "split", "dropout": 0.1, "prompt": "t50 t51"}));
    let steps = 12;
    let changes = |micro_batch: Value| {
        [language.clone(), ("/schedule/steps", json!(steps)), ("/schedule/micro_batch", micro_batch)]
    };
    let parts = tiny.stage2("parts", "stage1", &changes(json!(1)));
    train(&parts, &[]).success();
    let whole = tiny.stage2("whole", "stage1", &changes(Value::Null));
    train(&whole, &[]).success();
    for (part, whole) in metrics(&tiny.run("parts")).iter().zip(metrics(&tiny.run("whole"))) {
        if let (Some(a), Some(b)) = (part["loss"].as_f64(), whole["loss"].as_f64()) {
            assert!((a - b).abs() < 1e-4 * b, "{part} {whole}");
        }
    }

    let interrupted = tiny.stage2("interrupted", "stage1", &changes(json!(1)));
    let mut child = start(&interrupted);
    assert!(runs_until(&mut child, || recorded_step(&tiny.run("interrupted")) >= 5), "it ended too early");
    child.kill().unwrap();
    child.wait().unwrap();
    train(&interrupted, &[]).success();
    assert_same_end(&tiny.run("interrupted"), &tiny.run("parts"), steps);
}

#[test]
fn dropout_changes_training_and_parity_is_the_model_s_own_rate() {
    let tiny = with_stage1();
    let end = |name: &str, dropout: Value| {
        let one_step = ("/schedule/steps", json!(1));
        train(&tiny.stage2(name, "stage1", &[t5(json!({"dropout": dropout})), one_step]), &[]).success();
        (
            metrics(&tiny.run(name))[0]["loss"].clone(),
            fs::read(checkpoint(&tiny.run(name), 1).join("model.safetensors")),
        )
    };
    let (off, own) = (end("off", json!(0)), end("own", json!("parity")));
    // This model's configuration has a rate of 0.
    assert_eq!((&off.0, off.1.unwrap()), (&own.0, own.1.unwrap()));
    assert_ne!(off.0, end("some", json!(0.2)).0);
}

#[test]
fn a_bad_step_can_be_replayed() {
    let tiny = with_stage1();
    let mut changes = vec![t5(json!({"prefix": "none"})), ("/schedule/steps", json!(2))];
    changes.extend(["/optimizer/lr", "/optimizer/min_lr", "/optimizer/warmup_start_lr"].map(|key| (key, json!(1e30))));
    train(&tiny.stage2("a", "stage1", &changes), &[]).success();
    let folder = tiny.run("a").join("bad_steps/step_00000001");
    let mut arguments: Vec<PathBuf> = ["replay", "--task", "stage2", "--device", "cpu"].map(PathBuf::from).to_vec();
    for (option, name) in [("--model", "model"), ("--batch", "batch.safetensors"), ("--out", "out.safetensors")] {
        arguments.extend([option.into(), folder.join(name)]);
    }
    assert!(blip2(arguments).success().starts_with("loss "));
    assert!(json_lines(&tiny.run("a").join("metrics.jsonl")).iter().all(|record| record["step"] == 1));
}

#[test]
fn what_a_kind_of_model_cannot_do_is_refused_by_its_key() {
    let tiny = with_stage1();
    let llama = |key: &str, value: Value| {
        let mut language = json!({"weights": golden("stage2_llama"), "dtype": "fp32"});
        language[key] = value;
        ("/model/language", language)
    };
    for (language, said) in [
        (llama("prefix", json!("split")), "model.language.prefix: expected none for a decoder-only model, got split"),
        (llama("gelu", json!("exact")), "model.language.gelu: expected config"),
        (t5(json!({"before_queries": [3]})), "model.language.before_queries: expected auto or []"),
        (t5(json!({"dropout": "own"})), "model.language.dropout: expected a number from 0 to below 1, or parity"),
        (t5(json!({"prompt": "t50 t51 t52 t53 t54 t55 t56 t57 t58 t59 t60 t61"})), "model.language.prompt: takes 12"),
    ] {
        let message = refused(train(&tiny.stage2("a", "stage1", &[language]), &[]));
        assert!(message.contains(said), "{said} is not in {message}");
    }
}

#[test]
fn a_recorded_batch_that_does_not_fit_is_refused() {
    let replay = |model: &str, batch: PathBuf| {
        let out = tempfile::tempdir().unwrap();
        let mut arguments: Vec<PathBuf> = ["replay", "--task", "stage2", "--device", "cpu"].map(PathBuf::from).to_vec();
        for (option, path) in [("--model", golden(model)), ("--batch", batch), ("--out", out.path().join("o"))] {
            arguments.extend([option.into(), path]);
        }
        blip2(arguments)
    };
    let batch: &Path = &golden("stage2_t5/batch.safetensors");
    assert!(replay("stage2_t5", batch.into()).success().starts_with("loss "));
    // The targets of an encoder-decoder are no text that a decoder reads.
    let message = replay("stage2_llama", batch.into()).failure();
    assert!(message.contains("labels: expected i64 [6, 9], as input_ids, got [6, 6]"), "{message}");
}
