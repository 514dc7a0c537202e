//! SIGINT and SIGTERM: while steps are done, the first asks the loop to end after its step and the second ends the process at once;
//! while there is no step to lose, the first ends it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

/// Whether the process was asked to stop.
#[derive(Debug, Clone)]
pub struct StopSignal {
    stop: Arc<AtomicBool>,
    /// The next signal ends the process.
    at_once: Arc<AtomicBool>,
}

impl StopSignal {
    /// Listens from now on; the process keeps these handlers until it ends.
    ///
    /// A signal exits with 130 (SIGINT) or 143 (SIGTERM), but for the first one while [`StopSignal::holding`].
    ///
    /// # Errors
    /// The system refuses a handler.
    pub fn listen() -> io::Result<Self> {
        let (stop, at_once) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(true)));
        for signal in [SIGINT, SIGTERM] {
            // Handlers run in the order of registration: this one finds `at_once` set from the second signal on.
            flag::register_conditional_shutdown(signal, 128 + signal, Arc::clone(&at_once))?;
            flag::register(signal, Arc::clone(&stop))?;
            flag::register(signal, Arc::clone(&at_once))?;
        }
        Ok(Self { stop, at_once })
    }

    /// Does `work` during which the first signal is only noted, since there is something to lose.
    pub fn holding<T>(&self, work: impl FnOnce() -> T) -> T {
        self.at_once.store(self.is_set(), Ordering::SeqCst);
        let result = work();
        self.at_once.store(true, Ordering::SeqCst);
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
        let test = format!("signals::tests::{name}");
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
    }

    #[test]
    #[ignore = "run as a child process by the test above"]
    fn before_there_is_something_to_lose() {
        let _stop = StopSignal::listen().unwrap();
        raise(SIGTERM).unwrap();
    }

    #[test]
    #[ignore = "run as a child process by the test above"]
    fn behind_it() {
        StopSignal::listen().unwrap().holding(|| ());
        raise(SIGINT).unwrap();
    }

    #[test]
    #[ignore = "run as a child process by the test above"]
    fn one_signal() {
        let stop = StopSignal::listen().unwrap();
        stop.holding(|| {
            assert!(!stop.is_set());
            raise(SIGTERM).unwrap();
            assert!(stop.is_set());
        });
    }

    #[test]
    #[ignore = "run as a child process by the test above"]
    fn two_interrupts() {
        StopSignal::listen().unwrap().holding(|| {
            raise(SIGINT).unwrap();
            raise(SIGINT).unwrap();
        });
    }

    #[test]
    #[ignore = "run as a child process by the test above"]
    fn interrupt_then_terminate() {
        StopSignal::listen().unwrap().holding(|| {
            raise(SIGINT).unwrap();
            raise(SIGTERM).unwrap();
        });
    }
}
