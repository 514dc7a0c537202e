//! The memory that a load takes: what it fills, and one tensor. In a program of its own, since memory is the whole process's.

use std::collections::BTreeMap;
use std::fs;

use blip2_torchx::params::{Init, LoadPlan, ParamStore, TensorSource};
use blip2_weights::{LavisCheckpoint, Projection, Stage, TorchFile, save_lavis, trained_names};
use tch::{Device, Kind, Tensor};

const MIB: i64 = 1 << 20;
/// Of each large tensor in the file, which is fp32.
const TENSOR_MIB: i64 = 64;
/// What else a process does meanwhile: one chunk of the mapped file, the allocator, libtorch's own.
const SLACK_MIB: i64 = 28;

/// The process's memory now and at most so far, in MiB.
fn resident() -> (i64, i64) {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<i64>().unwrap() / 1024
    };
    (field("VmRSS:"), field("VmHWM:"))
}

/// How much memory `work` takes at most beyond what there was.
fn peak_of(work: impl FnOnce()) -> i64 {
    // The highest value so far begins anew.
    fs::write("/proc/self/clear_refs", "5").unwrap();
    let before = resident().0;
    work();
    resident().1 - before
}

#[test]
fn a_load_costs_its_destination_and_one_tensor() {
    let directory = tempfile::tempdir().unwrap();
    let large = ["query_tokens", "language_projection.weight", "qformer.layernorm.weight"];
    let shape = |name: &str| if large.contains(&name) { vec![TENSOR_MIB * MIB / 4] } else { vec![1] };
    let names = trained_names(Stage::Two, 1, 1);
    let trained: BTreeMap<String, Tensor> =
        names.iter().map(|name| (name.clone(), Tensor::ones(shape(name), (Kind::Float, Device::Cpu)))).collect();
    let path = directory.path().join("large.pth");
    let checkpoint = LavisCheckpoint {
        trained: &trained,
        stage: Stage::Two,
        layers: 1,
        cross_attention_frequency: 1,
        positions: 4,
        projection: Projection::Llm,
    };
    save_lavis(&checkpoint, &path).unwrap();
    drop(trained);

    // Whatever dtype the file has: a bf16 tower from fp32.
    let file = TorchFile::open(&path).unwrap();
    let floats = file.entries().into_iter().filter(|(_, info)| info.kind == Kind::Float);
    let wanted: BTreeMap<String, Vec<i64>> = floats.map(|(name, info)| (name, info.shape)).collect();
    let plan = || LoadPlan { unused: Box::new(|name| name.ends_with("position_ids")), ..LoadPlan::exact() };
    for (kind, destination) in [(Kind::BFloat16, 3 * TENSOR_MIB / 2), (Kind::Float, 3 * TENSOR_MIB)] {
        let taken = peak_of(|| {
            let store = ParamStore::frozen(Device::Cpu, kind);
            for (name, shape) in &wanted {
                let _ = store.root().param(name, shape, Init::Zeros);
            }
            let report = store.load(&file, &plan()).unwrap();
            assert_eq!(report.loaded.len(), wanted.len());
        });
        println!("{kind:?}: {taken} MiB for {destination} MiB and a tensor of {TENSOR_MIB}");
        assert!(taken <= destination + TENSOR_MIB + SLACK_MIB, "{kind:?}: {taken} MiB");
    }
}
