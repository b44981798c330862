//! Several models on one cluster: deployed, scaled and removed while the first one's streams run, which stay what they are.

use ashlar_tests::material::synthesized;
use ashlar_tests::streams::{COMPLETIONS, assert_no_panic, disturb, undisturbed};
use ashlar_tests::{Answer, Cluster, Event, eventually, http, processes, run_to_end};
use serde_json::{Value, json};
use std::fs;
use std::time::Duration;

/// A small model on a machine where other tests run at the same time.
const CHANGE_LIMIT: Duration = Duration::from_secs(60);
const PAUSE_LIMIT: Duration = Duration::from_secs(5);

fn request(cluster: &Cluster, method: &str, path: &str, body: &Value) -> Answer {
    let body = if body.is_null() { String::new() } else { body.to_string() };
    let text = format!(
        "{method} {path} HTTP/1.1\r\nHost: here\r\nConnection: close\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    );
    http::raw(cluster.address(), text.as_bytes()).expect("an answer")
}

#[track_caller]
fn refused(answer: &Answer, status: u16, why: &str) {
    let text = answer.text();
    assert_eq!(answer.status, status, "{text}");
    assert!(answer.json()["error"]["message"].as_str().is_some_and(|said| said.contains(why)), "{text}");
}

/// A model as the cluster describes it.
fn model(cluster: &Cluster, name: &str) -> Option<Value> {
    let answer = http::get(cluster.address(), &format!("/admin/models/{name}")).ok()?;
    (answer.status == 200).then(|| answer.json())
}

#[track_caller]
fn await_serving(cluster: &Cluster, name: &str, members: usize, replicas: u64) {
    let serves = || {
        model(cluster, name).is_some_and(|model| {
            model["status"] == "serving"
                && model["members"].as_array().is_some_and(|nodes| nodes.len() == members)
                && model["replicas_ready"] == replicas
        })
    };
    if ashlar_tests::until(CHANGE_LIMIT, || serves().then_some(())).is_none() {
        panic!("{name} does not serve: {:?}\n{}", model(cluster, name), cluster.said());
    }
}

/// What a model answers, greedily.
#[track_caller]
fn ask(cluster: &Cluster, model: &str) -> String {
    let body =
        json!({"model": model, "prompt": "Write", "temperature": 0, "max_tokens": 24, "ignore_eos": true});
    let answer = cluster.post(COMPLETIONS, &body).ok();
    assert_eq!(answer["model"], model);
    answer["choices"][0]["text"].as_str().expect("text").to_owned()
}

/// The same once this gateway serves it.
fn try_to_ask(cluster: &Cluster, model: &str) -> Option<String> {
    let body =
        json!({"model": model, "prompt": "Write", "temperature": 0, "max_tokens": 24, "ignore_eos": true});
    let answer = http::post(cluster.address(), COMPLETIONS, body.to_string().as_bytes()).ok()?;
    (answer.status == 200).then(|| answer.json()["choices"][0]["text"].as_str().expect("text").to_owned())
}

#[track_caller]
fn await_answer(cluster: &Cluster, model: &str, expected: &str) {
    let answer = ashlar_tests::until(CHANGE_LIMIT, || try_to_ask(cluster, model));
    assert_eq!(answer.as_deref(), Some(expected), "{model}\n{}", cluster.said());
}

fn kill(cluster: &Cluster, role: &str) {
    let pid = cluster.pid(role);
    assert!(processes::signal(pid, "KILL"));
    eventually("it is started again", CHANGE_LIMIT, || {
        cluster.pids().get(role).is_some_and(|now| *now != pid)
    });
}

const OWN: &str = "ashlar-demo";

#[test]
fn models_are_deployed_scaled_and_removed_while_the_first_ones_streams_stay_what_they_are() {
    let directory = tempfile::tempdir().expect("a directory");
    let source = synthesized(directory.path(), "small", 1);
    let cluster = Cluster::start(&["--stages", "2", "--nodes", "4", "--replicas", "1"]);
    let (expected, own) = (undisturbed(&cluster), ask(&cluster, OWN));

    let deployment = json!({"model": source, "nodes": 1});
    disturb(&cluster, &expected, || {
        let deployed = cluster.post("/admin/models", &deployment).ok();
        assert_eq!((&deployed["name"], &deployed["own"]), (&json!("small"), &json!(false)), "{deployed}");
        await_serving(&cluster, "small", 1, 1);
    });
    let small = ashlar_tests::until(CHANGE_LIMIT, || try_to_ask(&cluster, "small")).expect("an answer");
    assert_ne!(small, own);
    assert_eq!(ask(&cluster, OWN), own);
    // The same wish once more is the same model.
    assert_eq!(cluster.post("/admin/models", &deployment).ok()["name"], "small");
    let listed = cluster.get("/v1/models").ok();
    let names: Vec<&Value> =
        listed["data"].as_array().expect("models").iter().map(|card| &card["id"]).collect();
    assert_eq!(names, [OWN, "small"]);
    let members = model(&cluster, "small").expect("a model")["members"].clone();
    assert!(cluster.view()["nodes"].as_array().expect("nodes").iter().all(|node| node["node"] != members[0]));
    assert!(cluster.get("/metrics").text().contains("vllm:prompt_tokens_total{model_name=\"small\""));

    // More nodes, another replica: its answers are the same, and a running stream does not notice.
    disturb(&cluster, &expected, || {
        let scaled = request(&cluster, "PATCH", "/admin/models/small", &json!({"nodes": 2}));
        assert_eq!(scaled.status, 200, "{}", scaled.text());
        await_serving(&cluster, "small", 2, 2);
        assert_eq!(ask(&cluster, "small"), small);
    });

    // Whatever dies comes back with all models.
    for role in ["scheduler", "gateway", members[0].as_str().expect("a name")] {
        if role == "gateway" {
            kill(&cluster, role);
        } else {
            disturb(&cluster, &expected, || kill(&cluster, role));
        }
        await_answer(&cluster, OWN, &own);
        await_answer(&cluster, "small", &small);
        await_serving(&cluster, "small", 2, 2);
    }
    assert_eq!(undisturbed(&cluster), expected);

    // Its own streams outlive the scheduler, too.
    let stream = json!({
        "model": "small", "prompt": "Write", "temperature": 1, "seed": 3, "max_tokens": 400, "ignore_eos": true,
        "stream": true,
    });
    let whole = |cut: Option<&str>| {
        let mut events = cluster.stream(COMPLETIONS, &stream);
        let mut text = String::new();
        for count in 0.. {
            if count == 20
                && let Some(role) = cut
            {
                kill(&cluster, role);
            }
            match events.next_event() {
                Event::Data(data) => {
                    let data: Value = serde_json::from_str(&data).expect("JSON");
                    assert!(data["error"].is_null(), "{data}");
                    text.push_str(data["choices"][0]["text"].as_str().unwrap_or_default());
                }
                Event::Done => return text,
                Event::Closed(reason) => panic!("closed: {reason}\n{}", cluster.said()),
            }
        }
        text
    };
    let undisturbed_stream = whole(None);
    assert_eq!(whole(Some("scheduler")), undisturbed_stream);
    await_serving(&cluster, "small", 2, 2);

    // Fewer nodes: the other one stands by again.
    let pause = disturb(&cluster, &expected, || {
        let scaled = request(&cluster, "PATCH", "/admin/models/small", &json!({"nodes": 1}));
        assert_eq!(scaled.status, 200, "{}", scaled.text());
        await_serving(&cluster, "small", 1, 1);
        assert_eq!(ask(&cluster, "small"), small);
    });
    assert!(pause < PAUSE_LIMIT, "{pause:?}");
    eventually("the other node has gone back", CHANGE_LIMIT, || {
        cluster.view()["nodes"].as_array().is_some_and(|nodes| nodes.len() == 3)
    });

    let url = format!("http://{}", cluster.address());
    let listed = run_to_end(&["model", "list", "--url", &url], &[], CHANGE_LIMIT);
    assert!(listed.said.contains("small  serving  on node-"), "{}", listed.said);
    let removed = run_to_end(&["model", "remove", "small", "--wait", "--url", &url], &[], CHANGE_LIMIT);
    assert!(removed.said.contains("small: removed"), "{}", removed.said);
    eventually("all nodes are back", CHANGE_LIMIT, || {
        cluster.view()["nodes"].as_array().is_some_and(|nodes| nodes.len() == 4)
    });
    refused(
        &cluster.post(COMPLETIONS, &json!({"model": "small", "prompt": "a"})),
        404,
        "the model `small` does not exist",
    );
    assert_eq!(undisturbed(&cluster), expected);
    assert_no_panic(&cluster);
}

#[test]
fn what_cannot_be_deployed_is_refused_with_the_reason_and_leaves_nothing_behind() {
    let directory = tempfile::tempdir().expect("a directory");
    let (one, two) = (synthesized(directory.path(), "one", 1), synthesized(directory.path(), "two", 2));
    let cluster = Cluster::start(&["--stages", "2", "--nodes", "3", "--replicas", "1"]);
    let deploy = |body: &Value| cluster.post("/admin/models", body);

    refused(&deploy(&json!({})), 400, "`model` is missing");
    refused(&deploy(&json!({"model": "/no/where"})), 400, "`/no/where` cannot be served");
    refused(&deploy(&json!({"model": one, "name": "a b"})), 400, "a model's name is");
    refused(&deploy(&json!({"model": one, "name": OWN})), 409, "is served already");
    refused(&deploy(&json!({"model": one, "quantize": "q1_9"})), 400, "q1_9");
    refused(&deploy(&json!({"model": one, "nodes": 1, "stages": 2})), 400, "`nodes` must be at least 2");
    refused(&deploy(&json!({"model": one, "nodes": 2})), 409, "one wants 2 nodes, 1 is free (node-");
    // Not even the length of its header; half of what the header promises.
    for (name, kept, reason) in [("headless", 4, "cannot be served"), ("truncated", 100_000, "truncated")] {
        let truncated = directory.path().join(name);
        fs::create_dir(&truncated).expect("a directory");
        for file in fs::read_dir(&one).expect("files").flatten() {
            let bytes = fs::read(file.path()).expect("a file");
            let kept = if file.file_name() == "model.safetensors" { kept } else { bytes.len() };
            fs::write(truncated.join(file.file_name()), &bytes[..kept]).expect("a file");
        }
        refused(&deploy(&json!({"model": truncated})), 400, reason);
    }
    let own = cluster.get("/admin/models").ok();
    assert_eq!(own["data"].as_array().map(Vec::len), Some(1), "{own}");
    assert_eq!((&own["data"][0]["name"], &own["data"][0]["own"]), (&json!(OWN), &json!(true)));

    // One is deployed; what would be in its way is refused.
    deploy(&json!({"model": one})).ok();
    await_serving(&cluster, "one", 1, 1);
    refused(&deploy(&json!({"model": two, "name": "one"})), 409, "a model is called one already");
    refused(&deploy(&json!({"model": two})), 409, "none is free");
    let scale = |name: &str, body: &Value| request(&cluster, "PATCH", &format!("/admin/models/{name}"), body);
    refused(&scale("one", &json!({"nodes": 2})), 409, "one wants 1 more nodes, none is free");
    refused(&scale("one", &json!({"nodes": 0})), 400, "`nodes` must be between 1 and");
    refused(&scale("one", &json!({})), 400, "`nodes` is missing");
    refused(&scale("nobody", &json!({"nodes": 1})), 404, "no model nobody is deployed: there are one");
    refused(&scale(OWN, &json!({"nodes": 1})), 409, "does not fit on 1 nodes");
    let remove = |name: &str| request(&cluster, "DELETE", &format!("/admin/models/{name}"), &Value::Null);
    refused(&remove(OWN), 409, "cannot be removed");
    refused(&remove("nobody"), 404, "no model nobody is deployed");
    refused(&cluster.get("/admin/models/nobody"), 404, "use one of ashlar-demo, one");
    refused(
        &cluster.post(COMPLETIONS, &json!({"model": "nobody", "prompt": "a"})),
        404,
        "use one of ashlar-demo, one",
    );
    // What is the first model's alone.
    refused(
        &cluster.post("/v1/responses", &json!({"model": "one", "input": "a"})),
        400,
        "deployed beside ashlar-demo",
    );
    refused(
        &cluster.post(
            "/v1/fine_tuning/jobs",
            &json!({"model": "one", "training_file": format!("file-{:032x}", 1)}),
        ),
        400,
        "deployed beside ashlar-demo",
    );
    assert_eq!(remove("one").status, 200);
    eventually("it is gone, and its node is back", CHANGE_LIMIT, || {
        model(&cluster, "one").is_none()
            && cluster.view()["nodes"].as_array().is_some_and(|nodes| nodes.len() == 3)
    });
    deploy(&json!({"model": two})).ok();
    await_serving(&cluster, "two", 1, 1);
    assert_no_panic(&cluster);
}

#[test]
fn the_first_model_gives_up_nodes_that_another_one_is_to_have() {
    let directory = tempfile::tempdir().expect("a directory");
    let source = synthesized(directory.path(), "small", 1);
    // As many replicas as fit: every node has a place.
    let cluster = Cluster::start(&["--stages", "2", "--nodes", "4"]);
    let ready = || {
        cluster.view()["replicas"]
            .as_array()
            .is_some_and(|all| all.iter().filter(|one| one["ready"] == true).count() == 2)
    };
    eventually("two replicas serve", CHANGE_LIMIT, ready);
    let expected = undisturbed(&cluster);
    let deployment = json!({"model": source, "stages": 2, "replicas": 1});
    refused(&cluster.post("/admin/models", &deployment), 409, "small wants 2 nodes, none is free");
    let pause = disturb(&cluster, &expected, || {
        let scaled = request(&cluster, "PATCH", &format!("/admin/models/{OWN}"), &json!({"nodes": 2}));
        assert_eq!(scaled.status, 200, "{}", scaled.text());
        cluster.post("/admin/models", &deployment).ok();
        await_serving(&cluster, "small", 2, 1);
    });
    assert!(pause < PAUSE_LIMIT, "the stream stood still for {pause:?}\n{}", cluster.said());
    let small = ashlar_tests::until(CHANGE_LIMIT, || try_to_ask(&cluster, "small")).expect("an answer");
    kill(&cluster, "scheduler");
    await_answer(&cluster, "small", &small);
    assert_eq!(undisturbed(&cluster), expected);

    assert_eq!(request(&cluster, "DELETE", "/admin/models/small", &Value::Null).status, 200);
    let all = request(&cluster, "PATCH", &format!("/admin/models/{OWN}"), &json!({"nodes": null}));
    assert_eq!(all.status, 200, "{}", all.text());
    eventually("two replicas serve again", CHANGE_LIMIT, ready);
    assert_eq!(undisturbed(&cluster), expected);
    assert_no_panic(&cluster);
}
