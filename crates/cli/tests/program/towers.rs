//! An image encoder that `transformers` has no BLIP-2 class for, through the programs.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::lavis::old_bert;
use crate::tiny_run::{TinyRun, checkpoint, train};
use crate::{blip2, golden};

fn export(tiny: &TinyRun, run: &str) -> (PathBuf, String) {
    let out = tiny.path(&format!("export-of-{run}"));
    let said = blip2(["export".into(), "--checkpoint".into(), tiny.run(run), "--out".into(), out.clone()]).success();
    (out, said)
}

fn read_json(path: PathBuf) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

#[test]
fn clip_goes_out_with_a_word_about_transformers_and_in_again_at_the_same_layer() {
    let (tiny, bert) = (TinyRun::new(), old_bert());
    let begun = |name: &str, init: &Path, vision: &Path| {
        let changes = [
            ("/schedule/steps", json!(1)),
            ("/model/qformer/init", json!(init)),
            ("/model/vision/weights", json!(vision)),
            ("/data/image/size", json!(24)),
        ];
        train(&tiny.stage1(name, &changes), &[])
    };
    let ended = begun("clip", bert.path(), &golden("vision/clip_whole"));
    assert!(
        ended.stderr.contains("; no preprocessor_config.json: pixels as its family is used to them"),
        "{}",
        ended.stderr
    );
    ended.success();
    let part = &read_json(tiny.run("clip").join("run.json"))["starts"][0]["loaded"][0];
    assert!(part["pixels"].as_str().unwrap().starts_with("no preprocessor_config.json: "), "{part}");
    let (out, said) = export(&tiny, "clip");
    let word = "transformers has no class for it: its BLIP-2 has no clip_vision_model as image encoder\n";
    assert!(said.lines().count() == 2 && said.ends_with(word), "{said}");

    // The BERT had a vocabulary alone; without a class AutoTokenizer would take it for GPT-2's.
    assert_eq!(read_json(out.join("tokenizer_config.json")), json!({"tokenizer_class": "BertTokenizer"}));

    let ended = begun("again", &out, &out);
    assert!(ended.stderr.contains("; pixels as preprocessor_config.json says"), "{}", ended.stderr);
    ended.success();
    let layer = |folder: &Path| read_json(folder.join("config.json"))["vision_feature_layer"].clone();
    assert_eq!(layer(&checkpoint(&tiny.run("again"), 1)), json!(2));
    let (twice, _) = export(&tiny, "again");
    assert_eq!((layer(&twice), layer(&out)), (json!(2), json!(2)));

    let own = tiny.stage1("blip2", &[("/schedule/steps", json!(1))]);
    train(&own, &[]).success();
    assert_eq!(export(&tiny, "blip2").1.lines().count(), 1, "transformers has a class for that");
}
