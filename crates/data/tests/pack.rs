//! From a folder with a captions file to shards, and back.

mod fixture;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use blip2_data::{Clean, DataError, Dataset, PackOptions, Pick, pack, verify};
use fixture::{gradient, jpeg, options, png, write};

fn pack_options(folder: &Path, captions: &str, out: &str) -> PackOptions {
    PackOptions {
        captions: folder.join(captions),
        images: None,
        out: folder.join(out),
        shard_samples: 3,
        image_field: "image".to_owned(),
        caption_field: "caption".to_owned(),
        progress: None,
    }
}

/// A folder with seven images, one of them with a wrong name.
fn images() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("img")).unwrap();
    for number in 0..6 {
        write(folder.path(), &format!("img/{number}.png"), &png(8, 6, number));
    }
    write(folder.path(), "img/6.png", &jpeg(&gradient(10, 10)));
    folder
}

fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    entries.map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap())).collect()
}

#[test]
fn rows_become_shards_that_read_back() {
    let folder = images();
    let rows: String =
        (0..7).map(|n| format!("{{\"image\": \"img/{n}.png\", \"caption\": \"Picture {n}\"}}\n")).collect();
    write(folder.path(), "captions.jsonl", rows.as_bytes());
    let report = pack(&pack_options(folder.path(), "captions.jsonl", "out")).unwrap();
    assert_eq!((report.samples, report.shards.len(), report.problems.len()), (7, 3, 0));

    let out = folder.path().join("out");
    let names: Vec<String> = files(&out).into_keys().collect();
    assert_eq!(names, ["00000.tar", "00000.tar.idx", "00001.tar", "00001.tar.idx", "00002.tar", "00002.tar.idx"]);
    let dataset = Dataset::open(&["{00000..00002}.tar".to_owned()], &options(&out)).unwrap();
    assert_eq!(dataset.counts(), [3, 3, 1]);
    assert!(dataset.problems().is_empty());
    for index in 0..7 {
        let sample = dataset.read(index, Pick::First).unwrap();
        assert_eq!(sample.caption, format!("Picture {index}"));
        assert_eq!(sample.key, format!("{:09}", index + 1));
        assert_eq!(sample.image, fs::read(folder.path().join(format!("img/{index}.png"))).unwrap());
    }
    assert_eq!(verify(&dataset, Clean::Blip, |_, _| {}).good, 7);
}

#[test]
fn the_same_rows_give_the_same_bytes() {
    let folder = images();
    write(folder.path(), "captions.tsv", b"img/0.png\tone\nimg/1.png\ttwo\nimg/6.png\tthree\n");
    for out in ["one", "two"] {
        pack(&pack_options(folder.path(), "captions.tsv", out)).unwrap();
    }
    let shard = |out: &str| fs::read(folder.path().join(out).join("00000.tar")).unwrap();
    assert_eq!(shard("one"), shard("two"));
}

#[test]
fn a_tsv_header_says_which_columns_count() {
    let folder = images();
    write(folder.path(), "captions.tsv", b"id\tcaption\timage\n7\tthe caption\timg/2.png\n");
    let report = pack(&pack_options(folder.path(), "captions.tsv", "out")).unwrap();
    assert_eq!((report.samples, report.problems.len()), (1, 0));
    let dataset = Dataset::open(&["out/*.tar".to_owned()], &options(folder.path())).unwrap();
    assert_eq!(dataset.read(0, Pick::First).unwrap().caption, "the caption");
}

#[test]
fn rows_that_cannot_be_packed_are_listed_by_line() {
    let folder = images();
    write(folder.path(), "img/broken.png", b"\x89PNG\r\n\x1a\nno");
    let rows = concat!(
        "{\"image\": \"img/0.png\", \"caption\": \"good\"}\n",
        "\n",
        "{\"image\": \"img/none.png\", \"caption\": \"missing\"}\n",
        "{\"image\": \"img/broken.png\", \"caption\": \"damaged\"}\n",
        "{\"image\": \"img/1.png\", \"caption\": \"  \"}\n",
        "{\"image\": \"img/1.png\"}\n",
        "{\n",
    );
    write(folder.path(), "captions.jsonl", rows.as_bytes());
    let report = pack(&pack_options(folder.path(), "captions.jsonl", "out")).unwrap();
    assert_eq!(report.samples, 1);
    let expected = [
        (3, "No such file"),
        (4, "damaged PNG"),
        (5, "caption is empty"),
        (6, "no text field \"caption\""),
        (7, "not valid JSON"),
    ];
    assert_eq!(report.problems.len(), expected.len());
    for (problem, (line, reason)) in report.problems.iter().zip(expected) {
        assert_eq!(problem.line, line);
        assert!(problem.reason.contains(reason), "{}", problem.reason);
    }
}

#[test]
fn nothing_is_overwritten() {
    let folder = images();
    write(folder.path(), "captions.tsv", b"img/0.png\tone\n");
    fs::create_dir(folder.path().join("out")).unwrap();
    write(folder.path(), "out/mine.tar", b"mine");
    let error = pack(&pack_options(folder.path(), "captions.tsv", "out")).unwrap_err();
    assert!(matches!(error, DataError::WouldOverwrite { .. }), "{error}");
    assert_eq!(files(&folder.path().join("out")).len(), 1);
}

#[test]
fn captions_files_that_cannot_be_used_are_refused() {
    let folder = images();
    write(folder.path(), "empty.jsonl", b"\n");
    write(folder.path(), "latin.tsv", b"img/0.png\tcaf\xE9\n");
    write(folder.path(), "captions.csv", b"img/0.png,one\n");
    write(folder.path(), "all_bad.tsv", b"img/none.png\tone\nalone\n");
    for (captions, reason) in [
        ("empty.jsonl", "holds no row"),
        ("latin.tsv", "not UTF-8 from byte 13"),
        ("captions.csv", "must end in .jsonl or .tsv"),
        ("all_bad.tsv", "2 problems; the first: line 1:"),
        ("missing.tsv", "No such file"),
    ] {
        let error = pack(&pack_options(folder.path(), captions, "out")).unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
    }
    assert!(!folder.path().join("out").exists());
}
