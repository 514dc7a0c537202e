//! Files as a hostile web has them, by seeded mutation of whole ones: each sample is used or put into quarantine with
//! a reason, in bounded memory; nothing panics on the way to that, and nothing is lost.

mod fixture;

use std::fs;
use std::sync::Arc;

use blip2_data::image::{Picture, Scale};
use blip2_data::{Clean, Dataset, EvalOptions, EvalReader, Filter, JpegSize, Quarantined, decode, scan};
use fixture::{CAPTIONS, archives, images, open, options, tar, text, write};

/// SplitMix64.
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.roll() % bound.max(1) as u64) as usize
    }

    /// One to four kinds of harm; the first bytes, where formats are told apart, are as likely hit as all others.
    fn harm(&mut self, whole: &[u8], other: &[u8]) -> Vec<u8> {
        let mut bytes = whole.to_vec();
        for _ in 0..1 + self.below(4) {
            let reach = if self.below(2) == 0 { 64.min(bytes.len()) } else { bytes.len() };
            let at = self.below(reach);
            let length = self.below(32).min(bytes.len() - at);
            match self.below(8) {
                0 | 1 if at < bytes.len() => bytes[at] ^= 1 << self.below(8),
                2 if at < bytes.len() => bytes[at] = [0, 0xFF, 0x7F, 0x80][self.below(4)],
                3 => bytes[at..at + length].fill(0xFF),
                4 => drop(bytes.drain(at..at + length)),
                5 => drop(bytes.splice(at..at, bytes[at..at + length].to_vec())),
                6 => bytes.truncate(self.below(bytes.len() + 1)),
                _ => {
                    let from = self.below(other.len());
                    let end = (from + length).min(other.len());
                    drop(bytes.splice(at..at + length, other[from..end].iter().copied()));
                }
            }
        }
        bytes
    }
}

fn peak_mib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches("kB").trim().parse::<u64>().unwrap() / 1024
}

/// Every sample of the set: how many could be used, and the others.
fn read_all(dataset: Dataset) -> (u64, Vec<Quarantined>) {
    let options = EvalOptions {
        range: 0..u64::MAX,
        batch: 16,
        threads: 2,
        prefetch: 2,
        image_size: 8,
        filter: Filter::Bicubic,
        pixels: true,
        features: None,
        clean: Clean::Blip,
        pad_id: 0,
        pad_to_multiple: 1,
        left_out: Arc::default(),
    };
    let mut reader = EvalReader::new(Arc::new(dataset.into()), text(), options).unwrap();
    let mut used = 0;
    for batch in reader.by_ref() {
        let batch = batch.unwrap();
        assert_eq!(batch.pixels.unwrap().len(), batch.size * 3 * 8 * 8);
        used += batch.size as u64;
    }
    (used, reader.take_quarantined())
}

fn assert_reasons(quarantined: &[Quarantined]) {
    for entry in quarantined {
        assert!(!entry.key.is_empty() && !entry.reason.is_empty(), "{entry:?}");
        assert!(!entry.reason.contains('\n') && entry.reason.len() < 4096, "{entry:?}");
    }
}

/// Whether an image can be decoded at every fraction of its sides; what can be decoded whole is never lost.
fn decodes_reduced(bytes: &[u8]) -> bool {
    let Ok(mut picture) = Picture::open(bytes, JpegSize::Reduced) else { return false };
    let whole = decode(bytes).is_ok();
    Scale::REDUCED.into_iter().all(|scale| {
        let decoded = picture.decode(scale);
        assert!(decoded.is_ok() || !whole);
        decoded.is_ok_and(|(_, found)| found == scale)
    })
}

#[test]
fn two_thousand_mutated_members_are_used_or_quarantined_with_a_reason() {
    const SAMPLES: usize = 2000;
    let (images, mut dice) = (images(), Dice(1));
    let mut members = Vec::new();
    for sample in 0..SAMPLES {
        let (extension, whole) = &images[sample % images.len()];
        let other = &images[dice.below(images.len())].1;
        // The image alone, the caption alone, or both are harmed.
        let image = if sample % 5 == 0 { whole.clone() } else { dice.harm(whole, other) };
        let caption = CAPTIONS[dice.below(CAPTIONS.len())];
        let (kind, caption) = match sample % 2 {
            0 => ("txt", caption.to_owned()),
            _ => ("json", serde_json::json!({"url": "x", "caption": caption}).to_string()),
        };
        let caption = match sample % 3 {
            0 => dice.harm(caption.as_bytes(), b"{\"caption\": [\"\xFF\\u0000\"]}"),
            _ => caption.into_bytes(),
        };
        members.push((format!("{sample:04}.{extension}"), image));
        members.push((format!("{sample:04}.{kind}"), caption));
    }
    let folder = tempfile::tempdir().unwrap();
    for (shard, members) in members.chunks(1000).enumerate() {
        let members: Vec<(&str, &[u8])> = members.iter().map(|(name, data)| (name.as_str(), data.as_slice())).collect();
        write(folder.path(), &format!("{shard}.tar"), &tar(&members));
    }
    let dataset = open(folder.path());
    assert_eq!(dataset.len(), SAMPLES as u64);
    let before = peak_mib();
    let (used, quarantined) = read_all(dataset);
    let decoded_reduced = members.iter().filter(|(_, bytes)| decodes_reduced(bytes)).count();
    let grown = peak_mib() - before;

    assert!((50..1000).contains(&decoded_reduced), "{decoded_reduced} decoded at a fraction of their sides");
    assert_eq!(used + quarantined.len() as u64, SAMPLES as u64);
    assert!(used > 300 && quarantined.len() > 800, "{used} used, {} not", quarantined.len());
    assert_reasons(&quarantined);
    for reason in ["damaged JPEG", "damaged PNG", "damaged WebP", "neither JPEG", "caption is empty", "not valid JSON"]
    {
        assert!(quarantined.iter().any(|entry| entry.reason.contains(reason)), "none is \"{reason}\"");
    }
    assert!(grown < 64, "{grown} MiB more at the peak");
}

#[test]
fn mutated_archives_are_indexed_inside_their_bytes_or_refused() {
    let (archives, mut dice) = (archives(), Dice(2));
    let folder = tempfile::tempdir().unwrap();
    let (mut indexed, mut refused) = (0, 0);
    for number in 0..1000 {
        let whole = &archives[number % archives.len()];
        let other = &archives[dice.below(archives.len())];
        let mut bytes = dice.harm(whole, other);
        if number % 2 == 0 {
            mend_checksums(&mut bytes);
        }
        let path = write(folder.path(), "shard.tar", &bytes);
        match scan(&path) {
            Ok(index) => {
                for member in index.samples.iter().flat_map(|sample| [sample.image, sample.caption]) {
                    assert!(member.offset + member.bytes <= bytes.len() as u64, "case {number}: {member:?}");
                }
                assert!(index.problems.iter().all(|problem| !problem.to_string().contains('\n')), "case {number}");
                indexed += 1;
            }
            Err(error) => {
                assert!(!error.to_string().contains('\n'), "case {number}: {error}");
                refused += 1;
            }
        }
        if number.is_multiple_of(20)
            && let Ok(dataset) = Dataset::open(&["shard.tar".to_owned()], &options(folder.path()))
        {
            let len = dataset.len();
            let (used, quarantined) = read_all(dataset);
            assert_eq!(used + quarantined.len() as u64, len, "case {number}");
            assert_reasons(&quarantined);
        }
    }
    assert!(indexed > 300 && refused > 100, "{indexed} indexed, {refused} refused");
}

/// Sets right the checksums of the headers, so that what else is wrong in them is read.
fn mend_checksums(archive: &mut [u8]) {
    for block in archive.chunks_exact_mut(512).filter(|block| block[257..262] == *b"ustar") {
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
}
