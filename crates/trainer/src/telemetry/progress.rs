//! The progress line: a bar on a terminal, plain lines elsewhere, with the same content.

use std::collections::VecDeque;
use std::fmt;
use std::io::Write;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::jsonl::Record;

/// Seconds between two plain lines.
const LINE_EVERY_S: u64 = 5;
/// A rank that computes so many times as long as the median of all holds up the others.
const SLOW_RANK: f64 = 1.25;
/// Over how long the rate is measured.
const RATE_WINDOW_S: u64 = 60;

/// Where progress is shown.
pub enum Output {
    /// A bar on standard error, for a terminal: elsewhere it shows nothing.
    Bar,
    /// A line every few seconds.
    Lines(Box<dyn Write + Send>),
    /// Nowhere.
    Hidden,
}

impl fmt::Debug for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bar => "Bar",
            Self::Lines(_) => "Lines",
            Self::Hidden => "Hidden",
        })
    }
}

/// A scalar in the progress line.
#[derive(Debug, Clone, PartialEq)]
pub struct Shown {
    /// Its name in the records.
    pub name: String,
    /// What a model that knows nothing has.
    pub chance: Option<f64>,
    /// The least it can be.
    pub floor: Option<f64>,
}

#[derive(Debug)]
pub(super) struct Progress {
    sink: Sink,
    steps: u64,
    step: u64,
    shown: Vec<Shown>,
    losses: String,
    rate: Rate,
}

enum Sink {
    Bar(ProgressBar),
    Lines { out: Box<dyn Write + Send>, last: Option<Instant> },
    Hidden,
}

impl fmt::Debug for Sink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bar(_) => "Bar",
            Self::Lines { .. } => "Lines",
            Self::Hidden => "Hidden",
        })
    }
}

impl Progress {
    pub(super) fn new(output: Output, steps: u64, start: u64, shown: Vec<Shown>) -> Self {
        let sink = match output {
            Output::Bar => {
                let bar = ProgressBar::with_draw_target(Some(steps), ProgressDrawTarget::stderr()).with_position(start);
                // Two lines: how far, and how well. The template is a constant and parses.
                let style = ProgressStyle::with_template("{wide_bar} {prefix}\n{msg}");
                Sink::Bar(match style {
                    Ok(style) => bar.with_style(style),
                    Err(_) => bar,
                })
            }
            Output::Lines(out) => Sink::Lines { out, last: None },
            Output::Hidden => Sink::Hidden,
        };
        let mut rate = Rate::default();
        rate.push(Instant::now(), start);
        Self { sink, steps, step: start, shown, losses: String::new(), rate }
    }

    pub(super) fn step(&mut self, step: u64) {
        self.step = step;
        self.rate.push(Instant::now(), step);
        if let Sink::Bar(bar) = &self.sink {
            bar.set_prefix(self.pace());
            bar.set_position(step);
        }
    }

    pub(super) fn record(&mut self, record: &Record) {
        let losses = losses(&self.shown, record);
        if losses.is_empty() {
            return;
        }
        self.losses = losses + &slow_rank(record).unwrap_or_default();
        self.step(record.step.max(self.step));
        let now = Instant::now();
        let line = self.line();
        match &mut self.sink {
            Sink::Bar(bar) => bar.set_message(self.losses.clone()),
            Sink::Lines { out, last } => {
                let due = last.is_none_or(|last| now.duration_since(last) >= Duration::from_secs(LINE_EVERY_S));
                if due || self.step >= self.steps {
                    print(out, &line);
                    *last = Some(now);
                }
            }
            Sink::Hidden => {}
        }
    }

    pub(super) fn note(&mut self, line: &str) {
        match &mut self.sink {
            Sink::Bar(bar) => bar.println(line),
            Sink::Lines { out, .. } => print(out, line),
            Sink::Hidden => {}
        }
    }

    pub(super) fn finish(&mut self) {
        if let Sink::Bar(bar) = &self.sink {
            bar.abandon();
        }
    }

    fn line(&self) -> String {
        format!("{} | {}", self.pace(), self.losses)
    }

    /// How far, how fast, how long still.
    fn pace(&self) -> String {
        let percent = 100.0 * self.step as f64 / self.steps.max(1) as f64;
        let mut text = format!("step {}/{} ({percent:.1}%)", self.step, self.steps);
        if let Some(steps_per_s) = self.rate.steps_per_s() {
            let left_s = self.steps.saturating_sub(self.step) as f64 / steps_per_s;
            text += &format!(" | {steps_per_s:.2} steps/s | ETA {}", duration(left_s));
        }
        text
    }
}

/// A closed terminal or pipe ends the display, not the run.
fn print(out: &mut Box<dyn Write + Send>, line: &str) {
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

/// Shown scalars with what they mean: `itc 2.103 (chance 2.773, floor 0.644)`.
fn losses(shown: &[Shown], record: &Record) -> String {
    let one = |shown: &Shown| {
        let value = record.get(&shown.name)?;
        let marks: Vec<String> = [("chance", shown.chance), ("floor", shown.floor)]
            .iter()
            .filter_map(|(word, mark)| Some(format!("{word} {:.3}", (*mark)?)))
            .collect();
        let marks = if marks.is_empty() { String::new() } else { format!(" ({})", marks.join(", ")) };
        Some(format!("{} {value:.3}{marks}", shown.name))
    };
    shown.iter().filter_map(one).collect::<Vec<_>>().join(" | ")
}

/// The rank for which the others wait, where one is clearly slower: ` | rank 3 is slow: 0.52 s a step, the median 0.31 s`.
fn slow_rank(record: &Record) -> Option<String> {
    let seconds = record.scalars.iter().filter(|(name, _)| name.starts_with("rank_s/")).map(|(_, seconds)| *seconds);
    let mut seconds: Vec<f64> = seconds.collect();
    seconds.sort_by(f64::total_cmp);
    // Of two the faster one.
    let median = *seconds.get(seconds.len().checked_sub(1)? / 2)?;
    let (rank, slowest) = (record.get("slowest_rank")?, record.get("slowest_rank_s")?);
    (slowest > SLOW_RANK * median)
        .then(|| format!(" | rank {rank:.0} is slow: {slowest:.2} s a step, the median {median:.2} s"))
}

fn duration(seconds: f64) -> String {
    // Also what an endless time becomes.
    let seconds = seconds.min(1e9) as u64;
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m {:02}s", seconds % 60),
        (0, _, _) => format!("{hours}h {minutes:02}m"),
        _ => format!("{days}d {hours:02}h"),
    }
}

/// Steps per second over a sliding window.
#[derive(Debug, Default)]
struct Rate {
    points: VecDeque<(Instant, u64)>,
}

impl Rate {
    fn push(&mut self, now: Instant, step: u64) {
        // A point a second is enough, but the first two come at once.
        let spacing = Duration::from_secs(if self.points.len() < 2 { 0 } else { 1 });
        if self.points.len() >= 2
            && let Some(&(before_last, _)) = self.points.get(self.points.len() - 2)
            && now.duration_since(before_last) < spacing
        {
            self.points.pop_back();
        }
        self.points.push_back((now, step));
        while self.points.len() > 2
            && self
                .points
                .front()
                .is_some_and(|(then, _)| now.duration_since(*then) > Duration::from_secs(RATE_WINDOW_S))
        {
            self.points.pop_front();
        }
    }

    fn steps_per_s(&self) -> Option<f64> {
        let ((then, from), (now, to)) = (self.points.front()?, self.points.back()?);
        let seconds = now.duration_since(*then).as_secs_f64();
        (seconds > 0.0 && to > from).then(|| (to - from) as f64 / seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn shown() -> Vec<Shown> {
        vec![
            Shown { name: "loss_itc".into(), chance: Some(2.7726), floor: Some(0.5) },
            Shown { name: "loss_itg".into(), chance: None, floor: None },
        ]
    }

    #[test]
    fn lines_say_step_losses_chance_and_floor() {
        let out = Shared::default();
        let mut progress = Progress::new(Output::Lines(Box::new(out.clone())), 100, 0, shown());
        progress.record(&Record::new(20, [("loss_itg", 7.0), ("loss_itc", 2.0), ("lr", 1e-4)]));
        progress.record(&Record::new(40, [("loss_itc", 1.0)]));
        progress.note("checkpoint written");
        progress.record(&Record::new(100, [("loss_itc", 0.9)]));
        progress.finish();
        let text = String::from_utf8(out.0.lock().unwrap().clone()).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3, "the second record comes too soon, the last one always: {text}");
        assert!(lines[0].starts_with("step 20/100 (20.0%)"), "{text}");
        assert!(lines[0].ends_with("| loss_itc 2.000 (chance 2.773, floor 0.500) | loss_itg 7.000"), "{text}");
        assert_eq!(lines[1], "checkpoint written");
        assert!(lines[2].starts_with("step 100/100 (100.0%)"), "{text}");
    }

    #[test]
    fn a_rank_that_is_clearly_slower_is_named() {
        let said = |seconds: &[f64]| {
            let slowest = seconds.iter().copied().fold(0.0, f64::max);
            let rank = seconds.iter().position(|&s| s == slowest).unwrap() as f64;
            let each = seconds.iter().enumerate().map(|(rank, &s)| (format!("rank_s/{rank}"), s));
            let ends = [("slowest_rank".to_owned(), rank), ("slowest_rank_s".to_owned(), slowest)];
            slow_rank(&Record::new(1, each.chain(ends)))
        };
        assert_eq!(said(&[0.3, 0.32, 0.35, 0.31]), None);
        let slow = said(&[0.3, 0.32, 0.35, 0.7]).unwrap();
        assert_eq!(slow, " | rank 3 is slow: 0.70 s a step, the median 0.32 s");
        assert!(said(&[0.3, 0.6]).unwrap().starts_with(" | rank 1 is slow"));
        assert_eq!(slow_rank(&Record::new(1, [("loss", 1.0)])), None);
    }

    #[test]
    fn a_bar_takes_steps_records_and_notes() {
        let mut progress = Progress::new(Output::Bar, 10, 2, shown());
        progress.step(3);
        progress.note("checkpoint written");
        progress.record(&Record::new(4, [("loss_itc", 2.0)]));
        progress.finish();
        let Sink::Bar(bar) = &progress.sink else { panic!("expected a bar") };
        assert_eq!((bar.position(), bar.length()), (4, Some(10)));
        assert_eq!(bar.message(), "loss_itc 2.000 (chance 2.773, floor 0.500)");
        assert!(bar.prefix().starts_with("step 4/10 (40.0%)"));
    }

    #[test]
    fn a_closed_pipe_does_not_end_the_run() {
        struct Closed;
        impl Write for Closed {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::BrokenPipe.into())
            }

            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let mut progress = Progress::new(Output::Lines(Box::new(Closed)), 10, 0, shown());
        progress.record(&Record::new(1, [("loss_itc", 2.0)]));
        assert_eq!(progress.step, 1);
    }

    #[test]
    fn the_rate_is_that_of_the_last_minute() {
        let start = Instant::now();
        let mut rate = Rate::default();
        assert_eq!(rate.steps_per_s(), None);
        for second in 0..=100 {
            rate.push(start + Duration::from_secs(second), second * 2);
        }
        for second in 101..=200 {
            rate.push(start + Duration::from_secs(second), 200 + (second - 100) * 10);
        }
        assert!((rate.steps_per_s().unwrap() - 10.0).abs() < 1e-9);
        assert!(rate.points.len() <= 62);
    }

    #[test]
    fn many_steps_a_second_keep_few_points() {
        let start = Instant::now();
        let mut rate = Rate::default();
        for step in 0..100_000u64 {
            rate.push(start + Duration::from_millis(step), step);
        }
        assert!((rate.steps_per_s().unwrap() - 1000.0).abs() < 1.0);
        assert!(rate.points.len() < 100, "{}", rate.points.len());
    }

    #[test]
    fn durations_read_well() {
        let read: Vec<String> = [5.0, 65.0, 3700.0, 100_000.0].iter().map(|&s| duration(s)).collect();
        assert_eq!(read, ["5s", "1m 05s", "1h 01m", "1d 03h"]);
        assert!(duration(f64::INFINITY).ends_with("h"));
    }
}
