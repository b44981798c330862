//! `/v1/responses` over real processes: a stored response outlives its client, its gateway and the scheduler, and no event of it is missed,
//! repeated or changed.

use ashlar_tests::http::{get_stream, raw};
use ashlar_tests::{Cluster, Event, EventStream, eventually, processes, run_to_end, until};
use async_openai::Client;
use async_openai::config::OpenAIConfig;
use async_openai::types::responses::{CreateResponse, OutputItem, ResponseStreamEvent, Status};
use futures::StreamExt;
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::time::Duration;

const RESPONSES: &str = "/v1/responses";
const LIMIT: Duration = Duration::from_secs(30);

/// Long enough to be running when something happens, with what there is to go wrong: sampling, penalties, log-probabilities.
fn long() -> Value {
    json!({
        "input": "Write", "instructions": "Go on for long.", "temperature": 1, "seed": 7, "max_output_tokens": 400,
        "ignore_eos": true, "top_logprobs": 2, "presence_penalty": 0.5, "stream": true,
        // The end of a turn has no text, so it would have no events.
        "logit_bias": {"258": -100},
    })
}

fn with(mut body: Value, more: Value) -> Value {
    if let (Value::Object(body), Value::Object(more)) = (&mut body, more) {
        body.extend(more);
    }
    body
}

fn next(stream: &mut EventStream) -> Value {
    match stream.next_event() {
        Event::Data(data) => serde_json::from_str(&data).expect("JSON"),
        other => panic!("{other:?}"),
    }
}

/// A client that comes back for the next event whenever its connection breaks.
struct Follower<'a> {
    cluster: &'a Cluster,
    stream: EventStream,
    events: Vec<Value>,
}

impl<'a> Follower<'a> {
    /// Asks, and hears the first events.
    fn begin(cluster: &'a Cluster, body: &Value) -> Follower<'a> {
        let mut stream = cluster.stream(RESPONSES, body);
        let events = vec![next(&mut stream), next(&mut stream)];
        Follower { cluster, stream, events }
    }

    fn id(&self) -> &str {
        self.events[0]["response"]["id"].as_str().expect("an id")
    }

    /// Comes back for what it has not heard.
    fn reconnect(&mut self) {
        self.stream = follow(self.cluster, self.id(), self.events.len() as u64 - 1);
    }

    fn is_over(&self) -> bool {
        let last = self.events.last().and_then(|event| event["type"].as_str()).unwrap_or_default();
        ["response.completed", "response.incomplete", "response.failed"].contains(&last)
    }

    /// Hears more events until there are as many, or all.
    fn hear(&mut self, count: usize) {
        while self.events.len() < count && !self.is_over() {
            match self.stream.next_event() {
                Event::Data(data) => self.events.push(serde_json::from_str(&data).expect("JSON")),
                Event::Done | Event::Closed(_) => self.reconnect(),
            }
        }
    }
}

/// All events that are left.
fn rest(stream: EventStream) -> Vec<Value> {
    let parse = |event| match event {
        Event::Data(data) => Some(serde_json::from_str(&data).expect("JSON")),
        _ => None,
    };
    stream.rest().into_iter().filter_map(parse).collect()
}

/// The stream of a response from an event on, as soon as a gateway is there.
fn follow(cluster: &Cluster, id: &str, starting_after: u64) -> EventStream {
    let path = format!("{RESPONSES}/{id}?stream=true&starting_after={starting_after}");
    let stream =
        until(LIMIT, || get_stream(cluster.address(), &path).ok().filter(|stream| stream.status == 200));
    stream.unwrap_or_else(|| panic!("{id} cannot be followed:\n{}", cluster.said()))
}

fn shown(cluster: &Cluster, id: &str) -> Value {
    let path = format!("{RESPONSES}/{id}");
    let answer = until(LIMIT, || {
        ashlar_tests::http::get(cluster.address(), &path).ok().filter(|answer| answer.status == 200)
    });
    answer.unwrap_or_else(|| panic!("{id} cannot be read:\n{}", cluster.said())).ok()
}

/// Events without what differs from response to response.
fn comparable(events: &[Value]) -> Vec<String> {
    let Some(id) = events.iter().find_map(|event| event["response"]["id"].as_str()) else {
        return Vec::new();
    };
    let digits = id.trim_start_matches("resp_").to_owned();
    let created = events[0]["response"]["created_at"].clone();
    let plain = |event: &Value| {
        let mut event = event.clone();
        if let Some(usage) = event.pointer_mut("/response/usage/input_tokens_details") {
            *usage = Value::Null;
        }
        if event["response"]["created_at"] == created {
            event["response"]["created_at"] = Value::Null;
        }
        event.to_string().replace(&digits, "X")
    };
    events.iter().map(plain).collect()
}

/// Every event is there once, in order, and they end.
fn check_whole(events: &[Value]) {
    for (place, event) in events.iter().enumerate() {
        assert_eq!(event["sequence_number"], place, "{event}");
    }
    let last = events.last().expect("events");
    assert_eq!(last["type"], "response.incomplete", "{last}");
    assert_eq!(last["response"]["usage"]["output_tokens"], 400);
    let deltas = events.iter().filter(|event| event["type"] == "response.output_text.delta");
    let text: String = deltas.filter_map(|event| event["delta"].as_str()).collect();
    assert_eq!(last["response"]["output"][0]["content"][0]["text"], text);
}

fn undisturbed(cluster: &Cluster) -> Vec<String> {
    let events = rest(cluster.stream(RESPONSES, &long()));
    check_whole(&events);
    comparable(&events)
}

#[test]
fn a_response_goes_on_at_the_next_event_after_gateway_and_scheduler_have_died() {
    // Slow enough to be in the middle of it whenever something dies.
    let cluster = Cluster::start(&["--set-node", "link_faults.delay_us=8000"]);
    let expected = undisturbed(&cluster);

    let mut client = Follower::begin(&cluster, &long());
    // The gateway alone; the scheduler alone; both at once, so that only the stored request is left.
    for (number, victims) in [&["gateway"][..], &["scheduler"], &["gateway", "scheduler"]].iter().enumerate()
    {
        client.hear(40 * (number + 1));
        assert!(!client.is_over());
        for victim in *victims {
            processes::signal(cluster.pid(victim), "KILL");
        }
    }
    // A client that merely comes back.
    client.hear(160);
    client.reconnect();
    client.hear(usize::MAX);
    let (id, events) = (client.id().to_owned(), client.events);
    check_whole(&events);
    assert_eq!(comparable(&events), expected);

    // Once more from what is stored, whole and in part, and after a restart of the gateway.
    let stored = || shown(&cluster, &id);
    eventually("the answer is stored", LIMIT, || stored()["status"] == "incomplete");
    assert_eq!(rest(follow(&cluster, &id, 9)), events[10..]);
    processes::signal(cluster.pid("gateway"), "KILL");
    assert_eq!(rest(follow(&cluster, &id, 0)), events[1..]);
    assert_eq!(stored(), events.last().expect("events")["response"]);
}

#[test]
fn a_response_in_the_background_is_finished_by_whoever_is_there() {
    let cluster = Cluster::start(&["--set-node", "link_faults.delay_us=2000"]);
    let expected = undisturbed(&cluster);
    let begun = cluster.post(RESPONSES, &with(long(), json!({"background": true, "stream": false}))).ok();
    assert_eq!((&begun["status"], &begun["background"]), (&json!("in_progress"), &json!(true)));
    let id = begun["id"].as_str().expect("an id");
    processes::signal(cluster.pid("gateway"), "KILL");
    // Nobody asks until it is over: the next gateway takes it up by itself.
    eventually("it is taken up", LIMIT, || cluster.said().contains("taking up a response"));
    eventually("it is over", LIMIT, || shown(&cluster, id)["status"] == "incomplete");
    let mut events = rest(follow(&cluster, id, 0));
    let first = json!({"type": "response.created", "sequence_number": 0, "response": begun});
    events.insert(0, first);
    check_whole(&events);
    let texts = |lines: &[String]| {
        let deltas = lines.iter().filter(|line| line.contains("response.output_text.delta"));
        deltas.cloned().collect::<Vec<_>>()
    };
    assert_eq!(texts(&comparable(&events)), texts(&expected));
}

#[test]
fn responses_are_continued_cancelled_listed_and_deleted() {
    let cluster = Cluster::demo();
    let first = cluster.post(RESPONSES, &json!({"input": "What is 12 + 34?", "temperature": 0})).ok();
    assert_eq!(first["status"], "completed", "{first}");
    assert_eq!(first["output"][0]["content"][0]["text"], "46");
    let id = first["id"].as_str().expect("an id");

    // The next one sees the whole conversation.
    let follows = json!({"input": [{"role": "user", "content": "What is 1 + 2?"}], "previous_response_id": id, "temperature": 0});
    let second = cluster.post(RESPONSES, &follows).ok();
    let items = cluster
        .get(&format!("{RESPONSES}/{}/input_items?order=asc", second["id"].as_str().expect("an id")))
        .ok();
    let kinds: Vec<_> =
        items["data"].as_array().expect("items").iter().map(|item| item["role"].clone()).collect();
    assert_eq!(kinds, ["user", "assistant", "user"]);
    assert!(second["usage"]["input_tokens"].as_u64() > first["usage"]["input_tokens"].as_u64());
    let chat = json!({"temperature": 0, "messages": [
        {"role": "user", "content": "What is 12 + 34?"}, {"role": "assistant", "content": "46"},
        {"role": "user", "content": "What is 1 + 2?"}]});
    let same = cluster.post("/v1/chat/completions", &chat).ok();
    assert_eq!(second["output"][0]["content"][0]["text"], same["choices"][0]["message"]["content"]);

    let slow = with(long(), json!({"background": true, "stream": false, "max_output_tokens": 480}));
    let slow = cluster.post(RESPONSES, &slow).ok();
    let slow_path = format!("{RESPONSES}/{}", slow["id"].as_str().expect("an id"));
    let cancelled = cluster.post(&format!("{slow_path}/cancel"), &json!({})).ok();
    assert_eq!(cancelled["status"], "cancelled", "{cancelled}");
    eventually("nothing is computed any more", LIMIT, || {
        cluster.metric("vllm:num_requests_running") == 0.0
            && cluster.metric("vllm:num_requests_waiting") == 0.0
    });
    assert_eq!(cluster.get(&slow_path).ok()["status"], "cancelled");

    let delete = format!("DELETE {RESPONSES}/{id} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    assert_eq!(raw(cluster.address(), delete.as_bytes()).expect("an answer").ok()["deleted"], true);
    assert_eq!(cluster.get(&format!("{RESPONSES}/{id}")).status, 404);
    assert_eq!(cluster.post(RESPONSES, &follows).status, 404, "what it would follow is gone");
    let refused =
        cluster.post(&format!("{RESPONSES}/{}/cancel", second["id"].as_str().expect("an id")), &json!({}));
    assert_eq!(refused.status, 400, "{}", refused.text());
}

#[test]
fn a_stored_response_comes_again_to_the_byte_on_other_layouts() {
    let kept = tempfile::tempdir().expect("a temporary directory");
    let place = |name: &str| kept.path().join(name).to_str().expect("a path").to_owned();
    let (store, blobs) = (format!("redb:{}", place("store.redb")), place("blobs"));
    let mut id = String::new();
    for (number, layout) in [["--stages", "2"], ["--tp", "2"], ["--stages", "1"]].iter().enumerate() {
        let cluster = Cluster::start(&[&["--store", &store, "--blobs", &blobs], &layout[..]].concat());
        if number == 0 {
            let answer = cluster.post(RESPONSES, &with(long(), json!({"stream": false}))).ok();
            id = answer["id"].as_str().expect("an id").to_owned();
            eventually("the answer is stored", LIMIT, || {
                cluster.post(&format!("{RESPONSES}/{id}/replay"), &json!({})).status == 200
            });
        }
        let url = format!("http://{}", cluster.address());
        let ended = run_to_end(&["replay", &id, "--url", &url], &[], LIMIT);
        assert_eq!(ended.status.and_then(|status| status.code()), Some(0), "{layout:?}: {}", ended.said);
        assert!(ended.said.contains("identical: "), "{}", ended.said);
        cluster.interrupt();
        cluster.ended();
    }
}

#[test]
fn what_nobody_listens_to_ends() {
    let grace = "resume_grace_ms=1000";
    let slow = "link_faults.delay_us=5000";
    let cluster = Cluster::start(&["--set", grace, "--set-gateway", grace, "--set-node", slow]);
    for (store, gateway_dies) in [(false, false), (true, false), (true, true)] {
        let mut stream = cluster.stream(RESPONSES, &with(long(), json!({"store": store})));
        let id = next(&mut stream)["response"]["id"].as_str().expect("an id").to_owned();
        (0..10).for_each(|_| drop(next(&mut stream)));
        let is_running = || cluster_metric(&cluster, "vllm:num_requests_running") == Some(1.0);
        eventually("it is seen to be computed", LIMIT, is_running);
        if gateway_dies {
            processes::signal(cluster.pid("gateway"), "KILL");
        }
        drop(stream);
        let running = || until(LIMIT, || cluster_metric(&cluster, "vllm:num_requests_running"));
        eventually("it is not computed any more", LIMIT, || running() == Some(0.0));
        if store {
            eventually("it is cancelled", LIMIT, || shown(&cluster, &id)["status"] == "cancelled");
        } else {
            assert_eq!(cluster.get(&format!("{RESPONSES}/{id}")).status, 404);
        }
    }
}

fn cluster_metric(cluster: &Cluster, name: &str) -> Option<f64> {
    let text = ashlar_tests::http::get(cluster.address(), "/metrics").ok()?.text();
    let line = text.lines().find(|line| line.starts_with(name))?;
    line.rsplit(' ').next()?.parse().ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unmodified_client_understands_every_event() {
    let cluster = Cluster::demo();
    let config = OpenAIConfig::new()
        .with_api_base(format!("http://{}/v1", cluster.address()))
        .with_api_key("none is needed");
    let client = Client::with_config(config);
    let request = |body: Value| -> CreateResponse { serde_json::from_value(body).expect("a request") };

    let body = json!({"model": "ashlar-demo", "input": "What is 12 + 34?", "temperature": 0});
    let answer = client.responses().create(request(body.clone())).await.expect("an answer");
    assert_eq!((answer.status.clone(), answer.output_text().as_deref()), (Status::Completed, Some("46")));
    let again = client.responses().retrieve(&answer.id).await.expect("the answer");
    assert_eq!(again, answer);

    let mut stream = client.responses().create_stream(request(body)).await.expect("a stream");
    let (mut text, mut is_complete) = (String::new(), false);
    while let Some(event) = stream.next().await {
        match event.expect("an event") {
            ResponseStreamEvent::ResponseOutputTextDelta(delta) => text.push_str(&delta.delta),
            ResponseStreamEvent::ResponseCompleted(last) => {
                is_complete = last.response.status == Status::Completed;
            }
            _ => {}
        }
    }
    assert!(is_complete && text == "46", "{text}");

    // A call of a function, and the answer to its result.
    let tools = json!([{"type": "function", "name": "weather", "strict": true, "parameters":
        {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"], "additionalProperties": false}}]);
    let body = json!({"model": "ashlar-demo", "input": "Weather?", "tools": tools, "tool_choice": "required", "seed": 1});
    let mut stream = client.responses().create_stream(request(body)).await.expect("a stream");
    let (mut arguments, mut done) = (String::new(), None);
    while let Some(event) = stream.next().await {
        match event.expect("an event") {
            ResponseStreamEvent::ResponseFunctionCallArgumentsDelta(delta) => {
                arguments.push_str(&delta.delta)
            }
            ResponseStreamEvent::ResponseOutputItemDone(item) => done = Some(item.item),
            _ => {}
        }
    }
    let Some(OutputItem::FunctionCall(call)) = done else { panic!("no call: {done:?}") };
    assert_eq!((call.name.as_str(), &call.arguments), ("weather", &arguments));
    assert!(serde_json::from_str::<Value>(&arguments).expect("JSON")["city"].is_string());
}

/// What one gateway of a cluster has begun is followed on at the other.
#[test]
fn a_response_is_followed_on_at_another_gateway_when_its_own_is_dead() {
    let arguments = ["--stages", "2", "--gateways", "2", "--set-node", "link_faults.delay_us=500"];
    let cluster = Cluster::start(&arguments);
    let expected = undisturbed(&cluster);
    let mut other: SocketAddr = cluster.address().parse().expect("an address");
    other.set_port(other.port() + 1);
    let other = other.to_string();
    assert!(cluster.said().contains(&format!("and at http://{other}/v1")), "{}", cluster.said());
    eventually("it is ready", LIMIT, || {
        ashlar_tests::http::get(&other, "/ready").is_ok_and(|answer| answer.status == 200)
    });

    let mut follower = Follower::begin(&cluster, &long());
    follower.hear(100);
    let own = cluster.pid("gateway-0");
    // Stopped, so that nobody starts it again.
    assert!(processes::signal(own, "STOP"));
    let path =
        format!("{RESPONSES}/{}?stream=true&starting_after={}", follower.id(), follower.events.len() - 1);
    let stream = until(LIMIT, || get_stream(&other, &path).ok().filter(|stream| stream.status == 200));
    follower.events.extend(rest(stream.expect("a stream")));
    check_whole(&follower.events);
    assert_eq!(comparable(&follower.events), expected);
    assert!(processes::signal(own, "CONT"));
}
