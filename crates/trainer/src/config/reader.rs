//! Walks a document along the declared keys and collects every mistake with its origin and path.

use strsim::osa_distance;

use super::error::{ConfigError, Problem};
use super::node::Node;
use super::overrides::Override;
use super::value::{ConfigValue, Rule};

/// The place in one file that is being read, and the mistakes found so far.
pub(super) struct Reader<'a> {
    file: String,
    overrides: &'a [Override],
    known_keys: Vec<String>,
    path: Vec<String>,
    errors: Vec<ConfigError>,
}

impl<'a> Reader<'a> {
    /// `known_keys`: every dotted path there is, from which suggestions are made.
    pub(super) fn new(file: String, overrides: &'a [Override], known_keys: Vec<String>) -> Self {
        Self { file, overrides, known_keys, path: Vec::new(), errors: Vec::new() }
    }

    pub(super) fn into_errors(self) -> Vec<ConfigError> {
        self.errors
    }

    /// Does `work` one key further down.
    pub(super) fn within<T>(&mut self, key: &str, work: impl FnOnce(&mut Self) -> T) -> T {
        self.path.push(key.to_string());
        let result = work(self);
        self.path.pop();
        result
    }

    /// Does `work` at a dotted path from the top.
    pub(super) fn at<T>(&mut self, key: &str, work: impl FnOnce(&mut Self) -> T) -> T {
        let before = std::mem::replace(&mut self.path, key.split('.').map(str::to_string).collect());
        let result = work(self);
        self.path = before;
        result
    }

    /// The entries of a section, after its unknown and repeated keys have been reported.
    pub(super) fn entries<'n>(&mut self, node: &'n Node, known: &[&str]) -> &'n [(String, Node)] {
        let entries = match node {
            Node::Map(entries) => entries.as_slice(),
            // A section whose lines are all commented out.
            Node::Null => &[],
            other => {
                self.unexpected(format!("a section with {}", known.join(", ")), other.to_string(), None);
                &[]
            }
        };
        for (i, (key, _)) in entries.iter().enumerate() {
            if entries[..i].iter().any(|(earlier, _)| earlier == key) {
                continue;
            }
            let times = entries.iter().filter(|(other, _)| other == key).count();
            if !known.contains(&key.as_str()) {
                let hint = self.suggest(key, known);
                self.within(key, |r| r.report(Problem::UnknownKey { hint }));
            } else if times > 1 {
                self.within(key, |r| r.report(Problem::RepeatedKey { times }));
            }
        }
        entries
    }

    /// One key of a section; of a repeated one the last counts.
    pub(super) fn field<T: ConfigValue>(
        &mut self,
        entries: &[(String, Node)],
        key: &str,
        default: Option<T>,
        rule: Option<Rule<T>>,
    ) -> T {
        let node = entries.iter().rev().find(|(name, _)| name == key).map(|(_, node)| node);
        self.within(key, |reader| {
            let Some(node) = node else {
                return default.unwrap_or_else(|| T::missing(reader));
            };
            let before = reader.errors.len();
            let value = T::decode(node, reader);
            if let Some(rule) = rule
                && reader.errors.len() == before
                && !(rule.holds)(&value)
            {
                reader.unexpected(rule.expected, node.to_string(), None);
            }
            value
        })
    }

    /// A value that does not belong at the current key.
    pub(super) fn unexpected(&mut self, expected: impl Into<String>, got: String, hint: Option<String>) {
        self.report(Problem::Unexpected { expected: expected.into(), got, hint });
    }

    /// Nothing stands at the current key, which has no default.
    pub(super) fn missing(&mut self, expected: impl Into<String>) {
        self.report(Problem::MissingKey { expected: expected.into() });
    }

    /// Whether a mistake was reported at, below or above `key`, so that nothing can be concluded from its value.
    pub(super) fn has_failed(&self, key: &str) -> bool {
        let below = |long: &str, short: &str| {
            long.strip_prefix(short).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        };
        self.errors.iter().any(|error| below(&error.key, key) || below(key, &error.key))
    }

    fn report(&mut self, problem: Problem) {
        let origin = self
            .overrides
            .iter()
            .rev()
            .find(|argument| self.path.starts_with(argument.introduced()))
            .map_or_else(|| self.file.clone(), |argument| format!("--set {}", argument.text()));
        self.errors.push(ConfigError { origin, key: self.path.join("."), problem });
    }

    fn suggest(&self, key: &str, known: &[&str]) -> String {
        let near = |name: &str| osa_distance(&key.to_lowercase(), name) <= (name.len() / 3).max(1);
        let mut candidates: Vec<&str> = known.iter().copied().filter(|name| near(name)).collect();
        candidates.sort_by_key(|name| osa_distance(key, name));
        if let Some(name) = candidates.first() {
            return format!("did you mean {name}?");
        }
        let elsewhere = self.known_keys.iter().find(|path| path.rsplit('.').next() == Some(key));
        match elsewhere {
            Some(path) => format!("did you mean {path}?"),
            None => format!("known here: {}", known.join(", ")),
        }
    }
}
