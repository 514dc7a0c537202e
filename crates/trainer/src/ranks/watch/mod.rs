//! Finds ranks that are lost or hang, so that the others end with a line that names them.
//!
//! Every rank writes a beat into the store each second: a count, and what it does. Each watches the rank before it in the circle; who misses it,
//! and who fails by itself, writes the verdict that all read.
//!
//! Two threads: one asks the store and may wait for it as long as it likes; the other waits for nothing, and judges how old the last answer is and
//! whether a verdict has had its effect.

mod beat;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use blip2_torchx::dist::Store;

use self::beat::{Beat, list, lost};
use super::STEPPING;
use super::launch::Launch;
use crate::error::Error;

const BEAT: Duration = Duration::from_secs(1);
/// A rank that hangs in a step is looked for every so many beats, since all ranks ask about all.
const LOOK_AROUND: u64 = 5;

/// How long is waited for what.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Without a beat for so long a rank is lost, and without an answer the store.
    pub lost: Duration,
    /// A process that has not ended by itself so long after the verdict is ended.
    pub grace: Duration,
}

impl Limits {
    pub(super) const OF_RUNS: Limits = Limits { lost: Duration::from_secs(12), grace: Duration::from_secs(15) };
}

#[derive(Debug)]
struct State {
    step: u64,
    phase: &'static str,
    waits: Option<(&'static str, Instant)>,
    /// When this rank last moved.
    moved: Instant,
    /// Collectives are queued on a device: a host that waits for one need not be in it.
    queues: bool,
    /// When the store last answered, and what was wrong with it since.
    answered: Instant,
    unanswered: Option<String>,
    verdict: Option<String>,
    ended: bool,
    /// The thread that asks the store has ended.
    silent: bool,
}

struct Shared {
    rank: usize,
    world: usize,
    hang: Duration,
    limits: Limits,
    /// Who serves the store.
    server: &'static str,
    store: Store,
    state: Mutex<State>,
    changed: Condvar,
    abort: Mutex<Option<Abort>>,
    abandon: fn(&str),
}

/// Ends what the ranks have under way, as far as it can be.
type Abort = Arc<dyn Fn() + Send + Sync>;

/// The watch of one rank.
pub(super) struct Watch {
    shared: Arc<Shared>,
    asks: Option<JoinHandle<()>>,
    judges: Option<JoinHandle<()>>,
}

/// Something that is waited in for as long as this lives.
pub struct Waiting<'a>(&'a Shared);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state();
        (state.waits, state.moved) = (None, Instant::now());
    }
}

impl Watch {
    /// Begins to beat.
    pub(super) fn start(launch: &Launch, store: Store, limits: Limits, abandon: fn(&str)) -> Result<Watch, Error> {
        let now = Instant::now();
        let state = State {
            step: 0,
            phase: "start",
            waits: None,
            moved: now,
            queues: false,
            answered: now,
            unanswered: None,
            verdict: None,
            ended: false,
            silent: false,
        };
        let shared = Arc::new(Shared {
            rank: launch.rank,
            world: launch.world,
            hang: launch.hang,
            limits,
            server: if launch.meeting.served { "the launcher's agent" } else { "rank 0" },
            store,
            state: Mutex::new(state),
            changed: Condvar::new(),
            abort: Mutex::default(),
            abandon,
        });
        let spawn = |name: &str, work: fn(&Shared)| {
            let shared = Arc::clone(&shared);
            let thread = thread::Builder::new().name(name.into()).spawn(move || work(&shared));
            thread.map(Some).map_err(|error| Error::file("threads", error))
        };
        let (asks, judges) = (spawn("beats", Shared::ask)?, spawn("watch", Shared::judge)?);
        Ok(Watch { shared, asks, judges })
    }

    /// What the verdict interrupts.
    pub(super) fn aborts(&self, abort: Abort) {
        *self.shared.abort.lock().unwrap_or_else(PoisonError::into_inner) = Some(abort);
    }

    /// Collectives are queued on a device from now on.
    pub(super) fn queues(&self) {
        self.shared.state().queues = true;
    }

    pub(super) fn enter(&self, step: u64, phase: &'static str) {
        let mut state = self.shared.state();
        (state.step, state.phase, state.moved) = (step, phase, Instant::now());
    }

    pub(super) fn wait_in(&self, collective: &'static str) -> Waiting<'_> {
        let mut state = self.shared.state();
        let now = Instant::now();
        (state.waits, state.moved) = (Some((collective, now)), now);
        Waiting(&self.shared)
    }

    /// The reason behind a collective's error: the verdict, where one comes.
    pub(super) fn explain(&self, error: Error) -> Error {
        let waited = self.shared.limits.lost + 3 * BEAT;
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
        // While a verdict still has its limit: a group that goes may wait for its peers.
        let group = self.shared.abort.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(group);
        let mut state = self.shared.state();
        state.ended = true;
        self.shared.changed.notify_all();
        // Its last word, for which a store that is silent is not waited for.
        let speaks = |state: &mut State| !state.silent;
        let (state, _) =
            self.shared.changed.wait_timeout_while(state, 3 * BEAT, speaks).unwrap_or_else(PoisonError::into_inner);
        let silent = state.silent;
        drop(state);
        for thread in [self.judges.take(), self.asks.take().filter(|_| silent)].into_iter().flatten() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until something has changed, for a beat at most.
    fn wait<'a>(&self, state: MutexGuard<'a, State>, until: impl Fn(&State) -> bool) -> MutexGuard<'a, State> {
        let pending = |state: &mut State| !until(state);
        self.changed.wait_timeout_while(state, BEAT, pending).unwrap_or_else(PoisonError::into_inner).0
    }

    fn beat(&self, count: u64, done: bool) -> Beat {
        let state = self.state();
        let waits = state.waits.map(|(name, since)| (name.to_owned(), since.elapsed().as_secs()));
        let still = state.moved.elapsed().as_secs();
        let host = crate::run_folder::host_name();
        let (step, phase) = (state.step, state.phase.to_owned());
        Beat { count, host, pid: std::process::id(), step, phase, waits, still, done }
    }

    /// Beats, and looks at the others, until this rank ends or a verdict is there.
    fn ask(&self) {
        let before = (self.rank + self.world - 1) % self.world;
        let mut last = (None, Instant::now());
        for count in 0.. {
            let looked = self.look(count, before, &mut last);
            let mut state = self.state();
            match looked {
                Ok(None) => (state.answered, state.unanswered) = (Instant::now(), None),
                Ok(Some(verdict)) => {
                    state.verdict.get_or_insert(verdict);
                    break;
                }
                Err(error) => state.unanswered = Some(error.to_string()),
            }
            let state = self.wait(state, |state| state.ended);
            if state.ended {
                drop(state);
                let _ = self.say(&self.beat(count + 1, true));
                break;
            }
        }
        self.state().silent = true;
        self.changed.notify_all();
    }

    /// One beat; a verdict where there is one.
    fn look(
        &self,
        count: u64,
        before: usize,
        last: &mut (Option<Beat>, Instant),
    ) -> Result<Option<String>, blip2_torchx::Error> {
        let own = self.beat(count, false);
        self.say(&own)?;
        if let Some(verdict) = self.store.peek("verdict")? {
            return Ok(Some(String::from_utf8_lossy(&verdict).into_owned()));
        }
        let seen = self.heard(before)?;
        if let Some(verdict) = lost(before, last, seen, self.limits.lost) {
            self.post(&verdict);
        }
        let hang = self.hang.as_secs().max(1);
        match &own.waits {
            Some((collective, waited)) if *waited >= hang => self.accuse_who_hangs(collective, *waited)?,
            // All that a step does is queued, and the queue is full: nobody waits in anything that has a name.
            None if own.still >= hang
                && own.phase == STEPPING
                && self.state().queues
                && count.is_multiple_of(LOOK_AROUND) =>
            {
                self.accuse_where_all_stand(hang)?;
            }
            _ => {}
        }
        Ok(None)
    }

    /// All ranks but those that hang wait in a collective.
    fn accuse_who_hangs(&self, collective: &str, waited: u64) -> Result<(), blip2_torchx::Error> {
        let places = self.all_heard()?;
        let idle: Vec<String> = places
            .iter()
            .filter(|(_, beat)| beat.waits.is_none())
            .map(|(rank, beat)| format!("rank {rank} ({}) at {}", beat.process(), beat.place()))
            .collect();
        if idle.is_empty() {
            self.post(&format!("every rank has waited for the others for {waited} s: {}", list(&places)));
        } else {
            self.post(&format!(
                "hangs: {}; rank {} has waited for {waited} s in: {collective}",
                idle.join("; "),
                self.rank
            ));
        }
        Ok(())
    }

    /// No rank has moved for so long.
    fn accuse_where_all_stand(&self, hang: u64) -> Result<(), blip2_torchx::Error> {
        let places = self.all_heard()?;
        if places.values().all(|beat| beat.still >= hang) {
            self.post(&format!("no rank has gone on for {hang} s: {}", list(&places)));
        }
        Ok(())
    }

    fn all_heard(&self) -> Result<BTreeMap<usize, Beat>, blip2_torchx::Error> {
        let mut beats = BTreeMap::new();
        for rank in 0..self.world {
            if let Some(beat) = self.heard(rank)? {
                beats.insert(rank, beat);
            }
        }
        Ok(beats)
    }

    fn say(&self, beat: &Beat) -> Result<(), blip2_torchx::Error> {
        let text = serde_json::json!(beat).to_string();
        self.store.set(&format!("beat/{}", self.rank), text.as_bytes())
    }

    fn heard(&self, rank: usize) -> Result<Option<Beat>, blip2_torchx::Error> {
        Ok(self.store.peek(&format!("beat/{rank}"))?.and_then(|text| serde_json::from_slice(&text).ok()))
    }

    /// The first verdict stands.
    fn post(&self, verdict: &str) {
        if self.store.add("verdicts", 1).is_ok_and(|number| number == 1) {
            // Where the store is gone, the others find that out themselves.
            let _ = self.store.set("verdict", verdict.as_bytes());
        }
    }

    /// Waits for this rank's end or a verdict, which it carries out. Asks nobody.
    fn judge(&self) {
        let mut state = self.state();
        while state.verdict.is_none() && !state.ended {
            state = self.wait(state, |state| state.verdict.is_some() || state.ended);
            if state.verdict.is_none() && !state.ended && state.answered.elapsed() > self.limits.lost {
                let (server, seconds) = (self.server, self.limits.lost.as_secs());
                let error = state.unanswered.as_ref().map_or(String::new(), |error| format!(": {error}"));
                state.verdict = Some(format!("{server} is lost: its store has not answered for {seconds} s{error}"));
                self.changed.notify_all();
            }
        }
        let verdict = state.verdict.clone();
        drop(state);
        if let Some(verdict) = verdict {
            self.pronounce(&verdict);
        }
    }

    /// Interrupts what this rank waits in, and ends the process where that does not end it in time.
    fn pronounce(&self, verdict: &str) {
        let begun = Instant::now();
        let abort = self.abort.lock().unwrap_or_else(PoisonError::into_inner).clone();
        // By a thread that nobody waits for: NCCL may take as long as a collective may.
        let _ = thread::Builder::new().name("abort".into()).spawn(move || abort.iter().for_each(|abort| abort()));
        let state = self.state();
        let left = self.limits.grace.saturating_sub(begun.elapsed());
        let (state, _) =
            self.changed.wait_timeout_while(state, left, |state| !state.ended).unwrap_or_else(PoisonError::into_inner);
        if !state.ended {
            drop(state);
            (self.abandon)(verdict);
        }
    }
}
