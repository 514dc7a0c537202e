//! A count on standard error: one line that moves on a terminal, a line every few seconds elsewhere.

use std::cell::RefCell;
use std::io::{self, IsTerminal, Write};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

const TERMINAL_EVERY: Duration = Duration::from_millis(100);
const LINE_EVERY: Duration = Duration::from_secs(5);

/// How far a command is; any thread may tell.
pub(crate) struct Progress {
    what: &'static str,
    terminal: bool,
    begun: Instant,
    shown: Mutex<Option<Instant>>,
}

impl Progress {
    /// `what` is counted, as "rows".
    pub(crate) fn new(what: &'static str) -> Progress {
        Progress { what, terminal: io::stderr().is_terminal(), begun: Instant::now(), shown: Mutex::new(None) }
    }

    /// So many are done of all.
    pub(crate) fn tell(&self, done: u64, all: u64) {
        let every = if self.terminal { TERMINAL_EVERY } else { LINE_EVERY };
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        if shown.unwrap_or(self.begun).elapsed() < every {
            return;
        }
        *shown = Some(Instant::now());
        let line = line(self.what, done, all, self.begun.elapsed());
        let mut stderr = io::stderr().lock();
        // A closed standard error is no reason to stop.
        let _ = if self.terminal { write!(stderr, "\r{line}\x1b[K") } else { writeln!(stderr, "{line}") };
    }
}

impl Drop for Progress {
    /// Takes the moving line away: what comes next is the result.
    fn drop(&mut self) {
        if self.terminal && self.shown.get_mut().unwrap_or_else(PoisonError::into_inner).is_some() {
            let _ = write!(io::stderr().lock(), "\r\x1b[K");
        }
    }
}

/// How far a command is that counts one thing after another.
#[derive(Default)]
pub(crate) struct Phases(RefCell<Option<Progress>>);

impl Phases {
    /// So many are done of all; another `what` than before begins a new count.
    pub(crate) fn tell(&self, what: &'static str, done: u64, all: u64) {
        let mut now = self.0.borrow_mut();
        now.take_if(|progress| progress.what != what);
        now.get_or_insert_with(|| Progress::new(what)).tell(done, all);
    }
}

fn line(what: &str, done: u64, all: u64, elapsed: Duration) -> String {
    let rate = done as f64 / elapsed.as_secs_f64().max(1e-9);
    let left_s = all.saturating_sub(done) as f64 / rate.max(1e-9);
    format!("{done}/{all} {what} | {rate:.0}/s | ETA {left_s:.0}s")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_how_far_how_fast_and_how_long() {
        assert_eq!(line("rows", 50, 200, Duration::from_secs(10)), "50/200 rows | 5/s | ETA 30s");
        assert_eq!(line("rows", 200, 200, Duration::from_secs(10)), "200/200 rows | 20/s | ETA 0s");
    }
}
