//! Streams that run again and again, each compared with what it was undisturbed.

use crate::http::{Client, StatusError};
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// A stream that says nothing for this long hangs.
const SILENCE_MAX: Duration = Duration::from_secs(30);
/// Before a gateway that is gone is asked again.
const PAUSE: Duration = Duration::from_millis(50);

/// What a stream asks for, and what it came to undisturbed.
#[derive(Debug, Clone)]
pub(super) struct Shape {
    request: Value,
    expected: Vec<Choice>,
}

/// A choice as its client has it.
#[derive(Debug, Default, Clone, PartialEq)]
struct Choice {
    text: String,
    tokens: Vec<Value>,
    logprobs: Vec<Value>,
    finish_reason: Value,
}

impl Shape {
    /// Asks for `count` different ones, one after the other.
    pub(super) async fn ask_all(client: &Client, count: u32, tokens: u32) -> Result<Vec<Shape>> {
        let mut shapes = Vec::new();
        for number in 0..count {
            let request = json!({
                "prompt": format!("Story number {number}, told slowly:"), "max_tokens": tokens, "n": 1 + number % 2,
                "temperature": if number % 4 == 3 { 0 } else { 1 }, "seed": number, "logprobs": 2, "ignore_eos": true,
                "presence_penalty": 0.5, "stream": true,
            });
            let mut nobody = |_: Instant| {};
            let expected = stream(client, &request, &mut nobody).await.context("an undisturbed stream")?;
            shapes.push(Shape { request, expected });
        }
        Ok(shapes)
    }
}

/// What clients noticed of one fault.
#[derive(Debug, Default, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Noticed {
    /// For how long each of the streams stood still at most, in seconds.
    pub(super) stalls_s: Vec<f64>,
    /// Streams that ended meanwhile as they should.
    pub(super) completed: u64,
    /// Streams that were cut off with their gateway, and asked for again.
    pub(super) cut: u64,
    /// Streams that were something else than undisturbed.
    pub(super) changed: u64,
    /// Streams that hung.
    pub(super) hung: u64,
    /// Refusals and broken connections that were not the gateway's death.
    pub(super) errors: Vec<String>,
}

/// What the streams and the one who disturbs them share.
#[derive(Debug, Default)]
struct Board {
    /// The fault of the moment, or, between two, the next one.
    fault: usize,
    /// Whether it concerns the gateway.
    of_gateway: bool,
    noticed: BTreeMap<usize, Noticed>,
    /// Each stream since the fault began.
    streams: Vec<Since>,
}

#[derive(Debug, Default, Clone, Copy)]
struct Since {
    /// Its longest silence.
    longest: Duration,
    /// Whether one that ran when the fault began has been compared. One that was cut off has to be the same when it is asked for again.
    compared: bool,
    /// Whether it was cut off with its gateway; however often it was then asked for in vain.
    cut: bool,
}

/// The streams.
pub(super) struct Load {
    board: Arc<Mutex<Board>>,
    stop: watch::Sender<bool>,
    tasks: JoinSet<()>,
}

fn lock(board: &Mutex<Board>) -> MutexGuard<'_, Board> {
    board.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Load {
    /// Starts one stream per shape.
    pub(super) fn start(client: &Client, shapes: &[Shape]) -> Load {
        let board = Board { streams: vec![Since::default(); shapes.len()], ..Board::default() };
        let board = Arc::new(Mutex::new(board));
        let (stop, stopped) = watch::channel(false);
        let mut tasks = JoinSet::new();
        for (index, shape) in shapes.iter().enumerate() {
            let worker = Worker { index, client: client.clone(), shape: shape.clone(), board: board.clone() };
            let mut stopped = stopped.clone();
            tasks.spawn(async move {
                tokio::select! {
                    () = worker.run() => {}
                    _ = stopped.wait_for(|stop| *stop) => {}
                }
            });
        }
        Load { board, stop, tasks }
    }

    /// From now on everything that is noticed is because of this fault.
    pub(super) fn begin_fault(&self, number: usize, of_gateway: bool) {
        let mut board = lock(&self.board);
        (board.fault, board.of_gateway) = (number, of_gateway);
        board.streams.fill(Since::default());
    }

    /// Waits until what ran when the fault began has ended, and been compared.
    pub(super) async fn all_have_ended_since(&self, number: usize) {
        let began = Instant::now();
        let ended =
            |board: &Board| board.fault != number || board.streams.iter().all(|stream| stream.compared);
        // Each of them either goes on or is found to hang.
        while !ended(&lock(&self.board)) && began.elapsed() < 4 * SILENCE_MAX {
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// What was noticed of it so far.
    pub(super) fn end_fault(&self, number: usize) -> Noticed {
        let mut board = lock(&self.board);
        board.fault = number + 1;
        let stalls_s = board.streams.iter().map(|stream| stream.longest.as_secs_f64()).collect();
        Noticed { stalls_s, ..board.noticed.remove(&number).unwrap_or_default() }
    }

    /// Ends the streams as they are; what was noticed after `faults` faults.
    pub(super) async fn stop(mut self, faults: usize) -> Noticed {
        self.stop.send_replace(true);
        while self.tasks.join_next().await.is_some() {}
        Noticed { stalls_s: Vec::new(), ..self.end_fault(faults) }
    }
}

struct Worker {
    index: usize,
    client: Client,
    shape: Shape,
    board: Arc<Mutex<Board>>,
}

impl Worker {
    async fn run(self) {
        // From the last word of one stream to the first of the next counts, too: that is how long a client waits.
        let mut last = Instant::now();
        loop {
            let mut hear = |at: Instant| {
                self.hear(at.saturating_duration_since(last));
                last = at;
            };
            match stream(&self.client, &self.shape.request, &mut hear).await {
                Ok(choices) => {
                    let right = choices == self.shape.expected;
                    self.note(|noticed| match right {
                        true => noticed.completed += 1,
                        false => noticed.changed += 1,
                    });
                    self.compared();
                }
                Err(error) => {
                    self.failed(&error);
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }

    fn hear(&self, silence: Duration) {
        let mut board = lock(&self.board);
        if let Some(since) = board.streams.get_mut(self.index) {
            since.longest = since.longest.max(silence);
        }
    }

    fn compared(&self) {
        if let Some(since) = lock(&self.board).streams.get_mut(self.index) {
            since.compared = true;
        }
    }

    /// Whether it has been cut off already by this fault; from now on it has.
    fn cut_before(&self) -> bool {
        let mut board = lock(&self.board);
        board.streams.get_mut(self.index).is_some_and(|since| std::mem::replace(&mut since.cut, true))
    }

    fn note(&self, write: impl FnOnce(&mut Noticed)) {
        let mut board = lock(&self.board);
        let fault = board.fault;
        write(board.noticed.entry(fault).or_default());
    }

    fn failed(&self, error: &anyhow::Error) {
        let refused = error.downcast_ref::<StatusError>().is_some();
        let hung = error.downcast_ref::<Hung>().is_some();
        let cut = !refused && !hung && lock(&self.board).of_gateway;
        let again = cut && self.cut_before();
        self.note(|noticed| match hung {
            true => noticed.hung += 1,
            false if cut => noticed.cut += u64::from(!again),
            false => noticed.errors.push(format!("{error:#}")),
        });
    }
}

/// It says nothing any more.
#[derive(Debug, thiserror::Error)]
#[error("nothing came for {} s", SILENCE_MAX.as_secs())]
struct Hung;

/// Asks once, and reads to the end; `hear` is told of each event.
async fn stream(client: &Client, request: &Value, hear: &mut impl FnMut(Instant)) -> Result<Vec<Choice>> {
    let asked = tokio::time::timeout(SILENCE_MAX, client.stream("/v1/completions", request));
    let mut events = asked.await.map_err(|_| Hung)??;
    let count = request["n"].as_u64().unwrap_or(1) as usize;
    let mut choices = vec![Choice::default(); count];
    loop {
        let next = tokio::time::timeout(SILENCE_MAX, events.next());
        let Some(event) = next.await.map_err(|_| Hung)?? else { break };
        hear(events.received());
        for part in event["choices"].as_array().into_iter().flatten() {
            let index = part["index"].as_u64().unwrap_or(u64::MAX) as usize;
            choices.get_mut(index).context("a choice that was not asked for")?.extend(part);
        }
    }
    let whole = choices.iter().all(|choice| !choice.finish_reason.is_null());
    if whole { Ok(choices) } else { Err(anyhow::anyhow!("the stream ended before its end")) }
}

impl Choice {
    fn extend(&mut self, part: &Value) {
        self.text.push_str(part["text"].as_str().unwrap_or_default());
        let list = |field: &str| part["logprobs"][field].as_array().cloned().unwrap_or_default();
        self.tokens.extend(list("tokens"));
        self.logprobs.extend(list("token_logprobs"));
        if !part["finish_reason"].is_null() {
            self.finish_reason = part["finish_reason"].clone();
        }
    }
}
