//! Bytes from slices and files into tensors.

use std::io::Write;

use blip2_torchx::{Error, MappedFile, device, pinned};
use tch::{Cuda, Device, Kind, Tensor};

fn file_of(bytes: &[u8]) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file.flush().unwrap();
    file
}

#[test]
fn a_slice_becomes_a_tensor_of_its_own() {
    let mut data = vec![1i64, 2, 3, 4, 5, 6];
    let tensor = pinned::to_device(&data, &[2, 3], Device::Cpu).unwrap();
    data[0] = 99;
    assert_eq!(tensor.size(), [2, 3]);
    assert_eq!(Vec::<i64>::try_from(tensor.reshape([-1])).unwrap(), [1, 2, 3, 4, 5, 6]);
    let error = pinned::to_device(&data, &[7], Device::Cpu).unwrap_err().to_string();
    assert!(error.contains("6 elements") && error.contains("[7]"), "{error}");
    assert!(pinned::to_device(&data, &[-1], Device::Cpu).is_err());
}

#[test]
fn a_slice_reaches_the_gpu() {
    device::load_cuda();
    if !Cuda::is_available() {
        eprintln!("skipped: no CUDA device");
        return;
    }
    let data: Vec<f32> = (0..1 << 20).map(|i| i as f32).collect();
    let tensor = pinned::to_device(&data, &[1 << 20], Device::Cuda(0)).unwrap();
    assert_eq!(tensor.device(), Device::Cuda(0));
    assert!(tensor.to_device(Device::Cpu).equal(&Tensor::from_slice(&data)));
}

#[test]
fn a_mapped_file_gives_bytes_and_tensors() {
    let mut bytes = vec![0xAA; 3];
    bytes.extend([1.5f32, -2.0, 3.25].iter().flat_map(|v| v.to_le_bytes()));
    let file = file_of(&bytes);
    let map = MappedFile::open(file.path()).unwrap();
    assert_eq!(&map[..], &bytes[..]);
    let tensor = map.tensor(3, 12, Kind::Float, &[3, 1]).unwrap();
    drop(map);
    assert_eq!(Vec::<f32>::try_from(tensor.reshape([-1])).unwrap(), [1.5, -2.0, 3.25]);
}

#[test]
fn an_empty_file_and_an_empty_tensor_are_fine() {
    let file = file_of(&[]);
    let map = MappedFile::open(file.path()).unwrap();
    assert!(map.is_empty());
    assert_eq!(map.tensor(0, 0, Kind::Float, &[0, 4]).unwrap().size(), [0, 4]);
}

#[test]
fn tensors_that_reach_out_of_the_file_are_refused() {
    let file = file_of(&[0; 16]);
    let map = MappedFile::open(file.path()).unwrap();
    let cases: [(usize, usize, &[i64]); 8] = [
        (8, 16, &[4]),               // past the end
        (usize::MAX, 4, &[1]),       // offset + len overflows
        (17, 0, &[0]),               // begins past the end
        (0, 16, &[3]),               // more bytes than the shape
        (0, 8, &[4]),                // fewer bytes than the shape
        (0, 16, &[-4]),              // a negative dimension
        (0, 16, &[-2, -2]),          // negatives whose product fits
        (0, 16, &[i64::MAX, 4, 16]), // a product that overflows
    ];
    for (offset, len, shape) in cases {
        let error = map.tensor(offset, len, Kind::Float, shape).unwrap_err();
        assert!(matches!(error, Error::TensorOutOfFile { file_len: 16, .. }), "{error}");
    }
}

#[test]
fn a_missing_file_is_the_systems_error() {
    let folder = tempfile::tempdir().unwrap();
    let error = MappedFile::open(&folder.path().join("none")).err().unwrap();
    assert_eq!(error.kind(), std::io::ErrorKind::NotFound);
}

#[test]
fn strided_elements_are_gathered_as_libtorch_would() {
    let values: Vec<f32> = (0..24).map(|i| i as f32).collect();
    let mut bytes = vec![0xAA; 5];
    bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    let map = MappedFile::open(file_of(&bytes).path()).unwrap();
    let whole = Tensor::from_slice(&values);
    let cases: [(i64, &[i64], &[i64]); 7] = [
        (0, &[4, 6], &[6, 1]),
        (0, &[6, 4], &[1, 6]),        // transposed
        (3, &[2, 3, 2], &[12, 2, 1]), // rows with gaps
        (1, &[3], &[7]),
        (23, &[], &[]),
        (0, &[2, 0, 3], &[3, 3, 1]),
        (2, &[3, 2], &[0, 1]), // a row that is repeated
    ];
    for (start, shape, strides) in cases {
        let gathered = map.strided_tensor(5 + 4 * start as usize, Kind::Float, shape, strides).unwrap();
        let expected = whole.as_strided(shape, strides, start);
        assert!(gathered.is_contiguous() && gathered.equal(&expected), "{shape:?} {strides:?}");
    }
}

#[test]
fn strides_that_reach_out_of_the_file_are_refused() {
    let map = MappedFile::open(file_of(&[0; 16]).path()).unwrap();
    let cases: [(usize, &[i64], &[i64]); 7] = [
        (0, &[5], &[1]),
        (0, &[2, 2], &[3, 1]),
        (4, &[2], &[-1]),
        (0, &[-1], &[1]),
        (0, &[2], &[1, 1]),
        (0, &[2], &[i64::MAX]),
        (usize::MAX, &[1], &[1]),
    ];
    for (offset, shape, strides) in cases {
        let error = map.strided_tensor(offset, Kind::Float, shape, strides).unwrap_err();
        assert!(matches!(error, Error::TensorOutOfFile { file_len: 16, .. }), "{shape:?} {strides:?}: {error}");
    }
    // Sizes that only a zero makes fit.
    assert!(map.strided_tensor(0, Kind::Float, &[i64::MAX, i64::MAX, 0], &[0, 0, 1]).is_err());
}
