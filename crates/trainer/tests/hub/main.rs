//! Models named by a hub id, against a hub of the tests' own.

#![cfg(feature = "hub")]

mod downloads;
mod model;
mod refusals;
mod runs;
mod server;

use std::path::{Path, PathBuf};
use std::time::Duration;

use blip2_trainer::hub::{Hub, HubSettings};

/// A client with a cache below `home`.
fn hub(home: &Path, endpoint: String) -> Hub {
    Hub::new(settings(home, endpoint), Box::new(|_| {}))
}

fn settings(home: &Path, endpoint: String) -> HubSettings {
    HubSettings {
        cache: home.join("hub"),
        endpoint,
        token: None,
        offline: false,
        retry_pause: Duration::ZERO,
        read_timeout: Duration::from_secs(60),
    }
}

fn repo_folder(home: &Path) -> PathBuf {
    home.join("hub/models--org--name")
}
