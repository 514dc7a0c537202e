//! One object into one file: resumed after faults, its length and digest checked.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

use super::Version;
use super::network::{Network, is_time};
use super::retry::{Fault, Kind, Patience};
use crate::shards::index::Digest;
use crate::shards::location::RemoteUrl;

/// How often bytes may arrive that are not those that were indexed.
const CORRUPT_TRIES: u32 = 3;

/// How often an object may be begun anew whose server cannot go on in its middle.
const RESTARTS: u32 = 8;

/// Why an object is not in its file.
#[derive(Debug)]
pub(crate) enum Failed {
    /// It is not to be had.
    There(Fault),
    /// The file cannot be written.
    Here(io::Error),
}

impl From<Fault> for Failed {
    fn from(fault: Fault) -> Failed {
        Failed::There(fault)
    }
}

/// Fetches an object into a file, with `patience` for faults; `fits` says of its digest and the file whether they are what was indexed.
///
/// # Errors
/// When the object is another by now, faults outlast the patience, or the file cannot be written.
pub(crate) fn fetch(
    network: &Network,
    url: &RemoteUrl,
    version: &Version,
    file: &File,
    mut patience: Patience<'_>,
    stop: &AtomicBool,
    fits: &dyn Fn(Digest, &File) -> Result<(), String>,
) -> Result<(), Failed> {
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
                        return Err(Fault::new(Kind::Changed, reason).into());
                    }
                    Fault::new(Kind::Passing, reason)
                }
            },
            Err(Failed::There(fault)) => fault,
            Err(here) => return Err(here),
        };
        if fault.kind == Kind::NoRanges {
            (at, hasher) = (0, blake3::Hasher::new());
            restarts += 1;
            if restarts == RESTARTS {
                let reason = format!("{} ({restarts} times from its start)", fault.reason);
                return Err(Fault::new(Kind::Lasting, reason).into());
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
) -> Result<(), Failed> {
    let mut body = network.get(url, *at)?;
    same(version, &body.version)?;
    while *at < version.bytes {
        let Some(bytes) = body.next()? else {
            return Err(Fault::new(Kind::Passing, format!("it ended after {at} of {} bytes", version.bytes)).into());
        };
        if stop.load(Ordering::Relaxed) {
            return Err(Fault::new(Kind::Lasting, "stopped").into());
        }
        let end = *at + bytes.len() as u64;
        if end > version.bytes {
            let reason = format!("more than the {} bytes that were promised arrived", version.bytes);
            return Err(Fault::new(Kind::NoRanges, reason).into());
        }
        file.write_all_at(&bytes, *at).map_err(Failed::Here)?;
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
        // A server that once gave a tag and once a time has not said that anything changed.
        (Some(indexed), Some(found)) if indexed != found && is_time(indexed) == is_time(found) => {
            changed(if is_time(found) { "tag" } else { "etag" }, indexed, found)
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::remote::{RemoteOptions, Retries};
    use std::io::{Read, Write};
    use std::net::TcpListener;

    fn version(bytes: u64, tag: Option<&str>) -> Version {
        Version { bytes, etag: tag.map(Into::into) }
    }

    #[test]
    fn a_tag_is_compared_with_a_tag_and_a_time_with_a_time() {
        let (early, late) = ("last-modified: Tue, 1 Jan 2030", "last-modified: Wed, 2 Jan 2030");
        for (indexed, found, what) in [
            (version(1, Some("a")), version(1, Some("a")), None),
            (version(1, Some("a")), version(1, Some("b")), Some("its etag is b, it was indexed with a")),
            (version(1, Some("a")), version(2, Some("a")), Some("its length is 2")),
            (version(1, Some(early)), version(1, Some(late)), Some("its tag is last-modified: Wed, 2 Jan")),
            (version(1, Some("a")), version(1, Some(late)), None),
            (version(1, None), version(1, Some(late)), None),
        ] {
            let fault = same(&indexed, &found).err();
            assert_eq!(fault.is_some(), what.is_some(), "{fault:?}");
            assert!(fault.is_none_or(|fault| fault.reason.contains(what.unwrap_or_default())));
        }
    }

    #[test]
    fn a_file_that_cannot_be_written_is_no_fault_of_the_object() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/0.tar", listener.local_addr().unwrap());
        std::thread::spawn(move || {
            for mut client in listener.incoming().flatten() {
                let _ = client.read(&mut [0; 4096]);
                let _ = client.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nConnection: close\r\n\r\ndata");
            }
        });
        let network = Network::start(&RemoteOptions::default()).unwrap();
        let (stop, retries) = (AtomicBool::new(false), Retries::default());
        let read_only = File::open("/dev/null").unwrap();
        let url = RemoteUrl::parse(&url).unwrap();
        let patience = Patience::new(&retries, &stop);
        let failed = fetch(&network, &url, &version(4, None), &read_only, patience, &stop, &|_, _| Ok(()));
        assert!(matches!(failed, Err(Failed::Here(_))), "{failed:?}");
    }
}
