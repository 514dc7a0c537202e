//! One object into one file: resumed after faults, its length and digest checked.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

use super::network::Network;
use super::retry::{Fault, Kind, Patience};
use super::{Retries, Version};
use crate::index::Digest;
use crate::location::RemoteUrl;

/// How often bytes may arrive that are not those that were indexed.
const CORRUPT_TRIES: u32 = 3;

/// Fetches an object into a file; `fits` says of its digest and the file whether they are what was indexed.
///
/// # Errors
/// When the object is another by now, faults outlast `retries`, or the file cannot be written.
pub(crate) fn fetch(
    network: &Network,
    url: &RemoteUrl,
    version: &Version,
    file: &File,
    retries: &Retries,
    stop: &AtomicBool,
    fits: &dyn Fn(Digest, &File) -> Result<(), String>,
) -> Result<(), Fault> {
    let mut patience = Patience::new(retries, stop);
    let (mut at, mut hasher, mut corrupt, mut restarts) = (0, blake3::Hasher::new(), 0, 0);
    loop {
        let result = append(network, url, version, file, &mut at, &mut hasher, &mut patience, stop);
        let fault = match result {
            Ok(()) => match fits(Digest::finish(&hasher), file) {
                Ok(()) => return Ok(()),
                Err(reason) => {
                    corrupt += 1;
                    (at, hasher) = (0, blake3::Hasher::new());
                    if corrupt == CORRUPT_TRIES {
                        let reason = format!("{reason}, {corrupt} times: it changed since, or is damaged in its store");
                        return Err(Fault::new(Kind::Changed, reason));
                    }
                    Fault::new(Kind::Passing, reason)
                }
            },
            Err(fault) => fault,
        };
        if fault.kind == Kind::NoRanges {
            (at, hasher) = (0, blake3::Hasher::new());
            restarts += 1;
            if restarts == retries.tries {
                let reason = format!("{} ({restarts} times from its start)", fault.reason);
                return Err(Fault::new(Kind::Lasting, reason));
            }
        }
        patience.wait(fault)?;
    }
}

/// Fetches what is missing behind byte `at`.
#[expect(clippy::too_many_arguments)]
fn append(
    network: &Network,
    url: &RemoteUrl,
    version: &Version,
    file: &File,
    at: &mut u64,
    hasher: &mut blake3::Hasher,
    patience: &mut Patience<'_>,
    stop: &AtomicBool,
) -> Result<(), Fault> {
    let mut body = network.get(url, *at)?;
    same(version, &body.version)?;
    while *at < version.bytes {
        let Some(bytes) = body.next()? else {
            return Err(Fault::new(Kind::Passing, format!("it ended after {at} of {} bytes", version.bytes)));
        };
        if stop.load(Ordering::Relaxed) {
            return Err(Fault::new(Kind::Lasting, "stopped"));
        }
        let end = *at + bytes.len() as u64;
        if end > version.bytes {
            let reason = format!("more than the {} bytes that were promised arrived", version.bytes);
            return Err(Fault::new(Kind::NoRanges, reason));
        }
        let written = file.write_all_at(&bytes, *at);
        written.map_err(|error| Fault::new(Kind::Lasting, format!("cannot write it to the shard cache: {error}")))?;
        hasher.update(&bytes);
        *at = end;
        patience.progress();
    }
    Ok(())
}

/// Whether an object is the one that was indexed.
fn same(indexed: &Version, found: &Version) -> Result<(), Fault> {
    let changed = |what: &str, indexed: &str, found: &str| {
        Err(Fault::new(Kind::Changed, format!("its {what} is {found}, it was indexed with {indexed}")))
    };
    if indexed.bytes != found.bytes {
        return changed("length", &indexed.bytes.to_string(), &found.bytes.to_string());
    }
    match (&indexed.etag, &found.etag) {
        (Some(indexed), Some(found)) if indexed != found => changed("etag", indexed, found),
        _ => Ok(()),
    }
}
