//! What happened since the last record: sums of the steps' metrics, samples and waiting time.

use std::collections::BTreeMap;
use std::time::Instant;

use blip2_data::HostBatch;
use serde::{Deserialize, Serialize};
use tch::no_grad;

use crate::error::Error;
use crate::ranks::{Ranks, Traffic};
use crate::step::StepMetrics;

/// The part of a meter that a checkpoint between two records keeps, so that the next record is that of an uninterrupted run.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Unrecorded {
    /// Steps that no record holds yet.
    pub steps: u64,
    /// Sums over these steps by metric; null where one is not finite.
    pub sums: BTreeMap<String, Option<f64>>,
}

/// Metrics of which each rank has those of its own samples, in equal numbers; all others are the same on all ranks.
const OWN: [&str; 2] = ["cache_hits", "cache_misses"];

impl Unrecorded {
    /// The same with the means over the ranks of what each has of its own.
    ///
    /// # Errors
    /// When a rank is lost.
    pub fn of_all(mut self, ranks: &dyn Ranks) -> Result<Unrecorded, Error> {
        let own = self.sums.iter_mut().filter(|(name, _)| OWN.contains(&name.as_str()));
        let mut own: Vec<&mut f64> = own.filter_map(|(_, sum)| sum.as_mut()).collect();
        mean_over_ranks(&mut own, ranks)?;
        Ok(self)
    }
}

fn mean_over_ranks(own: &mut [&mut f64], ranks: &dyn Ranks) -> Result<(), Error> {
    if own.is_empty() || ranks.world() == 1 {
        return Ok(());
    }
    let bits: Vec<u64> = own.iter().map(|value| value.to_bits()).collect();
    let all = ranks.share_numbers(&bits)?;
    for (place, value) in own.iter_mut().enumerate() {
        **value = all.iter().map(|rank| f64::from_bits(rank[place])).sum::<f64>() / all.len() as f64;
    }
    Ok(())
}

/// Collects what the next record says.
pub(crate) struct Meter {
    carried: Unrecorded,
    metrics: StepMetrics,
    steps: u64,
    samples: usize,
    data_wait_s: f64,
    /// What ranks exchanged and was taken from them already.
    traffic: Traffic,
    since: Instant,
}

/// Names of the bytes that a rank got from others, a step.
const TRAFFIC: [&str; 3] = ["gathered_mib", "fetched_mib", "gradients_mib"];

impl Meter {
    /// Goes on from what the run before had collected.
    pub(crate) fn resume(carried: Unrecorded) -> Meter {
        Meter {
            carried,
            metrics: Vec::new(),
            steps: 0,
            samples: 0,
            data_wait_s: 0.0,
            traffic: Traffic::default(),
            since: Instant::now(),
        }
    }

    /// Begins with nothing.
    pub(crate) fn start() -> Meter {
        Meter::resume(Unrecorded::default())
    }

    /// A batch came after so long a wait.
    pub(crate) fn batch(&mut self, host: &HostBatch, wait_s: f64) {
        self.samples += host.size;
        self.data_wait_s += wait_s;
    }

    /// A step is done; nothing is read from the device.
    pub(crate) fn step(&mut self, metrics: StepMetrics) {
        self.steps += 1;
        if self.metrics.is_empty() {
            self.metrics = metrics;
            no_grad(|| {
                for (name, sum) in &mut self.metrics {
                    if let Some(carried) = self.carried.sums.get(*name) {
                        *sum = &*sum + carried.unwrap_or(f64::NAN);
                    }
                }
            });
            return;
        }
        no_grad(|| {
            for ((_, sum), (_, value)) in self.metrics.iter_mut().zip(metrics) {
                // Not in place: two names may share one tensor.
                *sum = &*sum + value;
            }
        });
    }

    /// Does something that is no part of a step: its time and what it exchanges are left out.
    pub(crate) fn leave_out<T>(&mut self, ranks: &dyn Ranks, work: impl FnOnce() -> T) -> T {
        let begun = Instant::now();
        self.traffic += ranks.take_traffic();
        let result = work();
        ranks.take_traffic();
        self.since += begun.elapsed();
        result
    }

    /// What a checkpoint keeps, as this rank has it. Waits for the device.
    pub(crate) fn unrecorded(&self) -> Unrecorded {
        if self.steps == 0 {
            return self.carried.clone();
        }
        let finite = |sum: f64| sum.is_finite().then_some(sum);
        let sums = self.metrics.iter().map(|(name, sum)| (name.to_string(), finite(sum.double_value(&[])))).collect();
        Unrecorded { steps: self.carried.steps + self.steps, sums }
    }

    /// Means over the steps since the last call, and rates. Waits for the device.
    ///
    /// # Errors
    /// When a rank is lost.
    pub(crate) fn read(&mut self, ranks: &dyn Ranks) -> Result<Vec<(String, f64)>, Error> {
        let steps = (self.carried.steps + self.steps).max(1) as f64;
        let waiting = ranks.waiting("reading metrics");
        let mut scalars: Vec<(String, f64)> =
            self.metrics.iter().map(|(name, sum)| (name.to_string(), sum.double_value(&[]) / steps)).collect();
        drop(waiting);
        let own = scalars.iter_mut().filter(|(name, _)| OWN.contains(&name.as_str()));
        mean_over_ranks(&mut own.map(|(_, value)| value).collect::<Vec<_>>(), ranks)?;
        // Since the process began: a resumed run's rates are its own.
        let (seconds, steps) = (self.since.elapsed().as_secs_f64(), self.steps.max(1) as f64);
        scalars.push(("step_s".into(), seconds / steps));
        scalars.push(("samples_per_s".into(), (self.samples * ranks.world()) as f64 / seconds.max(1e-9)));
        scalars.push(("data_wait_s".into(), self.data_wait_s / steps));
        if ranks.world() > 1 {
            self.traffic += ranks.take_traffic();
            scalars.extend(of_ranks(seconds / steps, steps, self.traffic, ranks)?);
        }
        *self = Meter::start();
        Ok(scalars)
    }
}

/// What each rank got from the others in a step, and who made them wait: the rank that itself waited least.
fn of_ranks(step_s: f64, steps: f64, traffic: Traffic, ranks: &dyn Ranks) -> Result<Vec<(String, f64)>, Error> {
    let busy_s = step_s - traffic.wait_s / steps;
    let busy: Vec<f64> = ranks.share_numbers(&[busy_s.to_bits()])?.iter().map(|rank| f64::from_bits(rank[0])).collect();
    let bytes = [traffic.gathered, traffic.fetched, traffic.gradients];
    let mib = bytes.map(|bytes| bytes as f64 / steps / f64::from(1 << 20));
    let mib = TRAFFIC.into_iter().zip(mib).map(|(name, value)| (name.to_owned(), value));
    Ok(step_times(&busy).into_iter().chain(mib).collect())
}

/// Seconds of a step that each rank did not wait for others, and who had most and least.
fn step_times(busy: &[f64]) -> Vec<(String, f64)> {
    let (slowest, slowest_s) =
        busy.iter().copied().enumerate().fold((0, f64::MIN), |a, b| if b.1 > a.1 { b } else { a });
    let fastest_s = busy.iter().copied().fold(f64::MAX, f64::min);
    let ends = [("slowest_rank", slowest as f64), ("slowest_rank_s", slowest_s), ("fastest_rank_s", fastest_s)];
    let each = busy.iter().enumerate().map(|(rank, &seconds)| (format!("rank_s/{rank}"), seconds));
    ends.into_iter().map(|(name, value)| (name.to_owned(), value)).chain(each).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ranks::Alone;
    use tch::Tensor;

    fn loss(value: f32) -> StepMetrics {
        let loss = Tensor::from(value);
        vec![("loss", loss.shallow_clone()), ("loss_lm", loss), ("grad_norm", Tensor::from(f32::INFINITY))]
    }

    fn mean(meter: &mut Meter) -> f64 {
        meter.read(&Alone).unwrap().into_iter().find(|(name, _)| name == "loss").unwrap().1
    }

    #[test]
    fn every_rank_has_its_step_time_and_the_slowest_is_named() {
        let times: BTreeMap<String, f64> = step_times(&[0.5, 0.75, 0.25]).into_iter().collect();
        let expected = [
            ("fastest_rank_s", 0.25),
            ("rank_s/0", 0.5),
            ("rank_s/1", 0.75),
            ("rank_s/2", 0.25),
            ("slowest_rank", 1.0),
            ("slowest_rank_s", 0.75),
        ];
        assert_eq!(times, expected.map(|(name, value)| (name.to_owned(), value)).into());
    }

    #[test]
    fn a_mean_goes_on_behind_a_checkpoint() {
        let losses = [0.1f32, 2.7, 3.3, 0.9];
        let mut whole = Meter::start();
        losses.iter().for_each(|&value| whole.step(loss(value)));
        for cut in 0..=losses.len() {
            let mut before = Meter::start();
            losses[..cut].iter().for_each(|&value| before.step(loss(value)));
            let saved = serde_json::to_string(&before.unrecorded()).unwrap();
            let mut after = Meter::resume(serde_json::from_str(&saved).unwrap());
            assert_eq!(after.unrecorded(), before.unrecorded());
            losses[cut..].iter().for_each(|&value| after.step(loss(value)));
            assert_eq!(after.unrecorded(), whole.unrecorded(), "cut {cut}");
        }
        assert_eq!(whole.unrecorded().sums["grad_norm"], None);
        assert_eq!(mean(&mut whole), f64::from(losses.iter().sum::<f32>()) / 4.0);
        assert_eq!(whole.unrecorded(), Unrecorded::default());
    }
}
