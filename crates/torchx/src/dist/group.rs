//! A group of processes and its collectives.

use std::ffi::c_int;
use std::path::Path;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tch::{Device, Tensor};

use super::store::Store;
use super::{milliseconds, one_line};
use crate::device::cuda_index;
use crate::error::Error;
use crate::ffi::{self, CGroup, Text};

/// The library that holds the NCCL backend: beside the program, else where the system's loader looks.
pub const NCCL_LIBRARY: &str = "libblip2_nccl.so";

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
/// Tensors on the CPU go over Gloo, that is TCP: by the interface `GLOO_SOCKET_IFNAME`, else the one of the host's name,
/// else loopback. Those of a CUDA device need [`Group::add_nccl`]; their collectives wait for their place in the current
/// stream, not for the result.
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
    /// The device whose tensors go over NCCL.
    nccl: Mutex<Option<Device>>,
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
    /// [`Error::Collective`] where not all came in time, or ranks are wrong; [`Error::StoreUnreachable`].
    pub fn join(store: &Store, rank: usize, world: usize, timeout: Duration) -> Result<Self, Error> {
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
            let prefix = Text::of(store.path());
            ffi::torchx_group_join(connection.as_ptr(), prefix, c_rank, c_world, milliseconds(timeout), &mut out)
        };
        match (ffi::outcome(code), NonNull::new(out)) {
            (Ok(()), Some(group)) => {
                let (barriers, nccl) = (AtomicU64::new(0), Mutex::default());
                Ok(Self { group, rank, world, barriers, nccl, store: store.clone() })
            }
            (outcome, _) => Err(failure(one_line(&outcome.err().unwrap_or_default()))),
        }
    }

    /// Has tensors on this rank's CUDA device exchanged over NCCL. All ranks call it, each with a device of its own;
    /// once is enough, and the same device again is no error.
    ///
    /// # Errors
    /// [`Error::NoNccl`] where the library is missing or another's; [`Error::Collective`] for what NCCL refuses, as two
    /// ranks on one GPU, for a device that is none of CUDA's and for another one than the first;
    /// [`Error::StoreUnreachable`].
    pub fn add_nccl(&self, device: Device, timeout: Duration) -> Result<(), Error> {
        let op = "connecting GPUs";
        let index = cuda_index(device).ok_or_else(|| self.misuse(op, format!("{device:?} is no CUDA device")))?;
        let mut connected = self.nccl.lock().unwrap_or_else(PoisonError::into_inner);
        // A second backend would meet the first one's keys in the store, and libtorch keeps the first one anyway.
        if is_connected(*connected, device).map_err(|message| self.misuse(op, message))? {
            return Ok(());
        }
        let library = nccl_library();
        // SAFETY: a borrowed text.
        ffi::outcome(unsafe { ffi::torchx_nccl_find(Text::of(&library)) })
            .map_err(|text| Error::NoNccl { library: library.clone(), message: one_line(&text) })?;
        let store = self.store.with_prefix("nccl");
        let connection = store.connection()?;
        // SAFETY: a live group, a live store that no other thread uses, and borrowed texts.
        let code = unsafe {
            let (prefix, library) = (Text::of(store.path()), Text::of(&library));
            ffi::torchx_group_add_nccl(
                self.as_ptr(),
                connection.as_ptr(),
                prefix,
                library,
                index,
                milliseconds(timeout),
            )
        };
        self.check(op, code)?;
        *connected = Some(device);
        Ok(())
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

    /// How long ago the last all_reduce of this group began, a [`Reducer`](super::Reducer)'s included; long where none has.
    pub fn since_all_reduce(&self) -> Duration {
        // SAFETY: a live group.
        let seconds = unsafe { ffi::torchx_group_since_all_reduce(self.as_ptr()) };
        Duration::try_from_secs_f64(seconds).unwrap_or_default()
    }

    /// Waits until all ranks have come here.
    ///
    /// # Errors
    /// [`Error::Barrier`] after `timeout`, on every rank that came, with the ranks that did not; [`Error::Store`].
    pub fn barrier(&self, timeout: Duration) -> Result<(), Error> {
        let number = self.barriers.fetch_add(1, Ordering::Relaxed) + 1;
        self.store.set(&barrier_key(self.rank), &number.to_le_bytes())?;
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
        let key = barrier_key(rank);
        let value = || self.store.get(&key, Duration::from_secs(1)).ok()?.try_into().ok().map(u64::from_le_bytes);
        // Where the store cannot say, nobody is named.
        match self.store.has(&[&key]) {
            Ok(true) => value().is_none_or(|last| last >= number),
            Ok(false) => false,
            Err(_) => true,
        }
    }
}

/// Whether a group that has NCCL on `connected` has it on `device`; another one is refused.
fn is_connected(connected: Option<Device>, device: Device) -> Result<bool, String> {
    match connected {
        None => Ok(false),
        Some(first) if first == device => Ok(true),
        Some(first) => Err(format!("this rank's tensors are exchanged on {first:?}, and cannot be on {device:?} too")),
    }
}

/// Where a rank writes which barrier it came to.
fn barrier_key(rank: usize) -> String {
    format!("barrier/{rank}")
}

/// Where the NCCL backend is.
fn nccl_library() -> String {
    let beside = std::env::current_exe().ok().and_then(|program| Some(program.parent()?.join(NCCL_LIBRARY)));
    match beside.filter(|path| path.exists()).as_deref().and_then(Path::to_str) {
        Some(path) => path.to_owned(),
        None => NCCL_LIBRARY.to_owned(),
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // SAFETY: ours; a Reducer has a reference of its own.
        unsafe { ffi::torchx_group_free(self.group.as_ptr()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_connected_once_and_no_second_one_beside_it() {
        let [first, second] = [Device::Cuda(1), Device::Cuda(2)];
        assert_eq!(is_connected(None, first), Ok(false));
        assert_eq!(is_connected(Some(first), first), Ok(true));
        assert!(is_connected(Some(first), second).unwrap_err().contains("Cuda(2)"));
    }
}
