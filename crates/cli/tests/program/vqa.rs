//! `evaluate --task vqa` through the program.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::decoders::opt;
use crate::tiny_run::{TinyRun, train};
use crate::{Ended, blip2, golden};

/// The golden pictures in turn, each with these members.
fn pack(tiny: &TinyRun, samples: &[(&str, Value)]) -> Value {
    let folder = tiny.path("questions");
    fs::create_dir_all(&folder).unwrap();
    let path = folder.join("0.tar");
    let mut archive = tar::Builder::new(fs::File::create(&path).unwrap());
    let mut add = |name: String, data: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_size(data.len() as u64);
        archive.append_data(&mut header, name, data).unwrap();
    };
    for (i, (extension, content)) in samples.iter().enumerate() {
        add(format!("{i}.png"), &fs::read(golden("stage2_llama").join(format!("image_{}.png", i % 6))).unwrap());
        let content = content.as_str().map_or_else(|| content.to_string(), str::to_string);
        add(format!("{i}.{extension}"), content.as_bytes());
    }
    archive.into_inner().unwrap();
    json!({"shards": path})
}

/// One, two or three words.
fn question(i: usize) -> String {
    (0..=i % 3).map(|word| format!("t{}", 20 + 3 * i + word)).collect::<Vec<_>>().join(" ")
}

fn evaluate(config: &Path, more: &[&str]) -> Ended {
    let arguments =
        ["evaluate", "--task", "vqa", "--config"].map(PathBuf::from).into_iter().chain([config.to_path_buf()]);
    blip2(arguments.chain(more.iter().map(PathBuf::from)))
}

fn answers(config: &Path) -> Value {
    serde_json::from_str(&evaluate(config, &["--json"]).success()).unwrap()
}

fn said(report: &Value) -> Vec<&str> {
    report["answers"].as_array().unwrap().iter().map(|answered| answered["answer"].as_str().unwrap()).collect()
}

/// What an export of the run says to the same questions.
fn generated(tiny: &TinyRun, run: &str) -> Vec<String> {
    let out = tiny.path(&format!("{run}_export"));
    blip2::<PathBuf>(["export".into(), "--checkpoint".into(), tiny.run(run), "--out".into(), out.clone()]).success();
    let options = "--device cpu --json --num-beams 5 --length-penalty -1 --min-new-tokens 1 --max-new-tokens 10";
    let mut arguments: Vec<PathBuf> = ["generate".into(), "--model".into(), out, "--image".into()].to_vec();
    arguments.extend((0..6).map(|i| golden("stage2_llama").join(format!("image_{i}.png"))));
    arguments.extend((0..6).flat_map(|i| ["--prompt".into(), format!("t40 {} t41", question(i)).into()]));
    arguments.extend(options.split(' ').map(PathBuf::from));
    let printed = blip2(arguments).success();
    let text = |line: &str| serde_json::from_str::<Value>(line).unwrap()["text"].as_str().unwrap().to_string();
    printed.lines().map(text).collect()
}

#[test]
fn answers_are_those_of_generation_and_their_accuracy_that_of_people() {
    let tiny = TinyRun::new();
    train(&tiny.stage1("stage1", &[("/schedule/steps", json!(1))]), &[]).success();
    let opt = opt();
    for (run, weights) in [("llama", golden("stage2_llama")), ("t5", golden("stage2_t5")), ("opt", opt.path().into())] {
        let language = ("/model/language", json!({"weights": weights, "dtype": "fp32", "prompt": "t50 t51"}));
        train(&tiny.stage2(run, "stage1", std::slice::from_ref(&language)), &[]).success();
        let vqa = json!({"question": "vqa.question", "answers": "vqa.answers", "prompt": "t40 {} t41 "});
        let asked = |people: &dyn Fn(usize) -> Value| {
            let sample = |i| ("json", json!({"vqa": {"question": question(i), "answers": people(i)}}));
            let val = pack(&tiny, &(0..6).map(sample).collect::<Vec<_>>());
            tiny.stage2(run, "stage1", &[language.clone(), ("/data/val", val), ("/eval/vqa", vqa.clone())])
        };
        let wrong = answers(&asked(&|_| json!("nobody says this")));
        assert_eq!(said(&wrong), generated(&tiny, run), "{run}");
        assert_eq!((&wrong["questions"], &wrong["accuracy"]), (&json!(6), &json!(0.0)));

        // Of ten people so many say what the model says, as VQAv2 has it; the last two questions have the answer of one.
        let people = |i: usize| match (i, said(&wrong)[i]) {
            (0..4, answer) => (0..10)
                .map(|person| json!({"answer": if person < 2 * i { answer } else { "no" }, "answer_id": person + 1}))
                .collect(),
            (4, answer) => json!(format!("The {}.", answer.to_uppercase())),
            (_, answer) => json!([answer]),
        };
        let report = answers(&asked(&people));
        assert_eq!(said(&report), said(&wrong), "what people say changes no answer");
        let mut sum = 0.0;
        for (i, expected) in [0.0, 0.6, 1.0, 1.0, 1.0, 1.0].into_iter().enumerate() {
            let answered = &report["answers"][i];
            let accuracy = answered["accuracy"].as_f64().unwrap();
            assert!((accuracy - expected).abs() < 1e-12, "{answered}");
            assert_eq!((&answered["index"], &answered["question"]), (&json!(i), &json!(question(i))));
            assert_eq!(answered["answers"].as_array().unwrap().len(), if i < 4 { 10 } else { 1 });
            sum += accuracy;
        }
        assert!((report["accuracy"].as_f64().unwrap() - sum / 6.0).abs() < 1e-12, "{report}");
        let mut different = said(&report);
        different.sort();
        different.dedup();
        assert_eq!(report["distinct"], different.len());
    }
}

#[test]
fn what_cannot_be_asked_is_left_out_and_named() {
    let tiny = TinyRun::new();
    train(&tiny.stage1("stage1", &[("/schedule/steps", json!(1))]), &[]).success();
    train(&tiny.stage2("a", "stage1", &[]), &[]).success();
    let val = pack(
        &tiny,
        &[
            ("json", json!({"question": "t20", "answers": ["t1"]})),
            ("json", json!({"question": "t20", "answers": []})),
            ("txt", json!("t20")),
            ("json", json!({"question": 7, "answers": "t1"})),
        ],
    );
    let with = |vqa: Value| tiny.stage2("a", "stage1", &[("/data/val", val.clone()), ("/eval/vqa", vqa)]);
    let ended = evaluate(&with(json!({"prompt": "t40 {}"})), &[]);
    let first = "the first: shard 0.tar, key 1: answers: the JSON has no text, list of texts";
    assert!(ended.stderr.contains("data.val: 3 samples cannot be used and are left out"), "{}", ended.stderr);
    assert!(ended.stderr.contains(first), "{}", ended.stderr);
    let printed = ended.success();
    let lines: Vec<&str> = printed.lines().collect();
    assert!(lines[0].ends_with(": step 4") && lines[1].starts_with("t20 -> ") && lines[1].ends_with(" (people: t1)"));
    assert_eq!(lines[2..], ["1 questions: accuracy 0.0 %; 1 different answers"], "{printed}");

    let long = format!("{}{{}}", "t40 ".repeat(600));
    for (vqa, expected) in [
        (json!({"prompt": "t40 {}", "question": "q"}), "question: the JSON has no text field \"q\""),
        (json!({"prompt": "t40 {}", "answers": "a.b"}), "in \"a.b\"; name the fields"),
        (json!({"prompt": long}), "question: 601 tokens with its prompt; there is room for 512"),
    ] {
        let message = evaluate(&with(vqa), &[]).failure();
        assert!(message.contains("data.val: expected questions with answers, got none in 4 samples"), "{message}");
        assert!(message.contains("eval.vqa.question (") && message.contains("eval.vqa.answers ("), "{message}");
        assert!(message.contains(expected), "{expected} is not in {message}");
    }
    let message = evaluate(&with(json!({"prompt": "why"})), &[]).failure();
    assert!(message.contains("eval.vqa.prompt: expected auto or a text with {} in it, got \"why\""), "{message}");
    let message = evaluate(&tiny.stage1("stage1", &[]), &[]).failure();
    assert!(message.contains("task.stage: expected 2 to evaluate vqa, got 1"), "{message}");
    let message = evaluate(&tiny.stage2("a", "stage1", &[("/data/val", Value::Null)]), &[]).failure();
    assert!(message.contains("data.val: expected shards to evaluate on, got nothing"), "{message}");
}
