//! From files and `--set` arguments to checked configurations.

use std::fs;
use std::path::{Path, PathBuf};

use super::contradictions;
use super::error::{ConfigError, ConfigErrors, Problem};
use super::node::Node;
use super::overrides;
use super::reader::Reader;
use super::types::{Config, Stage};
use super::validate;
use super::value::ConfigValue;

impl Config {
    /// Reads one file; see [`Config::load_all`].
    ///
    /// # Errors
    /// Every mistake in it.
    pub fn load(path: &Path, sets: &[String]) -> Result<Config, ConfigErrors> {
        let mut promised = Vec::new();
        load_one(path, sets, &mut promised).map_err(ConfigErrors::new)
    }

    /// Reads the files of one command in the order in which they will run, each with the `--set` arguments applied.
    ///
    /// A later file may start from the run of an earlier one, which need not exist yet.
    ///
    /// # Errors
    /// Every mistake in every file: unknown, repeated, mistyped, missing, out-of-range and contradictory keys, paths that
    /// lead nowhere, and two files with one run folder.
    pub fn load_all(paths: &[PathBuf], sets: &[String]) -> Result<Vec<Config>, ConfigErrors> {
        let mut promised = Vec::new();
        let mut configs = Vec::new();
        let mut errors = Vec::new();
        for path in paths {
            match load_one(path, sets, &mut promised) {
                Ok(config) => configs.push(config),
                Err(found) => errors.extend(found),
            }
        }
        if errors.is_empty() { Ok(configs) } else { Err(ConfigErrors::new(errors)) }
    }

    /// Reads the configuration that a run has kept, without asking whether its files are still where they were.
    ///
    /// # Errors
    /// Every key in it that this program does not read.
    pub fn load_resolved(path: &Path) -> Result<Config, ConfigErrors> {
        let file = path.display().to_string();
        let document = read_document(path, &file).map_err(ConfigErrors::new)?;
        let mut reader = Reader::new(file, &[], Config::keys());
        let config = decode(&document, &mut reader);
        let errors = reader.into_errors();
        if errors.is_empty() { Ok(config) } else { Err(ConfigErrors::new(errors)) }
    }

    /// This configuration with every default written out; loads to an equal one.
    pub fn to_yaml(&self) -> String {
        self.encode().to_yaml().expect("scalars, lists and mappings with text keys are YAML")
    }

    /// Dotted paths of every key there is.
    pub fn keys() -> Vec<String> {
        let mut keys = Vec::new();
        <Config as ConfigValue>::keys("", &mut keys);
        keys
    }
}

/// `promised`: the runs before this one; it is added.
fn load_one(path: &Path, sets: &[String], promised: &mut Vec<validate::Promised>) -> Result<Config, Vec<ConfigError>> {
    let file = path.display().to_string();
    let mut document = read_document(path, &file)?;
    let mut errors = Vec::new();
    let mut applied = Vec::new();
    for argument in sets {
        match overrides::apply(&mut document, argument) {
            Ok(done) => applied.push(done),
            Err(error) => errors.push(error),
        }
    }

    let mut reader = Reader::new(file, &applied, Config::keys());
    let config = decode(&document, &mut reader);
    contradictions::check_keys(&config, &mut reader);
    validate::check_files(&config, promised, &mut reader);
    validate::check_shards(&config, &mut reader);
    let folder = validate::place(&config.run_folder());
    if promised.iter().any(|run| validate::place(&run.folder) == folder) {
        let got = config.run.name.clone();
        let hint = Some("an earlier file has this one".to_string());
        reader.at("run.name", |r| r.unexpected("a run of its own for each file", got, hint));
    }
    promised.push(validate::Promised::by(&config));

    errors.extend(reader.into_errors());
    if errors.is_empty() { Ok(config) } else { Err(errors) }
}

fn read_document(path: &Path, file: &str) -> Result<Node, Vec<ConfigError>> {
    let wrong = |problem| vec![ConfigError { origin: file.to_string(), key: String::new(), problem }];
    let text = fs::read_to_string(path).map_err(|error| wrong(Problem::Unreadable(error.to_string())))?;
    match Node::parse(&text) {
        Ok(document @ (Node::Map(_) | Node::Null)) => Ok(document),
        Ok(other) => Err(wrong(Problem::Unexpected {
            expected: "a mapping with the sections run, task, model, data, ...".into(),
            got: other.to_string(),
            hint: None,
        })),
        Err(error) => Err(wrong(Problem::Syntax(error.to_string()))),
    }
}

fn decode(document: &Node, reader: &mut Reader) -> Config {
    let mut config = Config::decode(document, reader);
    if config.run.name.is_empty() {
        config.run.name = if config.task.stage == Stage::One { "stage1" } else { "stage2" }.to_string();
    }
    config
}
