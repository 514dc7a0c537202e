//! The thread that waits for nothing: it judges how old the store's last answer is, and sees to it that a verdict has its effect.

use std::sync::PoisonError;
use std::thread;
use std::time::Instant;

use super::Shared;

impl Shared {
    /// Waits for this rank's end or a verdict, which it carries out. Asks nobody.
    pub(super) fn judge(&self) {
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
