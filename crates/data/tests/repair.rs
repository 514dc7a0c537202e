//! Damaged shards become whole ones without the samples that cannot be used.

mod fixture;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use blip2_data::{Clean, DataError, Dataset, OpenOptions, Outcome, Pick, repair, verify};
use fixture::{open, options, png, tar, write};

fn shard(folder: &Path, name: &str, bytes: &[u8]) {
    write(folder, name, bytes);
}

#[test]
fn damaged_shards_are_rewritten_and_whole_ones_linked() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b, c) = (png(5, 4, 1), png(5, 4, 2), png(5, 4, 3));
    let long = format!("{}/z", "long".repeat(30));
    let long = [format!("{long}.png"), format!("{long}.txt")];
    shard(folder.path(), "00.tar", &tar(&[("a.png", &a), ("a.txt", b"whole")]));
    let mixed: [(&str, &[u8]); 12] = [
        ("__meta__", b"{}"),
        ("a.png", &a),
        ("a.txt", b"one"),
        ("a.json", b"{\"k\": 1}"),
        ("b.png", b"damaged"),
        ("b.txt", b"two"),
        ("c.txt", b"no image"),
        ("d.png", &b),
        ("d.txt", b"  "),
        (&long[0], &c),
        (&long[1], b"a long name"),
        ("e.cls", b"7"),
    ];
    shard(folder.path(), "01.tar", &tar(&mixed));
    // Cut inside its second sample.
    let cut = tar(&[("a.png", &a), ("a.txt", b"one"), ("b.png", &b), ("b.txt", b"two")]);
    shard(folder.path(), "02.tar", &cut[..3 * 512 + 700]);
    shard(folder.path(), "03.tar", &tar(&[("a.png", b"nothing good"), ("a.txt", b"x")]));
    let before: Vec<Vec<u8>> = (0..4).map(|n| fs::read(folder.path().join(format!("0{n}.tar"))).unwrap()).collect();

    let out = folder.path().join("repaired");
    let report = repair(&open(folder.path()), Clean::Blip, &out, |_, _| {}).unwrap();
    let outcomes: Vec<(Outcome, u64)> = report.shards.iter().map(|shard| (shard.outcome, shard.samples)).collect();
    let expected = [(Outcome::Linked, 1), (Outcome::Rewritten, 2), (Outcome::Rewritten, 1), (Outcome::Dropped, 0)];
    assert_eq!(outcomes, expected);
    let found: Vec<String> = report.found.problems.iter().map(ToString::to_string).collect();
    for part in [
        "key c: no image",
        "key b: image: neither JPEG",
        "key d: caption is empty",
        "02.tar: damaged or cut at byte 2048",
        "key e: ",
    ] {
        assert!(found.iter().any(|problem| problem.contains(part)), "{part}: {found:?}");
    }
    let kept: [(&str, &[u8]); 6] = [mixed[0], mixed[1], mixed[2], mixed[3], mixed[9], mixed[10]];
    assert!(fs::read(out.join("01.tar")).unwrap() == tar(&kept));
    assert!(fs::read(out.join("02.tar")).unwrap() == tar(&[("a.png", &a), ("a.txt", b"one")]));
    let inode = |path: &Path| fs::metadata(path).unwrap().ino();
    assert_eq!(inode(&out.join("00.tar")), inode(&folder.path().join("00.tar")));
    assert!(!out.join("03.tar").exists() && out.join("01.tar.idx").exists());
    for (n, bytes) in before.iter().enumerate() {
        assert!(fs::read(folder.path().join(format!("0{n}.tar"))).unwrap() == *bytes);
    }
    let repaired = verify(&open(&out), Clean::Blip, |_, _| {}).unwrap();
    assert_eq!((repaired.good, repaired.problems), (4, vec![]));
}

/// As macOS packs them: hidden twins between the members of a sample; and a folder's own entry.
fn apple_tar(samples: u8, bad: u8) -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    let mut append = |name: &str, data: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_size(data.len() as u64);
        header.set_entry_type(if name.ends_with('/') { tar::EntryType::Directory } else { tar::EntryType::Regular });
        archive.append_data(&mut header, name, data).unwrap();
    };
    for n in 0..samples {
        let image = if n == bad { b"\x89PNG no".to_vec() } else { png(5, 4, n) };
        append(&format!("._{n}.png"), b"resource fork");
        append(&format!("{n}.png"), &image);
        append("folder/", b"");
        append(&format!("._{n}.txt"), b"resource fork");
        append(&format!("{n}.txt"), format!("caption {n}").as_bytes());
    }
    archive.into_inner().unwrap()
}

#[test]
fn members_between_those_of_a_sample_do_not_part_it() {
    let folder = tempfile::tempdir().unwrap();
    shard(folder.path(), "0.tar", &apple_tar(5, 2));
    let set = open(folder.path());
    assert_eq!(set.len(), 5);
    let out = folder.path().join("out");
    let report = repair(&set, Clean::Blip, &out, |_, _| {}).unwrap();
    assert_eq!((report.shards[0].outcome, report.shards[0].samples), (Outcome::Rewritten, 4));
    let repaired = open(&out);
    assert_eq!(verify(&repaired, Clean::Blip, |_, _| {}).unwrap().good, 4);
    let captions: Vec<String> = (0..4).map(|at| repaired.read(at, Pick::First).unwrap().caption).collect();
    assert_eq!(captions, ["caption 0", "caption 1", "caption 3", "caption 4"]);
}

/// Without the bad sample in the middle two samples of one key would be neighbours, and taken for one.
#[test]
fn a_repair_that_would_lose_samples_fails_and_leaves_no_shard() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = (png(5, 4, 1), png(5, 4, 2));
    let members: [(&str, &[u8]); 6] =
        [("x.png", &a), ("x.txt", b"one"), ("y.png", b"no"), ("y.txt", b"two"), ("x.png", &b), ("x.txt", b"three")];
    shard(folder.path(), "0.tar", &tar(&members));
    let out = folder.path().join("out");
    let error = repair(&open(folder.path()), Clean::Blip, &out, |_, _| {}).unwrap_err().to_string();
    assert!(error.contains("would hold 0 samples instead of 2"), "{error}");
    assert_eq!(fs::read_dir(&out).unwrap().count(), 0);
}

#[test]
fn a_shard_that_is_no_tar_file_is_listed_and_does_not_stop_the_repair() {
    let folder = tempfile::tempdir().unwrap();
    shard(folder.path(), "00.tar", b"");
    shard(folder.path(), "01.tar", &tar(&[("a.png", &png(5, 4, 1)), ("a.txt", b"good")]));
    shard(folder.path(), "02.tar", &[7; 4096]);
    let tolerant = OpenOptions { tolerate_unreadable: true, ..options(folder.path()) };
    let patterns = ["*.tar".to_owned()];
    let error = Dataset::open(&patterns, &options(folder.path())).err().unwrap().to_string();
    assert!(error.contains("00.tar") && error.contains("02.tar"), "{error}");

    let set = Dataset::open(&patterns, &tolerant).unwrap();
    let report = repair(&set, Clean::Blip, &folder.path().join("repaired"), |_, _| {}).unwrap();
    let problems: Vec<&str> = report.found.problems.iter().map(|problem| problem.shard.as_str()).collect();
    assert_eq!(problems, ["00.tar", "02.tar"]);
    assert_eq!(report.shards.len(), 1);
    assert_eq!(verify(&open(&folder.path().join("repaired")), Clean::Blip, |_, _| {}).unwrap().good, 1);
}

#[test]
fn a_shard_cut_anywhere_becomes_a_whole_one() {
    let members: Vec<(String, Vec<u8>)> = (0..4)
        .flat_map(|n| [(format!("{n}.png"), png(40, 30, n)), (format!("{n}.txt"), format!("text {n}").into_bytes())])
        .collect();
    let members: Vec<(&str, &[u8])> = members.iter().map(|(name, data)| (name.as_str(), data.as_slice())).collect();
    let whole = tar(&members);
    for length in (1100..whole.len()).step_by(97) {
        let folder = tempfile::tempdir().unwrap();
        shard(folder.path(), "0.tar", &whole[..length]);
        // Fewer bytes than one sample hold none.
        let Ok(set) = Dataset::open(&["0.tar".to_owned()], &options(folder.path())) else { continue };
        let out = folder.path().join("out");
        let shard = repair(&set, Clean::Blip, &out, |_, _| {}).unwrap().shards.remove(0);
        let expected = match shard.outcome {
            // One of the two blocks of the end mark is enough.
            Outcome::Linked => whole[..length].to_vec(),
            _ => tar(&members[..2 * shard.samples as usize]),
        };
        assert!(fs::read(out.join("0.tar")).unwrap() == expected, "{length}: {shard:?}");
    }
}

#[test]
fn nothing_is_overwritten_by_a_repair() {
    let folder = fixture::shards(&[2], |index| index == 1);
    let error = repair(&open(folder.path()), Clean::Blip, folder.path(), |_, _| {}).unwrap_err();
    assert!(matches!(error, DataError::WouldOverwrite { .. }), "{error}");
    fs::create_dir(folder.path().join("more")).unwrap();
    fs::copy(folder.path().join("00.tar"), folder.path().join("more/00.tar")).unwrap();
    let set = Dataset::open(&["00.tar".to_owned(), "more/00.tar".to_owned()], &options(folder.path())).unwrap();
    let error = repair(&set, Clean::Blip, &folder.path().join("out"), |_, _| {}).unwrap_err().to_string();
    assert!(error.contains("has the name of another shard"), "{error}");
    assert!(!folder.path().join("out").exists());
}
