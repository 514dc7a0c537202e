//! What keys demand of each other and of the file system.

use std::path::{Component, Path, PathBuf};

use blip2_data::{DataError, Interleave};

use super::reader::Reader;
use super::types::{
    Augment, BoundsConfig, Config, DeviceChoice, FeatureCache, FeatureFormat, Precision, QFormerConfig, Stage,
    TextField, WARMUP_STEPS, WeightsSource,
};
use super::value::Leaf;

const RELATIVE: &str = "relative paths start at the current directory";
/// Keys that may name a `.pth` of LAVIS instead of a folder.
const TAKES_LAVIS: [&str; 2] = ["model.vision.weights", "model.qformer.init"];

/// Reports every contradiction between keys; what involves a key that was reported already is left alone.
pub(super) fn check_keys(config: &Config, reader: &mut Reader) {
    let mut check = |key: &str, others: &[&str], holds: bool, expected: String, got: String, hint: &str| {
        if !holds && !reader.has_failed(key) && !others.iter().any(|other| reader.has_failed(other)) {
            let hint = (!hint.is_empty()).then(|| hint.to_string());
            reader.at(key, |r| r.unexpected(expected, got, hint));
        }
    };
    let Config { run, task, model, data, optimizer, schedule, checkpoint, eval, .. } = config;
    let stage_one = task.stage == Stage::One;

    check(
        "model.language",
        &["task.stage"],
        !(stage_one && model.language.is_some()),
        "no such section in stage 1".into(),
        "one".into(),
        "delete it, or set task.stage: 2",
    );
    check(
        "model.language",
        &["task.stage"],
        stage_one || model.language.is_some(),
        "a section with weights in stage 2".into(),
        "nothing".into(),
        "name the language model's directory",
    );
    check(
        "run.precision",
        &["run.device"],
        !(run.precision == Precision::Fp16 && run.device == DeviceChoice::Cpu),
        "fp32 | bf16 on run.device: cpu".into(),
        run.precision.to_string(),
        "fp16 with loss scaling is for CUDA; bf16 needs none",
    );

    let weights = &task.losses;
    check(
        "task.losses",
        &["task.stage"],
        !stage_one || weights.itc + weights.itm + weights.itg > 0.0,
        "at least one weight above 0".into(),
        "0 for all".into(),
        "",
    );
    let negatives = config.micro_batch();
    check(
        if schedule.micro_batch.is_some() { "schedule.micro_batch" } else { "schedule.global_batch" },
        &["task.stage", "task.losses", "schedule"],
        !stage_one || weights.itm + weights.itc == 0.0 || negatives >= 2,
        "at least 2 in stage 1".into(),
        negatives.to_string(),
        "a sample alone has no negative for ITC and ITM",
    );
    if let Some(micro_batch) = schedule.micro_batch {
        check(
            "schedule.micro_batch",
            &["schedule.global_batch"],
            schedule.global_batch.is_multiple_of(micro_batch.max(1)),
            format!("a divisor of schedule.global_batch ({})", schedule.global_batch),
            micro_batch.to_string(),
            "",
        );
    }
    check(
        "data.lanes",
        &["schedule.global_batch"],
        schedule.global_batch.is_multiple_of(data.lanes.max(1)),
        format!("a divisor of schedule.global_batch ({})", schedule.global_batch),
        data.lanes.to_string(),
        "",
    );
    check(
        "data.feature_cache",
        &["data.image.augment"],
        !(data.feature_cache == FeatureCache::Memory && data.image.augment == Augment::CropFlip),
        "off | a folder with data.image.augment: crop_flip".into(),
        "memory".into(),
        "memory keeps one view of each image; set data.image.augment: none to use it",
    );

    check(
        "data.feature_views",
        &["data.image.augment"],
        data.feature_views == 1 || data.image.augment != Augment::None,
        "1 with data.image.augment: none".into(),
        data.feature_views.to_string(),
        "without augmentation an image has a single view",
    );
    let on_disk = matches!(data.feature_cache, FeatureCache::Directory(_));
    for (key, default, got) in [
        ("data.feature_views", data.feature_views == 1, data.feature_views.to_string()),
        ("data.feature_format", data.feature_format == FeatureFormat::Bf16, data.feature_format.to_string()),
        (
            "data.feature_max_gib",
            data.feature_max_gib.is_none(),
            data.feature_max_gib.map_or(String::new(), |gib| gib.to_string()),
        ),
    ] {
        let expected = format!("no such key with data.feature_cache: {}", data.feature_cache.encode());
        let hint = "it is about features in a folder; name one in data.feature_cache";
        check(key, &["data.feature_cache"], on_disk || default, expected, got, hint);
    }

    // The default alone is no contradiction: a short run is told of it when it starts.
    let chosen = optimizer.warmup_steps != WARMUP_STEPS;
    check(
        "optimizer.warmup_steps",
        &["schedule.steps"],
        !chosen || optimizer.warmup_steps <= schedule.steps,
        format!("at most schedule.steps ({})", schedule.steps),
        optimizer.warmup_steps.to_string(),
        "",
    );
    for (key, value) in
        [("optimizer.min_lr", optimizer.min_lr), ("optimizer.warmup_start_lr", optimizer.warmup_start_lr)]
    {
        let expected = format!("at most optimizer.lr ({:?})", optimizer.lr);
        check(key, &["optimizer.lr"], value <= optimizer.lr, expected, format!("{value:?}"), "");
    }

    let sets = data
        .train
        .iter()
        .enumerate()
        .map(|(i, set)| (format!("data.train.{i}"), &set.text, &set.captions, &set.filter));
    let held_out = data.val.iter().map(|set| ("data.val".to_string(), &set.text, &set.captions, &set.filter));
    for (key, text, captions, filter) in sets.chain(held_out) {
        check(
            &format!("{key}.captions"),
            &[&format!("{key}.text")],
            captions.is_none() || *text == TextField::Auto,
            format!("null with {key}.text"),
            "a list of captions".into(),
            "give one of the two",
        );
        let mut bounds = vec![
            ("width".to_string(), &filter.width),
            ("height".to_string(), &filter.height),
            ("aspect".to_string(), &filter.aspect),
            ("caption_words".to_string(), &filter.caption_words),
        ];
        bounds.extend(filter.json.0.iter().map(|(field, bounds)| (format!("json.{field}"), bounds)));
        for (name, BoundsConfig { min, max }) in bounds {
            let (Some(min), Some(max)) = (min, max) else { continue };
            check(
                &format!("{key}.filter.{name}"),
                &[],
                min <= max,
                format!("min at most max ({max:?})"),
                format!("{min:?}"),
                "no sample passes",
            );
        }
    }
    let weights: Vec<f64> = data.train.iter().map(|set| set.weight).collect();
    if let Err(error) = Interleave::new(&weights) {
        let expected = "weights with few digits, as 0.7 and 0.3".to_string();
        check("data.train", &[], weights.is_empty(), expected, error.to_string(), "");
    }
    let mut names: Vec<&String> = data.train.iter().filter_map(|set| set.name.as_ref()).collect();
    names.sort();
    let twice = names.windows(2).find(|pair| pair[0] == pair[1]).map(|pair| pair[0].clone());
    check(
        "data.train",
        &[],
        twice.is_none(),
        "a name for each set".into(),
        format!("{} twice", twice.clone().unwrap_or_default()),
        "",
    );

    let Some(best) = checkpoint.best else { return };
    check(
        "checkpoint.best",
        &["data.val"],
        data.val.is_some(),
        "null without data.val".into(),
        best.to_string(),
        "name held-out shards in data.val.shards",
    );
    check(
        "checkpoint.best",
        &["task.stage", "eval.retrieval"],
        !best.is_retrieval() || (stage_one && eval.retrieval),
        "val_loss where no retrieval is measured".into(),
        best.to_string(),
        "retrieval needs stage 1 and eval.retrieval: true",
    );
    check(
        "eval.every",
        &["checkpoint"],
        eval.every.is_multiple_of(checkpoint.every.max(1)) || checkpoint.every.is_multiple_of(eval.every.max(1)),
        format!("a multiple or a divisor of checkpoint.every ({}) with checkpoint.best", checkpoint.every),
        eval.every.to_string(),
        "only a checkpoint that is evaluated can be the best",
    );
}

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
