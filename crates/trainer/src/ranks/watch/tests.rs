use super::ask::LOOK_AROUND;
use super::beat::lost;
use super::*;
use crate::ranks::Meeting;
use crate::ranks::STEPPING;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};

const SHORT: Limits = Limits { lost: Duration::from_secs(3), grace: Duration::from_secs(2) };

fn watch_for(rank: usize, store: &Store, hang: Duration, limits: Limits, abandon: fn(&str)) -> Watch {
    let patience = Duration::from_secs(10);
    let (host, port, job) = ("127.0.0.1".to_owned(), store.port(), String::new());
    let meeting = Meeting { host, port, served: false, job, patience };
    let launch = Launch { rank, world: 2, local_rank: rank, meeting, hang };
    Watch::start(&launch, store.clone(), limits, abandon).unwrap()
}

fn watch_with(rank: usize, store: &Store, limits: Limits, abandon: fn(&str)) -> Watch {
    watch_for(rank, store, Duration::from_secs(1), limits, abandon)
}

fn watch(rank: usize, store: &Store) -> Watch {
    watch_with(rank, store, Limits::OF_RUNS, |reason| panic!("abandoned: {reason}"))
}

fn store() -> Store {
    Store::serve("127.0.0.1", 0, Duration::from_secs(10)).unwrap()
}

fn explained(watch: &Watch) -> String {
    watch.explain(Error::Mismatch("the group was closed".into())).to_string()
}

#[test]
fn a_rank_that_others_wait_for_in_vain_is_named_with_its_place() {
    let store = store();
    let (waits, hangs) = (watch(0, &store), watch(1, &store));
    hangs.enter(41, "reading data");
    let waiting = waits.wait_in("adding up gradients");
    let error = explained(&waits);
    drop(waiting);
    for part in ["hangs: rank 1 (process ", "at step 41, reading data", "rank 0 has waited", "adding up gradients"] {
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn a_rank_that_goes_on_is_waited_for_however_long_that_takes() {
    let store = store();
    let hang = Duration::from_secs(2);
    let [waits, works] = [0, 1].map(|rank| watch_for(rank, &store, hang, Limits::OF_RUNS, |reason| panic!("{reason}")));
    let _waiting = waits.wait_in("sharing notes");
    let longer = |goes_on: &dyn Fn()| {
        let begun = Instant::now();
        while begun.elapsed() < hang + 2 * BEAT {
            goes_on();
            thread::sleep(Duration::from_millis(100));
        }
        assert_eq!(works.shared.state().verdict, None);
    };
    let pulse = works.pulse();
    longer(&|| works.enter(3, "image features"));
    longer(&|| pulse.beat());
    // Both in collectives, of which one goes on.
    longer(&|| {
        let _short = works.wait_in("gathering rows");
        thread::sleep(Duration::from_millis(200));
    });
    let _forever = works.wait_in("gathering rows");
    let error = explained(&waits);
    let expected = "every rank has waited for the others for 2 s: rank 0 at step 0, start: sharing notes; rank 1 at step 3, image features: ";
    assert!(error.starts_with(expected), "{error}");
}

#[test]
fn where_steps_are_queued_ranks_that_all_stand_are_told() {
    let store = store();
    let ranks = [watch(0, &store), watch(1, &store)];
    for rank in &ranks {
        rank.enter(9, STEPPING);
    }
    // On the CPU a step may take long: whoever waits for another is in a collective.
    let state = |rank: &Watch| rank.shared.state().verdict.clone();
    thread::sleep((LOOK_AROUND as u32 + 2) * BEAT);
    assert!(ranks.iter().all(|rank| state(rank).is_none()));
    ranks.iter().for_each(Watch::queues);
    let error = explained(&ranks[0]);
    assert_eq!(
        error,
        "no rank has gone on for 1 s: rank 0 at step 9, forward and backward; rank 1 at step 9, forward and backward"
    );
}

#[test]
fn a_rank_that_fails_tells_the_others_why_and_where() {
    let store = store();
    let (fails, waits) = (watch(0, &store), watch(1, &store));
    fails.enter(7, "checkpoint");
    fails.accuse_oneself("the disk is full");
    assert_eq!(explained(&waits), "rank 0 failed at step 7, checkpoint: the disk is full");
}

#[test]
fn without_a_verdict_the_error_stands() {
    let store = store();
    let (first, second) = (watch(0, &store), watch(1, &store));
    second.wait_until_heard();
    drop(second); // it is done, not lost
    assert_eq!(explained(&first), "the group was closed");
}

#[test]
fn who_never_beats_and_who_comes_in_anothers_place_are_lost() {
    let beat = |pid: u32, count: u64| Beat {
        count,
        host: "a".into(),
        pid,
        step: 3,
        phase: "reading data".into(),
        waits: None,
        still: 0,
        done: false,
    };
    let limit = Duration::from_millis(50);
    let long = Duration::from_millis(60);
    let mut last = (None, Instant::now());
    assert_eq!(lost(1, &mut last, None, limit), None);
    thread::sleep(long);
    assert!(lost(1, &mut last, None, limit).unwrap().contains("since the ranks met"));
    assert_eq!(lost(1, &mut last, Some(beat(7, 0)), limit), None);
    assert_eq!(lost(1, &mut last, Some(beat(7, 1)), limit), None);
    let other = lost(1, &mut last, Some(beat(8, 0)), limit).unwrap();
    assert_eq!(other, "rank 1 (process 7 on a) is lost: process 8 on a has come in its place");
    thread::sleep(long);
    let silent = lost(1, &mut last, Some(beat(7, 1)), limit).unwrap();
    assert!(silent.contains("last seen at step 3, reading data"), "{silent}");
}

#[test]
fn a_process_that_a_verdict_does_not_end_is_ended_whatever_the_abort_waits_for() {
    static ABANDONED: AtomicBool = AtomicBool::new(false);
    let store = store();
    let (fails, hangs) = (watch(0, &store), watch_with(1, &store, SHORT, |_| ABANDONED.store(true, Ordering::SeqCst)));
    // As NCCL's abort may, for as long as a collective may take.
    hangs.aborts(Arc::new(|| thread::sleep(Duration::from_secs(24 * 3600))));
    fails.accuse_oneself("it had to");
    let begun = Instant::now();
    while !ABANDONED.load(Ordering::SeqCst) {
        assert!(begun.elapsed() < Duration::from_secs(60), "the process hangs on");
        thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_store_that_is_silent_is_lost() {
    let store = store();
    let (port, silent) = proxy(store.port());
    let through = Store::connect("127.0.0.1", port, Duration::from_secs(60)).unwrap();
    let _serves = watch(0, &store);
    let watch = watch_with(1, &through, SHORT, |_| ());
    watch.wait_until_heard();
    silent.store(true, Ordering::SeqCst);
    let error = explained(&watch);
    assert!(error.contains("rank 0 is lost: its store has not answered for 3 s"), "{error}");
}

impl Watch {
    fn wait_until_heard(&self) {
        while self.shared.heard(self.shared.rank).unwrap().is_none() {
            thread::sleep(Duration::from_millis(10));
        }
    }
}

/// A way to the store on which, once it is silent, nothing comes through and nothing ends: a host that is gone.
fn proxy(to: u16) -> (u16, Arc<AtomicBool>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let silent = Arc::new(AtomicBool::new(false));
    let of_thread = Arc::clone(&silent);
    thread::spawn(move || {
        for client in listener.incoming() {
            let client = client.unwrap();
            let server = TcpStream::connect(("127.0.0.1", to)).unwrap();
            let ways = [(client.try_clone().unwrap(), server.try_clone().unwrap()), (server, client)];
            for (mut from, mut to) in ways {
                let silent = Arc::clone(&of_thread);
                thread::spawn(move || {
                    let mut bytes = [0; 4096];
                    while let Ok(count @ 1..) = from.read(&mut bytes) {
                        if !silent.load(Ordering::SeqCst) && to.write_all(&bytes[..count]).is_err() {
                            return;
                        }
                    }
                    // A connection that has ended here stays open there.
                    thread::sleep(Duration::from_secs(600));
                });
            }
        }
    });
    (port, silent)
}
