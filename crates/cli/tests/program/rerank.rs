//! `blip2 evaluate --task retrieval --rerank`.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::tiny_run::{TinyRun, train};
use crate::{Ended, blip2, golden};

fn evaluate(config: &Path, more: &[&str]) -> Ended {
    blip2(
        ["evaluate".as_ref(), "--config".as_ref(), config.as_os_str()]
            .into_iter()
            .chain(more.iter().map(AsRef::as_ref)),
    )
}

fn retrieval(config: &Path, more: &[&str]) -> Value {
    let arguments: Vec<&str> = ["--task", "retrieval", "--json"].iter().chain(more).copied().collect();
    serde_json::from_str(&evaluate(config, &arguments).success()).unwrap()
}

#[test]
fn a_run_is_measured_with_and_without() {
    let tiny = TinyRun::new();
    let config = tiny.stage1("stage1", &[]);
    train(&config, &[]).success();
    let without = retrieval(&config, &[]);
    assert_eq!((&without["images"], &without["texts"]), (&json!(6), &json!(6)));
    assert!(without.get("rerank").is_none() && without.get("reranked").is_none(), "{without}");
    assert_eq!(retrieval(&config, &["--rerank", "0"]), without);

    for (k, list) in [("1", 1), ("3", 3), ("6", 6), ("128", 6)] {
        let with = retrieval(&config, &["--rerank", k]);
        assert_eq!(with, retrieval(&config, &["--rerank", k]), "the same twice");
        assert_eq!((&with["recall"], &with["images"]), (&without["recall"], &json!(6)), "the first look is as before");
        assert_eq!(with["rerank"], json!(k.parse::<u64>().unwrap()));
        let (itc, reranked) = (with["recall"].as_array().unwrap(), with["reranked"].as_array().unwrap());
        let ranks: Vec<&Value> = reranked.iter().map(|r| &r["k"]).collect();
        assert_eq!(ranks, [1, 5, 10]);
        // Who is among the first K is not changed by their order.
        for (itc, reranked) in itc.iter().zip(reranked).filter(|(itc, _)| itc["k"].as_u64() >= Some(list)) {
            assert_eq!(itc, reranked);
        }
    }
    // All candidates are all candidates.
    assert_eq!(
        retrieval(&config, &["--rerank", "6"])["reranked"],
        retrieval(&config, &["--rerank", "999"])["reranked"]
    );

    let text = evaluate(&config, &["--task", "retrieval", "--rerank", "3"]).success();
    let heads: Vec<&str> = text.lines().filter(|line| line.contains("image to text   text to image")).collect();
    assert_eq!(heads.len(), 2, "{text}");
    assert!(heads[0].starts_with("recall over 6 images") && heads[1].starts_with("the first 3 re-ranked"), "{text}");
}

/// A set with one caption a row, as the usual retrieval sets have five an image: the image is one candidate.
#[test]
fn an_image_with_several_captions_is_one_candidate() {
    let tiny = TinyRun::new();
    let (captions, out) = (tiny.path("twice.tsv"), tiny.path("twice"));
    let row = |i: usize| format!("image_{}.png\tt{} t{}\n", i / 2, 10 + i, 40 + i);
    fs::write(&captions, (0..12).map(row).collect::<String>()).unwrap();
    let images = golden("stage2_llama");
    let arguments = [("--captions", &captions), ("--images", &images), ("--out", &out)];
    let arguments = arguments.into_iter().flat_map(|(option, path)| [option.as_ref(), path.as_os_str()]);
    blip2(["shards".as_ref(), "pack".as_ref()].into_iter().chain(arguments)).success();
    let config = tiny.stage1("stage1", &[("/data/val", json!({"shards": out.join("*.tar")}))]);
    train(&config, &[]).success();
    let measured = retrieval(&config, &["--rerank", "4"]);
    assert_eq!((&measured["images"], &measured["texts"]), (&json!(6), &json!(12)));
    // Ten of six images are all of them; of twelve texts ten are enough for one of two.
    for table in ["recall", "reranked"] {
        assert_eq!(
            (&measured[table][2]["text_to_image"], &measured[table][2]["image_to_text"]),
            (&json!(1.0), &json!(1.0))
        );
    }
}

#[test]
fn what_cannot_be_re_ranked_is_said() {
    let tiny = TinyRun::new();
    let config = tiny.stage1("stage1", &[("/task/losses", json!({"itm": 0}))]);
    let ended = evaluate(&config, &["--task", "caption", "--rerank", "128"]);
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(2), ""));
    let expected = "error: --rerank: expected beside --task retrieval, got --task caption; leave --rerank out\n";
    assert_eq!(ended.stderr, expected);
    let message = evaluate(&config, &["--task", "retrieval", "--rerank", "128"]).failure();
    assert!(message.contains("task.losses.itm: expected above 0 to re-rank by ITM, got 0"), "{message}");
    assert_eq!(evaluate(&config, &["--task", "retrieval", "--rerank", "-1"]).code, Some(2));
}
