//! A group of processes and its collectives.

use std::ffi::c_int;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tch::Tensor;

use super::store::Store;
use super::{milliseconds, one_line};
use crate::error::Error;
use crate::ffi::{self, CGroup, Text};

/// What moves the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// Tensors on the CPU, over TCP. The interface is `GLOO_SOCKET_IFNAME`'s, else the one of the host's name, else
    /// loopback.
    Gloo,
    /// Tensors on CUDA devices. [`Group::join`] refuses it: this build does not bind it.
    Nccl,
}

/// How [`Group::all_reduce`] makes one value of all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reduce {
    /// Their sum; of truth values, whether any is true.
    Sum,
    /// The largest.
    Max,
    /// The smallest.
    Min,
}

/// Processes that compute together: c10d's process group.
///
/// Every rank calls the same collectives in the same order, with the same shapes; each call waits until this rank's
/// part is done. Several threads may use a group, where the program sees to that order. They take no part in autograd.
///
/// An error ends the group: its connections are closed, and what follows fails at once. Ranks whose tensors differ in
/// size are an error of the program that Gloo answers by ending the process.
///
/// Dropping a group waits for what is still under way, for the group's timeout at most; [`abort`](Self::abort) ends it.
pub struct Group {
    group: NonNull<CGroup>,
    rank: usize,
    world: usize,
    barriers: AtomicU64,
    /// Serves the group's store where this process does, and says who came to a barrier.
    store: Store,
}

// SAFETY: the shim starts a group's collectives under a lock, and waiting for one touches nothing that is shared.
unsafe impl Send for Group {}
// SAFETY: as above.
unsafe impl Sync for Group {}

impl Group {
    /// Joins the group whose members meet in `store`, under its prefix; no two groups may have the same.
    ///
    /// Waits for all ranks. `timeout` is the limit of that and of every later collective.
    ///
    /// # Errors
    /// [`Error::Collective`] where not all came in time, or ranks are wrong; [`Error::StoreUnreachable`];
    /// [`Error::NoNccl`].
    pub fn join(store: &Store, rank: usize, world: usize, backend: Backend, timeout: Duration) -> Result<Self, Error> {
        if backend == Backend::Nccl {
            return Err(Error::NoNccl);
        }
        let failure = |message| Error::Collective { op: "join", rank, world, message };
        let (Ok(c_rank), Ok(c_world)) = (c_int::try_from(rank), c_int::try_from(world)) else {
            return Err(failure("too many ranks".to_owned()));
        };
        if rank >= world {
            return Err(failure("ranks are numbered from 0 and fewer than the world".to_owned()));
        }
        let connection = store.connection()?;
        let mut out = ptr::null_mut();
        // SAFETY: a live store that no other thread uses, a borrowed text, and a place for the answer.
        let code = unsafe {
            let prefix = Text::of(store.prefix());
            ffi::torchx_group_join(connection.as_ptr(), prefix, c_rank, c_world, milliseconds(timeout), &mut out)
        };
        match (ffi::outcome(code), NonNull::new(out)) {
            (Ok(()), Some(group)) => {
                Ok(Self { group, rank, world, barriers: AtomicU64::new(0), store: store.with_prefix("barrier") })
            }
            (outcome, _) => Err(failure(one_line(&outcome.err().unwrap_or_default()))),
        }
    }

    /// This process's number in the group, from 0.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// How many ranks there are.
    pub fn world(&self) -> usize {
        self.world
    }

    /// Replaces every element by its reduction over the ranks.
    ///
    /// # Errors
    /// [`Error::Collective`]; also for a dtype that the backend cannot reduce (Gloo: int16).
    pub fn all_reduce(&self, tensor: &Tensor, op: Reduce) -> Result<(), Error> {
        let op = match op {
            Reduce::Sum => 0,
            Reduce::Max => 1,
            Reduce::Min => 2,
        };
        // SAFETY: a live group and a live tensor.
        self.check("all_reduce", unsafe { ffi::torchx_group_all_reduce(self.as_ptr(), tensor.as_ptr().cast_mut(), op) })
    }

    /// Replaces the tensor by that of rank `root`. Any dtype.
    ///
    /// # Errors
    /// [`Error::Collective`]
    pub fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<(), Error> {
        if root >= self.world {
            return Err(self.misuse("broadcast", format!("there is no rank {root}")));
        }
        // SAFETY: a live group and a live tensor; the world, and so `root`, fits into an int.
        let code = unsafe { ffi::torchx_group_broadcast(self.as_ptr(), tensor.as_ptr().cast_mut(), root as c_int) };
        self.check("broadcast", code)
    }

    /// The tensors of all ranks, in the order of ranks. Any dtype.
    ///
    /// # Shapes
    /// `[B, ..]`, the same on all ranks; gives `[W * B, ..]`.
    ///
    /// # Errors
    /// [`Error::Collective`]
    pub fn all_gather(&self, tensor: &Tensor) -> Result<Tensor, Error> {
        self.rows_of("all_gather", tensor)?;
        self.tensor("all_gather", |out| {
            // SAFETY: a live group, a live tensor, and a place for the answer.
            unsafe { ffi::torchx_group_all_gather(self.as_ptr(), tensor.as_ptr(), out) }
        })
    }

    /// Sends rows to every rank and gives the rows that came. Any dtype.
    ///
    /// `tensor` holds the rows in the order of the ranks they go to, `send[r]` of them to rank `r`, which must expect
    /// as many: `receive[r]` rows come from rank `r`. The answer has them in the order of the ranks they come from.
    ///
    /// # Shapes
    /// `[sum(send), ..]`; gives `[sum(receive), ..]`.
    ///
    /// # Errors
    /// [`Error::Collective`]; also where the numbers fit neither the tensor nor the world.
    pub fn all_to_all(&self, tensor: &Tensor, send: &[i64], receive: &[i64]) -> Result<Tensor, Error> {
        let op = "all_to_all";
        let rows = self.rows_of(op, tensor)?;
        for (name, counts) in [("send", send), ("receive", receive)] {
            if counts.len() != self.world || counts.iter().any(|&count| count < 0) {
                let world = self.world;
                return Err(
                    self.misuse(op, format!("{name} {counts:?} is no number of rows for each of {world} ranks"))
                );
            }
        }
        if send.iter().map(|&count| i128::from(count)).sum::<i128>() != i128::from(rows) {
            return Err(self.misuse(op, format!("send {send:?} does not sum to the tensor's {rows} rows")));
        }
        self.tensor(op, |out| {
            // SAFETY: a live group and tensor, two lists of `world` numbers, and a place for the answer.
            unsafe {
                ffi::torchx_group_all_to_all(self.as_ptr(), tensor.as_ptr(), send.as_ptr(), receive.as_ptr(), out)
            }
        })
    }

    /// Waits until all ranks have come here.
    ///
    /// # Errors
    /// [`Error::Barrier`] after `timeout`, on every rank that came, with the ranks that did not; [`Error::Store`].
    pub fn barrier(&self, timeout: Duration) -> Result<(), Error> {
        let number = self.barriers.fetch_add(1, Ordering::Relaxed) + 1;
        self.store.set(&self.rank.to_string(), &number.to_le_bytes())?;
        // SAFETY: a live group.
        let code = unsafe { ffi::torchx_group_barrier(self.as_ptr(), milliseconds(timeout)) };
        ffi::outcome(code).map_err(|text| Error::Barrier {
            rank: self.rank,
            world: self.world,
            seconds: timeout.as_secs_f64(),
            missing: (0..self.world).filter(|&rank| !self.came_to(number, rank)).collect(),
            message: one_line(&text),
        })
    }

    /// Closes the connections: what this process waits for fails at once, and its peers find it gone.
    ///
    /// To be called from another thread than the one that waits, or before a broken group is dropped.
    pub fn abort(&self) {
        // SAFETY: a live group.
        let code = unsafe { ffi::torchx_group_abort(self.as_ptr()) };
        ffi::expect(ffi::check("abort", code));
    }

    pub(super) fn as_ptr(&self) -> *const CGroup {
        self.group.as_ptr()
    }

    pub(super) fn misuse(&self, op: &'static str, message: String) -> Error {
        Error::Collective { op, rank: self.rank, world: self.world, message }
    }

    pub(super) fn check(&self, op: &'static str, code: c_int) -> Result<(), Error> {
        ffi::outcome(code).map_err(|text| self.misuse(op, one_line(&text)))
    }

    fn tensor(
        &self,
        op: &'static str,
        call: impl FnOnce(*mut *mut torch_sys::C_tensor) -> c_int,
    ) -> Result<Tensor, Error> {
        let mut out = ptr::null_mut();
        self.check(op, call(&mut out))?;
        // SAFETY: on success `out` is a heap-allocated at::Tensor that nobody else owns.
        Ok(unsafe { Tensor::from_ptr(out) })
    }

    fn rows_of(&self, op: &'static str, tensor: &Tensor) -> Result<i64, Error> {
        tensor.size().first().copied().ok_or_else(|| self.misuse(op, "a scalar has no rows".to_owned()))
    }

    fn came_to(&self, number: u64, rank: usize) -> bool {
        let key = rank.to_string();
        let value = || self.store.get(&key, Duration::from_secs(1)).ok()?.try_into().ok().map(u64::from_le_bytes);
        // Where the store cannot say, nobody is named.
        match self.store.has(&[&key]) {
            Ok(true) => value().is_none_or(|last| last >= number),
            Ok(false) => false,
            Err(_) => true,
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // SAFETY: ours; a Reducer has a reference of its own.
        unsafe { ffi::torchx_group_free(self.group.as_ptr()) };
    }
}
