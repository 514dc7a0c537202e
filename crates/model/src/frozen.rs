//! A module that cannot be trained.

use std::ops::Deref;

use blip2_torchx::params::{ParamStore, Scope};
use tch::{Device, Kind};

/// A module whose parameters require no gradient and lie in their own storage dtype.
///
/// It keeps its own store, and no optimizer takes a frozen store: training a frozen tower does not compile into a program.
/// Gradients still flow *through* it, as stage 2 needs for its language model.
pub struct Frozen<M> {
    module: M,
    params: ParamStore,
}

impl<M> Frozen<M> {
    /// Builds the module in a frozen store; fill it through [`Frozen::params`] before use.
    pub fn build(device: Device, kind: Kind, build: impl FnOnce(&Scope) -> M) -> Frozen<M> {
        let params = ParamStore::frozen(device, kind);
        let module = build(&params.root());
        Frozen { module, params }
    }

    /// Its parameters, to load or to inspect.
    pub fn params(&self) -> &ParamStore {
        &self.params
    }
}

impl<M> Deref for Frozen<M> {
    type Target = M;

    fn deref(&self) -> &M {
        &self.module
    }
}
