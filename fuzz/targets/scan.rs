//! The tar index: any bytes are a shard with its samples inside it, or refused.
#![no_main]

use std::fs;
use std::sync::LazyLock;

use blip2_data::scan;
use libfuzzer_sys::fuzz_target;
use tempfile::TempPath;

static SHARD: LazyLock<TempPath> = LazyLock::new(|| tempfile::NamedTempFile::new().expect("a file").into_temp_path());

fuzz_target!(|data: &[u8]| {
    fs::write(&*SHARD, data).expect("the file can be written");
    match scan(&SHARD) {
        Ok(index) => {
            for sample in &index.samples {
                for member in [sample.image, sample.caption] {
                    let end = member.offset.checked_add(member.bytes).expect("a member ends");
                    assert!(end <= data.len() as u64, "{member:?} of {} bytes", data.len());
                }
            }
            assert!(index.problems.iter().all(|problem| !problem.reason.is_empty()));
        }
        Err(error) => assert!(!error.to_string().contains('\n'), "{error}"),
    }
});
