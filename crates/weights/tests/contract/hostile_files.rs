//! One safetensors file, whatever it holds: a clear line, never a panic.

use std::fs;
use std::path::PathBuf;

use blip2_torchx::params::TensorSource;
use blip2_weights::{HeaderProblem, SafetensorsFile, WeightsError, inspect};
use proptest::prelude::*;
use tempfile::TempDir;

use crate::fixtures::{line, write_raw};

const GOOD: &[u8] = br#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;

fn file(header: &[u8], data: &[u8]) -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.safetensors");
    write_raw(&path, header, data);
    (directory, path)
}

fn problem(header: &str, data: &[u8]) -> HeaderProblem {
    let (_directory, path) = file(header.as_bytes(), data);
    match SafetensorsFile::open(&path) {
        Err(error @ WeightsError::Header { .. }) => {
            let message = line(Err::<(), _>(error));
            assert!(message.starts_with(&path.display().to_string()), "{message}");
            match SafetensorsFile::open(&path) {
                Err(WeightsError::Header { problem, .. }) => problem,
                _ => unreachable!("opening twice gives one answer"),
            }
        }
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("{header} was accepted"),
    }
}

#[test]
fn a_good_file_is_read() {
    let (_directory, path) = file(GOOD, &[0, 0, 128, 63, 0, 0, 0, 64]);
    let read = SafetensorsFile::open(&path).unwrap().read("a").unwrap();
    assert_eq!(Vec::<f32>::try_from(read).unwrap(), [1.0, 2.0]);
}

#[test]
fn missing_file_and_directory_in_its_place() {
    let directory = tempfile::tempdir().unwrap();
    assert!(line(SafetensorsFile::open(&directory.path().join("x"))).ends_with("no such file or directory"));
    assert!(line(SafetensorsFile::open(directory.path())).ends_with("expected a file"));
}

#[test]
fn git_lfs_pointer() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.safetensors");
    fs::write(&path, "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n").unwrap();
    assert!(line(SafetensorsFile::open(&path)).contains("git lfs pull"));
}

#[test]
fn empty_and_shorter_than_the_length_field() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.safetensors");
    for length in [0, 7] {
        fs::write(&path, vec![1; length]).unwrap();
        assert!(line(SafetensorsFile::open(&path)).contains(&format!("{length} bytes are less than the 8")));
    }
}

#[test]
fn truncated_at_every_byte() {
    let (_directory, path) = file(GOOD, &[0; 8]);
    let whole = fs::read(&path).unwrap();
    for length in 0..whole.len() {
        fs::write(&path, &whole[..length]).unwrap();
        assert!(line(SafetensorsFile::open(&path)).contains("truncated"), "{length}");
    }
}

#[test]
fn data_longer_than_the_header_says() {
    assert_eq!(problem(std::str::from_utf8(GOOD).unwrap(), &[0; 9]), HeaderProblem::DataLength { expected: 8, got: 9 });
}

#[test]
fn header_length_beyond_the_limit() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.safetensors");
    for claimed in [100_000_001, u64::MAX] {
        fs::write(&path, claimed.to_le_bytes()).unwrap();
        assert!(
            line(SafetensorsFile::open(&path)).contains(&format!("claims {claimed} bytes, the limit is 100000000"))
        );
    }
}

#[test]
fn header_not_utf8_and_not_json() {
    let (_directory, path) = file(&[b'{', 0xff, b'}'], &[]);
    assert!(line(SafetensorsFile::open(&path)).ends_with("not UTF-8"));
    assert!(matches!(problem("[]", &[]), HeaderProblem::NotJson { .. }));
    assert!(matches!(problem("{", &[]), HeaderProblem::NotJson { .. }));
    assert!(matches!(problem(&"[".repeat(100_000), &[]), HeaderProblem::NotJson { .. }));
    let negative = r#"{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}"#;
    assert!(matches!(problem(negative, &[0; 8]), HeaderProblem::NotJson { .. }));
    let unknown = r#"{"a":{"dtype":"F33","shape":[2],"data_offsets":[0,8]}}"#;
    assert!(matches!(problem(unknown, &[0; 8]), HeaderProblem::NotJson { .. }));
}

#[test]
fn overlapping_offsets_gaps_and_offsets_that_run_backwards() {
    let pair = |a: &str, b: &str| {
        format!(
            r#"{{"a":{{"dtype":"F32","shape":[1],"data_offsets":{a}}},"b":{{"dtype":"F32","shape":[1],"data_offsets":{b}}}}}"#
        )
    };
    for (a, b) in [("[0,4]", "[2,6]"), ("[0,4]", "[0,4]"), ("[0,4]", "[5,9]"), ("[1,5]", "[5,9]"), ("[0,4]", "[4,0]")] {
        let found = problem(&pair(a, b), &[0; 9]);
        assert!(matches!(found, HeaderProblem::Offsets { .. } | HeaderProblem::Size { .. }), "{a} {b}: {found}");
    }
}

#[test]
fn offsets_outside_the_file() {
    let header = r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}"#;
    assert_eq!(problem(header, &[0; 8]), HeaderProblem::DataLength { expected: 16, got: 8 });
}

#[test]
fn shape_that_does_not_give_the_bytes() {
    let header = r#"{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}"#;
    let message = problem(header, &[0; 8]).to_string();
    assert_eq!(message, r#"the shape of "a" does not fit its bytes: expected 12 bytes of F32 [3], got 8"#);
}

#[test]
fn shape_whose_product_overflows() {
    let huge = u64::MAX / 2;
    for shape in [format!("[{huge},{huge}]"), format!("[0,{huge},{huge}]"), format!("[{},0]", u64::MAX)] {
        let header = format!(r#"{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":[0,0]}}}}"#);
        assert!(matches!(problem(&header, &[]), HeaderProblem::Size { .. }), "{shape}");
    }
}

#[test]
fn name_that_appears_twice() {
    let twice = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
    assert_eq!(problem(twice, &[0; 8]), HeaderProblem::RepeatedName { name: "a".into() });
}

#[test]
fn dtype_that_libtorch_has_no_name_for() {
    let (_directory, path) = file(br#"{"ids":{"dtype":"U32","shape":[1],"data_offsets":[0,4]}}"#, &[0; 4]);
    let message = line(SafetensorsFile::open(&path));
    assert!(message.contains("ids has dtype U32"), "{message}");
}

#[test]
fn empty_tensors_are_fine() {
    let (_directory, path) = file(br#"{"a":{"dtype":"F32","shape":[0,3],"data_offsets":[0,0]}}"#, &[]);
    assert_eq!(SafetensorsFile::open(&path).unwrap().read("a").unwrap().size(), [0, 3]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// A file with some bytes changed either opens, and then every tensor reads, or gives one line.
    #[test]
    fn changed_bytes_never_panic(changes in prop::collection::vec((0usize..92, any::<u8>()), 1..4)) {
        let header = br#"{"ab":{"dtype":"F16","shape":[2,2],"data_offsets":[0,8]},"__metadata__":{"k":"v"}}"#;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("model.safetensors");
        write_raw(&path, header, &[0; 8]);
        let mut bytes = fs::read(&path).unwrap();
        for (place, value) in changes {
            let place = place % bytes.len();
            bytes[place] = value;
        }
        fs::write(&path, bytes).unwrap();
        match SafetensorsFile::open(&path) {
            Ok(file) => {
                for (name, info) in file.entries() {
                    prop_assert_eq!(file.read(&name).unwrap().size(), info.shape);
                }
            }
            Err(error) => prop_assert_eq!(error.to_string().lines().count(), 1),
        }
        let _ = inspect(&path);
    }
}
