//! What a pickle's calls and persistent ids mean: claims about storages and tensors, mappings, placeholders. Nothing is called.

use tch::Kind;

use super::machine::{Machine, Step};
use super::problem::TorchFileProblem;
use super::value::{Global, Id, StorageClaim, TensorClaim, Value};

/// Axes of a tensor.
const MAX_AXES: usize = 64;
/// Bytes of a storage's key.
const MAX_KEY: usize = 100;

impl Machine<'_> {
    /// BINPERSID: what lies outside the pickle, a storage or a numbered tensor.
    pub(super) fn persistent(&mut self) -> Step {
        let id = self.pop()?;
        let items = match self.get(id) {
            Value::Tuple(items) => items.iter().copied().take(6).collect::<Vec<_>>(),
            Value::Int(number) => {
                let number = *number;
                return self.push(Value::TensorNumber(number));
            }
            _ => return Err(self.damaged("a persistent id that is neither a tuple nor a number")),
        };
        let values: Vec<&Value> = items.iter().map(|&id| self.get(id)).collect();
        let (kind, key, elements, view) = match values.as_slice() {
            [
                Value::Text(tag),
                Value::Global(Global::Storage(kind)),
                key,
                _location,
                Value::Int(elements),
                view @ ..,
            ] if tag == "storage" => (*kind, key, *elements, view.first()),
            _ => return Err(self.damaged("a persistent id that is no storage")),
        };
        let key = match key {
            Value::Text(key) if key.len() <= MAX_KEY => key.clone(),
            Value::Int(key) => key.to_string(),
            _ => return Err(self.damaged("a storage whose key is no short text")),
        };
        let view = match view {
            Some(Value::Tuple(view)) => match view.iter().map(|&id| self.get(id)).collect::<Vec<_>>().as_slice() {
                [_view_key, Value::Int(offset), Value::Int(size)] => Some((*offset, *size)),
                _ => return Err(self.damaged("a storage's view without offset and size")),
            },
            _ => None,
        };
        self.push(Value::Storage(Box::new(StorageClaim { key, kind, elements, view })))
    }

    pub(super) fn call(&mut self, callable: Id, arguments: Id) -> Step {
        let Value::Global(global) = *self.get(callable) else {
            return Err(self.damaged("it calls what is neither a class nor a function"));
        };
        let Value::Tuple(arguments) = self.get(arguments) else {
            return Err(self.damaged("a call whose arguments are no tuple"));
        };
        let arguments = arguments.clone();
        self.charge(arguments.len())?;
        match global {
            Global::Data | Global::Storage(_) | Global::Dtype(_) => self.push(Value::Opaque),
            Global::Mapping => self.mapping(&arguments),
            Global::Size => match arguments.first().map(|&id| self.get(id)) {
                Some(Value::Tuple(_) | Value::List(_)) => self.push_id(arguments[0]),
                _ => Err(TorchFileProblem::Call { name: "torch.Size", message: "no tuple".into() }),
            },
            Global::Parameter(name) => match arguments.first().map(|&id| self.get(id)) {
                Some(Value::Tensor(_) | Value::TensorNumber(_)) => self.push_id(arguments[0]),
                _ => Err(TorchFileProblem::Call { name, message: "something that is no tensor".into() }),
            },
            Global::Tensor(name) => self.tensor(name, &arguments, None),
            Global::TensorOfDtype => {
                let name = "torch._utils._rebuild_tensor_v3";
                match arguments.get(6).map(|&id| self.get(id)) {
                    Some(&Value::Global(Global::Dtype(kind))) => self.tensor(name, &arguments, Some(kind)),
                    _ => Err(TorchFileProblem::Call { name, message: "no known dtype".into() }),
                }
            }
        }
    }

    /// An empty mapping, one of a list of pairs, as Python 2 wrote them, or a copy.
    fn mapping(&mut self, arguments: &[Id]) -> Step {
        let pairs = match arguments.first().map(|&id| self.get(id)) {
            Some(Value::Dict(pairs)) => pairs.clone(),
            Some(Value::List(items)) => {
                let pair = |&item: &Id| match self.get(item) {
                    Value::Tuple(pair) | Value::List(pair) if pair.len() == 2 => Ok((pair[0], pair[1])),
                    _ => Err(self.damaged("a mapping of what are no pairs")),
                };
                items.iter().map(pair).collect::<Step<Vec<_>>>()?
            }
            _ => Vec::new(),
        };
        self.charge(pairs.len())?;
        self.push(Value::Dict(pairs))
    }

    fn tensor(&mut self, name: &'static str, arguments: &[Id], dtype: Option<Kind>) -> Step {
        let wrong = |message: &str| TorchFileProblem::Call { name, message: message.into() };
        let values: Vec<&Value> = arguments.iter().take(4).map(|&id| self.get(id)).collect();
        let [Value::Storage(storage), Value::Int(offset), shape, strides] = values.as_slice() else {
            return Err(wrong("other arguments than storage, offset, size and stride"));
        };
        let kind = dtype.or(storage.kind).ok_or_else(|| wrong("a storage without a dtype"))?;
        let shape = self.integers(shape).ok_or_else(|| wrong("a size that is no tuple of at most 64 integers"))?;
        let strides =
            self.integers(strides).ok_or_else(|| wrong("a stride that is no tuple of at most 64 integers"))?;
        let claim = TensorClaim { storage: StorageClaim::clone(storage), kind, offset: *offset, shape, strides };
        self.charge(claim.shape.len() + claim.strides.len())?;
        self.push(Value::Tensor(Box::new(claim)))
    }

    fn integers(&self, value: &Value) -> Option<Vec<i64>> {
        let (Value::Tuple(items) | Value::List(items)) = value else { return None };
        if items.len() > MAX_AXES {
            return None;
        }
        items.iter().map(|&id| if let Value::Int(n) = self.get(id) { Some(*n) } else { None }).collect()
    }
}
