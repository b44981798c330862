//! Models from a hub: a small hub on loopback, spoken to by the real client inside the real binary.
#![allow(clippy::unwrap_used, missing_docs)]

use ashlar_tests::cluster::binary;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

fn goldens(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/model/tests/goldens").join(name)
}

/// Serves the files of one directory the way the hub does; notes what was asked.
struct Hub {
    address: String,
    requests: Arc<Mutex<Vec<String>>>,
}

impl Hub {
    fn start(directory: PathBuf, token: Option<&'static str>) -> Hub {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let requests: Arc<Mutex<Vec<String>>> = Arc::default();
        let noted = requests.clone();
        std::thread::spawn(move || {
            for socket in listener.incoming().flatten() {
                let (directory, noted) = (directory.clone(), noted.clone());
                std::thread::spawn(move || while answer(&socket, &directory, token, &noted).is_some() {});
            }
        });
        Hub { address, requests }
    }

    fn asked(&self) -> Vec<String> {
        self.requests.lock().unwrap().clone()
    }
}

fn answer(
    socket: &TcpStream,
    directory: &Path,
    token: Option<&str>,
    noted: &Mutex<Vec<String>>,
) -> Option<()> {
    let mut reader = BufReader::new(socket.try_clone().ok()?);
    let mut request = String::new();
    reader.read_line(&mut request).ok().filter(|&count| count > 0)?;
    let path = request.split(' ').nth(1)?.to_owned();
    let (mut range, mut authorised) = (None, token.is_none());
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let line = line.trim().to_ascii_lowercase();
        if line.is_empty() {
            break;
        }
        if let Some(bytes) = line.strip_prefix("range: bytes=") {
            let (start, end) = bytes.split_once('-')?;
            range = Some((start.parse::<usize>().ok()?, end.parse::<usize>().ok()));
        }
        authorised |= token.is_some_and(|token| line == format!("authorization: bearer {token}"));
    }
    noted.lock().unwrap().push(path.clone());
    let file = path.rsplit('/').next()?;
    let mut socket = socket;
    let body = fs::read(directory.join(file)).ok().filter(|_| path.starts_with("/acme/tiny/resolve/"));
    let (status, body) = match (authorised, body) {
        (false, _) => ("401 Unauthorized", Vec::new()),
        (true, None) => ("404 Not Found", Vec::new()),
        (true, Some(body)) => ("206 Partial Content", body),
    };
    let total = body.len();
    let (start, end) =
        range.map_or((0, total), |(start, end)| (start, end.map_or(total, |e| e + 1).min(total)));
    let part = &body[start.min(total)..end];
    write!(
        socket,
        "HTTP/1.1 {status}\r\nContent-Length: {}\r\nContent-Range: bytes {start}-{}/{total}\r\nETag: \"{file}-1\"\r\n\
         X-Repo-Commit: {COMMIT}\r\nAccept-Ranges: bytes\r\n\r\n",
        part.len(),
        end.saturating_sub(1)
    )
    .ok()?;
    socket.write_all(part).ok()
}

/// A model directory: a golden model and the demo's tokenizer.
fn model() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(goldens("llama-sharded")).unwrap().flatten() {
        fs::copy(entry.path(), directory.path().join(entry.file_name())).unwrap();
    }
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/model/demo/tokenizer.json");
    fs::copy(demo, directory.path().join("tokenizer.json")).unwrap();
    directory
}

fn plan(model: &str, home: &Path, variables: &[(&str, &str)]) -> Output {
    Command::new(binary())
        .args(["plan", "--json", "--device", "a=1GiB,1e9,1e9", "--model", model])
        .env_remove("HF_TOKEN")
        .env_remove("HF_HUB_OFFLINE")
        .env("HF_HOME", home)
        .envs(variables.iter().copied())
        .output()
        .unwrap()
}

fn assert_planned(output: &Output) {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let layout: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(layout["replicas"][0]["stages"][0]["layers"]["end"], 3);
}

#[test]
fn a_model_is_fetched_once_with_its_shards_and_then_served_from_the_cache() {
    let (files, home) = (model(), tempfile::tempdir().unwrap());
    let hub = Hub::start(files.path().to_owned(), None);
    let endpoint = [("HF_ENDPOINT", hub.address.as_str())];
    assert_planned(&plan("acme/tiny", home.path(), &endpoint));
    let asked = hub.asked();
    for file in [
        "config.json",
        "tokenizer.json",
        "model-00001-of-00005.safetensors",
        "model-00005-of-00005.safetensors",
    ] {
        assert!(
            asked.iter().any(|path| path == &format!("/acme/tiny/resolve/main/{file}")),
            "{file}: {asked:?}"
        );
    }
    // Offline: nothing is asked any more.
    let offline = [endpoint[0], ("HF_HUB_OFFLINE", "1")];
    assert_planned(&plan("acme/tiny", home.path(), &offline));
    assert_eq!(hub.asked().len(), asked.len());
}

#[test]
fn a_pinned_revision_is_what_is_asked_for() {
    let (files, home) = (model(), tempfile::tempdir().unwrap());
    let hub = Hub::start(files.path().to_owned(), None);
    assert_planned(&plan("acme/tiny@v1.2", home.path(), &[("HF_ENDPOINT", &hub.address)]));
    assert!(hub.asked().iter().all(|path| path.starts_with("/acme/tiny/resolve/v1.2/")), "{:?}", hub.asked());
}

#[test]
fn a_gated_model_needs_the_token() {
    let (files, home) = (model(), tempfile::tempdir().unwrap());
    let hub = Hub::start(files.path().to_owned(), Some("secret"));
    let refused = plan("acme/tiny", home.path(), &[("HF_ENDPOINT", &hub.address)]);
    let message = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(
        !refused.status.success() && message.contains("acme/tiny") && message.contains("401"),
        "{message}"
    );
    assert_planned(&plan("acme/tiny", home.path(), &[("HF_ENDPOINT", &hub.address), ("HF_TOKEN", "secret")]));
}

#[test]
fn what_cannot_be_found_is_named() {
    let home = tempfile::tempdir().unwrap();
    let offline = plan("acme/absent", home.path(), &[("HF_HUB_OFFLINE", "1")]);
    let message = String::from_utf8_lossy(&offline.stderr).into_owned();
    assert!(!offline.status.success() && message.contains("HF_HUB_OFFLINE"), "{message}");
    let nowhere = plan("./no/such/directory", home.path(), &[]);
    let message = String::from_utf8_lossy(&nowhere.stderr).into_owned();
    assert!(!nowhere.status.success() && message.contains("neither a model directory"), "{message}");
}
