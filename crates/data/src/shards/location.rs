//! Where a file lies: on this machine, in an object store, or on a web server.

use std::fmt;
use std::path::{Path, PathBuf};

/// The schemes that are understood, with those that can list what they hold.
const SCHEMES: [(&str, bool); 8] = [
    ("s3", true),
    ("s3a", true),
    ("gs", true),
    ("az", true),
    ("abfs", true),
    ("abfss", true),
    ("https", false),
    ("http", false),
];

/// Where a file lies.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Location {
    /// A file of this machine.
    Local(Box<Path>),
    /// An object of a store, or a file of a web server.
    Remote(RemoteUrl),
}

impl Location {
    /// What a text means; relative paths start from `base`.
    ///
    /// # Errors
    /// With the reason, when it is a URL of a kind that is not understood.
    pub fn parse(text: &str, base: &Path) -> Result<Location, String> {
        match text.contains("://") {
            true => RemoteUrl::parse(text).map(Location::Remote),
            false => Ok(Location::Local(base.join(text).into())),
        }
    }

    /// The file's name without what stands before it.
    pub fn name(&self) -> String {
        match self {
            Location::Local(path) => path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            Location::Remote(url) => url.name().to_owned(),
        }
    }

    /// A path to show in messages.
    pub(crate) fn shown(&self) -> PathBuf {
        match self {
            Location::Local(path) => path.to_path_buf(),
            Location::Remote(url) => PathBuf::from(url.to_string()),
        }
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Location::Local(path) => path.display().fmt(f),
            Location::Remote(url) => url.fmt(f),
        }
    }
}

/// A URL such as `s3://bucket/shards/00000.tar`. Keys stand as they are, without percent signs for special characters;
/// only `http` and `https` are as browsers write them, and may hold credentials, in front of their host or in a query.
/// What is shown of a URL leaves those out.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct RemoteUrl(Box<str>);

impl RemoteUrl {
    /// Reads a URL.
    ///
    /// # Errors
    /// With the reason, when its scheme is not understood, bucket or key are missing, or a store's URL holds credentials.
    pub fn parse(text: &str) -> Result<RemoteUrl, String> {
        let shown = redacted(text);
        let (scheme, rest) = text.split_once("://").ok_or_else(|| format!("\"{shown}\" is not a URL"))?;
        if !SCHEMES.iter().any(|(known, _)| *known == scheme) {
            let known: Vec<&str> = SCHEMES.iter().map(|(scheme, _)| *scheme).collect();
            return Err(format!("the scheme \"{scheme}\" is not one of {}", known.join(", ")));
        }
        if !is_web(text) && shown != text {
            return Err(format!("\"{shown}\" holds credentials: those of a store come from the environment"));
        }
        let path = if is_web(text) { before_query(rest) } else { rest };
        match path.split_once('/') {
            Some((bucket, key)) if !bucket.is_empty() && !key.is_empty() && !key.ends_with('/') => {
                Ok(RemoteUrl(text.into()))
            }
            _ => Err(format!("\"{shown}\" lacks a bucket or a file in it: expected {scheme}://BUCKET/KEY")),
        }
    }

    /// The whole URL, credentials included: for requests and digests, not to be shown or written.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// `s3`, `https` and so on.
    pub fn scheme(&self) -> &str {
        self.0.split_once("://").map_or("", |(scheme, _)| scheme)
    }

    /// Whether its store can list what it holds; web servers cannot.
    pub(crate) fn can_list(&self) -> bool {
        SCHEMES.contains(&(self.scheme(), true))
    }

    /// `s3://bucket`
    pub fn root(&self) -> &str {
        &self.0[..self.key_start() - 1]
    }

    /// What stands behind the bucket, without a query.
    pub fn key(&self) -> &str {
        &self.0[self.key_start()..self.key_end()]
    }

    /// What stands behind the `?` of a web server's URL.
    pub fn query(&self) -> Option<&str> {
        self.0[self.key_end()..].strip_prefix('?')
    }

    /// What stands behind the key's last slash.
    pub fn name(&self) -> &str {
        self.key().rsplit('/').next().unwrap_or_default()
    }

    /// The URL up to its file's name.
    pub(crate) fn folder(&self) -> &str {
        &self.0[..self.key_end() - self.name().len()]
    }

    /// The object whose name has `suffix` behind it.
    pub fn with_suffix(&self, suffix: &str) -> RemoteUrl {
        let (url, query) = self.0.split_at(self.key_end());
        RemoteUrl(format!("{url}{suffix}{query}").into())
    }

    /// Whether something of it is not shown.
    pub(crate) fn holds_credentials(&self) -> bool {
        *self.to_string() != *self.0
    }

    /// What is shown of it, as a URL that may lead nowhere.
    pub(crate) fn without_credentials(&self) -> RemoteUrl {
        RemoteUrl(self.to_string().into())
    }

    /// Whether it is what [`RemoteUrl::without_credentials`] made of one that holds some.
    pub(crate) fn lacks_credentials(&self) -> bool {
        is_web(&self.0) && (self.query() == Some("...") || self.root().contains("://...@"))
    }

    fn key_start(&self) -> usize {
        let host = self.scheme().len() + "://".len();
        // A slash behind the host was demanded when it was parsed.
        self.0[host..].find('/').map_or(self.0.len(), |slash| host + slash + 1)
    }

    fn key_end(&self) -> usize {
        if is_web(&self.0) { before_query(&self.0).len() } else { self.0.len() }
    }
}

impl fmt::Display for RemoteUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if is_web(&self.0) { redacted_url(&self.0).fmt(f) } else { self.0.fmt(f) }
    }
}

impl fmt::Debug for RemoteUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RemoteUrl({self})")
    }
}

/// Whether a text is a web server's URL: there a `?` begins a query, and elsewhere it is part of the key.
pub(crate) fn is_web(text: &str) -> bool {
    text.starts_with("http://") || text.starts_with("https://")
}

/// Whether a pattern or URL is that of a manifest.
pub(crate) fn names_manifest(text: &str) -> bool {
    let path = if is_web(text) { before_query(text) } else { text };
    path.ends_with(".jsonl")
}

fn before_query(text: &str) -> &str {
    text.split('?').next().unwrap_or_default()
}

/// A shard pattern without the credentials that its URL may hold, in front of its host or in a web server's query; `...` stands in their place. What
/// has none stays as it is.
pub fn without_credentials(pattern: &str) -> String {
    if pattern.contains("://") { redacted_url(pattern) } else { pattern.to_owned() }
}

/// Whether a shard pattern is what [`without_credentials`] made of one that holds some: it leads nowhere.
pub fn lacks_credentials(pattern: &str) -> bool {
    let host = pattern.split_once("://").map_or("", |(_, rest)| rest);
    is_web(pattern) && (host.starts_with("...@") || pattern.ends_with("?..."))
}

/// A text without what URLs in it may hold of credentials. A URL ends with a blank or a quote, behind its host with a bracket too.
pub fn redacted(text: &str) -> String {
    let of_scheme = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'-' | b'.');
    let (mut shown, mut rest) = (String::with_capacity(text.len()), text);
    while let Some(at) = rest.find("://") {
        let scheme = rest.as_bytes()[..at].iter().rev().take_while(|byte| of_scheme(**byte)).count();
        let (before, url) = rest.split_at(at - scheme);
        let (url, behind) = url.split_at(end_of_url(url));
        shown.push_str(before);
        shown.push_str(&redacted_url(url));
        rest = behind;
    }
    shown + rest
}

fn end_of_url(url: &str) -> usize {
    let ends = |c: char| c.is_whitespace() || c == '"';
    let host = url.find("://").map_or(0, |at| at + "://".len());
    // A password may hold a bracket.
    let path = url[host..].find(|c: char| ends(c) || matches!(c, '/' | '?')).map_or(url.len(), |at| host + at);
    url[path..].find(|c: char| ends(c) || matches!(c, '\'' | ')' | '>')).map_or(url.len(), |at| path + at)
}

/// `https://...@host/a.tar?...` of `https://user:token@host/a.tar?signature=token`. A store's URL has no query, and a name in front of its `@` is a
/// container.
fn redacted_url(url: &str) -> String {
    let (scheme, rest) = url.split_at(url.find("://").map_or(0, |at| at + "://".len()));
    let is_store = SCHEMES.contains(&(scheme.trim_end_matches("://"), true));
    let authority = &rest[..rest.find(['/', '?']).unwrap_or(rest.len())];
    let credentials = match authority.rfind('@') {
        Some(at) => Some(at).filter(|&at| !is_store || authority[..at].contains(':')),
        // A password with a slash or a question mark in it, which should be %2F or %3F.
        None => rest.rfind('@').filter(|_| has_password(authority)),
    };
    let (hidden, rest) = match credentials {
        Some(at) => ("...", &rest[at..]),
        None => ("", rest),
    };
    match rest.split_once('?').filter(|_| !is_store) {
        Some((path, _)) => format!("{scheme}{hidden}{path}?..."),
        None => format!("{scheme}{hidden}{rest}"),
    }
}

/// Whether what stands behind the colon is no port.
fn has_password(authority: &str) -> bool {
    authority.split_once(':').is_some_and(|(_, port)| port.bytes().any(|byte| !byte.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_has_its_parts() {
        let url = RemoteUrl::parse("s3://bucket/a b/00000.tar").unwrap();
        assert_eq!((url.scheme(), url.root(), url.key()), ("s3", "s3://bucket", "a b/00000.tar"));
        assert_eq!((url.name(), url.can_list()), ("00000.tar", true));
        let url = RemoteUrl::parse("abfs://box@account.dfs.core.windows.net/x.tar").unwrap();
        assert_eq!((url.root(), url.key()), ("abfs://box@account.dfs.core.windows.net", "x.tar"));
        assert!(!RemoteUrl::parse("https://host:8080/x.tar").unwrap().can_list());
    }

    #[test]
    fn a_web_servers_url_shows_no_credentials() {
        let url = RemoteUrl::parse("https://user:token@host:81/a/0.tar?X-Sig=a/b&z=?").unwrap();
        assert_eq!((url.key(), url.name(), url.query()), ("a/0.tar", "0.tar", Some("X-Sig=a/b&z=?")));
        assert_eq!((url.root(), url.folder()), ("https://user:token@host:81", "https://user:token@host:81/a/"));
        assert_eq!(url.to_string(), "https://...@host:81/a/0.tar?...");
        assert!(url.holds_credentials() && !format!("{url:?}").contains("token"));
        assert_eq!(url.with_suffix(".idx").as_str(), "https://user:token@host:81/a/0.tar.idx?X-Sig=a/b&z=?");
        assert!(names_manifest("https://host/m.jsonl?t=1.tar") && !names_manifest("s3://b/m.jsonl?"));
        let told = "GET https://u:p@host/0.tar?sig=1: (http://h/1.tar?k), s3://b/a?.tar, abfs://box@account/x";
        let shown = "GET https://...@host/0.tar?... (http://h/1.tar?...), s3://b/a?.tar, abfs://box@account/x";
        assert_eq!(redacted(told), shown);
        for text in ["https://host?a=/b", "https://host/?a=b", "https://u:secret@host", "ftp://u:secret@host/x"] {
            let error = RemoteUrl::parse(text).unwrap_err();
            assert!(!error.contains("secret"), "{error}");
        }
        let error = RemoteUrl::parse("s3://key:secret@bucket/0.tar").unwrap_err();
        assert_eq!(error, "\"s3://...@bucket/0.tar\" holds credentials: those of a store come from the environment");
    }

    #[test]
    fn what_is_no_good_url_shows_no_credentials_either() {
        for (text, shown) in [
            ("htps://u:p@host/0.tar?sig=1", "htps://...@host/0.tar?..."),
            ("HTTPS://u:p@host/0.tar", "HTTPS://...@host/0.tar"),
            ("s3a://key:p/q+r@bucket/a?.tar", "s3a://...@bucket/a?.tar"),
            ("https://u:p/q@host/0.tar", "https://...@host/0.tar"),
            ("https://u:p?q@host/0.tar?sig=1", "https://...@host/0.tar?..."),
            ("[{shards: \"https://u:p)q'r>s@host/0.tar\"}]", "[{shards: \"https://...@host/0.tar\"}]"),
            (
                "(see http://host:80/a@b.tar) and http://[::1]:8080/x",
                "(see http://host:80/a@b.tar) and http://[::1]:8080/x",
            ),
            ("://", "://"),
        ] {
            assert_eq!(redacted(text), shown);
            assert_eq!(redacted(shown), shown);
        }
    }

    #[test]
    fn a_pattern_without_its_credentials_is_known_as_one() {
        for (pattern, shown) in [
            ("https://u:p@host/{00..99}.tar", "https://...@host/{00..99}.tar"),
            ("https://host/0.tar?sig=a)b'c", "https://host/0.tar?..."),
        ] {
            assert_eq!(without_credentials(pattern), shown);
            assert_eq!(without_credentials(shown), shown);
            assert!(lacks_credentials(shown) && !lacks_credentials(pattern));
        }
        for plain in ["https://host/{00..99}.tar", "s3://b/a?.tar", "a b/*.tar"] {
            assert_eq!(without_credentials(plain), plain);
            assert!(!lacks_credentials(plain));
        }
    }

    #[test]
    fn what_is_no_url_of_ours_says_so() {
        for (text, reason) in [
            ("ftp://host/x.tar", "the scheme \"ftp\" is not one of s3, s3a, gs"),
            ("s3://bucket", "expected s3://BUCKET/KEY"),
            ("s3:///key", "expected s3://BUCKET/KEY"),
            ("gs://bucket/folder/", "expected gs://BUCKET/KEY"),
        ] {
            let error = Location::parse(text, Path::new(".")).unwrap_err();
            assert!(error.contains(reason), "{error}");
        }
    }

    #[test]
    fn everything_else_is_a_path() {
        let location = Location::parse("a/b.tar", Path::new("/base")).unwrap();
        assert_eq!(location, Location::Local(Path::new("/base/a/b.tar").into()));
        assert_eq!((location.name(), location.to_string()), ("b.tar".to_owned(), "/base/a/b.tar".to_owned()));
    }
}
