//! `hf://ORG/NAME[@REVISION][#COMMIT]`: how a configuration names a model on a hub.

use std::fmt;
use std::str::FromStr;

/// What an id begins with.
pub const SCHEME: &str = "hf://";

/// A model on a hub, at a revision of it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct HubId {
    /// `org/name`, or `name` of the hub's first models.
    pub repo: String,
    /// A branch, tag or commit; left out, `main`.
    pub revision: Option<String>,
    /// The commit that the revision stood at when it was first used.
    pub commit: Option<String>,
}

impl HubId {
    /// The revision that is asked for.
    pub fn revision(&self) -> &str {
        self.revision.as_deref().unwrap_or("main")
    }

    /// The commit where it is known: written behind `#`, or the revision itself.
    pub(crate) fn known_commit(&self) -> Option<&str> {
        self.commit.as_deref().or(self.revision.as_deref().filter(|revision| is_commit(revision)))
    }

    /// The same id at a commit, which is not said twice.
    pub fn at(&self, commit: &str) -> HubId {
        let commit = (self.revision.as_deref() != Some(commit)).then(|| commit.into());
        HubId { commit, ..self.clone() }
    }

    /// The id as it was asked for, without the commit.
    pub fn asked(&self) -> HubId {
        HubId { commit: None, ..self.clone() }
    }
}

impl fmt::Display for HubId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}", self.repo)?;
        self.revision.iter().try_for_each(|revision| write!(f, "@{revision}"))?;
        self.commit.iter().try_for_each(|commit| write!(f, "#{commit}"))
    }
}

impl FromStr for HubId {
    type Err = String;

    fn from_str(text: &str) -> Result<HubId, String> {
        let wrong = || format!("expected hf://ORG/NAME or hf://ORG/NAME@REVISION, got {text}");
        let rest = text.strip_prefix(SCHEME).ok_or_else(wrong)?;
        let (rest, commit) = match rest.split_once('#') {
            Some((rest, commit)) => (rest, Some(commit.to_string())),
            None => (rest, None),
        };
        let (repo, revision) = match rest.split_once('@') {
            Some((repo, revision)) => (repo, Some(revision.to_string())),
            None => (rest, None),
        };
        let parts = repo.split('/').count() <= 2 && repo.split('/').all(|part| is_name(part) && !part.contains("--"));
        let revision_fits = revision.iter().all(|revision| revision.split('/').all(is_name));
        if !parts || !revision_fits || !commit.iter().all(|commit| is_commit(commit)) {
            return Err(wrong());
        }
        Ok(HubId { repo: repo.into(), revision, commit })
    }
}

/// What may become a folder's name.
fn is_name(part: &str) -> bool {
    let known = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    !part.is_empty() && part.len() <= 96 && !part.starts_with('.') && part.chars().all(known)
}

/// 40 hexadecimal digits.
pub(super) fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.chars().all(|c| matches!(c, '0'..='9' | 'a'..='f'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_read_back_as_it_is_written() {
        let commit = "0123456789abcdef0123456789abcdef01234567";
        for text in [
            "hf://facebook/opt-2.7b".to_string(),
            "hf://gpt2".into(),
            "hf://org/name@v1.0".into(),
            "hf://org/name@refs/pr/5".into(),
            format!("hf://org/name#{commit}"),
            format!("hf://org/name@main#{commit}"),
        ] {
            assert_eq!(text.parse::<HubId>().unwrap().to_string(), text);
        }
        assert_eq!(format!("hf://a/b@{commit}").parse::<HubId>().unwrap().known_commit(), Some(commit));
        assert_eq!("hf://a/b@main".parse::<HubId>().unwrap().known_commit(), None);
    }

    #[test]
    fn what_could_leave_the_cache_folder_is_no_id() {
        for text in [
            "hf://",
            "hf://a/b/c",
            "hf://../b",
            "hf://a/..",
            "hf://a/b@../../x",
            "hf://a/b#abc",
            "hf://a b/c",
            "hf://a--b/c",
            "a/b",
        ] {
            assert!(text.parse::<HubId>().is_err(), "{text}");
        }
    }
}
