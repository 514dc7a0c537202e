//! Lines about the shards of a set that is being opened: where they lie elsewhere, looking at them for the first time can take hours.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How often a line is said.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// What [`blip2_data::OpenOptions::progress`] takes.
pub(crate) type Progress = Arc<dyn Fn(usize, usize) + Send + Sync>;

/// How a set of shards is opened.
#[derive(Debug, Clone, Copy, Default)]
pub struct SetOpening {
    /// Hears lines about shards that are being looked at.
    pub say: Option<fn(&str)>,
    /// Nothing is written beside the shards.
    pub dry_run: bool,
}

/// Says every few seconds how many shards of the set `key` have been looked at; nothing where that is soon done.
pub(crate) fn index_lines(key: String, say: impl Fn(&str) + Send + Sync + 'static) -> Progress {
    lines(key, say, LINE_EVERY)
}

fn lines(key: String, say: impl Fn(&str) + Send + Sync + 'static, every: Duration) -> Progress {
    let last = Mutex::new(Instant::now());
    Arc::new(move |done, all| {
        let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.elapsed() >= every {
            *last = Instant::now();
            say(&format!("{key}: {done} of {all} shards looked at"));
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_said_when_one_is_due() {
        let said = Arc::new(Mutex::new(Vec::new()));
        let tell = |every| {
            let heard = Arc::clone(&said);
            let say = move |line: &str| heard.lock().unwrap().push(line.to_owned());
            let progress = lines("data.val".to_owned(), say, every);
            progress(1, 9);
            progress(9, 9);
        };
        tell(LINE_EVERY);
        assert!(said.lock().unwrap().is_empty());
        tell(Duration::ZERO);
        let expected = ["data.val: 1 of 9 shards looked at", "data.val: 9 of 9 shards looked at"];
        assert_eq!(*said.lock().unwrap(), expected);
    }
}
