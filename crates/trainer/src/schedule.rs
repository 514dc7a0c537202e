//! The learning rate as a function of the step.

use crate::config::{OptimizerConfig, ScheduleConfig, Shape};

/// Linear warmup, then half a cosine, both per step (BLIP-2, section 3.4).
#[derive(Debug, Clone, PartialEq)]
pub struct LearningRate {
    warmup_start: f64,
    peak: f64,
    min: f64,
    warmup_steps: u64,
    steps: u64,
    shape: Shape,
}

impl LearningRate {
    /// The course that the two sections describe.
    pub fn new(optimizer: &OptimizerConfig, schedule: &ScheduleConfig) -> Self {
        Self {
            warmup_start: optimizer.warmup_start_lr,
            peak: optimizer.lr,
            min: optimizer.min_lr,
            warmup_steps: optimizer.warmup_steps,
            steps: schedule.steps,
            shape: schedule.shape,
        }
    }

    /// The learning rate of the update that leads from `step` to `step + 1`.
    ///
    /// Step 0 has `warmup_start_lr`, step `warmup_steps` has `lr`; `min_lr` would be reached at step `steps`, one past the
    /// last, and holds from there on.
    pub fn at(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return self.warmup_start + (self.peak - self.warmup_start) * step as f64 / self.warmup_steps as f64;
        }
        let Shape::Cosine = self.shape;
        let after_warmup = self.steps.saturating_sub(self.warmup_steps).max(1);
        let progress = ((step - self.warmup_steps) as f64 / after_warmup as f64).min(1.0);
        self.min + (self.peak - self.min) * 0.5 * (1.0 + (std::f64::consts::PI * progress).cos())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn course(warmup_steps: u64, steps: u64) -> LearningRate {
        LearningRate { warmup_start: 1e-6, peak: 1e-4, min: 1e-5, warmup_steps, steps, shape: Shape::Cosine }
    }

    fn close(got: f64, expected: f64) {
        assert!((got - expected).abs() < 1e-12, "{got} instead of {expected}");
    }

    #[test]
    fn warmup_is_a_straight_line() {
        let lr = course(10, 110);
        close(lr.at(0), 1e-6);
        close(lr.at(5), 5.05e-5);
        close(lr.at(9), 9.01e-5);
        close(lr.at(10), 1e-4);
    }

    #[test]
    fn cosine_by_hand() {
        let lr = course(10, 110);
        // A quarter, half and all of the way: cos is 1/sqrt 2, 0 and -1.
        close(lr.at(35), 1e-5 + 9e-5 * 0.5 * (1.0 + 0.5f64.sqrt()));
        close(lr.at(60), 5.5e-5);
        close(lr.at(110), 1e-5);
        close(lr.at(1000), 1e-5);
    }

    #[test]
    fn no_warmup_starts_at_the_peak_and_all_warmup_never_leaves_the_line() {
        close(course(0, 100).at(0), 1e-4);
        close(course(100, 100).at(50), 5.05e-5);
        close(course(100, 100).at(100), 1e-4);
    }
}
