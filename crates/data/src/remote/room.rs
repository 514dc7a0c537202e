//! Who in this process holds files of a cache, and how they give way: to each other, and to other processes.
//!
//! An open file is not evicted. So whoever needs room has those closed that nobody reads: of all sets of this process at
//! once, and by way of a lock in the folder, at which every process looks, of the others.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use super::cache::is_asked;

/// How often it is looked whether another process asks for room.
const LOOK: Duration = Duration::from_millis(50);

/// One room for each cache folder that this process uses.
static ROOMS: Mutex<Vec<Weak<Room>>> = Mutex::new(Vec::new());

/// Those who hold files of one cache.
pub(crate) struct Room {
    dir: PathBuf,
    members: Mutex<Vec<Weak<dyn Member>>>,
}

/// Holds files of the cache.
pub(crate) trait Member: Send + Sync {
    /// Closes what was fetched ahead; false when there is none.
    fn release_ahead(&self) -> bool;
    /// Closes one file that was read and is not being read; false when there is none.
    fn release_idle(&self) -> bool;
    /// Bytes that it has in use at once.
    fn needs(&self) -> u64;
}

impl Room {
    /// The room of a folder that is there.
    pub(crate) fn of(dir: &Path) -> Arc<Room> {
        // By its own path, however it was named.
        let dir = fs::canonicalize(dir).unwrap_or_else(|_| dir.to_owned());
        let mut rooms = lock(&ROOMS);
        rooms.retain(|room| room.strong_count() > 0);
        if let Some(room) = rooms.iter().filter_map(Weak::upgrade).find(|room| room.dir == dir) {
            return room;
        }
        let room = Arc::new(Room { dir, members: Mutex::default() });
        rooms.push(Arc::downgrade(&room));
        let watched = Arc::downgrade(&room);
        // Without the thread other processes wait until what is held here is closed in its time.
        let _ = thread::Builder::new().name("cache-room".to_owned()).spawn(move || watch(&watched));
        room
    }

    pub(crate) fn join(&self, member: Weak<dyn Member>) {
        let mut members = lock(&self.members);
        members.retain(|member| member.strong_count() > 0);
        members.push(member);
    }

    /// Closes something that can be done without; false when there is nothing.
    pub(crate) fn give_way(&self) -> bool {
        let members = self.members();
        let mut released = false;
        for member in &members {
            released |= member.release_ahead();
        }
        released || members.iter().any(|member| member.release_idle())
    }

    /// Bytes that all who hold files have in use at once.
    pub(crate) fn needs(&self) -> u64 {
        self.members().iter().map(|member| member.needs()).fold(0, u64::saturating_add)
    }

    fn members(&self) -> Vec<Arc<dyn Member>> {
        lock(&self.members).iter().filter_map(Weak::upgrade).collect()
    }
}

/// Gives way to other processes, until nobody uses the room any more.
fn watch(room: &Weak<Room>) {
    loop {
        thread::sleep(LOOK);
        let Some(room) = room.upgrade() else { return };
        if is_asked(&room.dir) {
            room.give_way();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change leaves the lists whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    /// Numbers of files fetched ahead, and idle.
    #[derive(Default)]
    struct Files(AtomicU64, AtomicU64);

    impl Member for Files {
        fn release_ahead(&self) -> bool {
            self.0.swap(0, Ordering::Relaxed) > 0
        }

        fn release_idle(&self) -> bool {
            self.1.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |idle| idle.checked_sub(1)).is_ok()
        }

        fn needs(&self) -> u64 {
            5
        }
    }

    #[test]
    fn what_was_fetched_ahead_goes_before_what_was_read_and_one_room_serves_a_folder() {
        let dir = tempfile::tempdir().unwrap();
        let room = Room::of(dir.path());
        let same = Room::of(&dir.path().join("."));
        assert!(Arc::ptr_eq(&room, &same));
        let (a, b) = (Arc::new(Files(2.into(), 1.into())), Arc::new(Files(1.into(), 1.into())));
        room.join(Arc::downgrade(&a) as Weak<dyn Member>);
        same.join(Arc::downgrade(&b) as Weak<dyn Member>);
        assert_eq!(room.needs(), 10);
        let left = || [&a.0, &b.0, &a.1, &b.1].map(|count| count.load(Ordering::Relaxed));
        assert!(room.give_way());
        assert_eq!(left(), [0, 0, 1, 1]);
        assert!(room.give_way() && room.give_way() && !room.give_way());
        assert_eq!(left(), [0; 4]);
        drop(a);
        assert_eq!(room.needs(), 5);
    }
}
