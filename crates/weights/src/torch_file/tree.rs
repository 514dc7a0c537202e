//! From a pickle's object to tensors with names: dictionaries are the branches, their keys joined by dots.

use std::collections::BTreeMap;

use super::contents::{Contents, StoredTensor};
use super::problem::TorchFileProblem;
use super::value::{Id, Value};

/// Dictionaries inside each other; a dictionary that holds itself has no end.
const MAX_DEPTH: usize = 32;
/// Keys that are looked at; shared dictionaries can stand for more than the file could list.
const MAX_KEYS: usize = 1 << 20;
/// Bytes of joined names; long keys of shared dictionaries come again in every name below them.
const MAX_NAME_BYTES: usize = 64 << 20;
/// Where trainers put the model's dictionary.
const ROOTS: [&str; 3] = ["model", "state_dict", "module"];
const MAX_SCALAR_CHARS: usize = 120;

/// A file's tensors by name.
#[derive(Debug, Default)]
pub(super) struct Tree {
    /// The model's tensors, named below the root.
    pub tensors: BTreeMap<String, StoredTensor>,
    /// Tensors outside the root, by their whole path.
    pub beside: BTreeMap<String, StoredTensor>,
    /// Numbers and short texts beside the root.
    pub scalars: BTreeMap<String, String>,
}

/// Finds the model's dictionary: the object itself where it holds tensors, else the first of [`ROOTS`] in it.
pub(super) fn read(contents: &Contents) -> Result<Tree, TorchFileProblem> {
    let pickle = &contents.pickle;
    let Value::Dict(top) = pickle.get(pickle.root) else {
        return Err(TorchFileProblem::NoTensors { got: describe(pickle.get(pickle.root)).into() });
    };
    let is_tensor = |id: Id| matches!(pickle.get(id), Value::Tensor(_) | Value::TensorNumber(_));
    let inner = if top.iter().any(|(_, value)| is_tensor(*value)) {
        None
    } else {
        let named = |root: &&'static str| Some((*root, pickle.entry(pickle.root, root)?));
        let root =
            ROOTS.iter().find_map(|root| named(root).filter(|(_, id)| matches!(pickle.get(*id), Value::Dict(_))));
        Some(root.ok_or_else(|| TorchFileProblem::NoTensors { got: keys_of(contents, top) })?)
    };
    let mut walk = Walk { contents, keys: 0, name_bytes: 0 };
    let mut tree = Tree::default();
    let Some((root, id)) = inner else {
        walk.dict(pickle.root, "", 0, &mut tree.tensors)?;
        return Ok(tree);
    };
    walk.dict(id, "", 0, &mut tree.tensors)?;
    if tree.tensors.is_empty() {
        return Err(TorchFileProblem::NoTensors { got: format!("nothing under {root}") });
    }
    for &(key, value) in top {
        let Value::Text(name) = pickle.get(key) else { continue };
        if name == root {
            continue;
        }
        match pickle.get(value) {
            Value::Dict(_) => walk.dict(value, &format!("{}.", checked(name)?), 1, &mut tree.beside)?,
            Value::Tensor(_) | Value::TensorNumber(_) => {}
            other => {
                if let Some(scalar) = scalar(other) {
                    tree.scalars.insert(checked(name)?.to_string(), scalar);
                }
            }
        }
    }
    Ok(tree)
}

struct Walk<'a> {
    contents: &'a Contents,
    keys: usize,
    name_bytes: usize,
}

impl<'a> Walk<'a> {
    fn dict(
        &mut self,
        id: Id,
        prefix: &str,
        depth: usize,
        found: &mut BTreeMap<String, StoredTensor>,
    ) -> Result<(), TorchFileProblem> {
        if depth >= MAX_DEPTH {
            return Err(TorchFileProblem::Limit { what: "dictionaries inside each other", limit: MAX_DEPTH as u64 });
        }
        let pickle = &self.contents.pickle;
        let Value::Dict(pairs) = pickle.get(id) else { return Ok(()) };
        self.keys += pairs.len();
        if self.keys > MAX_KEYS {
            return Err(TorchFileProblem::Limit { what: "keys", limit: MAX_KEYS as u64 });
        }
        for &(key, value) in pairs {
            let claim = match pickle.get(value) {
                Value::Tensor(claim) => Some(&**claim),
                Value::TensorNumber(number) => Some(self.numbered(*number)?),
                Value::Dict(_) => None,
                _ => continue,
            };
            let name = match pickle.get(key) {
                Value::Text(name) => format!("{prefix}{}", checked(name)?),
                Value::Int(number) => format!("{prefix}{number}"),
                _ => continue,
            };
            self.name_bytes += name.len();
            if self.name_bytes > MAX_NAME_BYTES {
                return Err(TorchFileProblem::Limit { what: "bytes of names", limit: MAX_NAME_BYTES as u64 });
            }
            match claim {
                None => self.dict(value, &format!("{name}."), depth + 1, found)?,
                Some(claim) => {
                    let tensor = self.contents.place(&name, claim)?;
                    if found.insert(name.clone(), tensor).is_some() {
                        return Err(TorchFileProblem::Name { name, message: "appears twice" });
                    }
                }
            }
        }
        Ok(())
    }

    fn numbered(&self, number: i64) -> Result<&'a super::value::TensorClaim, TorchFileProblem> {
        let missing = || TorchFileProblem::Archive { message: format!("it has no tensor number {number}") };
        self.contents.numbered.get(&number).ok_or_else(missing)
    }
}

/// A key that may stand in a message of one line.
fn checked(name: &str) -> Result<&str, TorchFileProblem> {
    if name.chars().any(char::is_control) || name.chars().nth(1000).is_some() {
        let name = name.escape_debug().take(80).collect();
        return Err(TorchFileProblem::Name {
            name,
            message: "is longer than 1000 characters or holds control characters",
        });
    }
    Ok(name)
}

fn scalar(value: &Value) -> Option<String> {
    match value {
        Value::Bool(truth) => Some(truth.to_string()),
        Value::Int(number) => Some(number.to_string()),
        Value::Float(number) => Some(number.to_string()),
        Value::Text(text) => {
            let short = text.chars().nth(MAX_SCALAR_CHARS).is_none() && !text.chars().any(char::is_control);
            short.then(|| text.clone())
        }
        _ => None,
    }
}

fn describe(value: &Value) -> &'static str {
    match value {
        Value::Tensor(_) | Value::TensorNumber(_) => "one tensor",
        Value::List(_) | Value::Tuple(_) => "a list",
        Value::Opaque => "an object of another class",
        _ => "something else",
    }
}

fn keys_of(contents: &Contents, pairs: &[(Id, Id)]) -> String {
    let keys = pairs.iter().filter_map(|(key, _)| match contents.pickle.get(*key) {
        Value::Text(key) => Some(key.escape_debug().take(40).collect::<String>()),
        _ => None,
    });
    let keys: Vec<String> = keys.take(8).collect();
    if keys.is_empty() { "an empty dictionary".into() } else { format!("the keys {}", keys.join(", ")) }
}
