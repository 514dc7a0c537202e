//! The reference of all keys, made from their declarations; docs/config.md is its text.

use super::diff::{DECIDES, FREE};
use super::node::Node;
use super::reader::Reader;
use super::types::Config;
use super::value::{ConfigValue, Rule};

const INTRODUCTION: &str = "\
# Configuration

Every key of a configuration file. `blip2 config --reference` prints this page, which a test compares with the program.

One YAML file is one stage of one run. In paths `0` stands for a place in a list and FIELD for a name of your own. `--set key.path=value` overrides a
key: `--set data.train.0.weight=2`. Relative paths begin at the current directory. Unknown, repeated and mistyped keys are errors, and so is what keys
demand of each other: `train --dry-run` names it all at once. [training.md](training.md) has whole files, [data.md](data.md) and [ranks.md](ranks.md) say
more of `data` and of several processes.";

/// Keys that are declared together, with everywhere that they may stand.
pub(super) struct Section {
    /// What declares them.
    name: &'static str,
    /// The first place; empty for the whole file.
    path: String,
    /// The further ones.
    also: Vec<String>,
    about: &'static str,
    keys: Vec<Key>,
}

/// One key of a section, in words.
pub(super) struct Key {
    name: &'static str,
    takes: String,
    default: String,
    about: String,
}

impl Config {
    /// Every key with what it takes, its default and what it is for, as Markdown without an end of line behind it.
    pub fn reference() -> String {
        let mut sections = Vec::new();
        <Config as ConfigValue>::sections("", &mut sections);
        let free = FREE.join("`, `");
        let text = format!(
            "{INTRODUCTION}\n\nA run that goes on may change `{free}`, but not `{DECIDES}`; and `shards`, where the same ones lie there."
        );
        sections.iter().fold(text, |text, section| text + &section.markdown())
    }
}

impl Section {
    /// Adds a section at `path`, or the path to the section if its keys are there already.
    pub(super) fn add(all: &mut Vec<Section>, name: &'static str, path: &str, about: &'static str, keys: Vec<Key>) {
        match all.iter_mut().find(|section| section.name == name) {
            Some(section) => section.also.push(path.to_string()),
            None => all.push(Section { name, path: path.to_string(), also: Vec::new(), about: about.trim(), keys }),
        }
    }

    fn markdown(&self) -> String {
        let mut text = String::new();
        if !self.path.is_empty() {
            text += &format!("\n\n## `{}`\n\n{}", self.path, self.about);
        }
        if !self.also.is_empty() {
            text += &format!("\n\nThe same keys stand in `{}`.", self.also.join("`, `"));
        }
        text += "\n\n| key | takes | default | |\n|---|---|---|---|";
        for Key { name, takes, default, about } in &self.keys {
            text += &format!("\n| `{name}` | {} | {} | {} |", cell(takes), cell(default), cell(about));
        }
        text
    }
}

impl Key {
    /// `default` and `rule` as the key declares them.
    pub(super) fn of<T: ConfigValue>(
        name: &'static str,
        about: &str,
        default: Option<T>,
        rule: Option<Rule<T>>,
    ) -> Key {
        let default = match default.map(|value| value.encode()).or_else(left_out::<T>) {
            None => "must be given".to_string(),
            // A section: its keys have their own.
            Some(Node::Map(_)) => String::new(),
            Some(Node::Text(word)) if !word.is_empty() => format!("`{word}`"),
            Some(value) => format!("`{value}`"),
        };
        let about = format!("{} {}", about.trim(), T::words()).trim().to_string();
        Key { name, takes: rule.map_or_else(T::takes, |rule| rule.expected), default, about }
    }
}

/// What a key without a default counts as where it is not in the file; none where that is a mistake.
fn left_out<T: ConfigValue>() -> Option<Node> {
    let mut reader = Reader::new(String::new(), &[], Vec::new());
    let value = T::missing(&mut reader);
    reader.into_errors().is_empty().then(|| value.encode())
}

/// Words with their meanings, in one line.
pub(super) fn meanings(words: &[(&str, &str)]) -> String {
    words.iter().map(|(word, meaning)| format!("`{word}`: {}", meaning.trim())).collect::<Vec<_>>().join(" ")
}

/// A text in a table.
fn cell(text: &str) -> String {
    text.replace('|', "\\|")
}
