//! Features as a store keeps them: from the device to bytes, and back.

use blip2_data::feature_store::FeatureFormat;
use blip2_torchx::pinned::to_device;
use tch::{Device, Kind, Tensor, no_grad};

use crate::error::Error;

/// The largest whole number of an int8 row.
const LARGEST: f64 = 127.0;

/// The bytes of a row of features.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct StoredNumbers {
    /// How a number is stored.
    pub(crate) format: FeatureFormat,
    /// Feature tokens of an image.
    pub(crate) tokens: i64,
    /// Numbers a token.
    pub(crate) width: i64,
}

impl StoredNumbers {
    /// A dtype that holds what comes back exactly.
    pub(crate) fn kind(self) -> Kind {
        match self.format {
            FeatureFormat::Bf16 => Kind::BFloat16,
            FeatureFormat::Int8 => Kind::Float,
        }
    }

    /// Rounds features to what is stored.
    ///
    /// # Shapes
    /// `f32 [B, N, width]`; returns B rows, one behind the other.
    ///
    /// # Errors
    /// When the device refuses.
    pub(crate) fn to_rows(self, features: &Tensor) -> Result<Vec<u8>, Error> {
        let rows = features.size().first().copied().unwrap_or(0);
        let bytes = |tensor: &Tensor| tensor.contiguous().view([rows, -1]).view_dtype(Kind::Uint8);
        let stored = no_grad(|| match self.format {
            FeatureFormat::Bf16 => bytes(&features.to_kind(Kind::BFloat16)),
            FeatureFormat::Int8 => {
                let scale = features.abs().amax([-1], true) / LARGEST; // [B, N, 1]
                // A token of zeros has no scale. One that is not finite keeps a scale that is not, and so is read back as such.
                let divisor = scale.where_self(&scale.gt(0.0), &scale.ones_like());
                let whole = (features / divisor).nan_to_num(0.0, 0.0, 0.0).round().clamp(-LARGEST, LARGEST);
                Tensor::cat(&[bytes(&scale), bytes(&whole.to_kind(Kind::Int8))], 1)
            }
        });
        let stored = stored.to_device(Device::Cpu).contiguous();
        let mut rows = vec![0; stored.numel()];
        stored.f_copy_data(&mut rows, stored.numel())?;
        Ok(rows)
    }

    /// The features that rows stand for.
    ///
    /// # Shapes
    /// B rows, one behind the other; returns `f32 [B, N, width]`.
    ///
    /// # Errors
    /// When the device refuses.
    pub(crate) fn features_of(self, rows: &[u8], batch: usize, device: Device) -> Result<Tensor, Error> {
        let StoredNumbers { format, tokens, width } = self;
        let batch = batch as i64;
        let stored = to_device(rows, &[batch, rows.len() as i64 / batch.max(1)], device)?;
        Ok(match format {
            FeatureFormat::Bf16 => stored.view_dtype(Kind::BFloat16).view([batch, tokens, width]).to_kind(Kind::Float),
            FeatureFormat::Int8 => {
                // Flat first: a scale's bytes need not lie at a multiple of four in a row.
                let part = |from, length| stored.narrow(1, from, length).reshape([-1]);
                let scale = part(0, 4 * tokens).view_dtype(Kind::Float).view([batch, tokens, 1]);
                let whole = part(4 * tokens, tokens * width).view_dtype(Kind::Int8).view([batch, tokens, width]);
                whole.to_kind(Kind::Float) * scale
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn round_trip(format: FeatureFormat, values: &[f32], shape: [i64; 3]) -> Vec<f32> {
        let numbers = StoredNumbers { format, tokens: shape[1], width: shape[2] };
        let rows = numbers.to_rows(&Tensor::from_slice(values).view(shape)).unwrap();
        let back = numbers.features_of(&rows, shape[0] as usize, Device::Cpu).unwrap();
        assert_eq!(back.size(), shape);
        // What is stored of what was stored is the same: training on rows that are read or were just written makes no difference.
        assert_eq!(
            numbers.to_rows(&numbers.features_of(&rows, shape[0] as usize, Device::Cpu).unwrap()).unwrap(),
            rows
        );
        Vec::try_from(back.view([-1])).unwrap()
    }

    proptest! {
        #[test]
        fn int8_errs_by_half_a_step_of_its_token_at_most(
            batch in 1i64..3, tokens in 1i64..4, width in 1i64..8, seed: u64, exponent in -20i32..20,
        ) {
            let mut state = seed;
            let mut next = || {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                ((state >> 40) as f32 / (1u32 << 23) as f32 - 1.0) * 2f32.powi(exponent)
            };
            let values: Vec<f32> = (0..batch * tokens * width).map(|_| next()).collect();
            let back = round_trip(FeatureFormat::Int8, &values, [batch, tokens, width]);
            for (token, back) in values.chunks(width as usize).zip(back.chunks(width as usize)) {
                let step = token.iter().fold(0f32, |most, value| most.max(value.abs())) / 127.0;
                for (value, back) in token.iter().zip(back) {
                    prop_assert!((value - back).abs() <= 0.5001 * step, "{value} became {back}, step {step}");
                }
            }
        }

        #[test]
        fn bf16_errs_by_half_of_its_last_bit_at_most(values in proptest::collection::vec(-1e6f32..1e6, 6)) {
            for (value, back) in values.iter().zip(round_trip(FeatureFormat::Bf16, &values, [1, 2, 3])) {
                prop_assert!((value - back).abs() <= value.abs() / 256.0);
            }
        }
    }

    #[test]
    fn zeros_stay_zeros_and_what_is_not_finite_stays_so() {
        for format in [FeatureFormat::Bf16, FeatureFormat::Int8] {
            let numbers = StoredNumbers { format, tokens: 3, width: 2 };
            let values = Tensor::from_slice(&[0.0f32, 0.0, f32::NAN, 1.0, f32::INFINITY, 1.0]).view([1, 3, 2]);
            let back = numbers.features_of(&numbers.to_rows(&values).unwrap(), 1, Device::Cpu).unwrap();
            let back = Vec::<f32>::try_from(back.view([-1])).unwrap();
            assert_eq!(back[..2], [0.0, 0.0]);
            assert!(!back[2].is_finite() && !back[4].is_finite(), "{format:?}: {back:?}");
        }
    }
}
