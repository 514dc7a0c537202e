//! Models that a configuration names by their place on a hub, as `hf://facebook/opt-2.7b`.
//!
//! They are fetched into the cache that Hugging Face's own tools use, and what those tools have there is taken. A run keeps the commit
//! beside the id (`hf://facebook/opt-2.7b#<commit>` in its `config.yaml`) and goes on from that commit, wherever the branch stands by then.

mod cache;
mod error;
#[cfg(feature = "hub")]
mod fetch;
#[cfg(feature = "hub")]
mod http;
mod id;

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use blip2_data::redacted;
use blip2_weights::{FrozenElsewhere, Part};
use cache::RepoCache;
pub use error::HubError;
pub use id::{HubId, SCHEME};

use crate::config::{Config, WeightsSource};
use crate::ranks::Pulse;

/// Where models come from and where they are kept.
#[derive(Clone)]
pub struct HubSettings {
    /// The cache's folder (`$HF_HOME/hub`).
    pub cache: PathBuf,
    /// The hub's address (`HF_ENDPOINT`), without a slash at its end.
    pub endpoint: String,
    /// Who asks (`HF_TOKEN`).
    pub token: Option<String>,
    /// Whether nothing may be fetched (`HF_HUB_OFFLINE`).
    pub offline: bool,
    /// Pause before the first repetition of a failed request; each further one doubles it.
    pub retry_pause: Duration,
    /// How long a server may send nothing before its connection counts as broken.
    pub read_timeout: Duration,
}

/// How far a download is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HubEvent {
    /// So much is to come.
    Begins {
        /// The model, at its commit.
        id: HubId,
        /// Files that are not in the cache yet.
        files: usize,
        /// Their bytes, without what an interrupted download left.
        bytes: u64,
        /// The model's folder in the cache.
        folder: PathBuf,
    },
    /// So many of these bytes have come.
    Progress {
        /// Bytes so far.
        done: u64,
        /// All bytes that are to come.
        bytes: u64,
    },
    /// Everything is there.
    Ends,
}

/// A hub with its cache.
pub struct Hub {
    settings: HubSettings,
    report: Box<dyn Fn(HubEvent) + Send + Sync>,
    /// The commit at which each id was used first, so that all of one command use the same.
    commits: Mutex<BTreeMap<HubId, String>>,
    pulse: Mutex<Pulse>,
}

impl fmt::Debug for HubSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Without the token: debug output ends in logs.
        let endpoint = self.shown(&self.endpoint);
        write!(f, "HubSettings({endpoint}, {}, offline: {})", self.cache.display(), self.offline)
    }
}

impl HubSettings {
    /// An address on the hub without the credentials that its endpoint may hold.
    fn shown(&self, url: &str) -> String {
        url.replacen(&self.endpoint, &redacted(&self.endpoint), 1)
    }
}

impl Hub {
    /// `report` is told of every download.
    pub fn new(settings: HubSettings, report: Box<dyn Fn(HubEvent) + Send + Sync>) -> Hub {
        Hub { settings, report, commits: Mutex::default(), pulse: Mutex::default() }
    }

    /// No hub: everything must lie on this machine under a path of its own.
    pub fn local() -> Hub {
        let settings = HubSettings {
            cache: PathBuf::new(),
            endpoint: String::new(),
            token: None,
            offline: true,
            retry_pause: Duration::ZERO,
            read_timeout: Duration::ZERO,
        };
        Hub::new(settings, Box::new(|_| {}))
    }

    /// Other ranks, which may wait for this one's download, hear by `pulse` that it goes on.
    pub(crate) fn keep_alive(&self, pulse: Pulse) {
        *self.pulse.lock().unwrap_or_else(PoisonError::into_inner) = pulse;
    }

    /// The folder behind a path or an `hf://` id given on the command line.
    ///
    /// # Errors
    /// No such model, no permission, no network, no space; whatever [`HubError`] lists.
    pub fn folder(&self, path: &Path) -> Result<PathBuf, HubError> {
        match path.to_str().filter(|text| text.starts_with(SCHEME)) {
            None => Ok(path.to_path_buf()),
            Some(text) => Ok(self.locate(&text.parse().map_err(HubError::Id)?)?.1),
        }
    }

    /// The model behind a path or an `hf://` id given on the command line, with the frozen towers that it names by hub ids.
    ///
    /// # Errors
    /// As [`Hub::folder`], of the model or of a tower that is not where the model says.
    pub fn model(&self, path: &Path) -> Result<WeightsSource, HubError> {
        let mut source = WeightsSource::from(self.folder(path)?);
        self.complete(&mut source, &[Part::Vision, Part::Language])?;
        Ok(source)
    }

    /// Finds or fetches those frozen towers of an export of trained weights alone that are not where it was exported.
    fn complete(&self, source: &mut WeightsSource, parts: &[Part]) -> Result<(), HubError> {
        for tower in FrozenElsewhere::named_by(source) {
            if parts.contains(&tower.part) && tower.source.starts_with(SCHEME) && !tower.path.exists() {
                source.take_from(tower.part, self.folder(Path::new(&tower.source))?);
            }
        }
        Ok(())
    }

    /// Gives the hub ids of `config` the commits that its run has begun with, else those that this command has used already.
    ///
    /// A run whose `config.yaml` cannot be read has no commits; opening it will say what is wrong.
    pub fn keep_commits(&self, config: &mut Config) {
        let run = Config::load_resolved(&config.run_folder().join("config.yaml")).ok();
        let begun: Vec<HubId> =
            run.iter().flat_map(|run| run.weights_sources().filter_map(WeightsSource::hub_id).cloned()).collect();
        let used = self.commits.lock().unwrap_or_else(PoisonError::into_inner);
        for source in config.weights_sources_mut() {
            let Some(id) = source.hub_id().filter(|id| id.known_commit().is_none()) else { continue };
            let begun = begun.iter().find(|begun| begun.asked() == *id).and_then(|begun| begun.commit.clone());
            if let Some(commit) = begun.or_else(|| used.get(id).cloned()) {
                *source = WeightsSource::on_hub(id.at(&commit));
            }
        }
    }

    /// Finds or fetches every model that `config` names by a hub id, and writes commit and folder into it.
    ///
    /// # Errors
    /// No such model, no permission, no network, no space; whatever [`HubError`] lists.
    pub fn resolve(&self, config: &mut Config) -> Result<(), HubError> {
        self.resolve_towers(config)?;
        self.locate_source(&mut config.model.qformer.init)
    }

    /// The same for the frozen towers alone: what was trained needs nothing of what it began from.
    ///
    /// # Errors
    /// As [`Hub::resolve`].
    pub fn resolve_towers(&self, config: &mut Config) -> Result<(), HubError> {
        self.keep_commits(config);
        self.locate_source(&mut config.model.vision.weights)?;
        if let Some(language) = &mut config.model.language {
            self.locate_source(&mut language.weights)?;
        }
        self.complete(&mut config.model.vision.weights, &[Part::Vision])?;
        match &mut config.model.language {
            Some(language) => self.complete(&mut language.weights, &[Part::Language]),
            None => Ok(()),
        }
    }

    /// Writes commit and folder into a source that is named by a hub id.
    fn locate_source(&self, source: &mut WeightsSource) -> Result<(), HubError> {
        if let Some(id) = source.hub_id() {
            let (id, folder) = self.locate(id)?;
            *source = WeightsSource::located(id, folder);
        }
        Ok(())
    }

    /// The id at its commit, and the folder of that snapshot.
    fn locate(&self, id: &HubId) -> Result<(HubId, PathBuf), HubError> {
        let cache = RepoCache::of(&self.settings.cache, id);
        let used = self.commits.lock().unwrap_or_else(PoisonError::into_inner).get(&id.asked()).cloned();
        let known = id.known_commit().map(str::to_string).or(used);
        let known = known.or_else(|| self.settings.offline.then(|| cache.commit_of(id.revision())).flatten());
        let cached = known.as_deref().and_then(|commit| Some((id.at(commit), cache.complete_snapshot(commit)?)));
        let enough = |(id, _): &(HubId, PathBuf)| {
            self.settings.offline || id.known_commit().is_some_and(|commit| cache.knows_companions(commit))
        };
        let (id, folder) = match cached {
            Some(found) if enough(&found) => found,
            // Other tools fetch what they need of a model. Weights that are there are enough where the rest cannot be had; what misses it will say so.
            Some(found) => self.fetch(&found.0, &cache).unwrap_or(found),
            None if self.settings.offline => {
                let folder = known.map_or(cache.folder().to_path_buf(), |commit| cache.snapshot(&commit));
                return Err(HubError::Offline { id: id.to_string(), folder });
            }
            None => self.fetch(&known.map_or(id.clone(), |commit| id.at(&commit)), &cache)?,
        };
        let commit = id.known_commit().unwrap_or_default().to_string();
        self.commits.lock().unwrap_or_else(PoisonError::into_inner).entry(id.asked()).or_insert(commit);
        Ok((id, folder))
    }

    #[cfg(not(feature = "hub"))]
    fn fetch(&self, id: &HubId, cache: &RepoCache) -> Result<(HubId, PathBuf), HubError> {
        let _ = &self.report;
        Err(HubError::NotBuilt { id: id.to_string(), folder: cache.folder().to_path_buf() })
    }
}
