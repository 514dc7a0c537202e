//! What a pickle may hold: plain values, and claims about tensors that are checked against the file later.

use tch::Kind;

use super::problem::TorchFileProblem;

/// A value's place in [`Pickle::values`]; values refer to each other by it, so cycles and shared parts cost nothing.
pub(super) type Id = u32;

/// One value of a pickle.
#[derive(Debug, Clone)]
pub(super) enum Value {
    None,
    Bool(bool),
    Int(i64),
    /// An integer beyond 64 bits, little-endian.
    Long(Vec<u8>),
    Float(f64),
    Text(String),
    Tuple(Vec<Id>),
    List(Vec<Id>),
    /// Pairs in the order of assignment; a key may come again.
    Dict(Vec<(Id, Id)>),
    /// A class or function by its name; never called.
    Global(Global),
    Storage(Box<StorageClaim>),
    Tensor(Box<TensorClaim>),
    /// Number of a tensor that an old tar file keeps elsewhere.
    TensorNumber(i64),
    /// Something without tensors of interest: bytes, a set, an object of a data class.
    Opaque,
}

/// The classes and functions that a pickle may refer to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Global {
    /// `_rebuild_tensor`, `_rebuild_tensor_v2`.
    Tensor(&'static str),
    /// `_rebuild_tensor_v3`: the dtype is an argument, the storage has none.
    TensorOfDtype,
    /// `_rebuild_parameter`, `_rebuild_parameter_with_state`: the first argument is the tensor.
    Parameter(&'static str),
    /// A mapping class.
    Mapping,
    /// A storage class; an untyped one has no dtype.
    Storage(Option<Kind>),
    /// A dtype.
    Dtype(Kind),
    /// `torch.Size`.
    Size,
    /// A class whose objects are data and never tensors.
    Data,
}

/// What a tensor says of its storage.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct StorageClaim {
    pub key: String,
    /// `None` for an untyped one, whose elements are bytes.
    pub kind: Option<Kind>,
    /// Elements of the whole storage.
    pub elements: i64,
    /// First element and number of elements of a view of it; old files only.
    pub view: Option<(i64, i64)>,
}

/// What a pickle says of a tensor; none of it is checked yet.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct TensorClaim {
    pub storage: StorageClaim,
    pub kind: Kind,
    /// In elements of `kind`, from the beginning of the storage or its view.
    pub offset: i64,
    pub shape: Vec<i64>,
    pub strides: Vec<i64>,
}

/// One pickle, read.
#[derive(Debug)]
pub(super) struct Pickle {
    pub values: Vec<Value>,
    pub root: Id,
    /// Its bytes; another pickle may follow.
    pub length: usize,
}

impl Pickle {
    pub fn get(&self, id: Id) -> &Value {
        &self.values[id as usize]
    }

    /// The last value of a dictionary's text key.
    pub fn entry(&self, dict: Id, key: &str) -> Option<Id> {
        let Value::Dict(pairs) = self.get(dict) else { return None };
        let is_key = |id: Id| matches!(self.get(id), Value::Text(text) if text == key);
        pairs.iter().rev().find(|(name, _)| is_key(*name)).map(|(_, value)| *value)
    }
}

/// Looks a global up; all that is not listed is refused by name, wherever in the file it stands.
pub(super) fn resolve(module: &str, name: &str) -> Result<Global, TorchFileProblem> {
    let known = match (module, name) {
        ("torch._utils", "_rebuild_tensor") => Global::Tensor("torch._utils._rebuild_tensor"),
        ("torch._utils", "_rebuild_tensor_v2") => Global::Tensor("torch._utils._rebuild_tensor_v2"),
        ("torch._utils", "_rebuild_tensor_v3") => Global::TensorOfDtype,
        ("torch._utils", "_rebuild_parameter") => Global::Parameter("torch._utils._rebuild_parameter"),
        ("torch._utils", "_rebuild_parameter_with_state") => {
            Global::Parameter("torch._utils._rebuild_parameter_with_state")
        }
        ("collections", "OrderedDict" | "defaultdict" | "Counter") | ("builtins" | "__builtin__", "dict") => {
            Global::Mapping
        }
        ("torch", "Size") => Global::Size,
        ("torch.storage" | "torch", "UntypedStorage") => Global::Storage(None),
        _ if data_class(module, name) => Global::Data,
        ("torch", _) => {
            let dtype = dtype_kind(name).map(Global::Dtype);
            let storage = storage_kind(name).map(|kind| Global::Storage(Some(kind)));
            dtype.or(storage).ok_or_else(|| forbidden(module, name))?
        }
        _ => return Err(forbidden(module, name)),
    };
    Ok(known)
}

fn forbidden(module: &str, name: &str) -> TorchFileProblem {
    // Names come from the file: no line breaks in a message of one line.
    let name = format!("{module}.{name}").chars().map(|c| if c.is_control() { '?' } else { c }).take(200).collect();
    TorchFileProblem::Forbidden { name }
}

/// Classes that checkpoints hold beside their tensors. Their objects are skipped, not made.
fn data_class(module: &str, name: &str) -> bool {
    match module {
        // `long` and `unicode` are what protocol 2 calls int and str.
        "builtins" | "__builtin__" => {
            let numbers = ["int", "long", "float", "bool", "complex"];
            let collections =
                ["set", "frozenset", "list", "tuple", "str", "unicode", "bytes", "bytearray", "slice", "range"];
            numbers.contains(&name) || collections.contains(&name) || name == "object"
        }
        "copyreg" | "copy_reg" => name == "_reconstructor",
        "_codecs" => name == "encode",
        "argparse" => name == "Namespace",
        "types" => name == "SimpleNamespace",
        "datetime" => ["datetime", "date", "time", "timedelta", "timezone"].contains(&name),
        "pathlib" | "pathlib._local" => ["Path", "PosixPath", "WindowsPath", "PurePosixPath"].contains(&name),
        "torch" => {
            ["device", "Tensor", "FloatTensor", "HalfTensor", "LongTensor", "IntTensor", "ByteTensor"].contains(&name)
        }
        "torch.nn.parameter" => name == "Parameter",
        "numpy" => ["dtype", "ndarray"].contains(&name) || name.strip_prefix("float").is_some_and(is_digits),
        "numpy.core.multiarray" | "numpy._core.multiarray" => ["scalar", "_reconstruct"].contains(&name),
        "typing" => ["Any", "Union", "Dict", "List"].contains(&name),
        "omegaconf.dictconfig" => name == "DictConfig",
        "omegaconf.listconfig" => name == "ListConfig",
        "omegaconf.base" => ["ContainerMetadata", "Metadata"].contains(&name),
        "omegaconf.nodes" => {
            ["AnyNode", "StringNode", "IntegerNode", "FloatNode", "BooleanNode", "PathNode", "BytesNode", "EnumNode"]
                .contains(&name)
        }
        _ => false,
    }
}

fn is_digits(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

fn storage_kind(name: &str) -> Option<Kind> {
    Some(match name.strip_suffix("Storage")? {
        "Float" => Kind::Float,
        "Double" => Kind::Double,
        "Half" => Kind::Half,
        "BFloat16" => Kind::BFloat16,
        "Long" => Kind::Int64,
        "Int" => Kind::Int,
        "Short" => Kind::Int16,
        "Char" => Kind::Int8,
        "Byte" => Kind::Uint8,
        "Bool" => Kind::Bool,
        "ComplexFloat" => Kind::ComplexFloat,
        "ComplexDouble" => Kind::ComplexDouble,
        _ => return None,
    })
}

fn dtype_kind(name: &str) -> Option<Kind> {
    Some(match name {
        "float32" | "float" => Kind::Float,
        "float64" | "double" => Kind::Double,
        "float16" | "half" => Kind::Half,
        "bfloat16" => Kind::BFloat16,
        "int64" | "long" => Kind::Int64,
        "int32" | "int" => Kind::Int,
        "int16" | "short" => Kind::Int16,
        "int8" => Kind::Int8,
        "uint8" => Kind::Uint8,
        "bool" => Kind::Bool,
        "complex64" => Kind::ComplexFloat,
        "complex128" => Kind::ComplexDouble,
        "float8_e4m3fn" => Kind::Float8e4m3fn,
        "float8_e5m2" => Kind::Float8e5m2,
        "float8_e4m3fnuz" => Kind::Float8e4m3fnuz,
        "float8_e5m2fnuz" => Kind::Float8e5m2fnuz,
        _ => return None,
    })
}
