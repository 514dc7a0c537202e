//! Precision as the config names it, in libtorch's terms, and what the device makes of it.

use blip2_torchx::device::multiplies_fast;
use blip2_torchx::tf32::Tf32;
use tch::{Device, Kind};

use crate::config::{Config, Precision};

impl Precision {
    /// The storage dtype of frozen weights.
    pub fn kind(self) -> Kind {
        match self {
            Precision::Fp32 => Kind::Float,
            Precision::Bf16 => Kind::BFloat16,
            Precision::Fp16 => Kind::Half,
        }
    }

    /// What autocast casts to; `None` for fp32.
    pub fn autocast(self) -> Option<Kind> {
        (self != Precision::Fp32).then(|| self.kind())
    }

    /// Forbids TF32 under fp32, for the whole process and before anything is computed: on a GPU libtorch's convolutions are TF32 by default.
    pub fn set_tf32(self) {
        if self == Precision::Fp32 {
            Tf32::OFF.set();
        }
    }
}

/// A warning where the run would compute in number formats for which the device has no instructions.
pub fn slow_formats(config: &Config, device: Device) -> Option<String> {
    let model = &config.model;
    let mut formats = vec![("run.precision", config.run.precision), ("model.vision.dtype", model.vision.dtype)];
    formats.extend(model.language.as_ref().map(|language| ("model.language.dtype", language.dtype)));
    formats.retain(|(_, format)| !multiplies_fast(device, format.kind()));
    warning(&formats)
}

fn warning(slow: &[(&str, Precision)]) -> Option<String> {
    let named: Vec<String> = slow.iter().map(|(key, format)| format!("{key}: {format}")).collect();
    (!named.is_empty()).then(|| {
        format!(
            "warning: {}: this processor has no instructions for it and takes tens of times as long as in fp32; set fp32",
            named.join(", ")
        )
    })
}

/// The dtype in which a model that lies in `stored` answers soonest: its own, or fp32 where the device has no instructions for it.
pub fn soonest(stored: Kind, device: Device) -> Kind {
    if multiplies_fast(device, stored) { stored } else { Kind::Float }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_warning_names_every_key() {
        assert_eq!(warning(&[]), None);
        let line = warning(&[("run.precision", Precision::Bf16), ("model.language.dtype", Precision::Fp16)]).unwrap();
        assert!(line.starts_with("warning: run.precision: bf16, model.language.dtype: fp16: this processor"), "{line}");
    }

    #[test]
    fn fp32_is_always_fast_and_a_model_is_never_read_in_a_slow_format() {
        for kind in [Kind::Float, Kind::BFloat16, Kind::Half] {
            let chosen = soonest(kind, Device::Cpu);
            assert!(multiplies_fast(Device::Cpu, chosen));
            assert!(chosen == kind || !multiplies_fast(Device::Cpu, kind));
            assert_eq!(soonest(kind, Device::Cuda(0)), kind);
        }
    }
}
