//! The C side: declarations of `csrc/`, and the two steps every call shares.

use std::ffi::{CStr, c_char, c_int};
use std::ptr;

use tch::Tensor;
use torch_sys::C_tensor;

use crate::error::Error;

unsafe extern "C" {
    pub fn torchx_last_error() -> *const c_char;
    /// libtorch's own: the version of the library that was loaded, in the upper three bytes.
    pub fn aoti_torch_abi_version() -> u64;

    pub fn torchx_load_cuda() -> c_int;
    #[cfg(test)]
    pub fn torchx_configure_nccl();
    pub fn torchx_device_set(cuda_index: c_int) -> c_int;
    pub fn torchx_device_synchronize(cuda_index: c_int) -> c_int;
    pub fn torchx_cuda_name(cuda_index: c_int, name: *mut c_char, capacity: c_int) -> c_int;
    pub fn torchx_cuda_uuid(cuda_index: c_int, uuid: *mut u8) -> c_int;
    pub fn torchx_rng_seed(cuda_index: c_int, seed: u64) -> c_int;
    pub fn torchx_rng_seed_get(cuda_index: c_int, seed: *mut u64) -> c_int;
    pub fn torchx_memory_stats(
        cuda_index: c_int,
        allocated: *mut i64,
        reserved: *mut i64,
        peak_allocated: *mut i64,
    ) -> c_int;
    pub fn torchx_memory_reset_peak(cuda_index: c_int) -> c_int;
    pub fn torchx_memory_keep_freed();
    pub fn torchx_empty_pinned(shape: *const i64, dims: usize, like: *const C_tensor, out: *mut *mut C_tensor)
    -> c_int;
    pub fn torchx_sdpa_get() -> c_int;
    pub fn torchx_sdpa_set(bits: c_int);
    pub fn torchx_tf32_get() -> c_int;
    pub fn torchx_tf32_set(bits: c_int);
    pub fn torchx_exit(code: c_int) -> !;

    pub fn torchx_autocast_enter(
        cuda: c_int,
        kind: c_int,
        previous_enabled: *mut c_int,
        previous_kind: *mut c_int,
    ) -> c_int;
    pub fn torchx_autocast_exit(cuda: c_int, previous_enabled: c_int, previous_kind: c_int) -> c_int;
    pub fn torchx_autocast_kind(cuda: c_int) -> c_int;

    pub fn torchx_foreach_norm(tensors: *const *const C_tensor, count: usize, out: *mut *mut C_tensor) -> c_int;
    pub fn torchx_foreach_mul_(tensors: *const *const C_tensor, count: usize, factor: *const C_tensor) -> c_int;
    pub fn torchx_foreach_unscale_(
        grads: *const *const C_tensor,
        count: usize,
        found_inf: *const C_tensor,
        inv_scale: *const C_tensor,
    ) -> c_int;
    pub fn torchx_adamw_step(
        params: *const *const C_tensor,
        exp_avgs: *const *const C_tensor,
        exp_avg_sqs: *const *const C_tensor,
        steps: *const *const C_tensor,
        count: usize,
        lr: f64,
        beta1: f64,
        beta2: f64,
        weight_decay: f64,
        eps: f64,
        grad_scale: *const C_tensor,
        found_inf: *const C_tensor,
    ) -> c_int;
    pub fn torchx_clear_grads(params: *const *const C_tensor, count: usize) -> c_int;

    pub fn torchx_isa_get() -> *const c_char;
    pub fn torchx_isa_set(isa: *const c_char) -> c_int;
    pub fn torchx_dropout(
        x: *const C_tensor,
        p: f64,
        site: u64,
        rows: *const C_tensor,
        out: *mut *mut C_tensor,
    ) -> c_int;
    pub fn torchx_dropout_add_layer_norm(
        x: *const C_tensor,
        residual: *const C_tensor,
        weight: *const C_tensor,
        bias: *const C_tensor,
        eps: f64,
        p: f64,
        site: u64,
        rows: *const C_tensor,
        out: *mut *mut C_tensor,
    ) -> c_int;
    pub fn torchx_dropout_attention(
        q: *const C_tensor,
        k: *const C_tensor,
        v: *const C_tensor,
        allowed: *const C_tensor,
        p: f64,
        site: u64,
        rows: *const C_tensor,
        out: *mut *mut C_tensor,
    ) -> c_int;

    pub fn torchx_store_open(host: Text, port: u16, serve: c_int, timeout_ms: i64, out: *mut *mut CStore) -> c_int;
    pub fn torchx_store_free(store: *mut CStore);
    pub fn torchx_store_port(store: *const CStore) -> u16;
    pub fn torchx_store_set(store: *const CStore, key: Text, bytes: *const u8, length: usize) -> c_int;
    pub fn torchx_store_get(store: *const CStore, key: Text, timeout_ms: i64, out: *mut *mut C_tensor) -> c_int;
    pub fn torchx_store_peek(store: *const CStore, key: Text, out: *mut *mut C_tensor) -> c_int;
    pub fn torchx_store_add(store: *const CStore, key: Text, amount: i64, out: *mut i64) -> c_int;
    pub fn torchx_store_has(store: *const CStore, keys: *const Text, count: usize, out: *mut c_int) -> c_int;
    pub fn torchx_store_remove(store: *const CStore, key: Text, out: *mut c_int) -> c_int;

    pub fn torchx_group_join(
        store: *const CStore,
        prefix: Text,
        rank: c_int,
        world: c_int,
        timeout_ms: i64,
        out: *mut *mut CGroup,
    ) -> c_int;
    pub fn torchx_nccl_find(library: Text) -> c_int;
    pub fn torchx_group_add_nccl(
        group: *const CGroup,
        store: *const CStore,
        prefix: Text,
        library: Text,
        cuda_index: c_int,
        timeout_ms: i64,
    ) -> c_int;
    pub fn torchx_group_free(group: *mut CGroup);
    pub fn torchx_group_all_reduce(group: *const CGroup, tensor: *mut C_tensor, op: c_int) -> c_int;
    pub fn torchx_group_broadcast(group: *const CGroup, tensor: *mut C_tensor, root: c_int) -> c_int;
    pub fn torchx_group_all_gather(group: *const CGroup, tensor: *const C_tensor, out: *mut *mut C_tensor) -> c_int;
    pub fn torchx_group_all_to_all(
        group: *const CGroup,
        tensor: *const C_tensor,
        send: *const i64,
        receive: *const i64,
        out: *mut *mut C_tensor,
    ) -> c_int;
    pub fn torchx_group_since_all_reduce(group: *const CGroup) -> f64;
    pub fn torchx_group_barrier(group: *const CGroup, timeout_ms: i64) -> c_int;
    pub fn torchx_group_abort(group: *const CGroup) -> c_int;

    pub fn torchx_reducer_new(
        group: *const CGroup,
        params: *const *const C_tensor,
        count: usize,
        first_bucket_bytes: i64,
        bucket_bytes: i64,
        find_unused: c_int,
        compress_bf16: c_int,
        out: *mut *mut CReducer,
    ) -> c_int;
    pub fn torchx_reducer_free(reducer: *mut CReducer);
    pub fn torchx_reducer_prepare(reducer: *mut CReducer, outputs: *const *const C_tensor, count: usize) -> c_int;
    pub fn torchx_reducer_finish(reducer: *mut CReducer) -> c_int;
}

/// A connection to a store of c10d.
pub enum CStore {}
/// A reference to a process group of c10d.
pub enum CGroup {}
/// A Reducer of c10d.
pub enum CReducer {}

/// A borrowed text of any content, NUL included.
#[repr(C)]
pub struct Text {
    bytes: *const u8,
    length: usize,
}

impl Text {
    /// Valid while `text` is borrowed by the caller.
    pub fn of(text: &str) -> Self {
        Self { bytes: text.as_ptr(), length: text.len() }
    }
}

/// Turns the shim's return code into a result, with the first line of the exception's text.
pub fn check(op: &'static str, code: c_int) -> Result<(), Error> {
    outcome(code).map_err(|text| Error::Torch { op, message: text.lines().next().unwrap_or_default().to_owned() })
}

/// Turns the shim's return code into a result, with the exception's whole text.
pub fn outcome(code: c_int) -> Result<(), String> {
    if code == 0 {
        return Ok(());
    }
    // SAFETY: the pointer is a NUL-terminated string owned by this thread until its next failing call.
    Err(unsafe { CStr::from_ptr(torchx_last_error()) }.to_string_lossy().into_owned())
}

/// Runs a shim function that hands out a new tensor.
pub fn new_tensor(op: &'static str, call: impl FnOnce(*mut *mut C_tensor) -> c_int) -> Result<Tensor, Error> {
    let mut out = ptr::null_mut();
    check(op, call(&mut out))?;
    // SAFETY: on success `out` is a heap-allocated at::Tensor that nobody else owns.
    Ok(unsafe { Tensor::from_ptr(out) })
}

/// The C++ pointers of a list of tensors; valid while the tensors are borrowed.
pub fn pointers<'a>(tensors: impl IntoIterator<Item = &'a Tensor>) -> Vec<*const C_tensor> {
    tensors.into_iter().map(Tensor::as_ptr).collect()
}

/// The C++ pointer of an optional tensor, null for none.
pub fn optional(tensor: Option<&Tensor>) -> *const C_tensor {
    tensor.map_or(ptr::null(), Tensor::as_ptr)
}

/// For operators that answer with a tensor, as tch's own do: misuse is a panic with libtorch's words.
#[track_caller]
pub fn expect<T>(result: Result<T, Error>) -> T {
    match result {
        Ok(value) => value,
        Err(error) => panic!("{error}"),
    }
}
