//! What can be wrong with a configuration, one line for each mistake.

use std::fmt;

use blip2_data::redacted;
use thiserror::Error;

/// Every mistake found in the configuration files of one command.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub struct ConfigErrors(Vec<ConfigError>);

impl ConfigErrors {
    /// Keeps each mistake once, in the order found.
    pub(super) fn new(errors: Vec<ConfigError>) -> Self {
        let mut kept: Vec<ConfigError> = Vec::new();
        for error in errors {
            if !kept.contains(&error) {
                kept.push(error);
            }
        }
        Self(kept)
    }

    /// The mistakes, in the order of the files and their keys.
    pub fn iter(&self) -> impl Iterator<Item = &ConfigError> {
        self.0.iter()
    }
}

/// One line for each mistake.
impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, error) in self.0.iter().enumerate() {
            write!(f, "{}{error}", if i > 0 { "\n" } else { "" })?;
        }
        Ok(())
    }
}

/// One mistake: where it stands and what it is. What is told of it leaves out what URLs in it may hold of credentials.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{}", told(origin, key, problem))]
pub struct ConfigError {
    /// The file, or the `--set` argument, that holds the mistake.
    pub origin: String,
    /// Dotted path of the key; list entries by their index, empty for the file as a whole.
    pub key: String,
    /// What is wrong there.
    pub problem: Problem,
}

fn told(origin: &str, key: &str, problem: &Problem) -> String {
    let key = if key.is_empty() { String::new() } else { format!("{key}: ") };
    redacted(&format!("{origin}: {key}{problem}"))
}

/// The kinds of mistakes.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Problem {
    /// The file cannot be read.
    #[error("expected a readable YAML file, got {0}")]
    Unreadable(String),
    /// The text is not YAML.
    #[error("expected YAML, got {0}")]
    Syntax(String),
    /// No such key exists.
    #[error("expected a known key, got an unknown one; {hint}")]
    UnknownKey {
        /// The key that was probably meant, or those that exist here.
        hint: String,
    },
    /// The key stands twice in its section.
    #[error("expected the key once, got it {times} times; delete all but one")]
    RepeatedKey {
        /// How often it stands there.
        times: usize,
    },
    /// A key that has no default is not there.
    #[error("expected {expected}, got nothing; this key has no default")]
    MissingKey {
        /// What belongs there.
        expected: String,
    },
    /// A value of the wrong type, out of range, or against another key or the file system.
    #[error("expected {expected}, got {got}{}", hint.as_ref().map(|hint| format!("; {hint}")).unwrap_or_default())]
    Unexpected {
        /// What belongs there.
        expected: String,
        /// What stands there.
        got: String,
        /// What to do, where that is not plain.
        hint: Option<String>,
    },
}
