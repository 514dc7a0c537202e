//! The thread that asks the store, and waits for it as long as it likes: it beats, and looks for ranks that are lost or hang.

use std::collections::BTreeMap;
use std::time::Instant;

use super::Shared;
use super::beat::{Beat, list, lost};
use crate::ranks::STEPPING;

/// A rank that hangs in a step is looked for every so many beats, since all ranks ask about all.
pub(super) const LOOK_AROUND: u64 = 5;

impl Shared {
    /// Beats, and looks at the others, until this rank ends or a verdict is there.
    pub(super) fn ask(&self) {
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
            Some((collective, waited)) if *waited >= hang => self.accuse_who_hangs(collective, *waited, hang)?,
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

    /// Ranks that stand still outside of any collective, for which others have waited so long; else all of them, where each waits for the others.
    ///
    /// A rank that goes on with something long, and one that has just come to the collective, are neither.
    fn accuse_who_hangs(&self, collective: &str, waited: u64, hang: u64) -> Result<(), blip2_torchx::Error> {
        let places = self.all_heard()?;
        let idle: Vec<String> = places
            .iter()
            .filter(|(_, beat)| beat.waits.is_none() && beat.stands(hang))
            .map(|(rank, beat)| format!("rank {rank} ({}) at {}", beat.process(), beat.place()))
            .collect();
        if !idle.is_empty() {
            let (idle, rank) = (idle.join("; "), self.rank);
            self.post(&format!("hangs: {idle}; rank {rank} has waited for {waited} s in: {collective}"));
        } else if places.len() == self.world && places.values().all(|beat| beat.waits.is_some() && beat.stands(hang)) {
            self.post(&format!("every rank has waited for the others for {hang} s: {}", list(&places)));
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

    pub(super) fn heard(&self, rank: usize) -> Result<Option<Beat>, blip2_torchx::Error> {
        Ok(self.store.peek(&format!("beat/{rank}"))?.and_then(|text| serde_json::from_slice(&text).ok()))
    }

    /// The first verdict stands.
    pub(super) fn post(&self, verdict: &str) {
        if self.store.add("verdicts", 1).is_ok_and(|number| number == 1) {
            // Where the store is gone, the others find that out themselves.
            let _ = self.store.set("verdict", verdict.as_bytes());
        }
    }
}
