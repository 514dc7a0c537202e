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
            Location::Remote(url) => PathBuf::from(url.as_str()),
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
/// only `http` and `https` are as browsers write them.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RemoteUrl(Box<str>);

impl RemoteUrl {
    /// Reads a URL.
    ///
    /// # Errors
    /// With the reason, when its scheme is not understood, or bucket or key are missing.
    pub fn parse(text: &str) -> Result<RemoteUrl, String> {
        let (scheme, rest) = text.split_once("://").ok_or_else(|| format!("\"{text}\" is not a URL"))?;
        if !SCHEMES.iter().any(|(known, _)| *known == scheme) {
            let known: Vec<&str> = SCHEMES.iter().map(|(scheme, _)| *scheme).collect();
            return Err(format!("the scheme \"{scheme}\" is not one of {}", known.join(", ")));
        }
        match rest.split_once('/') {
            Some((bucket, key)) if !bucket.is_empty() && !key.is_empty() && !key.ends_with('/') => {
                Ok(RemoteUrl(text.into()))
            }
            _ => Err(format!("\"{text}\" lacks a bucket or a file in it: expected {scheme}://BUCKET/KEY")),
        }
    }

    /// The whole URL.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// `s3`, `https` and so on.
    pub fn scheme(&self) -> &str {
        self.0.split_once("://").map_or("", |(scheme, _)| scheme)
    }

    /// Whether its store can list what it holds; web servers cannot.
    pub fn can_list(&self) -> bool {
        SCHEMES.contains(&(self.scheme(), true))
    }

    /// `s3://bucket`
    pub fn root(&self) -> &str {
        &self.0[..self.key_start() - 1]
    }

    /// What stands behind the bucket.
    pub fn key(&self) -> &str {
        &self.0[self.key_start()..]
    }

    /// What stands behind the last slash.
    pub fn name(&self) -> &str {
        self.0.rsplit_once('/').map_or("", |(_, name)| name)
    }

    fn key_start(&self) -> usize {
        let host = self.scheme().len() + "://".len();
        // A slash behind the host was demanded when it was parsed.
        self.0[host..].find('/').map_or(self.0.len(), |slash| host + slash + 1)
    }
}

impl fmt::Display for RemoteUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
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
