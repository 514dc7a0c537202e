//! Devices: one binary serves CPU and CUDA, and CUDA is found at run time.

use std::ffi::CStr;
use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;

use tch::{Cuda, Device};

use crate::error::Error;
use crate::ffi;

/// Loads libtorch's CUDA half where it is installed; true where it was found.
///
/// The program links `libtorch_cpu` alone. libtorch remembers its answer to the first question about CUDA, so this must
/// come before any other libtorch call. Calling it again costs nothing.
pub fn load_cuda() -> bool {
    static LOADED: OnceLock<bool> = OnceLock::new();
    // SAFETY: loads a shared library whose initialisers are libtorch's own.
    *LOADED.get_or_init(|| unsafe { ffi::torchx_load_cuda() } != 0)
}

/// The device a user asks for: `auto`, `cpu`, `cuda` or `cuda:N`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeviceChoice {
    /// CUDA where there is a device, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// A CUDA device: the first, or the one of that number.
    Cuda(Option<usize>),
}

impl FromStr for DeviceChoice {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(None)),
            _ => text
                .strip_prefix("cuda:")
                .filter(|number| number.bytes().all(|b| b.is_ascii_digit()))
                .and_then(|number| number.parse().ok())
                .map(|index| Self::Cuda(Some(index)))
                .ok_or_else(|| Error::UnknownDevice { given: text.to_owned() }),
        }
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(None) => f.write_str("cuda"),
            Self::Cuda(Some(index)) => write!(f, "cuda:{index}"),
        }
    }
}

/// Resolves a choice against this machine.
///
/// # Errors
/// [`Error::NoCuda`] and [`Error::NoSuchCudaDevice`] where CUDA was asked for by name and cannot be had.
pub fn select(choice: DeviceChoice) -> Result<Device, Error> {
    load_cuda();
    let count = if Cuda::is_available() { usize::try_from(Cuda::device_count()).unwrap_or(0) } else { 0 };
    match choice {
        DeviceChoice::Auto if count > 0 => Ok(Device::Cuda(0)),
        DeviceChoice::Auto | DeviceChoice::Cpu => Ok(Device::Cpu),
        DeviceChoice::Cuda(_) if count == 0 => Err(Error::NoCuda { requested: choice }),
        DeviceChoice::Cuda(index) => {
            let requested = index.unwrap_or(0);
            if requested < count {
                Ok(Device::Cuda(requested))
            } else {
                Err(Error::NoSuchCudaDevice { requested, count })
            }
        }
    }
}

/// The CUDA number of a device, none for the CPU.
pub(crate) fn cuda_index(device: Device) -> Option<i32> {
    match device {
        Device::Cuda(index) => i32::try_from(index).ok(),
        _ => None,
    }
}

/// Makes a CUDA device this thread's current one; nothing on the CPU.
pub fn set_current(device: Device) {
    if let Some(index) = cuda_index(device) {
        // SAFETY: plain call by value; exceptions come back as a code.
        ffi::expect(ffi::check("set device", unsafe { ffi::torchx_device_set(index) }));
    }
}

/// Waits until everything queued on the device is done; nothing on the CPU.
pub fn synchronize(device: Device) {
    if let Some(index) = cuda_index(device) {
        // SAFETY: plain call by value; exceptions come back as a code.
        ffi::expect(ffi::check("synchronize", unsafe { ffi::torchx_device_synchronize(index) }));
    }
}

/// The device's product name, as `NVIDIA H100` or the processor's model; `cpu` or `cuda:N` where the system does not say.
pub fn name(device: Device) -> String {
    match cuda_index(device) {
        Some(index) => cuda_name(index).unwrap_or_else(|| format!("cuda:{index}")),
        None => cpu_name().unwrap_or_else(|| "cpu".to_owned()),
    }
}

fn cuda_name(index: i32) -> Option<String> {
    let mut buffer = [0; 256];
    // SAFETY: the driver writes at most `capacity` bytes, its NUL included.
    let found = unsafe { ffi::torchx_cuda_name(index, buffer.as_mut_ptr(), 256) } != 0;
    // SAFETY: the driver ended the string with a NUL inside the buffer.
    found.then(|| unsafe { CStr::from_ptr(buffer.as_ptr()) }.to_string_lossy().into_owned())
}

fn cpu_name() -> Option<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_names_round_trip() {
        for text in ["auto", "cpu", "cuda", "cuda:0", "cuda:12"] {
            assert_eq!(text.parse::<DeviceChoice>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn misspelt_devices_are_refused_by_name() {
        for text in ["", "CPU", "gpu", "cuda:", "cuda:-1", "cuda:+1", "cuda:x", "cuda:99999999999999999999"] {
            let error = text.parse::<DeviceChoice>().unwrap_err().to_string();
            assert!(error.contains(&format!("{text:?}")), "{error}");
        }
    }
}
