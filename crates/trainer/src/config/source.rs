//! Where weights come from: a folder, or a model on a hub.

use std::ops::Deref;
use std::path::{Path, PathBuf};

use super::node::Node;
use super::value::Leaf;
use crate::hub::{HubId, SCHEME};

/// A path, or `hf://ORG/NAME[@REVISION]`; dereferences to the folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WeightsSource {
    /// A path on this machine.
    Path(PathBuf),
    /// A model on a hub.
    Hub {
        /// Its id, with the commit once that is known.
        id: HubId,
        /// Its snapshot's folder, once [`Hub::resolve`](crate::hub::Hub::resolve) has found it; until then the id itself.
        folder: PathBuf,
    },
}

impl WeightsSource {
    /// A model on a hub that is not located yet.
    pub(crate) fn on_hub(id: HubId) -> WeightsSource {
        WeightsSource::Hub { folder: PathBuf::from(id.to_string()), id }
    }

    /// The hub's id, where it is one.
    pub fn hub_id(&self) -> Option<&HubId> {
        match self {
            WeightsSource::Path(_) => None,
            WeightsSource::Hub { id, .. } => Some(id),
        }
    }
}

impl Deref for WeightsSource {
    type Target = Path;

    fn deref(&self) -> &Path {
        match self {
            WeightsSource::Path(path) | WeightsSource::Hub { folder: path, .. } => path,
        }
    }
}

impl AsRef<Path> for WeightsSource {
    fn as_ref(&self) -> &Path {
        self
    }
}

impl From<PathBuf> for WeightsSource {
    fn from(path: PathBuf) -> WeightsSource {
        WeightsSource::Path(path)
    }
}

impl Leaf for WeightsSource {
    fn expected() -> String {
        "a path or hf://ORG/NAME[@REVISION]".into()
    }

    fn read(node: &Node) -> Option<Self> {
        match node {
            Node::Text(text) if text.starts_with(SCHEME) => text.parse().ok().map(WeightsSource::on_hub),
            other => PathBuf::read(other).map(WeightsSource::Path),
        }
    }

    fn encode(&self) -> Node {
        match self {
            WeightsSource::Path(path) => Leaf::encode(path),
            WeightsSource::Hub { id, .. } => Node::Text(id.to_string()),
        }
    }

    fn fallback() -> Self {
        WeightsSource::Path(PathBuf::new())
    }

    fn hint(node: &Node) -> Option<String> {
        PathBuf::hint(node)
    }
}
