//! Writing safetensors.

use std::collections::BTreeMap;
use std::fs;

use blip2_torchx::params::TensorSource;
use blip2_weights::{SafetensorsFile, WeightsError, save_safetensors, write_safetensors};
use proptest::prelude::*;
use tch::{Device, Kind, Tensor};

use crate::fixtures::{identical, line, numbered, source, tensors};

#[test]
fn every_dtype_and_rank_reads_back() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.safetensors");
    let kinds =
        [Kind::Float, Kind::Half, Kind::BFloat16, Kind::Double, Kind::Int64, Kind::Int, Kind::Uint8, Kind::Bool];
    let mut entries = Vec::new();
    for (i, kind) in kinds.into_iter().enumerate() {
        for shape in [&[][..], &[3], &[0, 2], &[2, 3, 5]] {
            entries.push((format!("{i}.{}", shape.len()), numbered("values", shape).to_kind(kind)));
        }
        entries.dedup_by(|a, b| a.0 == b.0);
    }
    let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    save_safetensors(&entries, &metadata, &path).unwrap();
    let file = SafetensorsFile::open(&path).unwrap();
    assert_eq!(file.metadata(), &metadata);
    assert_eq!(file.entries().len(), entries.len());
    for (name, tensor) in &entries {
        assert!(identical(&file.read(name).unwrap(), tensor), "{name}");
    }
}

#[test]
fn views_and_trained_tensors_are_stored_by_value() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.safetensors");
    let base = numbered("base", &[4, 6]);
    let entries = vec![
        ("columns".to_string(), base.narrow(1, 2, 3)),
        ("transposed".to_string(), base.tr()),
        ("trained".to_string(), base.shallow_clone().set_requires_grad(true)),
    ];
    save_safetensors(&entries, &BTreeMap::new(), &path).unwrap();
    let file = SafetensorsFile::open(&path).unwrap();
    for (name, tensor) in &entries {
        assert!(file.read(name).unwrap().equal(&tensor.detach()), "{name}");
    }
}

#[test]
fn a_tensor_of_several_chunks_reads_back() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.safetensors");
    let large = numbered("large", &[(1 << 21) * 2 + 3]).to_kind(Kind::Int64).remainder(251).to_kind(Kind::Uint8);
    save_safetensors(&[("large".into(), large.shallow_clone())], &BTreeMap::new(), &path).unwrap();
    assert!(identical(&SafetensorsFile::open(&path).unwrap().read("large").unwrap(), &large));
}

#[test]
fn bytes_do_not_depend_on_the_order_given_and_stay_aligned() {
    let directory = tempfile::tempdir().unwrap();
    let mut entries = tensors(&[("b", &[3]), ("a", &[2, 2]), ("c", &[])]);
    entries.push(("half".into(), numbered("half", &[3]).to_kind(Kind::Half)));
    entries.push(("ids".into(), numbered("ids", &[1]).to_kind(Kind::Int64)));
    let paths = [directory.path().join("1"), directory.path().join("2")];
    save_safetensors(&entries, &BTreeMap::new(), &paths[0]).unwrap();
    entries.reverse();
    save_safetensors(&entries, &BTreeMap::new(), &paths[1]).unwrap();
    let bytes = fs::read(&paths[0]).unwrap();
    assert_eq!(bytes, fs::read(&paths[1]).unwrap());

    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    assert_eq!(length % 8, 0);
    let header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let order: Vec<&String> = header.as_object().unwrap().keys().collect();
    assert_eq!(order, ["ids", "a", "b", "c", "half"]);
    assert_eq!(header["half"]["data_offsets"], serde_json::json!([40, 46]));
}

#[test]
fn a_name_given_twice() {
    let directory = tempfile::tempdir().unwrap();
    let entries = tensors(&[("a", &[1]), ("a", &[1])]);
    let path = directory.path().join("model.safetensors");
    assert!(
        line(save_safetensors(&entries, &BTreeMap::new(), &path))
            .contains("a: cannot be stored: its name appears twice")
    );
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn a_failed_write_leaves_the_file_before_and_nothing_else() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.safetensors");
    save_safetensors(&tensors(&[("a", &[1])]), &BTreeMap::new(), &path).unwrap();
    let before = fs::read(&path).unwrap();
    let complex = Tensor::zeros([1], (Kind::ComplexDouble, Device::Cpu));
    let message = line(save_safetensors(&[("a".into(), complex)], &BTreeMap::new(), &path));
    assert!(message.contains("safetensors has no ComplexDouble"), "{message}");
    assert_eq!(fs::read(&path).unwrap(), before);
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
}

#[test]
fn a_full_disk_and_an_absent_directory_are_told() {
    struct Full;
    impl std::io::Write for Full {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(std::io::ErrorKind::StorageFull.into())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let (offered, names) = (source(&[("a", &[1])]), ["a".to_string()]);
    let path = std::path::Path::new("model.safetensors");
    let result = write_safetensors(&offered, &names, &BTreeMap::new(), &mut Full, path);
    assert!(matches!(result, Err(WeightsError::Write { .. })));
    let directory = tempfile::tempdir().unwrap();
    let nowhere = directory.path().join("absent").join("model.safetensors");
    assert!(line(save_safetensors(&tensors(&[("a", &[1])]), &BTreeMap::new(), &nowhere)).contains("cannot be written"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever is saved reads back: names, shapes, values.
    #[test]
    fn saved_is_read(shapes in prop::collection::btree_map("[a-z.\"\\\\\u{e9}]{1,8}", prop::collection::vec(0i64..4, 0..4), 0..6)) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("model.safetensors");
        let entries: Vec<(String, Tensor)> = shapes.iter().map(|(n, s)| (n.clone(), numbered(n, s))).collect();
        save_safetensors(&entries, &BTreeMap::new(), &path).unwrap();
        let file = SafetensorsFile::open(&path).unwrap();
        prop_assert_eq!(file.entries().len(), entries.len());
        for (name, tensor) in &entries {
            prop_assert!(identical(&file.read(name).unwrap(), tensor));
        }
    }
}
