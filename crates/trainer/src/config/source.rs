//! Where weights come from: a folder, or a model on a hub.

use std::ops::Deref;
use std::path::{Path, PathBuf};

use blip2_weights::{ModelDir, Part, WeightsError};

use super::node::Node;
use super::value::Leaf;
use crate::hub::{HubId, SCHEME};

/// A path, or `hf://ORG/NAME[@REVISION]`; dereferences to the folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WeightsSource {
    /// Its id on a hub, with the commit once that is known.
    id: Option<HubId>,
    /// The path, or its snapshot's folder once [`Hub::resolve`](crate::hub::Hub::resolve) has found it; until then the id itself.
    folder: PathBuf,
    /// Frozen towers that it names by a hub id, where the hub has found them.
    towers: Vec<(Part, PathBuf)>,
}

impl WeightsSource {
    /// A model on a hub that is not located yet.
    pub(crate) fn on_hub(id: HubId) -> WeightsSource {
        let folder = PathBuf::from(id.to_string());
        WeightsSource::located(id, folder)
    }

    /// A model on a hub, and its snapshot's folder.
    pub fn located(id: HubId, folder: PathBuf) -> WeightsSource {
        WeightsSource { id: Some(id), folder, towers: Vec::new() }
    }

    /// Looks for a frozen tower that this model names in `folder`.
    pub(crate) fn take_from(&mut self, part: Part, folder: PathBuf) {
        self.towers.push((part, folder));
    }

    /// The hub's id, where it is one.
    pub fn hub_id(&self) -> Option<&HubId> {
        self.id.as_ref()
    }

    /// Opens the folder, with its towers where they were found.
    ///
    /// # Errors
    /// As [`ModelDir::open`].
    pub fn open(&self) -> Result<ModelDir, WeightsError> {
        let mut dir = ModelDir::open(&self.folder)?;
        self.towers.iter().for_each(|(part, folder)| dir.take_from(*part, folder.clone()));
        Ok(dir)
    }
}

impl Deref for WeightsSource {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.folder
    }
}

impl AsRef<Path> for WeightsSource {
    fn as_ref(&self) -> &Path {
        self
    }
}

impl From<PathBuf> for WeightsSource {
    fn from(path: PathBuf) -> WeightsSource {
        WeightsSource { id: None, folder: path, towers: Vec::new() }
    }
}

impl From<&PathBuf> for WeightsSource {
    fn from(path: &PathBuf) -> WeightsSource {
        path.clone().into()
    }
}

impl From<&Path> for WeightsSource {
    fn from(path: &Path) -> WeightsSource {
        path.to_path_buf().into()
    }
}

impl From<&WeightsSource> for WeightsSource {
    fn from(source: &WeightsSource) -> WeightsSource {
        source.clone()
    }
}

impl Leaf for WeightsSource {
    fn expected() -> String {
        "a path or hf://ORG/NAME[@REVISION]".into()
    }

    fn read(node: &Node) -> Option<Self> {
        match node {
            Node::Text(text) if text.starts_with(SCHEME) => text.parse().ok().map(WeightsSource::on_hub),
            other => PathBuf::read(other).map(WeightsSource::from),
        }
    }

    fn encode(&self) -> Node {
        match &self.id {
            None => Leaf::encode(&self.folder),
            Some(id) => Node::Text(id.to_string()),
        }
    }

    fn fallback() -> Self {
        PathBuf::new().into()
    }

    fn hint(node: &Node) -> Option<String> {
        PathBuf::hint(node)
    }
}
