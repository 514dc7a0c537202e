//! An S3 server on loopback.

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;

use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use s3s::auth::SimpleAuth;
use s3s::service::S3ServiceBuilder;
use s3s_fs::FileSystem;

pub use crate::proxy::{Fate, Proxy, Request};

/// The bucket that is there.
pub const BUCKET: &str = "pairs";

pub struct Server {
    root: tempfile::TempDir,
    pub address: SocketAddr,
    _runtime: tokio::runtime::Runtime,
}

impl Server {
    pub fn start() -> Server {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join(BUCKET)).unwrap();
        let mut service = S3ServiceBuilder::new(FileSystem::new(root.path()).unwrap());
        service.set_auth(SimpleAuth::from_single("key", "secret"));
        let service = service.build();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        listener.set_nonblocking(true).unwrap();
        runtime.spawn(async move {
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            while let Ok((socket, _)) = listener.accept().await {
                let service = service.clone();
                tokio::spawn(async move {
                    let _ = Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(socket), service).await;
                });
            }
        });
        Server { root, address, _runtime: runtime }
    }

    /// The server, with all files of a folder that `keep` accepts in its bucket.
    pub fn with(folder: &Path, keep: impl Fn(&str) -> bool) -> Server {
        let server = Server::start();
        for entry in fs::read_dir(folder).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            if keep(&name) {
                server.put(&name, &fs::read(folder.join(&name)).unwrap());
            }
        }
        server
    }

    pub fn put(&self, key: &str, bytes: &[u8]) {
        fs::write(self.root.path().join(BUCKET).join(key), bytes).unwrap();
    }
}
