//! A flood of requests and bytes made to break things, on every route and every port: nobody else notices.

use ashlar_fuzz::mutate::Corpus;
use ashlar_fuzz::targets;
use ashlar_tests::streams::{self, COMPLETIONS, assert_no_panic};
use ashlar_tests::{Answer, Cluster, http, processes};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

/// How long the flood lasts at least, and how many rounds it has at least.
const FLOOD: Duration = Duration::from_secs(10);
const ROUNDS_MIN: u64 = 40;
/// The seed of all that is sent; a failure names the round.
const SEED: u64 = 7;
/// The machine may be busy; none of these requests computes for long.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// Bodies that are made from good ones, and where they are sent.
struct Route {
    method: &'static str,
    path: &'static str,
    corpus: Corpus,
}

fn corpus(target: &str) -> Corpus {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let target = targets::named(target).expect("a target");
    (target.open)(directory.path()).expect("a target that is ready").corpus
}

fn routes() -> Vec<Route> {
    let route = |method, path, target| Route { method, path, corpus: corpus(target) };
    vec![
        route("POST", "/v1/chat/completions", "chat"),
        route("POST", "/v1/completions", "completion"),
        route("POST", "/v1/responses", "response"),
        route("POST", "/tokenize", "tokenize"),
        route("POST", "/detokenize", "completion"),
        route("POST", "/v1/fine_tuning/jobs", "job"),
        route("POST", "/v1/files", "multipart"),
        route("POST", "/v1/load_lora_adapter", "job"),
        route("POST", "/v1/unload_lora_adapter", "job"),
        route("POST", "/v1/roll_back_lora_adapter", "job"),
        route("POST", "/admin/models", "deployment"),
        route("PATCH", "/admin/models/x", "deployment"),
        route("POST", "/admin/plan", "deployment"),
        route("POST", "/admin/replan", "deployment"),
        route("GET", "", "list"),
    ]
}

/// Names in the place of ids: none is one.
const IDS: [&str; 8] = [
    "x",
    "..",
    "%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    "%00",
    "%ff",
    "file-",
    "resp_00000000000000000000000000000000",
    "a%0d%0ab",
];

/// Paths that end in an id.
const PATHS: [(&str, &str); 14] = [
    ("GET", "/v1/models/"),
    ("DELETE", "/v1/models/"),
    ("GET", "/v1/files/"),
    ("DELETE", "/v1/files/"),
    ("GET", "/v1/responses/"),
    ("DELETE", "/v1/responses/"),
    ("GET", "/v1/fine_tuning/jobs/"),
    ("POST", "/v1/fine_tuning/jobs/"),
    ("GET", "/admin/models/"),
    ("DELETE", "/admin/models/"),
    ("GET", "/admin/requests/"),
    ("GET", "/dashboard/"),
    ("GET", "/docs/"),
    ("POST", "/admin/nodes/"),
];

fn request(method: &str, path: &str, content_type: &[u8], body: &[u8]) -> Vec<u8> {
    let mut bytes = format!(
        "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\ncontent-type: ",
        body.len()
    )
    .into_bytes();
    // What would end the header is not the header's.
    bytes.extend(content_type.iter().filter(|byte| !b"\r\n\0".contains(byte)));
    bytes.extend_from_slice(b"\r\n\r\n");
    bytes.extend_from_slice(body);
    bytes
}

/// What a client may be told: it has what it asked for, or is at fault, or somebody is busy.
#[track_caller]
fn check(what: &str, answer: &Answer) {
    assert!(answer.status < 500 || answer.status == 503, "{what}: {} {}", answer.status, answer.text());
    let is_json = answer.header("content-type").is_some_and(|kind| kind.starts_with("application/json"));
    if answer.status >= 400 && is_json {
        let error = &answer.json()["error"];
        assert!(error["message"].is_string() && error["type"].is_string(), "{what}: {}", answer.text());
    }
}

/// Sends a request. A connection that is closed without an answer is one, too: not all that is sent is HTTP.
#[track_caller]
fn send(cluster: &Cluster, what: &str, bytes: &[u8]) -> Option<Answer> {
    let begun = Instant::now();
    let answer = http::raw(cluster.address(), bytes);
    assert!(begun.elapsed() < ANSWER_LIMIT, "{what} took {:?}", begun.elapsed());
    if let Err(error) = &answer {
        assert_ne!(error.kind(), std::io::ErrorKind::WouldBlock, "{what} hangs");
        assert_ne!(error.kind(), std::io::ErrorKind::ConnectionRefused, "{what}: nobody listens");
    }
    let answer = answer.ok();
    answer.iter().for_each(|answer| check(what, answer));
    answer
}

/// One request to every route. The statuses that came.
fn round(cluster: &Cluster, routes: &[Route], number: u64, statuses: &mut BTreeMap<u16, u32>) {
    let mut count = |answer: Option<Answer>| {
        *statuses.entry(answer.map_or(0, |answer| answer.status)).or_default() += 1;
    };
    for route in routes {
        let input = route.corpus.input(SEED, number);
        let what = format!("{} {} round {number}", route.method, route.path);
        let bytes = match (route.path, input.iter().position(|&byte| byte == b'\n')) {
            // The target's first line is the type of its content.
            ("/v1/files", Some(line)) => {
                request(route.method, route.path, &input[..line], &input[line + 1..])
            }
            ("", _) => {
                let path: String =
                    String::from_utf8_lossy(&input).chars().filter(|c| c.is_ascii_graphic()).collect();
                request(route.method, &format!("/{path}"), b"text/plain", b"")
            }
            _ => request(route.method, route.path, b"application/json", &input),
        };
        count(send(cluster, &what, &bytes));
    }
    let (method, path) = PATHS[number as usize % PATHS.len()];
    for id in IDS {
        let path = format!("{path}{id}");
        count(send(
            cluster,
            &format!("{method} {path}"),
            &request(method, &path, b"application/json", b"{}"),
        ));
    }
    for path in ["..", "/etc", "/proc/self", "x/../..", "a\u{0}b", &"x/".repeat(3000)] {
        let body = json!({"lora_name": "x", "lora_path": path}).to_string();
        let bytes = request("POST", "/v1/load_lora_adapter", b"application/json", body.as_bytes());
        let answer = send(cluster, "an adapter from outside", &bytes);
        assert!(answer.as_ref().is_some_and(|answer| answer.status >= 400), "{path} is loaded");
        count(answer);
    }
}

/// The ports on which a process listens (Linux's `/proc`).
fn ports_of(pid: u32) -> BTreeSet<u16> {
    let inode = |link: String| link.strip_prefix("socket:[")?.strip_suffix(']')?.parse::<u64>().ok();
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let links = entries.filter_map(|entry| fs::read_link(entry.path()).ok());
    let own: BTreeSet<u64> = links.filter_map(|link| inode(link.to_string_lossy().into_owned())).collect();
    let table = fs::read_to_string(format!("/proc/{pid}/net/tcp")).unwrap_or_default();
    let listening = table.lines().skip(1).filter_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let port = u16::from_str_radix(fields.get(1)?.rsplit(':').next()?, 16).ok()?;
        let is_own = own.contains(&fields.get(9)?.parse().ok()?);
        (*fields.get(3)? == "0A" && is_own).then_some(port)
    });
    listening.collect()
}

/// Says something to a port, and waits until it has been heard or refused.
fn say(port: u16, bytes: &[u8]) {
    let Ok(mut socket) = TcpStream::connect(("127.0.0.1", port)) else { panic!("nobody listens on {port}") };
    let told = socket.set_read_timeout(Some(Duration::from_millis(20)));
    told.expect("a time limit");
    // Who closes early has heard enough.
    let _ = socket.write_all(bytes);
    let _ = socket.shutdown(std::net::Shutdown::Write);
    let mut answer = [0; 4096];
    let _ = socket.read(&mut answer);
}

/// One stream's bytes, but for what differs between any two.
fn bytes_of(events: &[ashlar_tests::Event]) -> Vec<streams::Choice> {
    streams::choices_of(events)
}

#[test]
fn a_flood_of_hostile_bytes_on_every_route_and_port_changes_no_stream_and_ends_no_process() {
    let cluster = Cluster::start(&["--nodes", "2"]);
    let alone = bytes_of(&cluster.stream(COMPLETIONS, &streams::long(true)).rest());
    let pids = cluster.pids();
    let ports: BTreeSet<u16> = pids.values().flat_map(|&pid| ports_of(pid)).collect();
    assert!(ports.len() >= 4, "the ports of {pids:?}: {ports:?}");
    let (routes, frames, handshakes, rows) =
        (routes(), corpus("frames"), corpus("handshake"), corpus("rows"));
    let mut statuses = BTreeMap::new();
    let (mut rounds, mut streams_seen) = (0, 0);
    let begun = Instant::now();
    while rounds < ROUNDS_MIN || begun.elapsed() < FLOOD {
        let mut witness = cluster.stream(COMPLETIONS, &streams::long(true));
        let mut events: Vec<_> = (0..8).map(|_| witness.next_event()).collect();
        // A few rounds a stream: it is to be running all the while.
        for _ in 0..4 {
            round(&cluster, &routes, rounds, &mut statuses);
            for port in &ports {
                for corpus in [&frames, &handshakes, &rows] {
                    say(*port, &corpus.input(SEED, rounds));
                }
            }
            rounds += 1;
        }
        events.extend(witness.rest());
        streams_seen += 1;
        assert_eq!(bytes_of(&events), alone, "after round {rounds}\n{}", cluster.said());
    }
    println!("{rounds} rounds, {streams_seen} streams, ports {ports:?}, statuses {statuses:?}");
    assert_eq!(cluster.pids(), pids, "a process was started anew\n{}", cluster.said());
    pids.iter().for_each(|(name, &pid)| assert!(processes::alive(pid), "{name} has ended"));
    // Still in order: what is asked is answered, by the same bytes.
    let after: Value = cluster.post(COMPLETIONS, &json!({"prompt": "Write", "max_tokens": 4})).ok();
    assert_eq!(after["object"], "text_completion", "{after}");
    assert_no_panic(&cluster);
}
