//! A run over several data sets, through the program.

use std::fs;

use serde_json::{Value, json};

use crate::tiny_run::{TinyRun, assert_same_end, metrics, recorded_step, refused, runs_until, start, train};

/// The pictures once more under other names, two of three by the filter, captions drawn from a list.
fn second_set(tiny: &TinyRun) {
    let folder = tiny.path("more");
    fs::create_dir_all(&folder).unwrap();
    let mut archive = tar::Builder::new(fs::File::create(folder.join("0.tar")).unwrap());
    let mut add = |name: String, data: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_size(data.len() as u64);
        archive.append_data(&mut header, name, data).unwrap();
    };
    for i in 0..3 {
        let image = fs::read(crate::golden("stage2_llama").join(format!("image_{i}.png"))).unwrap();
        let metadata = json!({"texts": [format!("t{}", 40 + i), format!("t{}", 50 + i)], "similarity": i as f64 / 2.0});
        add(format!("{i}.png"), &image);
        add(format!("{i}.json"), metadata.to_string().as_bytes());
    }
    archive.into_inner().unwrap();
}

#[test]
fn a_mixture_trains_resumes_exactly_and_tells_how_far_each_set_is() {
    let tiny = TinyRun::new();
    second_set(&tiny);
    let sets = json!([
        {"shards": tiny.path("shards/*.tar"), "weight": 3},
        {"shards": tiny.path("more/*.tar"), "name": "more", "captions": {"field": "texts", "top": 2},
         "template": "t9 {}", "filter": {"json": {"similarity": {"min": 0.5}}}},
    ]);
    let changes = |steps: u64| [("/data/train", sets.clone()), ("/schedule/steps", json!(steps))];
    let told = train(&tiny.stage1("whole", &changes(6)), &[]);
    assert!(told.stderr.contains("data set more: 2 of 3 samples pass the filter"), "{}", told.stderr);
    told.success();
    let whole = metrics(&tiny.run("whole"));
    let last: &Value = whole.iter().rfind(|record| record.get("loss").is_some()).unwrap();
    assert_eq!((&last["data/0/samples"], &last["data/more/samples"]), (&json!(18.0), &json!(6.0)));
    assert_eq!(last["data/more/epochs"], json!(3.0));
    assert_eq!((&last["quarantined"], &last["quarantine_rate"]), (&json!(0.0), &json!(0.0)));

    let cut = tiny.stage1("cut", &changes(6));
    let mut child = start(&cut);
    runs_until(&mut child, || recorded_step(&tiny.run("cut")) >= 3);
    child.kill().unwrap();
    child.wait().unwrap();
    train(&cut, &[]).success();
    assert_same_end(&tiny.run("cut"), &tiny.run("whole"), 6);

    let other = json!([{"shards": tiny.path("shards/*.tar"), "weight": 1}, {"shards": tiny.path("more/*.tar")}]);
    let message = refused(train(&tiny.stage1("cut", &[("/data/train", other), ("/schedule/steps", json!(8))]), &[]));
    assert!(message.contains("data.train.0.weight"), "{message}");
}
