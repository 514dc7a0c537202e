//! Parameters by name: what a model is made of, and how a file fills it.
//!
//! A [`ParamStore`] is either trainable (fp32, gradients on) or frozen (its own storage dtype, gradients off); a model declares its
//! parameters through a [`Scope`] and keeps shallow clones of the tensors. The name is the Hugging Face name, so saving is identity.
//! Loading is strict: exact names, exact shapes, an explicit cast, and a report of all problems at once.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::rc::Rc;

use tch::{Device, Kind, Tensor, no_grad};

/// How a parameter starts before any file is read.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Init {
    /// All zeros.
    Zeros,
    /// All ones.
    Ones,
    /// One value everywhere.
    Const(f64),
    /// Normal with mean 0 and this standard deviation.
    Normal(f64),
    /// Uniform in `[-bound, bound]`; `torch.nn.Linear`'s default has `bound = 1/sqrt(fan_in)` for weight and bias.
    Uniform(f64),
}

/// One parameter of a store.
#[derive(Debug)]
pub struct Param {
    /// The values; a shallow clone of what the model holds.
    pub tensor: Tensor,
    /// Whether AdamW decays it: everything but vectors (biases, norms). A 0-d parameter such as `temp` decays, as in LAVIS.
    pub decay: bool,
}

/// Named parameters on one device, all trainable or all frozen. Iteration is in the order of names.
#[derive(Debug)]
pub struct ParamStore {
    device: Device,
    kind: Kind,
    trainable: bool,
    params: Rc<RefCell<BTreeMap<String, Param>>>,
}

/// A place in the tree of names, as a directory: `scope.pp("encoder").param("weight", ..)` declares `encoder.weight`.
#[derive(Clone)]
pub struct Scope {
    prefix: String,
    device: Device,
    kind: Kind,
    trainable: bool,
    params: Rc<RefCell<BTreeMap<String, Param>>>,
}

impl ParamStore {
    /// A store of fp32 parameters that require gradients.
    pub fn trainable(device: Device) -> ParamStore {
        ParamStore { device, kind: Kind::Float, trainable: true, params: Rc::default() }
    }

    /// A store of parameters without gradients, kept in `kind`.
    pub fn frozen(device: Device, kind: Kind) -> ParamStore {
        ParamStore { device, kind, trainable: false, params: Rc::default() }
    }

    /// The top of the name tree.
    pub fn root(&self) -> Scope {
        Scope {
            prefix: String::new(),
            device: self.device,
            kind: self.kind,
            trainable: self.trainable,
            params: self.params.clone(),
        }
    }

    /// The device that holds every parameter.
    pub fn device(&self) -> Device {
        self.device
    }

    /// The storage dtype of every parameter that was declared in no other ([`Scope::in_kind`]).
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Whether its parameters require gradients.
    pub fn is_trainable(&self) -> bool {
        self.trainable
    }

    /// All names, sorted.
    pub fn names(&self) -> Vec<String> {
        self.params.borrow().keys().cloned().collect()
    }

    /// The tensor of that name.
    pub fn get(&self, name: &str) -> Option<Tensor> {
        self.params.borrow().get(name).map(|p| p.tensor.shallow_clone())
    }

    /// `(name, tensor, decay)` of every parameter, sorted by name.
    pub fn entries(&self) -> Vec<(String, Tensor, bool)> {
        let params = self.params.borrow();
        params.iter().map(|(n, p)| (n.clone(), p.tensor.shallow_clone(), p.decay)).collect()
    }

    /// How many numbers the parameters hold together.
    pub fn num_elements(&self) -> u64 {
        self.params.borrow().values().map(|p| p.tensor.numel() as u64).sum()
    }

    /// Fills the parameters from `source` under `plan`.
    ///
    /// Nothing is written unless the audit finds no problem.
    ///
    /// # Errors
    /// [`LoadError`] lists every missing, unexpected and misshapen tensor and every dtype that cannot be cast, at once.
    pub fn load(&self, source: &dyn TensorSource, plan: &LoadPlan) -> Result<LoadReport, LoadError> {
        let offered: BTreeMap<String, TensorInfo> = source.entries().into_iter().collect();
        let mut report = LoadReport::default();
        let mut problems = Vec::new();
        let mut used = BTreeSet::new();
        let mut copies = Vec::new();
        for (name, tensor, _) in self.entries() {
            let wanted = (plan.source_name)(&name);
            match offered.get(&wanted) {
                None if plan.may_be_fresh(&name) => report.fresh.push(name),
                None => problems.push(LoadProblem::Missing { name: wanted, expected: tensor.size() }),
                Some(info) => {
                    used.insert(wanted.clone());
                    let rows = plan.may_gain_rows(&name) && grows_rows(&info.shape, &tensor.size());
                    if info.shape != tensor.size() && !rows {
                        problems.push(LoadProblem::Shape {
                            name: wanted,
                            expected: tensor.size(),
                            got: info.shape.clone(),
                        });
                    } else if !is_float(info.kind) {
                        problems.push(LoadProblem::Kind { name: wanted, got: info.kind });
                    } else {
                        if info.kind != tensor.kind() {
                            report.cast.push(name.clone());
                        }
                        copies.push((name, wanted, tensor));
                    }
                }
            }
        }
        for name in offered.keys().filter(|n| !used.contains(*n)) {
            if plan.may_be_unused(name) {
                report.unused.push(name.clone());
            } else {
                problems.push(LoadProblem::Unexpected { name: name.clone() });
            }
        }
        if !problems.is_empty() {
            return Err(LoadError { origin: source.origin(), problems });
        }
        for (name, wanted, mut tensor) in copies {
            match source.read(&wanted) {
                Ok(value) => no_grad(|| {
                    let rows = value.size().first().copied();
                    match rows {
                        Some(rows) if value.size() != tensor.size() => tensor.narrow(0, 0, rows).copy_(&value),
                        _ => tensor.copy_(&value),
                    }
                }),
                Err(message) => problems.push(LoadProblem::Unreadable { name: wanted, message }),
            }
            report.loaded.push(name);
        }
        if problems.is_empty() { Ok(report) } else { Err(LoadError { origin: source.origin(), problems }) }
    }
}

impl Scope {
    /// The scope below, as `cd name`.
    pub fn pp(&self, name: impl fmt::Display) -> Scope {
        Scope { prefix: self.path(&name.to_string()), ..self.clone() }
    }

    /// The device on which parameters are made.
    pub fn device(&self) -> Device {
        self.device
    }

    /// The dtype in which parameters are kept.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The same place for parameters that are kept in another dtype than the store's.
    pub fn in_kind(&self, kind: Kind) -> Scope {
        Scope { kind, ..self.clone() }
    }

    /// Declares a parameter and returns it.
    ///
    /// # Panics
    /// If the name is taken: two modules would share it by mistake.
    pub fn param(&self, name: &str, shape: &[i64], init: Init) -> Tensor {
        let tensor = no_grad(|| {
            let mut t = Tensor::empty(shape, (self.kind, self.device));
            match init {
                Init::Zeros => t.zero_(),
                Init::Ones => t.fill_(1.0),
                Init::Const(v) => t.fill_(v),
                // A frozen tower is always filled from a file: drawing billions of numbers first would only cost time.
                Init::Normal(_) | Init::Uniform(_) if !self.trainable => t.shallow_clone(),
                Init::Normal(std) => t.normal_(0.0, std),
                Init::Uniform(bound) => t.uniform_(-bound, bound),
            }
        });
        let tensor = tensor.set_requires_grad(self.trainable);
        let path = self.path(name);
        let decay = shape.len() != 1;
        let taken = self.params.borrow_mut().insert(path.clone(), Param { tensor: tensor.shallow_clone(), decay });
        assert!(taken.is_none(), "parameter {path} declared twice");
        tensor
    }

    fn path(&self, name: &str) -> String {
        if self.prefix.is_empty() { name.to_string() } else { format!("{}.{name}", self.prefix) }
    }
}

/// Dtype and shape of a stored tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorInfo {
    /// Its dtype in the file.
    pub kind: Kind,
    /// Its shape in the file.
    pub shape: Vec<i64>,
}

/// Something that holds named tensors: a file, a directory of shards, a map in memory.
pub trait TensorSource {
    /// Where it lies, for messages.
    fn origin(&self) -> String;
    /// Names with dtype and shape of all it holds.
    fn entries(&self) -> Vec<(String, TensorInfo)>;
    /// The tensor of that name, on the CPU, in the dtype of the file.
    ///
    /// # Errors
    /// A one-line reason.
    fn read(&self, name: &str) -> Result<Tensor, String>;
}

/// What a kind of source may lack or have too much, and what it calls things.
pub struct LoadPlan {
    /// The source's name of one of our parameters.
    pub source_name: Box<dyn Fn(&str) -> String>,
    /// Our names that the source cannot have and that keep their fresh values.
    pub fresh: Box<dyn Fn(&str) -> bool>,
    /// The source's names that this stage does not take.
    pub unused: Box<dyn Fn(&str) -> bool>,
    /// Our names that may have more rows than the source's tensor, whose rows come first (the added `[DEC]` embedding).
    pub gain_rows: Box<dyn Fn(&str) -> bool>,
}

impl LoadPlan {
    /// Same names on both sides, nothing fresh, nothing left over.
    pub fn exact() -> LoadPlan {
        LoadPlan {
            source_name: Box::new(str::to_string),
            fresh: Box::new(|_| false),
            unused: Box::new(|_| false),
            gain_rows: Box::new(|_| false),
        }
    }

    fn may_be_fresh(&self, name: &str) -> bool {
        (self.fresh)(name)
    }

    fn may_be_unused(&self, name: &str) -> bool {
        (self.unused)(name)
    }

    fn may_gain_rows(&self, name: &str) -> bool {
        (self.gain_rows)(name)
    }
}

/// What a load did, by our names (`unused`: the source's).
#[derive(Debug, Default, Clone, PartialEq)]
pub struct LoadReport {
    /// Filled from the source.
    pub loaded: Vec<String>,
    /// Of those, cast to the parameter's dtype.
    pub cast: Vec<String>,
    /// Kept at their initial values.
    pub fresh: Vec<String>,
    /// In the source, not of this stage.
    pub unused: Vec<String>,
}

/// One thing wrong with a source.
#[derive(Debug, Clone, PartialEq)]
pub enum LoadProblem {
    /// The source lacks a tensor.
    Missing {
        /// The source's name of it.
        name: String,
        /// The shape we need.
        expected: Vec<i64>,
    },
    /// The source has a tensor that nothing takes.
    Unexpected {
        /// Its name.
        name: String,
    },
    /// A tensor has another shape.
    Shape {
        /// Its name in the source.
        name: String,
        /// The shape we need.
        expected: Vec<i64>,
        /// The shape of the file.
        got: Vec<i64>,
    },
    /// A tensor is not of floating point.
    Kind {
        /// Its name in the source.
        name: String,
        /// Its dtype.
        got: Kind,
    },
    /// A tensor could not be read.
    Unreadable {
        /// Its name in the source.
        name: String,
        /// Why.
        message: String,
    },
}

impl fmt::Display for LoadProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LoadProblem::Missing { name, expected } => write!(f, "missing {name}, expected shape {expected:?}"),
            LoadProblem::Unexpected { name } => write!(f, "unexpected {name}: no parameter takes it"),
            LoadProblem::Shape { name, expected, got } => {
                write!(f, "{name}: expected shape {expected:?}, got {got:?}")
            }
            LoadProblem::Kind { name, got } => write!(f, "{name}: expected floating point, got {got:?}"),
            LoadProblem::Unreadable { name, message } => write!(f, "{name}: {message}"),
        }
    }
}

/// Everything that is wrong with a source.
#[derive(Debug, Clone, PartialEq)]
pub struct LoadError {
    /// Where the source lies.
    pub origin: String,
    /// All problems, in the order of names.
    pub problems: Vec<LoadProblem>,
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 12;
        let count = self.problems.len();
        write!(f, "{}: {count} problem{} with its tensors", self.origin, if count == 1 { "" } else { "s" })?;
        for problem in self.problems.iter().take(SHOWN) {
            write!(f, "\n  {problem}")?;
        }
        if count > SHOWN {
            write!(f, "\n  and {} more", count - SHOWN)?;
        }
        Ok(())
    }
}

impl std::error::Error for LoadError {}

fn is_float(kind: Kind) -> bool {
    matches!(kind, Kind::Float | Kind::Half | Kind::BFloat16 | Kind::Double)
}

fn grows_rows(source: &[i64], ours: &[i64]) -> bool {
    source.len() == ours.len() && !ours.is_empty() && source[0] < ours[0] && source[1..] == ours[1..]
}

/// Tensors in memory as a source, as a test or a converter has them.
impl TensorSource for BTreeMap<String, Tensor> {
    fn origin(&self) -> String {
        "memory".into()
    }

    fn entries(&self) -> Vec<(String, TensorInfo)> {
        self.iter().map(|(n, t)| (n.clone(), TensorInfo { kind: t.kind(), shape: t.size() })).collect()
    }

    fn read(&self, name: &str) -> Result<Tensor, String> {
        self.get(name).map(Tensor::shallow_clone).ok_or_else(|| "no such tensor".to_string())
    }
}
