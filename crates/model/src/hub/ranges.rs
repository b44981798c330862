//! Parts of files on a hub, for a node that wants nothing but its slice.

use super::{HubError, api, id_of, is_not_found, is_offline, token};
use crate::partial::is_plain_name;
use crate::weights::{INDEX_FILE, index_names};
use hf_hub::api::sync::{Api, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use std::collections::BTreeSet;
use std::ops::Range;
use std::time::Duration;
use ureq::Agent;
use ureq::config::RedirectAuthHeaders;
use ureq::http::StatusCode;

/// Longest index that is read.
const INDEX_BYTES_MAX: u64 = 64 << 20;
/// How long a hub may take to answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);
/// How long the bytes of one request may take.
const BODY_LIMIT: Duration = Duration::from_secs(300);
/// How often a request is made before it has failed.
const ATTEMPTS: usize = 3;

/// The only file of weights, where there is no index.
const WEIGHTS_FILE: &str = "model.safetensors";

/// Files that may be absent.
const OPTIONAL_FILES: [&str; 5] = [
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    INDEX_FILE,
];

/// The files of one model on a hub, at one revision.
#[derive(Debug)]
pub struct HubFiles {
    id: String,
    api: Api,
    repo: ApiRepo,
    agent: Agent,
    token: Option<String>,
    files: Vec<(String, u64)>,
}

impl HubFiles {
    /// Asks the hub which files `model`, an id, has, and how long they are. Later changes of the revision are not seen.
    ///
    /// # Errors
    /// [`HubError`].
    pub fn open(model: &str) -> Result<HubFiles, HubError> {
        let (id, revision) = id_of(model).ok_or_else(|| HubError::NotAModel(model.to_owned()))?;
        if is_offline() {
            let cache = Cache::from_env().path().clone();
            return Err(HubError::Offline { id: id.to_owned(), cache });
        }
        let token = token().or_else(|| Cache::from_env().token());
        HubFiles::on(api(), token, id, revision)
    }

    /// The same, on the hub that `api` speaks to.
    fn on(
        api: Result<Api, ApiError>,
        token: Option<String>,
        id: &str,
        revision: &str,
    ) -> Result<HubFiles, HubError> {
        let fail = |reason: String| HubError::Fetch { id: id.into(), file: "config.json".into(), reason };
        let api = api.map_err(|error| fail(error.to_string()))?;
        let repo = |revision: &str| {
            api.repo(Repo::with_revision(id.to_owned(), RepoType::Model, revision.to_owned()))
        };
        let named = repo(revision);
        let first = api.metadata(&named.url("config.json")).map_err(|error| fail(error.to_string()))?;
        let repo = repo(first.commit_hash());
        let agent = Agent::config_builder()
            .redirect_auth_headers(RedirectAuthHeaders::SameHost)
            .timeout_connect(Some(ANSWER_LIMIT))
            .timeout_recv_response(Some(ANSWER_LIMIT))
            .timeout_recv_body(Some(BODY_LIMIT))
            .build()
            .into();
        let mut hub = HubFiles { id: id.to_owned(), api, repo, agent, token, files: Vec::new() };
        hub.files.push(("config.json".into(), first.size() as u64));
        hub.add("tokenizer.json", true)?;
        for name in OPTIONAL_FILES {
            hub.add(name, false)?;
        }
        let index = hub.files.iter().find(|(name, _)| name == INDEX_FILE).map(|&(_, bytes)| bytes);
        let weights = match index {
            Some(bytes) if bytes <= INDEX_BYTES_MAX => hub.indexed(bytes)?,
            Some(bytes) => return Err(hub.failed(INDEX_FILE, format!("{bytes} bytes are too many"))),
            None => [WEIGHTS_FILE.to_owned()].into(),
        };
        for name in weights {
            if !is_plain_name(&name) {
                return Err(hub.failed(INDEX_FILE, format!("it names the file `{}`", name.escape_debug())));
            }
            hub.add(&name, true)?;
        }
        Ok(hub)
    }

    /// Names and lengths of the files.
    pub fn files(&self) -> &[(String, u64)] {
        &self.files
    }

    /// Bytes of a file.
    ///
    /// # Errors
    /// [`HubError`], after a few attempts.
    pub fn read(&self, file: &str, range: Range<u64>) -> Result<Vec<u8>, HubError> {
        if range.is_empty() {
            return Ok(Vec::new());
        }
        let mut attempt = 1;
        loop {
            match self.request(file, &range) {
                Ok(bytes) => return Ok(bytes),
                Err(reason) if attempt == ATTEMPTS => return Err(self.failed(file, reason)),
                Err(_) => attempt += 1,
            }
        }
    }

    fn request(&self, file: &str, range: &Range<u64>) -> Result<Vec<u8>, String> {
        let mut request = self.agent.get(self.repo.url(file));
        if let Some(token) = &self.token {
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        let request = request.header("Range", format!("bytes={}-{}", range.start, range.end - 1));
        let mut answer = request.call().map_err(|error| error.to_string())?;
        let length = range.end - range.start;
        if answer.status() != StatusCode::PARTIAL_CONTENT {
            return Err(format!("asked for a part, the hub answered {}", answer.status()));
        }
        let body = answer.body_mut().with_config().limit(length + 1).read_to_vec();
        let bytes = body.map_err(|error| error.to_string())?;
        if bytes.len() as u64 != length {
            return Err(format!("asked for {length} bytes, {} came", bytes.len()));
        }
        Ok(bytes)
    }

    /// Looks whether there is such a file, and how long it is.
    fn add(&mut self, name: &str, required: bool) -> Result<(), HubError> {
        match self.api.metadata(&self.repo.url(name)) {
            Ok(metadata) => self.files.push((name.to_owned(), metadata.size() as u64)),
            Err(error) if !required && is_not_found(&error) => {}
            Err(error) => return Err(self.failed(name, error.to_string())),
        }
        Ok(())
    }

    /// The files that the index names.
    fn indexed(&self, bytes: u64) -> Result<BTreeSet<String>, HubError> {
        let text = self.read(INDEX_FILE, 0..bytes)?;
        index_names(&text).map_err(|error| self.failed(INDEX_FILE, error.to_string()))
    }

    fn failed(&self, file: &str, reason: String) -> HubError {
        HubError::Fetch { id: self.id.clone(), file: file.into(), reason }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use hf_hub::api::sync::ApiBuilder;
    use std::io::{BufRead, BufReader, Write};
    use std::net::{TcpListener, TcpStream};
    use std::path::{Path, PathBuf};
    use std::sync::{Arc, Mutex};

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

    /// Serves a golden model as a hub does, and notes paths and ranges.
    fn hub(honest: bool) -> (String, Arc<Mutex<Vec<String>>>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let asked: Arc<Mutex<Vec<String>>> = Arc::default();
        let noted = asked.clone();
        std::thread::spawn(move || {
            for socket in listener.incoming().flatten() {
                let noted = noted.clone();
                std::thread::spawn(move || while answer(&socket, &noted, honest).is_some() {});
            }
        });
        (address, asked)
    }

    fn golden() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/llama-sharded")
    }

    fn answer(mut socket: &TcpStream, noted: &Mutex<Vec<String>>, honest: bool) -> Option<()> {
        let mut reader = BufReader::new(socket.try_clone().ok()?);
        let mut lines = Vec::new();
        loop {
            let mut line = String::new();
            reader.read_line(&mut line).ok().filter(|&count| count > 0)?;
            match line.trim() {
                "" => break,
                line => lines.push(line.to_owned()),
            }
        }
        let path = lines[0].split(' ').nth(1)?.to_owned();
        let range = lines
            .iter()
            .find_map(|line| line.to_ascii_lowercase().strip_prefix("range: bytes=").map(str::to_owned))?;
        noted.lock().unwrap().push(format!("{path} {range}"));
        let (start, end) = range.split_once('-')?;
        let (start, end) = (start.parse::<usize>().ok()?, end.parse::<usize>().ok()? + 1);
        let file = path.rsplit('/').next()?;
        let body = match file {
            "tokenizer.json" => Some(b"{}".to_vec()),
            _ => std::fs::read(golden().join(file)).ok(),
        };
        let Some(body) = body else {
            return write!(socket, "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n").ok();
        };
        let (status, part) = match honest || end == 1 {
            true => ("206 Partial Content", &body[start..end.min(body.len())]),
            false => ("200 OK", &body[..]),
        };
        write!(
            socket,
            "HTTP/1.1 {status}\r\nContent-Length: {}\r\nContent-Range: bytes {start}-{}/{}\r\nETag: \"1\"\r\n\
             X-Repo-Commit: {COMMIT}\r\n\r\n",
            part.len(),
            end - 1,
            body.len()
        )
        .ok()?;
        socket.write_all(part).ok()
    }

    fn open(address: &str) -> Result<HubFiles, HubError> {
        let cache = tempfile::tempdir().unwrap();
        let api = ApiBuilder::new()
            .with_endpoint(address.to_owned())
            .with_cache_dir(cache.path().to_owned())
            .with_progress(false)
            .build();
        HubFiles::on(api, Some("secret".into()), "acme/tiny", "main")
    }

    #[test]
    fn files_are_listed_with_their_lengths_and_read_in_part() {
        let (address, asked) = hub(true);
        let hub = open(&address).unwrap();
        for (name, bytes) in hub.files().iter().filter(|(name, _)| name != "tokenizer.json") {
            assert_eq!(std::fs::metadata(golden().join(name)).unwrap().len(), *bytes, "{name}");
        }
        assert_eq!(hub.files().iter().filter(|(name, _)| name.ends_with(".safetensors")).count(), 5);
        asked.lock().unwrap().clear();
        let name = "model-00002-of-00005.safetensors";
        let expected = std::fs::read(golden().join(name)).unwrap();
        assert_eq!(hub.read(name, 100..300).unwrap(), expected[100..300]);
        // Whatever the revision's name means meanwhile.
        assert_eq!(asked.lock().unwrap()[..], [format!("/acme/tiny/resolve/{COMMIT}/{name} 100-299")]);
        assert!(hub.read(name, 0..0).unwrap().is_empty());
    }

    #[test]
    fn a_hub_that_sends_whole_files_is_not_believed() {
        let (address, _) = hub(false);
        let error = open(&address).unwrap_err().to_string();
        assert!(error.contains("acme/tiny") && error.contains("asked for a part"), "{error}");
    }
}
