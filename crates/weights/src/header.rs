//! The safetensors header: parsed by the format's own crate, its complaints turned into ones with names and numbers.

use std::collections::{BTreeMap, HashSet};
use std::fmt;

use safetensors::tensor::{Dtype, Metadata, SafeTensorError, SafeTensors, TensorInfo};
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};
use tch::Kind;

use crate::error::HeaderProblem;

const LENGTH_FIELD: usize = 8;
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Where one tensor lies in its file.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Stored {
    /// The dtype as the file calls it.
    pub dtype: Dtype,
    pub shape: Vec<i64>,
    /// From the beginning of the file.
    pub offset: usize,
    pub bytes: usize,
}

/// A valid header: every tensor lies inside the file.
#[derive(Debug)]
pub(crate) struct Header {
    pub tensors: BTreeMap<String, Stored>,
    pub metadata: BTreeMap<String, String>,
}

/// Parses and checks the header of a whole file's bytes.
pub(crate) fn parse(file: &[u8]) -> Result<Header, HeaderProblem> {
    let (length, metadata) = SafeTensors::read_metadata(file).map_err(|error| explain(file, error))?;
    let data_start = LENGTH_FIELD + length;
    let text = std::str::from_utf8(&file[LENGTH_FIELD..data_start]).map_err(|_| HeaderProblem::NotUtf8)?;
    // Two entries with the same offsets would pass as one.
    if let Some(name) = repeated_key(text) {
        return Err(HeaderProblem::RepeatedName { name });
    }
    let mut tensors = BTreeMap::new();
    for (name, info) in metadata.tensors() {
        let shape = representable(info).ok_or_else(|| size_problem(&name, info))?;
        let (start, end) = info.data_offsets;
        tensors.insert(name, Stored { dtype: info.dtype, shape, offset: data_start + start, bytes: end - start });
    }
    let metadata = metadata.metadata().clone().unwrap_or_default().into_iter().collect();
    Ok(Header { tensors, metadata })
}

/// libtorch's dtype of a stored dtype, where it has one.
pub(crate) fn kind_of(dtype: Dtype) -> Option<Kind> {
    Some(match dtype {
        Dtype::BOOL => Kind::Bool,
        Dtype::U8 => Kind::Uint8,
        Dtype::I8 => Kind::Int8,
        Dtype::I16 => Kind::Int16,
        Dtype::I32 => Kind::Int,
        Dtype::I64 => Kind::Int64,
        Dtype::F16 => Kind::Half,
        Dtype::BF16 => Kind::BFloat16,
        Dtype::F32 => Kind::Float,
        Dtype::F64 => Kind::Double,
        Dtype::C64 => Kind::ComplexFloat,
        Dtype::F8_E5M2 => Kind::Float8e5m2,
        Dtype::F8_E4M3 => Kind::Float8e4m3fn,
        Dtype::F8_E5M2FNUZ => Kind::Float8e5m2fnuz,
        Dtype::F8_E4M3FNUZ => Kind::Float8e4m3fnuz,
        _ => return None,
    })
}

/// The stored dtype of libtorch's dtype, where the format has one.
pub(crate) fn dtype_of(kind: Kind) -> Option<Dtype> {
    Some(match kind {
        Kind::Bool => Dtype::BOOL,
        Kind::Uint8 => Dtype::U8,
        Kind::Int8 => Dtype::I8,
        Kind::Int16 => Dtype::I16,
        Kind::Int => Dtype::I32,
        Kind::Int64 => Dtype::I64,
        Kind::Half => Dtype::F16,
        Kind::BFloat16 => Dtype::BF16,
        Kind::Float => Dtype::F32,
        Kind::Double => Dtype::F64,
        Kind::ComplexFloat => Dtype::C64,
        Kind::Float8e5m2 => Dtype::F8_E5M2,
        Kind::Float8e4m3fn => Dtype::F8_E4M3,
        Kind::Float8e5m2fnuz => Dtype::F8_E5M2FNUZ,
        Kind::Float8e4m3fnuz => Dtype::F8_E4M3FNUZ,
        _ => return None,
    })
}

/// The first key that an object holds twice; `None` too for text that is not an object.
pub(crate) fn repeated_key(object: &str) -> Option<String> {
    struct Keys;
    impl<'de> Visitor<'de> for Keys {
        type Value = Option<String>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut seen = HashSet::new();
            let mut repeated = None;
            while let Some((key, _)) = map.next_entry::<String, IgnoredAny>()? {
                if repeated.is_none() && seen.contains(&key) {
                    repeated = Some(key);
                } else {
                    seen.insert(key);
                }
            }
            Ok(repeated)
        }
    }
    serde_json::Deserializer::from_str(object).deserialize_map(Keys).ok().flatten()
}

/// The shape in libtorch's integers, if its strides cannot overflow: an empty tensor's other axes may be of any size in the format.
fn representable(info: &TensorInfo) -> Option<Vec<i64>> {
    let shape: Vec<i64> = info.shape.iter().map(|&n| i64::try_from(n).ok()).collect::<Option<_>>()?;
    shape.iter().filter(|&&n| n > 0).try_fold(1i64, |product, &n| product.checked_mul(n))?;
    Some(shape)
}

fn size_problem(name: &str, info: &TensorInfo) -> HeaderProblem {
    let bits = info.shape.iter().try_fold(info.dtype.bitsize(), |product, &n| product.checked_mul(n));
    let expected = match bits {
        Some(bits) => format!("{} bytes of {} {:?}", bits.div_ceil(8), info.dtype, info.shape),
        None => format!("a size below 2^64, not {} {:?}", info.dtype, info.shape),
    };
    let (start, end) = info.data_offsets;
    HeaderProblem::Size { name: name.to_string(), expected, got: end.saturating_sub(start) as u64 }
}

fn explain(file: &[u8], error: SafeTensorError) -> HeaderProblem {
    let Some(field) = file.first_chunk::<LENGTH_FIELD>() else {
        return HeaderProblem::TooShort { got: file.len() as u64 };
    };
    let length = u64::from_le_bytes(*field);
    let available = (file.len() - LENGTH_FIELD) as u64;
    let header = || &file[LENGTH_FIELD..LENGTH_FIELD + length as usize];
    match error {
        SafeTensorError::HeaderTooLarge => HeaderProblem::TooLarge { length, limit: MAX_HEADER_BYTES },
        SafeTensorError::InvalidHeaderLength => HeaderProblem::BeyondFile { length, available },
        SafeTensorError::InvalidHeader(_) => HeaderProblem::NotUtf8,
        SafeTensorError::InvalidOffset(name) => HeaderProblem::Offsets { name },
        SafeTensorError::MetadataIncompleteBuffer => {
            let expected = serde_json::from_slice::<Metadata>(header()).map_or(0, |m| m.data_len() as u64);
            HeaderProblem::DataLength { expected, got: available - length }
        }
        SafeTensorError::TensorInvalidInfo | SafeTensorError::ValidationOverflow | SafeTensorError::MisalignedSlice => {
            misshapen(header()).unwrap_or(HeaderProblem::NotJson { message: error.to_string() })
        }
        other => HeaderProblem::NotJson { message: other.to_string() },
    }
}

/// The first tensor, by name, whose shape does not give its number of bytes.
fn misshapen(header: &[u8]) -> Option<HeaderProblem> {
    let entries: BTreeMap<String, serde_json::Value> = serde_json::from_slice(header).ok()?;
    entries.into_iter().find_map(|(name, value)| {
        let info: TensorInfo = serde_json::from_value(value).ok()?;
        let bits = info.shape.iter().try_fold(info.dtype.bitsize(), |product, &n| product.checked_mul(n));
        let (start, end) = info.data_offsets;
        let fits = bits.is_some_and(|bits| bits % 8 == 0 && start.checked_add(bits / 8) == Some(end));
        (!fits).then(|| size_problem(&name, &info))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_dtype_of_ours_goes_there_and_back() {
        for kind in [Kind::Bool, Kind::Uint8, Kind::Int64, Kind::Half, Kind::BFloat16, Kind::Float, Kind::Double] {
            assert_eq!(dtype_of(kind).and_then(kind_of), Some(kind));
        }
        assert_eq!(kind_of(Dtype::U32), None);
        assert_eq!(dtype_of(Kind::QInt8), None);
    }

    #[test]
    fn repeated_keys_are_seen_at_the_top_only() {
        assert_eq!(repeated_key(r#"{"a": 1, "b": {"a": 2}}"#), None);
        assert_eq!(repeated_key(r#"{"a": 1, "b": 2, "a": 3}"#).as_deref(), Some("a"));
    }
}
