//! How the ranks of a launch find each other, whatever earlier starts of theirs have left in the store.
//!
//! The store may outlive the ranks, and a launcher on several hosts starts each host's ranks again at a time and with a count of its own. So each
//! start of a rank draws a name. Rank 0 writes the roll of the ranks' latest names, anew whenever one has changed; a rank answers a roll that has its
//! own name, and when all have answered the same roll, they are together. All that follows has that roll's digest as its prefix.
//!
//! ```text
//! name/RANK     the latest start's name        here/DIGEST        how many ranks have answered that roll
//! arrivals      how many names were written    here/DIGEST/RANK   who they are
//! roll          all names
//! ```

use std::hash::{BuildHasher, RandomState};
use std::net::ToSocketAddrs;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use blip2_torchx::dist::Store;

use super::launch::{Launch, Meeting};
use crate::error::Error;

/// So many ranks that are missing are named.
const NAMED: usize = 16;
const POLL: Duration = Duration::from_millis(100);
/// A store that went away with an earlier rank 0 is asked for again this long after, and for no less than the second.
const AGAIN: Duration = Duration::from_secs(1);
const AGAIN_FOR: Duration = Duration::from_secs(10);

/// Ranks that have met.
pub(super) struct Met {
    /// Where they speak to each other, under a prefix that no other start of any of them has.
    pub store: Store,
    /// It is served in this process.
    pub serves: bool,
}

/// A store that answers so much later than the ranks were to be there answers no more: its calls have no limit of their own.
const SILENCE: Duration = Duration::from_secs(15);

/// Waits until every rank of the launch is there.
///
/// # Errors
/// A store that nobody serves or that does not answer, a port in use, ranks that do not come: each says where and for how long was waited.
pub(super) fn meet(launch: &Launch) -> Result<Met, Error> {
    let (tell, told) = mpsc::channel();
    let own = launch.clone();
    let meeting = thread::Builder::new().name("meeting".into()).spawn(move || tell.send(meet_at_the_store(&own)));
    meeting.map_err(|error| Error::file("thread of the meeting", error))?;
    let Meeting { host, port, patience, .. } = &launch.meeting;
    let limit = *patience + SILENCE;
    told.recv_timeout(limit).unwrap_or_else(|_| {
        Err(Error::RankLost(format!(
            "what listens at {host}:{port} has not answered within {} s: rank 0 hangs there, or another program has the port; end it, or set another MASTER_PORT",
            limit.as_secs()
        )))
    })
}

fn meet_at_the_store(launch: &Launch) -> Result<Met, Error> {
    let Meeting { host, port, served, job, patience } = &launch.meeting;
    let serves = launch.rank == 0 && !served;
    let begun = Instant::now();
    let mut limit = *patience;
    loop {
        let store = if serves { Store::serve(host, *port, limit) } else { Store::connect(host, *port, limit) };
        let store = store.map_err(|error| unresolved(host, *port).unwrap_or(error.into()))?;
        let store = store.with_prefix(&format!("blip2/{job}"));
        match call_the_roll(launch, &store, begun) {
            Ok(digest) => return Ok(Met { store: store.with_prefix(&digest), serves }),
            // The store was that of a rank 0 which has ended since; the next one serves another.
            Err(Error::Torch(_)) if !serves && begun.elapsed() < *patience => {
                thread::sleep(AGAIN);
                limit = patience.saturating_sub(begun.elapsed()).max(AGAIN_FOR);
            }
            Err(error) => return Err(error),
        }
    }
}

/// The digest of the roll that all ranks have answered.
fn call_the_roll(launch: &Launch, store: &Store, begun: Instant) -> Result<String, Error> {
    let (rank, world) = (launch.rank, launch.world);
    let own = draw_name();
    store.set(&name_key(rank), own.as_bytes())?;
    store.add("arrivals", 1)?;
    let mut clerk = (rank == 0).then(Clerk::default);
    let mut answered = String::new();
    loop {
        if let Some(clerk) = &mut clerk {
            clerk.write(store, world)?;
        }
        if store.peek(&name_key(rank))?.is_none_or(|name| name != own.as_bytes()) {
            return Err(Error::RankLost(format!(
                "another process has come as rank {rank} of {world}; give each process a RANK of its own"
            )));
        }
        let roll = store.peek("roll")?.unwrap_or_default();
        if name_in(&roll, rank) == Some(own.as_bytes()) {
            let digest = digest(&roll);
            let here = format!("here/{digest}");
            if answered != digest {
                store.set(&format!("{here}/{rank}"), b"")?;
                store.add(&here, 1)?;
                answered.clone_from(&digest);
            }
            if store.add(&here, 0)? == world as i64 {
                return Ok(digest);
            }
        }
        if begun.elapsed() >= launch.meeting.patience {
            return Err(not_all_came(launch, store, &answered).unwrap_or_else(|error| store_is_gone(launch, &error)));
        }
        thread::sleep(POLL);
    }
}

/// What rank 0 does for all.
#[derive(Default)]
struct Clerk {
    arrivals: i64,
    roll: Vec<u8>,
}

impl Clerk {
    /// Writes the roll where a name has changed.
    fn write(&mut self, store: &Store, world: usize) -> Result<(), Error> {
        let arrivals = store.add("arrivals", 0)?;
        if arrivals == self.arrivals {
            return Ok(());
        }
        let names: Option<Vec<Vec<u8>>> = (0..world)
            .map(|rank| store.peek(&name_key(rank)).transpose())
            .collect::<Option<Result<_, _>>>()
            .transpose()?;
        if let Some(roll) = names.map(|names| names.join(&b'\n'))
            && roll != self.roll
        {
            store.set("roll", &roll)?;
            self.roll = roll;
        }
        self.arrivals = arrivals;
        Ok(())
    }
}

/// Names the ranks that are missing: those that never came, else those that an earlier start alone has left a name of.
fn not_all_came(launch: &Launch, store: &Store, answered: &str) -> Result<Error, Error> {
    let Meeting { host, port, patience, .. } = &launch.meeting;
    let having = |key: &dyn Fn(usize) -> String| -> Result<Vec<bool>, Error> {
        (0..launch.world).map(|rank| Ok(store.has(&[&key(rank)])?)).collect()
    };
    let mut here = having(&|rank| name_key(rank))?;
    if here.iter().all(|here| *here) {
        here = match answered {
            // A roll without this rank's name, or none: it is rank 0 that writes it.
            "" => (0..launch.world).map(|rank| rank != 0).collect(),
            digest => having(&|rank| format!("here/{digest}/{rank}"))?,
        };
    }
    let list = |there: bool| {
        let mut ranks = (0..launch.world).filter(|&rank| here[rank] == there);
        let mut named: Vec<String> = ranks.by_ref().take(NAMED).map(|rank| rank.to_string()).collect();
        named.extend(ranks.next().map(|_| "...".into()));
        named.join(", ")
    };
    Ok(Error::RankLost(format!(
        "rank {} of {} did not come to {host}:{port} within {} s, ranks {} did; start them all with the same MASTER_ADDR, MASTER_PORT and WORLD_SIZE",
        list(false),
        launch.world,
        patience.as_secs(),
        list(true)
    )))
}

/// Says that the host is the fault, where it is.
fn unresolved(host: &str, port: u16) -> Option<Error> {
    let error = (host, port).to_socket_addrs().err()?;
    Some(Error::RankLost(format!("MASTER_ADDR: no host is called {host} here ({error}); expected the host of rank 0")))
}

fn store_is_gone(launch: &Launch, error: &Error) -> Error {
    let Meeting { host, port, patience, .. } = &launch.meeting;
    Error::RankLost(format!(
        "not all of {} ranks came to {host}:{port} within {} s, and the store there has ended ({error}); start them all with the same MASTER_ADDR, MASTER_PORT and WORLD_SIZE",
        launch.world,
        patience.as_secs()
    ))
}

fn name_key(rank: usize) -> String {
    format!("name/{rank}")
}

fn name_in(roll: &[u8], rank: usize) -> Option<&[u8]> {
    roll.split(|byte| *byte == b'\n').nth(rank)
}

fn digest(roll: &[u8]) -> String {
    blake3::hash(roll).to_hex()[..16].to_owned()
}

/// A text that no other start of any rank has.
pub(super) fn draw_name() -> String {
    // Seeded by the system.
    let random = RandomState::new();
    let text = format!(
        "{} {} {:?} {} {}",
        crate::run::folder::host_name(),
        std::process::id(),
        SystemTime::now(),
        random.hash_one(0),
        random.hash_one(1)
    );
    blake3::hash(text.as_bytes()).to_hex()[..32].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread::JoinHandle;

    const HOST: &str = "127.0.0.1";

    fn start(
        rank: usize,
        world: usize,
        port: u16,
        served: bool,
        patience_s: u64,
    ) -> JoinHandle<Result<String, String>> {
        let patience = Duration::from_secs(patience_s);
        let meeting = Meeting { host: HOST.into(), port, served, job: "job".into(), patience };
        let launch = Launch { rank, world, local_rank: rank, meeting, hang: patience };
        thread::spawn(move || {
            let met = meet(&launch).map_err(|error| error.to_string())?;
            // What each writes here the others see, and nobody else.
            met.store.set(&format!("met/{rank}"), b"").unwrap();
            for other in 0..world {
                met.store.get(&format!("met/{other}"), patience).unwrap();
            }
            let place = met.store.add("place", 0).map(|_| met.store.path().to_owned());
            // Who serves the store stays until the others have what they need.
            thread::sleep(if met.serves { Duration::from_secs(1) } else { Duration::ZERO });
            Ok(place.unwrap())
        })
    }

    fn together(ranks: Vec<JoinHandle<Result<String, String>>>) -> String {
        let mut places: Vec<String> = ranks.into_iter().map(|rank| rank.join().unwrap().unwrap()).collect();
        places.dedup();
        assert_eq!(places.len(), 1, "{places:?}");
        places.pop().unwrap()
    }

    #[test]
    fn ranks_that_start_again_at_different_times_meet_in_a_store_that_stayed() {
        let agent = Store::serve(HOST, 0, Duration::from_secs(60)).unwrap();
        let port = agent.port();
        let first = together((0..3).map(|rank| start(rank, 3, port, true, 60)).collect());
        // Each start is late once; what the one before left must not stand for it.
        let mut seen = vec![first];
        for late in 0..3 {
            let mut early: Vec<_> =
                (0..3).filter(|rank| *rank != late).map(|rank| start(rank, 3, port, true, 60)).collect();
            thread::sleep(Duration::from_millis(700));
            assert!(early.iter().all(|rank| !rank.is_finished()), "rank {late} has not come");
            early.push(start(late, 3, port, true, 60));
            let place = together(early);
            assert!(!seen.contains(&place));
            seen.push(place);
        }
    }

    #[test]
    fn a_rank_that_starts_again_while_others_wait_is_waited_for() {
        let agent = Store::serve(HOST, 0, Duration::from_secs(60)).unwrap();
        let port = agent.port();
        // Rank 1 comes, is on the roll's way, and is gone: of its start a name is left.
        agent.with_prefix("blip2/job").set("name/1", b"gone").unwrap();
        agent.with_prefix("blip2/job").add("arrivals", 1).unwrap();
        let first = start(0, 2, port, true, 60);
        thread::sleep(Duration::from_millis(500));
        assert!(!first.is_finished());
        together(vec![first, start(1, 2, port, true, 60)]);
    }

    #[test]
    fn whose_name_alone_is_left_is_named_as_missing() {
        let agent = Store::serve(HOST, 0, Duration::from_secs(60)).unwrap();
        together((0..2).map(|rank| start(rank, 2, agent.port(), true, 60)).collect());
        for (rank, missing) in [(0, 1), (1, 0)] {
            let error = start(rank, 2, agent.port(), true, 1).join().unwrap().unwrap_err();
            assert!(error.contains(&format!("rank {missing} of 2 did not come to {HOST}")), "{error}");
            assert!(error.contains(&format!("ranks {rank} did")), "{error}");
        }
    }

    #[test]
    fn two_processes_of_one_number_are_told() {
        let agent = Store::serve(HOST, 0, Duration::from_secs(60)).unwrap();
        let first = start(1, 2, agent.port(), true, 60);
        thread::sleep(Duration::from_millis(300));
        let second = start(1, 2, agent.port(), true, 60);
        let error = first.join().unwrap().unwrap_err();
        assert!(error.contains("another process has come as rank 1 of 2"), "{error}");
        together(vec![second, start(0, 2, agent.port(), true, 60)]);
    }

    #[test]
    fn a_rank_outlasts_the_store_of_an_earlier_rank_0() {
        let earlier = Store::serve(HOST, 0, Duration::from_secs(60)).unwrap();
        let port = earlier.port();
        let second = start(1, 2, port, false, 60);
        earlier.with_prefix("blip2/job").get("name/1", Duration::from_secs(60)).unwrap();
        drop(earlier);
        together(vec![start(0, 2, port, false, 60), second]);
    }
}
