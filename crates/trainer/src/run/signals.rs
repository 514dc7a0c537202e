//! SIGINT and SIGTERM: while steps are done, the first asks the loop to end after its step and the second ends the process at once;
//! while there is no step to lose, the first ends it.
//!
//! Launchers pass on what reaches their processes too, so that one request comes as two: `scancel` and a pod's end send SIGTERM to torchrun and to
//! its ranks, Ctrl-C in torchrun's terminal SIGINT. The same signal within [`REPEATED_WITHIN`] of the first is therefore the same request. A second
//! SIGINT that no launcher can have sent is a person's, and ends the process at once.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;
use signal_hook::iterator::Signals;

const SIGNALS: [i32; 2] = [SIGINT, SIGTERM];

/// A signal that comes again so soon is a launcher's repetition of the first.
pub const REPEATED_WITHIN: Duration = Duration::from_secs(2);

/// Whether the process was asked to stop.
#[derive(Debug, Clone)]
pub struct StopSignal {
    stop: Arc<AtomicBool>,
    /// The next one of each of [`SIGNALS`] ends the process.
    at_once: [Arc<AtomicBool>; 2],
}

impl StopSignal {
    /// Listens from now on; the process keeps these handlers until it ends.
    ///
    /// A signal exits with 130 (SIGINT) or 143 (SIGTERM), but for the first one while [`StopSignal::holding`], and the same one again within
    /// [`REPEATED_WITHIN`] of it: SIGTERM always, SIGINT where this process is one of several that were `launched` together.
    ///
    /// # Errors
    /// The system refuses a handler or a thread.
    pub fn listen(launched: bool) -> io::Result<Self> {
        let (stop, at_once) = (Arc::default(), [true, true].map(|set| Arc::new(AtomicBool::new(set))));
        for (place, signal) in SIGNALS.into_iter().enumerate() {
            // Handlers run in the order of registration: this one finds what earlier signals have set.
            flag::register_conditional_shutdown(signal, 128 + signal, Arc::clone(&at_once[place]))?;
            flag::register(signal, Arc::clone(&stop))?;
            for (other, at_once) in at_once.iter().enumerate() {
                let repeats = other == place && (signal == SIGTERM || launched);
                if !repeats {
                    flag::register(signal, Arc::clone(at_once))?;
                }
            }
        }
        let (mut signals, later) = (Signals::new(SIGNALS)?, at_once.clone());
        let first = move || {
            if signals.forever().next().is_some() {
                thread::sleep(REPEATED_WITHIN);
                later.iter().for_each(|at_once| at_once.store(true, Ordering::SeqCst));
            }
        };
        thread::Builder::new().name("signals".into()).spawn(first)?;
        Ok(Self { stop, at_once })
    }

    /// Does `work` during which the first signal is only noted, since there is something to lose.
    pub fn holding<T>(&self, work: impl FnOnce() -> T) -> T {
        let store = |set| self.at_once.iter().for_each(|at_once| at_once.store(set, Ordering::SeqCst));
        store(self.is_set());
        let result = work();
        store(true);
        result
    }

    /// Whether a signal came: finish the step, write a checkpoint, end.
    pub fn is_set(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use signal_hook::low_level::raise;
    use std::process::Command;

    /// Runs one of the ignored tests below in a process of its own and returns its exit status.
    fn child(name: &str) -> Option<i32> {
        let test = format!("run::signals::tests::{name}");
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", &test, "--ignored", "--test-threads", "1"]).output().unwrap().status.code()
    }

    #[test]
    fn the_first_signal_sets_the_flag_and_the_second_ends_at_once() {
        assert_eq!(child("before_there_is_something_to_lose"), Some(143));
        assert_eq!(child("behind_it"), Some(130));
        assert_eq!(child("one_signal"), Some(0));
        assert_eq!(child("two_interrupts"), Some(130));
        assert_eq!(child("interrupt_then_terminate"), Some(143));
        assert_eq!(child("terminate_then_interrupt"), Some(130));
    }

    #[test]
    fn what_a_launcher_sends_again_is_the_same_request_and_what_comes_later_is_not() {
        assert_eq!(child("two_terminations_at_once"), Some(0));
        assert_eq!(child("two_interrupts_at_once_of_a_launch"), Some(0));
        assert_eq!(child("two_terminations"), Some(143));
    }

    #[test]
    #[ignore = "run as a child process by the test above"]
    fn two_terminations_at_once() {
        StopSignal::listen(false).unwrap().holding(|| {
            raise(SIGTERM).unwrap();
            raise(SIGTERM).unwrap();
        });
    }

    #[test]
    #[ignore = "run as a child process by the test above"]
    fn two_interrupts_at_once_of_a_launch() {
        StopSignal::listen(true).unwrap().holding(|| {
            raise(SIGINT).unwrap();
            raise(SIGINT).unwrap();
        });
    }

    #[test]
    #[ignore = "run as a child process by the test above"]
    fn two_terminations() {
        StopSignal::listen(false).unwrap().holding(|| {
            raise(SIGTERM).unwrap();
            thread::sleep(REPEATED_WITHIN + Duration::from_secs(2));
            raise(SIGTERM).unwrap();
        });
    }

    #[test]
    #[ignore = "run as a child process by the test above"]
    fn terminate_then_interrupt() {
        StopSignal::listen(true).unwrap().holding(|| {
            raise(SIGTERM).unwrap();
            raise(SIGINT).unwrap();
        });
    }

    #[test]
    #[ignore = "run as a child process by the test above"]
    fn before_there_is_something_to_lose() {
        let _stop = StopSignal::listen(false).unwrap();
        raise(SIGTERM).unwrap();
    }

    #[test]
    #[ignore = "run as a child process by the test above"]
    fn behind_it() {
        StopSignal::listen(false).unwrap().holding(|| ());
        raise(SIGINT).unwrap();
    }

    #[test]
    #[ignore = "run as a child process by the test above"]
    fn one_signal() {
        let stop = StopSignal::listen(false).unwrap();
        stop.holding(|| {
            assert!(!stop.is_set());
            raise(SIGTERM).unwrap();
            assert!(stop.is_set());
        });
    }

    #[test]
    #[ignore = "run as a child process by the test above"]
    fn two_interrupts() {
        StopSignal::listen(false).unwrap().holding(|| {
            raise(SIGINT).unwrap();
            raise(SIGINT).unwrap();
        });
    }

    #[test]
    #[ignore = "run as a child process by the test above"]
    fn interrupt_then_terminate() {
        StopSignal::listen(false).unwrap().holding(|| {
            raise(SIGINT).unwrap();
            raise(SIGTERM).unwrap();
        });
    }
}
