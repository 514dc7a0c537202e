//! How often and how long faults are borne.

use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::Retries;

/// What went wrong with a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) kind: Kind,
    pub(crate) reason: String,
}

/// What another try can be expected to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// It may well succeed.
    Passing,
    /// It may, if the machine's own service for credentials was only late.
    NoCredentials,
    /// There is no such object.
    NotFound,
    /// It is not the object that was indexed.
    Changed,
    /// The server cannot go on in the middle of an object.
    NoRanges,
    /// It will fail the same way.
    Lasting,
}

impl Fault {
    pub(crate) fn new(kind: Kind, reason: impl Into<String>) -> Fault {
        Fault { kind, reason: reason.into() }
    }
}

/// No machine's service for credentials needs more.
const CREDENTIAL_TRIES: u32 = 3;
/// The longest wait, in first waits.
const LONGEST: u32 = 100;
/// How soon a stop is noticed.
const SLICE: Duration = Duration::from_millis(20);

/// Counts the faults of one task and says when it is to be given up.
pub(crate) struct Patience<'a> {
    retries: &'a Retries,
    stop: &'a AtomicBool,
    faults: u32,
    since: Instant,
}

impl<'a> Patience<'a> {
    pub(crate) fn new(retries: &'a Retries, stop: &'a AtomicBool) -> Self {
        Self { retries, stop, faults: 0, since: Instant::now() }
    }

    /// That of somebody who has waited before for others' tries.
    pub(crate) fn having_waited(self, waited: Duration) -> Self {
        Self { since: self.since.checked_sub(waited).unwrap_or(self.since), ..self }
    }

    /// Something has arrived: what went wrong before does not count any more.
    pub(crate) fn progress(&mut self) {
        (self.faults, self.since) = (0, Instant::now());
    }

    /// Waits until the next try is due.
    ///
    /// # Errors
    /// With the fault, when there is to be none.
    pub(crate) fn wait(&mut self, fault: Fault) -> Result<(), Fault> {
        let tries = match fault.kind {
            Kind::Passing | Kind::NoRanges => self.retries.tries,
            Kind::NoCredentials => self.retries.tries.min(CREDENTIAL_TRIES),
            Kind::NotFound | Kind::Changed | Kind::Lasting => return Err(fault),
        };
        self.faults += 1;
        let wait = self.retries.first_wait * (1 << (self.faults - 1).min(16)).min(LONGEST);
        // Between a half and the whole of it, so that many who were refused at once do not come back at once.
        let chance = RandomState::new().hash_one(0) as f64 / u64::MAX as f64;
        let left = self.retries.give_up.saturating_sub(self.since.elapsed());
        let wait = wait.mul_f64(0.5 + 0.5 * chance).min(left);
        if self.faults >= tries || left.is_zero() {
            let (tries, seconds) = (self.faults, self.since.elapsed().as_secs_f64());
            let reason = format!("{} (given up after {tries} tries in {seconds:.1} s)", fault.reason);
            return Err(Fault::new(fault.kind, reason));
        }
        let due = Instant::now() + wait;
        while Instant::now() < due {
            if self.stop.load(Ordering::Relaxed) {
                return Err(Fault::new(Kind::Lasting, "stopped"));
            }
            thread::sleep(SLICE.min(due.saturating_duration_since(Instant::now())));
        }
        Ok(())
    }

    /// Tries a request until it succeeds or is to be given up.
    pub(crate) fn of<T>(
        retries: &Retries,
        stop: &AtomicBool,
        mut request: impl FnMut() -> Result<T, Fault>,
    ) -> Result<T, Fault> {
        let mut patience = Patience::new(retries, stop);
        loop {
            match request() {
                Ok(done) => return Ok(done),
                Err(fault) => patience.wait(fault)?,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUICK: Retries = Retries {
        tries: 4,
        give_up: Duration::from_secs(10),
        timeout: Duration::from_secs(1),
        first_wait: Duration::from_millis(1),
    };

    fn tries(retries: &Retries, kind: Kind) -> (u32, Fault) {
        let mut tries = 0;
        let fault = Patience::of::<()>(retries, &AtomicBool::new(false), || {
            tries += 1;
            Err(Fault::new(kind, "why"))
        });
        (tries, fault.unwrap_err())
    }

    #[test]
    fn faults_that_pass_are_tried_again_and_others_are_not() {
        assert_eq!(tries(&QUICK, Kind::Passing).0, 4);
        assert_eq!(tries(&QUICK, Kind::NoCredentials).0, 3);
        for kind in [Kind::NotFound, Kind::Changed, Kind::Lasting] {
            assert_eq!(tries(&QUICK, kind), (1, Fault::new(kind, "why")));
        }
        assert!(tries(&QUICK, Kind::Passing).1.reason.starts_with("why (given up after 4 tries in "));
        let impatient = Retries { give_up: Duration::ZERO, ..QUICK };
        assert_eq!(tries(&impatient, Kind::Passing).0, 1);
    }

    #[test]
    fn without_a_bound_on_tries_time_alone_ends_them() {
        let retries = Retries { tries: u32::MAX, give_up: Duration::from_millis(60), ..QUICK };
        let begin = Instant::now();
        assert!(tries(&retries, Kind::Passing).0 >= 2);
        assert!(begin.elapsed() >= retries.give_up);
        assert_eq!(Retries::default().tries, u32::MAX);
        let stop = AtomicBool::new(false);
        let mut waited = Patience::new(&retries, &stop).having_waited(retries.give_up);
        assert!(waited.wait(Fault::new(Kind::Passing, "cut")).is_err());
    }

    #[test]
    fn what_arrives_wipes_the_slate() {
        let stop = AtomicBool::new(false);
        let mut patience = Patience::new(&QUICK, &stop);
        for _ in 0..20 {
            patience.wait(Fault::new(Kind::Passing, "cut")).unwrap();
            patience.progress();
        }
    }

    #[test]
    fn a_stop_ends_the_waiting() {
        let slow = Retries { first_wait: Duration::from_secs(8), ..QUICK };
        let begin = Instant::now();
        let fault = Patience::new(&slow, &AtomicBool::new(true)).wait(Fault::new(Kind::Passing, "cut")).unwrap_err();
        assert_eq!(fault.reason, "stopped");
        assert!(begin.elapsed() < Duration::from_secs(2));
    }
}
