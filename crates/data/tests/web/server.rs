//! A web server on loopback.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::{Arc, Mutex};

/// A server that knows neither tags nor ranges.
pub struct WebServer {
    pub address: SocketAddr,
    /// The heads of the requests so far.
    heads: Arc<Mutex<Vec<String>>>,
    pub modified: Arc<Mutex<&'static str>>,
}

impl WebServer {
    /// Serves a folder's files below `/set/` to requests whose head `allows` accepts.
    pub fn start(folder: &Path, allows: impl Fn(&str) -> bool + Send + 'static) -> WebServer {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = WebServer {
            address: listener.local_addr().unwrap(),
            heads: Arc::default(),
            modified: Arc::new(Mutex::new("Tue, 01 Jan 2030 00:00:00 GMT")),
        };
        let (files, heads, modified) = (folder.to_owned(), Arc::clone(&server.heads), Arc::clone(&server.modified));
        std::thread::spawn(move || {
            for mut client in listener.incoming().flatten() {
                let mut buffer = [0; 8192];
                let read = client.read(&mut buffer).unwrap_or(0);
                let head = String::from_utf8_lossy(&buffer[..read]).into_owned();
                let mut words = head.split(' ');
                let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
                let path = path.split('?').next().unwrap_or_default();
                let (status, body) = match fs::read(files.join(path.trim_start_matches("/set/"))) {
                    _ if !allows(&head) => ("403 Forbidden", Vec::new()),
                    Ok(body) => ("200 OK", body),
                    Err(_) => ("404 Not Found", Vec::new()),
                };
                let (length, time) = (body.len(), *modified.lock().unwrap());
                let is_head = method == "HEAD";
                heads.lock().unwrap().push(head);
                let _ = write!(
                    client,
                    "HTTP/1.1 {status}\r\nContent-Length: {length}\r\nLast-Modified: {time}\r\nConnection: close\r\n\r\n"
                );
                let _ = client.write_all(if is_head { b"" } else { &body });
            }
        });
        server
    }

    /// How many requests have come.
    pub fn requests(&self) -> usize {
        self.heads.lock().unwrap().len()
    }

    /// How often a file whose name ends with `end` was asked for.
    pub fn asked_for(&self, end: &str) -> usize {
        let path = |head: &String| head.starts_with("GET ") && head.split(' ').nth(1).is_some_and(|p| p.ends_with(end));
        self.heads.lock().unwrap().iter().filter(|head| path(head)).count()
    }
}
