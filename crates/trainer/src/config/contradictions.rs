//! What keys demand of each other.

use blip2_data::Interleave;

use super::reader::Reader;
use super::types::{
    Augment, BoundsConfig, Config, DeviceChoice, FeatureCache, FeatureFormat, FilterConfig, JpegSize, Precision, Stage,
    TextField, TrainSetConfig, ValSetConfig, WARMUP_STEPS,
};
use super::value::Leaf;

/// Reports every contradiction between keys; what involves a key that was reported already is left alone.
pub(super) fn check_keys(config: &Config, reader: &mut Reader) {
    let mut keys = Keys { config, reader };
    keys.agree_on_the_stage();
    keys.agree_on_batches();
    keys.agree_on_the_feature_cache();
    keys.agree_on_the_learning_rate();
    keys.agree_on_data_sets();
    keys.agree_on_the_best_checkpoint();
}

/// The keys of one file, with what hears of their contradictions.
struct Keys<'a, 'r> {
    config: &'a Config,
    reader: &'a mut Reader<'r>,
}

impl Keys<'_, '_> {
    /// Reports `key` where its demand does not hold; `others` are the keys that it depends on.
    fn demand(
        &mut self,
        key: &str,
        others: &[&str],
        holds: bool,
        expected: impl Into<String>,
        got: impl Into<String>,
        hint: &str,
    ) {
        if !holds && !self.reader.has_failed(key) && !others.iter().any(|other| self.reader.has_failed(other)) {
            let hint = (!hint.is_empty()).then(|| hint.to_string());
            self.reader.at(key, |r| r.unexpected(expected, got.into(), hint));
        }
    }

    fn agree_on_the_stage(&mut self) {
        let Config { run, task, model, .. } = self.config;
        let stage_one = task.stage == Stage::One;
        self.demand(
            "model.language",
            &["task.stage"],
            !(stage_one && model.language.is_some()),
            "no such section in stage 1",
            "one",
            "delete it, or set task.stage: 2",
        );
        self.demand(
            "model.language",
            &["task.stage"],
            stage_one || model.language.is_some(),
            "a section with weights in stage 2",
            "nothing",
            "name the language model's directory",
        );
        self.demand(
            "run.precision",
            &["run.device"],
            !(run.precision == Precision::Fp16 && run.device == DeviceChoice::Cpu),
            "fp32 | bf16 on run.device: cpu",
            run.precision.to_string(),
            "fp16 with loss scaling is for CUDA; bf16 needs none",
        );
        let weights = &task.losses;
        self.demand(
            "task.losses",
            &["task.stage"],
            !stage_one || weights.itc + weights.itm + weights.itg > 0.0,
            "at least one weight above 0",
            "0 for all",
            "",
        );
    }

    fn agree_on_batches(&mut self) {
        let Config { task, data, schedule, .. } = self.config;
        let weights = &task.losses;
        let negatives = self.config.micro_batch();
        self.demand(
            if schedule.micro_batch.is_some() { "schedule.micro_batch" } else { "schedule.global_batch" },
            &["task.stage", "task.losses", "schedule"],
            task.stage != Stage::One || weights.itm + weights.itc == 0.0 || negatives >= 2,
            "at least 2 in stage 1",
            negatives.to_string(),
            "a sample alone has no negative for ITC and ITM",
        );
        let parts = [("schedule.micro_batch", schedule.micro_batch), ("data.lanes", Some(data.lanes))];
        for (key, part) in parts.into_iter().filter_map(|(key, part)| Some((key, part?))) {
            self.demand(
                key,
                &["schedule.global_batch"],
                schedule.global_batch.is_multiple_of(part.max(1)),
                format!("a divisor of schedule.global_batch ({})", schedule.global_batch),
                part.to_string(),
                "",
            );
        }
    }

    fn agree_on_the_feature_cache(&mut self) {
        let data = &self.config.data;
        self.demand(
            "data.feature_cache",
            &["data.image.augment"],
            !(data.feature_cache == FeatureCache::Memory && data.image.augment == Augment::CropFlip),
            "off | a folder with data.image.augment: crop_flip",
            "memory",
            "memory keeps one view of each image; set data.image.augment: none to use it",
        );
        self.demand(
            "data.feature_views",
            &["data.image.augment"],
            data.feature_views == 1 || data.image.augment != Augment::None,
            "1 with data.image.augment: none",
            data.feature_views.to_string(),
            "without augmentation an image has a single view",
        );
        self.demand(
            "data.image.jpegs",
            &["data.feature_cache"],
            data.image.jpegs == JpegSize::Full || data.feature_cache != FeatureCache::Memory,
            "full with data.feature_cache: memory",
            data.image.jpegs.as_str(),
            "each image is decoded once then",
        );
        let on_disk = matches!(data.feature_cache, FeatureCache::Directory(_));
        let max_gib = data.feature_max_gib.map_or(String::new(), |gib| gib.to_string());
        for (key, is_default, got) in [
            ("data.feature_views", data.feature_views == 1, data.feature_views.to_string()),
            (
                "data.feature_format",
                data.feature_format == FeatureFormat::Bf16,
                data.feature_format.as_str().to_string(),
            ),
            ("data.feature_max_gib", data.feature_max_gib.is_none(), max_gib),
        ] {
            let expected = format!("no such key with data.feature_cache: {}", data.feature_cache.encode());
            let hint = "it is about features in a folder; name one in data.feature_cache";
            self.demand(key, &["data.feature_cache"], on_disk || is_default, expected, got, hint);
        }
    }

    fn agree_on_the_learning_rate(&mut self) {
        let Config { optimizer, schedule, .. } = self.config;
        // The default alone is no contradiction: a short run is told of it when it starts.
        let chosen = optimizer.warmup_steps != WARMUP_STEPS;
        self.demand(
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
            self.demand(key, &["optimizer.lr"], value <= optimizer.lr, expected, format!("{value:?}"), "");
        }
    }

    fn agree_on_data_sets(&mut self) {
        let data = &self.config.data;
        for (place, TrainSetConfig { text, captions, filter, .. }) in data.train.iter().enumerate() {
            self.agree_on_one_set(
                &format!("data.train.{place}"),
                captions.is_none() || *text == TextField::Auto,
                filter,
            );
        }
        if let Some(ValSetConfig { text, captions, filter, .. }) = &data.val {
            self.agree_on_one_set("data.val", captions.is_none() || *text == TextField::Auto, filter);
        }
        let weights: Vec<f64> = data.train.iter().map(|set| set.weight).collect();
        if let Err(error) = Interleave::new(&weights) {
            let expected = "weights with few digits, as 0.7 and 0.3";
            self.demand("data.train", &[], weights.is_empty(), expected, error.to_string(), "");
        }
        let mut names: Vec<&String> = data.train.iter().filter_map(|set| set.name.as_ref()).collect();
        names.sort();
        if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            self.demand("data.train", &[], false, "a name for each set", format!("{} twice", pair[0]), "");
        }
    }

    /// `one_text`: whether its captions are in one place only.
    fn agree_on_one_set(&mut self, key: &str, one_text: bool, filter: &FilterConfig) {
        self.demand(
            &format!("{key}.captions"),
            &[&format!("{key}.text")],
            one_text,
            format!("null with {key}.text"),
            "a list of captions",
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
            let (expected, got) = (format!("min at most max ({max:?})"), format!("{min:?}"));
            self.demand(&format!("{key}.filter.{name}"), &[], min <= max, expected, got, "no sample passes");
        }
    }

    fn agree_on_the_best_checkpoint(&mut self) {
        let Config { task, data, checkpoint, eval, .. } = self.config;
        let Some(best) = checkpoint.best else { return };
        self.demand(
            "checkpoint.best",
            &["data.val"],
            data.val.is_some(),
            "null without data.val",
            best.to_string(),
            "name held-out shards in data.val.shards",
        );
        self.demand(
            "checkpoint.best",
            &["task.stage", "eval.retrieval"],
            !best.is_retrieval() || (task.stage == Stage::One && eval.retrieval),
            "val_loss where no retrieval is measured",
            best.to_string(),
            "retrieval needs stage 1 and eval.retrieval: true",
        );
        self.demand(
            "eval.every",
            &["checkpoint"],
            eval.every.is_multiple_of(checkpoint.every.max(1)) || checkpoint.every.is_multiple_of(eval.every.max(1)),
            format!("a multiple or a divisor of checkpoint.every ({}) with checkpoint.best", checkpoint.every),
            eval.every.to_string(),
            "only a checkpoint that is evaluated can be the best",
        );
    }
}
