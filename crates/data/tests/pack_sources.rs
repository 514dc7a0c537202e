//! What people have besides captions files: img2dataset's folders, COCO, Visual Genome, Parquet.

mod fixture;

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use blip2_data::{Dataset, Keep, PackOptions, PackReport, Pick, Reading, SourceFormat, pack};
use fixture::{options, png, write};

fn pack_options(folder: &Path, source: &str) -> PackOptions {
    PackOptions {
        source: folder.join(source),
        format: SourceFormat::Auto,
        reading: Reading::default(),
        out: folder.join("out"),
        shard_samples: 100,
        reencode: None,
        progress: None,
    }
}

fn refused(options: &PackOptions) -> String {
    let error = pack(options).unwrap_err().to_string();
    assert!(!options.out.exists() && !error.contains('\n'), "{error}");
    error
}

type TextsByKey = Vec<(String, String)>;

/// Captions of the samples, and the text of each `.json`, by key.
fn packed(options_of: &PackOptions) -> (PackReport, TextsByKey, TextsByKey) {
    let report = pack(options_of).unwrap();
    let set = Dataset::open(&["*.tar".to_owned()], &options(&options_of.out)).unwrap();
    assert!(set.problems().is_empty(), "{:?}", set.problems());
    let samples = (0..set.len())
        .map(|at| set.read(at, Pick::First).unwrap())
        .map(|sample| (sample.key, sample.caption))
        .collect();
    let mut texts = Vec::new();
    for shard in &report.shards {
        let mut archive = tar::Archive::new(fs::File::open(shard).unwrap());
        for entry in archive.entries().unwrap() {
            let mut entry = entry.unwrap();
            let name = entry.path().unwrap().display().to_string();
            if name.ends_with(".json") {
                texts.push((name, std::io::read_to_string(&mut entry).unwrap()));
            }
        }
    }
    (report, samples, texts)
}

fn problems(report: &PackReport) -> Vec<String> {
    report.problems.iter().map(|problem| format!("{}: {}", problem.place, problem.reason)).collect()
}

fn pairs(list: &[(&str, &str)]) -> Vec<(String, String)> {
    list.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect()
}

#[test]
fn img2dataset_folders_with_failed_downloads() {
    let folder = tempfile::tempdir().unwrap();
    for (at, below) in ["cc/00000", "cc/00001"].into_iter().enumerate() {
        fs::create_dir_all(folder.path().join(below)).unwrap();
        let file = |name: &str, data: &[u8]| write(folder.path(), &format!("{below}/{name}"), data);
        for sample in 0..2 {
            let key = format!("{at:05}{sample:04}");
            file(&format!("{key}.jpg"), &png(6, 4, sample));
            file(&format!("{key}.txt"), format!("caption {key}").as_bytes());
            let metadata = format!("{{\"url\": \"u{key}\", \"status\": \"success\", \"width\": 6}}");
            file(&format!("{key}.json"), metadata.as_bytes());
        }
        write(folder.path(), &format!("{below}_stats.json"), b"{\"count\": 2}");
        write(folder.path(), &format!("{below}.parquet"), b"not read");
    }
    let failed = br#"{"url": "x", "status": "failed_to_download", "error_message": "HTTP Error 404"}"#;
    write(folder.path(), "cc/00000/000000007.json", failed);
    write(folder.path(), "cc/00000/000000008.jpg", b"<html>");
    write(folder.path(), "cc/00000/000000008.txt", b"a page");
    write(folder.path(), "cc/00001/000010001.png", &png(6, 4, 8));
    write(folder.path(), "cc/00001/000010009.jpg", &png(6, 4, 9));
    write(folder.path(), "cc/00001/000010009.txt", b"caf\xE9");
    let (report, samples, texts) = packed(&pack_options(folder.path(), "cc"));
    let expected = [
        ("000000001", "caption 000000000"),
        ("000000002", "caption 000000001"),
        ("000000005", "caption 000010000"),
        ("000000006", "caption 000010001"),
    ];
    assert_eq!(samples, pairs(&expected));
    assert_eq!(texts[2].1, r#"{"url":"u000010000","status":"success","width":6}"#);
    let problems = problems(&report);
    for (problem, part) in problems.iter().zip([
        "00000/000000007: no picture beside it (failed_to_download: HTTP Error 404)",
        "00000/000000008: ",
        "00001/000010001.png (a second picture): ",
        "00001/000010009: ",
    ]) {
        assert!(problem.contains(part), "{problem}");
    }
    assert!(problems[1].contains("neither JPEG, PNG nor WebP") && problems[3].contains("not UTF-8"), "{problems:?}");
    assert!(problems[2].ends_with("000010001.jpg has the same key and is packed"), "{problems:?}");
    assert_eq!(problems.len(), 4);
}

#[test]
fn names_that_are_shown_alike_are_refused_and_none_is_lost() {
    let folder = tempfile::tempdir().unwrap();
    let set = folder.path().join("set");
    fs::create_dir(&set).unwrap();
    write(&set, "a.txt", b"one");
    write(&set, "a.png", &png(4, 4, 0));
    let options = PackOptions { format: SourceFormat::Img2dataset, ..pack_options(folder.path(), "set") };
    for bytes in [b"b\xFF.png", b"b\xFE.png"] {
        fs::write(set.join(OsStr::from_bytes(bytes)), png(4, 4, 1)).unwrap();
    }
    let error = refused(&options);
    assert!(error.contains("not UTF-8") && error.contains("rename one"), "{error}");
    fs::remove_file(set.join(OsStr::from_bytes(b"b\xFE.png"))).unwrap();
    assert_eq!(pack(&options).unwrap().samples, 1);
}

#[test]
fn img2dataset_s_tar_files_are_shards_already() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir_all(folder.path().join("cc")).unwrap();
    write(folder.path(), "cc/00000.tar", b"tar");
    let error = refused(&pack_options(folder.path(), "cc"));
    assert!(error.contains("shards already"), "{error}");
    write(folder.path(), "cc/00000_stats.json", b"{}");
    write(folder.path(), "cc/00000.parquet", b"parquet");
    let error = refused(&pack_options(folder.path(), "cc"));
    assert!(error.contains("shards already") && error.contains("blip2 shards index"), "{error}");
}

#[test]
fn folders_of_pictures_with_texts_beside_them_or_of_nothing() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir_all(folder.path().join("photos/deep/er")).unwrap();
    let error = refused(&pack_options(folder.path(), "photos"));
    assert!(error.contains("holds no captions file, no Parquet file and no pictures"), "{error}");
    write(folder.path(), "photos/README.txt", b"text");
    write(folder.path(), "photos/deep/er/a.b.PNG", &png(3, 3, 1));
    write(folder.path(), "photos/deep/er/a.b.txt", b"dots in its name");
    write(folder.path(), "photos/deep/lonely.png", &png(3, 3, 1));
    let (report, samples, texts) = packed(&pack_options(folder.path(), "photos"));
    assert_eq!(samples, pairs(&[("000000002", "dots in its name")]));
    assert!(texts.is_empty());
    assert_eq!(problems(&report), ["deep/lonely: caption is empty"]);
    let error =
        refused(&PackOptions { out: folder.path().join("photos/out"), ..pack_options(folder.path(), "photos") });
    assert!(error.contains("lies in") && error.contains("choose a folder beside it"), "{error}");
}

fn coco(folder: &Path, annotations: &str) -> PackOptions {
    fs::create_dir_all(folder.join("val")).unwrap();
    for (at, name) in ["a.jpg", "b.jpg", "c.jpg"].into_iter().enumerate() {
        write(folder, &format!("val/{name}"), &png(4, 4, at as u8));
    }
    let images = r#"[{"id": 10, "file_name": "a.jpg", "height": 4}, {"id": "x", "file_name": "b.jpg"},
        {"id": 12, "file_name": "c.jpg"}, {"id": 13, "file_name": "none.jpg"}, {"id": 14}]"#;
    let text = format!("{{\"info\": {{\"year\": 2017}}, \"annotations\": {annotations}, \"images\": {images}}}");
    write(folder, "captions.json", text.as_bytes());
    let mut options = pack_options(folder, "captions.json");
    options.reading = Reading { images: Some(folder.join("val")), keep: Keep::All, ..Reading::default() };
    options
}

#[test]
fn coco_captions_and_annotations_of_unknown_images() {
    let folder = tempfile::tempdir().unwrap();
    let annotations = r#"[{"image_id": 10, "id": 1, "caption": "one"}, {"image_id": "x", "caption": "two"},
        {"image_id": 99, "caption": "lost"}, {"image_id": 10, "caption": "three"}, {"image_id": 99, "caption": "lost"},
        {"image_id": 13, "caption": "gone"}, {"image_id": 14, "caption": "nameless"}]"#;
    let (report, samples, texts) = packed(&coco(folder.path(), annotations));
    assert_eq!(samples, pairs(&[("000000001", "one"), ("000000002", "two")]));
    let expected =
        [("000000001.json", r#"{"id":10,"height":4,"captions":["one","three"]}"#), ("000000002.json", r#"{"id":"x"}"#)];
    assert_eq!(texts, pairs(&expected));
    let problems = problems(&report);
    let parts = [
        "captions.json: image 3: no annotation names it",
        "none.jpg: No such file",
        "captions.json: image 5: no text field \"file_name\"",
        "captions.json: image 6: 2 annotations name image 99, which images does not list",
    ];
    assert_eq!(problems.len(), parts.len(), "{problems:?}");
    for (problem, part) in problems.iter().zip(parts) {
        assert!(problem.contains(part), "{problem}");
    }
}

#[test]
fn coco_files_of_another_kind() {
    for (annotations, reason) in [
        (r#"[{"image_id": 10, "bbox": [1, 2]}]"#, "annotation 1 has no caption; are these captions?"),
        (r#"[{"caption": "x"}]"#, "annotation 1 has no image_id"),
        ("7", "not COCO captions"),
        ("[", "not COCO captions"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let error = refused(&coco(folder.path(), annotations));
        assert!(error.contains(reason), "{error}");
    }
}

#[test]
fn visual_genome_nested_and_flat() {
    let nested = r#"[{"id": 1, "regions": [{"region_id": 7, "image_id": 1, "phrase": "a hat", "x": 3}, {"image_id": 1, "phrase": "a dog"}]},
        {"id": 2, "regions": [{"phrase": "the sea"}]}, {"id": 3, "regions": []}]"#;
    let flat = r#"[{"region_id": 7, "image_id": 1, "phrase": "a hat"}, {"image_id": 2, "phrase": "the sea"},
        {"image_id": 1, "phrase": "a dog"}]"#;
    for (text, left_out) in [(nested, vec!["regions.json: image 3: caption is empty"]), (flat, vec![])] {
        let folder = tempfile::tempdir().unwrap();
        for (below, name) in [("VG_100K", "1.jpg"), ("VG_100K_2", "2.jpg")] {
            fs::create_dir(folder.path().join(below)).unwrap();
            write(folder.path(), &format!("{below}/{name}"), &png(4, 4, 1));
        }
        write(folder.path(), "regions.json", text.as_bytes());
        let mut options = pack_options(folder.path(), "regions.json");
        options.reading.keep = Keep::All;
        let (report, samples, texts) = packed(&options);
        assert_eq!(samples, pairs(&[("000000001", "a hat"), ("000000002", "the sea")]));
        assert_eq!(texts[0].1, r#"{"image_id":1,"captions":["a hat","a dog"]}"#);
        assert_eq!(problems(&report), left_out);
    }
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), "regions.json", br#"[{"id": 1, "regions": [{"x": 1}]}]"#);
    let mut options = pack_options(folder.path(), "regions.json");
    assert!(refused(&options).contains("entry 1: a region without phrase"));
    options.reading.image_field = Some("image".to_owned());
    let error = refused(&options);
    assert!(error.contains("image_field: expected none, since format visual-genome"), "{error}");
}

#[cfg(feature = "parquet")]
mod parquet {
    use std::sync::Arc;

    use ::parquet::basic::{Compression, ZstdLevel};
    use ::parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
    use ::parquet::file::properties::WriterProperties;
    use ::parquet::file::writer::SerializedFileWriter;
    use ::parquet::schema::parser::parse_message_type;

    use super::*;

    const SCHEMA: &str = "message schema {
        optional group image { optional binary bytes; optional binary path (UTF8); }
        optional binary caption (UTF8);
        optional group texts (LIST) { repeated group list { optional binary element (UTF8); } }
        optional int64 width;
    }";

    /// A row: image, its path, caption, texts.
    type Record<'a> = (Option<Vec<u8>>, Option<&'a str>, Option<&'a str>, Vec<&'a str>);

    fn binary(text: Option<&str>) -> Option<ByteArray> {
        text.map(|text| ByteArray::from(text.as_bytes().to_vec()))
    }

    /// Row groups of two rows; row i has the width i.
    fn file(path: &Path, records: &[Record<'_>], compression: Compression) {
        let schema = Arc::new(parse_message_type(SCHEMA).unwrap());
        let properties = Arc::new(WriterProperties::builder().set_compression(compression).build());
        let mut writer = SerializedFileWriter::new(fs::File::create(path).unwrap(), schema, properties).unwrap();
        for (group, records) in records.chunks(2).enumerate() {
            let mut rows = writer.next_row_group().unwrap();
            let mut optional = |values: Vec<Option<ByteArray>>, parent: Vec<bool>, depth: i16| {
                let levels: Vec<i16> = values
                    .iter()
                    .zip(parent)
                    .map(|(value, parent)| if value.is_some() { depth } else { i16::from(parent && depth == 2) })
                    .collect();
                let values: Vec<ByteArray> = values.into_iter().flatten().collect();
                let mut column = rows.next_column().unwrap().unwrap();
                column.typed::<ByteArrayType>().write_batch(&values, Some(&levels), None).unwrap();
                column.close().unwrap();
            };
            let has_image: Vec<bool> = records.iter().map(|r| r.0.is_some() || r.1.is_some()).collect();
            optional(records.iter().map(|r| r.0.clone().map(ByteArray::from)).collect(), has_image.clone(), 2);
            optional(records.iter().map(|r| binary(r.1)).collect(), has_image.clone(), 2);
            optional(records.iter().map(|r| binary(r.2)).collect(), has_image, 1);
            let (mut values, mut definition, mut repetition) = (Vec::new(), Vec::new(), Vec::new());
            for record in records {
                for (at, text) in record.3.iter().enumerate() {
                    values.extend(binary(Some(text)));
                    definition.push(3);
                    repetition.push(i16::from(at > 0));
                }
                if record.3.is_empty() {
                    definition.push(0);
                    repetition.push(0);
                }
            }
            let mut column = rows.next_column().unwrap().unwrap();
            column.typed::<ByteArrayType>().write_batch(&values, Some(&definition), Some(&repetition)).unwrap();
            column.close().unwrap();
            let widths: Vec<i64> = (0..records.len()).map(|at| (group * 2 + at) as i64).collect();
            let mut column = rows.next_column().unwrap().unwrap();
            column.typed::<Int64Type>().write_batch(&widths, Some(&vec![1; widths.len()]), None).unwrap();
            column.close().unwrap();
            rows.close().unwrap();
        }
        writer.close().unwrap();
    }

    fn records() -> Vec<Record<'static>> {
        vec![
            (Some(png(4, 4, 0)), Some("a.png"), Some("zero"), vec!["one", "two"]),
            (None, None, Some("no image"), vec!["x"]),
            (Some(png(4, 4, 2)), None, None, vec![]),
            (None, Some("beside.png"), Some("three"), vec!["three"]),
            (Some(b"damaged".to_vec()), Some("d.png"), Some("four"), vec!["four"]),
        ]
    }

    #[test]
    fn images_inside_with_every_common_codec() {
        for compression in [
            Compression::UNCOMPRESSED,
            Compression::SNAPPY,
            Compression::GZIP(Default::default()),
            Compression::ZSTD(ZstdLevel::default()),
        ] {
            let folder = tempfile::tempdir().unwrap();
            write(folder.path(), "beside.png", &png(4, 4, 3));
            file(&folder.path().join("train.parquet"), &records(), compression);
            let mut options = pack_options(folder.path(), "train.parquet");
            options.reading.keep = Keep::Fields(vec!["width".to_owned()]);
            let (report, samples, texts) = packed(&options);
            assert_eq!(samples, pairs(&[("000000001", "zero"), ("000000004", "three")]));
            assert_eq!(texts, pairs(&[("000000001.json", r#"{"width":0}"#), ("000000004.json", r#"{"width":3}"#)]));
            let problems = problems(&report);
            let parts = ["row 2: the image is null", "row 3: the caption is null", "row 5: d.png: image: neither JPEG"];
            assert_eq!(problems.len(), parts.len(), "{problems:?}");
            for (problem, part) in problems.iter().zip(parts) {
                assert!(problem.contains(part), "{problem}");
            }
        }
    }

    #[test]
    fn lists_of_texts_and_several_files() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("set/data")).unwrap();
        for name in ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"] {
            file(&folder.path().join("set/data").join(name), &records()[..3], Compression::SNAPPY);
        }
        let mut options = pack_options(folder.path(), "set");
        options.reading = Reading { caption_field: Some("texts".to_owned()), keep: Keep::All, ..Reading::default() };
        let (report, samples, texts) = packed(&options);
        assert_eq!(samples, pairs(&[("000000001", "one"), ("000000004", "one")]));
        assert_eq!(texts[1].1, r#"{"caption":"zero","width":0,"captions":["one","two"]}"#);
        let place = problems(&report)[2].clone();
        assert!(place.starts_with("train-00001-of-00002.parquet: row 2: "), "{place}");
        // Training and test data are not packed together.
        file(&folder.path().join("set/data/test-00000-of-00001.parquet"), &records(), Compression::SNAPPY);
        options.out = folder.path().join("other");
        let error = refused(&options);
        assert!(error.contains("several splits (test, train); name one, as 'train-*.parquet'"), "{error}");
    }

    #[test]
    fn files_that_are_cut_damaged_or_of_other_columns() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("train.parquet");
        file(&path, &records(), Compression::SNAPPY);
        let whole = fs::read(&path).unwrap();
        let options = pack_options(folder.path(), "train.parquet");
        let with = |image: &str, caption: &str, keep: Keep| {
            let (image_field, caption_field) = (Some(image.to_owned()), Some(caption.to_owned()));
            let reading = Reading { image_field, caption_field, keep, images: None };
            refused(&PackOptions { reading, ..options.clone() })
        };
        let names = |name: &str| Keep::Fields(vec![name.to_owned()]);
        for (error, part) in [
            (with("picture", "caption", Keep::Nothing), "no column \"picture\" (it has: image, caption, texts, width)"),
            (with("width", "caption", Keep::Nothing), "column \"width\" is neither bytes nor a struct with bytes"),
            (with("image", "width", Keep::Nothing), "column \"width\" is neither text nor a list of texts"),
            (with("image", "caption", names("height")), "no column \"height\""),
            (with("image", "caption", names("texts")), "column \"texts\" is neither a number nor a text"),
        ] {
            assert!(error.contains(part), "{error}");
        }
        for length in [0, 3, 100, whole.len() - 1] {
            fs::write(&path, &whole[..length]).unwrap();
            let error = refused(&options);
            assert!(error.contains("train.parquet: no whole Parquet file: "), "{error}");
        }
        // A schema of groups in groups would end the reader's stack: version, the list of elements, each with a name and one child.
        let mut footer = vec![0x15, 0x02, 0x19, 0xFC, 0xC0, 0x9A, 0x0C];
        footer.extend([0x48, 0x01, b'a', 0x15, 0x02, 0x00].repeat(200_000));
        let length = (footer.len() as u32).to_le_bytes();
        fs::write(&path, [b"PAR1", &footer[..], &length, b"PAR1"].concat()).unwrap();
        let error = refused(&options);
        assert!(error.contains("train.parquet: its schema nests 199999 levels deep, more than 100"), "{error}");
        file(&path, &[], Compression::SNAPPY);
        assert!(refused(&options).contains("holds no row"));
        // Any byte of the data may be another: rows fail or pass, and nothing ends the program.
        let mut damaged = 0;
        for at in (4..whole.len() / 2).step_by(29) {
            let mut bytes = whole.clone();
            bytes[at] ^= 0xFF;
            fs::write(&path, &bytes).unwrap();
            let out = folder.path().join(format!("out{at}"));
            if let Ok(report) = pack(&PackOptions { out, ..options.clone() }) {
                assert_eq!(report.samples + report.left_out, 5);
                damaged += usize::from(problems(&report).iter().any(|problem| problem.contains("is damaged")));
            }
        }
        assert!(damaged > 0);
    }
}
