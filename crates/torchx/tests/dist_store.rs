//! Stores: what is set, waited for, and what goes wrong.

mod ranks;

use std::thread;
use std::time::{Duration, Instant};

use blip2_torchx::Error;
use blip2_torchx::dist::Store;
use ranks::{HOST, LONG, serve};

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn a_store_keeps_what_was_set_for_everyone() {
    let server = serve();
    let client = Store::connect(HOST, server.port(), LONG).unwrap();
    assert_eq!(client.port(), server.port());
    for value in [&b""[..], b"a", b"\0\xff\n", &[7; 1 << 20]] {
        client.set("key", value).unwrap();
        assert_eq!(server.get("key", SECOND).unwrap(), value);
        assert_eq!(client.get("key", SECOND).unwrap(), value);
    }
    assert_eq!(client.add("count", 3).unwrap(), 3);
    assert_eq!(server.add("count", -5).unwrap(), -2);
    assert!(client.has(&["key", "count"]).unwrap());
    assert!(!client.has(&["key", "none"]).unwrap());
    assert_eq!(client.peek("key").unwrap(), Some(vec![7; 1 << 20]));
    assert_eq!(client.peek("none").unwrap(), None);
    assert!(server.remove("key").unwrap());
    assert!(!client.remove("key").unwrap());
    assert!(!client.has(&["key"]).unwrap());
    client.set("odd \0 key", b"x").unwrap();
    assert_eq!(server.get("odd \0 key", SECOND).unwrap(), b"x");
}

#[test]
fn prefixes_are_part_of_the_key() {
    let store = serve();
    let inner = store.with_prefix("a").with_prefix("b");
    inner.set("key", b"inner").unwrap();
    store.with_prefix("b").set("key", b"other").unwrap();
    assert_eq!(store.get("a/b/key", SECOND).unwrap(), b"inner");
    assert_eq!(inner.get("key", SECOND).unwrap(), b"inner");
    assert!(!store.has(&["key"]).unwrap());
}

#[test]
fn a_get_waits_and_holds_up_nobody() {
    let store = serve();
    thread::scope(|scope| {
        let waiting: Vec<_> = (0..3)
            .map(|i| {
                scope.spawn({
                    let store = &store;
                    move || store.get(&format!("late {i}"), LONG)
                })
            })
            .collect();
        thread::sleep(Duration::from_millis(200));
        let begun = Instant::now();
        store.set("other", b"1").unwrap();
        assert_eq!(store.get("other", SECOND).unwrap(), b"1");
        for i in 0..3 {
            store.set(&format!("late {i}"), b"2").unwrap();
        }
        assert!(begun.elapsed() < LONG / 2, "{:?}", begun.elapsed());
        for get in waiting {
            assert_eq!(get.join().unwrap().unwrap(), b"2");
        }
    });
}

#[test]
fn a_key_that_nobody_sets_is_named_after_the_timeout() {
    let store = serve().with_prefix("run");
    let begun = Instant::now();
    let error = store.get("absent", Duration::from_millis(300)).unwrap_err();
    assert!((Duration::from_millis(250)..LONG / 2).contains(&begun.elapsed()), "{:?}", begun.elapsed());
    assert!(matches!(&error, Error::Store { op: "get", key, .. } if key == "run/absent"), "{error}");
    store.set("absent", b"1").unwrap();
    assert_eq!(store.get("absent", SECOND).unwrap(), b"1");
}

#[test]
fn a_store_that_nobody_serves_is_named_after_the_timeout() {
    let free = std::net::TcpListener::bind((HOST, 0)).unwrap();
    let port = free.local_addr().unwrap().port();
    drop(free);
    let begun = Instant::now();
    let error = Store::connect(HOST, port, Duration::from_millis(1500)).err().unwrap();
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    let text = error.to_string();
    assert!(text.starts_with(&format!("no store answers at {HOST}:{port} within 1.5 s: ")), "{text}");
    assert!(!text.contains('\n'), "{text}");
}

#[test]
fn a_port_in_use_is_said_plainly() {
    let server = serve();
    let error = Store::serve(HOST, server.port(), LONG).err().unwrap();
    assert!(matches!(error, Error::PortInUse { port } if port == server.port()), "{error}");
}

#[test]
fn a_server_that_goes_away_is_an_error() {
    let server = serve();
    let client = Store::connect(HOST, server.port(), LONG).unwrap();
    client.set("key", b"1").unwrap();
    drop(server);
    assert!(matches!(client.get("key", SECOND), Err(Error::Store { .. })));
    assert!(matches!(client.peek("key"), Err(Error::Store { .. })));
    assert!(matches!(client.add("key", 1), Err(Error::Store { .. })));
}
