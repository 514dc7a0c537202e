//! Shard patterns: plain paths, brace ranges such as `shards/{00000..00099}.tar`, lists `{a,b}` and globs.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use crate::DataError;

/// How many names one pattern may stand for; a typing error such as `{0..99999999}` should not fill the memory.
const MAX_NAMES: usize = 1_000_000;

/// The shards that `patterns` name, in their order; a glob's matches are sorted. Relative ones start from `base`.
///
/// # Errors
/// All at once: patterns that cannot be parsed or match nothing, files that do not exist, shards named twice.
pub fn expand(patterns: &[String], base: &Path) -> Result<Vec<PathBuf>, DataError> {
    let mut shards = Vec::new();
    let mut errors = Vec::new();
    for pattern in patterns {
        match expand_one(pattern, base) {
            Ok((found, missing)) => {
                shards.extend(found);
                errors.extend(missing);
            }
            Err(error) => errors.push(error),
        }
    }
    if patterns.is_empty() {
        errors.push(bad("", "no pattern is given"));
    }
    let mut seen = HashSet::new();
    errors.extend(
        shards.iter().filter(|path| !seen.insert(*path)).map(|path| DataError::DuplicateShard { path: path.clone() }),
    );
    if errors.is_empty() { Ok(shards) } else { Err(DataError::from_list(errors)) }
}

fn bad(pattern: &str, reason: impl Into<String>) -> DataError {
    DataError::Pattern { pattern: pattern.to_owned(), reason: reason.into() }
}

/// The files of one pattern, and an error for each that is named and missing.
fn expand_one(pattern: &str, base: &Path) -> Result<(Vec<PathBuf>, Vec<DataError>), DataError> {
    let (mut found, mut missing) = (Vec::new(), Vec::new());
    for name in expand_braces(pattern).map_err(|reason| bad(pattern, reason))? {
        let path = base.join(&name);
        if name.contains(['*', '?', '[']) {
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
                    found.push(path);
                }
            }
            if found.len() == before {
                missing.push(DataError::NoMatch { pattern: pattern.to_owned(), folder: base.to_owned() });
            }
        } else if path.is_file() {
            found.push(path);
        } else {
            missing.push(DataError::MissingShard { path, pattern: pattern.to_owned() });
        }
    }
    Ok((found, missing))
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
        let paths = expand(&patterns, base)?;
        Ok(paths.iter().map(|p| p.file_name().unwrap().to_str().unwrap().to_owned()).collect())
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
}
