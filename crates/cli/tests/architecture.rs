//! Which crate knows which: the arrows that ARCHITECTURE.md draws, compared with `cargo metadata`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::process::Command;

use serde_json::Value;

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");

/// Dependencies with the crates that alone may have them.
const BELONG: [(&str, &[&str]); 4] = [
    ("tch", &["torchx", "model", "losses", "weights", "trainer"]),
    ("torch-sys", &["torchx"]),
    ("cc", &["torchx"]),
    ("anyhow", &["cli"]),
];

/// Crates with those that they depend on, for building or for tests.
type Arrows = BTreeMap<String, BTreeSet<String>>;

/// `torchx <- model, weights`: the ones on the right know the ones on the left.
fn drawn() -> Arrows {
    let text = fs::read_to_string(format!("{ROOT}/ARCHITECTURE.md")).unwrap();
    let mut arrows = Arrows::new();
    for (known, knowing) in text.lines().filter_map(|line| line.split_once(" <- ")) {
        let names = |list: &str| list.split(',').map(|name| name.trim().to_owned()).collect::<BTreeSet<_>>();
        for name in names(knowing) {
            arrows.entry(name).or_default().extend(names(known));
        }
        for name in names(known) {
            arrows.entry(name).or_default();
        }
    }
    arrows
}

/// The workspace's crates without their common prefix, with all that they depend on.
fn dependencies() -> Arrows {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--format-version", "1", "--manifest-path"])
        .arg(format!("{ROOT}/Cargo.toml"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let of = |package: &Value| {
        let names = package["dependencies"].as_array().unwrap().iter().map(|dependency| text(&dependency["name"]));
        (own(&text(&package["name"])).unwrap(), names.collect::<BTreeSet<_>>())
    };
    metadata["packages"].as_array().unwrap().iter().map(of).collect()
}

/// A crate of the workspace without its prefix.
fn own(name: &str) -> Option<String> {
    name.strip_prefix("blip2-").map(str::to_owned)
}

#[test]
fn the_arrows_are_those_of_the_document() {
    let known = |names: BTreeSet<String>| names.iter().filter_map(|name| own(name)).collect::<BTreeSet<_>>();
    let found: Arrows = dependencies().into_iter().map(|(name, all)| (name, known(all))).collect();
    assert_eq!(found, drawn(), "crates on the left, what they know on the right; first as they are, then as drawn");
}

#[test]
fn what_belongs_to_some_crates_is_known_to_no_other() {
    let crates = dependencies();
    for (dependency, may) in BELONG {
        let knowing = crates.iter().filter(|(_, all)| all.contains(dependency)).map(|(name, _)| name.as_str());
        let wrong: Vec<&str> = knowing.filter(|name| !may.contains(name)).collect();
        assert!(wrong.is_empty(), "{wrong:?} depend on {dependency}, which belongs to {may:?}");
    }
}

#[test]
fn losses_are_functions_of_tensors_alone() {
    let losses = &dependencies()["losses"];
    assert_eq!(losses.iter().map(String::as_str).collect::<Vec<_>>(), ["proptest", "tch"]);
}

#[test]
fn only_torchx_may_hold_unsafe_code() {
    for name in dependencies().keys() {
        let manifest = fs::read_to_string(format!("{ROOT}/crates/{name}/Cargo.toml")).unwrap();
        let forbids = manifest.contains("[lints]\nworkspace = true");
        assert_eq!(forbids, name != "torchx", "{name}: the workspace's lints forbid unsafe code");
    }
}
