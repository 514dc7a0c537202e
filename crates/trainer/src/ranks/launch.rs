//! How a launcher started this process among others.

use std::time::Duration;

/// Where the ranks of a launch meet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Meeting {
    /// Host of the store.
    pub host: String,
    /// Its port.
    pub port: u16,
    /// Whether someone else serves it, as torchrun's agent does; else rank 0 does.
    pub served: bool,
    /// Tells one job from another at the same store; its starts need not be told apart.
    pub job: String,
    /// How long the ranks wait for each other to come.
    pub patience: Duration,
}

/// This process among those that were started together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    /// Its number, from 0.
    pub rank: usize,
    /// How many there are.
    pub world: usize,
    /// Its number among those of its host, from 0.
    pub local_rank: usize,
    /// Where they meet.
    pub meeting: Meeting,
    /// A rank for which another has waited this long hangs.
    pub hang: Duration,
}
