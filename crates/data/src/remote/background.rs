//! What is needed next, and what of it is there.

use std::collections::{HashMap, HashSet, VecDeque};
use std::fs::File;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::shards::location::Location;
use crate::shards::shard::Shard;

/// The list of what is needed next, between those who write it and the threads that fetch.
#[derive(Default)]
pub(crate) struct Ahead {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    wanted: Vec<Shard>,
    queue: VecDeque<Shard>,
    /// Being fetched.
    active: HashSet<Location>,
    /// There, and held open so that they stay.
    pins: HashMap<Location, File>,
    stopped: bool,
}

impl Ahead {
    /// Replaces the list.
    pub(crate) fn want(&self, wanted: Vec<Shard>) {
        let mut state = self.lock();
        if state.wanted == wanted {
            return;
        }
        let still: HashSet<&Location> = wanted.iter().map(|shard| &shard.location).collect();
        state.pins.retain(|location, _| still.contains(location));
        let fresh =
            |shard: &&Shard| !state.pins.contains_key(&shard.location) && !state.active.contains(&shard.location);
        state.queue = wanted.iter().filter(fresh).cloned().collect();
        state.wanted = wanted;
        self.changed.notify_all();
    }

    /// The next shard to fetch; waits for one, and is `None` at the end.
    pub(crate) fn next(&self) -> Option<Shard> {
        let mut state = self.lock();
        loop {
            if state.stopped {
                return None;
            }
            if let Some(shard) = state.queue.pop_front() {
                state.active.insert(shard.location.clone());
                return Some(shard);
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// What became of a shard that [`Ahead::next`] gave.
    pub(crate) fn done(&self, shard: &Shard, fetched: Fetched) {
        let mut state = self.lock();
        state.active.remove(&shard.location);
        match fetched {
            Fetched::File(file) if state.wanted.contains(shard) => {
                state.pins.insert(shard.location.clone(), file);
            }
            // What comes behind it is needed later still.
            Fetched::NoRoom => state.queue.clear(),
            Fetched::File(_) | Fetched::Failed => {}
        }
    }

    /// Lets what is there be evicted; false when nothing is.
    pub(crate) fn release(&self) -> bool {
        !std::mem::take(&mut self.lock().pins).is_empty()
    }

    /// Ends the threads when they have finished what they do; nothing is held any more.
    pub(crate) fn stop(&self) {
        *self.lock() = State { stopped: true, ..State::default() };
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change leaves the lists whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What became of a fetch.
pub(crate) enum Fetched {
    /// It is there.
    File(File),
    /// What is in use fills the cache.
    NoRoom,
    /// It is not to be had; whoever needs it hears why.
    Failed,
}
