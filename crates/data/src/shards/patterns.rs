//! Shard patterns: plain paths and URLs, brace ranges such as `shards/{00000..00099}.tar`, lists `{a,b}` and globs.
//! A name that ends in `.jsonl` is a manifest.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use crate::shards::location::{Location, RemoteUrl, is_web, names_manifest, redacted};
use crate::shards::shard::Shard;
use crate::{DataError, remote::Object};

/// How many names one pattern may stand for; a typing error such as `{0..99999999}` should not fill the memory.
const MAX_NAMES: usize = 1_000_000;

/// What a pattern names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Named {
    /// A shard of this machine, which is there.
    Local(Box<Path>),
    /// A shard elsewhere; length and tag where a listing told them.
    Remote(Object),
    /// A file that names shards.
    Manifest(Location),
}

impl Named {
    pub(crate) fn location(&self) -> Location {
        match self {
            Named::Local(path) => Location::Local(path.clone()),
            Named::Remote(object) => Location::Remote(object.url.clone()),
            Named::Manifest(location) => location.clone(),
        }
    }
}

/// Lists the objects whose keys a glob matches.
pub(crate) type List<'a> = &'a dyn Fn(&RemoteUrl) -> Result<Vec<Object>, DataError>;

/// What `patterns` name, in their order; a glob's matches are sorted. Relative ones start from `base`.
///
/// # Errors
/// All at once: patterns that cannot be parsed or match nothing, files that do not exist, shards named twice.
pub(crate) fn expand(patterns: &[String], base: &Path, list: List<'_>) -> Result<Vec<Named>, DataError> {
    let mut all = Vec::new();
    let mut errors = Vec::new();
    for pattern in patterns {
        match expand_one(pattern, base, list) {
            Ok((found, missing)) => {
                all.extend(found);
                errors.extend(missing);
            }
            Err(error) => errors.push(error),
        }
    }
    if patterns.is_empty() {
        errors.push(bad("", "no pattern is given"));
    }
    let mut seen = HashSet::new();
    let twice = all.iter().map(Named::location).filter(|location| !seen.insert(location.clone()));
    errors.extend(twice.map(|location| DataError::DuplicateShard { path: location.shown() }));
    if errors.is_empty() { Ok(all) } else { Err(DataError::from_list(errors)) }
}

/// Whether patterns can be used, as far as this machine can tell: what lies elsewhere is not asked for.
///
/// # Errors
/// As for opening a set of them.
pub fn check_patterns(patterns: &[String], base: &Path) -> Result<(), DataError> {
    // A listing of one object: the glob's own name.
    expand(patterns, base, &|url| Ok(vec![Object::named(url.clone())])).map(|_| ())
}

/// The files of this machine that a pattern names, whatever they hold; in its order, a glob's matches sorted.
///
/// # Errors
/// As for [`check_patterns`]; or the pattern is a URL.
pub(crate) fn expand_files(pattern: &str) -> Result<Vec<PathBuf>, DataError> {
    if is_remote(pattern) {
        return Err(bad(pattern, "only files of this machine can be read here"));
    }
    let named = expand(&[pattern.to_owned()], Path::new("."), &|_| Ok(Vec::new()))?;
    Ok(named.into_iter().map(|named| named.location().shown()).collect())
}

/// Whether a pattern is a URL.
pub(crate) fn is_remote(pattern: &str) -> bool {
    pattern.contains("://")
}

fn bad(pattern: &str, reason: impl Into<String>) -> DataError {
    DataError::Pattern { pattern: redacted(pattern), reason: reason.into() }
}

/// The files of one pattern, and an error for each that is named and missing.
fn expand_one(pattern: &str, base: &Path, list: List<'_>) -> Result<(Vec<Named>, Vec<DataError>), DataError> {
    let (mut found, mut missing) = (Vec::new(), Vec::new());
    for name in expand_braces(pattern).map_err(|reason| bad(pattern, reason))? {
        let is_glob = name.contains(['*', '?', '[']);
        if is_remote(&name) {
            let url = RemoteUrl::parse(&name).map_err(|reason| bad(pattern, reason))?;
            // Web servers' hosts may have brackets, and a `?` begins a query.
            let is_glob = if url.can_list() { is_glob } else { url.key().contains(['*', '[']) };
            match (is_glob, url.can_list()) {
                (false, _) if names_manifest(&name) => found.push(Named::Manifest(Location::Remote(url))),
                (false, _) => found.push(Named::Remote(Object::named(url))),
                (true, true) => match list(&url)? {
                    objects if objects.is_empty() => {
                        missing.push(DataError::NoMatch { pattern: pattern.to_owned(), folder: url.root().into() });
                    }
                    objects => found.extend(objects.into_iter().map(Named::Remote)),
                },
                (true, false) => {
                    let reason =
                        "a web server cannot be asked what it holds: name the shards with braces, as {000..099}";
                    return Err(bad(pattern, reason));
                }
            }
            continue;
        }
        let path = base.join(&name);
        if is_glob {
            // The base folder is a place, not a pattern: its own brackets stand for themselves.
            let glob_pattern = match Path::new(&name).is_absolute() {
                true => name.clone(),
                false => format!("{}/{name}", glob::Pattern::escape(&base.to_string_lossy())),
            };
            let paths = glob::glob(&glob_pattern).map_err(|error| bad(pattern, error.to_string()))?;
            let before = found.len();
            for path in paths {
                let path =
                    path.map_err(|error| DataError::Io { path: error.path().to_owned(), source: error.into() })?;
                if path.is_file() {
                    found.push(Named::Local(path.into()));
                }
            }
            if found.len() == before {
                missing.push(DataError::NoMatch { pattern: pattern.to_owned(), folder: base.to_owned() });
            }
        } else if !path.is_file() {
            missing.push(DataError::MissingShard { path, pattern: pattern.to_owned() });
        } else if name.ends_with(".jsonl") {
            found.push(Named::Manifest(Location::Local(path.into())));
        } else {
            found.push(Named::Local(path.into()));
        }
    }
    Ok((found, missing))
}

/// Shards without the credentials of their URLs, for what is written.
pub(crate) fn without_credentials(shards: &[Shard]) -> Vec<Shard> {
    let hide = |location: &Location| match location {
        Location::Remote(url) => Location::Remote(url.without_credentials()),
        Location::Local(path) => Location::Local(path.clone()),
    };
    shards.iter().map(|shard| Shard { location: hide(&shard.location), ..shard.clone() }).collect()
}

/// The shards with the credentials that `patterns` hold; `None` where those do not say which belong to which.
pub(crate) fn with_credentials(mut shards: Vec<Shard>, patterns: &[String]) -> Option<Vec<Shard>> {
    let names = patterns.iter().filter(|pattern| is_web(pattern)).filter_map(|pattern| expand_braces(pattern).ok());
    let urls = names.flatten().filter_map(|name| RemoteUrl::parse(&name).ok());
    let mut known = HashMap::new();
    for url in urls.filter(RemoteUrl::holds_credentials) {
        if known.insert(url.to_string(), url).is_some() {
            return None;
        }
    }
    for shard in &mut shards {
        if let Location::Remote(shown) = &mut shard.location
            && shown.lacks_credentials()
        {
            *shown = known.remove(shown.as_str())?;
        }
    }
    Some(shards)
}

/// The names a pattern stands for, its first brace varying slowest.
fn expand_braces(pattern: &str) -> Result<Vec<String>, String> {
    let Some(open) = pattern.find(['{', '}']) else {
        return Ok(vec![pattern.to_owned()]);
    };
    let inside = pattern[open..].strip_prefix('{').ok_or("there is a '}' without its '{'")?;
    let close = inside.find(['{', '}']).ok_or("there is a '{' without its '}'")?;
    if inside[close..].starts_with('{') {
        return Err("braces inside braces are not supported".to_owned());
    }
    let choices = brace_choices(&inside[..close])?;
    let tails = expand_braces(&inside[close + 1..])?;
    if choices.len().saturating_mul(tails.len()) > MAX_NAMES {
        return Err(format!("stands for more than {MAX_NAMES} names"));
    }
    Ok(choices
        .iter()
        .flat_map(|choice| tails.iter().map(move |tail| format!("{}{choice}{tail}", &pattern[..open])))
        .collect())
}

fn brace_choices(inside: &str) -> Result<Vec<String>, String> {
    let Some((first, last)) = inside.split_once("..") else {
        return match inside.split(',').map(str::to_owned).collect::<Vec<_>>() {
            choices if choices.len() > 1 => Ok(choices),
            _ => Err(format!("{{{inside}}} is neither a range {{000..099}} nor a list {{a,b}}")),
        };
    };
    let number = |text: &str| match text.bytes().all(|byte| byte.is_ascii_digit()) {
        true => text.parse::<usize>().map_err(|_| format!("\"{text}\" is not a number")),
        false => Err(format!("\"{text}\" is not a number")),
    };
    let (from, to) = (number(first)?, number(last)?);
    if to < from {
        return Err(format!("the range {{{inside}}} runs backwards"));
    }
    if to - from >= MAX_NAMES {
        return Err(format!("stands for more than {MAX_NAMES} names"));
    }
    let width = if first.starts_with('0') { first.len() } else { 0 };
    Ok((from..=to).map(|n| format!("{n:0width$}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(names: &[&str]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for name in names {
            std::fs::write(folder.path().join(name), "x").unwrap();
        }
        folder
    }

    fn names(patterns: &[&str], base: &Path) -> Result<Vec<String>, DataError> {
        let patterns: Vec<String> = patterns.iter().map(|p| (*p).to_owned()).collect();
        let list = |url: &RemoteUrl| match url.root() {
            "s3://empty" => Ok(Vec::new()),
            root => {
                Ok(["b.tar", "a.tar"].map(|n| Object::named(RemoteUrl::parse(&format!("{root}/{n}")).unwrap())).into())
            }
        };
        let named = expand(&patterns, base, &list)?;
        Ok(named.iter().map(|named| named.location().name()).collect())
    }

    #[test]
    fn braces_expand_in_order_and_keep_their_width() {
        assert_eq!(expand_braces("a{08..10}").unwrap(), ["a08", "a09", "a10"]);
        assert_eq!(expand_braces("{8..10}").unwrap(), ["8", "9", "10"]);
        assert_eq!(expand_braces("{a,b}-{0..1}.tar").unwrap(), ["a-0.tar", "a-1.tar", "b-0.tar", "b-1.tar"]);
    }

    #[test]
    fn broken_braces_say_what_is_wrong() {
        for (pattern, reason) in [
            ("{0..9", "without its '}'"),
            ("0..9}", "without its '{'"),
            ("{9..0}", "backwards"),
            ("{a..b}", "not a number"),
            ("{..9}", "not a number"),
            ("{a}", "neither a range"),
            ("{{a,b},c}", "inside braces"),
            ("{0..99999999}", "more than"),
        ] {
            let error = expand_braces(pattern).unwrap_err();
            assert!(error.contains(reason), "{pattern}: {error}");
        }
    }

    #[test]
    fn files_come_in_the_order_of_the_patterns() {
        let folder = folder(&["b0.tar", "b1.tar", "a.tar", "note.txt"]);
        assert_eq!(names(&["b{0..1}.tar", "a.tar"], folder.path()).unwrap(), ["b0.tar", "b1.tar", "a.tar"]);
        assert_eq!(names(&["*.tar"], folder.path()).unwrap(), ["a.tar", "b0.tar", "b1.tar"]);
        let absolute = format!("{}/b*.tar", folder.path().display());
        assert_eq!(names(&[&absolute], Path::new("/nowhere")).unwrap(), ["b0.tar", "b1.tar"]);
    }

    #[test]
    fn all_problems_are_listed_at_once() {
        let folder = folder(&["a.tar"]);
        let error = names(&["{0..1}.tar", "*.zip", "{", "a.tar", "a.tar"], folder.path()).unwrap_err();
        let DataError::Many(errors) = &error else { panic!("{error}") };
        assert_eq!(errors.len(), 5, "{error}");
        let text = error.to_string();
        for part in ["0.tar", "1.tar", "*.zip", "without its '}'", "named twice"] {
            assert!(text.contains(part), "{text}");
        }
        assert!(!text.contains('\n'));
    }

    #[test]
    fn urls_expand_by_braces_and_by_listing() {
        let nowhere = Path::new("/nowhere");
        assert_eq!(names(&["s3://bucket/{0..1}.tar"], nowhere).unwrap(), ["0.tar", "1.tar"]);
        assert_eq!(names(&["s3://bucket/*.tar", "http://host/c.tar"], nowhere).unwrap(), ["b.tar", "a.tar", "c.tar"]);
        for (pattern, reason) in [
            ("s3://empty/*.tar", "matches no file in s3://empty"),
            ("https://host/*.tar", "name the shards with braces"),
            ("ftp://host/a.tar", "the scheme \"ftp\" is not one of"),
            ("s3://bucket/{0..9", "without its '}'"),
        ] {
            let error = names(&[pattern], nowhere).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
        let error = names(&["s3://b/a.tar", "s3://b/a.tar"], nowhere).unwrap_err();
        assert!(matches!(error, DataError::DuplicateShard { .. }), "{error}");
    }

    #[test]
    fn a_question_mark_begins_a_web_servers_query_and_shows_no_more() {
        let web = ["https://u:secret@[::1]/{0..1}.tar?sig=secret*[", "https://host/m.jsonl?sig=secret"];
        let patterns = web.map(str::to_owned);
        let named = expand(&patterns, Path::new("."), &|_| unreachable!()).unwrap();
        assert!(matches!(&named[..], [Named::Remote(_), Named::Remote(_), Named::Manifest(_)]), "{named:?}");
        assert_eq!(named[1].location().to_string(), "https://...@[::1]/1.tar?...");
        let error = names(&["https://u:secret@host/*.tar?sig=secret"], Path::new(".")).unwrap_err().to_string();
        assert!(error.contains("name the shards with braces") && !error.contains("secret"), "{error}");
        // Elsewhere it is part of a glob.
        assert_eq!(names(&["s3://bucket/?.tar"], Path::new(".")).unwrap(), ["b.tar", "a.tar"]);
    }

    #[test]
    fn credentials_come_back_from_the_patterns_that_hold_them() {
        let digest = crate::shards::index::Digest::of(b"");
        let shard = |url: &str| Shard {
            location: Location::Remote(RemoteUrl::parse(url).unwrap()),
            bytes: 1,
            samples: 1,
            problems: 0,
            index: digest,
            contents: None,
            etag: None,
        };
        let shards = [shard("https://u:p@host/0.tar"), shard("https://u:p@host/1.tar?s=1"), shard("http://host/2.tar")];
        let patterns = |all: &[&str]| all.iter().map(|pattern| (*pattern).to_owned()).collect::<Vec<_>>();
        let hidden = without_credentials(&shards);
        assert!(hidden.iter().all(|shard| !shard.location.to_string().contains("u:p")), "{hidden:?}");
        let known = patterns(&["https://u:p@host/{0.tar,1.tar?s=1}", "http://host/2.tar"]);
        assert_eq!(with_credentials(hidden.clone(), &known).unwrap(), shards);
        // Other credentials, none, or some that cannot be told apart.
        for unknown in [&["https://u:p@host/0.tar"][..], &[], &["https://u:p@host/{0.tar,1.tar?s=1,1.tar?s=2}"]] {
            assert!(with_credentials(hidden.clone(), &patterns(unknown)).is_none());
        }
    }

    #[test]
    fn a_manifest_is_known_by_its_name() {
        let folder = folder(&["manifest.jsonl"]);
        let patterns = ["manifest.jsonl".to_owned(), "gs://b/manifest.jsonl".to_owned()];
        let named = expand(&patterns, folder.path(), &|_| unreachable!()).unwrap();
        assert!(named.iter().all(|named| matches!(named, Named::Manifest(_))));
    }
}
