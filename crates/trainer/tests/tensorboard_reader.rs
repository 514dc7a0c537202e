//! PyPI `tensorboard` reads our event files back.
//!
//! The Python is that of `BLIP2_TENSORBOARD_PYTHON`, else `target/venv/bin/python`, else `python3`.

use std::path::{Path, PathBuf};
use std::process::Command;

use blip2_trainer::telemetry::{Output, Record, Telemetry, TelemetryPlan};
use serde_json::{Value, json};

const READ: &str = r#"
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
a = EventAccumulator(sys.argv[1], size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()
print(json.dumps(dict(
    scalars={t: [[e.step, e.value] for e in a.Scalars(t)] for t in a.Tags()["scalars"]},
    images={t: [[e.step, e.width, e.height, e.encoded_image_string.hex()] for e in a.Images(t)] for t in a.Tags()["images"]},
    text={t: [[e.step, e.tensor_proto.string_val[0].decode()] for e in a.Tensors(t)] for t in a.Tags()["tensors"]},
    plugin=a.SummaryMetadata("captions").plugin_data.plugin_name)))
"#;

/// A PNG of one red pixel.
const PNG: &[u8] = &[
    137, 80, 78, 71, 13, 10, 26, 10, 0, 0, 0, 13, 73, 72, 68, 82, 0, 0, 0, 1, 0, 0, 0, 1, 8, 2, 0, 0, 0, 144, 119, 83,
    222, 0, 0, 0, 12, 73, 68, 65, 84, 8, 215, 99, 248, 207, 192, 0, 0, 3, 1, 1, 0, 24, 221, 141, 176, 0, 0, 0, 0, 73,
    69, 78, 68, 174, 66, 96, 130,
];

/// A Python that imports tensorboard.
fn python() -> PathBuf {
    let imports = |python: &Path| {
        Command::new(python).args(["-c", "import tensorboard"]).output().is_ok_and(|output| output.status.success())
    };
    let given = std::env::var_os("BLIP2_TENSORBOARD_PYTHON").map(PathBuf::from);
    let venv = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/venv/bin/python");
    let candidates = given.into_iter().chain([venv, PathBuf::from("python3")]);
    candidates.into_iter().find(|python| imports(python)).unwrap_or_else(|| {
        panic!(
            "no Python imports tensorboard: `pip install tensorboard`, name its Python in BLIP2_TENSORBOARD_PYTHON, or set \
             BLIP2_SKIP_TENSORBOARD=1 to leave this test out"
        )
    })
}

fn read_back(folder: &Path) -> Value {
    let output = Command::new(python()).args(["-c", READ]).arg(folder).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn tensorboard_reads_scalars_texts_and_images_of_a_resumed_run() {
    if std::env::var_os("BLIP2_SKIP_TENSORBOARD").is_some_and(|value| value == "1") {
        eprintln!("left out: BLIP2_SKIP_TENSORBOARD=1");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let open = |start, evaluation_due| {
        let plan = TelemetryPlan {
            metrics: folder.path().join("metrics.jsonl"),
            tensorboard: folder.path().join("tensorboard"),
            steps: 100,
            start,
            evaluation_due,
            output: Output::Hidden,
            shown: Vec::new(),
        };
        Telemetry::open(plan).unwrap()
    };
    let mut first = open(0, false);
    for step in [20, 40, 60] {
        first.record(&Record::new(step, [("loss/itc", step as f64), ("lr", 0.5)])).unwrap();
        first.record(&Record::new(step, [("val_loss", step as f64)])).unwrap();
        first.text(step, "captions", &format!("after {step} steps")).unwrap();
        first.image(step, "samples", PNG.to_vec(), 1, 1).unwrap();
    }
    first.sync().unwrap();
    // The run was killed after step 60 and goes on from its checkpoint at step 40.
    let mut second = open(40, false);
    second.record(&Record::new(60, [("loss/itc", 0.25), ("lr", 0.25)])).unwrap();
    second.text(60, "captions", "a red *apple*").unwrap();
    second.image(60, "samples", PNG.to_vec(), 1, 1).unwrap();
    second.sync().unwrap();

    let read = read_back(&folder.path().join("tensorboard"));
    assert_eq!(read["scalars"]["loss/itc"], json!([[20, 20.0], [40, 40.0], [60, 0.25]]));
    assert_eq!(read["scalars"]["lr"], json!([[20, 0.5], [40, 0.5], [60, 0.25]]));
    assert_eq!(read["scalars"]["val_loss"], json!([[20, 20.0], [40, 40.0]]));
    assert_eq!(
        read["text"]["captions"],
        json!([[20, "after 20 steps"], [40, "after 40 steps"], [60, "a red *apple*"]]),
        "TensorBoard itself drops no texts where a session starts"
    );
    assert_eq!(read["plugin"], "text");
    let png: String = PNG.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(read["images"]["samples"], json!([[20, 1, 1, png], [40, 1, 1, png], [60, 1, 1, png]]));

    // The same from a checkpoint of step 60 whose evaluation is still to come: of that step what was trained stays.
    drop(open(60, true));
    let read = read_back(&folder.path().join("tensorboard"));
    assert_eq!(read["scalars"]["loss/itc"], json!([[20, 20.0], [40, 40.0], [60, 0.25]]));
    assert_eq!(read["text"]["captions"], json!([[20, "after 20 steps"], [40, "after 40 steps"]]));
}
