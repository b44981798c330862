//! The client against a service of canned answers over a real socket.
#![allow(clippy::unwrap_used)]

use super::client::{self, Template};
use super::load::{self, Until};
use super::workload::{Caps, Pace, Source, Workload};
use crate::http::Client;
use serde_json::{Value, json};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// Answers each request on a connection of its own: three chunks with a pause between, usage, `[DONE]`; every request
/// whose `max_tokens` is 13 is refused.
struct FakeService {
    url: String,
    bodies: Arc<Mutex<Vec<Value>>>,
    most_in_flight: Arc<AtomicUsize>,
}

const PAUSE: Duration = Duration::from_millis(40);

impl FakeService {
    async fn start() -> FakeService {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let bodies = Arc::new(Mutex::new(Vec::new()));
        let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let service = FakeService { url, bodies: Arc::clone(&bodies), most_in_flight: Arc::clone(&most) };
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let (bodies, now, most) = (Arc::clone(&bodies), Arc::clone(&now), Arc::clone(&most));
                tokio::spawn(async move {
                    most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                    answer(socket, &bodies).await;
                    now.fetch_sub(1, Ordering::SeqCst);
                });
            }
        });
        service
    }
}

async fn answer(mut socket: TcpStream, bodies: &Mutex<Vec<Value>>) {
    let body = read_body(&mut socket).await;
    let refused = body["max_tokens"] == 13;
    bodies.lock().unwrap().push(body);
    if refused {
        let body = r#"{"error":{"message":"too unlucky"}}"#;
        let head = format!(
            "HTTP/1.1 400 Bad Request\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
            body.len()
        );
        socket.write_all(format!("{head}{body}").as_bytes()).await.unwrap();
        return;
    }
    socket
        .write_all(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n")
        .await
        .unwrap();
    let chunk =
        |text: &str, finish: Option<&str>| json!({"choices": [{"text": text, "finish_reason": finish}]});
    for (text, finish) in [("a", None), ("", None), ("bc", None), ("d", None), ("", Some("length"))] {
        if !text.is_empty() {
            tokio::time::sleep(PAUSE).await;
        }
        socket.write_all(format!("data: {}\n\n", chunk(text, finish)).as_bytes()).await.unwrap();
    }
    let usage =
        json!({"prompt_tokens": 5, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 2}});
    let last = json!({"choices": [], "usage": usage, "ashlar": {"queue_ms": 7, "prefill_ms": 9}});
    socket.write_all(format!("data: {last}\n\ndata: [DONE]\n\n").as_bytes()).await.unwrap();
}

async fn read_body(socket: &mut TcpStream) -> Value {
    let mut bytes = Vec::new();
    loop {
        let mut part = [0u8; 4096];
        let count = socket.read(&mut part).await.unwrap();
        bytes.extend_from_slice(&part[..count]);
        let text = String::from_utf8_lossy(&bytes);
        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
        let length = head.lines().find_map(|line| {
            let (name, value) = line.split_once(':')?;
            name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().unwrap())
        });
        if body.len() >= length.unwrap() {
            return serde_json::from_str(body).unwrap();
        }
    }
}

fn template() -> Template {
    Template {
        model: "m".into(),
        temperature: 0.0,
        plain: false,
        receipt: true,
        timeout: Duration::from_secs(20),
    }
}

fn workload(output: &str, pace: Pace) -> Workload {
    let source =
        Source::Random { input: "5".parse().unwrap(), output: output.parse().unwrap(), prefix: 0, groups: 1 };
    let caps = Caps { input: 100, output: 100, context: 100 };
    Workload { source, pace, caps, vocabulary: 256, text: false, seed: 1 }
}

async fn run(service: &FakeService, workload: &Workload, until: Until) -> load::Run {
    let client = Client::new(&service.url, None).unwrap();
    load::run(&client, &template(), workload, until, &indicatif::ProgressBar::hidden()).await.unwrap()
}

#[tokio::test]
async fn times_are_those_of_the_chunks_with_text() {
    let service = FakeService::start().await;
    let client = Client::new(&service.url, None).unwrap();
    let planned = workload("4", Pace::Closed(1)).requests().next().unwrap();
    let outcome = client::execute(&client, &template(), &planned, Instant::now()).await;
    assert_eq!(outcome.failure, None);
    assert_eq!((outcome.input_tokens, outcome.cached_tokens, outcome.output_tokens), (5, 2, 4));
    assert_eq!((outcome.queue_ms, outcome.prefill_ms), (Some(7.0), Some(9.0)));
    // Pauses are lower bounds: the machine may be busy, never early.
    let pause = PAUSE.as_secs_f64() * 0.9;
    assert!(outcome.ttft_s.unwrap() >= pause);
    assert_eq!(outcome.gaps_s.len(), 2);
    assert!(outcome.gaps_s.iter().sum::<f64>() >= pause);
    // Each is rounded to a float by itself, so the sum may exceed the whole by a last bit.
    assert!(outcome.e2e_s + 1e-9 >= outcome.ttft_s.unwrap() + outcome.decode_s);
    assert!((outcome.tpot_s().unwrap() - outcome.decode_s / 3.0).abs() < 1e-12);
    let body = service.bodies.lock().unwrap()[0].clone();
    assert_eq!((&body["ignore_eos"], &body["stream_options"]["include_usage"]), (&json!(true), &json!(true)));
    assert_eq!(body["prompt"], planned.prompt);
}

#[tokio::test]
async fn a_closed_loop_keeps_its_concurrency_and_no_more() {
    let service = FakeService::start().await;
    let run = run(&service, &workload("4", Pace::Closed(3)), Until { requests: 9, duration: None }).await;
    assert_eq!((run.outcomes.len(), run.in_flight_max, run.abandoned), (9, 3, 0));
    // A connection may still be closing when the next one opens.
    assert!((3..=6).contains(&service.most_in_flight.load(Ordering::SeqCst)));
}

#[tokio::test]
async fn an_open_loop_does_not_wait_for_answers() {
    let service = FakeService::start().await;
    let run =
        run(&service, &workload("4", Pace::Poisson(1000.0)), Until { requests: 12, duration: None }).await;
    assert_eq!(run.outcomes.len(), 12);
    assert!(run.in_flight_max > 4, "{}", run.in_flight_max);
}

#[tokio::test]
async fn a_duration_ends_the_sending() {
    let service = FakeService::start().await;
    let until = Until { requests: usize::MAX, duration: Some(Duration::from_millis(60)) };
    let run = run(&service, &workload("4", Pace::Poisson(200.0)), until).await;
    assert!((1..60).contains(&run.outcomes.len()), "{}", run.outcomes.len());
}

#[tokio::test]
async fn a_refusal_is_counted_by_its_status() {
    let service = FakeService::start().await;
    let run = run(&service, &workload("13", Pace::Closed(1)), Until { requests: 1, duration: None }).await;
    let failure = run.outcomes[0].failure.clone().unwrap();
    assert_eq!((failure.status.as_str(), failure.message.as_str()), ("400", "too unlucky"));
}
