//! What keys demand of the file system.

use std::path::{Component, Path, PathBuf};

use blip2_data::DataError;

use super::reader::Reader;
use super::types::{Config, QFormerConfig, WeightsSource};

const RELATIVE: &str = "relative paths start at the current directory";
/// Keys that may name a `.pth` of LAVIS instead of a folder.
const TAKES_LAVIS: [&str; 2] = ["model.vision.weights", "model.qformer.init"];

/// Reports every path that does not lead where it should.
///
/// `promised`: runs that earlier stages of the same command will have made.
pub(super) fn check_files(config: &Config, promised: &[Promised], reader: &mut Reader) {
    let mut folder = |key: &str, path: &Path, marks: &[&str]| {
        if reader.has_failed(key) || (TAKES_LAVIS.contains(&key) && is_lavis_file(path)) {
            return;
        }
        let (got, hint) = if !path.exists() {
            ("which does not exist", RELATIVE)
        } else if !path.is_dir() {
            ("which is a file", "give the folder that it lies in")
        } else if !marks.iter().any(|mark| path.join(mark).exists()) {
            ("which has none", RELATIVE)
        } else {
            return;
        };
        let (expected, got) = (format!("a folder with {}", marks.join(" or ")), format!("{}, {got}", path.display()));
        reader.at(key, |r| r.unexpected(expected, got, Some(hint.into())));
    };
    // What is on a hub is located once everything else is in order.
    let here = |source: &WeightsSource| source.hub_id().is_none();
    if here(&config.model.vision.weights) {
        folder("model.vision.weights", &config.model.vision.weights, &["config.json"]);
    }
    if let Some(language) = config.model.language.as_ref().filter(|language| here(&language.weights)) {
        folder("model.language.weights", &language.weights, &["config.json"]);
    }
    if let Some(tokenizer) = &config.model.qformer.tokenizer {
        folder("model.qformer.tokenizer", tokenizer, &["tokenizer.json", "vocab.txt"]);
    }
    let init = &config.model.qformer.init;
    if !here(init) {
        return;
    }
    match promised.iter().find(|run| config.begins_from(&run.folder)) {
        Some(run) => run.check(config, reader),
        None => folder("model.qformer.init", init, &["config.json", "checkpoints", "MANIFEST.json"]),
    }
}

/// What an earlier stage of the same command will have made.
pub(super) struct Promised {
    pub(super) folder: PathBuf,
    qformer: QFormerConfig,
}

impl Promised {
    pub(super) fn by(config: &Config) -> Promised {
        Promised { folder: config.run_folder(), qformer: config.model.qformer.clone() }
    }

    /// Reports what the stage that begins from it has otherwise.
    fn check(&self, config: &Config, reader: &mut Reader) {
        let (here, there) = (&config.model.qformer, &self.qformer);
        let mut same = |key: &str, here: usize, there: usize| {
            if here != there && !reader.has_failed(key) {
                let expected = format!("{there}, as the stage before trains in {}", self.folder.display());
                reader.at(key, |r| r.unexpected(expected, here.to_string(), None));
            }
        };
        same("model.qformer.query_tokens", here.query_tokens, there.query_tokens);
        let key = "model.qformer.cross_attention_frequency";
        same(key, here.cross_attention_frequency, there.cross_attention_frequency);
    }
}

impl Config {
    /// Whether the Q-Former's first weights come from what lies in this run's folder.
    pub(crate) fn begins_from(&self, run: &Path) -> bool {
        place(&self.model.qformer.init).starts_with(place(run))
    }
}

fn is_lavis_file(path: &Path) -> bool {
    path.is_file() && path.extension().is_some_and(|extension| extension == "pth" || extension == "pt")
}

/// Reports every pattern that names no shard or one that is missing.
pub(super) fn check_shards(config: &Config, reader: &mut Reader) {
    let train = config.data.train.iter().enumerate().map(|(i, set)| (format!("data.train.{i}.shards"), &set.shards));
    let val = config.data.val.iter().map(|set| ("data.val.shards".to_string(), &set.shards));
    for (key, pattern) in train.chain(val) {
        if reader.has_failed(&key) {
            continue;
        }
        if let Err(error) = blip2_data::check_patterns(std::slice::from_ref(pattern), Path::new(".")) {
            let got = match error {
                DataError::Many(problems) => match problems.as_slice() {
                    [first, rest @ ..] => format!("{first} (and {} more)", rest.len()),
                    [] => continue,
                },
                one => one.to_string(),
            };
            reader.at(&key, |r| r.unexpected("a pattern of shards that exist", got, Some(RELATIVE.into())));
        }
    }
}

/// Where a path leads from everywhere, without `.` components: `./runs/a` and `runs/a` are one.
pub(super) fn place(path: &Path) -> PathBuf {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    path.components().filter(|part| *part != Component::CurDir).collect()
}
