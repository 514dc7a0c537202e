//! The hub that the environment describes, by the variables of Hugging Face's own tools.

use std::env;
use std::fs;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Result, bail};
use blip2_trainer::hub::{Hub, HubEvent, HubSettings};

use crate::output::say;
use crate::progress::Progress;

const ENDPOINT: &str = "https://huggingface.co";
const MIB: u64 = 1 << 20;

/// `HF_HOME`, `HF_HUB_CACHE`, `HF_ENDPOINT`, `HF_TOKEN` (else the token that a login left) and `HF_HUB_OFFLINE`.
///
/// # Errors
/// An address that is none, or no folder to keep models in.
pub(crate) fn from_environment() -> Result<Hub> {
    let home = || {
        path("HF_HOME")
            .or_else(|| Some(path("XDG_CACHE_HOME")?.join("huggingface")))
            .or_else(|| Some(path("HOME")?.join(".cache/huggingface")))
    };
    let Some(home) = home() else {
        bail!("HF_HOME: expected a folder to keep models in, got neither HF_HOME nor HOME")
    };
    let endpoint = text("HF_ENDPOINT").unwrap_or(ENDPOINT.into());
    if !endpoint.starts_with("https://") && !endpoint.starts_with("http://") {
        bail!("HF_ENDPOINT: expected an address that begins with https://, got {endpoint}");
    }
    let login = || fs::read_to_string(path("HF_TOKEN_PATH").unwrap_or_else(|| home.join("token"))).ok();
    let settings = HubSettings {
        cache: path("HF_HUB_CACHE").unwrap_or_else(|| home.join("hub")),
        endpoint: endpoint.trim_end_matches('/').into(),
        token: text("HF_TOKEN").or_else(login).map(|token| token.trim().to_string()).filter(|token| !token.is_empty()),
        offline: text("HF_HUB_OFFLINE").is_some_and(|value| is_true(&value)),
        retry_pause: Duration::from_secs(1),
        read_timeout: Duration::from_secs(60),
    };
    let progress = Mutex::new(None);
    Ok(Hub::new(
        settings,
        Box::new(move |event| {
            let Ok(mut progress) = progress.lock() else { return };
            match event {
                HubEvent::Begins { id, files, bytes, folder } => {
                    let mib = bytes.div_ceil(MIB);
                    say(&format!("{id}: {files} files, {mib} MiB, to come into {}", folder.display()));
                    *progress = Some(Progress::new("MiB"));
                }
                HubEvent::Progress { done, bytes } => {
                    progress.iter().for_each(|shown: &Progress| shown.tell(done / MIB, bytes.div_ceil(MIB)));
                }
                HubEvent::Ends => *progress = None,
            }
        }),
    ))
}

fn text(variable: &str) -> Option<String> {
    env::var(variable).ok().filter(|value| !value.is_empty())
}

fn path(variable: &str) -> Option<PathBuf> {
    env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from)
}

fn is_true(value: &str) -> bool {
    ["1", "on", "yes", "true"].contains(&value.to_ascii_lowercase().as_str())
}
