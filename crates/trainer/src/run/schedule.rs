//! The learning rate as a function of the step.

use crate::config::{Config, OptimizerConfig, ScheduleConfig, Shape};

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

/// A warning where a run ends before its warmup does, as with the default warmup and few steps.
pub fn never_warm(config: &Config) -> Option<String> {
    let (warmup, steps) = (config.optimizer.warmup_steps, config.schedule.steps);
    (warmup > steps).then(|| {
        format!(
            "warning: optimizer.warmup_steps: {warmup}, but schedule.steps is {steps}: the learning rate never reaches optimizer.lr; lower it"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn course(warmup_steps: u64, steps: u64) -> LearningRate {
        LearningRate { warmup_start: 1e-6, peak: 1e-4, min: 1e-5, warmup_steps, steps, shape: Shape::Cosine }
    }

    #[test]
    fn a_warmup_that_does_not_end_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.yaml");
        let config = |schedule: &str| {
            let model = "model: {vision: {weights: v}, qformer: {init: q}}\ndata: {train: [{shards: s.tar}]}";
            std::fs::write(&path, format!("run: {{name: a}}\ntask: {{stage: 1}}\n{model}\nschedule: {{{schedule}}}\n"))
                .unwrap();
            Config::load_resolved(&path).unwrap()
        };
        assert_eq!(never_warm(&config("steps: 2000")), None);
        let line = never_warm(&config("steps: 20")).unwrap();
        assert!(line.starts_with("warning: optimizer.warmup_steps: 2000, but schedule.steps is 20"), "{line}");
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
