//! Which crate may know which: ARCHITECTURE.md's arrows, read from `cargo metadata`.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use serde_json::Value;

/// Each crate with those it may depend on, for building or for tests.
const MAY_KNOW: [(&str, &[&str]); 8] = [
    ("torchx", &[]),
    ("model", &["torchx"]),
    ("losses", &["torchx"]),
    ("weights", &["torchx", "model"]),
    ("data", &[]),
    ("metrics", &[]),
    ("trainer", &["torchx", "model", "losses", "weights", "data", "metrics"]),
    ("cli", &["trainer"]),
];

fn metadata() -> Value {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--format-version", "1", "--manifest-path"])
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/../../Cargo.toml"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The workspace's crates without their common prefix, with all crates that they depend on.
fn crates() -> BTreeMap<String, BTreeSet<String>> {
    let metadata = metadata();
    let packages = metadata["packages"].as_array().unwrap().iter();
    let known = packages.map(|package| {
        let names = package["dependencies"].as_array().unwrap().iter().map(|d| d["name"].as_str().unwrap().to_string());
        let name = package["name"].as_str().unwrap();
        (name.strip_prefix("blip2-").unwrap_or(name).to_string(), names.collect())
    });
    known.collect()
}

#[test]
fn no_crate_knows_another_than_it_may() {
    let crates = crates();
    let expected: BTreeSet<&str> = MAY_KNOW.iter().map(|(name, _)| *name).collect();
    assert_eq!(
        crates.keys().map(String::as_str).collect::<BTreeSet<_>>(),
        expected,
        "a new crate needs its arrows here"
    );
    for (name, may) in MAY_KNOW {
        let knows: Vec<&str> = crates[name].iter().filter_map(|dependency| dependency.strip_prefix("blip2-")).collect();
        let wrong: Vec<&&str> = knows.iter().filter(|known| !may.contains(known)).collect();
        assert!(wrong.is_empty(), "{name} may know {may:?}, and knows {wrong:?} too");
    }
}

#[test]
fn data_and_metrics_know_no_libtorch() {
    let crates = crates();
    for name in ["data", "metrics"] {
        let torch: Vec<&String> = crates[name].iter().filter(|d| d.contains("tch") || d.contains("torch")).collect();
        assert!(torch.is_empty(), "{name} depends on {torch:?}");
    }
}
