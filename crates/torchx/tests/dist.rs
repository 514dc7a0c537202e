//! Groups and their collectives against formulas. Ranks are threads but in the last test.

mod ranks;

use std::env;
use std::process::Command;
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use blip2_torchx::Error;
use blip2_torchx::dist::{Group, NCCL_LIBRARY, Reduce, Store};
use ranks::{HOST, LONG, ranks, serve};
use tch::{Device, Kind, Tensor};

const SHORT: Duration = Duration::from_secs(1);
const KINDS: [Kind; 9] = [
    Kind::Float,
    Kind::Double,
    Kind::BFloat16,
    Kind::Half,
    Kind::Int64,
    Kind::Int,
    Kind::Int16,
    Kind::Uint8,
    Kind::Bool,
];

/// `rows` rows of 3 elements that say whose they are: small whole numbers, so that every dtype holds them.
fn rows_of(rank: usize, rows: i64, kind: Kind) -> Tensor {
    let numbers = Tensor::arange(rows * 3, (Kind::Int64, Device::Cpu)) + 7 * rank as i64;
    (numbers.remainder(if kind == Kind::Bool { 2 } else { 50 })).to_kind(kind).view([rows, 3])
}

fn assert_same(got: &Tensor, expected: &Tensor, what: &str) {
    assert_eq!(got.kind(), expected.kind(), "{what}");
    assert_eq!(got.size(), expected.size(), "{what}");
    assert!(got.equal(expected), "{what}: {got} {expected}");
}

#[test]
fn all_reduce_is_the_reduction_over_ranks() {
    for world in 1..=4 {
        ranks(world, LONG, |group| {
            for kind in KINDS.into_iter().filter(|&kind| kind != Kind::Int16 && kind != Kind::Bool) {
                let all = || Tensor::stack(&(0..world).map(|r| rows_of(r, 4, kind)).collect::<Vec<_>>(), 0);
                for (op, expected) in [
                    (Reduce::Sum, all().sum_dim_intlist(0, false, kind)),
                    (Reduce::Max, all().amax(0, false)),
                    (Reduce::Min, all().amin(0, false)),
                ] {
                    let tensor = rows_of(group.rank(), 4, kind);
                    group.all_reduce(&tensor, op).unwrap();
                    assert_same(&tensor, &expected, &format!("{op:?} {kind:?} {world}"));
                    let strided = rows_of(group.rank(), 4, kind).t_copy().tr();
                    group.all_reduce(&strided, op).unwrap();
                    assert_same(&strided, &expected, &format!("strided {op:?} {kind:?} {world}"));
                }
                group.all_reduce(&rows_of(0, 0, kind), Reduce::Sum).unwrap();
            }
            let any = Tensor::from_slice(&[false, group.rank() == 0]);
            group.all_reduce(&any, Reduce::Sum).unwrap();
            assert_same(&any, &Tensor::from_slice(&[false, true]), "bool");
            let scalar = Tensor::from(1.5f32).set_requires_grad(true);
            group.all_reduce(&scalar, Reduce::Sum).unwrap();
            assert_eq!(scalar.double_value(&[]), 1.5 * world as f64);
            let error = group.all_reduce(&rows_of(0, 1, Kind::Int16), Reduce::Sum).unwrap_err();
            assert!(matches!(error, Error::Collective { op: "all_reduce", .. }), "{error}");
        });
    }
}

#[test]
fn broadcast_gives_the_tensor_of_its_root() {
    for world in 1..=4 {
        ranks(world, LONG, |group| {
            for kind in KINDS {
                for root in 0..world {
                    let tensor = rows_of(group.rank(), 5, kind);
                    let columns = tensor.narrow(1, 1, 2);
                    group.broadcast(&columns, root).unwrap();
                    let expected = rows_of(root, 5, kind).narrow(1, 1, 2).contiguous();
                    assert_same(&columns.contiguous(), &expected, &format!("{kind:?} {root} {world}"));
                    let own = rows_of(group.rank(), 5, kind);
                    assert_same(&tensor.select(1, 0), &own.select(1, 0), "what is beside a view stays");
                }
                group.broadcast(&rows_of(0, 0, kind), world - 1).unwrap();
            }
            let leaf = Tensor::full([], group.rank() as f64, (Kind::Float, Device::Cpu)).set_requires_grad(true);
            group.broadcast(&leaf, world - 1).unwrap();
            assert_eq!(leaf.double_value(&[]), (world - 1) as f64);
            assert!(leaf.requires_grad() && leaf.is_leaf());
            assert!(matches!(group.broadcast(&leaf, world), Err(Error::Collective { .. })));
        });
    }
}

#[test]
fn all_gather_concatenates_the_ranks() {
    for world in 1..=4 {
        ranks(world, LONG, |group| {
            for kind in KINDS {
                let all = Tensor::cat(&(0..world).map(|r| rows_of(r, 2, kind)).collect::<Vec<_>>(), 0);
                assert_same(&group.all_gather(&rows_of(group.rank(), 2, kind)).unwrap(), &all, "gathered");
                let strided = rows_of(group.rank(), 2, kind).t_copy().tr();
                assert_same(&group.all_gather(&strided).unwrap(), &all, "strided");
                assert_eq!(group.all_gather(&rows_of(0, 0, kind)).unwrap().size(), [0, 3]);
                let narrow = Tensor::zeros([2, 0], (kind, Device::Cpu));
                assert_eq!(group.all_gather(&narrow).unwrap().size(), [2 * world as i64, 0]);
            }
            let tracked = Tensor::ones([1], (Kind::Float, Device::Cpu)).set_requires_grad(true);
            assert!(!group.all_gather(&tracked).unwrap().requires_grad());
            assert!(matches!(group.all_gather(&Tensor::from(1)), Err(Error::Collective { .. })));
        });
    }
}

#[test]
fn all_to_all_brings_every_row_to_its_rank() {
    // Rows from `s` to `r`; some pairs, senders and receivers have none.
    let count = |from: usize, to: usize| ((from * 2 + to * 3) % 4 * usize::from(from != 1)) as i64;
    for world in 1..=4 {
        ranks(world, LONG, |group| {
            let me = group.rank();
            for kind in KINDS {
                let begin = |from: usize, to: usize| (0..to).map(|r| count(from, r)).sum::<i64>();
                let send: Vec<i64> = (0..world).map(|to| count(me, to)).collect();
                let receive: Vec<i64> = (0..world).map(|from| count(from, me)).collect();
                let rows = rows_of(me, send.iter().sum(), kind);
                let expected: Vec<Tensor> = (0..world)
                    .map(|from| rows_of(from, begin(from, world), kind).narrow(0, begin(from, me), count(from, me)))
                    .collect();
                let got = group.all_to_all(&rows, &send, &receive).unwrap();
                assert_same(&got, &Tensor::cat(&expected, 0), &format!("{kind:?} {me} of {world}"));
                let nothing = vec![0; world];
                assert_eq!(group.all_to_all(&rows_of(0, 0, kind), &nothing, &nothing).unwrap().size(), [0, 3]);
            }
            let ids = Tensor::from_slice(&vec![me as i64; world]);
            let each = vec![1; world];
            let expected = Tensor::arange(world as i64, (Kind::Int64, Device::Cpu));
            assert_same(&group.all_to_all(&ids, &each, &each).unwrap(), &expected, "one dimension");
            for (send, receive) in
                [(vec![1; world + 1], each.clone()), (vec![-1; world], each.clone()), (vec![2; world], each)]
            {
                let error = group.all_to_all(&ids, &send, &receive).unwrap_err();
                assert!(matches!(error, Error::Collective { op: "all_to_all", .. }), "{error}");
            }
        });
    }
}

#[test]
fn groups_of_one_store_do_not_mix() {
    let server = serve();
    thread::scope(|scope| {
        for rank in 0..2 {
            let port = server.port();
            scope.spawn(move || {
                let store = Store::connect(HOST, port, LONG).unwrap();
                let [a, b] = ["a", "b"].map(|name| Group::join(&store.with_prefix(name), rank, 2, LONG).unwrap());
                let one = Tensor::from(1i64);
                // Each rank in another order.
                let order = if rank == 0 { [&a, &b] } else { [&b, &a] };
                thread::scope(|both| {
                    for group in order {
                        let tensor = one.copy();
                        both.spawn(move || {
                            group.all_reduce(&tensor, Reduce::Sum).unwrap();
                            assert_eq!(tensor.int64_value(&[]), 2);
                        });
                    }
                });
            });
        }
    });
}

#[test]
fn groups_may_begin_at_the_same_time() {
    for _ in 0..20 {
        let together = Barrier::new(8);
        let server = serve();
        thread::scope(|scope| {
            for name in 0..8 {
                let (server, together) = (&server, &together);
                scope.spawn(move || {
                    let store = server.with_prefix(&name.to_string());
                    let group = Group::join(&store, 0, 1, LONG).unwrap();
                    together.wait();
                    group.all_reduce(&Tensor::from(1), Reduce::Sum).unwrap();
                });
            }
        });
    }
}

#[test]
fn a_barrier_is_passed_when_all_have_come() {
    for world in 1..=4 {
        let together = Arc::new(Barrier::new(world));
        ranks(world, LONG, |group| {
            together.wait();
            for round in 0..3 {
                let begun = Instant::now();
                if group.rank() == round % world {
                    thread::sleep(Duration::from_millis(100));
                }
                group.barrier(LONG).unwrap();
                assert!(begun.elapsed() >= Duration::from_millis(90) || round > 0);
            }
        });
    }
}

#[test]
fn a_barrier_names_the_ranks_that_did_not_come() {
    let (all_here, go_on) = (Barrier::new(4), Barrier::new(4));
    ranks(4, LONG, |group| {
        group.barrier(LONG).unwrap();
        all_here.wait();
        if group.rank() == 0 || group.rank() == 2 {
            let error = group.barrier(SHORT).unwrap_err();
            assert!(matches!(&error, Error::Barrier { missing, .. } if *missing == [1, 3]), "{error}");
            assert!(error.to_string().contains("ranks 1, 3 did not come within 1 s"), "{error}");
        }
        go_on.wait();
    });
}

#[test]
fn a_rank_that_goes_away_fails_the_others() {
    let begun = Instant::now();
    ranks(3, Duration::from_secs(3), |group| {
        let tensor = Tensor::ones([1000], (Kind::Float, Device::Cpu));
        group.all_reduce(&tensor, Reduce::Sum).unwrap();
        if group.rank() != 1 {
            let error = group.all_reduce(&tensor, Reduce::Sum).unwrap_err();
            let text = error.to_string();
            assert!(text.starts_with(&format!("rank {} of 3: all_reduce: ", group.rank())), "{text}");
            assert!(group.all_gather(&tensor).is_err(), "the group is of no use any more");
        }
    });
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
}

#[test]
fn a_rank_that_is_silent_fails_the_others_after_the_timeout() {
    let end = Barrier::new(2);
    ranks(2, SHORT, |group| {
        if group.rank() == 0 {
            let begun = Instant::now();
            let error = group.all_gather(&Tensor::from_slice(&[1])).unwrap_err();
            assert!((Duration::from_millis(900)..LONG).contains(&begun.elapsed()), "{:?}", begun.elapsed());
            assert!(matches!(error, Error::Collective { op: "all_gather", rank: 0, world: 2, .. }), "{error}");
        }
        end.wait();
    });
}

#[test]
fn abort_ends_a_wait_of_another_thread() {
    let end = Barrier::new(2);
    ranks(2, LONG, |group| {
        if group.rank() == 0 {
            let begun = Instant::now();
            thread::scope(|scope| {
                let waiting = scope.spawn(|| group.all_gather(&Tensor::from_slice(&[1])).map(|_| ()));
                thread::sleep(Duration::from_millis(200));
                group.abort();
                let error = waiting.join().unwrap().unwrap_err();
                assert!(error.to_string().contains("aborted"), "{error}");
            });
            drop(group);
            assert!(begun.elapsed() < LONG / 2, "{:?}", begun.elapsed());
        }
        end.wait();
    });
}

#[test]
fn a_group_that_is_not_complete_is_an_error_after_the_timeout() {
    let server = serve();
    let begun = Instant::now();
    let error = Group::join(&server, 0, 2, SHORT).err().unwrap();
    assert!(begun.elapsed() < LONG, "{:?}", begun.elapsed());
    assert!(matches!(error, Error::Collective { op: "join", rank: 0, world: 2, .. }), "{error}");
    assert!(Group::join(&server, 2, 2, SHORT).is_err());
    server.set("still", b"served").unwrap();
}

#[test]
fn nccl_that_is_not_there_is_named_and_the_group_stays_of_use() {
    let server = serve();
    let group = Group::join(&server.with_prefix("alone"), 0, 1, SHORT).unwrap();
    let error = group.add_nccl(Device::Cuda(0), SHORT).unwrap_err();
    assert!(matches!(error, Error::NoNccl { .. }), "{error}");
    assert!(error.to_string().contains(NCCL_LIBRARY), "{error}");
    // What no library would mend does not ask for one.
    let error = group.add_nccl(Device::Cpu, SHORT).unwrap_err();
    assert!(matches!(error, Error::Collective { op: "connecting GPUs", .. }), "{error}");
    group.barrier(SHORT).unwrap();
}

#[test]
fn processes_compute_together() {
    let Ok(rank) = env::var("TORCHX_TEST_RANK") else {
        let server = serve();
        let me = env::current_exe().unwrap();
        let children: Vec<_> = (0..3)
            .map(|rank| {
                Command::new(&me)
                    .args(["--exact", "processes_compute_together", "--nocapture"])
                    .env("TORCHX_TEST_RANK", rank.to_string())
                    .env("TORCHX_TEST_PORT", server.port().to_string())
                    .spawn()
                    .unwrap()
            })
            .collect();
        for mut child in children {
            assert!(child.wait().unwrap().success());
        }
        assert_eq!(server.get("sum", SHORT).unwrap(), b"6");
        return;
    };
    let rank: usize = rank.parse().unwrap();
    let port = env::var("TORCHX_TEST_PORT").unwrap().parse().unwrap();
    let store = Store::connect(HOST, port, LONG).unwrap();
    let group = Group::join(&store.with_prefix("processes"), rank, 3, LONG).unwrap();
    let tensor = Tensor::from(rank as i64 + 1);
    group.all_reduce(&tensor, Reduce::Sum).unwrap();
    group.barrier(LONG).unwrap();
    if rank == 2 {
        store.set("sum", tensor.int64_value(&[]).to_string().as_bytes()).unwrap();
    }
}
