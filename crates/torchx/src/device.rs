//! Devices: one binary serves CPU and CUDA, and CUDA is found at run time.

use std::ffi::CStr;
use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;

use tch::{Cuda, Device, Kind};

use crate::error::Error;
use crate::{ffi, memory};

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

/// Resolves a choice against this machine, and makes a CUDA device the current one; for the CPU, has freed memory kept
/// ([`memory::keep_freed`]).
///
/// # Errors
/// [`Error::NoCuda`] and [`Error::NoSuchCudaDevice`] where CUDA was asked for by name and cannot be had.
pub fn select(choice: DeviceChoice) -> Result<Device, Error> {
    select_for(choice, 0)
}

/// The same for one of several processes on this machine, counted from 0: where no number is asked for, each has the CUDA
/// device of its own number, or the only one that it sees.
///
/// # Errors
/// Those of [`select`]; also for more processes than CUDA devices.
pub fn select_for(choice: DeviceChoice, process: usize) -> Result<Device, Error> {
    load_cuda();
    let count = if Cuda::is_available() { usize::try_from(Cuda::device_count()).unwrap_or(0) } else { 0 };
    let device = resolve(choice, process, count)?;
    match device {
        Device::Cpu => memory::keep_freed(),
        _ => set_current(device),
    }
    Ok(device)
}

fn resolve(choice: DeviceChoice, process: usize, count: usize) -> Result<Device, Error> {
    let requested = match choice {
        DeviceChoice::Cpu => return Ok(Device::Cpu),
        DeviceChoice::Auto if count == 0 => return Ok(Device::Cpu),
        DeviceChoice::Cuda(_) if count == 0 => return Err(Error::NoCuda { requested: choice }),
        DeviceChoice::Cuda(Some(index)) => index,
        DeviceChoice::Auto | DeviceChoice::Cuda(None) if count == 1 => 0,
        DeviceChoice::Auto | DeviceChoice::Cuda(None) => process,
    };
    if requested < count { Ok(Device::Cuda(requested)) } else { Err(Error::NoSuchCudaDevice { requested, count }) }
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

/// Whether the device multiplies matrices of this dtype at full speed.
///
/// On a CPU libtorch multiplies bf16 through oneDNN where there is AVX-512 (BW, VL, DQ), fp16 where there is AVX512-FP16; without, element by
/// element, tens of times slower than fp32.
pub fn multiplies_fast(device: Device, kind: Kind) -> bool {
    if device != Device::Cpu {
        return true;
    }
    match kind {
        Kind::BFloat16 => avx512(),
        Kind::Half => avx512() && fp16_instructions(),
        _ => true,
    }
}

fn avx512() -> bool {
    is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512vl") && is_x86_feature_detected!("avx512dq")
}

fn fp16_instructions() -> bool {
    is_x86_feature_detected!("avx512fp16")
}

/// What no other GPU has, on any machine, a slice of a GPU (MIG) included; none of the CPU and where the driver does not say.
pub fn uuid(device: Device) -> Option<String> {
    let index = cuda_index(device)?;
    let mut uuid = [0u8; 16];
    // SAFETY: the driver writes 16 bytes.
    let found = unsafe { ffi::torchx_cuda_uuid(index, uuid.as_mut_ptr()) } != 0;
    found.then(|| uuid.iter().map(|byte| format!("{byte:02x}")).collect())
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
    fn processes_share_out_the_devices_by_their_number() {
        use DeviceChoice::{Auto, Cpu, Cuda};
        for choice in [Auto, Cuda(None)] {
            for process in 0..4 {
                assert_eq!(resolve(choice, process, 4).unwrap(), Device::Cuda(process));
                // Launchers that show each process its own device alone.
                assert_eq!(resolve(choice, process, 1).unwrap(), Device::Cuda(0));
            }
            let error = resolve(choice, 4, 4).unwrap_err();
            assert!(matches!(error, Error::NoSuchCudaDevice { requested: 4, count: 4 }), "{error}");
        }
        assert_eq!(resolve(Cuda(Some(2)), 1, 4).unwrap(), Device::Cuda(2));
        assert_eq!(resolve(Cpu, 1, 4).unwrap(), Device::Cpu);
        assert_eq!(resolve(Auto, 3, 0).unwrap(), Device::Cpu);
        assert!(matches!(resolve(Cuda(None), 0, 0), Err(Error::NoCuda { .. })));
    }

    /// In a process of its own: no other thread may read the environment while it changes.
    #[test]
    fn libtorchs_watch_over_nccl_is_off_whatever_the_launcher_wants() {
        const NAME: &str = "TORCH_NCCL_ASYNC_ERROR_HANDLING";
        if std::env::var("TORCHX_TEST_CHILD").is_err() {
            let test = "device::tests::libtorchs_watch_over_nccl_is_off_whatever_the_launcher_wants";
            let mut child = std::process::Command::new(std::env::current_exe().unwrap());
            child.args(["--exact", test, "--test-threads=1"]).env("TORCHX_TEST_CHILD", "1").env(NAME, "1");
            assert!(child.status().unwrap().success());
            return;
        }
        assert_eq!(std::env::var(NAME).unwrap(), "1");
        // SAFETY: writes the environment, which no other thread reads.
        unsafe { ffi::torchx_configure_nccl() };
        assert_eq!(std::env::var(NAME).unwrap(), "0");
    }

    #[test]
    fn misspelt_devices_are_refused_by_name() {
        for text in ["", "CPU", "gpu", "cuda:", "cuda:-1", "cuda:+1", "cuda:x", "cuda:99999999999999999999"] {
            let error = text.parse::<DeviceChoice>().unwrap_err().to_string();
            assert!(error.contains(&format!("{text:?}")), "{error}");
        }
    }
}
