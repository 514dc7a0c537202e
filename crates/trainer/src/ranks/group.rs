//! Ranks in processes of their own, over libtorch's c10d.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use blip2_torchx::dist::{self, Reduce, Reducer, ReducerOptions};
use blip2_torchx::params::ParamStore;
use blip2_torchx::pinned::to_device;
use tch::{Device, Tensor};

use super::exact_sum::ExactSum;
use super::exchange::Exchange;
use super::launch::Launch;
use super::meeting::{Met, meet};
use super::watch::{Limits, Pulse, Waiting, Watch};
use super::{Gradients, Ranks, Traffic};
use crate::config::GradientExchange;
use crate::error::Error;

/// Collectives have no limit that matters: whoever is lost is found by the watch.
const COLLECTIVE_TIMEOUT: Duration = Duration::from_secs(24 * 3600);

/// So long a store outlives what its process had to do: the others read from it why a rank failed.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// This process in its group.
#[derive(Clone)]
pub struct Group(Rc<Inner>);

struct Inner {
    group: Arc<dist::Group>,
    watch: Watch,
    /// The store through which the ranks meet lives in this process.
    serves: bool,
    traffic: Cell<Traffic>,
}

impl Group {
    /// Meets the other ranks. `abandon` ends the process with a message, where it hangs on a rank that is lost.
    ///
    /// # Errors
    /// A store that nobody serves, a port in use, ranks that do not come: each says where and for how long was waited.
    pub fn join(launch: &Launch, abandon: fn(&str)) -> Result<Group, Error> {
        let Met { store, serves } = meet(launch)?;
        let watch = Watch::start(launch, store.clone(), Limits::OF_RUNS, abandon)?;
        let place = store.with_prefix("host");
        let group = dist::Group::join(&place, launch.rank, launch.world, COLLECTIVE_TIMEOUT)
            .inspect_err(|error| watch.accuse_oneself(&error.to_string()))?;
        let group = Arc::new(group);
        let aborted = Arc::clone(&group);
        watch.aborts(Arc::new(move || aborted.abort()));
        Ok(Group(Rc::new(Inner { group, watch, serves, traffic: Cell::default() })))
    }

    /// Tells the other ranks why this one ends.
    pub(super) fn fail(&self, error: &Error) {
        if !matches!(error, Error::RankLost(_)) {
            self.0.watch.accuse_oneself(&error.to_string());
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if self.serves {
            self.watch.outlast_others(LAST_WORDS);
        }
    }
}

impl Inner {
    /// A collective, watched and timed.
    fn collective<T>(
        &self,
        name: &'static str,
        call: impl FnOnce(&dist::Group) -> Result<T, blip2_torchx::Error>,
    ) -> Result<T, Error> {
        let begun = Instant::now();
        let waiting = self.watch.wait_in(name);
        let result = call(&self.group);
        drop(waiting);
        self.count(|traffic| traffic.wait_s += begun.elapsed().as_secs_f64());
        result.map_err(|error| self.watch.explain(error.into()))
    }

    fn count(&self, change: impl FnOnce(&mut Traffic)) {
        let mut traffic = self.traffic.get();
        change(&mut traffic);
        self.traffic.set(traffic);
    }

    /// Rows of all ranks.
    fn all_gather(&self, name: &'static str, rows: &Tensor) -> Result<Tensor, Error> {
        let rows = rows.detach();
        let all = self.collective(name, |group| group.all_gather(&rows))?;
        let others = self.group.world() as u64 - 1;
        self.count(|traffic| traffic.gathered += others * bytes(&rows));
        Ok(all)
    }
}

fn bytes(tensor: &Tensor) -> u64 {
    (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64
}

fn numbers(tensor: &Tensor) -> Result<Vec<i64>, Error> {
    Vec::<i64>::try_from(tensor.to_device(Device::Cpu).flatten(0, -1)).map_err(|e| Error::Mismatch(e.to_string()))
}

impl Ranks for Group {
    fn rank(&self) -> usize {
        self.0.group.rank()
    }

    fn world(&self) -> usize {
        self.0.group.world()
    }

    fn enter(&self, step: u64, phase: &'static str) {
        self.0.watch.enter(step, phase);
    }

    fn waiting(&self, what: &'static str) -> Option<Waiting<'_>> {
        Some(self.0.watch.wait_in(what))
    }

    fn pulse(&self) -> Pulse {
        self.0.watch.pulse()
    }

    fn exchange_on(&self, device: Device) -> Result<(), Error> {
        if device == Device::Cpu {
            return Ok(());
        }
        self.0.collective("connecting GPUs", |group| group.add_nccl(device, COLLECTIVE_TIMEOUT))?;
        self.0.watch.queues();
        Ok(())
    }

    fn share(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
        let lengths: Vec<u64> = self.share_numbers(&[bytes.len() as u64])?.iter().map(|one| one[0]).collect();
        let longest = lengths.iter().copied().max().unwrap_or(0) as usize;
        let mut padded = bytes.to_vec();
        padded.resize(longest.max(1), 0);
        let all = self.0.all_gather("sharing notes", &Tensor::from_slice(&padded))?;
        let mut flat = vec![0u8; all.numel()];
        all.copy_data(&mut flat, all.numel());
        let rows = flat.chunks_exact(padded.len()).zip(lengths);
        Ok(rows.map(|(row, length)| row[..length as usize].to_vec()).collect())
    }

    fn share_numbers(&self, own: &[u64]) -> Result<Vec<Vec<u64>>, Error> {
        let own: Vec<i64> = own.iter().map(|&number| number as i64).collect();
        let all = numbers(&self.0.all_gather("sharing numbers", &Tensor::from_slice(&own))?)?;
        Ok(all.chunks_exact(own.len()).map(|rank| rank.iter().map(|&number| number as u64).collect()).collect())
    }

    fn gather(&self, rows: &Tensor) -> Result<Tensor, Error> {
        self.0.all_gather("gathering rows", rows)
    }

    fn fetch(&self, rows: &Tensor, index: &Tensor) -> Result<Tensor, Error> {
        // The one wait for the device inside a step: the sizes of what is sent must be known to the host.
        let waiting = self.0.watch.wait_in("reading which rows were drawn");
        let own: Vec<u64> = numbers(index)?.into_iter().map(|index| index as u64).collect();
        drop(waiting);
        let plan = Exchange::plan(&self.share_numbers(&own)?, self.rank(), rows.size()[0] as u64);
        let device = rows.device();
        let indices = |rows: &[i64]| to_device(rows, &[rows.len() as i64], device);
        let send = rows.detach().index_select(0, &indices(&plan.send)?);
        let came = self
            .0
            .collective("fetching rows", |group| group.all_to_all(&send, &plan.send_counts, &plan.receive_counts))?;
        let from_others = came.size()[0] - plan.receive_counts[self.rank()];
        let row = bytes(&came) / came.size()[0].max(1) as u64;
        self.0.count(|traffic| traffic.fetched += from_others as u64 * row);
        Ok(came.index_select(0, &indices(&plan.places)?))
    }

    fn add_up(&self, tensor: &Tensor) -> Result<(), Error> {
        self.0.collective("adding up", |group| group.all_reduce(tensor, Reduce::Sum))
    }

    fn add_up_gradients(&self, sum: &Tensor) -> Result<(), Error> {
        self.0.collective("adding up gradients", |group| group.all_reduce(sum, Reduce::Sum))?;
        self.0.count(|traffic| traffic.gradients += bytes(sum));
        Ok(())
    }

    fn gradients(&self, params: &ParamStore, format: GradientExchange) -> Result<Box<dyn Gradients>, Error> {
        if format == GradientExchange::Exact {
            return Ok(Box::new(ExactSum::new(params, self.clone())));
        }
        let params: Vec<Tensor> = params.entries().into_iter().map(|(_, tensor, _)| tensor).collect();
        let bytes = params.iter().map(bytes).sum();
        let compress_bf16 = format == GradientExchange::Bf16;
        let options = ReducerOptions { compress_bf16, ..Default::default() };
        let bytes = if compress_bf16 { bytes / 2 } else { bytes };
        let reducer = self.0.collective("comparing parameters", |group| Reducer::new(group, &params, options))?;
        Ok(Box::new(Reduced { reducer, bytes, inner: Rc::clone(&self.0) }))
    }

    fn take_traffic(&self) -> Traffic {
        self.0.traffic.take()
    }
}

/// c10d's Reducer: sends gradients while the backward pass goes on.
struct Reduced {
    reducer: Reducer,
    bytes: u64,
    inner: Rc<Inner>,
}

impl Gradients for Reduced {
    fn divisor(&self) -> Option<f64> {
        Some(self.inner.group.world() as f64)
    }

    fn backward(&self, loss: &Tensor, last: bool) -> Result<(), Error> {
        if !last {
            loss.backward();
            return Ok(());
        }
        let explain = |error| self.inner.watch.explain(error);
        let waiting = self.inner.watch.wait_in("adding up gradients");
        // At its second call a collective too: the ranks agree on buckets in the order in which the gradients came.
        self.reducer.prepare(&[loss]).map_err(|error| explain(error.into()))?;
        let begun = Instant::now();
        loss.f_backward().map_err(|error| explain(Error::Mismatch(error.to_string())))?;
        // The last bucket goes off with the last gradient: behind it this rank only waits. A GPU's host does not wait at all.
        let waited = self.inner.group.since_all_reduce().min(begun.elapsed());
        self.reducer.finish().map_err(|error| explain(error.into()))?;
        drop(waiting);
        self.inner.count(|traffic| {
            traffic.gradients += self.bytes;
            traffic.wait_s += if loss.device() == Device::Cpu { waited.as_secs_f64() } else { 0.0 };
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ranks::{Meeting, together};
    use blip2_torchx::params::Init;
    use std::net::TcpListener;
    use std::thread;
    use tch::Kind;

    fn launch(rank: usize, port: u16) -> Launch {
        let patience = Duration::from_secs(60);
        let meeting = Meeting { host: "127.0.0.1".into(), port, served: false, job: String::new(), patience };
        Launch { rank, world: 2, local_rank: rank, meeting, hang: patience }
    }

    /// What each of two ranks does beside the other.
    fn both<T: Send>(work: impl Fn(&dyn Ranks) -> Result<T, Error> + Sync) -> Vec<T> {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let rank = |rank: usize| {
            together(Some(&launch(rank, port)), |reason| panic!("{reason}"), |ranks| work(&**ranks)).unwrap()
        };
        thread::scope(|scope| {
            let threads: Vec<_> = (0..2)
                .map(|number| {
                    let rank = &rank;
                    scope.spawn(move || rank(number))
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    #[test]
    fn a_rank_that_panics_is_named_to_the_others_that_wait_for_it() {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let rank = move |rank: usize| {
            together(
                Some(&launch(rank, port)),
                |reason| panic!("{reason}"),
                |ranks| {
                    ranks.enter(7, "forward and backward");
                    ranks.any(false)?;
                    if rank == 1 {
                        panic!("CUDA out of memory\nframe #0");
                    }
                    ranks.any(false)
                },
            )
        };
        let begun = Instant::now();
        let [waits, panics] = [0, 1].map(|number| thread::spawn(move || rank(number)));
        let error = waits.join().unwrap().unwrap_err().to_string();
        assert_eq!(error, "rank 1 failed at step 7, forward and backward: CUDA out of memory");
        assert!(panics.join().is_err(), "the panic goes on");
        assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", begun.elapsed());
    }

    #[test]
    fn the_wait_for_late_gradients_is_counted_as_one() {
        let waits = both(|ranks| {
            let params = ParamStore::trainable(Device::Cpu);
            let weight = params.root().param("weight", &[2], Init::Ones);
            let gradients = ranks.gradients(&params, GradientExchange::Fp32)?;
            ranks.any(false)?;
            ranks.take_traffic();
            if ranks.rank() == 1 {
                thread::sleep(Duration::from_secs(2));
            }
            gradients.backward(&weight.sum(Kind::Float), true)?;
            Ok(ranks.take_traffic().wait_s)
        });
        assert!(waits[0] > 1.0 && waits[1] < waits[0], "{waits:?}");
    }
}
