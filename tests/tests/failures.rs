//! Processes that die, freeze or are told to stop while streams run.

use ashlar_tests::{Cluster, Event, EventStream, eventually, processes, until};
use serde_json::{Value, json};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// From a failure until every stream that it concerns has ended.
const END_LIMIT: Duration = Duration::from_secs(2);
/// From a failure until requests are served again: restart, loading, joining; the machine may be busy.
const RECOVERY_LIMIT: Duration = Duration::from_secs(20);
const COMPLETIONS: &str = "/v1/completions";

/// These tests measure time: one after the other.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Long enough to be running when something happens.
fn long(stream: bool) -> Value {
    json!({
        "prompt": "Write", "temperature": 1, "seed": 7, "n": 8, "max_tokens": 480, "ignore_eos": true, "stream": stream,
    })
}

fn short() -> Value {
    json!({"prompt": "The capital of France is", "temperature": 1, "seed": 3, "max_tokens": 24, "ignore_eos": true, "logprobs": 5})
}

/// `choices` of the short request, as sent.
fn ask(cluster: &Cluster) -> String {
    let answer = cluster.post(COMPLETIONS, &short());
    assert_eq!(answer.status, 200, "{}", answer.text());
    let text = answer.text();
    text.split_once("\"choices\":")
        .map(|(_, rest)| rest.split(",\"system").next().unwrap_or(rest).to_owned())
        .expect("choices")
}

/// The short request until it is answered.
#[track_caller]
fn ask_until_answered(cluster: &Cluster) -> String {
    let answered = until(RECOVERY_LIMIT, || {
        let answer =
            ashlar_tests::http::post(cluster.address(), COMPLETIONS, short().to_string().as_bytes()).ok()?;
        // Meanwhile: refused in order, or (without a gateway) not connected at all.
        assert!([200, 503].contains(&answer.status), "{}", answer.text());
        (answer.status == 200).then(|| ask(cluster))
    });
    answered.unwrap_or_else(|| panic!("no answer within {RECOVERY_LIMIT:?}:\n{}", cluster.said()))
}

/// A stream that has begun.
fn running_stream(cluster: &Cluster) -> EventStream {
    let mut stream = cluster.stream(COMPLETIONS, &long(true));
    for _ in 0..16 {
        assert!(matches!(stream.next_event(), Event::Data(_)));
    }
    stream
}

/// How a stream ended, and how long after `since`. `Ok` where it was an error event followed by the end.
fn end_of(stream: EventStream, since: Instant) -> (Duration, Result<String, String>) {
    let events = stream.rest();
    let took = since.elapsed();
    let last_data = events.iter().rev().find_map(|event| match event {
        Event::Data(data) => Some(data.clone()),
        _ => None,
    });
    let error: Value = last_data.and_then(|data| serde_json::from_str(&data).ok()).unwrap_or_default();
    match (events.last(), error["error"]["message"].as_str()) {
        (Some(Event::Done), Some(message)) => (took, Ok(message.to_owned())),
        (last, _) => (took, Err(format!("{last:?}"))),
    }
}

#[track_caller]
fn assert_no_panic(cluster: &Cluster) {
    let said = cluster.said();
    assert!(!said.contains("panicked at"), "{said}");
}

#[test]
fn a_killed_node_ends_streams_with_an_error_is_started_again_and_answers_as_before() {
    let _alone = alone();
    check_killed(&Cluster::start(&["--stages", "2", "--tp", "2"]));
}

/// Ranks of the first stage then hold links to the one that samples, too.
#[test]
fn a_killed_node_that_shares_the_head_ends_streams_and_the_cluster_answers_as_before() {
    let _alone = alone();
    check_killed(&Cluster::start(&["--stages", "2", "--tp", "2", "--set", "spread_head=true"]));
}

#[track_caller]
fn check_killed(cluster: &Cluster) {
    let before = ask(cluster);
    for node in ["node-0", "node-1", "node-2", "node-3"] {
        let stream = running_stream(cluster);
        let pid = cluster.pid(node);
        let killed = Instant::now();
        assert!(processes::signal(pid, "KILL"));
        let (took, end) = end_of(stream, killed);
        let message =
            end.unwrap_or_else(|end| panic!("{node}: the stream ended with {end}\n{}", cluster.said()));
        assert!(took < END_LIMIT, "{node}: the stream ended after {took:?}");
        assert!(message.contains("node"), "{node}: {message}");
        assert_eq!(ask_until_answered(cluster), before, "after {node} was killed");
        assert_ne!(cluster.pid(node), pid);
        println!(
            "{node}: stream ended after {took:?} ({message}), answering again after {:?}",
            killed.elapsed()
        );
    }
    assert_no_panic(cluster);
}

#[test]
fn a_killed_scheduler_ends_streams_is_started_again_and_answers_as_before() {
    let _alone = alone();
    let cluster = Cluster::demo();
    let before = ask(&cluster);
    let stream = running_stream(&cluster);
    let killed = Instant::now();
    assert!(processes::signal(cluster.pid("scheduler"), "KILL"));
    let (took, end) = end_of(stream, killed);
    assert!(took < END_LIMIT, "the stream ended after {took:?}");
    let message = end.unwrap_or_else(|end| panic!("the stream ended with {end}"));
    assert!(message.contains("scheduler"), "{message}");
    assert_eq!(ask_until_answered(&cluster), before);
    println!("stream ended after {took:?} ({message}), answering again after {:?}", killed.elapsed());
    let term = cluster.metric("ashlar_lease_term");
    assert!(term >= 2.0, "term {term}: a new scheduler needs a higher one");
    assert_no_panic(&cluster);
}

#[test]
fn a_killed_gateway_drops_its_connections_is_started_again_and_answers_as_before() {
    let _alone = alone();
    let cluster = Cluster::demo();
    let before = ask(&cluster);
    let stream = running_stream(&cluster);
    let killed = Instant::now();
    assert!(processes::signal(cluster.pid("gateway"), "KILL"));
    let (took, end) = end_of(stream, killed);
    assert!(took < END_LIMIT, "the stream ended after {took:?}");
    assert!(end.is_err(), "a dead gateway said {end:?}");
    assert_eq!(ask_until_answered(&cluster), before);
    println!("stream ended after {took:?}, answering again after {:?}", killed.elapsed());
    eventually("what the dead gateway had asked for is cancelled", RECOVERY_LIMIT, || idle(&cluster));
    assert_no_panic(&cluster);
}

#[test]
fn a_frozen_node_is_noticed_and_once_it_goes_on_the_cluster_answers_as_before() {
    let _alone = alone();
    check_frozen(&Cluster::demo());
}

/// The other rank sleeps in shared memory and must go on saying that it lives, else it would be taken for the frozen one.
#[test]
fn a_frozen_rank_is_noticed_and_once_it_goes_on_the_cluster_answers_as_before() {
    let _alone = alone();
    check_frozen(&Cluster::start(&["--stages", "1", "--tp", "2"]));
}

/// The rank that samples waits for the frozen one's slice of the logits.
#[test]
fn a_frozen_node_that_shares_the_head_is_noticed() {
    let _alone = alone();
    check_frozen(&Cluster::start(&["--stages", "2", "--tp", "1", "--set", "spread_head=true"]));
}

#[track_caller]
fn check_frozen(cluster: &Cluster) {
    let before = ask(cluster);
    for node in ["node-0", "node-1"] {
        let stream = running_stream(cluster);
        let pid = cluster.pid(node);
        let frozen = Instant::now();
        assert!(processes::signal(pid, "STOP"));
        let (took, end) = end_of(stream, frozen);
        let message = end.unwrap_or_else(|end| panic!("{node}: the stream ended with {end}"));
        assert!(took < END_LIMIT, "{node}: the stream ended after {took:?}");
        assert!(message.contains(node), "{message}");
        // Nobody waits for it: requests are refused at once, and say why.
        let asked = Instant::now();
        let refused = cluster.post(COMPLETIONS, &short());
        assert_eq!(refused.status, 503, "{}", refused.text());
        assert!(asked.elapsed() < END_LIMIT, "refused after {:?}", asked.elapsed());
        assert!(refused.text().contains(node), "{}", refused.text());
        assert!(processes::signal(pid, "CONT"));
        let going_on = Instant::now();
        assert_eq!(ask_until_answered(cluster), before, "after {node} was frozen");
        println!(
            "{node}: noticed after {took:?} ({message}), answering again {:?} after it went on",
            going_on.elapsed()
        );
    }
    assert_no_panic(cluster);
}

#[test]
fn interrupting_lets_streams_end_and_leaves_no_process() {
    let _alone = alone();
    let cluster = Cluster::demo();
    let undisturbed = cluster.post(COMPLETIONS, &long(false)).ok();
    let expected = undisturbed["choices"][0]["text"].as_str().expect("a text");
    let mut stream = cluster.stream(COMPLETIONS, &long(true));
    let mut events: Vec<Event> = (0..16).map(|_| stream.next_event()).collect();
    let children: Vec<u32> = processes::children(cluster.up_pid());
    assert_eq!(children.len(), 4, "gateway, scheduler and two nodes");
    cluster.interrupt();
    events.extend(stream.rest());
    assert_eq!(events.last(), Some(&Event::Done));
    let mut text = String::new();
    for event in &events {
        let Event::Data(data) = event else { continue };
        let data: Value = serde_json::from_str(data).expect("JSON");
        assert!(data["error"].is_null(), "{data}");
        for choice in data["choices"].as_array().into_iter().flatten().filter(|choice| choice["index"] == 0) {
            text.push_str(choice["text"].as_str().unwrap_or_default());
        }
    }
    assert_eq!(text, expected);
    let ended = cluster.ended();
    let status = ended.status.unwrap_or_else(|| panic!("`up` does not end:\n{}", ended.said));
    assert_eq!(status.code(), Some(0), "{}", ended.said);
    for child in children {
        assert!(!processes::alive(child), "process {child} is left:\n{}", ended.said);
    }
    assert!(!ended.said.contains("panicked at"), "{}", ended.said);
}

#[test]
fn children_end_when_the_supervisor_is_killed() {
    let _alone = alone();
    let cluster = Cluster::demo();
    let children = processes::children(cluster.up_pid());
    assert_eq!(children.len(), 4);
    assert!(processes::signal(cluster.up_pid(), "KILL"));
    let took = eventually("every child has ended", RECOVERY_LIMIT, || {
        !children.iter().any(|child| processes::alive(*child))
    });
    println!("all ended after {took:?}");
}

#[test]
fn a_client_that_goes_away_gives_back_what_it_held() {
    let _alone = alone();
    let cluster = Cluster::demo();
    let held = cluster.metric("vllm:kv_cache_usage_perc");
    let scheduled = cluster.metric("ashlar_scheduled_tokens_total");
    let streams: Vec<EventStream> = (0..4).map(|_| running_stream(&cluster)).collect();
    drop(streams);
    // What the gateway knows of the scheduler is a moment old: first it must know of these requests at all.
    eventually("the counters show what was streamed", RECOVERY_LIMIT, || {
        cluster.metric("ashlar_scheduled_tokens_total") >= scheduled + 4.0 * 16.0
    });
    let took = eventually("nothing runs any more", END_LIMIT, || idle(&cluster));
    eventually("its blocks are free", END_LIMIT, || cluster.metric("vllm:kv_cache_usage_perc") <= held);
    // Had they run on, they would have generated every token that they were asked for.
    let scheduled = cluster.metric("ashlar_scheduled_tokens_total") - scheduled;
    assert!(scheduled < 4.0 * 8.0 * 480.0, "{scheduled} tokens");
    println!("idle after {took:?}");
}

fn idle(cluster: &Cluster) -> bool {
    cluster.metric("vllm:num_requests_running") + cluster.metric("vllm:num_requests_waiting") == 0.0
}
