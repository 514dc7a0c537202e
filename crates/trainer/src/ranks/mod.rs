//! The processes that train one run together, each with its slice of every global batch.
//!
//! Training knows them by the trait [`Ranks`] alone. A process that trains by itself is rank 0 of one: what is shared stays where it is.

mod agreement;
mod exact_sum;
mod exchange;
mod group;
mod launch;
mod meeting;
mod panics;
mod shared_folder;
mod watch;

use std::ops::AddAssign;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::rc::Rc;

use blip2_torchx::params::ParamStore;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tch::{Device, Kind, Tensor, no_grad};

pub(crate) use agreement::{Claims, checksum};
pub use blip2_torchx::process::exit_now;
use exact_sum::ExactSum;
pub use group::Group;
pub use launch::{Launch, Meeting};
pub use panics::panic_line;
pub(crate) use shared_folder::{SHOWN_WITHIN, check_shared};
pub use watch::{Pulse, Waiting};

use crate::config::GradientExchange;
use crate::error::Error;

/// The phase in which steps are computed, on a GPU ahead of it.
pub(crate) const STEPPING: &str = "forward and backward";

/// The ranks of a run, as each of them sees them. All call the same methods in the same order.
pub trait Ranks {
    /// This process, from 0.
    fn rank(&self) -> usize;

    /// How many there are.
    fn world(&self) -> usize;

    /// What this rank does from now on, for those who find it missing.
    fn enter(&self, step: u64, phase: &'static str);

    /// Says that this rank waits, as for a device that waits for other ranks, for as long as the answer lives.
    fn waiting(&self, _what: &'static str) -> Option<Waiting<'_>> {
        None
    }

    /// What says from any thread, also while this one waits for it, that this rank goes on with what it does, however long that takes.
    fn pulse(&self) -> Pulse {
        Pulse::default()
    }

    /// Has tensors on this device exchanged without a detour over the host. All ranks say so, each with a device of its own.
    ///
    /// # Errors
    /// GPUs that cannot speak to each other.
    fn exchange_on(&self, device: Device) -> Result<(), Error>;

    /// What every rank says, in the order of ranks.
    ///
    /// # Errors
    /// When a rank is lost.
    fn share(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, Error>;

    /// The same for numbers, as many on each rank.
    ///
    /// # Errors
    /// When a rank is lost.
    fn share_numbers(&self, numbers: &[u64]) -> Result<Vec<Vec<u64>>, Error>;

    /// Rows of all ranks in the order of ranks, detached: `[B, ..] -> [W B, ..]`.
    ///
    /// # Errors
    /// When a rank is lost.
    fn gather(&self, rows: &Tensor) -> Result<Tensor, Error>;

    /// Rows by their index among those of all ranks, detached: `rows [B, ..]`, `index i64 [C] -> [C, ..]`. Only what is asked for is sent.
    ///
    /// # Errors
    /// When a rank is lost.
    fn fetch(&self, rows: &Tensor, index: &Tensor) -> Result<Tensor, Error>;

    /// Replaces each element by its sum over the ranks.
    ///
    /// # Errors
    /// When a rank is lost.
    fn add_up(&self, tensor: &Tensor) -> Result<(), Error>;

    /// The same of gradients.
    ///
    /// # Errors
    /// When a rank is lost.
    fn add_up_gradients(&self, sum: &Tensor) -> Result<(), Error>;

    /// What adds up the gradients of these parameters at every step.
    ///
    /// # Errors
    /// When a rank is lost, or has other parameters.
    fn gradients(&self, params: &ParamStore, format: GradientExchange) -> Result<Box<dyn Gradients>, Error>;

    /// What was sent and how long this rank waited since the last call.
    fn take_traffic(&self) -> Traffic;

    /// Whether there is nobody to exchange anything with, and nothing to do it with.
    fn is_alone(&self) -> bool {
        false
    }

    /// Whether this rank keeps the run's folder and speaks for all.
    fn is_first(&self) -> bool {
        self.rank() == 0
    }

    /// Whether any rank says so.
    ///
    /// # Errors
    /// When a rank is lost.
    fn any(&self, here: bool) -> Result<bool, Error> {
        Ok(self.share_numbers(&[u64::from(here)])?.iter().any(|there| there[0] == 1))
    }
}

/// Does something together with the other processes of a launch, or alone. An error ends all of them, with a line that names the rank; so does a
/// panic, as which libtorch reports what it cannot do, a GPU whose memory is full for one.
///
/// # Errors
/// Those of meeting the others, else those of `work`.
pub fn together<T>(
    launch: Option<&Launch>,
    abandon: fn(&str),
    work: impl FnOnce(&Rc<dyn Ranks>) -> Result<T, Error>,
) -> Result<T, Error> {
    let Some(launch) = launch else { return work(&(Rc::new(Alone) as Rc<dyn Ranks>)) };
    let group = Group::join(launch, abandon)?;
    let ranks = Rc::new(group.clone()) as Rc<dyn Ranks>;
    // Whatever a panic has left half done ends with this rank.
    match catch_unwind(AssertUnwindSafe(|| work(&ranks))) {
        Ok(result) => {
            if let Err(error) = &result {
                group.fail(error);
            }
            result
        }
        Err(panic) => {
            group.fail(&Error::Mismatch(panic_line(&*panic).to_owned()));
            resume_unwind(panic)
        }
    }
}

/// What every rank says, in the order of ranks.
///
/// # Errors
/// When a rank is lost.
pub(crate) fn share<T: Serialize + DeserializeOwned>(ranks: &dyn Ranks, own: &T) -> Result<Vec<T>, Error> {
    let wrong = |error: serde_json::Error| Error::Mismatch(error.to_string());
    let all = ranks.share(&serde_json::to_vec(own).map_err(wrong)?)?;
    all.iter().map(|bytes| serde_json::from_slice(bytes).map_err(wrong)).collect()
}

/// Rows of all ranks in the order of ranks, where ranks have different numbers of them, some perhaps none.
///
/// # Shapes
/// Batches `[B, ..]` of equal other sides; gives `[all, ..]`, fp32 on `device`.
///
/// # Errors
/// When a rank is lost.
pub(crate) fn gather_uneven(ranks: &dyn Ranks, batches: &[Tensor], device: Device) -> Result<Tensor, Error> {
    let own = (!batches.is_empty()).then(|| Tensor::cat(batches, 0).to_kind(Kind::Float));
    if let (1, Some(own)) = (ranks.world(), &own) {
        return Ok(own.shallow_clone());
    }
    let shapes: Vec<Vec<i64>> = share(ranks, &own.as_ref().map(Tensor::size).unwrap_or_default())?;
    let counts: Vec<i64> = shapes.iter().map(|shape| shape.first().copied().unwrap_or(0)).collect();
    let longest = counts.iter().copied().max().unwrap_or(0);
    let Some(shape) = shapes.iter().find(|shape| !shape.is_empty()) else {
        return Ok(Tensor::zeros([0], (Kind::Float, device)));
    };
    let sides: Vec<i64> = std::iter::once(longest).chain(shape[1..].iter().copied()).collect();
    let padded = Tensor::zeros(&sides, (Kind::Float, device));
    if let Some(own) = own {
        no_grad(|| padded.narrow(0, 0, own.size()[0]).copy_(&own));
    }
    let all = ranks.gather(&padded)?;
    let parts: Vec<Tensor> =
        counts.iter().enumerate().map(|(rank, &count)| all.narrow(0, rank as i64 * longest, count)).collect();
    Ok(Tensor::cat(&parts, 0))
}

/// Adds up gradients over the ranks.
pub trait Gradients {
    /// What the sum over the ranks is divided by: losses are to be multiplied by it.
    fn divisor(&self) -> Option<f64>;

    /// A backward pass. Behind the `last` one of a step each parameter's gradient is the sum over all ranks of what they accumulated.
    ///
    /// # Errors
    /// When a rank is lost.
    fn backward(&self, loss: &Tensor, last: bool) -> Result<(), Error>;
}

/// Communication of one rank.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Traffic {
    /// Bytes that rows of ITC and of small numbers took from other ranks.
    pub gathered: u64,
    /// Bytes of the rows that were asked for.
    pub fetched: u64,
    /// Bytes of the gradients of a step, once.
    pub gradients: u64,
    /// Seconds inside collectives; of those of the gradients, which overlap with the backward pass, what comes behind it on the CPU.
    pub wait_s: f64,
}

impl AddAssign for Traffic {
    fn add_assign(&mut self, more: Traffic) {
        self.gathered += more.gathered;
        self.fetched += more.fetched;
        self.gradients += more.gradients;
        self.wait_s += more.wait_s;
    }
}

/// One process by itself.
#[derive(Debug, Clone, Copy)]
pub struct Alone;

impl Ranks for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn world(&self) -> usize {
        1
    }

    fn is_alone(&self) -> bool {
        true
    }

    fn enter(&self, _: u64, _: &'static str) {}

    fn exchange_on(&self, _: Device) -> Result<(), Error> {
        Ok(())
    }

    fn share(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
        Ok(vec![bytes.to_vec()])
    }

    fn share_numbers(&self, numbers: &[u64]) -> Result<Vec<Vec<u64>>, Error> {
        Ok(vec![numbers.to_vec()])
    }

    fn gather(&self, rows: &Tensor) -> Result<Tensor, Error> {
        Ok(rows.detach())
    }

    fn fetch(&self, rows: &Tensor, index: &Tensor) -> Result<Tensor, Error> {
        Ok(rows.detach().index_select(0, index))
    }

    fn add_up(&self, _: &Tensor) -> Result<(), Error> {
        Ok(())
    }

    fn add_up_gradients(&self, _: &Tensor) -> Result<(), Error> {
        Ok(())
    }

    fn gradients(&self, params: &ParamStore, format: GradientExchange) -> Result<Box<dyn Gradients>, Error> {
        Ok(match format {
            GradientExchange::Exact => Box::new(ExactSum::new(params, Alone)),
            GradientExchange::Fp32 | GradientExchange::Bf16 => Box::new(Alone),
        })
    }

    fn take_traffic(&self) -> Traffic {
        Traffic::default()
    }
}

impl Gradients for Alone {
    fn divisor(&self) -> Option<f64> {
        None
    }

    fn backward(&self, loss: &Tensor, _: bool) -> Result<(), Error> {
        loss.backward();
        Ok(())
    }
}
