//! How a file fills a store: what a source is, what it may lack, and the audit of names, shapes and dtypes.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use tch::{Kind, Tensor, no_grad};

use super::ParamStore;

impl ParamStore {
    /// Compares the parameters with what `source` has, under `plan`, by names, shapes and dtypes alone.
    pub fn audit(&self, source: &dyn TensorSource, plan: &LoadPlan) -> Audit {
        let offered: BTreeMap<String, TensorInfo> = source.entries().into_iter().collect();
        let mut audit = Audit::default();
        let mut used = BTreeSet::new();
        for (name, tensor, _) in self.entries() {
            let wanted = (plan.source_name)(&name);
            let Some(info) = offered.get(&wanted) else {
                if plan.may_be_fresh(&name) {
                    audit.report.fresh.push(name);
                } else {
                    audit.problems.push(LoadProblem::Missing { name: wanted, expected: tensor.size() });
                }
                continue;
            };
            used.insert(wanted.clone());
            let rows = plan.may_gain_rows(&name) && grows_rows(&info.shape, &tensor.size());
            if info.shape != tensor.size() && !rows {
                let (expected, got) = (tensor.size(), info.shape.clone());
                audit.problems.push(LoadProblem::Shape { name: wanted, expected, got });
            } else if !is_float(info.kind) {
                audit.problems.push(LoadProblem::Kind { name: wanted, got: info.kind });
            } else {
                if info.kind != tensor.kind() {
                    audit.report.cast.push(name.clone());
                }
                audit.report.loaded.push(name);
            }
        }
        for name in offered.keys().filter(|n| !used.contains(*n)) {
            if plan.may_be_unused(name) {
                audit.report.unused.push(name.clone());
            } else {
                audit.problems.push(LoadProblem::Unexpected { name: name.clone() });
            }
        }
        audit
    }

    /// Fills the parameters from `source` under `plan`.
    ///
    /// Nothing is written unless the audit finds no problem.
    ///
    /// # Errors
    /// [`LoadError`] lists every missing, unexpected and misshapen tensor and every dtype that cannot be cast, at once.
    pub fn load(&self, source: &dyn TensorSource, plan: &LoadPlan) -> Result<LoadReport, LoadError> {
        let report = self.audit(source, plan).into_result(source)?;
        let shapes: BTreeMap<String, Vec<i64>> =
            source.entries().into_iter().map(|(name, info)| (name, info.shape)).collect();
        let mut problems = Vec::new();
        for name in &report.loaded {
            let (wanted, mut tensor) = ((plan.source_name)(name), self.get(name).expect("audited names are ours"));
            let filled = no_grad(|| match shapes[&wanted].first() {
                Some(&rows) if shapes[&wanted] != tensor.size() => {
                    source.read_into(&wanted, &mut tensor.narrow(0, 0, rows))
                }
                _ => source.read_into(&wanted, &mut tensor),
            });
            if let Err(message) = filled {
                problems.push(LoadProblem::Unreadable { name: wanted, message });
            }
        }
        if problems.is_empty() { Ok(report) } else { Err(LoadError { origin: source.origin(), problems }) }
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

    /// Copies the tensor of that name into `target`, which has its shape, casting to its dtype. A source that can fills the memory of `target`
    /// without a copy in between.
    ///
    /// # Errors
    /// A one-line reason.
    fn read_into(&self, name: &str, target: &mut Tensor) -> Result<(), String> {
        copy_values(&self.read(name)?, target)
    }
}

/// Copies `value` into `target`, casting to its dtype.
///
/// # Errors
/// Shapes that differ: libtorch would broadcast.
pub fn copy_values(value: &Tensor, target: &mut Tensor) -> Result<(), String> {
    if value.size() != target.size() {
        return Err(format!("expected shape {:?}, got {:?}", target.size(), value.size()));
    }
    no_grad(|| target.copy_(value));
    Ok(())
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

/// What a load would do, and everything that stands in its way.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Audit {
    /// What would become of each tensor that fits.
    pub report: LoadReport,
    /// What does not fit, in the order of names.
    pub problems: Vec<LoadProblem>,
}

impl Audit {
    /// The report, if nothing stands in the way.
    ///
    /// # Errors
    /// [`LoadError`] with all problems.
    pub fn into_result(self, source: &dyn TensorSource) -> Result<LoadReport, LoadError> {
        if self.problems.is_empty() {
            return Ok(self.report);
        }
        Err(LoadError { origin: source.origin(), problems: self.problems })
    }
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
