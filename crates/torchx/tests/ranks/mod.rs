//! Ranks as threads of one process, each with a connection to the store and a group of its own.

use std::thread;
use std::time::Duration;

use blip2_torchx::dist::{Group, Store};

pub const HOST: &str = "127.0.0.1";
/// The store looks up the name of every address that connects, which takes seconds where no name server answers.
pub const LONG: Duration = Duration::from_secs(60);

pub fn serve() -> Store {
    Store::serve(HOST, 0, LONG).unwrap()
}

/// Runs `body` as every rank of a group, and gives what each answered.
#[allow(dead_code, reason = "every test program has its own copy")]
pub fn ranks<T: Send>(world: usize, timeout: Duration, body: impl Fn(Group) -> T + Sync) -> Vec<T> {
    let server = serve();
    let body = &body;
    thread::scope(|scope| {
        let running: Vec<_> = (0..world)
            .map(|rank| {
                let port = server.port();
                scope.spawn(move || {
                    let store = Store::connect(HOST, port, LONG).unwrap().with_prefix("group");
                    body(Group::join(&store, rank, world, timeout).unwrap())
                })
            })
            .collect();
        running.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}
