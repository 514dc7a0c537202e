//! From the configuration's sets to open data sets.

use std::path::Path;
use std::sync::Arc;

use blip2_data::{
    Bounds, CaptionRule, CaptionSource, Corpus, DataError, Dataset, JsonPath, OpenOptions, RemoteOptions, SampleFilter,
    ShardCache,
};

use crate::config::{AutoOr, BoundsConfig, CaptionsConfig, Config, FilterConfig, ShardCacheConfig, TextField};
use crate::error::Error;

/// The training sets as one row of samples.
///
/// # Errors
/// When shards cannot be read or no sample passes a filter.
pub(crate) fn open_training_sets(config: &Config) -> Result<Arc<Corpus>, Error> {
    let open = |(place, set): (usize, &crate::config::TrainSetConfig)| {
        let captions = caption_rule(&set.text, set.captions.as_ref(), set.template.as_ref());
        let dataset = open(config, &set.shards, captions, &set.filter);
        Ok((dataset.map_err(|source| Error::DataSet { key: format!("data.train.{place}"), source })?, set.weight))
    };
    let sets = config.data.train.iter().enumerate().map(open).collect::<Result<Vec<_>, Error>>()?;
    Ok(Arc::new(Corpus::new(sets)?))
}

/// The held-out set, where there is one.
///
/// # Errors
/// As [`open_training_sets`].
pub(crate) fn open_held_out_set(config: &Config) -> Result<Option<Arc<Corpus>>, Error> {
    let Some(set) = &config.data.val else { return Ok(None) };
    let captions = caption_rule(&set.text, set.captions.as_ref(), set.template.as_ref());
    let dataset = open(config, &set.shards, captions, &set.filter);
    let dataset = dataset.map_err(|source| Error::DataSet { key: "data.val".into(), source })?;
    Ok(Some(Arc::new(dataset.into())))
}

/// `.idx` files go beside the shards, or into the run's folder where theirs cannot be written.
fn open(config: &Config, shards: &str, captions: CaptionRule, filter: &FilterConfig) -> Result<Dataset, DataError> {
    let options = OpenOptions {
        remote: RemoteOptions { cache: config.data.shard_cache.cache(), ..RemoteOptions::default() },
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
    /// Says where `dir: auto` is.
    pub fn settle(&mut self, auto: Option<&Path>) {
        if let (AutoOr::Auto, Some(auto)) = (&self.dir, auto) {
            self.dir = AutoOr::Given(auto.to_owned());
        }
    }

    pub(crate) fn cache(&self) -> Option<ShardCache> {
        let max_bytes = (self.max_gib * f64::from(1 << 30)) as u64;
        match &self.dir {
            AutoOr::Given(dir) => Some(ShardCache { dir: dir.clone(), max_bytes }),
            AutoOr::Auto => None,
        }
    }
}
