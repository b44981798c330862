//! What happens when somebody goes away, stalls or misbehaves.

use crate::scheduler::{Action, say};
use crate::world::{PLAIN_TEMPLATE, World, ask, write_model};
use ashlar_gateway::{Gateway, GatewayConfig, GatewayError};
use ashlar_protocol::serving::{FailureKind, FinishReason, Submit};
use ashlar_vocabulary::LeaseTerm;
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

fn one_then_wait() -> Vec<Action> {
    vec![Action::Token(97), Action::Gate, Action::Token(98), Action::Finish(FinishReason::Length)]
}

#[tokio::test]
async fn a_client_that_goes_is_cancelled_at_the_scheduler() {
    let world = World::new(|_| one_then_wait()).await;
    let mut stream = world.http.stream("/v1/chat/completions", ask(json!({"stream": true, "n": 2}))).await;
    stream.next().await.unwrap();
    drop(stream);
    world.scheduler.until(|seen| seen.cancels.len() == 2).await;

    // Without a stream nothing has been sent yet, and the hang-up is seen all the same.
    let mut socket = TcpStream::connect(world.http.address).await.unwrap();
    let body = ask(json!({})).to_string();
    let head =
        format!("POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n", body.len());
    socket.write_all((head + &body).as_bytes()).await.unwrap();
    world.scheduler.until(|seen| seen.submits.len() == 3).await;
    drop(socket);
    world.scheduler.until(|seen| seen.cancels.len() == 3).await;
}

#[tokio::test]
async fn a_reader_that_stops_reading_is_dropped_once_its_buffer_is_full() {
    let world =
        World::with(PLAIN_TEMPLATE, |config| config.unread_tokens_max = 16, |_| vec![Action::Flood(97)])
            .await;
    let stream = world.http.stream("/v1/chat/completions", ask(json!({"stream": true}))).await;
    world.scheduler.until(|seen| seen.cancels.len() == 1).await;
    drop(stream);
    let other = world.http.get("/health").await;
    assert_eq!(other.status, 200);
}

#[tokio::test]
async fn duplicates_are_dropped_and_gaps_are_errors() {
    let world = World::new(|_| {
        vec![
            Action::TokenAt(0, 97),
            Action::TokenAt(0, 97),
            Action::TokenAt(1, 98),
            Action::TokenAt(0, 97),
            Action::Finish(FinishReason::Length),
        ]
    })
    .await;
    assert_eq!(world.chat(ask(json!({}))).await.json()["choices"][0]["message"]["content"], "ab");

    let world = World::new(|_| vec![Action::TokenAt(0, 97), Action::TokenAt(2, 98)]).await;
    let events = world.chat(ask(json!({"stream": true}))).await.events();
    assert!(events.last().unwrap()["error"]["message"].as_str().unwrap().contains("expected token 1"));
    world.scheduler.until(|seen| seen.cancels.len() == 1).await;
}

/// Says the first half, then what `then` is; to whoever comes again, the other half.
fn in_two_halves(then: Action) -> impl Fn(&Submit) -> Vec<Action> {
    move |submit| match submit.forced.len() {
        0 => vec![Action::Token(97), Action::Token(98), then.clone()],
        _ => vec![Action::Token(99), Action::Token(100), Action::Finish(FinishReason::Length)],
    }
}

#[tokio::test]
async fn a_stream_goes_on_with_the_next_token_when_the_scheduler_was_lost() {
    let world = World::new(in_two_halves(Action::Disconnect)).await;
    let events = world.chat(ask(json!({"seed": 1, "stream": true, "logprobs": true}))).await.events();
    let text =
        |event: &Value| event["choices"][0]["delta"]["content"].as_str().unwrap_or_default().to_owned();
    assert_eq!(events.iter().map(text).collect::<String>(), "abcd");
    let last = events.iter().rfind(|event| !event["choices"][0]["finish_reason"].is_null()).unwrap();
    assert_eq!(last["choices"][0]["finish_reason"], "length");
    let described = events.iter().filter_map(|event| event["choices"][0]["logprobs"]["content"].as_array());
    assert_eq!(described.map(Vec::len).sum::<usize>(), 4);

    let submits = world.scheduler.submits();
    let [first, second] = submits.as_slice() else { panic!("{} submissions", submits.len()) };
    assert_eq!(second.forced, [97, 98]);
    assert!(second.deadline_ms <= first.deadline_ms && second.deadline_ms > 0);
    let again = Submit { forced: Vec::new(), deadline_ms: first.deadline_ms, ..second.clone() };
    assert_eq!(&again, first, "all else is as it was");
    let metrics = world.http.get("/metrics").await.text();
    let counted = metrics.lines().find(|line| line.starts_with("ashlar_choices_resubmitted_total"));
    assert!(counted.is_some_and(|line| line.ends_with(" 1")), "{metrics}");
}

#[tokio::test]
async fn every_choice_goes_on_and_the_receipt_counts_the_replays() {
    let world = World::new(in_two_halves(Action::Disconnect)).await;
    let answer = world.chat(ask(json!({"n": 3, "ashlar_receipt": true}))).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    let answer = answer.json();
    for choice in answer["choices"].as_array().unwrap() {
        assert_eq!(choice["message"]["content"], "abcd");
    }
    assert_eq!(answer["usage"]["completion_tokens"], 12);
    // Each choice cuts the connection for the others, too.
    assert!(answer["ashlar"]["replays"].as_u64().unwrap() >= 3, "{answer}");
}

#[tokio::test]
async fn a_scheduler_that_says_nothing_is_left_within_a_second() {
    let world = World::new(in_two_halves(Action::Mute)).await;
    let began = Instant::now();
    let answer = world.chat(ask(json!({}))).await.json();
    assert_eq!(answer["choices"][0]["message"]["content"], "abcd");
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
}

#[tokio::test]
async fn what_a_leaving_scheduler_does_not_take_the_next_one_gets() {
    let refused = Arc::new(AtomicBool::new(false));
    let world = World::new(move |_| match refused.swap(true, Ordering::Relaxed) {
        false => vec![Action::Fail(FailureKind::Leaving, "leaving"), Action::Disconnect],
        true => say("here"),
    })
    .await;
    assert_eq!(world.chat(ask(json!({}))).await.json()["choices"][0]["message"]["content"], "here");
}

#[tokio::test]
async fn a_scheduler_whose_term_is_over_hears_of_the_higher_one_and_patience_ends() {
    let script = |_: &Submit| vec![Action::Lead(8), Action::Lead(7), Action::Gate];
    let world = World::with(PLAIN_TEMPLATE, |config| config.scheduler_patience_ms = 300, script).await;
    let answer = world.chat(ask(json!({}))).await;
    assert_eq!(answer.status, 503);
    assert!(answer.text().contains("term"), "{}", answer.text());
    world.scheduler.until(|seen| seen.refusals.first() == Some(&LeaseTerm(8))).await;
    // From now on nobody waits: neither does the next one.
    let began = Instant::now();
    assert_eq!(world.chat(ask(json!({}))).await.status, 503);
    assert!(began.elapsed() < Duration::from_millis(200), "{:?}", began.elapsed());
}

#[tokio::test]
async fn without_a_scheduler_requests_are_503_once_patience_ends() {
    let model = tempfile::tempdir().unwrap();
    write_model(model.path(), PLAIN_TEMPLATE);
    let config = GatewayConfig {
        listen: "127.0.0.1:0".parse().unwrap(),
        scheduler: "127.0.0.1:1".into(),
        scheduler_patience_ms: 300,
        ..GatewayConfig::default()
    };
    let gateway = Gateway::bind(config, model.path()).await.unwrap();
    let http = crate::http::Http { address: gateway.local_address() };
    let shutdown = ashlar_service_kit::Shutdown::manual();
    tokio::spawn(gateway.run(shutdown));
    let answer =
        http.post("/v1/chat/completions", json!({"messages": [{"role": "user", "content": "x"}]})).await;
    assert_eq!((answer.status, answer.header("retry-after")), (503, "1"));
    assert_eq!(http.get("/ready").await.status, 503);
    let name = model.path().file_name().unwrap().to_str().unwrap();
    assert_eq!(http.get("/v1/models").await.json()["data"][0]["id"], name);
}

#[tokio::test]
async fn a_port_in_use_is_named() {
    let world = World::new(|_| say("x")).await;
    let model = tempfile::tempdir().unwrap();
    let config = GatewayConfig { listen: world.http.address, ..GatewayConfig::default() };
    let error = Gateway::bind(config, model.path()).await.unwrap_err();
    assert!(matches!(error, GatewayError::PortInUse { .. }));
    let port = world.http.address.port().to_string();
    assert!(error.to_string().contains(&port) && error.to_string().contains("choose another port"));
}

#[tokio::test]
async fn a_directory_without_a_tokenizer_is_named() {
    let empty = tempfile::tempdir().unwrap();
    let config = GatewayConfig { listen: "127.0.0.1:0".parse().unwrap(), ..GatewayConfig::default() };
    let error = Gateway::bind(config, empty.path()).await.unwrap_err().to_string();
    assert!(error.contains("tokenizer.json") && error.contains(empty.path().to_str().unwrap()), "{error}");
}

#[tokio::test]
async fn the_drain_lets_streams_end() {
    let world =
        World::with(PLAIN_TEMPLATE, |config| config.drain_grace_ms = 60_000, |_| one_then_wait()).await;
    let mut stream = world.http.stream("/v1/chat/completions", ask(json!({"stream": true}))).await;
    stream.next().await.unwrap();
    let (scheduler, address) = (world.scheduler.clone(), world.http.address);
    let drained = tokio::spawn(world.drain());
    // No new connection is taken.
    while TcpStream::connect(address).await.is_ok() {}
    scheduler.open_gate();
    let rest = stream.rest().await;
    assert!(rest.iter().any(|event| event.contains("\"content\":\"b\"")));
    assert_eq!(rest.last().unwrap(), "data: [DONE]");
    drained.await.unwrap();
}

#[tokio::test]
async fn streams_that_outlast_the_grace_period_are_ended_with_an_error() {
    let world = World::with(PLAIN_TEMPLATE, |config| config.drain_grace_ms = 50, |_| one_then_wait()).await;
    let mut stream = world.http.stream("/v1/chat/completions", ask(json!({"stream": true}))).await;
    stream.next().await.unwrap();
    let drained = tokio::spawn(world.drain());
    let rest = stream.rest().await;
    let error: Value = serde_json::from_str(rest[rest.len() - 2].strip_prefix("data: ").unwrap()).unwrap();
    assert!(error["error"]["message"].as_str().unwrap().contains("shutting down"));
    assert_eq!(rest.last().unwrap(), "data: [DONE]");
    drained.await.unwrap();
}

#[tokio::test]
async fn too_many_choices_in_flight_are_429_and_too_many_connections_503() {
    let world = World::with(
        PLAIN_TEMPLATE,
        |config| {
            config.choices_in_flight_max = 2;
            config.connections_max = 3;
        },
        |_| one_then_wait(),
    )
    .await;
    let mut streams = Vec::new();
    for _ in 0..2 {
        let mut stream = world.http.stream("/v1/chat/completions", ask(json!({"stream": true}))).await;
        stream.next().await.unwrap();
        streams.push(stream);
    }
    let refused = world.chat(ask(json!({}))).await;
    assert_eq!((refused.status, refused.header("retry-after")), (429, "1"));

    let health = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    let mut held = Vec::new();
    for _ in 0..20 {
        // Those that only lie there, or never finish a head, keep nobody out.
        let mut idle = TcpStream::connect(world.http.address).await.unwrap();
        idle.write_all(b"GET /health HTT").await.unwrap();
        held.push(idle);
        assert!(world.http.raw(health).await.starts_with("HTTP/1.1 200"));
    }
    // Whose request is in progress gives way to nobody: here one whose body is still to come.
    let head =
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\nexpect: 100-continue\r\n\r\n";
    let mut slow = TcpStream::connect(world.http.address).await.unwrap();
    slow.write_all(head).await.unwrap();
    let mut said = [0; 12];
    slow.read_exact(&mut said).await.unwrap();
    assert_eq!(&said, b"HTTP/1.1 100");
    let refused = world.http.raw(health).await;
    assert!(refused.starts_with("HTTP/1.1 503") && refused.contains("too many connections"), "{refused}");
    drop(slow);
    world.scheduler.open_gate();
    for mut stream in streams {
        assert_eq!(stream.rest().await.last().unwrap(), "data: [DONE]");
    }
    while !world.http.raw(health).await.starts_with("HTTP/1.1 200") {
        tokio::task::yield_now().await;
    }
}
