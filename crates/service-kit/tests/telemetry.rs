//! Spans reach a collector, and their context travels as text. One test, for a process has one subscriber.

use ashlar_service_kit::{TelemetryConfig, current_traceparent, set_parent, telemetry};
use std::io::{Read, Write};
use std::net::TcpListener;
use std::sync::mpsc;

/// Answers every request with 200 and hands over its bytes.
fn collector() -> (String, mpsc::Receiver<Vec<u8>>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
    let address = format!("http://{}", listener.local_addr().expect("address"));
    let (send, receive) = mpsc::channel();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.expect("accepted");
            let (mut bytes, mut buffer) = (Vec::new(), [0; 4096]);
            let whole = |bytes: &[u8]| {
                let end = bytes.windows(4).position(|window| window == b"\r\n\r\n")?;
                let head = String::from_utf8_lossy(&bytes[..end]).to_lowercase();
                let length: usize = head.split("content-length: ").nth(1)?.lines().next()?.parse().ok()?;
                Some(bytes.len() >= end + 4 + length)
            };
            while whole(&bytes) != Some(true) {
                match stream.read(&mut buffer).expect("read") {
                    0 => break,
                    count => bytes.extend_from_slice(&buffer[..count]),
                }
            }
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").expect("answered");
            if send.send(bytes).is_err() {
                break;
            }
        }
    });
    (address, receive)
}

#[tokio::test]
async fn spans_reach_the_collector_and_context_travels_as_text() {
    let (endpoint, received) = collector();
    let config = TelemetryConfig { otlp_endpoint: Some(endpoint), ..TelemetryConfig::default() };
    let guard = telemetry::init("scheduler", &config).expect("started");
    assert!(telemetry::init("scheduler", &config).is_err(), "only once");

    assert_eq!(current_traceparent(), None);
    let sent = tracing::info_span!(target: "ashlar_test", "submit_of_a_request")
        .in_scope(|| current_traceparent().expect("within a span"));
    let child = tracing::info_span!(target: "ashlar_test", "step_of_a_stage");
    set_parent(&child, &sent);
    let joined = child.in_scope(|| current_traceparent().expect("within a span"));
    assert_eq!(sent.len(), 55);
    assert_eq!(sent[..36], joined[..36], "one trace");
    assert_ne!(sent, joined);
    drop(child);
    let stranger = tracing::info_span!(target: "ashlar_test", "stranger");
    set_parent(&stranger, "not a traceparent");
    drop(stranger);
    tracing::info_span!(target: "hyper", "span_of_a_dependency").in_scope(|| ());

    // Dropped within a runtime of one thread: the export must not need it.
    drop(guard);
    let bytes = received.recv_timeout(std::time::Duration::from_secs(5)).expect("an export");
    let contains = |text: &str| bytes.windows(text.len()).any(|window| window == text.as_bytes());
    assert!(bytes.starts_with(b"POST /v1/traces HTTP/1.1\r\n"));
    assert!(contains("application/x-protobuf"));
    for text in ["submit_of_a_request", "step_of_a_stage", "stranger", "ashlar-scheduler"] {
        assert!(contains(text), "{text}");
    }
    assert!(!contains("span_of_a_dependency"));
}

#[test]
fn addresses_that_cannot_be_used_are_refused() {
    for endpoint in ["https://collector:4318", "127.0.0.1:4318", ""] {
        let config = TelemetryConfig { otlp_endpoint: Some(endpoint.into()), ..TelemetryConfig::default() };
        let error = telemetry::init("gateway", &config).expect_err("refused").to_string();
        assert!(error.contains("otlp_endpoint") && error.contains("http://127.0.0.1:4318"), "{error}");
    }
}
