//! What `blip2 inspect` says of a model's parts.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use blip2_torchx::params::TensorSource;
use blip2_trainer::fit::{FitTable, PartFit, fit};
use blip2_weights::{SafetensorsFile, save_safetensors};
use tch::Tensor;

fn root(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(path)
}

fn parts(path: &Path) -> Vec<PartFit> {
    fit(path).unwrap().unwrap()
}

/// The golden stage-2 model with some of its tensors.
fn part_of_golden(keep: impl Fn(&str) -> bool) -> tempfile::TempDir {
    let (folder, golden) = (tempfile::tempdir().unwrap(), root("tests/golden/stage2_llama"));
    fs::copy(golden.join("config.json"), folder.path().join("config.json")).unwrap();
    let file = SafetensorsFile::open(&golden.join("model.safetensors")).unwrap();
    let kept: Vec<(String, Tensor)> = file
        .entries()
        .into_iter()
        .filter(|(name, _)| keep(name))
        .map(|(name, _)| (name.clone(), file.read(&name).unwrap()))
        .collect();
    save_safetensors(&kept, &BTreeMap::new(), &folder.path().join("model.safetensors")).unwrap();
    folder
}

#[test]
fn whole_models_towers_and_lavis_files_fit() {
    for (path, names) in [
        ("tests/golden/stage1", &["image encoder", "Q-Former"][..]),
        ("tests/golden/stage2_t5", &["image encoder", "Q-Former", "language model"][..]),
        ("tests/golden/language/opt", &["language model"][..]),
        ("tests/golden/vision/siglip", &["image encoder"][..]),
        ("crates/weights/tests/fixtures/torch_files/bert", &["Q-Former"][..]),
        ("crates/weights/tests/fixtures/torch_files/lavis_stage1.pth", &["Q-Former"][..]),
        ("crates/weights/tests/fixtures/torch_files/lavis_stage2_opt.pth", &["Q-Former"][..]),
        ("crates/weights/tests/fixtures/torch_files/lavis_vit.pth", &["image encoder"][..]),
    ] {
        let parts = parts(&root(path));
        assert_eq!(parts.iter().map(|fit| fit.part.as_str()).collect::<Vec<_>>(), names, "{path}");
        for fit in &parts {
            assert_eq!(fit.problems, Vec::<String>::new(), "{path}: {}", fit.part);
            assert!(fit.loaded > 0, "{path}: {}", fit.part);
        }
    }
    let siglip = &parts(&root("tests/golden/vision/siglip"))[0];
    assert!(siglip.dropped > 0, "the pooling head is dropped, and counted");
}

#[test]
fn frozen_towers_may_lie_elsewhere() {
    let folder = part_of_golden(|name| {
        !name.starts_with("language_model.") && (!name.starts_with("vision_model.") || name.contains("post_layernorm"))
    });
    let parts = parts(folder.path());
    assert!(parts[0].frozen_elsewhere > 0 && parts[2].frozen_elsewhere > 0);
    assert_eq!((parts[0].missing, parts[1].missing, parts[1].frozen_elsewhere), (0, 0, 0));
}

#[test]
fn what_is_missing_is_counted_and_named() {
    let folder = part_of_golden(|name| name != "query_tokens");
    let parts = parts(folder.path());
    assert_eq!((parts[1].missing, parts[1].unexpected, parts[1].misshapen), (1, 0, 0));
    let table = FitTable(&parts).to_string();
    assert!(table.contains("frozen elsewhere") && table.contains("missing query_tokens, expected shape"), "{table}");
}

#[test]
fn a_single_file_is_no_model() {
    assert_eq!(fit(&root("tests/golden/stage1/model.safetensors")).unwrap(), None);
    let whole = root("crates/weights/tests/fixtures/torch_files/trainer.pth");
    assert_eq!(fit(&whole).unwrap(), None, "PyTorch's, and none of LAVIS'");
    let (folder, bytes) = (tempfile::tempdir().unwrap(), fs::read(&whole).unwrap());
    let damaged = folder.path().join("trainer.pth");
    fs::write(&damaged, &bytes[..bytes.len() / 2]).unwrap();
    let message = fit(&damaged).unwrap_err().to_string();
    assert!(message.contains("trainer.pth: it ends inside"), "{message}");
}
