//! The threads that decode ahead: jobs are started in order, run side by side, and are collected in order.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crossbeam_channel::{Receiver, bounded};
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::DataError;

/// A pool of threads that stops when it is dropped: what has not begun by then is not begun.
pub(crate) struct Workers {
    pool: ThreadPool,
    stop: Arc<AtomicBool>,
}

impl Workers {
    pub(crate) fn new(threads: usize) -> Result<Workers, DataError> {
        let pool =
            ThreadPoolBuilder::new().num_threads(threads).thread_name(|thread| format!("decode-{thread}")).build();
        let pool = pool.map_err(|error| DataError::Threads { threads, reason: error.to_string() })?;
        Ok(Workers { pool, stop: Arc::default() })
    }

    /// Starts `job(0)` to `job(count - 1)`. The job must not panic.
    pub(crate) fn start<T: Send + 'static>(
        &self,
        count: usize,
        job: impl Fn(usize) -> T + Send + Sync + 'static,
    ) -> Pending<T> {
        let (sender, receiver) = bounded(count);
        let job = Arc::new(job);
        for number in 0..count {
            let (job, sender, stop) = (Arc::clone(&job), sender.clone(), Arc::clone(&self.stop));
            self.pool.spawn(move || {
                if !stop.load(Ordering::Relaxed) {
                    // The receiver is gone when the results are no longer wanted.
                    let _ = sender.send((number, job(number)));
                }
            });
        }
        Pending { receiver, count }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Results on their way.
pub(crate) struct Pending<T> {
    receiver: Receiver<(usize, T)>,
    count: usize,
}

impl<T> Pending<T> {
    /// Waits for all results, in the order of their jobs; `None` when a thread was lost.
    pub(crate) fn wait(self) -> Option<Vec<T>> {
        let mut results: Vec<Option<T>> = (0..self.count).map(|_| None).collect();
        for _ in 0..self.count {
            let (number, result) = self.receiver.recv().ok()?;
            results[number] = Some(result);
        }
        results.into_iter().collect()
    }
}

/// Batches on their way, the next one in front.
pub(crate) type Queue<T> = VecDeque<(u64, Pending<T>)>;
