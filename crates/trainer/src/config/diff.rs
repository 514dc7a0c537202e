//! How two configurations differ, and which differences a run may be continued with.

use std::collections::BTreeMap;

use thiserror::Error;

use super::node::Node;
use super::types::{Config, DataConfig};
use super::value::ConfigValue;

/// What a differing key means for a run that is to be continued.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// It decides nothing about what is learned, or (`schedule.steps`) only how long.
    Allowed,
    /// Allowed where the same shards lie there, which their digests say.
    ShardsMoved,
    /// It would make another run.
    Refused,
}

/// One key that differs.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{key}: {run} in the run, {here} here")]
pub struct Difference {
    /// Dotted path of the key.
    pub key: String,
    /// The run's value; `-` where it has none.
    pub run: String,
    /// This configuration's value; `-` where it has none.
    pub here: String,
    /// Whether the run can be continued with it.
    pub change: Change,
}

/// Keys and sections that a continued run may change, but for [`DECIDES`]. `run.name` and `run.dir` say where the folder is.
pub(super) const FREE: &[&str] = &[
    "log",
    "eval",
    "checkpoint",
    "data.loader",
    "data.shard_cache",
    "run.device",
    "run.name",
    "run.dir",
    "schedule.steps",
];

/// The key among them that decides about the order of the samples.
pub(super) const DECIDES: &str = "data.loader.window_shards";

impl Config {
    /// All keys whose values differ between the run's configuration and this one, in the order of the file. Credentials in
    /// URLs are not compared: a run's own record has none.
    pub fn differences(&self, run: &Config) -> Vec<Difference> {
        let ours = leaves(&self.without_credentials());
        let theirs: BTreeMap<String, Node> = leaves(&run.without_credentials()).into_iter().collect();
        let known: BTreeMap<&str, &Node> = ours.iter().map(|(key, node)| (key.as_str(), node)).collect();
        let gone = theirs.iter().filter(|(key, _)| !known.contains_key(key.as_str()));
        ours.iter()
            .filter(|(key, node)| theirs.get(key) != Some(node))
            .map(|(key, node)| difference(key, theirs.get(key), Some(node)))
            .chain(gone.map(|(key, node)| difference(key, Some(node), None)))
            .collect()
    }

    /// The same with `...` in place of the credentials that the URLs of shards hold: what may be written down.
    pub fn without_credentials(&self) -> Config {
        let mut config = self.clone();
        let DataConfig { train, val, .. } = &mut config.data;
        for shards in train.iter_mut().map(|set| &mut set.shards).chain(val.iter_mut().map(|set| &mut set.shards)) {
            *shards = blip2_data::without_credentials(shards);
        }
        config
    }

    /// Every key with its value as text, without credentials, in the order of the file.
    pub fn settings(&self) -> Vec<(String, String)> {
        leaves(&self.without_credentials()).into_iter().map(|(key, node)| (key, node.to_string())).collect()
    }

    /// Digest of everything that a continued run may not change.
    pub fn digest(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        for (key, node) in leaves(self).iter().filter(|(key, _)| change(key) == Change::Refused) {
            hasher.update(format!("{key}={node}\n").as_bytes());
        }
        hasher.finalize().to_hex().to_string()
    }
}

fn leaves(config: &Config) -> Vec<(String, Node)> {
    config.encode().leaves()
}

fn difference(key: &str, run: Option<&Node>, here: Option<&Node>) -> Difference {
    let text = |node: Option<&Node>| node.map_or("-".to_string(), Node::to_string);
    Difference { key: key.to_string(), run: text(run), here: text(here), change: change(key) }
}

fn change(key: &str) -> Change {
    let is = |name: &str| key.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'));
    if FREE.iter().copied().any(is) && !is(DECIDES) {
        Change::Allowed
    } else if key.starts_with("data.") && key.ends_with(".shards") {
        Change::ShardsMoved
    } else {
        Change::Refused
    }
}
