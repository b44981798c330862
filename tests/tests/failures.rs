//! Processes that die, freeze or are told to stop while streams run: no stream notices more than a pause.

#[allow(dead_code, reason = "shared with the store's tests")]
#[path = "../../crates/store/tests/conformance/redis_server.rs"]
mod redis_server;

use ashlar_tests::streams::{
    COMPLETIONS, assert_no_panic, begun, choices_of, disturb, running_stream, undisturbed,
};
use ashlar_tests::{Cluster, Event, EventStream, eventually, processes, until};
use redis_server::RedisServer;
use serde_json::{Value, json};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// From a death until every stream goes on: a second to notice, starting the process again, loading, joining, and computing anew what was
/// lost. Other tests run at the same time: `ashlar drill` measures.
const PAUSE_LIMIT: Duration = Duration::from_secs(5);
/// From a failure until the cluster is as it was; the machine may be busy.
const RECOVERY_LIMIT: Duration = Duration::from_secs(20);

/// These tests measure time: one after the other.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
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

/// The short request until a gateway is there to take it.
#[track_caller]
fn ask_until_answered(cluster: &Cluster) -> String {
    let answered = until(RECOVERY_LIMIT, || {
        let answer =
            ashlar_tests::http::post(cluster.address(), COMPLETIONS, short().to_string().as_bytes()).ok()?;
        assert!([200, 503].contains(&answer.status), "{}", answer.text());
        (answer.status == 200).then(|| ask(cluster))
    });
    answered.unwrap_or_else(|| panic!("no answer within {RECOVERY_LIMIT:?}:\n{}", cluster.said()))
}

#[test]
fn a_stream_outlives_any_killed_node() {
    let _alone = alone();
    check_killed(&Cluster::start(&["--stages", "2", "--tp", "2"]));
}

/// Ranks of the first stage then hold links to the one that samples, too.
#[test]
fn a_stream_outlives_any_killed_node_that_shares_the_head() {
    let _alone = alone();
    check_killed(&Cluster::start(&["--stages", "2", "--tp", "2", "--set", "spread_head=true"]));
}

#[track_caller]
fn check_killed(cluster: &Cluster) {
    let expected = undisturbed(cluster);
    for node in ["node-0", "node-1", "node-2", "node-3"] {
        let pid = cluster.pid(node);
        let replays = cluster.metric("ashlar_replays_total");
        let pause = disturb(cluster, &expected, || assert!(processes::signal(pid, "KILL")));
        assert!(pause < PAUSE_LIMIT, "{node}: the stream stood still for {pause:?}\n{}", cluster.said());
        eventually("the replays are counted", RECOVERY_LIMIT, || {
            cluster.metric("ashlar_replays_total") > replays
        });
        assert_ne!(cluster.pid(node), pid);
        println!("{node} killed: the stream stood still for {pause:?}");
    }
    assert_no_panic(cluster);
}

/// Whatever it was computing is suspected, and goes on alone.
#[test]
fn a_stream_outlives_a_crashed_node() {
    let _alone = alone();
    let cluster = Cluster::demo();
    let expected = undisturbed(&cluster);
    let pid = cluster.pid("node-1");
    let pause = disturb(&cluster, &expected, || assert!(processes::signal(pid, "ABRT")));
    println!("node-1 crashed: the stream stood still for {pause:?}");
    assert!(cluster.said().contains("SIGABRT"), "{}", cluster.said());
    assert_no_panic(&cluster);
}

/// What is being computed may be why, as where a node crashes.
#[test]
fn a_stream_outlives_a_node_that_is_killed_for_want_of_memory_and_is_suspected() {
    let _alone = alone();
    let cluster = Cluster::demo();
    let expected = text(&cluster.stream(COMPLETIONS, &long()).rest());
    let pid = cluster.pid("node-1");
    let mut stream = cluster.stream(COMPLETIONS, &long());
    let mut events: Vec<Event> = (0..20).map(|_| stream.next_event()).collect();
    let Some(limit) = processes::MemoryLimit::impose(pid, 1 << 16) else {
        eprintln!("SKIPPED a node that runs out of memory: limiting it takes root and control groups");
        return;
    };
    // Others make it take more: as many tokens as there has been no need for yet.
    let other = |number: usize| {
        let mut body = long();
        body["prompt"] = json!(format!("Write word {number}. ").repeat(16));
        cluster.stream(COMPLETIONS, &body)
    };
    let others: Vec<EventStream> = (0..24).map(other).collect();
    eventually("it is killed", RECOVERY_LIMIT, || !processes::alive(pid));
    drop(limit);
    events.extend(stream.rest());
    assert_eq!(text(&events), expected, "{}", cluster.said());
    for (number, disturbed) in others.into_iter().enumerate() {
        assert_eq!(text(&disturbed.rest()), text(&other(number).rest()), "{}", cluster.said());
    }
    assert!(cluster.said().contains("for want of memory"), "{}", cluster.said());
    assert_no_panic(&cluster);
}

#[test]
fn a_stream_outlives_a_killed_node_in_the_place_of_which_another_one_steps() {
    let _alone = alone();
    let cluster = Cluster::start(&["--stages", "2", "--nodes", "3"]);
    let expected = undisturbed(&cluster);
    // It does not come back: while it is frozen it is no better than dead.
    let pid = cluster.pid("node-0");
    let pause = disturb(&cluster, &expected, || assert!(processes::signal(pid, "STOP")));
    assert!(pause < PAUSE_LIMIT, "the stream stood still for {pause:?}\n{}", cluster.said());
    println!("node-0 frozen beside a standby: the stream stood still for {pause:?}");
    assert!(processes::signal(pid, "CONT"));
    assert_eq!(undisturbed(&cluster), expected);
    assert_no_panic(&cluster);
}

#[test]
fn a_stream_goes_on_with_the_other_replica() {
    let _alone = alone();
    let cluster = Cluster::start(&["--stages", "1", "--replicas", "2"]);
    let expected = undisturbed(&cluster);
    for node in ["node-0", "node-1"] {
        let pid = cluster.pid(node);
        let pause = disturb(&cluster, &expected, || assert!(processes::signal(pid, "STOP")));
        assert!(pause < PAUSE_LIMIT, "{node}: the stream stood still for {pause:?}\n{}", cluster.said());
        println!("{node} of another replica frozen: the stream stood still for {pause:?}");
        assert!(processes::signal(pid, "CONT"));
        eventually("both replicas serve", RECOVERY_LIMIT, || cluster.metric("ashlar_replicas_ready") == 2.0);
    }
    assert_no_panic(&cluster);
}

#[test]
fn a_stream_outlives_a_killed_scheduler() {
    let _alone = alone();
    let cluster = Cluster::demo();
    let expected = undisturbed(&cluster);
    for _ in 0..2 {
        let term = cluster.metric("ashlar_lease_term");
        let pid = cluster.pid("scheduler");
        let pause = disturb(&cluster, &expected, || assert!(processes::signal(pid, "KILL")));
        assert!(pause < PAUSE_LIMIT, "the stream stood still for {pause:?}\n{}", cluster.said());
        assert!(cluster.metric("ashlar_lease_term") > term, "a new scheduler needs a higher term");
        println!("scheduler killed: the stream stood still for {pause:?}");
    }
    assert!(cluster.metric("ashlar_choices_resubmitted_total") >= 16.0);
    assert_no_panic(&cluster);
}

/// A prompt of 280 tokens, and more to come.
fn long() -> Value {
    json!({
        "prompt": "Write a word. ".repeat(20), "max_tokens": 150, "ignore_eos": true, "temperature": 1, "seed": 3,
        "stream": true,
    })
}

fn text(events: &[Event]) -> String {
    let part = |event: &Event| match event {
        Event::Data(data) => {
            serde_json::from_str::<Value>(data).ok()?["choices"][0]["text"].as_str().map(str::to_owned)
        }
        _ => None,
    };
    events.iter().filter_map(part).collect()
}

/// The other stages compute again only what is beyond the last full block.
#[test]
fn a_lost_stage_alone_computes_again_what_it_had() {
    let _alone = alone();
    for (arguments, lost) in [
        (["--stages", "3", "--nodes", "3"], ["node-0", "node-1", "node-2"]),
        (["--stages", "2", "--tp", "2"], ["node-0", "node-2", "node-3"]),
    ] {
        let cluster = Cluster::start(&arguments);
        let expected = text(&cluster.stream(COMPLETIONS, &long()).rest());
        let mut before = counted(&cluster, 150);
        for (tokens, node) in (300..).step_by(150).zip(lost) {
            let mut stream = cluster.stream(COMPLETIONS, &long());
            let mut events: Vec<Event> = (0..20).map(|_| stream.next_event()).collect();
            assert!(processes::signal(cluster.pid(node), "KILL"));
            events.extend(stream.rest());
            assert_eq!(text(&events), expected, "{node}\n{}", cluster.said());
            let after = counted(&cluster, tokens);
            let refilled = after.1 - before.1;
            let by_all = after.0 - before.0 - refilled;
            before = after;
            assert!(refilled >= 280, "{node}: {refilled} refilled, {by_all} by all\n{}", cluster.said());
            // The prompt was known; what is beyond a block, and what was on its way, is computed twice.
            assert!(by_all < 150 + 64, "{node}: {refilled} refilled, {by_all} by all\n{}", cluster.said());
        }
        assert_no_panic(&cluster);
    }
}

/// Positions computed, and those of them that only some stages computed, once so many tokens have been generated.
fn counted(cluster: &Cluster, generated_tokens: u64) -> (u64, u64) {
    let counter = |name: &str| cluster.view()["counters"][name].as_u64().unwrap_or_default();
    eventually("all tokens are counted", RECOVERY_LIMIT, || counter("generated_tokens") >= generated_tokens);
    (counter("scheduled_tokens"), counter("refilled_tokens"))
}

/// Of a sequence only what is beyond its last full block is computed again.
#[test]
fn what_ranks_have_kept_is_not_computed_again_under_another_scheduler() {
    let _alone = alone();
    let cluster = Cluster::start(&["--stages", "2", "--tp", "2", "--set-node", "link_faults.delay_us=500"]);
    let expected = text(&cluster.stream(COMPLETIONS, &long()).rest());
    let mut stream = cluster.stream(COMPLETIONS, &long());
    let mut events: Vec<Event> = (0..20).map(|_| stream.next_event()).collect();
    assert!(processes::signal(cluster.pid("scheduler"), "KILL"));
    events.extend(stream.rest());
    assert_eq!(text(&events), expected);
    // The one that leads now has seen nothing but the rest of this stream.
    let asked = cluster.metric("vllm:prefix_cache_queries_total");
    let found = cluster.metric("vllm:prefix_cache_hits_total");
    assert!(
        asked >= 280.0 && found + 16.0 > asked,
        "{found} of {asked} prompt tokens were kept\n{}",
        cluster.said()
    );
    assert_no_panic(&cluster);
}

/// It is not dead: whoever supervises it has to notice.
#[test]
fn a_stream_outlives_a_frozen_scheduler() {
    let _alone = alone();
    let cluster = Cluster::demo();
    let expected = undisturbed(&cluster);
    let pid = cluster.pid("scheduler");
    let pause = disturb(&cluster, &expected, || assert!(processes::signal(pid, "STOP")));
    assert!(
        pause < PAUSE_LIMIT + Duration::from_secs(1),
        "the stream stood still for {pause:?}\n{}",
        cluster.said()
    );
    println!("scheduler frozen: the stream stood still for {pause:?}");
    assert!(!processes::alive(pid));
    assert_no_panic(&cluster);
}

/// The scheduler that leads: the last that has said so.
fn leader(cluster: &Cluster) -> &'static str {
    let last_term = |role: &str| {
        let log =
            std::fs::read_to_string(cluster.state().join(format!("logs/{role}.log"))).unwrap_or_default();
        let terms = log
            .lines()
            .filter_map(|line| line.split_once("leading term=")?.1.split(' ').next()?.parse().ok());
        terms.max().unwrap_or(0_u64)
    };
    ["scheduler-0", "scheduler-1"].into_iter().max_by_key(|role| last_term(role)).expect("one of them")
}

#[test]
fn a_stream_goes_on_with_the_scheduler_that_stood_by() {
    let _alone = alone();
    let Some(redis) = RedisServer::start() else { return };
    let cluster = Cluster::start(&["--stages", "2", "--schedulers", "2", "--store", &redis.url()]);
    let expected = undisturbed(&cluster);
    let term = cluster.metric("ashlar_lease_term");
    for _ in 0..3 {
        let role = leader(&cluster);
        let pid = cluster.pid(role);
        let pause = disturb(&cluster, &expected, || assert!(processes::signal(pid, "KILL")));
        assert!(pause < PAUSE_LIMIT, "{role}: the stream stood still for {pause:?}\n{}", cluster.said());
        println!("{role} killed: the stream stood still for {pause:?}");
    }
    // One that was killed may lead again, if it is back when the lease runs out.
    assert!(cluster.metric("ashlar_lease_term") >= term + 3.0);
    assert_no_panic(&cluster);
}

/// Nothing of a stream is in the store.
#[test]
fn streams_go_on_without_redis_and_outlive_a_node_meanwhile_and_a_store_that_has_forgotten_all() {
    let _alone = alone();
    let Some(mut redis) = RedisServer::start() else { return };
    let cluster = Cluster::start(&["--stages", "2", "--store", &redis.url()]);
    let expected = undisturbed(&cluster);
    let pause = disturb(&cluster, &expected, || redis.kill());
    assert!(pause < PAUSE_LIMIT, "Redis: the stream stood still for {pause:?}\n{}", cluster.said());
    let pid = cluster.pid("node-1");
    let pause = disturb(&cluster, &expected, || assert!(processes::signal(pid, "KILL")));
    assert!(pause < PAUSE_LIMIT, "a node without Redis: {pause:?}\n{}", cluster.said());
    redis.start_again();
    // Its term is gone, too: the next leader has to go above what the ranks have accepted.
    let term = cluster.metric("ashlar_lease_term");
    let pid = cluster.pid("scheduler");
    let pause = disturb(&cluster, &expected, || assert!(processes::signal(pid, "KILL")));
    assert!(pause < PAUSE_LIMIT, "a scheduler whose store forgot: {pause:?}\n{}", cluster.said());
    assert!(cluster.metric("ashlar_lease_term") > term);
    assert_no_panic(&cluster);
}

#[test]
fn streams_and_leader_outlive_a_redis_that_answers_late_or_refuses_writes() {
    let _alone = alone();
    let Some(redis) = RedisServer::start() else { return };
    let cluster = Cluster::start(&["--stages", "2", "--store", &redis.url()]);
    let expected = undisturbed(&cluster);
    let (term, leader) = (cluster.metric("ashlar_lease_term"), cluster.pid("scheduler"));
    let pause = disturb(&cluster, &expected, || redis.set("min-replicas-to-write", "1"));
    assert!(pause < PAUSE_LIMIT, "writes refused: the stream stood still for {pause:?}\n{}", cluster.said());
    // Longer than a lease lasts.
    eventually("it is said", RECOVERY_LIMIT, || cluster.said().contains("NOREPLICAS"));
    assert_eq!(undisturbed(&cluster), expected);
    redis.set("min-replicas-to-write", "0");
    let pause = disturb(&cluster, &expected, || redis.signal("-STOP"));
    assert!(
        pause < PAUSE_LIMIT,
        "a Redis that hangs: the stream stood still for {pause:?}\n{}",
        cluster.said()
    );
    redis.signal("-CONT");
    assert_eq!(undisturbed(&cluster), expected);
    assert_eq!(cluster.pid("scheduler"), leader);
    println!("term {term} before, {} after", cluster.metric("ashlar_lease_term"));
    assert_no_panic(&cluster);
}

#[test]
fn whoever_asks_while_nothing_is_up_is_answered_once_something_is() {
    let _alone = alone();
    let cluster = Cluster::demo();
    let before = ask(&cluster);
    for role in ["node-0", "scheduler"] {
        let asked = Instant::now();
        assert!(processes::signal(cluster.pid(role), "KILL"));
        assert_eq!(ask(&cluster), before, "after {role} was killed");
        println!("{role} killed: answered after {:?}", asked.elapsed());
    }
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
    let events = stream.rest();
    assert!(killed.elapsed() < PAUSE_LIMIT, "the stream ended after {:?}", killed.elapsed());
    assert_ne!(events.last(), Some(&Event::Done), "a dead gateway said that all is well");
    assert_eq!(ask_until_answered(&cluster), before);
    println!("gateway killed: answering again after {:?}", killed.elapsed());
    eventually("what the dead gateway had asked for is cancelled", RECOVERY_LIMIT, || idle(&cluster));
    assert_no_panic(&cluster);
}

#[test]
fn a_frozen_node_is_noticed_and_streams_wait_until_it_goes_on() {
    let _alone = alone();
    check_frozen(&Cluster::demo());
}

/// The other rank sleeps in shared memory and must go on saying that it lives, else it would be taken for the frozen one.
#[test]
fn a_frozen_rank_is_noticed_and_streams_wait_until_it_goes_on() {
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
    let expected = undisturbed(cluster);
    for node in ["node-0", "node-1"] {
        let pid = cluster.pid(node);
        let mut noticed = Duration::ZERO;
        let pause = disturb(cluster, &expected, || {
            let frozen = Instant::now();
            assert!(processes::signal(pid, "STOP"));
            eventually("the frozen node is noticed", PAUSE_LIMIT, || {
                cluster.view()["problem"].as_str().is_some_and(|problem| problem.contains(node))
            });
            noticed = frozen.elapsed();
            assert!(processes::signal(pid, "CONT"));
        });
        assert!(pause < PAUSE_LIMIT, "{node}: the stream stood still for {pause:?} more\n{}", cluster.said());
        println!(
            "{node} frozen: noticed after {noticed:?}, once it goes on the stream stood still for {pause:?}"
        );
    }
    assert_no_panic(cluster);
}

#[test]
fn interrupting_lets_streams_end_and_leaves_no_process() {
    let _alone = alone();
    let cluster = Cluster::demo();
    let expected = undisturbed(&cluster);
    let (stream, mut events) = begun(&cluster);
    let children: Vec<u32> = processes::children(cluster.up_pid());
    assert_eq!(children.len(), 4, "gateway, scheduler and two nodes");
    cluster.interrupt();
    events.extend(stream.rest());
    assert_eq!(choices_of(&events), expected);
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
    let took = eventually("nothing runs any more", PAUSE_LIMIT, || idle(&cluster));
    eventually("its blocks are free", PAUSE_LIMIT, || cluster.metric("vllm:kv_cache_usage_perc") <= held);
    // Had they run on, they would have generated every token that they were asked for.
    let scheduled = cluster.metric("ashlar_scheduled_tokens_total") - scheduled;
    assert!(scheduled < 4.0 * 8.0 * 480.0, "{scheduled} tokens");
    println!("idle after {took:?}");
}

fn idle(cluster: &Cluster) -> bool {
    cluster.metric("vllm:num_requests_running") + cluster.metric("vllm:num_requests_waiting") == 0.0
}
