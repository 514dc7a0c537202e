//! From a folder of pictures to shards, and back to what is in them.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::{blip2, golden, program_command};

/// Three pictures with captions, and a fourth row whose picture is missing.
fn packed(folder: &Path) -> String {
    let rows = (0..4).map(|i| format!("{{\"image\": \"image_{i}.png\", \"caption\": \"picture number {i}\"}}\n"));
    fs::write(folder.join("captions.jsonl"), rows.collect::<String>()).unwrap();
    for i in 0..3 {
        let name = format!("image_{i}.png");
        fs::copy(golden("stage2_llama").join(&name), folder.join(&name)).unwrap();
    }
    let (captions, out) = (folder.join("captions.jsonl"), folder.join("shards"));
    let arguments = ["--captions".into(), captions, "--out".into(), out, "--shard-samples".into(), "2".into()];
    let ended = blip2(["shards".into(), "pack".into()].into_iter().chain::<[PathBuf; 6]>(arguments));
    assert!(
        ended.stderr.contains("warning: left out: ") && ended.stderr.contains("captions.jsonl:4: "),
        "{}",
        ended.stderr
    );
    ended.success()
}

fn shards(command: &str, folder: &Path, more: &[&str]) -> crate::Ended {
    let pattern = folder.join("shards/*.tar");
    blip2(["shards", command, pattern.to_str().unwrap()].iter().chain(more))
}

#[test]
fn pack_index_verify_stats() {
    let folder = tempfile::tempdir().unwrap();
    let printed = packed(folder.path());
    assert_eq!(printed.lines().last(), Some("3 samples in 2 shards, 1 rows left out"));
    let printed = shards("index", folder.path(), &[]).success();
    assert_eq!(printed.lines().last(), Some("3 samples in 2 shards, 0 problems"));
    assert_eq!(shards("verify", folder.path(), &[]).success(), "3 good samples in 2 shards, 0 problems\n");
    let stats: Value = serde_json::from_str(&shards("stats", folder.path(), &["--json"]).success()).unwrap();
    assert_eq!(stats["samples"], 3);
    assert_eq!(stats["formats"]["PNG"], 3);
    assert_eq!(stats["width"]["median"], 32);
    assert_eq!(stats["caption_words"]["mean"], 3.0);
    assert!(shards("stats", folder.path(), &[]).success().contains("3 samples in 2 shards"));
}

#[test]
fn a_truncated_shard_is_found_and_told() {
    let folder = tempfile::tempdir().unwrap();
    packed(folder.path());
    let path = folder.path().join("shards/00000.tar");
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    let ended = shards("verify", folder.path(), &[]);
    assert_eq!(ended.code, Some(1));
    assert!(ended.stdout.contains("00000.tar"), "{}", ended.stdout);
    assert!(ended.stderr.contains("problems found"), "{}", ended.stderr);
}

/// A server that is always busy.
#[test]
fn shards_that_lie_elsewhere_are_given_up_when_it_is_said() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/0.tar", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for mut client in listener.incoming().flatten() {
            let _ = client.read(&mut [0; 4096]);
            let _ = client.write_all(b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        }
    });
    let cache = tempfile::tempdir().unwrap();
    let stats = |give_up_s: &str| {
        let fixed = ["shards", "stats", &url, "--shard-cache", cache.path().to_str().unwrap(), "--give-up-s"];
        blip2(fixed.iter().chain(&[give_up_s]))
    };
    let begun = Instant::now();
    let message = stats("1").failure();
    assert!(message.contains("503") && message.contains("given up"), "{message}");
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
    assert_eq!(stats("0").code, Some(2));
}

#[test]
fn patterns_that_match_nothing() {
    let folder = tempfile::tempdir().unwrap();
    for command in ["index", "verify", "stats"] {
        let message = shards(command, folder.path(), &[]).failure();
        assert!(message.contains("*.tar"), "{message}");
    }
}

#[test]
fn verify_repairs_into_another_folder() {
    let folder = tempfile::tempdir().unwrap();
    packed(folder.path());
    let path = folder.path().join("shards/00000.tar");
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() - 2000]).unwrap();
    let out = folder.path().join("repaired");
    let printed = shards("verify", folder.path(), &["--repair", out.to_str().unwrap()]).success();
    for part in [
        "00000.tar: damaged or cut at byte",
        "00000.tar: rewritten, 1 samples",
        "00001.tar: whole, hard link, 1 samples",
    ] {
        assert!(printed.contains(part), "{part}: {printed}");
    }
    assert_eq!(printed.lines().last(), Some("2 samples in 2 shards"));
    let pattern = out.join("*.tar");
    let printed = blip2(["shards", "verify", pattern.to_str().unwrap()]).success();
    assert_eq!(printed, "2 good samples in 2 shards, 0 problems\n");
    let message = shards("verify", folder.path(), &["--repair", out.to_str().unwrap()]).failure();
    assert!(message.contains("already exists"), "{message}");
}

#[test]
fn a_contact_sheet_shows_samples() {
    let folder = tempfile::tempdir().unwrap();
    packed(folder.path());
    let sheets = ["a.png", "b.png"].map(|name| folder.path().join(name));
    for sheet in &sheets {
        let more = ["--sheet", sheet.to_str().unwrap(), "--samples", "2", "--seed", "3"];
        let ended = shards("stats", folder.path(), &more);
        assert!(ended.stderr.contains("contact sheet of 2 samples"), "{}", ended.stderr);
        assert!(ended.success().contains("width/height %"));
    }
    let sheet = image::open(&sheets[0]).unwrap().into_rgb8();
    assert_eq!(sheet.dimensions(), (2 * 204, 204 + 64));
    assert!(sheet.pixels().any(|pixel| pixel.0 == [30, 30, 30]), "no text");
    assert!(fs::read(&sheets[0]).unwrap() == fs::read(&sheets[1]).unwrap());
}

#[test]
fn sources_have_flags_of_their_own() {
    let folder = tempfile::tempdir().unwrap();
    fs::copy(golden("stage2_llama").join("image_0.png"), folder.path().join("a.png")).unwrap();
    fs::write(folder.path().join("pairs.csv"), "id,text,file_name\n7,\"a, b\",a.png\n").unwrap();
    let pack = |more: &[&str]| {
        let (source, out) = (folder.path().join("pairs.csv"), folder.path().join("out"));
        let start = ["shards", "pack", "--source", source.to_str().unwrap(), "--out", out.to_str().unwrap()];
        blip2(start.iter().chain(more))
    };
    let message = pack(&[]).failure();
    assert!(message.contains("no column \"image\" (it has: id, text, file_name)"), "{message}");
    let fields = ["--image-field", "file_name", "--caption-field", "text", "--keep-field", "id"];
    let printed = pack(&[&fields[..], &["--longest-side", "16", "--json"]].concat()).success();
    let report: Value = serde_json::from_str(&printed).unwrap();
    assert_eq!((&report["samples"], &report["left_out"]), (&1.into(), &0.into()));
    let message = pack(&fields).failure();
    assert!(message.contains("another packing") && message.contains("longest_side: 16 there, null now"), "{message}");
    assert_eq!(pack(&["--captions", "x"]).code, Some(2));
    assert_eq!(pack(&["--quality", "90"]).code, Some(2));
}

/// Pictures in which nothing repeats, so that decoding and writing take their time, and rows that fail among them.
fn many_pairs(folder: &Path, count: usize) -> PathBuf {
    let mut state = 1u32;
    let mut rows = String::new();
    for at in 0..count {
        let picture = image::RgbImage::from_fn(160, 120, |_, _| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            image::Rgb([(state >> 24) as u8, (state >> 16) as u8, (state >> 8) as u8])
        });
        if at % 11 != 3 {
            picture.save(folder.join(format!("{at}.png"))).unwrap();
        }
        rows += &format!("{at}.png\tpicture {at}\n");
    }
    let captions = folder.join("captions.tsv");
    fs::write(&captions, rows).unwrap();
    captions
}

/// All that is a function of the input; an index's first line has the time of its shard.
fn contents(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let read = |path: PathBuf| {
        let bytes = fs::read(&path).unwrap();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        let start = if name.ends_with(".idx") { bytes.iter().position(|&byte| byte == b'\n').unwrap() } else { 0 };
        (name, bytes[start..].to_vec())
    };
    fs::read_dir(folder).unwrap().map(|entry| read(entry.unwrap().path())).collect()
}

#[test]
fn a_packing_that_is_killed_again_and_again_ends_with_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let captions = many_pairs(folder.path(), 240);
    let command = |out: &str| {
        let mut command = program_command(env!("CARGO_BIN_EXE_blip2"));
        command.args(["shards", "pack", "--shard-samples", "4", "--captions"]).arg(&captions);
        command.arg("--out").arg(folder.path().join(out)).stdout(Stdio::null()).stderr(Stdio::null());
        command
    };
    assert!(command("whole").status().unwrap().success());
    let out = folder.path().join("out");
    let files = || fs::read_dir(&out).map_or(0, Iterator::count);
    let mut killed = 0usize;
    loop {
        // Killed by what it has done, not by the clock: some way into the writing of one of the next few files.
        let enough = files() + 1 + killed % 5;
        let mut packing = command("out").spawn().unwrap();
        while files() < enough && packing.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_micros(200));
        }
        std::thread::sleep(Duration::from_micros(700 * (killed as u64 % 4)));
        // An ended program is not killed; what it left is whole then.
        packing.kill().unwrap();
        if packing.wait().unwrap().success() {
            break;
        }
        killed += 1;
    }
    assert!(killed >= 20, "killed {killed} times only");
    assert!(command("out").status().unwrap().success());
    assert!(contents(&out) == contents(&folder.path().join("whole")));
}

#[test]
fn bench_loader_tells_images_a_second_and_where_the_time_goes() {
    let folder = tempfile::tempdir().unwrap();
    packed(folder.path());
    let pattern = folder.path().join("shards/*.tar");
    let bench = |more: &[&str]| {
        let fixed = ["bench", "loader", pattern.to_str().unwrap(), "--threads", "1", "--batch", "2", "--size", "16"];
        blip2(fixed.iter().chain(more))
    };
    let report: Value = serde_json::from_str(&bench(&["--json"]).success()).unwrap();
    assert_eq!((&report["images"], &report["threads"], &report["tokenised"]), (&4.into(), &1.into(), &false.into()));
    let seconds = |value: &Value| value.as_f64().unwrap();
    assert!(seconds(&report["images_per_s"]) > 0.0 && seconds(&report["mb_per_s"]) > 0.0, "{report}");
    let timings = &report["timings"];
    let spent: f64 = ["read_s", "text_s", "decode_s", "resize_s"].iter().map(|phase| seconds(&timings[*phase])).sum();
    assert!(spent > 0.0 && seconds(&report["wait_s"]) <= seconds(&report["seconds"]), "{report}");

    let tokenizer = golden("stage2_llama");
    let printed = bench(&["--augment", "none", "--tokenizer", tokenizer.to_str().unwrap()]).success();
    assert!(printed.starts_with("4 images in ") && printed.contains(" images/s, "), "{printed}");
    for phase in ["read ", "decode ", "resize ", "text ", "idle ", "wait for a batch "] {
        assert!(printed.lines().any(|line| line.starts_with(phase) && line.contains(" %")), "{printed}");
    }
    let ended = bench(&["--tokenizer", folder.path().to_str().unwrap()]);
    assert_eq!(ended.code, Some(1));
    assert!(ended.stderr.starts_with("error: tokenizer ") && ended.stdout.is_empty(), "{}", ended.stderr);
}

#[test]
fn bench_pack_tells_pictures_a_second_and_memory_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let captions = many_pairs(folder.path(), 22);
    let scratch = folder.path().join("scratch");
    fs::create_dir(&scratch).unwrap();
    let bench = |more: &[&str]| {
        let fixed = ["bench", "pack", "--captions", captions.to_str().unwrap(), "--scratch", scratch.to_str().unwrap()];
        blip2(fixed.iter().chain(more))
    };
    let report = |more: &[&str]| {
        let more = [&["--json", "--threads", "1", "--shard-samples", "8"][..], more].concat();
        serde_json::from_str::<Value>(&bench(&more).success()).unwrap()
    };
    let [whole, smaller] = [report(&[]), report(&["--longest-side", "40"])];
    for report in [&whole, &smaller] {
        assert_eq!((&report["pictures"], &report["left_out"], &report["threads"]), (&20.into(), &2.into(), &1.into()));
        for name in ["seconds", "pictures_per_s", "mb_per_s", "shards_mb", "peak_memory_mib"] {
            assert!(report[name].as_f64().unwrap() > 0.0, "{name}: {report}");
        }
    }
    assert_eq!((&whole["longest_side"], &smaller["longest_side"]), (&Value::Null, &40.into()));
    assert!(smaller["shards_mb"].as_f64() < whole["shards_mb"].as_f64());
    let printed = bench(&["--longest-side", "40"]).success();
    for part in ["20 pictures shrunk to 40 pixels in ", " pictures/s, ", "2 rows left out", " MiB of memory at most"] {
        assert!(printed.contains(part), "{part}: {printed}");
    }
    assert_eq!(fs::read_dir(&scratch).unwrap().count(), 0);
}
