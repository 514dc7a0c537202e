//! Finds ranks that are lost or hang, so that the others end with a line that names them.
//!
//! Every rank writes a beat into the store each second: a count, and what it does. Each watches the rank before it in the circle; who misses it,
//! and who fails by itself, writes the verdict that all read.
//!
//! Two threads: one asks the store and may wait for it as long as it likes; the other waits for nothing, and judges how old the last answer is and
//! whether a verdict has had its effect.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use blip2_torchx::dist::Store;
use serde::{Deserialize, Serialize};

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
    /// Seconds since it last entered a phase or a collective, or left one.
    still: u64,
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

/// A verdict on the rank `before`, of which `seen` is heard now and `last` was seen before.
fn lost(before: usize, last: &mut (Option<Beat>, Instant), seen: Option<Beat>, limit: Duration) -> Option<String> {
    let silent_s = limit.as_secs();
    match (&last.0, &seen) {
        (Some(beat), Some(now)) if (&beat.host, beat.pid) != (&now.host, now.pid) => {
            let (gone, come) = (beat.process(), now.process());
            return Some(format!("rank {before} ({gone}) is lost: {come} has come in its place"));
        }
        (beat, seen) if beat != seen => *last = (seen.clone(), Instant::now()),
        (Some(beat), _) if !beat.done && last.1.elapsed() > limit => {
            let (process, place) = (beat.process(), beat.place());
            return Some(format!(
                "rank {before} ({process}) is lost: no sign of life for {silent_s} s, last seen at {place}"
            ));
        }
        (None, _) if last.1.elapsed() > limit => {
            return Some(format!("rank {before} is lost: no sign of life for {silent_s} s since the ranks met"));
        }
        _ => {}
    }
    None
}

fn list(places: &BTreeMap<usize, Beat>) -> String {
    places.iter().map(|(rank, beat)| format!("rank {rank} at {}", beat.place())).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ranks::Meeting;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::sync::atomic::{AtomicBool, Ordering};

    const SHORT: Limits = Limits { lost: Duration::from_secs(3), grace: Duration::from_secs(2) };

    fn watch_with(rank: usize, store: &Store, limits: Limits, abandon: fn(&str)) -> Watch {
        let patience = Duration::from_secs(10);
        let (host, port, job) = ("127.0.0.1".to_owned(), store.port(), String::new());
        let meeting = Meeting { host, port, served: false, job, patience };
        let launch = Launch { rank, world: 2, local_rank: rank, meeting, hang: Duration::from_secs(1) };
        Watch::start(&launch, store.clone(), limits, abandon).unwrap()
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
        for part in ["hangs: rank 1 (process ", "at step 41, reading data", "rank 0 has waited", "adding up gradients"]
        {
            assert!(error.contains(part), "{error}");
        }
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
        let (fails, hangs) =
            (watch(0, &store), watch_with(1, &store, SHORT, |_| ABANDONED.store(true, Ordering::SeqCst)));
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
}
