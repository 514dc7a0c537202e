//! A manifest: the shards of a set with lengths, counts and digests, so that the set opens without a look at them.
//!
//! Lines of JSON. The first says format, version, how many shards and samples follow, and the digest of all that
//! follows; every other line is a shard. Shards below the manifest's own folder have names relative to it, so that
//! they can move together.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::{self, Path};

use serde::{Deserialize, Serialize};

use crate::dataset::sum;
use crate::remote::Remote;
use crate::shards::index::Digest;
use crate::shards::location::{Location, RemoteUrl, names_manifest, redacted};
use crate::shards::shard::Shard;
use crate::{DataError, OpenOptions, atomic};

const FORMAT: &str = "blip2-manifest";
const VERSION: u32 = 1;
/// No line of ours comes near.
const MAX_LINE: u64 = 1 << 20;

#[derive(Debug, Serialize, Deserialize)]
struct Header {
    format: String,
    version: u32,
    shards: u64,
    samples: u64,
    digest: Digest,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    shard: String,
    bytes: u64,
    samples: u64,
    #[serde(default)]
    problems: u64,
    index: Digest,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    contents: Option<Digest>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    etag: Option<Box<str>>,
}

/// The manifest of `shards` that is to lie at `home`.
pub(crate) fn encode(shards: &[Shard], home: &Location) -> io::Result<Vec<u8>> {
    let mut body = Vec::new();
    for shard in shards {
        let line = Line {
            shard: name_from(home, &shard.location)?,
            bytes: shard.bytes,
            samples: shard.samples,
            problems: shard.problems,
            index: shard.index,
            contents: shard.contents,
            etag: shard.etag.clone(),
        };
        serde_json::to_writer(&mut body, &line)?;
        body.push(b'\n');
    }
    let header = Header {
        format: FORMAT.to_owned(),
        version: VERSION,
        shards: shards.len() as u64,
        samples: sum(shards.iter().map(|shard| shard.samples))
            .ok_or_else(|| io::Error::other(DataError::TooManySamples))?,
        digest: Digest::of(&body),
    };
    let mut file = serde_json::to_vec(&header)?;
    file.push(b'\n');
    file.extend(body);
    Ok(file)
}

/// Writes the manifest of `shards` to a file or URL, whose name must end in `.jsonl`.
///
/// # Errors
/// When the name does not, or the manifest cannot be written there.
pub fn write_manifest(shards: &[Shard], to: &str, options: &OpenOptions) -> Result<(), DataError> {
    let bad = |reason: String| DataError::Manifest { manifest: redacted(to).into(), reason };
    if !names_manifest(to) {
        return Err(bad("its name must end in .jsonl, by which manifests are known".to_owned()));
    }
    match Location::parse(to, &options.base_dir).map_err(bad)? {
        Location::Local(file) => {
            atomic::spare_foreign(&file, FORMAT).map_err(DataError::io(&*file))?;
            write_file(shards, &file)
        }
        Location::Remote(url) => {
            let bytes = encode(shards, &Location::Remote(url.clone())).map_err(|error| bad(error.to_string()))?;
            Remote::start(&options.remote, &redacted(to))?.write(&url, bytes)
        }
    }
}

/// Writes the manifest of `shards` to a file.
pub(crate) fn write_file(shards: &[Shard], file: &Path) -> Result<(), DataError> {
    let bytes = encode(shards, &Location::Local(file.into())).map_err(DataError::io(file))?;
    atomic::write(file, |out| out.write_all(&bytes)).map_err(DataError::io(file))
}

/// Reads the manifest in a file.
pub(crate) fn read_file(file: &Path) -> Result<Vec<Shard>, DataError> {
    let open = File::open(file).map_err(DataError::io(file))?;
    read(BufReader::with_capacity(1 << 18, open), &Location::Local(file.into()))
}

/// Reads the manifest that lies at `home`.
pub(crate) fn read(mut source: impl BufRead, home: &Location) -> Result<Vec<Shard>, DataError> {
    let bad = |line: usize, reason: String| {
        let reason = if line == 0 { reason } else { format!("line {line}: {reason}") };
        DataError::Manifest { manifest: home.shown(), reason }
    };
    let mut text = Vec::new();
    let mut next = |text: &mut Vec<u8>| -> io::Result<bool> {
        text.clear();
        let read = source.by_ref().take(MAX_LINE).read_until(b'\n', text)?;
        Ok(read > 0)
    };
    next(&mut text).map_err(|error| bad(1, error.to_string()))?;
    let header: Header = serde_json::from_slice(&text).map_err(|error| bad(1, format!("no manifest: {error}")))?;
    if header.format != FORMAT || header.version != VERSION {
        let (format, version) = (header.format, header.version);
        let reason = format!("expected {FORMAT} of version {VERSION}, got {format} of version {version}");
        return Err(bad(1, reason));
    }
    let (mut shards, mut samples, mut hasher) = (Vec::new(), 0u64, blake3::Hasher::new());
    while next(&mut text).map_err(|error| bad(shards.len() + 2, error.to_string()))? {
        let number = shards.len() + 2;
        hasher.update(&text);
        let line: Line = serde_json::from_slice(&text).map_err(|error| bad(number, error.to_string()))?;
        samples = samples.checked_add(line.samples).ok_or_else(|| bad(number, "too many samples".to_owned()))?;
        shards.push(Shard {
            location: location_of(home, &line.shard).map_err(|reason| bad(number, reason))?,
            bytes: line.bytes,
            samples: line.samples,
            problems: line.problems,
            index: line.index,
            contents: line.contents,
            etag: line.etag,
        });
    }
    if (header.shards, header.samples) != (shards.len() as u64, samples) {
        let (shards, all) = (shards.len(), header.shards);
        return Err(bad(0, format!("it was cut or changed: {shards} shards follow where its first line says {all}")));
    }
    match Digest::finish(&hasher) == header.digest {
        true => Ok(shards),
        false => Err(bad(0, "it was changed: its digest is not the one in its first line".to_owned())),
    }
}

/// What a manifest at `home` calls a shard.
fn name_from(home: &Location, shard: &Location) -> io::Result<String> {
    match (home, shard) {
        (Location::Local(home), Location::Local(shard)) => {
            let (home, shard) = (path::absolute(home)?, path::absolute(shard)?);
            let folder = home.parent().unwrap_or(Path::new("/"));
            let text = shard.strip_prefix(folder).unwrap_or(&shard).to_str();
            text.map(str::to_owned).ok_or_else(|| io::Error::other(format!("{} is not UTF-8", shard.display())))
        }
        (_, Location::Local(shard)) => Err(io::Error::other(format!(
            "shard {} lies on this machine: its manifest can only be a file of this machine too",
            shard.display()
        ))),
        (home, Location::Remote(shard)) => {
            let url = shard.as_str();
            let beside = match home {
                Location::Remote(home) => url.strip_prefix(home.folder()),
                Location::Local(_) => None,
            };
            // Credentials of the host come from the manifest's own URL.
            if shard.holds_credentials() && (beside.is_none() || shard.query().is_some()) {
                return Err(io::Error::other(format!(
                    "shard {shard} has credentials in its URL, which would stand in the manifest: name such shards by patterns"
                )));
            }
            Ok(beside.unwrap_or(url).to_owned())
        }
    }
}

/// Where the shard is that a manifest at `home` calls `name`.
fn location_of(home: &Location, name: &str) -> Result<Location, String> {
    match home {
        Location::Local(home) => Location::parse(name, home.parent().unwrap_or(Path::new("."))),
        Location::Remote(_) if name.contains("://") => RemoteUrl::parse(name).map(Location::Remote),
        Location::Remote(home) => RemoteUrl::parse(&format!("{}{name}", home.folder())).map(Location::Remote),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn local(path: &str) -> Location {
        Location::Local(Path::new(path).into())
    }

    fn remote(url: &str) -> Location {
        Location::Remote(RemoteUrl::parse(url).unwrap())
    }

    fn shard(location: Location, samples: u64) -> Shard {
        let digest = Digest::of(&samples.to_le_bytes());
        let etag = samples.is_multiple_of(2).then(|| "\"tag\"".into());
        Shard {
            location,
            bytes: samples * 7,
            samples,
            problems: samples % 3,
            index: digest,
            contents: Some(digest),
            etag,
        }
    }

    fn reread(shards: &[Shard], home: &Location, there: &Location) -> Result<Vec<Shard>, DataError> {
        read(encode(shards, home).unwrap().as_slice(), there)
    }

    proptest! {
        #[test]
        fn a_manifest_reads_back_what_was_written(counts in prop::collection::vec(0u64..1000, 0..20), far: bool) {
            let home = if far { remote("s3://b/set/manifest.jsonl") } else { local("/set/manifest.jsonl") };
            let place = |i: usize| match (far, i % 2) {
                (true, 0) => remote(&format!("s3://b/set/{i}.tar")),
                (_, 1) => remote(&format!("s3://other/{i}.tar")),
                _ => local(&format!("/set/sub/{i}.tar")),
            };
            let shards: Vec<Shard> = counts.iter().enumerate().map(|(i, &n)| shard(place(i), n)).collect();
            prop_assert_eq!(reread(&shards, &home, &home).unwrap(), shards);
        }

        #[test]
        fn a_byte_changed_or_a_cut_is_noticed(at in 0usize..600, bit in 0u8..8, cut: bool) {
            let home = local("/set/manifest.jsonl");
            let shards: Vec<Shard> = (1..4).map(|n| shard(local(&format!("/set/{n}.tar")), n)).collect();
            let mut bytes = encode(&shards, &home).unwrap();
            let at = at % bytes.len();
            if cut { bytes.truncate(at) } else { bytes[at] ^= 1 << bit }
            // A changed digit of the header's own counts or digest does not fit what follows; its case alone (A for a) says the same.
            prop_assert!(read(bytes.as_slice(), &home).map_or(true, |read| read == shards));
        }
    }

    #[test]
    fn shards_beside_their_manifest_move_with_it() {
        let shards = [shard(local("/a/x/0.tar"), 1), shard(local("/elsewhere/1.tar"), 2)];
        let moved = reread(&shards, &local("/a/manifest.jsonl"), &local("/b/manifest.jsonl")).unwrap();
        assert_eq!(moved[0].location, local("/b/x/0.tar"));
        assert_eq!(moved[1].location, local("/elsewhere/1.tar"));
        let shards = [shard(remote("s3://b/a/0.tar"), 1)];
        let moved = reread(&shards, &remote("s3://b/a/m.jsonl"), &remote("gs://c/m.jsonl")).unwrap();
        assert_eq!(moved[0].location, remote("gs://c/0.tar"));
    }

    #[test]
    fn what_is_no_manifest_says_so_in_one_line() {
        let home = local("/set/manifest.jsonl");
        let future = r#"{"format":"blip2-manifest","version":9,"shards":0,"samples":0,"digest":"00"}"#;
        for text in ["", "[]", "{}\n", "\u{0}\u{0}", future, &"x".repeat(3 << 20)] {
            let error = read(text.as_bytes(), &home).unwrap_err().to_string();
            assert!(error.starts_with("manifest /set/manifest.jsonl: line 1: ") && !error.contains('\n'), "{error}");
        }
        let error = encode(&[shard(local("/x.tar"), 1)], &remote("s3://b/m.jsonl")).unwrap_err().to_string();
        assert!(error.contains("/x.tar lies on this machine"), "{error}");
    }

    #[test]
    fn no_credentials_stand_in_a_manifest() {
        let home = remote("https://u:secret@host/set/m.jsonl?sig=secret");
        let shards = [shard(remote("https://u:secret@host/set/0.tar"), 1)];
        let bytes = encode(&shards, &home).unwrap();
        assert!(!String::from_utf8_lossy(&bytes).contains("secret"));
        assert_eq!(read(bytes.as_slice(), &home).unwrap(), shards);
        for (home, secret) in [
            (local("/m.jsonl"), "https://u:secret@host/set/0.tar"),
            (home, "https://u:secret@host/set/0.tar?sig=secret"),
        ] {
            let error = encode(&[shard(remote(secret), 1)], &home).unwrap_err().to_string();
            assert!(error.contains("has credentials in its URL") && !error.contains("secret"), "{error}");
        }
    }
}
