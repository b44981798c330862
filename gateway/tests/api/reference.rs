//! The API reference, held against what is served: every route is in it, every field that handlers read, nothing else.

use crate::scheduler::say;
use crate::world::World;
use hyper::Request;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

const METHODS: [&str; 5] = ["get", "post", "patch", "delete", "put"];

async fn reference(world: &World) -> Value {
    world.http.get("/openapi.json").await.json()
}

fn operations(reference: &Value) -> Vec<(&str, &str, &Value)> {
    let paths = reference["paths"].as_object().unwrap();
    paths
        .iter()
        .flat_map(|(path, methods)| {
            let methods = methods.as_object().unwrap();
            methods.iter().map(move |(method, operation)| (path.as_str(), method.as_str(), operation))
        })
        .collect()
}

/// An address of this path.
fn address(path: &str) -> String {
    let parts = path.split('/').map(|part| if part.starts_with('{') { "x" } else { part });
    parts.collect::<Vec<_>>().join("/")
}

#[tokio::test]
async fn every_method_of_every_route_is_in_the_reference_and_no_other() {
    let world = World::tuning().await;
    let reference = reference(&world).await;
    let documented: BTreeSet<(&str, &str)> =
        operations(&reference).into_iter().map(|(path, method, _)| (path, method)).collect();
    assert!(documented.len() > 45, "{documented:?}");
    let paths: BTreeSet<&str> = documented.iter().map(|(path, _)| *path).collect();
    for path in paths {
        for method in METHODS {
            let request = Request::builder().method(method.to_uppercase().as_str()).uri(address(path));
            let answer = world.http.send(request, Vec::new()).await;
            // Nothing is documented that is not routed: an unknown path has a code of its own.
            let unrouted = answer.status == 404
                && answer.text().contains("there is no")
                && answer.text().contains("see / for");
            assert!(!unrouted, "{method} {path}");
            assert_eq!(answer.status != 405, documented.contains(&(path, method)), "{method} {path}");
        }
    }
    let missing = world.http.get("/v1/embeddings/x").await;
    assert_eq!(missing.json()["error"]["code"], "unknown_url");
}

/// A value that is of no type that the schema allows.
fn wrong(schema: &Value) -> Value {
    let kinds = match schema["anyOf"].as_array() {
        Some(any) => any.iter().map(|schema| schema["type"].as_str().unwrap()).collect(),
        None => vec![schema["type"].as_str().unwrap()],
    };
    let candidates = [
        ("boolean", json!(true)),
        ("string", json!("~")),
        ("object", json!({"~": 1})),
        ("number", json!(0.5)),
    ];
    let fits = |kind: &str| kinds.contains(&kind) || kind == "number" && kinds.contains(&"integer");
    candidates.into_iter().find(|(kind, _)| !fits(kind)).unwrap().1
}

#[tokio::test]
async fn fields_of_the_reference_are_read_as_it_says() {
    let world = World::tuning().await;
    let reference = reference(&world).await;
    let file = world.upload(b"{\"text\": \"x\"}\n").await;
    let base = |path: &str| match path {
        "/v1/chat/completions" => json!({"messages": [{"role": "user", "content": "x"}], "stream": false}),
        "/v1/completions" => json!({"prompt": "x"}),
        "/v1/responses" => json!({"input": "x"}),
        "/tokenize" => json!({"prompt": "x"}),
        "/detokenize" => json!({"tokens": [65]}),
        "/v1/fine_tuning/jobs" => json!({"model": "tiny", "training_file": file, "full": false}),
        "/admin/models" => json!({"model": "/none"}),
        "/v1/load_lora_adapter" => json!({"lora_name": "a", "lora_path": "b"}),
        "/v1/unload_lora_adapter" => json!({"lora_name": "a"}),
        "/v1/roll_back_lora_adapter" => json!({"lora_name": "a", "to_generation": 1}),
        _ => json!({}),
    };
    let mut seen = 0;
    let mut misread = Vec::new();
    for (path, method, operation) in operations(&reference) {
        let schema = &operation["requestBody"]["content"]["application/json"]["schema"];
        let Some(fields) = schema["properties"].as_object() else { continue };
        for (name, field) in fields {
            let about = field["description"].as_str().unwrap();
            if about.starts_with("Accepted") {
                continue;
            }
            let mut body = base(path);
            let of_chats = ["messages", "add_generation_prompt", "chat_template_kwargs"];
            if path == "/tokenize" && of_chats.contains(&name.as_str()) {
                body = json!({"messages": [{"role": "user", "content": "x"}]});
            }
            if name == "top_logprobs" && path == "/v1/chat/completions" {
                body["logprobs"] = true.into();
            }
            body[name] = wrong(field);
            let request = Request::builder().method(method.to_uppercase().as_str()).uri(address(path));
            let answer = world.http.send(request, body.to_string().into_bytes()).await;
            let error = &answer.json()["error"];
            let param = error["param"].as_str().unwrap_or_default();
            if answer.status != 400 || param.split(['.', '[']).next() != Some(name.as_str()) {
                let (body, answer) = (&body[name], answer.text());
                misread.push(format!("{method} {path}: {name} = {body}: {answer}"));
            }
            seen += 1;
        }
        for name in schema["required"].as_array().into_iter().flatten() {
            let mut body = base(path);
            body.as_object_mut().unwrap().remove(name.as_str().unwrap());
            let request = Request::builder().method(method.to_uppercase().as_str()).uri(address(path));
            let answer = world.http.send(request, body.to_string().into_bytes()).await;
            assert_eq!((answer.status, &answer.json()["error"]["param"]), (400, name), "{method} {path}");
        }
    }
    assert!(misread.is_empty(), "{misread:#?}");
    assert!(seen > 100, "{seen}");
}

fn sources(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { sources(&path) } else { vec![path] }).collect()
}

/// Names that the code reads from bodies.
fn names_read() -> BTreeSet<String> {
    const READS: [&str; 14] = [
        ".bool(\"",
        ".string(\"",
        ".array(\"",
        ".integer(\"",
        ".number(\"",
        ".take(\"",
        ".object(\"",
        "real(fields, \"",
        "auto(given, \"",
        "required(&mut fields, \"",
        "generation(&mut fields, \"",
        "count(fields, \"",
        "count(&mut fields, \"",
        "file(&mut fields, \"",
    ];
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut names = BTreeSet::new();
    for path in ["openai", "admin", "admin.rs"].map(|part| source.join(part)) {
        let files = if path.is_dir() { sources(&path) } else { vec![path] };
        for file in files {
            let text = std::fs::read_to_string(file).unwrap();
            for read in READS {
                for (at, _) in text.match_indices(read) {
                    names.insert(text[at + read.len()..].split('"').next().unwrap().to_owned());
                }
            }
        }
    }
    names
}

#[tokio::test]
async fn every_field_that_is_read_is_in_the_reference() {
    let world = World::new(|_| say("x")).await;
    let reference = reference(&world).await.to_string();
    let names = names_read();
    assert!(names.len() > 60, "{names:?}");
    let missing: Vec<&String> =
        names.iter().filter(|name| !reference.contains(&format!("\"{name}\""))).collect();
    assert!(missing.is_empty(), "{missing:?}");
}

#[tokio::test]
async fn pages_come_from_here_alone() {
    let world = World::new(|_| say("x")).await;
    for path in ["/", "/docs", "/docs/reference.js", "/docs/reference.css"] {
        let page = world.http.get(path).await;
        assert_eq!(page.status, 200, "{path}");
        let policy = page.header("content-security-policy");
        assert!(policy.starts_with("default-src 'none'; script-src 'self'; style-src 'self'"), "{policy}");
        assert!(!policy.contains("unsafe"), "{policy}");
        assert_eq!(page.header("x-content-type-options"), "nosniff");
        let known = Request::get(path).header("if-none-match", page.header("etag"));
        let again = world.http.send(known, Vec::new()).await;
        assert_eq!((again.status, again.body.len()), (304, 0), "{path}");
    }
    assert_eq!(world.http.get("/docs/../Cargo.toml").await.status, 404);
    assert_eq!(world.http.get("/docs/%2e%2e%2fCargo.toml").await.status, 404);
}
