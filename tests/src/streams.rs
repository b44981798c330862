//! Streams of a request that is easily disturbed: undisturbed, and while something happens.

use crate::{Cluster, Event, EventStream};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// The path that they ask.
pub const COMPLETIONS: &str = "/v1/completions";

/// Long enough to be running when something happens. With what there is to go wrong: sampling, penalties, log-probabilities.
pub fn long(stream: bool) -> Value {
    json!({
        "prompt": "Write", "temperature": 1, "seed": 7, "n": 8, "max_tokens": 480, "ignore_eos": true, "stream": stream,
        "logprobs": 2, "presence_penalty": 0.5, "repetition_penalty": 1.1,
    })
}

/// A choice as its client has it.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Choice {
    /// Text.
    pub text: String,
    /// Tokens.
    pub tokens: Vec<Value>,
    /// Their log-probabilities.
    pub logprobs: Vec<Value>,
    /// Why it ended.
    pub finish_reason: Value,
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

/// The long request undisturbed.
pub fn undisturbed(cluster: &Cluster) -> Vec<Choice> {
    let answer = cluster.post(COMPLETIONS, &long(false)).ok();
    let whole = |part: &Value| {
        let mut choice = Choice::default();
        choice.extend(part);
        choice
    };
    let choices: Vec<Choice> = answer["choices"].as_array().expect("choices").iter().map(whole).collect();
    assert!(choices.iter().all(|choice| choice.tokens.len() == 480), "{choices:?}");
    choices
}

/// A stream that has begun.
pub fn running_stream(cluster: &Cluster) -> EventStream {
    let (stream, _) = begun(cluster);
    stream
}

/// A stream that has begun, and what has come of it.
pub fn begun(cluster: &Cluster) -> (EventStream, Vec<Event>) {
    let mut stream = cluster.stream(COMPLETIONS, &long(true));
    let events: Vec<Event> = (0..64).map(|_| stream.next_event()).collect();
    assert!(events.iter().all(|event| matches!(event, Event::Data(_))), "{events:?}");
    (stream, events)
}

/// What a stream's events come to.
#[track_caller]
pub fn choices_of(events: &[Event]) -> Vec<Choice> {
    let mut choices = vec![Choice::default(); 8];
    for event in events {
        let Event::Data(data) = event else { continue };
        let data: Value = serde_json::from_str(data).expect("JSON");
        assert!(data["error"].is_null(), "{data}");
        for part in data["choices"].as_array().into_iter().flatten() {
            choices[part["index"].as_u64().expect("an index") as usize].extend(part);
        }
    }
    assert_eq!(events.last(), Some(&Event::Done));
    choices
}

/// Has something happen to a running stream: it must be what it is undisturbed. Gives its longest pause from then on.
#[track_caller]
pub fn disturb(cluster: &Cluster, expected: &[Choice], disturbance: impl FnOnce()) -> Duration {
    let (mut stream, mut events) = begun(cluster);
    disturbance();
    let mut longest = Duration::ZERO;
    loop {
        let waited = Instant::now();
        let event = stream.next_event();
        longest = longest.max(waited.elapsed());
        let over = !matches!(event, Event::Data(_));
        events.push(event);
        if over {
            break;
        }
    }
    let choices = choices_of(&events);
    for (index, (choice, expected)) in choices.iter().zip(expected).enumerate() {
        assert_eq!(choice, expected, "choice {index}\n{}", cluster.said());
    }
    longest
}

/// Nothing in the cluster's logs tells of a panic.
#[track_caller]
pub fn assert_no_panic(cluster: &Cluster) {
    let said = cluster.said();
    assert!(!said.contains("panicked at"), "{said}");
}
