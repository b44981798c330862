//! `/v1/files`: uploads become blobs and records, bad ones leave neither.

use crate::http::form;
use crate::world::World;
use ashlar_protocol::admin::{AdminFailure, AdminFailureKind};
use hyper::Request;
use serde_json::{Value, json};

const CONTENT: &[u8] = b"{\"text\": \"one\"}\n{\"text\": \"two\"}\n";

#[tokio::test]
async fn a_file_is_stored_listed_read_and_deleted() {
    let world = World::tuning().await;
    // Python's client sends the purpose first, others last; a path is no name, and what is unknown is told.
    let parts = [
        ("file", Some("../../dir/train.jsonl"), CONTENT),
        ("purpose", None, b"fine-tune"),
        ("expires_after[anchor]", None, b"created_at"),
    ];
    let answer = world.http.form("/v1/files", &parts).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(answer.header("x-ashlar-warning"), "ignored unknown fields: expires_after[anchor]");
    let file = answer.json();
    let id = file["id"].as_str().unwrap().to_owned();
    assert!(id.starts_with("file-") && id.len() == 37);
    assert_eq!(file["object"], "file");
    assert_eq!(file["bytes"], CONTENT.len());
    assert_eq!(file["filename"], "train.jsonl");
    assert_eq!((&file["purpose"], &file["status"]), (&json!("fine-tune"), &json!("processed")));
    assert!(file["created_at"].as_u64().unwrap() > 1_700_000_000);

    assert_eq!(world.http.get(&format!("/v1/files/{id}")).await.json(), file);
    let content = world.http.get(&format!("/v1/files/{id}/content")).await;
    assert_eq!((content.status, &content.body[..]), (200, CONTENT));
    assert_eq!(content.header("content-disposition"), "attachment; filename=\"train.jsonl\"");
    assert_eq!(content.header("x-content-type-options"), "nosniff");
    let record = world.scheduler.admin(|admin| admin.files[0].clone());
    assert_eq!(world.blobs().await.read(record.blob, 1000).await.unwrap(), CONTENT);

    let deleted = world.http.send(Request::delete(format!("/v1/files/{id}")), Vec::new()).await;
    assert_eq!(deleted.json(), json!({"id": id, "object": "file", "deleted": true}));
    for path in [format!("/v1/files/{id}"), format!("/v1/files/{id}/content")] {
        let gone = world.http.get(&path).await;
        assert_eq!((gone.status, &gone.json()["error"]["code"]), (404, &json!("file_not_found")));
    }
}

#[tokio::test]
async fn lists_have_pages_and_purposes() {
    let world = World::tuning().await;
    let mut ids = Vec::new();
    for content in ["a", "b", "c"] {
        ids.push(world.upload(content.as_bytes()).await);
    }
    world.scheduler.admin(|admin| admin.files[1].purpose = "fine-tune-results".into());
    let list = |query: &'static str| {
        let http = world.http;
        async move { http.get(&format!("/v1/files{query}")).await.json() }
    };
    let names = |list: &Value| -> Vec<String> {
        list["data"].as_array().unwrap().iter().map(|file| file["id"].as_str().unwrap().to_owned()).collect()
    };
    let all = list("").await;
    assert_eq!(names(&all), [ids[2].clone(), ids[1].clone(), ids[0].clone()]);
    assert_eq!((&all["object"], &all["has_more"]), (&json!("list"), &json!(false)));
    let first = list("?limit=2").await;
    assert_eq!((names(&first).len(), &first["has_more"]), (2, &json!(true)));
    assert_eq!((&first["first_id"], &first["last_id"]), (&json!(ids[2]), &json!(ids[1])));
    let rest = world.http.get(&format!("/v1/files?limit=2&after={}", ids[1])).await.json();
    assert_eq!((names(&rest), &rest["has_more"]), (vec![ids[0].clone()], &json!(false)));
    let training = list("?purpose=fine-tune&limit=1").await;
    assert_eq!((names(&training), &training["has_more"]), (vec![ids[2].clone()], &json!(true)));
    for (query, param) in
        [("?limit=0", "limit"), ("?limit=x", "limit"), ("?after=file-1", "after"), ("?order=asc", "order")]
    {
        let answer = world.http.get(&format!("/v1/files{query}")).await;
        assert_eq!((answer.status, &answer.json()["error"]["param"]), (400, &json!(param)), "{query}");
    }
}

#[tokio::test]
async fn a_bad_upload_is_refused_and_leaves_nothing() {
    let world = World::tuning().await;
    let purpose = ("purpose", None, &b"fine-tune"[..]);
    let file = ("file", Some("f"), CONTENT);
    let large = vec![b'x'; (1 << 20) + 1];
    let long = vec![b'x'; 5000];
    let many = vec![("x", None, &b"y"[..]); 40];
    let cases: Vec<(&str, Vec<_>, u16, Value)> = vec![
        ("no file", vec![purpose], 400, json!("file")),
        ("no purpose", vec![file], 400, json!("purpose")),
        ("another purpose", vec![("purpose", None, b"assistants"), file], 400, json!("purpose")),
        ("another purpose, told last", vec![file, ("purpose", None, b"batch")], 400, json!("purpose")),
        ("two purposes", vec![purpose, purpose, file], 400, json!("purpose")),
        ("two files", vec![purpose, file, file], 400, json!("file")),
        ("a text for a file", vec![purpose, ("file", None, CONTENT)], 400, json!("file")),
        ("an empty file", vec![purpose, ("file", Some("f"), b"")], 400, json!("file")),
        ("a huge file", vec![purpose, ("file", Some("f"), &large)], 413, json!("file")),
        ("a huge purpose", vec![("purpose", None, &long), file], 400, json!("purpose")),
        ("many parts", many, 400, Value::Null),
    ];
    for (what, parts, status, param) in cases {
        let answer = world.http.form("/v1/files", &parts).await;
        assert_eq!(answer.status, status, "{what}: {}", answer.text());
        assert_eq!(answer.json()["error"]["param"], param, "{what}: {}", answer.text());
    }
    let plain = world.http.post("/v1/files", json!({"purpose": "fine-tune"})).await;
    assert!(plain.status == 400 && plain.text().contains("multipart/form-data"), "{}", plain.text());
    let (content_type, body) = form(&[purpose, file]);
    let half = Request::post("/v1/files").header("content-type", content_type);
    let answer = world.http.send(half, body[..body.len() / 2].to_vec()).await;
    assert_eq!(answer.status, 400, "{}", answer.text());
    assert!(world.scheduler.admin(|admin| admin.files.is_empty()));
    assert!(world.blobs().await.list(None, 10).await.unwrap().blobs.is_empty());
}

#[tokio::test]
async fn an_announced_length_is_refused_before_it_comes() {
    let world = World::tuning().await;
    let head = "POST /v1/files HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: multipart/form-data; boundary=b\r\n\
                content-length: 3000000\r\n\r\n";
    let mut request = head.as_bytes().to_vec();
    request.resize(head.len() + 3_000_000, b'x');
    let answer = world.http.raw(&request).await;
    assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
}

#[tokio::test]
async fn an_upload_that_stalls_is_a_408() {
    let blobs = tempfile::tempdir().unwrap();
    let place = blobs.path().to_string_lossy().into_owned();
    let configure = |config: &mut ashlar_gateway::GatewayConfig| {
        config.blobs = Some(place);
        config.body_timeout_ms = 50;
    };
    let world = World::with(crate::world::PLAIN_TEMPLATE, configure, |_| Vec::new()).await;
    let begun = b"POST /v1/files HTTP/1.1\r\nhost: x\r\ncontent-type: multipart/form-data; boundary=b\r\n\
                  content-length: 300\r\n\r\n--b\r\ncontent-disposition: form-data; name=\"file\"; filename=\"f\"\r\n\r\n{";
    assert!(world.http.raw(begun).await.starts_with("HTTP/1.1 408"));
}

#[tokio::test]
async fn a_scheduler_that_refuses_has_its_status() {
    let world = World::tuning().await;
    for (kind, status) in [
        (AdminFailureKind::Full, 429),
        (AdminFailureKind::Unavailable, 503),
        (AdminFailureKind::Internal, 500),
        (AdminFailureKind::Invalid, 400),
    ] {
        world
            .scheduler
            .admin(|admin| admin.refuse = Some(AdminFailure { kind, message: "for this reason".into() }));
        let answer = world.http.get("/v1/files").await;
        assert_eq!(answer.status, status);
        assert_eq!(answer.json()["error"]["message"], "for this reason");
    }
}

#[tokio::test]
async fn damaged_content_never_looks_whole() {
    let world = World::tuning().await;
    const BYTES: usize = 1_000_000;
    let id = world.upload(&vec![b'a'; BYTES]).await;
    let mut found = Vec::new();
    files_below(world.blobs_path(), &mut found);
    for file in found.iter().filter(|file| std::fs::metadata(file).unwrap().len() == BYTES as u64) {
        let mut bytes = std::fs::read(file).unwrap();
        bytes[BYTES - 1] = b'b';
        std::fs::write(file, bytes).unwrap();
    }
    let request = format!("GET /v1/files/{id}/content HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    // What had left when the damage was seen: nothing, or a part.
    let answer = world.http.raw(request.as_bytes()).await;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    assert!(body.len() < BYTES, "the connection breaks off before the last bytes");
    assert!(head.is_empty() || head.contains(&format!("content-length: {BYTES}")), "{head}");
}

fn files_below(folder: &std::path::Path, found: &mut Vec<std::path::PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        if entry.path().is_dir() { files_below(&entry.path(), found) } else { found.push(entry.path()) }
    }
}

#[tokio::test]
async fn without_a_place_for_files_it_says_what_to_configure() {
    let world = World::new(|_| Vec::new()).await;
    for path in ["/v1/files", "/v1/files/file-1", "/v1/fine_tuning/jobs", "/v1/fine_tuning/jobs/x/events"] {
        let answer = world.http.get(path).await;
        assert_eq!(answer.status, 501, "{path}");
        assert!(answer.text().contains("set `blobs`"), "{path}: {}", answer.text());
    }
    let answer = world.http.form("/v1/files", &[("purpose", None, b"fine-tune")]).await;
    assert_eq!(answer.status, 501);
}
