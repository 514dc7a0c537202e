//! Finds ranks that are lost or hang, so that the others end with a line that names them.
//!
//! Every rank writes a beat into the store each second: a count, and what it does. Each watches the rank before it in the circle; who misses it,
//! and who fails by itself, writes the verdict that all read.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use blip2_torchx::dist::{self, Store};
use serde::{Deserialize, Serialize};

use super::launch::Launch;
use crate::error::Error;

const BEAT: Duration = Duration::from_secs(1);
/// Without a beat for so long, a rank is lost.
const LOST: Duration = Duration::from_secs(12);
/// A process that has not ended by itself so long after the verdict is ended.
const GRACE: Duration = Duration::from_secs(15);

/// What a rank says of itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Beat {
    count: u64,
    host: String,
    pid: u32,
    step: u64,
    phase: String,
    /// The collective it is in, and since how many seconds.
    waits: Option<(String, u64)>,
    done: bool,
}

impl Beat {
    fn place(&self) -> String {
        match &self.waits {
            Some((name, _)) => format!("step {}, {}: {name}", self.step, self.phase),
            None => format!("step {}, {}", self.step, self.phase),
        }
    }

    fn process(&self) -> String {
        format!("process {} on {}", self.pid, self.host)
    }
}

#[derive(Debug)]
struct State {
    step: u64,
    phase: &'static str,
    waits: Option<(&'static str, Instant)>,
    verdict: Option<String>,
    ended: bool,
}

struct Shared {
    rank: usize,
    world: usize,
    hang: Duration,
    /// Who serves the store.
    server: &'static str,
    store: Store,
    state: Mutex<State>,
    changed: Condvar,
    group: Mutex<Option<Arc<dist::Group>>>,
    abandon: fn(&str),
}

/// The watch of one rank.
pub(super) struct Watch {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// A collective that is waited in for as long as this lives.
pub(super) struct Waiting<'a>(&'a Shared);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.state().waits = None;
    }
}

impl Watch {
    /// Begins to beat.
    pub(super) fn start(launch: &Launch, store: Store, abandon: fn(&str)) -> Result<Watch, Error> {
        let state = State { step: 0, phase: "start", waits: None, verdict: None, ended: false };
        let shared = Arc::new(Shared {
            rank: launch.rank,
            world: launch.world,
            hang: launch.hang,
            server: if launch.meeting.served { "the launcher's agent" } else { "rank 0" },
            store,
            state: Mutex::new(state),
            changed: Condvar::new(),
            group: Mutex::default(),
            abandon,
        });
        let of_thread = Arc::clone(&shared);
        let thread = thread::Builder::new().name("watch".into()).spawn(move || of_thread.run());
        Ok(Watch { thread: Some(thread.map_err(|error| Error::file("threads", error))?), shared })
    }

    /// What the verdict interrupts.
    pub(super) fn aborts(&self, group: Arc<dist::Group>) {
        *self.shared.group.lock().unwrap_or_else(PoisonError::into_inner) = Some(group);
    }

    pub(super) fn enter(&self, step: u64, phase: &'static str) {
        let mut state = self.shared.state();
        (state.step, state.phase) = (step, phase);
    }

    pub(super) fn wait_in(&self, collective: &'static str) -> Waiting<'_> {
        self.shared.state().waits = Some((collective, Instant::now()));
        Waiting(&self.shared)
    }

    /// The reason behind a collective's error: the verdict, where one comes.
    pub(super) fn explain(&self, error: Error) -> Error {
        let waited = LOST + 3 * BEAT;
        let state = self.shared.state();
        let pending = |state: &mut State| state.verdict.is_none();
        let (state, _) =
            self.shared.changed.wait_timeout_while(state, waited, pending).unwrap_or_else(PoisonError::into_inner);
        state.verdict.clone().map_or(error, Error::RankLost)
    }

    /// Waits until every other rank has said that it is done, so that none finds the store gone before it is.
    pub(super) fn outlast_others(&self, limit: Duration) {
        let begun = Instant::now();
        let done = |rank| matches!(self.shared.heard(rank), Ok(Some(beat)) if beat.done);
        let all = || (0..self.shared.world).filter(|rank| *rank != self.shared.rank).all(done);
        while begun.elapsed() < limit && !all() {
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// Tells all that this rank fails by itself.
    pub(super) fn accuse_oneself(&self, reason: &str) {
        let place = self.shared.beat(0, false).place();
        self.shared.post(&format!("rank {} failed at {place}: {reason}", self.shared.rank));
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.shared.state().ended = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn beat(&self, count: u64, done: bool) -> Beat {
        let state = self.state();
        let waits = state.waits.map(|(name, since)| (name.to_owned(), since.elapsed().as_secs()));
        let host = crate::run_folder::host_name();
        Beat { count, host, pid: std::process::id(), step: state.step, phase: state.phase.to_owned(), waits, done }
    }

    fn run(&self) {
        let before = (self.rank + self.world - 1) % self.world;
        let mut last: Option<(Beat, Instant)> = None;
        let mut answered = Instant::now();
        for count in 0.. {
            match self.look(count, before, &mut last) {
                Ok(None) => answered = Instant::now(),
                Ok(Some(verdict)) => return self.pronounce(verdict),
                Err(error) if answered.elapsed() > LOST => {
                    let (server, seconds) = (self.server, LOST.as_secs());
                    return self
                        .pronounce(format!("{server} is lost: its store has not answered for {seconds} s: {error}"));
                }
                Err(_) => {}
            }
            let state = self.state();
            let (state, _) = self
                .changed
                .wait_timeout_while(state, BEAT, |state| !state.ended)
                .unwrap_or_else(PoisonError::into_inner);
            if state.ended {
                drop(state);
                let _ = self.say(&self.beat(count + 1, true));
                return;
            }
        }
    }

    /// One beat; a verdict where there is one.
    fn look(
        &self,
        count: u64,
        before: usize,
        last: &mut Option<(Beat, Instant)>,
    ) -> Result<Option<String>, blip2_torchx::Error> {
        let own = self.beat(count, false);
        self.say(&own)?;
        if self.store.has(&["verdict"])? {
            let verdict = self.store.get("verdict", BEAT)?;
            return Ok(Some(String::from_utf8_lossy(&verdict).into_owned()));
        }
        let Some(seen) = self.heard(before)? else { return Ok(None) };
        if last.as_ref().is_none_or(|(beat, _)| *beat != seen) {
            *last = Some((seen, Instant::now()));
        } else if let Some((beat, since)) = last
            && !beat.done
            && since.elapsed() > LOST
        {
            let (process, place, seconds) = (beat.process(), beat.place(), LOST.as_secs());
            self.post(&format!(
                "rank {before} ({process}) is lost: no sign of life for {seconds} s, last seen at {place}"
            ));
        }
        if let Some((collective, waited)) = &own.waits
            && *waited >= self.hang.as_secs().max(1)
        {
            self.accuse_who_hangs(collective, *waited)?;
        }
        Ok(None)
    }

    /// All ranks but those that hang wait in a collective.
    fn accuse_who_hangs(&self, collective: &str, waited: u64) -> Result<(), blip2_torchx::Error> {
        let mut places: BTreeMap<usize, Beat> = BTreeMap::new();
        for rank in 0..self.world {
            if let Some(beat) = self.heard(rank)? {
                places.insert(rank, beat);
            }
        }
        let idle: Vec<String> = places
            .iter()
            .filter(|(_, beat)| beat.waits.is_none())
            .map(|(rank, beat)| format!("rank {rank} ({}) at {}", beat.process(), beat.place()))
            .collect();
        if idle.is_empty() {
            let all: Vec<String> =
                places.iter().map(|(rank, beat)| format!("rank {rank} at {}", beat.place())).collect();
            self.post(&format!("every rank has waited for the others for {waited} s: {}", all.join("; ")));
        } else {
            self.post(&format!(
                "hangs: {}; rank {} has waited for {waited} s in: {collective}",
                idle.join("; "),
                self.rank
            ));
        }
        Ok(())
    }

    fn say(&self, beat: &Beat) -> Result<(), blip2_torchx::Error> {
        let text = serde_json::json!(beat).to_string();
        self.store.set(&format!("beat/{}", self.rank), text.as_bytes())
    }

    fn heard(&self, rank: usize) -> Result<Option<Beat>, blip2_torchx::Error> {
        let key = format!("beat/{rank}");
        if !self.store.has(&[&key])? {
            return Ok(None);
        }
        Ok(serde_json::from_slice(&self.store.get(&key, BEAT)?).ok())
    }

    /// The first verdict stands.
    fn post(&self, verdict: &str) {
        if self.store.add("verdicts", 1).is_ok_and(|number| number == 1) {
            // Where the store is gone, the others find that out themselves.
            let _ = self.store.set("verdict", verdict.as_bytes());
        }
    }

    /// Gives the verdict to whoever waits for it; ends the process where that does not end it.
    fn pronounce(&self, verdict: String) {
        self.state().verdict = Some(verdict.clone());
        self.changed.notify_all();
        if let Some(group) = &*self.group.lock().unwrap_or_else(PoisonError::into_inner) {
            group.abort();
        }
        let state = self.state();
        let (state, _) =
            self.changed.wait_timeout_while(state, GRACE, |state| !state.ended).unwrap_or_else(PoisonError::into_inner);
        if !state.ended {
            drop(state);
            (self.abandon)(&verdict);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ranks::Meeting;

    fn watch(rank: usize, store: &Store) -> Watch {
        let patience = Duration::from_secs(10);
        let (host, port, attempt) = ("127.0.0.1".to_owned(), store.port(), String::new());
        let meeting = Meeting { host, port, served: false, attempt, patience };
        let launch = Launch { rank, world: 2, local_rank: rank, meeting, hang: Duration::from_secs(1) };
        Watch::start(&launch, store.clone(), |reason| panic!("abandoned: {reason}")).unwrap()
    }

    fn store() -> Store {
        Store::serve("127.0.0.1", 0, Duration::from_secs(10)).unwrap()
    }

    #[test]
    fn a_rank_that_others_wait_for_in_vain_is_named_with_its_place() {
        let store = store();
        let (waits, hangs) = (watch(0, &store), watch(1, &store));
        hangs.enter(41, "reading data");
        let waiting = waits.wait_in("adding up gradients");
        let error = waits.explain(Error::Mismatch("the group was closed".into())).to_string();
        drop(waiting);
        for part in ["hangs: rank 1 (process ", "at step 41, reading data", "rank 0 has waited", "adding up gradients"]
        {
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn a_rank_that_fails_tells_the_others_why_and_where() {
        let store = store();
        let (fails, waits) = (watch(0, &store), watch(1, &store));
        fails.enter(7, "checkpoint");
        fails.accuse_oneself("the disk is full");
        let error = waits.explain(Error::Mismatch("the group was closed".into())).to_string();
        assert_eq!(error, "rank 0 failed at step 7, checkpoint: the disk is full");
    }

    #[test]
    fn without_a_verdict_the_error_stands() {
        let store = store();
        let (first, second) = (watch(0, &store), watch(1, &store));
        drop(second); // it is done, not lost
        let error = first.explain(Error::Mismatch("shapes differ".into())).to_string();
        assert_eq!(error, "shapes differ");
    }
}
