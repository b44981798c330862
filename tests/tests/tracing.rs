//! One trace per request runs through every role: real processes export to a collector on loopback.
#![allow(clippy::unwrap_used, missing_docs)]

use ashlar_tests::Cluster;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

/// Bodies that were posted to `/v1/traces`.
fn collector() -> (String, Receiver<Vec<u8>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let (tell, bodies) = channel();
    std::thread::spawn(move || {
        for socket in listener.incoming().flatten() {
            let tell = tell.clone();
            std::thread::spawn(move || while take(&socket, &tell).is_some() {});
        }
    });
    (endpoint, bodies)
}

fn take(socket: &TcpStream, tell: &Sender<Vec<u8>>) -> Option<()> {
    let mut reader = BufReader::new(socket);
    let mut length = 0;
    let mut first = String::new();
    reader.read_line(&mut first).ok().filter(|&count| count > 0)?;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        if line.trim().is_empty() {
            break;
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().ok()?;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    let mut socket = socket;
    socket.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").ok()?;
    if first.contains("/v1/traces") {
        tell.send(body).ok()?;
    }
    Some(())
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|window| window == needle)
}

#[test]
fn a_request_leaves_one_trace_through_gateway_scheduler_and_every_stage() {
    let (endpoint, bodies) = collector();
    let cluster = Cluster::start(&["--stages", "2", "--otlp-endpoint", &endpoint]);
    let trace: [u8; 16] = *b"one-trace-please";
    let hex: String = trace.iter().map(|byte| format!("{byte:02x}")).collect();
    let body = r#"{"model":"ashlar-demo","messages":[{"role":"user","content":"Hi"}],"max_tokens":4}"#;
    let mut socket = TcpStream::connect(cluster.address()).unwrap();
    write!(
        socket,
        "POST /v1/chat/completions HTTP/1.1\r\nHost: test\r\nConnection: close\r\nContent-Type: application/json\r\n\
         traceparent: 00-{hex}-00f067aa0ba902b7-01\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    // Roles flush what they have not exported yet when they end.
    cluster.interrupt();
    let mut exports = Vec::new();
    let deadline = Instant::now() + Duration::from_secs(20);
    let seen = |exports: &[Vec<u8>], name: &str| {
        exports.iter().filter(|body| contains(body, &trace) && contains(body, name.as_bytes())).count()
    };
    while seen(&exports, "stage") < 2 || seen(&exports, "schedule") < 1 || seen(&exports, "gen_ai") < 1 {
        let left = deadline.saturating_duration_since(Instant::now());
        let body = bodies.recv_timeout(left);
        exports.push(body.unwrap_or_else(|_| {
            panic!(
                "of the trace arrived: {} stages, {} schedules, {} requests",
                seen(&exports, "stage"),
                seen(&exports, "schedule"),
                seen(&exports, "gen_ai")
            )
        }));
    }
}
