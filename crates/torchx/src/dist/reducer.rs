//! c10d's Reducer: the mean of the ranks' gradients, computed while the backward pass goes on.

use std::cell::Cell;
use std::ffi::c_int;
use std::marker::PhantomData;
use std::ptr::{self, NonNull};

use tch::Tensor;

use super::{Group, one_line};
use crate::error::Error;
use crate::ffi::{self, CReducer};

/// How gradients are put together and sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReducerOptions {
    /// Size of the bucket that is sent first; small, so that sending begins early.
    pub first_bucket_bytes: usize,
    /// Size of the others.
    pub bucket_bytes: usize,
    /// Parameters may go unused in a step. One that no rank used keeps its gradient; one that some rank used gets the
    /// mean over all ranks, where those that did not use it count as zero.
    pub find_unused: bool,
    /// Gradients are sent and summed as bf16, half the bytes of fp32.
    pub compress_bf16: bool,
}

impl Default for ReducerOptions {
    /// Those of PyTorch's DistributedDataParallel: 1 MiB, then 25 MiB.
    fn default() -> Self {
        Self { first_bucket_bytes: 1 << 20, bucket_bytes: 25 << 20, find_unused: false, compress_bf16: false }
    }
}

/// Averages the gradients of a list of parameters over a group's ranks.
///
/// The backward pass that follows [`prepare`](Self::prepare) sends gradients as they come and ends with every
/// parameter's `grad`, what earlier passes accumulated in it included, replaced by its mean over the ranks: the sum
/// divided by the world size. A backward pass without it is local.
///
/// An error of the group makes the backward pass fail; then the reducer is of no use any more.
pub struct Reducer {
    reducer: NonNull<CReducer>,
    rank: usize,
    world: usize,
    /// Preparing and finishing belong to one thread at a time.
    not_sync: PhantomData<Cell<()>>,
}

// SAFETY: c10d's Reducer holds a lock in all its functions and owns references to all it uses.
unsafe impl Send for Reducer {}

impl Reducer {
    /// A reducer of `params`, leaves that want gradients, listed in the same order on all ranks.
    ///
    /// Waits for all ranks, and compares the parameters' shapes and dtypes. Their values are not touched:
    /// [`Group::broadcast`] makes them equal.
    ///
    /// # Errors
    /// [`Error::Collective`], also where the ranks' parameters differ.
    pub fn new(group: &Group, params: &[Tensor], options: ReducerOptions) -> Result<Self, Error> {
        let op = "reducer";
        if let Some(place) = params.iter().position(|param| !param.requires_grad() || !param.is_leaf()) {
            return Err(group.misuse(op, format!("parameter {place} is no leaf that wants a gradient")));
        }
        if params.is_empty() {
            return Err(group.misuse(op, "there are no parameters".to_owned()));
        }
        let pointers = ffi::pointers(params);
        let mut out = ptr::null_mut();
        // SAFETY: a live group, a list of live tensors, and a place for the answer.
        let code = unsafe {
            ffi::torchx_reducer_new(
                group.as_ptr(),
                pointers.as_ptr(),
                pointers.len(),
                i64::try_from(options.first_bucket_bytes).unwrap_or(i64::MAX),
                i64::try_from(options.bucket_bytes).unwrap_or(i64::MAX),
                c_int::from(options.find_unused),
                c_int::from(options.compress_bf16),
                &mut out,
            )
        };
        group.check(op, code)?;
        let reducer = NonNull::new(out).ok_or_else(|| group.misuse(op, "libtorch made none".to_owned()))?;
        Ok(Self { reducer, rank: group.rank(), world: group.world(), not_sync: PhantomData })
    }

    /// Has the next backward pass average the gradients. To be called between its forward and it, on all ranks.
    ///
    /// `outputs` are what that pass starts from; they say which parameters go unused.
    ///
    /// # Errors
    /// [`Error::NotReduced`] where the pass before left a parameter out; [`Error::Collective`].
    pub fn prepare(&self, outputs: &[&Tensor]) -> Result<(), Error> {
        let outputs = ffi::pointers(outputs.iter().copied());
        // SAFETY: a live reducer and a list of live tensors.
        let code = unsafe { ffi::torchx_reducer_prepare(self.reducer.as_ptr(), outputs.as_ptr(), outputs.len()) };
        self.check("prepare", code)
    }

    /// Makes sure that the backward pass averaged: to be called behind it, before the gradients are used.
    ///
    /// # Errors
    /// [`Error::NotReduced`] where a parameter got no gradient, so that the averages never came about.
    pub fn finish(&self) -> Result<(), Error> {
        // SAFETY: a live reducer.
        self.check("finish", unsafe { ffi::torchx_reducer_finish(self.reducer.as_ptr()) })
    }

    fn check(&self, op: &'static str, code: c_int) -> Result<(), Error> {
        ffi::outcome(code).map_err(|text| {
            if text.contains("Expected to have finished reduction") {
                return Error::NotReduced { params: without_gradient(&text) };
            }
            Error::Collective { op, rank: self.rank, world: self.world, message: one_line(&text) }
        })
    }
}

impl Drop for Reducer {
    /// Where a graph through the parameters is alive, its hooks are too, and libtorch's object stays until a later
    /// reducer is made or dropped without one.
    fn drop(&mut self) {
        // SAFETY: ours, and nobody else's.
        unsafe { ffi::torchx_reducer_free(self.reducer.as_ptr()) };
    }
}

/// The places that libtorch lists behind "did not receive grad for rank N:".
fn without_gradient(text: &str) -> Vec<usize> {
    let Some((_, list)) = text.split_once("did not receive grad for rank") else { return Vec::new() };
    let Some((_, list)) = list.split_once(':') else { return Vec::new() };
    list.split_whitespace().map_while(|word| word.parse().ok()).collect()
}
