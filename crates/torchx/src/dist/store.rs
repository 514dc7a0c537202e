//! c10d's TCPStore: keys and bytes that all processes of a run see.

use std::ffi::c_int;
use std::ptr::{self, NonNull};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tch::Tensor;

use super::{milliseconds, one_line};
use crate::error::Error;
use crate::ffi::{self, CStore, Text};

/// A store that one process serves and all others join.
///
/// Clones share the connection and may be used from several threads: a call that waits has a connection of its own, so
/// it holds up no other.
#[derive(Clone)]
pub struct Store {
    shared: Arc<Shared>,
    prefix: String,
}

struct Shared {
    /// For what is answered at once. Where the store is served here, the server lives in it.
    main: Connection,
    /// Connections for what waits, while nobody uses them.
    idle: Mutex<Vec<Connection>>,
    host: String,
    port: u16,
    timeout: Duration,
}

impl Store {
    /// Joins the store that another process serves: `torchrun`'s agent, or rank 0.
    ///
    /// It is tried again until it answers, for `timeout`, which is also the limit of every single call.
    ///
    /// # Errors
    /// [`Error::StoreUnreachable`] where nobody answers in time.
    pub fn connect(host: &str, port: u16, timeout: Duration) -> Result<Self, Error> {
        Self::open(host, port, false, timeout)
    }

    /// Serves a store in this process, on all its addresses, and joins it at `host`; port 0 takes any that is free.
    ///
    /// It is served while a clone of it or a [`Group`](super::Group) made from it lives.
    ///
    /// # Errors
    /// [`Error::PortInUse`], and [`Error::StoreUnreachable`] where `host` is not this machine.
    pub fn serve(host: &str, port: u16, timeout: Duration) -> Result<Self, Error> {
        Self::open(host, port, true, timeout)
    }

    /// The port at which the store is served.
    pub fn port(&self) -> u16 {
        self.shared.port
    }

    /// The prefix through which it is seen.
    pub fn path(&self) -> &str {
        &self.prefix
    }

    /// The same store seen through a prefix: `key` is `prefix/key` in this one, as with c10d's PrefixStore.
    pub fn with_prefix(&self, prefix: &str) -> Self {
        Self { shared: Arc::clone(&self.shared), prefix: self.key(prefix) }
    }

    /// Sets the value of a key, in place of an earlier one. When it returns, everyone sees it.
    ///
    /// # Errors
    /// [`Error::Store`] where the server is gone.
    pub fn set(&self, key: &str, value: &[u8]) -> Result<(), Error> {
        let full = self.key(key);
        let store = self.shared.main.as_ptr();
        // SAFETY: a live store, and texts and bytes that are borrowed for the call.
        let code = unsafe { ffi::torchx_store_set(store, Text::of(&full), value.as_ptr(), value.len()) };
        self.check("set", &full, code)?;
        // c10d only sends the value; what is answered behind it says that it has come.
        self.has(&[key])?;
        Ok(())
    }

    /// The value of a key, for which it waits until someone sets it.
    ///
    /// # Errors
    /// [`Error::Store`] where nobody did within `timeout`, or the server is gone.
    pub fn get(&self, key: &str, timeout: Duration) -> Result<Vec<u8>, Error> {
        // A server that is gone fails this at once, where a new connection to it would be tried for long.
        self.has(&[key])?;
        let key = self.key(key);
        let connection = self.connection()?;
        let bytes = ffi::new_tensor("get", |out| {
            // SAFETY: a live store that no other thread uses now, and a borrowed text.
            unsafe { ffi::torchx_store_get(connection.as_ptr(), Text::of(&key), milliseconds(timeout), out) }
        });
        match bytes {
            Ok(bytes) => {
                self.idle().push(connection);
                Ok(to_vec(&bytes))
            }
            Err(Error::Torch { message, .. }) => Err(self.error("get", &key, &message)),
            Err(other) => Err(other),
        }
    }

    /// The value of a key that is there. Unlike [`get`](Self::get) it never opens a connection.
    ///
    /// # Errors
    /// [`Error::Store`] where the server is gone. A key that somebody removes at the same time is waited for.
    pub fn peek(&self, key: &str) -> Result<Option<Vec<u8>>, Error> {
        if !self.has(&[key])? {
            return Ok(None);
        }
        let key = self.key(key);
        let bytes = ffi::new_tensor("get", |out| {
            // SAFETY: a live store, a borrowed text, and a place for the answer.
            unsafe { ffi::torchx_store_peek(self.shared.main.as_ptr(), Text::of(&key), out) }
        });
        match bytes {
            Ok(bytes) => Ok(Some(to_vec(&bytes))),
            Err(Error::Torch { message, .. }) => Err(self.error("get", &key, &message)),
            Err(other) => Err(other),
        }
    }

    /// Adds to a number, which is 0 before the first time, and gives the sum.
    ///
    /// # Errors
    /// [`Error::Store`] where the server is gone.
    pub fn add(&self, key: &str, amount: i64) -> Result<i64, Error> {
        let key = self.key(key);
        let mut sum = 0;
        // SAFETY: a live store, a borrowed text, and a place for the answer.
        let code = unsafe { ffi::torchx_store_add(self.shared.main.as_ptr(), Text::of(&key), amount, &mut sum) };
        self.check("add", &key, code)?;
        Ok(sum)
    }

    /// Whether all the keys are there.
    ///
    /// # Errors
    /// [`Error::Store`] where the server is gone.
    pub fn has(&self, keys: &[&str]) -> Result<bool, Error> {
        let keys: Vec<String> = keys.iter().map(|key| self.key(key)).collect();
        let texts: Vec<Text> = keys.iter().map(|key| Text::of(key)).collect();
        let mut all: c_int = 0;
        // SAFETY: a live store, `texts.len()` texts that outlive the call, and a place for the answer.
        let code = unsafe { ffi::torchx_store_has(self.shared.main.as_ptr(), texts.as_ptr(), texts.len(), &mut all) };
        self.check("has", &keys.join(" "), code)?;
        Ok(all != 0)
    }

    /// Removes a key, and says whether it was there.
    ///
    /// # Errors
    /// [`Error::Store`] where the server is gone.
    pub fn remove(&self, key: &str) -> Result<bool, Error> {
        let key = self.key(key);
        let mut removed: c_int = 0;
        // SAFETY: a live store, a borrowed text, and a place for the answer.
        let code = unsafe { ffi::torchx_store_remove(self.shared.main.as_ptr(), Text::of(&key), &mut removed) };
        self.check("remove", &key, code)?;
        Ok(removed != 0)
    }

    /// A further connection, for a group that keeps it.
    pub(super) fn connection(&self) -> Result<Connection, Error> {
        let idle = self.idle().pop();
        idle.map_or_else(|| Connection::open(&self.shared.host, self.shared.port, false, self.shared.timeout), Ok)
    }

    fn open(host: &str, port: u16, serve: bool, timeout: Duration) -> Result<Self, Error> {
        let main = Connection::open(host, port, serve, timeout)?;
        // SAFETY: a live store.
        let port = unsafe { ffi::torchx_store_port(main.as_ptr()) };
        let shared = Shared { main, idle: Mutex::default(), host: host.to_owned(), port, timeout };
        Ok(Self { shared: Arc::new(shared), prefix: String::new() })
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<Connection>> {
        self.shared.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn key(&self, key: &str) -> String {
        if self.prefix.is_empty() { key.to_owned() } else { format!("{}/{key}", self.prefix) }
    }

    fn check(&self, op: &'static str, key: &str, code: c_int) -> Result<(), Error> {
        ffi::outcome(code).map_err(|text| self.error(op, key, &text))
    }

    fn error(&self, op: &'static str, key: &str, text: &str) -> Error {
        let (host, port) = (self.shared.host.clone(), self.shared.port);
        Error::Store { host, port, op, key: key.to_owned(), message: one_line(text) }
    }
}

/// One TCPStore of c10d.
pub(super) struct Connection(NonNull<CStore>);

// SAFETY: TCPStore takes a lock of its own for every call; what it does not guard, its timeout, is changed only where
// one thread has the connection to itself.
unsafe impl Send for Connection {}
// SAFETY: as above.
unsafe impl Sync for Connection {}

impl Connection {
    fn open(host: &str, port: u16, serve: bool, timeout: Duration) -> Result<Self, Error> {
        let mut out = ptr::null_mut();
        // SAFETY: a borrowed text, and a place for the answer.
        let code = unsafe {
            ffi::torchx_store_open(Text::of(host), port, c_int::from(serve), milliseconds(timeout), &mut out)
        };
        match (ffi::outcome(code), NonNull::new(out)) {
            (Ok(()), Some(store)) => Ok(Self(store)),
            (Err(text), _) if serve && text.contains("EADDRINUSE") => Err(Error::PortInUse { port }),
            (outcome, _) => Err(Error::StoreUnreachable {
                host: host.to_owned(),
                port,
                seconds: timeout.as_secs_f64(),
                message: one_line(&outcome.err().unwrap_or_default()),
            }),
        }
    }

    pub(super) fn as_ptr(&self) -> *const CStore {
        self.0.as_ptr()
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // SAFETY: ours, and nobody else's.
        unsafe { ffi::torchx_store_free(self.0.as_ptr()) };
    }
}

fn to_vec(bytes: &Tensor) -> Vec<u8> {
    let mut out = vec![0; bytes.numel()];
    bytes.copy_data_u8(&mut out, bytes.numel());
    out
}
