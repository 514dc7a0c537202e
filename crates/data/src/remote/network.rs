//! Requests to stores. One thread owns their connections; whoever asks waits for the answer.

use std::collections::HashMap;
use std::error::Error;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use object_store::aws::AmazonS3Builder;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::client::{HttpClient, HttpConnector, ReqwestConnector};
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::http::HttpBuilder;
use object_store::path::Path;
use object_store::{
    BackoffConfig, ClientConfigKey, ClientOptions, GetOptions, GetRange, ObjectMeta, ObjectStore, ObjectStoreExt,
    PutPayload, RetryConfig,
};
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::time::timeout;

use super::retry::{Fault, Kind};
use super::{RemoteOptions, Version};
use crate::shards::location::{RemoteUrl, redacted};

/// Where clouds hand out credentials to their own machines.
const METADATA_SERVICES: [&str; 5] =
    ["169.254.169.254", "/latest/api/token", "/latest/meta-data", "computeMetadata", "/metadata/identity"];

/// A request that carries a manifest may take as many times the time of others.
const WRITE_TIMEOUTS: u32 = 10;

/// Our time limits hold from byte to byte; one of the whole request would end large shards.
const WHOLE_REQUEST: &str = "1 day";

/// What stands in front of the time of an object's last change, where that is all there is of a tag.
const TIME: &str = "last-modified: ";

/// Whether a tag is only a time.
pub(crate) fn is_time(tag: &str) -> bool {
    tag.starts_with(TIME)
}

/// Gives every store the same connections.
#[derive(Debug)]
struct Connected(HttpClient);

impl HttpConnector for Connected {
    fn connect(&self, _: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(self.0.clone())
    }
}

/// The stores in use, and the thread that talks to them.
pub(crate) struct Network {
    /// There until the end.
    runtime: Option<Runtime>,
    handle: Handle,
    stores: Mutex<HashMap<String, Arc<dyn ObjectStore>>>,
    /// The connections to web servers, whose stores differ by the URLs' queries.
    clients: Mutex<HashMap<String, (String, HttpClient)>>,
    settings: Vec<(String, String)>,
    timeout: Duration,
}

/// An object on its way.
pub(crate) struct Body {
    handle: Handle,
    chunks: BoxStream<'static, object_store::Result<bytes::Bytes>>,
    timeout: Duration,
    pub(crate) version: Version,
}

impl Network {
    pub(crate) fn start(options: &RemoteOptions) -> io::Result<Network> {
        // reqwest asks for the process' TLS arithmetic; one that is chosen already is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let runtime = Builder::new_multi_thread().worker_threads(1).thread_name("stores").enable_all().build()?;
        Ok(Network {
            handle: runtime.handle().clone(),
            runtime: Some(runtime),
            stores: Mutex::default(),
            clients: Mutex::default(),
            settings: options.settings.clone(),
            timeout: options.retries.timeout,
        })
    }

    /// Length and tag of an object.
    pub(crate) fn head(&self, url: &RemoteUrl) -> Result<Version, Fault> {
        let (store, path) = self.object(url)?;
        match self.ask(store.head(&path)) {
            // A URL may be signed for reading alone, and a server may know nothing else.
            Err(fault) if !url.can_list() && matches!(fault.kind, Kind::Lasting | Kind::NotFound) => {
                self.get(url, 0).map(|body| body.version)
            }
            head => head.map(|meta| version_at(url, meta)),
        }
    }

    /// An object from a byte on.
    pub(crate) fn get(&self, url: &RemoteUrl, from: u64) -> Result<Body, Fault> {
        let (store, path) = self.object(url)?;
        let range = (from > 0).then_some(GetRange::Offset(from));
        let found = self.ask(store.get_opts(&path, GetOptions { range, ..GetOptions::default() }))?;
        let version = version_at(url, found.meta.clone());
        Ok(Body { handle: self.handle.clone(), chunks: found.into_stream(), timeout: self.timeout, version })
    }

    /// Writes an object whole.
    pub(crate) fn put(&self, url: &RemoteUrl, bytes: Vec<u8>) -> Result<(), Fault> {
        let (store, path) = self.object(url)?;
        let limit = self.timeout * WRITE_TIMEOUTS;
        let written = block_on(&self.handle, limit, store.put(&path, PutPayload::from(bytes)))?;
        written.map(|_| ()).map_err(fault)
    }

    /// Tells `each` of the objects below `folder` (the key's part up to a slash, or nothing) that come behind `after`.
    pub(crate) fn list(
        &self,
        root: &RemoteUrl,
        folder: &str,
        after: Option<&str>,
        each: &mut dyn FnMut(String, Version),
    ) -> Result<(), Fault> {
        let parse = |key: &str| Path::parse(key).map_err(|error| fault(error.into()));
        let (store, folder) = (self.store(root)?, parse(folder)?);
        let mut objects = match after {
            Some(after) => store.list_with_offset(Some(&folder), &parse(after)?),
            None => store.list(Some(&folder)),
        };
        while let Some(object) = self.wait(objects.next())? {
            let object = object.map_err(fault)?;
            each(object.location.to_string(), version(object));
        }
        Ok(())
    }

    fn ask<T>(&self, answer: impl Future<Output = object_store::Result<T>>) -> Result<T, Fault> {
        self.wait(answer)?.map_err(fault)
    }

    fn wait<T>(&self, answer: impl Future<Output = T>) -> Result<T, Fault> {
        block_on(&self.handle, self.timeout, answer)
    }

    fn object(&self, url: &RemoteUrl) -> Result<(Arc<dyn ObjectStore>, Path), Fault> {
        let path = match url.can_list() {
            true => Path::parse(url.key()),
            false => Path::from_url_path(url.key()),
        };
        Ok((self.store(url)?, path.map_err(|error| fault(error.into()))?))
    }

    fn store(&self, url: &RemoteUrl) -> Result<Arc<dyn ObjectStore>, Fault> {
        if !url.can_list() {
            return self.web_store(url).map_err(|reason| Fault::new(Kind::Lasting, redacted(&reason)));
        }
        let mut stores = self.stores.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(store) = stores.get(url.root()) {
            return Ok(Arc::clone(store));
        }
        let store = self.make_store(url).map_err(|error| Fault::new(Kind::Lasting, told(&error)))?;
        stores.insert(url.root().to_owned(), Arc::clone(&store));
        Ok(store)
    }

    /// The store of a web server's URL: one that puts the URL's query behind every path.
    fn web_store(&self, url: &RemoteUrl) -> Result<Arc<dyn ObjectStore>, String> {
        let told = |error: object_store::Error| chain(&error);
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        let (root, client) = match clients.get(url.root()) {
            Some(known) => known.clone(),
            None => {
                let made = self.web_client(url.root())?;
                clients.insert(url.root().to_owned(), made.clone());
                made
            }
        };
        let base = url.query().map_or_else(|| root.clone(), |query| format!("{root}?{query}"));
        let store = HttpBuilder::new().with_url(base).with_retry(self.no_retries());
        Ok(Arc::new(store.with_http_connector(Connected(client)).build().map_err(told)?))
    }

    /// The root without its credentials, and connections that send them as servers want them.
    fn web_client(&self, root: &str) -> Result<(String, HttpClient), String> {
        let client = reqwest::Client::builder().build();
        let request = client.and_then(|client| client.get(root).build()).map_err(|error| chain(&error))?;
        let mut options = ClientOptions::new().with_config(ClientConfigKey::AllowHttp, "true");
        options = options.with_config(ClientConfigKey::Timeout, WHOLE_REQUEST);
        for (key, value) in &self.settings {
            if let Ok(key) = key.parse() {
                options = options.with_config(key, value);
            }
        }
        let client = ReqwestConnector::default().connect(&options.with_default_headers(request.headers().clone()));
        Ok((request.url().to_string(), client.map_err(|error| chain(&error))?))
    }

    /// Retries are ours.
    fn no_retries(&self) -> RetryConfig {
        RetryConfig { backoff: BackoffConfig::default(), max_retries: 0, retry_timeout: self.timeout }
    }

    /// The store of a URL, with what the environment says of it.
    fn make_store(&self, url: &RemoteUrl) -> object_store::Result<Arc<dyn ObjectStore>> {
        macro_rules! build {
            ($builder:expr, $client:expr) => {{
                let builder = $builder.with_url(url.root()).with_retry(self.no_retries());
                let builder = builder.with_config($client, WHOLE_REQUEST);
                let builder = self.settings.iter().fold(builder, |builder, (key, value)| match key.parse() {
                    Ok(key) => builder.with_config(key, value),
                    Err(_) => builder, // Another store's.
                });
                Arc::new(builder.build()?)
            }};
        }
        use object_store::{aws::AmazonS3ConfigKey, azure::AzureConfigKey, gcp::GoogleConfigKey};
        let limit = ClientConfigKey::Timeout;
        Ok(match url.scheme() {
            "s3" | "s3a" => build!(AmazonS3Builder::from_env(), AmazonS3ConfigKey::Client(limit)),
            "gs" => build!(GoogleCloudStorageBuilder::from_env(), GoogleConfigKey::Client(limit)),
            _ => build!(MicrosoftAzureBuilder::from_env(), AzureConfigKey::Client(limit)),
        })
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Body {
    /// The next bytes; `None` at the end.
    pub(crate) fn next(&mut self) -> Result<Option<bytes::Bytes>, Fault> {
        block_on(&self.handle, self.timeout, self.chunks.next())?.transpose().map_err(fault)
    }
}

fn block_on<T>(handle: &Handle, limit: Duration, answer: impl Future<Output = T>) -> Result<T, Fault> {
    let silence = |_| Fault::new(Kind::Passing, format!("no answer within {:.1} s", limit.as_secs_f64()));
    handle.block_on(async { timeout(limit, answer).await.map_err(silence) })
}

fn version(meta: ObjectMeta) -> Version {
    // Listings of some stores leave out the quotes, and caches on the way mark tags as weak.
    let bare = |tag: String| tag.trim_start_matches("W/").trim_matches('"').into();
    Version { bytes: meta.size, etag: meta.e_tag.map(bare) }
}

/// As [`version`], of what a web server says: some have no tags, and tell a time. Stores that list have tags.
fn version_at(url: &RemoteUrl, meta: ObjectMeta) -> Version {
    // Where it is told neither, the time is second 0.
    let is_told = !url.can_list() && meta.last_modified.timestamp() != 0;
    let time = is_told.then(|| format!("{TIME}{}", meta.last_modified.to_rfc2822()).into());
    let Version { bytes, etag } = version(meta);
    Version { bytes, etag: etag.or(time) }
}

fn fault(error: object_store::Error) -> Fault {
    use object_store::Error as E;
    let reason = told(&error);
    let kind = match &error {
        E::NotFound { .. } => Kind::NotFound,
        E::Precondition { .. } | E::NotModified { .. } => Kind::Changed,
        E::NotSupported { .. } => Kind::NoRanges,
        E::PermissionDenied { .. } | E::Unauthenticated { .. } | E::InvalidPath { .. } => Kind::Lasting,
        _ => {
            let whole = chain(&error);
            if METADATA_SERVICES.iter().any(|service| whole.contains(service)) {
                let reason = "no credentials: the environment names none (AWS_ACCESS_KEY_ID and \
                     AWS_SECRET_ACCESS_KEY, GOOGLE_SERVICE_ACCOUNT, AZURE_STORAGE_ACCOUNT_KEY and so on; for public \
                     buckets AWS_SKIP_SIGNATURE=true), and this machine's cloud hands none out";
                return Fault::new(Kind::NoCredentials, reason);
            }
            match status(&whole) {
                Some("408" | "425" | "429") => Kind::Passing,
                // A listing's answer about a bucket is no NotFound of the crate's.
                Some("404") => Kind::NotFound,
                Some(status) if status.starts_with('4') => Kind::Lasting,
                None if whole.contains("redirect without LOCATION") || whole.contains("scheme is not allowed") => {
                    Kind::Lasting
                }
                _ => Kind::Passing,
            }
        }
    };
    Fault::new(kind, reason)
}

/// An error with all its causes, in one line.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let told = error.to_string();
        if !text.contains(&told) {
            text = format!("{text}: {told}");
        }
        cause = error.source();
    }
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The digits behind `status code: `.
fn status(text: &str) -> Option<&str> {
    text.split_once("status code: ").and_then(|(_, rest)| rest.get(..3))
}

/// What a person wants to know of an error: the status, and what stores write into its XML.
fn told(error: &object_store::Error) -> String {
    let text = redacted(&chain(error));
    let Some((_, answer)) = text.split_once("status code: ") else {
        return text;
    };
    let field = |name: &str| {
        let (_, rest) = answer.split_once(&format!("<{name}>"))?;
        rest.split_once(&format!("</{name}>")).map(|(field, _)| field)
    };
    let status = answer.split(':').next().unwrap_or(answer).trim();
    match (field("Code"), field("Message")) {
        (Some(code), Some(message)) => format!("{status}, {code}: {message}"),
        (Some(code), None) => format!("{status}, {code}"),
        _ => status.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn generic(text: &str) -> Fault {
        fault(object_store::Error::Generic { store: "S3", source: text.into() })
    }

    #[test]
    fn faults_are_told_apart_and_told_in_one_line() {
        let xml = "Server returned non-2xx status code: 503 Service Unavailable: <?xml?>\n<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>";
        let slow = generic(xml);
        assert_eq!(slow, Fault::new(Kind::Passing, "503 Service Unavailable, SlowDown: Reduce your request rate."));
        for (text, kind) in [
            ("Server returned non-2xx status code: 429 Too Many Requests: ", Kind::Passing),
            ("Server returned non-2xx status code: 400 Bad Request: no", Kind::Lasting),
            ("Server returned non-2xx status code: 404 Not Found: NoSuchBucket", Kind::NotFound),
            ("connection reset by peer", Kind::Passing),
            ("Error performing PUT http://169.254.169.254/latest/api/token", Kind::NoCredentials),
            ("Received redirect without LOCATION, this normally", Kind::Lasting),
            ("builder error for url: URL scheme is not allowed", Kind::Lasting),
        ] {
            assert_eq!(generic(text).kind, kind, "{text}");
        }
        let missing = object_store::Error::NotFound { path: "x".to_owned(), source: "gone".into() };
        assert_eq!(fault(missing).kind, Kind::NotFound);
    }
}
