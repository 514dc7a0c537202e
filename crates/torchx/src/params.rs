//! Parameters by name: what a model is made of, and how a file fills it.
//!
//! A [`ParamStore`] is either trainable (fp32, gradients on) or frozen (its own storage dtype, gradients off); a model declares its
//! parameters through a [`Scope`] and keeps shallow clones of the tensors. The name is the Hugging Face name, so saving is identity.
//! Loading is strict: exact names, exact shapes, an explicit cast, and a report of all problems at once.

mod load;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::rc::Rc;

use tch::{Device, Kind, Tensor, no_grad};

pub use load::{Audit, LoadError, LoadPlan, LoadProblem, LoadReport, TensorInfo, TensorSource, copy_values};

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
    values: Values,
    params: Rc<RefCell<BTreeMap<String, Param>>>,
}

/// What the values of a store's parameters are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Values {
    /// They begin as the model initialises them, and learn.
    Trained,
    /// They come from a file and stay.
    Frozen,
    /// Nobody looks at them: only names and shapes count.
    Declared,
}

/// A place in the tree of names, as a directory: `scope.pp("encoder").param("weight", ..)` declares `encoder.weight`.
#[derive(Clone)]
pub struct Scope {
    prefix: String,
    device: Device,
    kind: Kind,
    values: Values,
    params: Rc<RefCell<BTreeMap<String, Param>>>,
}

impl ParamStore {
    /// A store of fp32 parameters that require gradients.
    pub fn trainable(device: Device) -> ParamStore {
        ParamStore { device, kind: Kind::Float, values: Values::Trained, params: Rc::default() }
    }

    /// A store of parameters without gradients, kept in `kind`.
    pub fn frozen(device: Device, kind: Kind) -> ParamStore {
        ParamStore { device, kind, values: Values::Frozen, params: Rc::default() }
    }

    /// A store that only knows names and shapes, to audit files against; it takes no memory, whatever the shapes.
    pub fn declared(kind: Kind) -> ParamStore {
        ParamStore { device: Device::Cpu, kind, values: Values::Declared, params: Rc::default() }
    }

    /// The top of the name tree.
    pub fn root(&self) -> Scope {
        Scope {
            prefix: String::new(),
            device: self.device,
            kind: self.kind,
            values: self.values,
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
            if self.values == Values::Declared {
                // One number seen everywhere: files may claim sizes that no memory has.
                return Tensor::zeros([1; 0], (self.kind, self.device)).expand(shape, false);
            }
            let mut t = Tensor::empty(shape, (self.kind, self.device));
            match init {
                Init::Zeros => t.zero_(),
                Init::Ones => t.fill_(1.0),
                Init::Const(v) => t.fill_(v),
                // A frozen tower is always filled from a file: drawing billions of numbers first would only cost time.
                Init::Normal(_) | Init::Uniform(_) if self.values == Values::Frozen => t.shallow_clone(),
                Init::Normal(std) => t.normal_(0.0, std),
                Init::Uniform(bound) => t.uniform_(-bound, bound),
            }
        });
        let tensor = tensor.set_requires_grad(self.values == Values::Trained);
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
