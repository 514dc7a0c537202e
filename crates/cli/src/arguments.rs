//! Values of options that several commands share.

use anyhow::Result;
use blip2_trainer::captioner;
use blip2_trainer::config;
use blip2_trainer::device::{self, Device, DeviceChoice};
use clap::{Args, ValueEnum};

/// Number format of the arithmetic or of weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Precision {
    /// 32-bit floats
    Fp32,
    /// bfloat16
    Bf16,
    /// IEEE half precision
    Fp16,
}

impl From<Precision> for config::Precision {
    fn from(precision: Precision) -> config::Precision {
        match precision {
            Precision::Fp32 => config::Precision::Fp32,
            Precision::Bf16 => config::Precision::Bf16,
            Precision::Fp16 => config::Precision::Fp16,
        }
    }
}

/// When beam search ends before the length limit.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum EarlyStopping {
    /// When no running text can beat the worst of the candidates at its present length
    False,
    /// With as many candidates as beams
    True,
    /// When no running text can beat the worst of the candidates at any length
    Never,
}

impl From<EarlyStopping> for captioner::EarlyStopping {
    fn from(when: EarlyStopping) -> captioner::EarlyStopping {
        match when {
            EarlyStopping::False => captioner::EarlyStopping::Off,
            EarlyStopping::True => captioner::EarlyStopping::On,
            EarlyStopping::Never => captioner::EarlyStopping::Never,
        }
    }
}

/// Where to compute.
#[derive(Debug, Args)]
pub(crate) struct DeviceArgument {
    /// Where to compute: auto, cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: DeviceChoice,
}

impl DeviceArgument {
    /// The device of this machine that is meant.
    pub(crate) fn select(&self) -> Result<Device> {
        Ok(device::select(self.device)?)
    }

    /// The same for one of several processes on this machine, counted from 0.
    pub(crate) fn select_for(&self, process: usize) -> Result<Device> {
        Ok(device::select_for(self.device, process)?)
    }
}

/// A finite number above 0.
pub(crate) fn positive(text: &str) -> Result<f64, String> {
    number(text, "a number above 0", |value| value > 0.0)
}

/// A probability that is not 0.
pub(crate) fn probability(text: &str) -> Result<f64, String> {
    number(text, "a number above 0 and at most 1", |value| value > 0.0 && value <= 1.0)
}

/// Any finite number.
pub(crate) fn finite(text: &str) -> Result<f64, String> {
    number(text, "a finite number", |_| true)
}

fn number(text: &str, expected: &str, fits: impl Fn(f64) -> bool) -> Result<f64, String> {
    text.parse()
        .ok()
        .filter(|value: &f64| value.is_finite() && fits(*value))
        .ok_or_else(|| format!("expected {expected}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_out_of_range_are_refused() {
        assert_eq!(probability("1"), Ok(1.0));
        for text in ["0", "1.01", "-1", "NaN", "inf", "x", ""] {
            assert!(probability(text).is_err(), "{text}");
        }
        assert_eq!(positive("2.5"), Ok(2.5));
        assert!(positive("0").is_err() && positive("inf").is_err());
        assert_eq!(finite("-1"), Ok(-1.0));
        assert!(finite("NaN").is_err());
    }
}
