//! Both stages through the programs: shards, training, evaluation, export, captions.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::tiny_run::TinyRun;
use crate::{blip2, golden, run_program};

#[test]
fn from_pictures_to_captions() {
    let tiny = TinyRun::new();
    let configs = [tiny.stage1("stage1", &[]), tiny.stage2("stage2", "stage1", &[])];
    let both = ["--config".into(), configs[0].clone(), "--config".into(), configs[1].clone()];
    let train = |more: &[&str]| {
        run_program(env!("CARGO_BIN_EXE_train"), both.iter().cloned().chain(more.iter().map(PathBuf::from)))
    };

    let index = tiny.path("shards/00000.tar.idx");
    fs::remove_file(&index).unwrap();
    let dry = train(&["--dry-run"]);
    let said =
        ["trainable parameters, 6 samples", "frozen towers and data are good; "].map(|line| dry.stderr.contains(line));
    assert_eq!(said, [true, true], "{}", dry.stderr);
    dry.success();
    let unread = tiny.path("unread.tar");
    fs::write(&unread, [0; 1024]).unwrap();
    let message = train(&["--dry-run", "--set", &format!("data.val.shards={}", unread.display())]).failure();
    assert!(message.contains("data.val"), "{message}");
    assert!(!tiny.path("runs").exists() && !index.exists(), "a dry run writes nothing");
    train(&[]).success();
    for stage in ["stage1", "stage2"] {
        let metrics = fs::read_to_string(tiny.run(stage).join("metrics.jsonl")).unwrap();
        let steps = metrics.lines().filter(|line| serde_json::from_str::<Value>(line).unwrap().get("loss").is_some());
        assert_eq!(steps.count(), 4, "{metrics}");
    }
    let again = train(&[]);
    assert!(again.stderr.contains("finished already"), "{}", again.stderr);
    assert_eq!(again.success(), "");
    assert!(train(&["--resume", "never"]).failure().contains("holds a run already"));
    assert!(train(&["--resume", "never", "--dry-run"]).failure().contains("holds a run already"));

    let evaluate = |config: &Path, task: &str| {
        let arguments =
            ["evaluate".into(), "--config".into(), config.to_path_buf(), "--task".into(), task.into(), "--json".into()];
        blip2::<PathBuf>(arguments)
    };
    // The run's own copy of its configuration serves as well.
    for config in [configs[0].clone(), tiny.run("stage1").join("config.yaml")] {
        let recall: Value = serde_json::from_str(&evaluate(&config, "retrieval").success()).unwrap();
        assert_eq!(recall["images"], 6);
        let ranks: Vec<&Value> = recall["recall"].as_array().unwrap().iter().map(|r| &r["k"]).collect();
        assert_eq!(ranks, [1, 5, 10]);
        assert_eq!(
            (&recall["recall"][2]["image_to_text"], &recall["recall"][2]["text_to_image"]),
            (&json!(1.0), &json!(1.0))
        );
    }
    let text = fs::read_to_string(&configs[0]).unwrap();
    let otherwise = tiny.path("otherwise.yaml");
    fs::write(&otherwise, text.replace("\"max_text_tokens\":12", "\"max_text_tokens\":6").replace("0.001", "0.002"))
        .unwrap();
    let warned = evaluate(&otherwise, "retrieval").stderr;
    let expected =
        "warning: measured otherwise than the run was trained: task.max_text_tokens: 12 in the run, 6 here\n";
    assert!(warned.contains(expected), "{warned}");
    let captions: Value = serde_json::from_str(&evaluate(&configs[1], "caption").success()).unwrap();
    assert_eq!(captions["captions"].as_array().unwrap().len(), 6);
    assert_eq!(captions["captions"][5]["truth"], "t15 t25 t35");
    assert!(evaluate(&configs[1], "retrieval").failure().contains("task.stage: expected 1"));

    let out = tiny.path("export");
    let run = tiny.run("stage2");
    let printed =
        blip2::<PathBuf>(["export".into(), "--checkpoint".into(), run, "--out".into(), out.clone()]).success();
    assert!(printed.contains("the model of step 4"), "{printed}");
    let mut arguments =
        ["generate".into(), "--model".into(), out, "--json".into(), "--device".into(), "cpu".into()].to_vec();
    arguments.extend(["--min-new-tokens", "1", "--image"].map(PathBuf::from));
    arguments.extend((0..6).map(|i| golden("stage2_llama").join(format!("image_{i}.png"))));
    let printed = blip2(arguments).success();
    // What the run said of its held-out pictures when it was evaluated.
    let said: Vec<Value> =
        printed.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["text"].clone()).collect();
    let expected: Vec<Value> =
        captions["captions"].as_array().unwrap().iter().map(|pair| pair["caption"].clone()).collect();
    assert_eq!(said, expected);
}
