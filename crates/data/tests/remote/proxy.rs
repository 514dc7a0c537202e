//! A proxy on loopback that does to answers what networks do.
#![allow(dead_code)] // Each test file uses a part.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

/// What happens to one answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    Pass,
    /// The connection ends without an answer.
    Drop,
    /// Half of the answer, then the connection ends.
    Truncate,
    /// Half of the answer, then silence.
    Stall(Duration),
    /// One byte in its middle is another.
    Corrupt,
    /// 503 Slow Down.
    Throttle,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    pub method: String,
    pub path: String,
    /// How many of this method and path came before.
    pub number: u64,
}

impl Request {
    /// Whether a shard's bytes are asked for.
    pub fn is_fetch(&self) -> bool {
        self.method == "GET" && self.path.ends_with(".tar")
    }
}

pub struct Proxy {
    pub address: SocketAddr,
    requests: Arc<Mutex<Vec<Request>>>,
}

impl Proxy {
    pub fn start(upstream: SocketAddr, fate: impl Fn(&Request) -> Fate + Send + Sync + 'static) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let requests: Arc<Mutex<Vec<Request>>> = Arc::default();
        let (seen, fate, counts) = (Arc::clone(&requests), Arc::new(fate), Arc::new(Mutex::new(HashMap::new())));
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let (seen, fate, counts) = (Arc::clone(&seen), Arc::clone(&fate), Arc::clone(&counts));
                thread::spawn(move || {
                    let decide = |method: &str, path: &str| {
                        let mut counts = counts.lock().unwrap();
                        let count: &mut u64 = counts.entry((method.to_owned(), path.to_owned())).or_default();
                        let request = Request { method: method.to_owned(), path: path.to_owned(), number: *count };
                        *count += 1;
                        seen.lock().unwrap().push(request.clone());
                        fate(&request)
                    };
                    // A client that goes away is not the proxy's concern.
                    let _ = relay(client, upstream, decide);
                });
            }
        });
        Proxy { address, requests }
    }

    pub fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }

    /// How often shards were asked for, by path.
    pub fn fetches(&self) -> HashMap<String, usize> {
        let mut fetches = HashMap::new();
        self.requests().into_iter().filter(Request::is_fetch).for_each(|r| *fetches.entry(r.path).or_default() += 1);
        fetches
    }
}

/// One request a connection.
fn relay(mut client: TcpStream, upstream: SocketAddr, decide: impl Fn(&str, &str) -> Fate) -> std::io::Result<()> {
    let mut request = Vec::new();
    let head = loop {
        let mut buffer = [0; 4096];
        let read = client.read(&mut buffer)?;
        if read == 0 {
            return Ok(());
        }
        request.extend_from_slice(&buffer[..read]);
        if let Some(end) = end_of_head(&request) {
            break end;
        }
    };
    let text = String::from_utf8_lossy(&request[..head]).into_owned();
    let mut words = text.split(' ');
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let length = text.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().ok())?
    });
    while request.len() < head + length.unwrap_or(0) {
        let mut buffer = [0; 4096];
        let read = client.read(&mut buffer)?;
        request.extend_from_slice(&buffer[..read]);
    }
    let fate = decide(method, path);
    match fate {
        Fate::Drop => return Ok(()),
        Fate::Throttle => {
            let body = "<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>";
            let length = body.len();
            return write!(
                client,
                "HTTP/1.1 503 Slow Down\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
            );
        }
        _ => {}
    }
    let mut server = TcpStream::connect(upstream)?;
    server.write_all(&request[..head - 2])?;
    server.write_all(b"Connection: close\r\n\r\n")?;
    server.write_all(&request[head..])?;
    let mut answer = Vec::new();
    server.read_to_end(&mut answer)?;
    let body = end_of_head(&answer).unwrap_or(answer.len());
    let middle = body + (answer.len() - body) / 2;
    match fate {
        Fate::Truncate => client.write_all(&answer[..middle]),
        Fate::Stall(silence) => {
            client.write_all(&answer[..middle])?;
            thread::sleep(silence);
            Ok(())
        }
        Fate::Corrupt if middle < answer.len() => {
            answer[middle] ^= 1;
            client.write_all(&answer)
        }
        _ => client.write_all(&answer),
    }
}

fn end_of_head(bytes: &[u8]) -> Option<usize> {
    bytes.windows(4).position(|window| window == b"\r\n\r\n").map(|at| at + 4)
}
