//! The reducer's averages against the gradients of one process that sees every rank's samples.

mod ranks;

use std::sync::Barrier;
use std::time::{Duration, Instant};

use blip2_torchx::Error;
use blip2_torchx::dist::{Group, Reduce, Reducer, ReducerOptions};
use ranks::{LONG, ranks};
use tch::{Device, Kind, Tensor};

const CPU: (Kind, Device) = (Kind::Float, Device::Cpu);
/// So small that the model has several buckets.
const SMALL: ReducerOptions =
    ReducerOptions { first_bucket_bytes: 32, bucket_bytes: 64, find_unused: false, compress_bf16: false };

/// Two layers, and a head that only some losses use.
struct Model {
    params: Vec<Tensor>,
}

impl Model {
    fn new() -> Self {
        let weights = |rows: i64, columns: i64, phase: f64| {
            let numbers = Tensor::arange(rows * columns, CPU).view([rows, columns]);
            ((numbers * 0.7 + phase).sin() * 0.5).set_requires_grad(true)
        };
        Self { params: vec![weights(8, 5, 0.0), weights(1, 8, 1.0), weights(3, 8, 2.0), weights(4, 8, 3.0)] }
    }

    fn hidden(&self, sample: i64) -> Tensor {
        let x = ((Tensor::arange(5, CPU) + 1.0) * (sample as f64 + 1.0) * 0.3).cos().view([1, 5]);
        x.matmul(&self.params[0].tr()) + &self.params[1]
    }

    /// The loss of one sample, through one head of the two.
    fn loss(&self, sample: i64, head: usize) -> Tensor {
        self.hidden(sample).tanh().matmul(&self.params[2 + head].tr()).square().mean(Kind::Float)
    }

    fn grads(&self) -> Vec<Option<Tensor>> {
        self.params.iter().map(|p| Some(p.grad()).filter(Tensor::defined).map(|g| g.copy())).collect()
    }

    fn reducer(&self, group: &Group, params: usize, options: ReducerOptions) -> Reducer {
        Reducer::new(group, &self.params[..params], options).unwrap()
    }

    fn zero_grad(&mut self) {
        self.params.iter_mut().for_each(Tensor::zero_grad);
    }
}

/// The gradients of the mean over ranks of what each lists as (sample, head), in one process.
fn expected(world: usize, of_rank: impl Fn(i64) -> Vec<(i64, usize)>) -> Vec<Option<Tensor>> {
    let model = Model::new();
    for rank in 0..world as i64 {
        for (sample, head) in of_rank(rank) {
            (model.loss(sample, head) / world as f64).backward();
        }
    }
    model.grads()
}

fn assert_close(got: &[Option<Tensor>], expected: &[Option<Tensor>], tolerance: f64) {
    assert_eq!(got.len(), expected.len());
    for (place, pair) in got.iter().zip(expected).enumerate() {
        match pair {
            (Some(got), Some(expected)) => {
                let difference = (got - expected).abs().max().double_value(&[]);
                assert!(difference <= tolerance, "parameter {place}: {difference}");
            }
            (None, None) => {}
            (got, expected) => panic!("parameter {place}: {got:?} {expected:?}"),
        }
    }
}

#[test]
fn gradients_are_those_of_the_mean_loss() {
    for world in 1..=4 {
        ranks(world, LONG, |group| {
            let mut model = Model::new();
            let reducer = model.reducer(&group, 3, SMALL);
            // The buckets are made anew behind the first step.
            for step in 0..4 {
                model.zero_grad();
                let sample = |rank: i64| rank + 10 * step;
                let loss = model.loss(sample(group.rank() as i64), 0);
                reducer.prepare(&[&loss]).unwrap();
                loss.backward();
                reducer.finish().unwrap();
                assert_close(&model.grads(), &expected(world, |rank| vec![(sample(rank), 0)]), 1e-6);
            }
        });
    }
}

#[test]
fn earlier_backwards_accumulate_locally_and_are_averaged_with_the_last() {
    for world in 1..=4 {
        ranks(world, LONG, |group| {
            let mut model = Model::new();
            let reducer = model.reducer(&group, 3, SMALL);
            let rank = group.rank() as i64;
            for step in 0..3 {
                model.zero_grad();
                let samples = |rank: i64| vec![(rank + 10 * step, 0), (rank + 10 * step + 5, 0), (rank + 7, 0)];
                let [(first, _), (second, _), (last, _)] = samples(rank)[..] else { unreachable!() };
                model.loss(first, 0).backward();
                model.loss(second, 0).backward();
                let local = expected(1, |_| vec![(first, 0), (second, 0)]);
                assert_close(&model.grads(), &local, 1e-6);
                let loss = model.loss(last, 0);
                reducer.prepare(&[&loss]).unwrap();
                loss.backward();
                reducer.finish().unwrap();
                assert_close(&model.grads(), &expected(world, samples), 1e-6);
            }
        });
    }
}

#[test]
fn parameters_may_go_unused_where_that_is_asked_for() {
    for world in 1..=3 {
        ranks(world, LONG, |group| {
            let model = Model::new();
            let reducer = model.reducer(&group, 4, ReducerOptions { find_unused: true, ..SMALL });
            // Step 0: nobody uses the second head. Step 1: rank 0 alone does, and then not the first.
            let head = |rank: i64, step| usize::from(rank == 0 && step == 1);
            let mut seen = Vec::new();
            for step in 0..2 {
                let rank = group.rank() as i64;
                let loss = model.loss(rank, head(rank, step));
                reducer.prepare(&[&loss]).unwrap();
                loss.backward();
                reducer.finish().unwrap();
                seen.push(model.grads());
            }
            assert_close(&seen[0], &expected(world, |rank| vec![(rank, 0)]), 1e-6);
            assert!(seen[0][3].is_none());
            // What step 0 left is the same mean on all ranks, and stays in the sum.
            let both = expected(world, |rank| vec![(rank, 0), (rank, head(rank, 1))]);
            assert_close(&seen[1], &both, 1e-6);
        });
    }
}

#[test]
fn a_parameter_without_gradient_is_named_where_it_is_not_asked_for() {
    ranks(2, LONG, |group| {
        let model = Model::new();
        let reducer = model.reducer(&group, 4, SMALL);
        let loss = model.loss(1, 0);
        reducer.prepare(&[&loss]).unwrap();
        loss.backward();
        let error = reducer.finish().unwrap_err();
        assert!(matches!(&error, Error::NotReduced { params } if *params == [3]), "{error}");
        assert!(matches!(reducer.prepare(&[&loss]), Err(Error::NotReduced { .. })));
    });
}

#[test]
fn bf16_on_the_wire_is_close() {
    for world in 1..=4 {
        ranks(world, LONG, |group| {
            let mut model = Model::new();
            let reducer = model.reducer(&group, 3, ReducerOptions { compress_bf16: true, ..SMALL });
            for step in 0..3 {
                model.zero_grad();
                let loss = model.loss(group.rank() as i64 + step, 0);
                reducer.prepare(&[&loss]).unwrap();
                loss.backward();
                reducer.finish().unwrap();
                let exact = expected(world, |rank| vec![(rank + step, 0)]);
                let largest = exact.iter().flatten().map(|g| g.abs().max().double_value(&[])).fold(0.0, f64::max);
                assert_close(&model.grads(), &exact, largest * 2f64.powi(-7));
                let got = model.grads();
                assert!(got.iter().flatten().all(|g| g.kind() == Kind::Float));
                // All ranks have the same bits.
                for grad in got.iter().flatten() {
                    let all = group.all_gather(&grad.unsqueeze(0)).unwrap();
                    assert!((0..world as i64).all(|rank| all.get(rank).equal(grad)));
                }
            }
        });
    }
}

#[test]
fn other_collectives_may_stand_between_forward_and_backward() {
    ranks(3, LONG, |group| {
        let mut model = Model::new();
        let reducer = model.reducer(&group, 3, SMALL);
        for _ in 0..3 {
            model.zero_grad();
            let loss = model.loss(group.rank() as i64, 0);
            let mean = loss.detach().copy();
            group.all_reduce(&mean, Reduce::Sum).unwrap();
            reducer.prepare(&[&loss]).unwrap();
            loss.backward();
            group.all_reduce(&mean, Reduce::Max).unwrap();
            reducer.finish().unwrap();
            assert_close(&model.grads(), &expected(3, |rank| vec![(rank, 0)]), 1e-6);
        }
    });
}

#[test]
fn ranks_with_other_parameters_are_refused() {
    ranks(2, LONG, |group| {
        let rows = if group.rank() == 0 { 3 } else { 4 };
        let param = Tensor::ones([rows, 2], CPU).set_requires_grad(true);
        let Err(Error::Collective { op: "reducer", .. }) = Reducer::new(&group, &[param], SMALL) else {
            panic!("shapes differ");
        };
        let constant = Tensor::ones([2], CPU);
        assert!(Reducer::new(&group, &[constant], SMALL).is_err());
    });
}

#[test]
fn a_peer_that_goes_away_fails_the_backward_pass() {
    ranks(2, Duration::from_secs(3), |group| {
        let model = Model::new();
        let reducer = model.reducer(&group, 3, SMALL);
        if group.rank() == 1 {
            return;
        }
        let loss = model.loss(0, 0);
        let begun = Instant::now();
        let failed = reducer.prepare(&[&loss]).is_err() || loss.f_backward().is_err();
        assert!(failed && begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    });
}

#[test]
fn a_graph_outlives_its_reducer() {
    ranks(2, LONG, |group| {
        let mut model = Model::new();
        let reducer = model.reducer(&group, 3, SMALL);
        let (first, second) = (model.loss(1, 0), model.loss(2, 0));
        reducer.prepare(&[&first]).unwrap();
        drop(reducer);
        // Its hooks are still there, and what was prepared is carried out.
        first.backward();
        second.backward();
        drop((first, second));
        model.zero_grad();
        let again = model.reducer(&group, 3, SMALL);
        let loss = model.loss(group.rank() as i64, 0);
        again.prepare(&[&loss]).unwrap();
        loss.backward();
        again.finish().unwrap();
        assert_close(&model.grads(), &expected(2, |rank| vec![(rank, 0)]), 1e-6);
    });
}

#[test]
fn a_reducer_goes_with_its_last_owner() {
    let dropped = Barrier::new(2);
    ranks(2, LONG, |group| {
        let model = Model::new();
        let reducer = model.reducer(&group, 3, SMALL);
        let loss = model.loss(1, 0);
        reducer.prepare(&[&loss]).unwrap();
        loss.backward();
        reducer.finish().unwrap();
        drop(loss);
        if group.rank() == 0 {
            drop(reducer);
            drop(group);
            dropped.wait();
        } else {
            dropped.wait();
            // Rank 0's connections are closed: libtorch's reducer did not keep its group.
            let begun = Instant::now();
            assert!(group.all_gather(&Tensor::from_slice(&[1])).is_err());
            assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
        }
    });
}
