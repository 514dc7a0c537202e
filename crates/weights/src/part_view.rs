//! Some tensors of a directory or checkpoint under our names.

use std::collections::BTreeMap;

use blip2_torchx::params::{TensorInfo, TensorSource, copy_values};
use tch::Tensor;

use crate::weights_dir::WeightsDir;

/// Tensors of one part under our names.
pub struct PartView<'a> {
    weights: &'a WeightsDir,
    recipes: BTreeMap<String, Recipe>,
}

/// What one of our tensors is made of.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Recipe {
    /// The file's tensor of this name.
    Tensor(String),
    /// The bias of a joint query-key-value projection, of a model that keeps the parts that are not zero: queries, zeros, values.
    QkvBias {
        /// Name of the queries' bias.
        query: String,
        /// Name of the values' bias.
        value: String,
    },
}

impl<'a> PartView<'a> {
    /// A view of `weights`; `recipes` are by our names.
    pub(crate) fn new(weights: &'a WeightsDir, recipes: BTreeMap<String, Recipe>) -> PartView<'a> {
        PartView { weights, recipes }
    }
}

impl Recipe {
    /// The file's names that go into it, for messages.
    pub(crate) fn ingredients(&self) -> String {
        match self {
            Recipe::Tensor(name) => name.clone(),
            Recipe::QkvBias { query, value } => format!("{query} with {value}"),
        }
    }
}

impl TensorSource for PartView<'_> {
    fn origin(&self) -> String {
        self.weights.origin()
    }

    fn entries(&self) -> Vec<(String, TensorInfo)> {
        let infos: BTreeMap<String, TensorInfo> = self.weights.entries().into_iter().collect();
        let entry = |(ours, recipe): (&String, &Recipe)| {
            let info = match recipe {
                Recipe::Tensor(theirs) => infos.get(theirs)?.clone(),
                Recipe::QkvBias { query, .. } => {
                    let TensorInfo { kind, shape } = infos.get(query)?.clone();
                    TensorInfo { kind, shape: shape.iter().map(|width| width.saturating_mul(3)).collect() }
                }
            };
            Some((ours.clone(), info))
        };
        self.recipes.iter().filter_map(entry).collect()
    }

    fn read(&self, name: &str) -> Result<Tensor, String> {
        match self.recipes.get(name).ok_or("no such tensor")? {
            Recipe::Tensor(theirs) => self.weights.read(theirs),
            Recipe::QkvBias { query, value } => {
                let (queries, values) = (self.weights.read(query)?, self.weights.read(value)?);
                if queries.size() != values.size() || queries.kind() != values.kind() || queries.dim() != 1 {
                    let shapes = (queries.size(), values.size());
                    return Err(format!(
                        "expected {query} and {value} to be alike, got {:?} and {:?}",
                        shapes.0, shapes.1
                    ));
                }
                Ok(Tensor::cat(&[&queries, &queries.zeros_like(), &values], 0))
            }
        }
    }

    fn read_into(&self, name: &str, target: &mut Tensor) -> Result<(), String> {
        match self.recipes.get(name) {
            Some(Recipe::Tensor(theirs)) => self.weights.read_into(theirs, target),
            _ => copy_values(&self.read(name)?, target),
        }
    }
}
