//! Shards in use: open files with their indices, kept for the samples to come.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// How many shards are kept where nobody says how many are read from in turn.
const KEEP: usize = 64;

/// Values by the number of their shard, that which was used last at the end.
pub(crate) struct LoadedShards<T> {
    slots: Mutex<VecDeque<Slot<T>>>,
    /// At most so many.
    keep: AtomicUsize,
}

struct Slot<T> {
    shard: usize,
    /// Filled by the first who needs it, without holding up those who need other shards.
    loaded: Arc<Mutex<Option<Arc<T>>>>,
}

impl<T> Default for LoadedShards<T> {
    fn default() -> Self {
        Self { slots: Mutex::default(), keep: AtomicUsize::new(KEEP) }
    }
}

impl<T> LoadedShards<T> {
    /// What there is of a shard, or what `load` makes of it.
    pub(crate) fn get<E>(&self, shard: usize, load: impl FnOnce() -> Result<T, E>) -> Result<Arc<T>, E> {
        let slot = {
            let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
            let known = slots.iter().position(|slot| slot.shard == shard).and_then(|place| slots.remove(place));
            let slot = known.unwrap_or_else(|| Slot { shard, loaded: Arc::default() });
            let loaded = Arc::clone(&slot.loaded);
            slots.push_back(slot);
            if slots.len() > self.keep.load(Ordering::Relaxed) {
                slots.pop_front();
            }
            loaded
        };
        let mut loaded = slot.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(loaded) = &*loaded {
            return Ok(Arc::clone(loaded));
        }
        let fresh = Arc::new(load()?);
        *loaded = Some(Arc::clone(&fresh));
        Ok(fresh)
    }

    /// Keeps `count` shards or more: fewer than are read from in turn would be opened and closed all the time.
    pub(crate) fn keep_at_least(&self, count: usize) {
        self.keep.fetch_max(count, Ordering::Relaxed);
    }

    /// Lets go of the shards that `keep` does not name; who reads one of them reads on.
    pub(crate) fn retain(&self, keep: impl Fn(usize) -> bool) {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner).retain(|slot| keep(slot.shard));
    }

    /// Closes the shard that was used longest ago of those that nobody reads; false when there is none.
    pub(crate) fn close_one(&self) -> bool {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        // Under the list's lock nobody can begin to use what the list alone holds.
        let idle = slots.iter_mut().position(|slot| {
            let loaded = Arc::get_mut(&mut slot.loaded).map(|loaded| loaded.get_mut());
            let loaded = loaded.and_then(|loaded| loaded.unwrap_or_else(PoisonError::into_inner).as_ref());
            loaded.is_some_and(|loaded| Arc::strong_count(loaded) == 1)
        });
        idle.and_then(|place| slots.remove(place)).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn get(shards: &LoadedShards<usize>, shard: usize) -> (Arc<usize>, bool) {
        let mut made = false;
        let loaded = shards.get(shard, || {
            made = true;
            Ok::<_, ()>(shard)
        });
        (loaded.unwrap(), made)
    }

    #[test]
    fn what_nobody_reads_is_closed_from_the_longest_unused_on() {
        let shards = LoadedShards::default();
        let (read, _) = get(&shards, 1);
        (2..6).for_each(|shard| drop(get(&shards, shard)));
        assert!(!get(&shards, 2).1);
        assert!(shards.get(9, || Err("unreadable")).is_err());
        assert!(shards.close_one());
        assert!(!get(&shards, 2).1 && get(&shards, 3).1);
        shards.retain(|shard| shard < 4);
        assert!(shards.close_one() && shards.close_one() && !shards.close_one());
        assert!(!get(&shards, 1).1);
        drop(read);
        assert!(shards.close_one() && get(&shards, 1).1);
    }

    #[test]
    fn no_more_are_kept_than_the_limit() {
        let shards = LoadedShards::default();
        (0..=KEEP).for_each(|shard| drop(get(&shards, shard)));
        assert!(!get(&shards, 1).1 && get(&shards, 0).1);
    }

    #[test]
    fn as_many_are_kept_as_are_read_in_turn() {
        let shards = LoadedShards::default();
        shards.keep_at_least(2 * KEEP);
        shards.keep_at_least(1);
        for round in 0..2 {
            let made = (0..2 * KEEP).filter(|&shard| get(&shards, shard).1).count();
            assert_eq!(made, if round == 0 { 2 * KEEP } else { 0 });
        }
    }

    #[test]
    fn a_shard_that_is_being_loaded_is_in_use() {
        let shards = LoadedShards::default();
        let loaded = shards.get(0, || Ok::<_, ()>(shards.close_one()));
        assert!(!*loaded.unwrap());
    }
}
