//! Keys over real processes: who is let in where, what tenants know of each other, and that nothing secret is written down.

use ashlar_tests::http::raw;
use ashlar_tests::{Answer, Cluster, eventually, processes};
use serde_json::{Value, json};
use std::fs;
use std::io::Write;
use std::net::TcpStream;
use std::path::Path;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(30);

fn ask(address: &str, method: &str, path: &str, body: &Value, key: &str) -> Answer {
    let body = if body.is_null() { String::new() } else { body.to_string() };
    let key = if key.is_empty() { String::new() } else { format!("authorization: Bearer {key}\r\n") };
    let request = format!(
        "{method} {path} HTTP/1.1\r\nhost: gate\r\nconnection: close\r\n{key}content-type: application/json\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    );
    raw(address, request.as_bytes()).expect("an answer")
}

struct World {
    cluster: Cluster,
    admin: String,
}

impl World {
    fn start(args: &[&str]) -> World {
        let cluster = Cluster::start(&[&["--keys"], args].concat());
        let admin = fs::read_to_string(cluster.state().join("admin.key")).expect("the first key");
        World { cluster, admin: admin.trim().to_owned() }
    }

    fn ask(&self, method: &str, path: &str, body: &Value, key: &str) -> Answer {
        ask(self.cluster.address(), method, path, body, key)
    }

    /// A new key: its id and its text.
    fn key(&self, body: &Value) -> (String, String) {
        let made = self.ask("POST", "/admin/keys", body, &self.admin).ok();
        let text = |field: &str| made[field].as_str().expect("a text").to_owned();
        (text("id"), text("key"))
    }
}

fn chat(content: &str) -> Value {
    json!({"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 8})
}

fn cached(answer: &Answer) -> u64 {
    answer.ok()["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().expect("a count")
}

/// Every file below a directory that has one of these texts in it.
fn holding(directory: &Path, texts: &[&str]) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).expect("a directory").flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(holding(&path, texts));
        } else if let Ok(bytes) = fs::read(&path) {
            let text = String::from_utf8_lossy(&bytes);
            found.extend(
                texts
                    .iter()
                    .filter(|one| text.contains(**one))
                    .map(|one| format!("{one} in {}", path.display())),
            );
        }
    }
    found
}

#[test]
fn tenants_know_nothing_of_each_other() {
    let world = World::start(&[]);
    let scopes = json!(["inference", "training"]);
    let (_, blue) = world.key(&json!({"name": "blue", "tenant": "blue", "scopes": scopes}));
    let (_, second) = world.key(&json!({"name": "another of blue", "tenant": "blue"}));
    let (_, red) = world.key(&json!({"name": "red", "tenant": "red", "scopes": scopes}));

    let stored =
        world.ask("POST", "/v1/responses", &json!({"input": "Hello", "max_output_tokens": 4}), &blue).ok();
    let path = format!("/v1/responses/{}", stored["id"].as_str().expect("an id"));
    let nobodys = format!("/v1/responses/resp_{:032x}", 7);
    for (method, path_end) in
        [("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items"), ("POST", "/replay")]
    {
        let foreign = world.ask(method, &format!("{path}{path_end}"), &Value::Null, &red);
        let unknown = world.ask(method, &format!("{nobodys}{path_end}"), &Value::Null, &red);
        assert_eq!((foreign.status, unknown.status), (404, 404), "{method} {path_end}");
        let id = |text: String, path: &str| text.replace(path.rsplit('/').next().expect("an id"), "ID");
        assert_eq!(id(foreign.text(), &path), id(unknown.text(), &nobodys), "{method} {path_end}");
    }
    for key in [&blue, &second, &world.admin] {
        assert_eq!(world.ask("GET", &path, &Value::Null, key).status, 200);
    }
    let continued = json!({"input": "And?", "previous_response_id": stored["id"], "max_output_tokens": 4});
    assert_eq!(world.ask("POST", "/v1/responses", &continued, &red).status, 404);
    assert_eq!(world.ask("POST", "/v1/responses", &continued, &blue).status, 200);

    // What one has had computed is fast for its tenant alone.
    let long = chat(&"A long beginning that several requests have in common. ".repeat(4));
    assert_eq!(cached(&world.ask("POST", "/v1/chat/completions", &long, &blue)), 0);
    assert!(cached(&world.ask("POST", "/v1/chat/completions", &long, &second)) > 0);
    assert_eq!(cached(&world.ask("POST", "/v1/chat/completions", &long, &red)), 0);
}

#[test]
fn what_is_secret_is_written_down_nowhere() {
    let world = World::start(&[]);
    let planted = "xyzzy-plugh-4711";
    let (_, key) = world.key(&json!({"name": "client"}));
    let secret = |key: &str| key.rsplit('_').next().expect("a secret").to_owned();
    let own = chat(planted);
    assert_eq!(world.ask("POST", "/v1/chat/completions", &own, &key).status, 200);
    let mut answers = Vec::new();
    let wrong = [
        json!({"messages": [{"role": planted, "content": planted}]}),
        json!({"messages": [{"role": "user", "content": planted}], "temperature": 99}),
        json!({"messages": [{"role": "user", "content": planted}], "max_tokens": 100_000}),
        json!({"prompt": planted.repeat(2_000)}),
    ];
    for body in &wrong {
        for path in ["/v1/chat/completions", "/v1/completions", "/v1/responses"] {
            answers.push(world.ask("POST", path, body, &key));
        }
    }
    let forged = format!("{}a", &key[..key.len() - 1]);
    answers.push(world.ask("GET", "/v1/models", &Value::Null, &forged));
    answers.push(world.ask("GET", "/admin/keys", &Value::Null, &world.admin));
    answers.push(world.ask("GET", "/metrics", &Value::Null, &world.admin));
    answers.push(world.ask("GET", "/admin/live", &Value::Null, &world.admin));
    answers.push(world.ask("GET", "/admin/requests", &Value::Null, &world.admin));
    answers.push(world.ask("GET", "/admin/cluster", &Value::Null, &world.admin));
    let secrets = [secret(&key), secret(&world.admin)];
    for answer in answers {
        let text = answer.text();
        assert!(!secrets.iter().any(|secret| text.contains(secret.as_str())), "{text}");
        // An error may name the role that is none; nothing else of a prompt is repeated.
        assert!(!text.contains(&planted.repeat(2)), "{text}");
    }
    let logs = world.cluster.state().join("logs");
    let texts = [planted, &secrets[0], &secrets[1]];
    assert_eq!(holding(&logs, &texts), [] as [String; 0]);
    // The first key is in its own file and in what its scheduler is told; a client's key is nowhere.
    assert_eq!(holding(&world.cluster.state(), &texts[..2]), [] as [String; 0]);
}

#[test]
fn a_revoked_key_is_refused_by_every_gateway_within_a_second() {
    let world = World::start(&["--gateways", "2"]);
    let (host, port) = world.cluster.address().rsplit_once(':').expect("host:port");
    let second = format!("{host}:{}", port.parse::<u16>().expect("a port") + 1);
    let gateways = [world.cluster.address(), &second];
    let (id, key) = world.key(&json!({"name": "client", "requests_per_minute": 5}));
    let models = |gateway: &str| ask(gateway, "GET", "/v1/models", &Value::Null, &key).status;
    eventually("both gateways know the key", LIMIT, || gateways.iter().all(|gateway| models(gateway) == 200));

    // Limits are counted over both.
    let statuses: Vec<u16> = (0..8)
        .map(|turn| {
            ask(gateways[turn % 2], "POST", "/v1/chat/completions", &chat("What is 1 + 1?"), &key).status
        })
        .collect();
    assert_eq!(statuses, [200, 200, 200, 200, 200, 429, 429, 429]);

    assert_eq!(world.ask("DELETE", &format!("/admin/keys/{id}"), &Value::Null, &world.admin).status, 200);
    let took = eventually("both gateways refuse it", LIMIT, || {
        gateways.iter().all(|gateway| models(gateway) == 401)
    });
    assert!(took < Duration::from_secs(1), "{took:?}");
}

/// Most memory of a connection whose client has not shown a key.
const STRANGER_BYTES_MAX: u64 = 64 << 10;

#[test]
fn who_has_not_shown_a_key_takes_little_memory() {
    const STRANGERS: u64 = 600;
    // A head without an end, and a greeting of TLS without one.
    let head = [b"GET /v1/models HTTP/1.1\r\nhost: gate\r\nx: ".as_slice(), &[b'a'; 200_000]].concat();
    let mut greeting = vec![0x16, 3, 1, 0x40, 0, 1, 0, 0xff, 0xfb, 3, 3];
    greeting.resize(5 + (16 << 10), b'a');
    for _ in 0..3 {
        greeting.extend([0x16, 3, 1, 0x40, 0]);
        greeting.resize(greeting.len() + (16 << 10), b'a');
    }
    for (args, said) in [(&["--keys"][..], &head), (&["--keys", "--tls"], &greeting)] {
        for bytes in [0, 23 << 10, 31 << 10, said.len()] {
            // Each a gateway of its own: what was taken once is not given back to the system.
            let cluster = Cluster::launch(args);
            let gateway = eventually_some("a gateway", || cluster.pids().get("gateway").copied());
            eventually_some("it listens", || TcpStream::connect(cluster.address()).ok());
            let before = processes::resident_bytes(gateway).expect("its memory");
            let strangers: Vec<TcpStream> = (0..STRANGERS)
                .map(|_| {
                    let mut socket = TcpStream::connect(cluster.address()).expect("a connection");
                    let limit = Some(Duration::from_millis(20));
                    socket.set_write_timeout(limit).expect("a limit");
                    // Whoever says too much is hung up on.
                    let _ = socket.write_all(&said[..bytes]);
                    socket
                })
                .collect();
            // What has been sent is read, once it has answered somebody who came later.
            for _ in 0..20 {
                let _ = ask_anybody(&cluster, args.contains(&"--tls"));
            }
            let after = processes::resident_bytes(gateway).expect("its memory");
            let each = after.saturating_sub(before) / STRANGERS;
            println!("{args:?}, {bytes} bytes said: {each} bytes each");
            assert!(each <= STRANGER_BYTES_MAX, "{args:?}, {bytes} bytes said: {each} bytes each");
            drop(strangers);
        }
    }
}

fn eventually_some<T>(what: &str, look: impl Fn() -> Option<T>) -> T {
    ashlar_tests::until(LIMIT, look).unwrap_or_else(|| panic!("not within {LIMIT:?}: {what}"))
}

/// A connection after all others, until it is answered or hung up on.
fn ask_anybody(cluster: &Cluster, tls: bool) -> Option<Answer> {
    // In the clear to who speaks TLS: an alert.
    let request = b"GET /health HTTP/1.1\r\nhost: gate\r\nconnection: close\r\n\r\n";
    raw(cluster.address(), request).ok().filter(|_| !tls)
}
