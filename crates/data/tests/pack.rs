//! From captions files to shards, and back; and what becomes of a packing that was interrupted.

mod fixture;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use blip2_data::{
    Clean, DataError, Dataset, Keep, PackOptions, PackReport, Pick, Reading, Reencode, SourceFormat, decode, pack,
    verify,
};
use fixture::{gradient, jpeg, options, png, write};
use proptest::prelude::*;

fn pack_options(folder: &Path, captions: &str, out: &str) -> PackOptions {
    PackOptions {
        source: folder.join(captions),
        format: SourceFormat::Auto,
        reading: Reading::default(),
        out: folder.join(out),
        shard_samples: 3,
        reencode: None,
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

/// All that is a function of the input: an index's header has the time of its shard.
fn bytes(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut files = files(folder);
    for (name, bytes) in &mut files {
        if name.ends_with(".idx") {
            let header = bytes.iter().position(|&byte| byte == b'\n').unwrap();
            bytes.drain(..header);
        }
    }
    files
}

/// Names and contents of a shard's members.
fn members(shard: &Path) -> Vec<(String, Vec<u8>)> {
    let mut archive = tar::Archive::new(fs::File::open(shard).unwrap());
    let read = |mut entry: tar::Entry<'_, fs::File>| {
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut entry, &mut bytes).unwrap();
        (entry.path().unwrap().to_str().unwrap().to_owned(), bytes)
    };
    archive.entries().unwrap().map(|entry| read(entry.unwrap())).collect()
}

fn json(shard: &Path, name: &str) -> String {
    let member = members(shard).into_iter().find(|(member, _)| member == name);
    String::from_utf8(member.unwrap_or_else(|| panic!("no {name}")).1).unwrap()
}

/// Places of rows that were left out, with their reasons.
fn left_out(report: &PackReport) -> Vec<(&str, &str)> {
    report.problems.iter().map(|problem| (problem.place.as_str(), problem.reason.as_str())).collect()
}

#[track_caller]
fn expect(report: &PackReport, expected: &[(&str, &str)]) {
    let found = left_out(report);
    assert_eq!(found.len(), expected.len(), "{found:?}");
    for ((place, reason), (expected_place, part)) in found.into_iter().zip(expected) {
        assert_eq!(place, *expected_place, "{reason}");
        assert!(reason.contains(part), "{reason}");
    }
}

fn jsonl(rows: impl Iterator<Item = u8>) -> String {
    rows.map(|n| format!("{{\"image\": \"img/{n}.png\", \"caption\": \"Picture {n}\"}}\n")).collect()
}

#[test]
fn rows_become_shards_that_read_back() {
    let folder = images();
    write(folder.path(), "captions.jsonl", jsonl(0..7).as_bytes());
    let report = pack(&pack_options(folder.path(), "captions.jsonl", "out")).unwrap();
    assert_eq!((report.samples, report.shards.len(), report.left_out, report.resumed_rows), (7, 3, 0, 0));

    let out = folder.path().join("out");
    let names: Vec<String> = files(&out).into_keys().collect();
    let shards = ["00000.tar", "00000.tar.idx", "00001.tar", "00001.tar.idx", "00002.tar", "00002.tar.idx"];
    assert_eq!(names, [&shards[..], &["pack.json"]].concat());
    let dataset = Dataset::open(&["{00000..00002}.tar".to_owned()], &options(&out)).unwrap();
    assert_eq!(dataset.counts(), [3, 3, 1]);
    assert!(dataset.problems().is_empty());
    for index in 0..7 {
        let sample = dataset.read(index, Pick::First).unwrap();
        assert_eq!(sample.caption, format!("Picture {index}"));
        assert_eq!(sample.key, format!("{:09}", index + 1));
        assert_eq!(sample.image, fs::read(folder.path().join(format!("img/{index}.png"))).unwrap());
    }
    assert_eq!(verify(&dataset, Clean::Blip, |_, _| {}).unwrap().good, 7);
}

/// A file that the system refuses to read may be read the next time.
#[test]
fn a_disk_that_fails_ends_the_packing_which_goes_on_from_there() {
    let folder = images();
    write(folder.path(), "captions.jsonl", jsonl(0..7).as_bytes());
    let whole = pack(&pack_options(folder.path(), "captions.jsonl", "whole")).unwrap();
    let picture = folder.path().join("img/4.png");
    let bytes_of = fs::read(&picture).unwrap();
    fs::remove_file(&picture).unwrap();
    // Reading it from its start is an input/output error.
    std::os::unix::fs::symlink("/proc/self/mem", &picture).unwrap();
    let options = pack_options(folder.path(), "captions.jsonl", "out");
    let error = pack(&options).unwrap_err();
    assert!(matches!(error, DataError::Io { .. }), "{error}");
    assert!(error.to_string().contains("4.png: "), "{error}");
    fs::remove_file(&picture).unwrap();
    write(folder.path(), "img/4.png", &bytes_of);
    let report = pack(&options).unwrap();
    assert_eq!((report.samples, report.left_out), (7, 0));
    assert_eq!(whole.left_out, 0);
    assert!(bytes(&folder.path().join("out")) == bytes(&folder.path().join("whole")));
}

#[test]
fn a_folder_inside_the_source_is_refused_however_it_is_named() {
    let folder = images();
    write(folder.path(), "img/0.txt", b"a caption");
    let link = folder.path().join("link");
    std::os::unix::fs::symlink(folder.path().join("img"), &link).unwrap();
    for out in [folder.path().join("img/new/out"), link.join("new/out")] {
        let options = PackOptions { out, format: SourceFormat::Img2dataset, ..pack_options(folder.path(), "img", "") };
        let error = pack(&options).unwrap_err().to_string();
        assert!(error.contains("choose a folder beside it"), "{error}");
    }
}

/// What is written into an index while packing is what reading the shard again would give.
#[test]
fn a_shards_digest_is_that_of_its_file() {
    let folder = images();
    write(folder.path(), "captions.jsonl", jsonl(0..7).as_bytes());
    let report = pack(&pack_options(folder.path(), "captions.jsonl", "out")).unwrap();
    let set = Dataset::open(&["*.tar".to_owned()], &options(&folder.path().join("out"))).unwrap();
    for (path, shard) in report.shards.iter().zip(set.shards()) {
        let digest = blake3::hash(&fs::read(path).unwrap()).to_hex().to_string();
        assert_eq!(shard.contents.unwrap().to_string(), digest);
    }
}

#[test]
fn the_same_rows_give_the_same_bytes_on_any_number_of_threads() {
    let folder = images();
    let rows: String = (0..90).map(|n| format!("img/{}.png\tcaption {n}\n", n % 8)).collect();
    write(folder.path(), "captions.tsv", rows.as_bytes());
    let packed = [("one", 1), ("four", 4)].map(|(out, threads)| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let options = pack_options(folder.path(), "captions.tsv", out);
        pool.install(|| pack(&options)).unwrap();
        bytes(&folder.path().join(out))
    });
    assert!(packed[0].contains_key("left_out.jsonl"));
    assert!(packed[0] == packed[1]);
}

#[test]
fn headers_say_which_columns_count() {
    let folder = images();
    write(folder.path(), "captions.tsv", b"id\tcaption\timage\n7\tthe caption\timg/2.png\n");
    let csv = "\u{feff}id,text,file_name\r\n7,\"a \"\"cat\"\", on\na mat\",img/2.png\r\n8,two,img/3.png";
    write(folder.path(), "captions.csv", csv.as_bytes());
    let mut options_csv = pack_options(folder.path(), "captions.csv", "csv");
    options_csv.reading = Reading {
        image_field: Some("file_name".to_owned()),
        caption_field: Some("text".to_owned()),
        keep: Keep::All,
        ..Reading::default()
    };
    for (options_of, captions, key) in [
        (pack_options(folder.path(), "captions.tsv", "tsv"), vec!["the caption"], "000000002"),
        (options_csv, vec!["a \"cat\", on\na mat", "two"], "000000002"),
    ] {
        let report = pack(&options_of).unwrap();
        assert_eq!((report.samples as usize, report.left_out), (captions.len(), 0));
        let dataset = Dataset::open(&["*.tar".to_owned()], &options(&options_of.out)).unwrap();
        assert_eq!(dataset.read(0, Pick::First).unwrap().key, key);
        let read: Vec<String> = (0..dataset.len()).map(|at| dataset.read(at, Pick::First).unwrap().caption).collect();
        assert_eq!(read, captions);
    }
    assert_eq!(json(&folder.path().join("csv/00000.tar"), "000000002.json"), r#"{"id":"7"}"#);
    // The second record begins behind a line break in quotes.
    assert_eq!(json(&folder.path().join("csv/00000.tar"), "000000004.json"), r#"{"id":"8"}"#);
}

#[test]
fn several_captions_and_kept_fields_go_into_the_json() {
    let folder = images();
    let rows = concat!(
        r#"{"image": "img/0.png", "caption": ["one", " ", "two"], "width": 8, "url": "u", "exif": {"a": 1}}"#,
        "\n",
        r#"{"image": "img/1.png", "caption": "alone"}"#,
        "\n"
    );
    write(folder.path(), "captions.jsonl", rows.as_bytes());
    let pack_keeping = |keep: Keep, out: &str| {
        let mut options = pack_options(folder.path(), "captions.jsonl", out);
        options.reading.keep = keep;
        assert_eq!(pack(&options).unwrap().samples, 2);
        folder.path().join(out).join("00000.tar")
    };
    let shard = pack_keeping(Keep::Nothing, "nothing");
    assert_eq!(json(&shard, "000000001.txt"), "one");
    assert_eq!(json(&shard, "000000001.json"), r#"{"captions":["one","two"]}"#);
    assert_eq!(members(&shard).len(), 5);
    let shard = pack_keeping(Keep::Fields(vec!["url".to_owned()]), "url");
    assert_eq!(json(&shard, "000000001.json"), r#"{"url":"u","captions":["one","two"]}"#);
    let shard = pack_keeping(Keep::All, "all");
    assert_eq!(json(&shard, "000000001.json"), r#"{"width":8,"url":"u","exif":{"a":1},"captions":["one","two"]}"#);
}

#[test]
fn a_list_in_json_and_several_files_by_a_pattern() {
    let folder = images();
    write(
        folder.path(),
        "list.json",
        br#"[{"image": "img/0.png", "caption": "zero"}, {"image": "img/9.png", "caption": "x"}]"#,
    );
    let report = pack(&pack_options(folder.path(), "list.json", "list")).unwrap();
    expect(&report, &[("list.json: entry 2", "No such file")]);
    write(folder.path(), "part-0.jsonl", b"\n{\"image\": \"img/0.png\", \"caption\": \"zero\"}\n");
    write(folder.path(), "part-1.jsonl", b"{\"image\": \"img/1.png\", \"caption\": \"one\"}\n");
    let report = pack(&pack_options(folder.path(), "part-*.jsonl", "parts")).unwrap();
    assert_eq!((report.samples, report.left_out), (2, 0));
    let names: Vec<String> = members(&report.shards[0]).into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["000000002.png", "000000002.txt", "000000003.png", "000000003.txt"]);
}

#[test]
fn rows_that_cannot_be_packed_are_listed_by_line() {
    let folder = images();
    write(folder.path(), "img/broken.png", b"\x89PNG\r\n\x1a\nno");
    fs::create_dir(folder.path().join("img/folder.png")).unwrap();
    let rows: &[u8] = b"{\"image\": \"img/0.png\", \"caption\": \"good\"}\n\
        \n\
        {\"image\": \"img/none.png\", \"caption\": \"missing\"}\n\
        {\"image\": \"img/broken.png\", \"caption\": \"damaged\"}\n\
        {\"image\": \"img/1.png\", \"caption\": \"  \"}\n\
        {\"image\": \"img/1.png\"}\n\
        {\n\
        {\"image\": \"img/1.png\", \"caption\": \"caf\xE9\"}\n\
        {\"image\": \"img/folder.png\", \"caption\": \"x\"}\n\
        7\n";
    write(folder.path(), "captions.jsonl", rows);
    let report = pack(&pack_options(folder.path(), "captions.jsonl", "out")).unwrap();
    assert_eq!((report.samples, report.left_out), (1, 8));
    let expected = [
        ("captions.jsonl:3", "No such file"),
        ("captions.jsonl:4", "damaged PNG"),
        ("captions.jsonl:5", "caption is empty"),
        ("captions.jsonl:6", "no text field \"caption\""),
        ("captions.jsonl:7", "not valid JSON"),
        ("captions.jsonl:8", "not UTF-8 from byte 38"),
        ("captions.jsonl:9", "no regular file"),
        ("captions.jsonl:10", "not an object"),
    ];
    expect(&report, &expected);
    let listed = fs::read_to_string(folder.path().join("out/left_out.jsonl")).unwrap();
    assert_eq!(listed.lines().count(), 8);
    // What was left out is told again where there is nothing left to do.
    assert_eq!(pack(&pack_options(folder.path(), "captions.jsonl", "out")).unwrap().problems, report.problems);
}

#[test]
fn large_images_become_smaller_and_small_ones_stay() {
    let folder = images();
    write(folder.path(), "img/0.png", &fixture::encode(&gradient(90, 30), image::ImageFormat::Png));
    write(folder.path(), "captions.jsonl", jsonl(0..2).as_bytes());
    let mut options = pack_options(folder.path(), "captions.jsonl", "out");
    options.reencode = Some(Reencode { longest_side: 45, quality: 95 });
    pack(&options).unwrap();
    let members = members(&folder.path().join("out/00000.tar"));
    assert_eq!(members[0].0, "000000001.jpg");
    let small = decode(&members[0].1).unwrap();
    assert_eq!((small.width, small.height), (45, 15));
    // The middle of the gradient is the middle still.
    let middle = &small.data[(7 * 45 + 22) * 3..][..2];
    assert!(middle[0].abs_diff(126) < 8 && middle[1].abs_diff(123) < 8, "{middle:?}");
    assert_eq!(members[2], ("000000002.png".to_owned(), png(8, 6, 1)));
    options.reencode = Some(Reencode { longest_side: 45, quality: 0 });
    assert!(pack(&options).unwrap_err().to_string().contains("expected 1 to 100, got 0"));
}

#[test]
fn texts_that_could_not_be_read_again_are_left_out() {
    let folder = images();
    let long = "long ".repeat(300_000);
    let rows: String = [("caption", "short"), (long.as_str(), "short"), ("caption", long.as_str())]
        .iter()
        .map(|(caption, note)| {
            format!("{}\n", serde_json::json!({"image": "img/0.png", "caption": caption, "note": note}))
        })
        .collect();
    write(folder.path(), "captions.jsonl", rows.as_bytes());
    let mut options = pack_options(folder.path(), "captions.jsonl", "out");
    options.reading.keep = Keep::All;
    let report = pack(&options).unwrap();
    assert_eq!(report.samples, 1);
    expect(&report, &[("captions.jsonl:2", "its txt has 1500000 bytes"), ("captions.jsonl:3", "its json has 15000")]);
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
fn sources_that_cannot_be_used_are_refused() {
    let folder = images();
    write(folder.path(), "empty.jsonl", b"\n");
    write(folder.path(), "header.csv", b"image,caption\n");
    write(folder.path(), "nothing.csv", b"");
    write(folder.path(), "latin.tsv", b"img/0.png\tcaf\xE9\n");
    write(folder.path(), "columns.csv", b"file_name,text\nimg/0.png,one\n");
    write(folder.path(), "open.csv", b"image,caption\nimg/0.png,one\nimg/1.png,\"two\nimg/2.png,three\n");
    write(folder.path(), "all_bad.tsv", b"img/none.png\tone\nalone\n");
    write(folder.path(), "long.jsonl", &vec![b'x'; 17 << 20]);
    write(folder.path(), "notes.md", b"notes");
    write(folder.path(), "shard.tar", b"tar");
    write(folder.path(), "cut.json", br#"[{"image": "img/0.png", "caption""#);
    for (captions, reason) in [
        ("empty.jsonl", "holds no row"),
        ("header.csv", "holds no row"),
        ("nothing.csv", "holds no row"),
        ("latin.tsv", "not UTF-8 from byte 13"),
        ("columns.csv", "no column \"image\" (it has: file_name, text)"),
        ("open.csv", "the row that begins in line 3 opens a quote that is never closed"),
        ("all_bad.tsv", "none of 2 rows can be used; the first: all_bad.tsv:1: "),
        ("long.jsonl", "begins in line 1 is longer than 16 MiB"),
        ("missing.tsv", "No such file"),
        ("notes.md", "not known by its name"),
        ("shard.tar", "shards already"),
        ("cut.json", "no list of objects in JSON"),
        ("none-*.csv", "matches no file"),
    ] {
        let error = pack(&pack_options(folder.path(), captions, "out")).unwrap_err().to_string();
        assert!(error.contains(reason), "{captions}: {error}");
        assert!(!folder.path().join("out").exists(), "{captions}");
    }
    write(folder.path(), "headless.tsv", b"img/0.png\tone\t7\n");
    let mut options = pack_options(folder.path(), "headless.tsv", "out");
    options.reading.keep = Keep::Fields(vec!["id".to_owned()]);
    let error = pack(&options).unwrap_err().to_string();
    assert!(error.contains("first line names no column \"image\""), "{error}");
    // However many columns there are, and whatever is in their names, the message is a line.
    let columns: Vec<String> = (0..100_000).map(|at| format!("\"column\n{at}\"")).collect();
    write(folder.path(), "wide.csv", format!("{}\n", columns.join(",")).as_bytes());
    let error = pack(&pack_options(folder.path(), "wide.csv", "out")).unwrap_err().to_string();
    assert!(error.contains("(it has: column 0, column 1, ") && error.len() < 1000 && !error.contains('\n'), "{error}");
    // A quote that a later one closes would make one row of several.
    write(folder.path(), "late.csv", b"image,caption\nimg/0.png,\"one\nimg/1.png,\"two\nimg/2.png,three\n");
    let report = pack(&pack_options(folder.path(), "late.csv", "late")).unwrap();
    assert_eq!(report.samples, 1);
    expect(&report, &[("late.csv:2", "a closing quote stands in the middle of a field")]);
}

#[test]
fn a_folder_is_taken_for_what_it_holds() {
    let folder = images();
    write(folder.path(), "img/captions.csv", b"image,caption\n0.png,zero\n");
    assert_eq!(pack(&pack_options(folder.path(), "img", "out")).unwrap().samples, 1);
    write(folder.path(), "img/other.tsv", b"0.png\tzero\n");
    let error = pack(&pack_options(folder.path(), "img", "other")).unwrap_err().to_string();
    assert!(error.contains("several captions files (captions.csv, other.tsv); name one"), "{error}");
}

/// Ends a packing by a panic once it has gone on for `at` rows; what was written by then stays, as after a kill.
fn stop_at(options: &PackOptions, at: u64) -> bool {
    let mut stopped = options.clone();
    stopped.progress = Some(Arc::new(move |done, _| assert!(done < at, "stop")));
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| pack(&stopped).unwrap())).is_err()
}

#[test]
fn an_interrupted_packing_goes_on_and_ends_with_the_same_bytes() {
    let folder = images();
    let rows: String = (0..300).map(|n| format!("img/{}.png\tcaption {n}\n", n % 9)).collect();
    write(folder.path(), "captions.tsv", rows.as_bytes());
    let whole = pack(&pack_options(folder.path(), "captions.tsv", "whole")).unwrap();
    let options = pack_options(folder.path(), "captions.tsv", "out");
    for at in [65, 65, 65] {
        assert!(stop_at(&options, at));
    }
    // What a kill at the worst moments leaves besides: a file half written, rows listed and not taken up, a shard taken up without its name.
    let out = folder.path().join("out");
    write(&out, ".writing-abc", b"half");
    let mut listed = fs::read(out.join("left_out.jsonl")).unwrap();
    listed.extend(b"{\"place\": ");
    write(&out, "left_out.jsonl", &listed);
    let last = files(&out).into_keys().rfind(|name| name.ends_with(".tar")).unwrap();
    fs::remove_file(out.join(&last)).unwrap();
    fs::remove_file(out.join(format!("{last}.idx"))).unwrap();
    let report = pack(&options).unwrap();
    assert!(report.resumed_rows > 100 && report.resumed_rows < 300, "{}", report.resumed_rows);
    assert_eq!((report.samples, report.left_out), (whole.samples, whole.left_out));
    assert!(bytes(&out) == bytes(&folder.path().join("whole")));
    assert_eq!(pack(&options).unwrap().resumed_rows, 300);
    assert!(bytes(&out) == bytes(&folder.path().join("whole")));
}

#[test]
fn another_packing_s_folder_is_refused_with_the_difference() {
    let folder = images();
    write(folder.path(), "captions.jsonl", jsonl(0..7).as_bytes());
    let options = pack_options(folder.path(), "captions.jsonl", "out");
    pack(&options).unwrap();
    let before = files(&options.out);
    let refused = |change: &dyn Fn(&mut PackOptions)| {
        let mut other = options.clone();
        change(&mut other);
        pack(&other).unwrap_err().to_string()
    };
    for (error, part) in [
        (refused(&|options| options.shard_samples = 4), "shard_samples: 3 there, 4 now"),
        (refused(&|options| options.reading.keep = Keep::All), "keep: null there, \"all\" now"),
        (refused(&|options| options.reading.images = Some(PathBuf::from("x"))), "images: null there, \"x\" now"),
        (
            refused(&|options| options.reencode = Some(Reencode { longest_side: 9, quality: 90 })),
            "longest_side: null there, 9 now",
        ),
    ] {
        assert!(error.contains("another packing") && error.contains(part), "{error}");
    }
    write(folder.path(), "captions.jsonl", jsonl(0..6).as_bytes());
    let error = pack(&options).unwrap_err().to_string();
    assert!(error.contains("input: captions.jsonl of size 329 there, captions.jsonl of size 282 now"), "{error}");
    assert!(files(&options.out) == before);
}

#[test]
fn an_input_that_was_changed_in_place_at_the_same_size_is_not_gone_on_from() {
    let modify = |path: &Path| fs::File::open(path).unwrap().set_modified(SystemTime::now() + Duration::from_secs(9));
    let folder = images();
    write(folder.path(), "captions.tsv", b"img/0.png\tone\nimg/1.png\ttwo\n");
    let options = pack_options(folder.path(), "captions.tsv", "out");
    pack(&options).unwrap();
    assert_eq!(pack(&options).unwrap().resumed_rows, 2);
    write(folder.path(), "captions.tsv", b"img/0.png\tone\nimg/1.png\tTWO\n");
    modify(&folder.path().join("captions.tsv")).unwrap();
    let error = pack(&options).unwrap_err().to_string();
    assert!(
        error.contains("another packing (input: captions.tsv of size 28 was modified since, at the same size)"),
        "{error}"
    );

    // A picture of a folder that another one took the place of.
    for name in ["0", "1"] {
        write(folder.path(), &format!("img/{name}.txt"), b"a caption");
    }
    let options = PackOptions { format: SourceFormat::Img2dataset, ..pack_options(folder.path(), "img", "pairs") };
    pack(&options).unwrap();
    fs::rename(folder.path().join("img/0.png"), folder.path().join("img/00.png")).unwrap();
    modify(&folder.path().join("img")).unwrap();
    let error = pack(&options).unwrap_err().to_string();
    assert!(error.contains("input: . of size 7 "), "{error}");
}

#[test]
fn shards_that_changed_behind_a_packing_are_not_gone_on_from() {
    let folder = images();
    write(folder.path(), "captions.jsonl", jsonl(0..7).as_bytes());
    let options = pack_options(folder.path(), "captions.jsonl", "out");
    pack(&options).unwrap();
    let change = |name: &str, bytes: Option<&[u8]>| {
        let path = options.out.join(name);
        let kept = fs::read(&path).unwrap();
        match bytes {
            Some(bytes) => fs::write(&path, bytes).unwrap(),
            None => fs::remove_file(&path).unwrap(),
        }
        let error = pack(&options).unwrap_err().to_string();
        fs::write(&path, kept).unwrap();
        error
    };
    for (error, part) in [
        (change("00001.tar", None), "00001.tar: is gone"),
        (change("00000.tar", Some(b"x")), "00000.tar: has 1 bytes"),
        (change("pack.json", Some(b"{")), "pack.json: "),
        (change("pack.json", None), "00000.tar already exists"),
    ] {
        assert!(error.contains(part), "{part}: {error}");
    }
}

#[test]
fn two_packings_do_not_share_a_folder() {
    let folder = images();
    write(folder.path(), "captions.jsonl", jsonl(0..7).as_bytes());
    let mut options = pack_options(folder.path(), "captions.jsonl", "out");
    let other = options.clone();
    options.progress = Some(Arc::new(move |_, _| {
        let error = pack(&other).unwrap_err();
        assert!(matches!(error, DataError::PackLocked { .. }), "{error}");
    }));
    assert_eq!(pack(&options).unwrap().samples, 7);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    /// Rows that fail anywhere, shards of any size, stops anywhere: the bytes of an undisturbed packing.
    #[test]
    fn stops_leave_no_trace(bad in proptest::collection::vec(any::<bool>(), 1..200), shard_samples in 1usize..40, stops in proptest::collection::vec(1u64..200, 0..3)) {
        let folder = images();
        let row = |(n, bad): (usize, &bool)| format!("img/{}.png\trow {n}\n", if *bad { 99 } else { n % 7 });
        write(folder.path(), "captions.tsv", bad.iter().enumerate().map(row).collect::<String>().as_bytes());
        let mut options = pack_options(folder.path(), "captions.tsv", "out");
        options.shard_samples = shard_samples;
        for stop in stops {
            stop_at(&options, stop);
        }
        let packed = pack(&options);
        let whole = pack(&PackOptions { out: folder.path().join("whole"), ..options.clone() });
        match (packed, whole) {
            (Ok(packed), Ok(whole)) => {
                prop_assert_eq!(packed.problems, whole.problems);
                prop_assert_eq!(packed.samples + packed.left_out, bad.len() as u64);
                prop_assert!(bytes(&options.out) == bytes(&folder.path().join("whole")));
            }
            (packed, whole) => prop_assert!(bad.iter().all(|bad| *bad) && packed.is_err() && whole.is_err()),
        }
    }
}
