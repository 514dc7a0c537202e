//! From the configuration's sets to open data sets.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use blip2_data::{
    Bounds, CaptionRule, CaptionSource, Corpus, DataError, Dataset, JsonPath, OpenOptions, QuestionFields,
    RemoteOptions, Retries, SampleFilter, ShardCache, lacks_credentials,
};

use crate::config::{
    AutoOr, BoundsConfig, CaptionsConfig, Config, FilterConfig, ShardCacheConfig, TextField, ValSetConfig, VqaConfig,
};
use crate::data::index_lines::{SetOpening, index_lines};
use crate::error::Error;
use crate::ranks::{Claims, Pulse, Ranks};

/// The sets of a run.
pub struct DataSets {
    /// Those that are trained on, as one row of samples.
    pub train: Arc<Corpus>,
    /// The held-out one, where there is one.
    pub held_out: Option<Arc<Corpus>>,
}

impl DataSets {
    /// Opens all of them.
    ///
    /// # Errors
    /// When shards cannot be read or are others on another rank, or no sample passes a filter.
    pub fn open(config: &Config, opening: SetOpening, ranks: &dyn Ranks) -> Result<DataSets, Error> {
        let train = open_training_sets(config, opening, &ranks.pulse())?;
        let held_out = open_held_out_set(config, opening, &ranks.pulse())?;
        // Before a cache is filled from them.
        let mut claims = Claims::default();
        claims.claim("data.train's shards", train.digest());
        if let Some(held_out) = &held_out {
            claims.claim("data.val's shards", held_out.digest());
        }
        claims.compare(ranks)?;
        Ok(DataSets { train, held_out })
    }
}

/// The training sets as one row of samples. `say` hears how far opening them is, and so does `pulse`: it may take hours.
///
/// # Errors
/// When shards cannot be read or no sample passes a filter.
pub(crate) fn open_training_sets(config: &Config, opening: SetOpening, pulse: &Pulse) -> Result<Arc<Corpus>, Error> {
    let open = |(place, set): (usize, &crate::config::TrainSetConfig)| {
        let captions = caption_rule(&set.text, set.captions.as_ref(), set.template.as_ref());
        let key = format!("data.train.{place}");
        let dataset = open(config, &key, &set.shards, captions, &set.filter, opening, pulse);
        Ok((dataset.map_err(|source| Error::DataSet { key, source })?, set.weight))
    };
    let sets = config.data.train.iter().enumerate().map(open).collect::<Result<Vec<_>, Error>>()?;
    Ok(Arc::new(Corpus::new(sets)?))
}

/// The held-out set, where there is one.
///
/// # Errors
/// As [`open_training_sets`].
pub(crate) fn open_held_out_set(
    config: &Config,
    opening: SetOpening,
    pulse: &Pulse,
) -> Result<Option<Arc<Corpus>>, Error> {
    let captions = |set: &ValSetConfig| caption_rule(&set.text, set.captions.as_ref(), set.template.as_ref());
    open_held_out(config, captions, opening, pulse)
}

/// The held-out set as questions with answers, where there is one.
///
/// # Errors
/// As [`open_training_sets`].
pub(crate) fn open_questions(config: &Config) -> Result<Option<Arc<Corpus>>, Error> {
    let VqaConfig { question, answers, .. } = &config.eval.vqa;
    let fields = QuestionFields { question: JsonPath::new(question), answers: JsonPath::new(answers) };
    let rule = CaptionRule { source: CaptionSource::Question(fields), template: None };
    open_held_out(config, |_| rule, SetOpening::default(), &Pulse::default())
}

fn open_held_out(
    config: &Config,
    captions: impl FnOnce(&ValSetConfig) -> CaptionRule,
    opening: SetOpening,
    pulse: &Pulse,
) -> Result<Option<Arc<Corpus>>, Error> {
    let Some(set) = &config.data.val else { return Ok(None) };
    let dataset = open(config, "data.val", &set.shards, captions(set), &set.filter, opening, pulse);
    let dataset = dataset.map_err(|source| Error::DataSet { key: "data.val".into(), source })?;
    Ok(Some(Arc::new(dataset.into())))
}

/// `.idx` files go beside the shards, or into the run's folder where theirs cannot, or may not, be written.
fn open(
    config: &Config,
    key: &str,
    shards: &str,
    captions: CaptionRule,
    filter: &FilterConfig,
    opening: SetOpening,
    pulse: &Pulse,
) -> Result<Dataset, DataError> {
    if lacks_credentials(shards) {
        let reason = format!(
            "it holds no credentials but dots in their place, as in a run's own config.yaml; give the configuration that the run was begun with, or a copy with the URL in {key}.shards"
        );
        return Err(DataError::Pattern { pattern: shards.to_owned(), reason });
    }
    let (lines, pulse) = (opening.say.map(|say| index_lines(key.to_owned(), say)), pulse.clone());
    let progress = move |done: usize, all: usize| {
        pulse.beat();
        lines.iter().for_each(|lines| lines(done, all));
    };
    let options = OpenOptions {
        remote: config.data.shard_cache.remote(),
        progress: Some(Arc::new(progress)),
        write_beside: !opening.dry_run,
        cache_dir: Some(config.run_folder().join("shard_index")),
        captions,
        filter: sample_filter(filter),
        ..OpenOptions::default()
    };
    Dataset::open(&[shards.to_owned()], &options)
}

fn caption_rule(text: &TextField, captions: Option<&CaptionsConfig>, template: Option<&String>) -> CaptionRule {
    let source = match (captions, text) {
        (Some(captions), _) => CaptionSource::Drawn { field: JsonPath::new(&captions.field), top: captions.top },
        (None, TextField::Auto) => CaptionRule::default().source,
        (None, TextField::Txt) => CaptionSource::Text,
        (None, TextField::Json(field)) => CaptionSource::Json(JsonPath::new(field)),
    };
    CaptionRule { source, template: template.cloned() }
}

fn sample_filter(filter: &FilterConfig) -> SampleFilter {
    let bounds = |bounds: &BoundsConfig| Bounds { min: bounds.min, max: bounds.max };
    SampleFilter {
        width: bounds(&filter.width),
        height: bounds(&filter.height),
        aspect: bounds(&filter.aspect),
        caption_words: bounds(&filter.caption_words),
        json: filter.json.0.iter().map(|(field, b)| (JsonPath::new(field), bounds(b))).collect(),
    }
}

impl ShardCacheConfig {
    /// Puts the folder into the place of `dir: auto`.
    pub fn resolve_dir(&mut self, auto: Option<&Path>) {
        if let (AutoOr::Auto, Some(auto)) = (&self.dir, auto) {
            self.dir = AutoOr::Given(auto.to_owned());
        }
    }

    fn remote(&self) -> RemoteOptions {
        let max_bytes = (self.max_gib * f64::from(1 << 30)) as u64;
        let cache = match &self.dir {
            AutoOr::Given(dir) => Some(ShardCache { dir: dir.clone(), max_bytes }),
            AutoOr::Auto => None,
        };
        let give_up = Duration::try_from_secs_f64(self.give_up_s).unwrap_or(Duration::MAX);
        RemoteOptions { cache, retries: Retries { give_up, ..Retries::default() }, ..RemoteOptions::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A run's own `config.yaml` has none.
    #[test]
    fn shards_whose_credentials_were_left_out_are_said_to_lack_them() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.yaml");
        let text = "task: {stage: 1}\nmodel: {vision: {weights: v}, qformer: {init: q}}\n\
                    data: {train: [{shards: 'https://...@host/{0..9}.tar'}], val: {shards: 'https://host/0.tar?...'}}\n";
        std::fs::write(&path, text).unwrap();
        let config = Config::load_resolved(&path).unwrap();
        let opening = SetOpening { say: None, dry_run: true };
        for (error, set) in [
            (
                open_training_sets(&config, opening, &Pulse::default()).err().unwrap(),
                "with the URL in data.train.0.shards",
            ),
            (open_held_out_set(&config, opening, &Pulse::default()).err().unwrap(), "with the URL in data.val.shards"),
        ] {
            let error = error.to_string();
            assert!(error.contains("it holds no credentials") && error.contains(set), "{error}");
        }
    }
}
