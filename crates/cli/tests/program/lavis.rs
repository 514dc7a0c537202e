//! LAVIS' and PyTorch's files through the programs: in, a step of training, out, and in again.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::tiny_run::{TinyRun, refused, train};
use crate::{blip2, copied};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../weights/tests/fixtures/torch_files").join(name)
}

fn export(run: &Path, out: &Path) -> crate::Ended {
    let arguments = ["export", "--format", "lavis", "--checkpoint"].map(PathBuf::from);
    blip2(arguments.into_iter().chain([run.to_path_buf(), "--out".into(), out.to_path_buf()]))
}

#[test]
fn both_stages_go_out_as_lavis_and_come_in_again() {
    let tiny = TinyRun::new();
    let one_step = ("/schedule/steps", json!(1));
    train(&tiny.stage1("stage1", std::slice::from_ref(&one_step)), &[]).success();
    // The heads of the tiny Q-Former are not of width 64, so a configuration stands beside the file.
    let folder = copied("stage1");
    let file = folder.path().join("stage1.pth");
    assert!(export(&tiny.run("stage1"), &file).success().contains("the model of step 1"));
    assert!(export(&tiny.run("stage1"), &file).failure().contains("is there already and is not overwritten"));
    let found: Value =
        serde_json::from_str(&blip2(["inspect".into(), file.clone(), "--json".into()]).success()).unwrap();
    assert_eq!(found["contents"], "torch_file");
    assert!(found["groups"].as_array().unwrap().iter().any(|group| group["part"] == "Qformer"));

    let init = ("/model/qformer/init", json!(file));
    let tokenizer = ("/model/qformer/tokenizer", json!(tiny.run("stage1").join("tokenizer")));
    train(&tiny.stage1("again", &[one_step.clone(), init.clone(), tokenizer]), &[]).success();
    let stage2 = tiny.stage2("stage2", "stage1", &[one_step.clone(), init]);
    train(&stage2, &[]).success();
    let second = folder.path().join("stage2.pth");
    export(&tiny.run("stage2"), &second).success();
    let continued = tiny.stage2("more", "stage1", &[one_step, ("/model/qformer/init", json!(second))]);
    train(&continued, &[]).success();
}

#[test]
fn a_tokenizer_that_is_not_beside_the_file_is_asked_for() {
    let tiny = TinyRun::new();
    let folder = copied("stage1");
    train(&tiny.stage1("stage1", &[("/schedule/steps", json!(1))]), &[]).success();
    let file = folder.path().join("stage1.pth");
    export(&tiny.run("stage1"), &file).success();
    let config = tiny.stage1("again", &[("/model/qformer/init", json!(file))]);
    let message = refused(train(&config, &[]));
    assert!(message.contains("tokenizer.json: no such file, and no vocab.txt beside it"), "{message}");
}

/// A BERT of another language as it lies on the hub: PyTorch's format, old names, a vocabulary alone, other names of special tokens.
pub fn old_bert() -> tempfile::TempDir {
    let bert = tempfile::tempdir().unwrap();
    for name in ["config.json", "pytorch_model.bin"] {
        fs::copy(fixture("bert_old").join(name), bert.path().join(name)).unwrap();
    }
    let words: String = (10..40).map(|i| format!("t{i}\n")).collect();
    fs::write(bert.path().join("vocab.txt"), format!("t9\n<s>\n</s>\n<pad>\n<unk>\n<mask>\n{words}")).unwrap();
    let tokens = json!({"pad_token": "<pad>", "cls_token": "<s>", "sep_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"});
    fs::write(bert.path().join("special_tokens_map.json"), tokens.to_string()).unwrap();
    bert
}

#[test]
fn a_bert_in_pytorch_s_format_with_a_vocabulary_and_lavis_vit() {
    let (tiny, bert) = (TinyRun::new(), old_bert());
    let config = tiny.stage1(
        "bert",
        &[
            ("/schedule/steps", json!(2)),
            ("/model/qformer/init", json!(bert.path())),
            ("/model/vision/weights", json!(fixture("lavis_vit.pth"))),
            ("/data/image/size", json!(12)),
        ],
    );
    train(&config, &[]).success();
    assert!(tiny.run("bert").join("tokenizer/vocab.txt").exists());
    // The tower's file goes into an export as any tower does.
    let out = tiny.path("model");
    blip2(["export".into(), "--checkpoint".into(), tiny.run("bert"), "--out".into(), out.clone()]).success();
    let exported: Value = serde_json::from_slice(&fs::read(out.join("config.json")).unwrap()).unwrap();
    assert_eq!(exported["vision_config"]["model_type"], "blip_2_vision_model");

    fs::write(bert.path().join("special_tokens_map.json"), json!({"pad_token": "<fill>"}).to_string()).unwrap();
    let message = refused(train(&config, &["--resume", "never", "--set", "run.name=other"]));
    assert!(message.contains("vocab.txt: it lacks the special token <fill>"), "{message}");
}

#[test]
fn a_malicious_checkpoint_is_refused_by_name_and_runs_nothing() {
    let tiny = TinyRun::new();
    let marker = tiny.path("executed");
    let file = tiny.path("evil.pth");
    // The stream that `torch.load` of old would have executed.
    let command = format!("touch {}", marker.display());
    let mut bytes = b"\x80\x02cposix\nsystem\nX".to_vec();
    bytes.extend((command.len() as u32).to_le_bytes());
    bytes.extend(command.as_bytes());
    bytes.extend(b"\x85R.");
    fs::write(&file, &bytes).unwrap();
    let message = refused(train(&tiny.stage1("a", &[("/model/qformer/init", json!(file))]), &[]));
    assert!(message.contains("its pickle refers to posix.system"), "{message}");
    assert!(blip2(["inspect".into(), file]).failure().contains("posix.system"));
    assert!(!marker.exists());
}

#[test]
fn files_where_folders_are_expected() {
    let tiny = TinyRun::new();
    let bin = fixture("bert_old/pytorch_model.bin");
    let message = refused(train(&tiny.stage1("a", &[("/model/qformer/init", json!(bin))]), &[]));
    assert!(
        message.contains("model.qformer.init: expected a folder") && message.contains("which is a file"),
        "{message}"
    );
    let other = tiny.stage1("a", &[("/model/vision/weights", json!(fixture("zip.pth")))]);
    assert!(refused(train(&other, &[])).contains("neither a checkpoint of LAVIS"));
    let checkpoint = tiny.stage1("a", &[("/model/vision/weights", json!(fixture("lavis_stage2_opt.pth")))]);
    assert!(refused(train(&checkpoint, &[])).contains("this checkpoint of LAVIS holds no image encoder"));
}
