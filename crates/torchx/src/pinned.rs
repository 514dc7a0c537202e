//! Host data to the device without making the host wait.

use tch::kind::Element;
use tch::{Device, Tensor};

use crate::device::cuda_index;
use crate::error::Error;
use crate::ffi;

/// Copies a slice into a tensor on `device`.
///
/// For CUDA the slice goes through page-locked memory and the copy is queued on the current stream; libtorch keeps the
/// page-locked block until the copy is done, so nothing has to be held on to. On the CPU it is a plain copy.
///
/// # Shapes
/// data: as many elements as `shape` has; returns: `shape`.
///
/// # Errors
/// [`Error::Torch`] where the lengths differ or memory runs out.
pub fn to_device<T: Element>(data: &[T], shape: &[i64], device: Device) -> Result<Tensor, Error> {
    let host = match cuda_index(device) {
        None => Tensor::f_empty(shape, (T::KIND, Device::Cpu)).map_err(|e| torch_error(&e))?,
        Some(_) => {
            let like = Tensor::f_empty([0], (T::KIND, Device::Cpu)).map_err(|e| torch_error(&e))?;
            // SAFETY: shape and prototype are live for the call.
            ffi::new_tensor("pinned memory", |out| unsafe {
                ffi::torchx_empty_pinned(shape.as_ptr(), shape.len(), like.as_ptr(), out)
            })?
        }
    };
    if host.numel() != data.len() {
        return Err(Error::Torch {
            op: "copy to device",
            message: format!("{} elements do not fill the shape {shape:?}", data.len()),
        });
    }
    // SAFETY: `host` is contiguous, was just made, and holds exactly `data.len()` elements of T's kind.
    unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), host.data_ptr().cast::<T>(), data.len()) };
    match cuda_index(device) {
        None => Ok(host),
        Some(_) => host.f_to_device_(device, T::KIND, true, false).map_err(|e| torch_error(&e)),
    }
}

fn torch_error(error: &tch::TchError) -> Error {
    let text = error.to_string();
    Error::Torch { op: "copy to device", message: text.lines().next().unwrap_or_default().to_owned() }
}
