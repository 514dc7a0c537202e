//! Dynamic loss scaling for fp16 (Micikevicius et al., 2018), without a host sync.

use tch::{Device, Kind, Tensor, no_grad};

use crate::error::{Error, StateProblem};

const INITIAL_SCALE: f64 = 65536.0;
const GROWTH_FACTOR: f64 = 2.0;
const BACKOFF_FACTOR: f64 = 0.5;
const GROWTH_INTERVAL: i64 = 2000;

/// Multiplies the loss so that fp16 gradients do not vanish: the scale halves on overflow, down to [`GradScaler::FLOOR`],
/// and doubles after 2,000 steps without one. Switched off it is the identity.
pub struct GradScaler {
    enabled: bool,
    scale: Tensor,
    growth_tracker: Tensor,
}

impl GradScaler {
    /// The scale never falls below this; an overflow here is the model's, not the scaler's.
    pub const FLOOR: f64 = 1.0;

    /// A scaler on the device of the parameters, or the identity where not `enabled`.
    pub fn new(device: Device, enabled: bool) -> Self {
        let initial = if enabled { INITIAL_SCALE } else { 1.0 };
        Self {
            enabled,
            scale: Tensor::full([], initial, (Kind::Float, device)),
            growth_tracker: Tensor::zeros([], (Kind::Int, device)),
        }
    }

    /// Whether the scaler does anything.
    pub fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// The loss times the scale.
    pub fn scale(&self, loss: &Tensor) -> Tensor {
        if self.enabled { loss * &self.scale } else { loss.shallow_clone() }
    }

    /// The factor as it stands, on the device.
    ///
    /// # Shapes
    /// `[]` fp32, a copy.
    pub fn current_scale(&self) -> Tensor {
        self.scale.copy()
    }

    /// What the gradients must be multiplied by, for [`crate::foreach::unscale_`].
    ///
    /// # Shapes
    /// `[]` fp32.
    pub fn inv_scale(&self) -> Tensor {
        // In fp64, as a scale of 2^-n has an exact reciprocal in both, and others round once.
        self.scale.to_kind(Kind::Double).reciprocal().to_kind(Kind::Float)
    }

    /// Adapts the scale to whether this step's gradients overflowed.
    ///
    /// # Shapes
    /// found_inf: `[]` or `[1]` fp32, on the scaler's device.
    pub fn update(&mut self, found_inf: &Tensor) {
        if !self.enabled {
            return;
        }
        no_grad(|| {
            let _ = self.scale.internal_amp_update_scale_(
                &self.growth_tracker,
                found_inf,
                GROWTH_FACTOR,
                BACKOFF_FACTOR,
                GROWTH_INTERVAL,
            );
            let _ = self.scale.clamp_min_(Self::FLOOR);
        });
    }

    /// What a resumed run needs: `scale` and `growth_tracker`; the tensors share memory with the scaler.
    pub fn state(&self) -> Vec<(String, Tensor)> {
        vec![
            ("growth_tracker".to_owned(), self.growth_tracker.shallow_clone()),
            ("scale".to_owned(), self.scale.shallow_clone()),
        ]
    }

    /// Copies a saved state in.
    ///
    /// # Errors
    /// [`Error::State`] with every key that is missing or has another shape; nothing is changed then.
    pub fn load_state(&mut self, get: impl Fn(&str) -> Option<Tensor>) -> Result<(), Error> {
        let mut problems = Vec::new();
        let mut copies = Vec::new();
        for (key, slot) in self.state() {
            match get(&key) {
                None => problems.push(StateProblem::Missing { key }),
                Some(saved) if !saved.size().is_empty() => {
                    problems.push(StateProblem::Shape { key, expected: vec![], got: saved.size() });
                }
                Some(saved) => copies.push((slot, saved)),
            }
        }
        if !problems.is_empty() {
            return Err(Error::State { problems });
        }
        no_grad(|| copies.iter_mut().for_each(|(slot, saved)| slot.copy_(saved)));
        Ok(())
    }
}
