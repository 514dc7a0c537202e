//! Requests to a hub, repeated where that may help.

use std::io;
use std::time::Duration;

use ureq::config::RedirectAuthHeaders;
use ureq::http::{Response, StatusCode};
use ureq::{Agent, Body};

use super::HubSettings;
use super::error::HubError;
use super::id::HubId;

/// How often a failed request is repeated.
const RETRIES: u32 = 4;

/// Sends requests about one model.
pub(super) struct Client<'a> {
    agent: Agent,
    settings: &'a HubSettings,
    pub id: &'a HubId,
}

impl<'a> Client<'a> {
    pub fn new(settings: &'a HubSettings, id: &'a HubId) -> Client<'a> {
        let agent = Agent::config_builder()
            .user_agent(concat!("blip2/", env!("CARGO_PKG_VERSION")))
            .http_status_as_error(false)
            // Files lie on other hosts, which must not see the token.
            .redirect_auth_headers(RedirectAuthHeaders::SameHost)
            .timeout_connect(Some(Duration::from_secs(30)))
            .timeout_recv_response(Some(Duration::from_secs(60)))
            // Of a whole body it is not known how long it takes; of each piece it is.
            .timeout_per_read(Some(settings.read_timeout))
            .build()
            .into();
        Client { agent, settings, id }
    }

    /// The pauses between a request's repetitions.
    pub fn pauses(&self) -> impl Iterator<Item = Duration> {
        let first = self.settings.retry_pause;
        (0..RETRIES).map(move |i| first * (1 << i))
    }

    /// One request, `from` some byte on, repeated while the hub is busy or cannot be reached; other refusals are errors.
    pub fn get(&self, url: &str, from: u64) -> Result<Response<Body>, HubError> {
        let mut pauses = self.pauses();
        loop {
            let mut request = self.agent.get(url);
            if let Some(token) = &self.settings.token {
                request = request.header("Authorization", format!("Bearer {token}"));
            }
            if from > 0 {
                request = request.header("Range", format!("bytes={from}-"));
            }
            let failure = match request.call() {
                Ok(response) if response.status().is_success() => return Ok(response),
                Ok(response) if busy(response.status()) => self.refusal(url, &response),
                Ok(response) => return Err(self.refusal(url, &response)),
                Err(error) => {
                    let message = error.to_string();
                    HubError::Unreachable { id: self.id.to_string(), url: self.settings.shown(url), message }
                }
            };
            match pauses.next() {
                Some(pause) => std::thread::sleep(pause),
                None => return Err(failure),
            }
        }
    }

    /// Why a body broke off.
    pub fn broken(&self, error: &io::Error) -> String {
        match error.get_ref().and_then(|error| error.downcast_ref()) {
            Some(ureq::Error::Timeout(_)) => format!("nothing came for {:?}", self.settings.read_timeout),
            _ => error.to_string(),
        }
    }

    fn refusal(&self, url: &str, response: &Response<Body>) -> HubError {
        let (id, endpoint, repo) =
            (self.id.to_string(), self.settings.shown(&self.settings.endpoint), self.id.repo.clone());
        let code = response.headers().get("x-error-code").and_then(|code| code.to_str().ok()).unwrap_or_default();
        let token = self.settings.token.is_some();
        match (response.status().as_u16(), code) {
            (_, "GatedRepo") => HubError::Gated { id, endpoint, repo },
            (_, "RepoNotFound") => HubError::Absent { id, endpoint },
            (_, "RevisionNotFound") => HubError::NoRevision { id, revision: self.id.revision().into() },
            (401, _) if !token => HubError::NeedsToken { id, endpoint },
            (401, _) => HubError::TokenRefused { id, endpoint },
            (403, _) => HubError::Gated { id, endpoint, repo },
            (404, _) if url.contains("/api/") => HubError::Absent { id, endpoint },
            (status, _) => {
                HubError::Answer { id, url: self.settings.shown(url), message: format!("the answer is {status}") }
            }
        }
    }
}

fn busy(status: StatusCode) -> bool {
    status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS
}
