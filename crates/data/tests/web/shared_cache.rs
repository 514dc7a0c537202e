//! What lies in a shard cache: built once, believed only where it fits.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

use blip2_data::{Clean, DataError, Dataset, OpenOptions, Pick, reindex, stats, verify};

use crate::cache::{files, remote_options};
use crate::fixture::{open, png, shards, tar, write};
use crate::server::WebServer;

/// A folder of shards behind a web server, without indices beside them, and a cache.
struct Set {
    folder: tempfile::TempDir,
    server: WebServer,
    cache: tempfile::TempDir,
}

impl Set {
    fn of(counts: &[usize]) -> Set {
        let folder = shards(counts, |_| false);
        let server = WebServer::start(folder.path(), |_| true);
        Set { folder, server, cache: tempfile::tempdir().unwrap() }
    }

    fn options(&self, max_bytes: u64) -> OpenOptions {
        remote_options(self.server.address, self.cache.path(), max_bytes)
    }

    fn patterns(&self, names: &str) -> [String; 1] {
        [format!("http://{}/set/{names}.tar", self.server.address)]
    }

    fn open(&self, names: &str) -> Dataset {
        Dataset::open(&self.patterns(names), &self.options(1 << 30)).unwrap()
    }
}

fn only_file(cache: &Path) -> std::path::PathBuf {
    let found = files(cache, "tar");
    assert_eq!(found.len(), 1);
    found[0].clone()
}

#[test]
fn a_damaged_file_of_the_cache_is_fetched_again_and_no_changed_shard() {
    let set = Set::of(&[3]);
    let dataset = set.open("00");
    let cached = only_file(set.cache.path());
    let whole = fs::read(&cached).unwrap();
    let damage: [(&str, &dyn Fn()); 3] = [
        ("cut", &|| fs::File::options().write(true).open(&cached).unwrap().set_len(whole.len() as u64 / 2).unwrap()),
        ("emptied", &|| fs::write(&cached, "").unwrap()),
        // The name of its first member.
        ("overwritten", &|| fs::File::options().write(true).open(&cached).unwrap().write_all_at(b"xx", 0).unwrap()),
    ];
    for (what, damage) in damage {
        damage();
        // A set that was opened anew, and has read nothing yet.
        let fetched = set.server.asked_for("00.tar");
        let again = set.open("00");
        assert_eq!(again.digest(), dataset.digest(), "{what}");
        let local = open(set.folder.path());
        for sample in 0..3 {
            assert_eq!(again.read(sample, Pick::First).unwrap(), local.read(sample, Pick::First).unwrap(), "{what}");
        }
        assert_eq!(set.server.asked_for("00.tar"), fetched + 1, "{what}");
        assert!(fs::read(&cached).unwrap() == whole, "{what}");
    }
}

#[test]
fn a_shard_that_is_not_what_its_manifest_says_is_fetched_for_it_once_and_not_for_each_sample() {
    let set = Set::of(&[5]);
    let dataset = set.open("00");
    // A manifest of another index, as an older scan may have written it.
    let manifest = set.folder.path().join("m.jsonl");
    let other = shards(&[4], |_| false);
    let mut known = dataset.shards().to_vec();
    known[0].index = open(other.path()).shards()[0].index;
    known[0].contents = None;
    blip2_data::write_manifest(&known, manifest.to_str().unwrap(), &OpenOptions::default()).unwrap();
    let fetched = set.server.asked_for("00.tar");
    let wrong = Dataset::open(&[manifest.to_str().unwrap().to_owned()], &set.options(1 << 30)).unwrap();
    for sample in 0..5 {
        let error = wrong.read(sample, Pick::First).unwrap_err().to_string();
        assert!(error.contains("not those that were indexed"), "{error}");
    }
    // What arrives is tried three times, and told to all samples then.
    assert!(set.server.asked_for("00.tar") <= fetched + 3, "{}", set.server.asked_for("00.tar"));
}

#[test]
fn an_index_that_is_built_anew_is_not_built_from_a_damaged_file() {
    let set = Set::of(&[3]);
    let dataset = set.open("00");
    let cached = only_file(set.cache.path());
    fs::File::options().write(true).open(&cached).unwrap().write_all_at(b"xx", 0).unwrap();
    let shards = reindex(&set.patterns("00"), &set.options(1 << 30)).unwrap();
    assert_eq!(shards, dataset.shards());
}

#[test]
fn a_manifest_without_the_shards_that_could_not_be_read_is_not_kept() {
    let set = Set::of(&[3, 4]);
    let second = fs::read(set.folder.path().join("01.tar")).unwrap();
    fs::remove_file(set.folder.path().join("01.tar")).unwrap();
    let tolerant = OpenOptions { tolerate_unreadable: true, ..set.options(1 << 30) };
    let part = Dataset::open(&set.patterns("{00..01}"), &tolerant).unwrap();
    assert_eq!((part.counts(), part.problems().len()), (vec![3], 1));
    write(set.folder.path(), "01.tar", &second);
    assert_eq!(set.open("{00..01}").counts(), [3, 4]);
}

#[test]
fn of_many_who_open_a_set_one_looks_at_its_shards() {
    let set = Set::of(&[3, 4, 5]);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| assert_eq!(set.open("{00..02}").counts(), [3, 4, 5]));
        }
    });
    for shard in ["00", "01", "02"] {
        assert_eq!(set.server.asked_for(&format!("{shard}.tar.idx")), 1);
    }
}

#[test]
fn a_whole_pass_fetches_each_shard_once_through_a_small_cache() {
    let set = Set::of(&[20; 6]);
    let longest = files(set.folder.path(), "tar").into_iter().map(|path| fs::metadata(path).unwrap().len()).max();
    let options = set.options(2 * longest.unwrap());
    let dataset = Dataset::open(&set.patterns("{00..05}"), &options).unwrap();
    let fetched = || (0..6).map(|shard| set.server.asked_for(&format!("0{shard}.tar"))).sum::<usize>();
    let before = fetched();
    assert_eq!(verify(&dataset, Clean::Blip, |_, _| {}).unwrap().good, 120);
    // The last two may be there still.
    assert!((4..=6).contains(&(fetched() - before)), "{}", fetched() - before);
    let before = fetched();
    assert_eq!(stats(&dataset, |_, _| {}).unwrap().width.max, 9);
    assert!(fetched() - before <= 6, "{}", fetched() - before);
}

#[test]
fn a_cache_that_is_gone_is_blamed_on_no_sample() {
    let set = Set::of(&[3, 3]);
    let dataset = set.open("{00..01}");
    let away = set.cache.path().with_extension("away");
    fs::rename(set.cache.path(), &away).unwrap();
    let error = verify(&dataset, Clean::Blip, |_, _| {}).unwrap_err();
    assert!(matches!(error, DataError::ShardCache { .. }), "{error}");
    assert!(matches!(stats(&dataset, |_, _| {}), Err(DataError::ShardCache { .. })));
    fs::rename(&away, set.cache.path()).unwrap();
    assert_eq!(verify(&dataset, Clean::Blip, |_, _| {}).unwrap().good, 6);
}

#[test]
fn a_pass_over_unreadable_shards_ends_where_the_cache_is_at_fault() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), "00.tar", &tar(&[("a.png", &png(3, 3, 0)), ("a.txt", b"text")]));
    let server = WebServer::start(folder.path(), |_| true);
    let cache = tempfile::tempdir().unwrap();
    let patterns = [format!("http://{}/set/00.tar", server.address)];
    // Too small for any shard: whatever is tolerated, this is no shard's fault.
    let options = OpenOptions { tolerate_unreadable: true, ..remote_options(server.address, cache.path(), 100) };
    let error = Dataset::open(&patterns, &options).err().unwrap();
    assert!(matches!(error, DataError::ShardCacheTooSmall { .. }), "{error}");
}
