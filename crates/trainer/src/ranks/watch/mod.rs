//! Finds ranks that are lost or hang, so that the others end with a line that names them.
//!
//! Every rank writes a beat into the store each second: a count, and what it does. Each watches the rank before it in the circle; who misses it,
//! and who fails by itself, writes the verdict that all read.
//!
//! Two threads: one asks the store (`ask.rs`) and may wait for it as long as it likes; the other waits for nothing, and judges (`judge.rs`) how old
//! the last answer is and whether a verdict has had its effect.

mod ask;
mod beat;
mod judge;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use blip2_torchx::dist::Store;

use self::beat::Beat;
use super::launch::Launch;
use crate::error::Error;

const BEAT: Duration = Duration::from_secs(1);

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

/// Says for a rank, from any thread, that it goes on with what it does: one that does so for hours does not hang.
#[derive(Clone, Default)]
pub struct Pulse(Weak<Shared>);

impl Pulse {
    /// It has done another piece of it. Nothing where the rank is alone, or its group has ended.
    pub fn beat(&self) {
        if let Some(shared) = self.0.upgrade() {
            shared.state().moved = Instant::now();
        }
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

    pub(super) fn pulse(&self) -> Pulse {
        Pulse(Arc::downgrade(&self.shared))
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
        let host = crate::run::folder::host_name();
        let (step, phase) = (state.step, state.phase.to_owned());
        Beat { count, host, pid: std::process::id(), step, phase, waits, still, done }
    }
}
