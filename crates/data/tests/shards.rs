//! What counts as a sample, what a damaged shard leaves, and how an index is kept.

mod fixture;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use blip2_data::{
    Bounds, CaptionRule, CaptionSource, Clean, Corpus, DataError, Dataset, JsonPath, Loader, OpenOptions, Pick,
    QuestionFields, SampleError, SampleFilter, Shard, reindex, stats, verify,
};
use fixture::{options, png, tar, write};

fn open(folder: &Path) -> Result<Dataset, DataError> {
    Dataset::open(&["*.tar".to_owned()], &options(folder))
}

fn keys(dataset: &Dataset) -> Vec<String> {
    (0..dataset.len()).map(|index| dataset.key(index).unwrap().1).collect()
}

fn problems(dataset: &Dataset) -> Vec<String> {
    dataset.problems().iter().map(ToString::to_string).collect()
}

#[test]
fn members_become_samples_by_webdatasets_naming() {
    let folder = tempfile::tempdir().unwrap();
    let image = png(3, 3, 0);
    let members: [(&str, &[u8]); 10] = [
        ("d/a.JPG", &image),
        ("d/a.seg.png", b"a mask, not the image"),
        ("d/a.txt", b"one"),
        ("b.v2.txt", b"not a caption"),
        ("b.txt", b"two"),
        ("b.json", br#"{"caption": "ignored"}"#),
        ("b.webp", &image),
        ("c.png", &image),
        ("c.json", br#"{"caption": "three", "width": 3}"#),
        ("__meta__.x__", b"passed over"),
    ];
    write(folder.path(), "0.tar", &tar(&members));
    let dataset = open(folder.path()).unwrap();
    assert_eq!(keys(&dataset), ["d/a", "b", "c"]);
    let captions: Vec<String> = (0..3).map(|index| dataset.read(index, Pick::First).unwrap().caption).collect();
    assert_eq!(captions, ["one", "two", "three"]);
    assert_eq!(dataset.read(0, Pick::First).unwrap().image, image);
    assert!(dataset.problems().is_empty());
}

#[test]
fn a_key_without_image_or_caption_is_named_and_left_out() {
    let folder = tempfile::tempdir().unwrap();
    let image = png(3, 3, 0);
    let members: [(&str, &[u8]); 8] = [
        ("a.png", &image),
        ("b.txt", b"no image"),
        ("c.cls", b"7"),
        ("d.png", &image),
        ("d.png", &image),
        ("d.txt", b"twice"),
        ("e.png", &image),
        ("e.txt", b"good"),
    ];
    write(folder.path(), "0.tar", &tar(&members));
    let dataset = open(folder.path()).unwrap();
    assert_eq!(keys(&dataset), ["e"]);
    assert_eq!(
        problems(&dataset),
        [
            "shard 0.tar, key a: no caption (txt, json)",
            "shard 0.tar, key b: no image (jpg, jpeg, png, webp)",
            "shard 0.tar, key c: neither image (jpg, jpeg, png, webp) nor caption (txt, json)",
            "shard 0.tar, key d: two members with extension png",
        ]
    );
}

#[test]
fn a_sample_is_never_joined_across_shards() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), "0.tar", &tar(&[("x.png", &png(3, 3, 0)), ("x.txt", b"whole"), ("a.png", &png(3, 3, 0))]));
    write(folder.path(), "1.tar", &tar(&[("a.txt", b"the rest")]));
    let dataset = open(folder.path()).unwrap();
    assert_eq!((keys(&dataset), dataset.counts()), (vec!["x".to_owned()], vec![1, 0]));
    assert_eq!(dataset.problems().len(), 2);
}

#[test]
fn long_names_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let long = "directory/".repeat(30) + "name";
    let (image, caption) = (format!("{long}.png"), format!("{long}.txt"));
    write(folder.path(), "0.tar", &tar(&[(&image, &png(3, 3, 0)), (&caption, b"far down")]));
    let dataset = open(folder.path()).unwrap();
    assert_eq!(keys(&dataset), [long]);
    assert_eq!(dataset.read(0, Pick::First).unwrap().caption, "far down");
}

/// A shard of three samples, cut to `keep` bytes.
fn cut_shard(folder: &Path, keep: impl Fn(usize) -> usize) {
    let image = png(40, 40, 9);
    let whole = tar(&[
        ("a.png", &image),
        ("a.txt", b"one"),
        ("b.png", &image),
        ("b.txt", b"two"),
        ("c.png", &image),
        ("c.txt", b"three"),
    ]);
    write(folder, "0.tar", &whole[..keep(whole.len())]);
}

#[test]
fn a_truncated_tar_counts_up_to_the_cut() {
    // The archive ends with two blocks of zeros, before them c.txt's data and header, before them c.png's data.
    for (cut, kept, reason) in [
        (1024, vec!["a", "b", "c"], "no end-of-archive mark"),
        (1024 + 100, vec!["a", "b", "c"], "no end-of-archive mark"),
        (1024 + 510, vec!["a", "b"], "inside member c.txt"),
        (1024 + 512 + 100, vec!["a", "b"], "cut at byte"),
        (1024 + 512 + 512, vec!["a", "b"], "no end-of-archive mark"),
        (1024 + 512 + 512 + 500, vec!["a", "b"], "inside member c.png"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        cut_shard(folder.path(), |whole| whole - cut);
        let dataset = open(folder.path()).unwrap();
        assert_eq!(keys(&dataset), kept, "cut {cut}");
        assert!(dataset.read(kept.len() as u64 - 1, Pick::First).is_ok());
        assert!(
            problems(&dataset).iter().any(|problem| problem.contains(reason)),
            "cut {cut}: {:?}",
            problems(&dataset)
        );
    }
}

#[test]
fn a_damaged_header_ends_the_shard() {
    let folder = tempfile::tempdir().unwrap();
    let image = png(3, 3, 0);
    let mut bytes = tar(&[("a.png", &image), ("a.txt", b"one"), ("b.png", &image), ("b.txt", b"two")]);
    let second = bytes.windows(5).position(|window| window == b"b.png").unwrap();
    bytes[second] = b'?';
    write(folder.path(), "0.tar", &bytes);
    let dataset = open(folder.path()).unwrap();
    assert_eq!(keys(&dataset), ["a"]);
    assert!(problems(&dataset)[0].contains("what follows is lost"), "{:?}", problems(&dataset));
}

/// What is said of `bytes` as a shard, and the keys of its samples.
fn problems_of(bytes: &[u8]) -> (Vec<String>, Vec<String>) {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), "0.tar", bytes);
    let dataset = open(folder.path()).unwrap();
    (problems(&dataset), keys(&dataset))
}

fn four_samples() -> Vec<u8> {
    let image = png(40, 40, 9);
    let names: Vec<(String, String)> = (0..4).map(|n| (format!("{n}.png"), format!("{n}.txt"))).collect();
    let members: Vec<(&str, &[u8])> =
        names.iter().flat_map(|(png, txt)| [(png.as_str(), image.as_slice()), (txt.as_str(), b"text")]).collect();
    tar(&members)
}

#[test]
fn what_is_lost_behind_an_early_end_is_told_of() {
    let whole = four_samples();
    let half = whole.len() / 2 / 512 * 512;
    // A download into a file that had its length from the start.
    let mut zeroed = whole.clone();
    zeroed[half..].fill(0);
    let (problems, keys) = problems_of(&[&zeroed[..], &vec![0; 1 << 20]].concat());
    assert_eq!(keys, ["0", "1"]);
    assert!(problems[0].contains("what follows is no padding"), "{problems:?}");

    // A header wiped out between two samples.
    let third = whole.windows(5).position(|window| window == b"2.png").unwrap();
    let mut wiped = whole.clone();
    wiped[third..third + 512].fill(0);
    let (problems, keys) = problems_of(&wiped);
    assert_eq!(keys, ["0", "1"]);
    let place = format!("ends at byte {third}, but other data follows at byte {}", third + 512);
    assert!(problems[0].contains(&place), "{problems:?}");

    // cat a.tar b.tar > 0.tar
    let other = tar(&[("b.png", &png(3, 3, 1)), ("b.txt", b"text")]);
    let (problems, keys) = problems_of(&[&whole[..], &other].concat());
    assert_eq!(keys, ["0", "1", "2", "3"]);
    let place = format!("ends at byte {}, but other data follows at byte {}", whole.len() - 1024, whole.len());
    assert!(problems[0].contains(&place), "{problems:?}");

    // What tar itself adds is no problem.
    let (problems, keys) = problems_of(&[&whole[..], &[0; 20 * 512]].concat());
    assert_eq!((problems.len(), keys.len()), (0, 4));
}

/// A sparse member in GNU's own format, of one piece, or of five, of which the last stands in a header of its own.
fn append_sparse(archive: &mut tar::Builder<Vec<u8>>, name: &str, extended: bool) {
    let blocks: &[(u64, u64)] =
        if extended { &[(0, 512), (1024, 512), (2048, 512), (3072, 512), (4096, 512)] } else { &[(0, 700)] };
    let (stored, real): (u64, u64) =
        (blocks.iter().map(|(_, length)| length).sum(), blocks.last().map_or(0, |(at, length)| at + length));
    let octal = |into: &mut [u8; 12], value: u64| into.copy_from_slice(format!("{value:011o}\0").as_bytes());
    let mut header = tar::Header::new_gnu();
    header.set_path(name).unwrap();
    header.set_entry_type(tar::EntryType::GNUSparse);
    header.set_size(stored);
    let gnu = header.as_gnu_mut().unwrap();
    for (slot, (at, length)) in gnu.sparse.iter_mut().zip(blocks) {
        octal(&mut slot.offset, *at);
        octal(&mut slot.numbytes, *length);
    }
    octal(&mut gnu.realsize, real);
    gnu.isextended[0] = u8::from(extended);
    header.set_cksum();
    let mut data = Vec::new();
    if let Some((at, length)) = blocks.get(4) {
        let mut more = tar::GnuExtSparseHeader::new();
        octal(&mut more.sparse[0].offset, *at);
        octal(&mut more.sparse[0].numbytes, *length);
        data.extend_from_slice(more.as_bytes());
    }
    data.resize(data.len() + stored as usize, 7);
    // The size in the header leaves that out.
    archive.get_mut().extend_from_slice(header.as_bytes());
    data.resize(data.len().next_multiple_of(512), 0);
    archive.get_mut().extend_from_slice(&data);
}

#[test]
fn members_that_are_no_plain_files_are_named_and_end_where_they_end() {
    let image = png(3, 3, 1);
    let append = |archive: &mut tar::Builder<Vec<u8>>, name: &str, data: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_size(data.len() as u64);
        archive.append_data(&mut header, name, data).unwrap();
    };
    let link = |archive: &mut tar::Builder<Vec<u8>>, kind, name: &str, target: &str| {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(0);
        archive.append_link(&mut header, name, target).unwrap();
    };
    let mut archive = tar::Builder::new(Vec::new());
    for (key, extended) in [("a", false), ("b", true)] {
        append_sparse(&mut archive, &format!("{key}.png"), extended);
        append(&mut archive, &format!("{key}.txt"), b"text");
    }
    archive.append_pax_extensions([("GNU.sparse.major", b"1".as_slice()), ("GNU.sparse.name", b"c.png")]).unwrap();
    append(&mut archive, "GNUSparseFile.7/c.png", &image);
    append(&mut archive, "c.txt", b"text");
    link(&mut archive, tar::EntryType::Link, "d.png", "../e.png");
    append(&mut archive, "d.txt", b"text");
    append(&mut archive, "e.png", &image);
    link(&mut archive, tar::EntryType::Symlink, "e.txt", "d.txt");
    // A second image that is none takes nothing from a sample.
    append(&mut archive, "f.png", &image);
    link(&mut archive, tar::EntryType::Link, "f.jpg", "f.png");
    append(&mut archive, "f.txt", b"text");
    let bytes = archive.into_inner().unwrap();
    let (problems, keys) = problems_of(&bytes);
    assert_eq!(keys, ["f"]);
    let expected = [
        "key a: its png is a sparse file",
        "key b: its png is a sparse file",
        "key c: its png is a sparse file",
        "key d: its png is a hard link to ../e.png",
        "key e: its txt is a symbolic link to d.txt",
    ];
    assert_eq!(problems.len(), expected.len(), "{problems:?}");
    for (problem, part) in problems.iter().zip(expected) {
        assert!(problem.contains(part), "{problem}");
    }
    // One behind which nothing else comes.
    let mut archive = tar::Builder::new(Vec::new());
    append(&mut archive, "f.png", &image);
    append(&mut archive, "f.txt", b"text");
    append_sparse(&mut archive, "g.bin", true);
    let (problems, _) = problems_of(&archive.into_inner().unwrap());
    assert_eq!(problems, Vec::<String>::new());
}

#[test]
fn headers_that_would_fill_the_memory_are_not_read() {
    let image = png(3, 3, 1);
    let long = "d/".repeat(1 << 20);
    let value = vec![b'x'; 2 << 20];
    for first in [true, false] {
        for pax in [true, false] {
            let mut archive = tar::Builder::new(Vec::new());
            let sample = |archive: &mut tar::Builder<Vec<u8>>, key: &str| {
                for (name, data) in [(format!("{key}.png"), image.as_slice()), (format!("{key}.txt"), b"text")] {
                    let mut header = tar::Header::new_gnu();
                    header.set_size(data.len() as u64);
                    archive.append_data(&mut header, name, data).unwrap();
                }
            };
            if !first {
                sample(&mut archive, "a");
            }
            match pax {
                true => {
                    archive.append_pax_extensions([("comment", value.as_slice())]).unwrap();
                    sample(&mut archive, "b");
                }
                false => sample(&mut archive, &format!("{long}b")),
            }
            let folder = tempfile::tempdir().unwrap();
            let path = write(folder.path(), "0.tar", &archive.into_inner().unwrap());
            let index = blip2_data::scan(&path).unwrap();
            assert_eq!(index.samples.len(), usize::from(!first));
            let problem = index.problems[0].to_string();
            assert!(problem.contains("headers are longer than 1048576 bytes"), "{problem}");
        }
    }
}

#[test]
fn files_that_are_no_tar_are_named_all_at_once() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), "0.tar", b"");
    write(folder.path(), "1.tar", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n");
    write(folder.path(), "2.tar", &[0x1F, 0x8B, 8, 0]);
    write(folder.path(), "3.tar", &[b'x'; 2000]);
    write(folder.path(), "4.tar", &[b'x'; 20]);
    let error = open(folder.path()).err().unwrap();
    let text = error.to_string();
    for part in ["0.tar has zero bytes", "1.tar is a Git LFS pointer", "gzip", "3.tar is not", "4.tar is not"] {
        assert!(text.contains(part), "{part} is not in {text}");
    }
    assert!(!text.contains('\n'));
}

#[test]
fn shards_without_a_usable_sample_are_an_error() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), "0.tar", &tar(&[("a.txt", b"alone")]));
    let error = open(folder.path()).err().unwrap().to_string();
    assert!(error.contains("no usable sample in 1 shards") && error.contains("key a: no image"), "{error}");
}

#[test]
fn captions_that_are_no_text_are_bad_samples() {
    let folder = tempfile::tempdir().unwrap();
    let image = png(3, 3, 0);
    let members: [(&str, &[u8]); 10] = [
        ("a.png", &image),
        ("a.txt", b"caf\xE9"),
        ("b.png", &image),
        ("b.txt", b""),
        ("c.png", &image),
        ("c.json", b"{"),
        ("d.png", &image),
        ("d.json", br#"{"caption": 3}"#),
        ("e.png", &image),
        ("e.txt", b" ...\n"),
    ];
    write(folder.path(), "0.tar", &tar(&members));
    let dataset = open(folder.path()).unwrap();
    assert!(matches!(dataset.read(0, Pick::First), Err(SampleError::CaptionNotUtf8(3))));
    let report = verify(&dataset, Clean::Blip, |_, _| {}).unwrap();
    let reasons: Vec<&str> = report.problems.iter().map(|problem| problem.reason.as_str()).collect();
    assert_eq!(report.good, 0);
    assert_eq!(reasons[0], "caption is not UTF-8 (byte 3)");
    assert_eq!((reasons[1], reasons[4]), ("caption is empty", "caption is empty"));
    assert!(reasons[2].starts_with("caption: not valid JSON"));
    assert_eq!(reasons[3], "caption: the JSON has no text field \"caption\"");
}

#[test]
fn the_caption_field_can_be_chosen() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), "0.tar", &tar(&[("a.png", &png(3, 3, 0)), ("a.json", br#"{"text": "chosen"}"#)]));
    let options = blip2_data::OpenOptions {
        captions: CaptionRule { source: CaptionSource::Json(JsonPath::new("text")), template: None },
        ..options(folder.path())
    };
    let dataset = Dataset::open(&["0.tar".to_owned()], &options).unwrap();
    assert_eq!(dataset.read(0, Pick::First).unwrap().caption, "chosen");
}

/// The index file of a shard with another first line and without its first sample.
fn without_first_sample(index: &Path, change: impl FnOnce(&mut serde_json::Map<String, serde_json::Value>)) {
    let text = fs::read_to_string(index).unwrap();
    let (header, body) = text.split_once('\n').unwrap();
    let mut body: serde_json::Value = serde_json::from_str(body).unwrap();
    body["samples"].as_array_mut().unwrap().remove(0);
    let body = body.to_string();
    let mut header: serde_json::Map<String, serde_json::Value> = serde_json::from_str(header).unwrap();
    header["samples"] = (header["samples"].as_u64().unwrap() - 1).into();
    header["digest"] = blake3::hash(body.as_bytes()).to_hex().as_str().into();
    change(&mut header);
    fs::write(index, format!("{}\n{body}", serde_json::json!(header))).unwrap();
}

#[test]
fn an_index_of_an_older_scan_is_built_anew() {
    let folder = fixture::shards(&[3], |_| false);
    let index = folder.path().join("00.tar.idx");
    let shards = reindex(&["*.tar".to_owned()], &options(folder.path())).unwrap();
    // One of the same scan is believed.
    without_first_sample(&index, |_| {});
    assert_eq!(open(folder.path()).unwrap().len(), 2);
    reindex(&["*.tar".to_owned()], &options(folder.path())).unwrap();
    without_first_sample(&index, |header| {
        header.remove("scan").unwrap();
    });
    let again = open(folder.path()).unwrap();
    assert_eq!(again.len(), 3);
    // The digest of the shard's bytes is known still.
    assert_eq!(again.shards(), shards);
    assert!(again.shards()[0].contents.is_some());
}

#[test]
fn nothing_is_written_beside_shards_where_that_is_not_wanted() {
    let folder = fixture::shards(&[3, 2], |_| false);
    let elsewhere = tempfile::tempdir().unwrap();
    let filter = SampleFilter { width: Bounds { min: Some(1.0), max: None }, ..SampleFilter::default() };
    let cache_dir = Some(elsewhere.path().to_owned());
    let dry = OpenOptions { write_beside: false, cache_dir, filter, ..options(folder.path()) };
    for _ in 0..2 {
        let dataset = Dataset::open(&["*.tar".to_owned()], &dry).unwrap();
        assert_eq!((dataset.counts(), dataset.read(4, Pick::First).unwrap().key.as_str()), (vec![3, 2], "0004"));
    }
    reindex(&["*.tar".to_owned()], &dry).unwrap();
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    // An index and the filter's numbers of each.
    assert_eq!(fs::read_dir(elsewhere.path()).unwrap().count(), 4);
    let nowhere = OpenOptions { cache_dir: None, ..dry };
    let error = Dataset::open(&["00.tar".to_owned()], &nowhere).err().unwrap().to_string();
    assert!(error.contains("name a cache folder"), "{error}");
    // What lies there is read all the same.
    open(folder.path()).unwrap();
    let read = OpenOptions { filter: SampleFilter::default(), ..nowhere };
    assert_eq!(Dataset::open(&["*.tar".to_owned()], &read).unwrap().len(), 5);
}

#[test]
fn a_manifest_is_not_indexed_anew_from_itself() {
    let folder = fixture::shards(&[3], |_| false);
    let set = open(folder.path()).unwrap();
    let manifest = folder.path().join("m.jsonl").to_str().unwrap().to_owned();
    blip2_data::write_manifest(set.shards(), &manifest, &options(folder.path())).unwrap();
    let error = reindex(&[manifest], &options(folder.path())).unwrap_err().to_string();
    assert!(error.contains("m.jsonl: ") && error.contains("name its shards by patterns"), "{error}");
}

#[test]
fn a_question_with_its_answers_needs_no_caption() {
    let folder = tempfile::tempdir().unwrap();
    let image = png(3, 3, 0);
    let members: [(&str, &[u8]); 7] = [
        ("a.png", &image),
        ("a.json", br#"{"question": "what?", "answers": ["net", "nets"]}"#),
        ("b.png", &image),
        ("b.txt", b"a caption"),
        ("b.json", br#"{"question": "how many?", "answers": [{"answer": "2", "answer_id": 1}]}"#),
        ("c.png", &image),
        ("c.txt", b"a caption"),
    ];
    write(folder.path(), "0.tar", &tar(&members));
    let fields = QuestionFields { question: JsonPath::new("question"), answers: JsonPath::new("answers") };
    let captions = CaptionRule { source: CaptionSource::Question(fields), template: None };
    let dataset = Dataset::open(&["0.tar".to_owned()], &OpenOptions { captions, ..options(folder.path()) }).unwrap();
    let read =
        |index| dataset.read(index, Pick::First).map(|raw| (raw.caption, raw.answers)).map_err(|e| e.to_string());
    assert_eq!(read(0).unwrap(), ("what?".into(), vec!["net".into(), "nets".into()]));
    assert_eq!(read(1).unwrap(), ("how many?".into(), vec!["2".into()]));
    assert_eq!(read(2).unwrap_err(), "the sample has no .json member");
    assert!(open(folder.path()).unwrap().read(1, Pick::First).unwrap().answers.is_empty());
}

#[test]
fn an_index_is_kept_and_a_changed_shard_is_noticed() {
    let folder = fixture::shards(&[3], |_| false);
    let index = folder.path().join("00.tar.idx");
    let first = open(folder.path()).unwrap();
    let written = fs::metadata(&index).unwrap().modified().unwrap();
    let again = open(folder.path()).unwrap();
    assert_eq!(fs::metadata(&index).unwrap().modified().unwrap(), written);
    assert_eq!((first.len(), first.digest()), (again.len(), again.digest()));

    write(folder.path(), "00.tar", &tar(&[("new.png", &png(3, 3, 0)), ("new.txt", b"new")]));
    let changed = open(folder.path()).unwrap();
    assert_eq!(keys(&changed), ["new"]);
    assert_ne!(changed.digest(), first.digest());
    // The set that was opened before does not read the new file by the old index.
    assert!(matches!(first.read(0, Pick::First), Err(SampleError::ShardChanged(_))));
}

#[test]
fn a_set_opens_from_its_manifest_without_a_look_at_the_shards() {
    let folder = fixture::shards(&[2, 3], |_| false);
    let all = ["*.tar".to_owned()];
    let shards = reindex(&all, &options(folder.path())).unwrap();
    assert!(shards.iter().all(|shard| shard.contents.is_some()));
    blip2_data::write_manifest(&shards, "manifest.jsonl", &options(folder.path())).unwrap();
    let from_shards = open(folder.path()).unwrap();
    fs::remove_file(folder.path().join("01.tar")).unwrap();
    let opened = Dataset::open(&["manifest.jsonl".to_owned()], &options(folder.path())).unwrap();
    assert_eq!((opened.counts(), opened.digest()), (vec![2, 3], from_shards.digest()));
    assert_eq!(opened.read(1, Pick::First).unwrap(), from_shards.read(1, Pick::First).unwrap());
    assert!(opened.read(2, Pick::First).is_err());
    // A shard that is another by now.
    write(folder.path(), "00.tar", &tar(&[("new.png", &png(3, 3, 0)), ("new.txt", b"new")]));
    let opened = Dataset::open(&["manifest.jsonl".to_owned()], &options(folder.path())).unwrap();
    let error = opened.read(0, Pick::First).unwrap_err();
    assert!(matches!(error, SampleError::ShardChanged(_)) && error.to_string().contains("00.tar changed"), "{error}");
    let both = ["manifest.jsonl".to_owned(), "00.tar".to_owned()];
    let error = Dataset::open(&both, &options(folder.path())).err().unwrap();
    assert!(matches!(error, DataError::DuplicateShard { .. }), "{error}");
}

/// A manifest of 00.tar that says of `samples`, with digests that fit.
fn forged_manifest(folder: &Path, name: &str, samples: u64) {
    let shards = reindex(&["00.tar".to_owned()], &options(folder)).unwrap();
    let shards: Vec<Shard> = shards.into_iter().map(|shard| Shard { samples, ..shard }).collect();
    blip2_data::write_manifest(&shards, name, &options(folder)).unwrap();
}

#[test]
fn a_manifest_with_a_wrong_count_is_an_error_of_its_samples() {
    let folder = fixture::shards(&[3], |_| false);
    for samples in [2, 8] {
        forged_manifest(folder.path(), "manifest.jsonl", samples);
        let dataset = Dataset::open(&["manifest.jsonl".to_owned()], &options(folder.path())).unwrap();
        let reason = format!("it has 3 samples, its manifest says {samples}");
        for index in 0..samples {
            let error = dataset.read(index, Pick::First).unwrap_err().to_string();
            assert!(error.contains(&reason), "{error}");
            assert!(dataset.key(index).unwrap_err().to_string().contains(&reason));
            assert_eq!(dataset.place(index).unwrap().1, index);
        }
        let corpus = Arc::new(dataset.into());
        let mut loader = Loader::new(corpus, fixture::text(), fixture::loader_options()).unwrap();
        let error = loader.next_batch().unwrap_err().to_string();
        assert!(error.contains(&reason) && !error.contains('\n'), "{error}");
        let quarantined = loader.take_quarantined();
        assert_eq!(quarantined.len() as u64, samples);
        assert!(quarantined.iter().all(|entry| entry.shard == "00.tar" && entry.reason.contains(&reason)));
    }
    // Places of a filter are no more than there are samples either.
    let filter = SampleFilter { width: Bounds { min: Some(1.0), max: None }, ..SampleFilter::default() };
    let filtered = OpenOptions { filter, ..options(folder.path()) };
    let error = Dataset::open(&["manifest.jsonl".to_owned()], &filtered).err().unwrap().to_string();
    assert!(error.contains("its manifest says 8"), "{error}");
}

#[test]
fn more_samples_than_can_be_counted_are_an_error() {
    let folder = fixture::shards(&[3], |_| false);
    fs::create_dir(folder.path().join("more")).unwrap();
    fs::copy(folder.path().join("00.tar"), folder.path().join("more/00.tar")).unwrap();
    forged_manifest(folder.path(), "a.jsonl", 1 << 63);
    forged_manifest(&folder.path().join("more"), "b.jsonl", 1 << 63);
    let open = |patterns: &[&str]| {
        let patterns: Vec<String> = patterns.iter().map(|pattern| (*pattern).to_owned()).collect();
        Dataset::open(&patterns, &options(folder.path()))
    };
    let error = open(&["a.jsonl", "more/b.jsonl"]).err().unwrap();
    assert!(matches!(error, DataError::TooManySamples), "{error}");
    let sets = [open(&["a.jsonl"]).unwrap(), open(&["more/b.jsonl"]).unwrap()].map(|set| (set, 1.0));
    let error = Corpus::new(sets.into()).err().unwrap();
    assert!(matches!(error, DataError::TooManySamples), "{error}");
    // In writing one, too.
    let shards = reindex(&["00.tar".to_owned(), "more/00.tar".to_owned()], &options(folder.path())).unwrap();
    let shards: Vec<Shard> = shards.into_iter().map(|shard| Shard { samples: 1 << 63, ..shard }).collect();
    let error = blip2_data::write_manifest(&shards, "c.jsonl", &options(folder.path())).unwrap_err().to_string();
    assert!(error.contains("more than 2^64 samples"), "{error}");
}

#[test]
fn texts_that_would_fill_the_memory_are_not_read() {
    let folder = tempfile::tempdir().unwrap();
    let (image, text) = (png(3, 3, 0), vec![b'x'; 2 << 20]);
    let json = [br#"{"caption": "a", "score": 1, "more": ""#.as_slice(), &text, b"\"}"].concat();
    let members: [(&str, &[u8]); 7] = [
        ("a.png", &image),
        ("a.txt", &text),
        ("b.png", &image),
        ("b.json", &json),
        ("c.png", &image),
        ("c.txt", b"good"),
        ("c.json", br#"{"score": 1}"#),
    ];
    write(folder.path(), "0.tar", &tar(&members));
    let report = verify(&open(folder.path()).unwrap(), Clean::Blip, |_, _| {}).unwrap();
    let reasons: Vec<&str> = report.problems.iter().map(|problem| problem.reason.as_str()).collect();
    let json_reason = format!("its json has {} bytes; at most 1048576 are read", json.len());
    assert_eq!((report.good, reasons), (1, vec!["its txt has 2097152 bytes; at most 1048576 are read", &*json_reason]));
    // Nor for a filter.
    let score = Bounds { min: Some(0.0), max: None };
    let filter = SampleFilter { json: vec![(JsonPath::new("score"), score)], ..SampleFilter::default() };
    let filtered = Dataset::open(&["0.tar".to_owned()], &OpenOptions { filter, ..options(folder.path()) }).unwrap();
    assert_eq!(keys(&filtered), ["c"]);
}

#[cfg(not(feature = "remote"))]
#[test]
fn a_build_without_the_feature_names_it() {
    for pattern in ["s3://bucket/{0..9}.tar", "https://host/0.tar", "az://box/*.tar", "gs://b/manifest.jsonl"] {
        let error = Dataset::open(&[pattern.to_owned()], &blip2_data::OpenOptions::default()).err().unwrap();
        assert!(matches!(error, DataError::NoRemoteFeature { .. }), "{error}");
        assert!(error.to_string().contains("built without the feature `remote`"), "{error}");
    }
}

#[test]
fn an_index_that_is_damaged_or_forged_is_not_believed() {
    let folder = fixture::shards(&[2], |_| false);
    let index = folder.path().join("00.tar.idx");
    open(folder.path()).unwrap();
    let good = fs::read_to_string(&index).unwrap();

    // What a crash leaves of one.
    for torn in ["", &good[..20], "\0\0\0\0"] {
        fs::write(&index, torn).unwrap();
        assert_eq!(open(folder.path()).unwrap().len(), 2);
        assert_eq!(fs::read_to_string(&index).unwrap(), good);
    }

    // The body no longer is what the header's digest says, or is cut: the shard is whole, and no sample of it is lost.
    let (first_line, _) = good.split_once('\n').unwrap();
    for damaged in [good.replace("\"png\"", "\"jpg\""), good[..good.len() - 9].to_owned(), format!("{first_line}\n")] {
        fs::write(&index, damaged).unwrap();
        let dataset = open(folder.path()).unwrap();
        assert_eq!(keys(&dataset), ["0000", "0001"]);
        assert_eq!(dataset.read(1, Pick::First).unwrap().key, "0001");
    }

    // Members far outside the file, under a digest that fits.
    let (header, body) = good.split_once('\n').unwrap();
    let mut forged: serde_json::Value = serde_json::from_str(body).unwrap();
    forged["samples"][0]["image"][1] = serde_json::json!(u64::MAX);
    let forged = forged.to_string();
    let header = header
        .replace(blake3::hash(body.as_bytes()).to_hex().as_str(), blake3::hash(forged.as_bytes()).to_hex().as_str());
    fs::write(&index, format!("{header}\n{forged}")).unwrap();
    assert!(open(folder.path()).unwrap().key(0).unwrap_err().to_string().contains("outside the shard"));

    assert_eq!(reindex(&["*.tar".to_owned()], &options(folder.path())).unwrap().len(), 1);
    // Built anew it has a digest of the whole shard too.
    assert_eq!(fs::read_to_string(&index).unwrap().split_once('\n').unwrap().1, body);
}

#[test]
fn a_file_of_somebody_else_in_an_index_s_place_is_not_written_over() {
    let folder = fixture::shards(&[2], |_| false);
    let (index, cache) = (folder.path().join("00.tar.idx"), tempfile::tempdir().unwrap());
    fs::write(&index, "v1.2 2\n").unwrap();
    let all = ["*.tar".to_owned()];
    for error in [open(folder.path()).err().unwrap(), reindex(&all, &options(folder.path())).err().unwrap()] {
        let line = error.to_string();
        let expected = "00.tar.idx (expected no file there or a blip2-shard-index, got another one: move it away)";
        assert!(line.contains(expected), "{line}");
    }
    let cached = blip2_data::OpenOptions { cache_dir: Some(cache.path().to_owned()), ..options(folder.path()) };
    let dataset = Dataset::open(&all, &cached).unwrap();
    assert_eq!(dataset.len(), 2);
    assert_eq!(fs::read_to_string(&index).unwrap(), "v1.2 2\n");

    // Nor numbers of the samples, nor a captions file that is given as the manifest.
    let numbers = write(folder.path(), "00.tar.attributes", b"mine");
    let filter = SampleFilter { width: Bounds { min: Some(1.0), max: None }, ..SampleFilter::default() };
    let filtered = Dataset::open(&all, &OpenOptions { filter: filter.clone(), ..cached.clone() }).unwrap();
    assert_eq!(filtered.len(), 2);
    fs::remove_file(&index).unwrap();
    let error = Dataset::open(&all, &OpenOptions { filter, ..options(folder.path()) }).err().unwrap().to_string();
    assert!(error.contains("00.tar.attributes: expected no file there or a blip2-shard-attributes"), "{error}");
    let captions = write(folder.path(), "captions.jsonl", b"{\"image\": \"a.png\"}\n");
    let name = captions.to_str().unwrap();
    let error = blip2_data::write_manifest(dataset.shards(), name, &options(folder.path())).unwrap_err().to_string();
    assert!(error.contains("captions.jsonl: expected no file there or a blip2-manifest"), "{error}");
    assert_eq!(fs::read(numbers).unwrap(), b"mine");
    assert!(fs::read_to_string(captions).unwrap().starts_with("{\"image\""));
}

/// Files that would take all memory: a terabyte of zeros instead of an index, or behind its first line.
#[test]
fn no_more_of_an_index_file_is_read_than_an_index_can_have() {
    let folder = fixture::shards(&[2], |_| false);
    let index = folder.path().join("00.tar.idx");
    open(folder.path()).unwrap();
    let (first_line, body) = {
        let text = fs::read_to_string(&index).unwrap();
        let (first_line, body) = text.split_once('\n').unwrap();
        (format!("{first_line}\n"), body.to_owned())
    };
    for start in ["", &first_line] {
        fs::write(&index, start).unwrap();
        fs::OpenOptions::new().write(true).open(&index).unwrap().set_len(1 << 40).unwrap();
        let dataset = open(folder.path()).unwrap();
        assert_eq!(keys(&dataset), ["0000", "0001"]);
    }
    // Where the shard has other samples, too, nothing is believed.
    let header = first_line.replace(blake3::hash(body.as_bytes()).to_hex().as_str(), &"0".repeat(64));
    fs::write(&index, header).unwrap();
    fs::OpenOptions::new().write(true).open(&index).unwrap().set_len(1 << 40).unwrap();
    let error = open(folder.path()).unwrap().key(0).unwrap_err().to_string();
    assert!(error.contains("has more than the ") && error.contains("delete it"), "{error}");
}

#[test]
fn an_index_goes_into_the_cache_when_it_cannot_lie_beside_its_shard() {
    let folder = fixture::shards(&[3], |_| false);
    let cache = tempfile::tempdir().unwrap();
    // A folder of that name refuses the index even to root, whom a mode would not stop.
    fs::create_dir(folder.path().join("00.tar.idx")).unwrap();
    let error = open(folder.path()).err().unwrap();
    assert!(matches!(error, DataError::IndexNotWritable { .. }), "{error}");

    let options = blip2_data::OpenOptions { cache_dir: Some(cache.path().join("made")), ..options(folder.path()) };
    for _ in 0..2 {
        let dataset = Dataset::open(&["*.tar".to_owned()], &options).unwrap();
        assert_eq!(dataset.len(), 3);
    }
    let kept: Vec<_> = fs::read_dir(cache.path().join("made")).unwrap().map(|entry| entry.unwrap()).collect();
    assert_eq!(kept.len(), 1);
    assert_eq!(kept[0].metadata().unwrap().permissions().mode() & 0o777, 0o644);
}

#[test]
fn the_same_shards_elsewhere_have_the_same_digest() {
    let (here, there) = (fixture::shards(&[2, 3], |_| false), fixture::shards(&[2, 3], |_| false));
    assert_eq!(open(here.path()).unwrap().digest(), open(there.path()).unwrap().digest());
    let other = fixture::shards(&[3, 2], |_| false);
    assert_ne!(open(here.path()).unwrap().digest(), open(other.path()).unwrap().digest());
}

#[test]
fn more_shards_than_stay_in_memory_are_read_all_the_same() {
    let folder = fixture::shards(&[1; 80], |_| false);
    let dataset = open(folder.path()).unwrap();
    for index in (0..80).chain(0..80) {
        assert_eq!(dataset.read(index, Pick::First).unwrap().key, format!("{index:04}"));
    }
    assert!(matches!(dataset.read(80, Pick::First), Err(SampleError::NoSuchSample(80))));
    assert!(matches!(dataset.key(80), Err(DataError::OutOfRange { index: 80, len: 80 })));
}

#[test]
fn statistics_count_what_is_there() {
    let folder = fixture::shards(&[4, 6], |index| index == 3);
    let found = stats(&open(folder.path()).unwrap(), |_, _| {}).unwrap();
    assert_eq!((found.shards, found.samples, found.unreadable, found.problems), (2, 10, 1, 0));
    assert_eq!(found.formats.get("PNG"), Some(&9));
    assert_eq!((found.width.min, found.width.max, found.height.median), (9, 9, 7));
    assert_eq!((found.caption_words.min, found.caption_words.max), (3, 7));
}
