//! A gateway, its scheduler and its model, for one test.

use crate::http::{Answer, Http};
use crate::scheduler::{FakeScheduler, Script};
use ashlar_gateway::{Gateway, GatewayConfig};
use ashlar_protocol::serving::Submit;
use ashlar_service_kit::{Shutdown, ShutdownReason};
use ashlar_store::blobs::{self, BlobOptions, Blobs};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::path::Path;
use tempfile::TempDir;
use tokio::task::JoinHandle;

pub(crate) const BOS: u32 = 257;
pub(crate) const EOS: u32 = 258;

/// One plain turn after another.
pub(crate) const PLAIN_TEMPLATE: &str = "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\
     {% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}";

pub(crate) struct World {
    pub(crate) scheduler: FakeScheduler,
    pub(crate) http: Http,
    /// Where it listens.
    pub(crate) addresses: Vec<SocketAddr>,
    pub(crate) shutdown: Shutdown,
    pub(crate) running: JoinHandle<()>,
    _model: TempDir,
    blobs: Option<TempDir>,
}

impl World {
    /// A gateway in front of a scheduler that answers each submission with what `script` gives.
    pub(crate) async fn new(script: impl Fn(&Submit) -> Script + Send + Sync + 'static) -> World {
        World::with(PLAIN_TEMPLATE, |_| {}, script).await
    }

    /// The same with another chat template and configuration.
    pub(crate) async fn with(
        template: &str,
        configure: impl FnOnce(&mut GatewayConfig),
        script: impl Fn(&Submit) -> Script + Send + Sync + 'static,
    ) -> World {
        let model = tempfile::tempdir().unwrap();
        write_model(model.path(), template);
        let path = model.path().to_owned();
        let world = World::start(model, &path, configure, script).await;
        world.until_ready().await;
        world
    }

    /// The same where HTTPS is spoken, which nobody waits for to be ready.
    pub(crate) async fn with_tls(
        template: &str,
        configure: impl FnOnce(&mut GatewayConfig),
        script: impl Fn(&Submit) -> Script + Send + Sync + 'static,
    ) -> World {
        let model = tempfile::tempdir().unwrap();
        write_model(model.path(), template);
        let path = model.path().to_owned();
        World::start(model, &path, configure, script).await
    }

    /// The same with the model at `path`.
    async fn start(
        model: TempDir,
        path: &Path,
        configure: impl FnOnce(&mut GatewayConfig),
        script: impl Fn(&Submit) -> Script + Send + Sync + 'static,
    ) -> World {
        let scheduler = FakeScheduler::start(script).await;
        let mut config = GatewayConfig {
            listen: "127.0.0.1:0".parse().unwrap(),
            scheduler: scheduler.address.to_string().into(),
            served_model_name: vec!["tiny".into(), "alias".into()],
            drain_grace_ms: 200,
            reconnect_ms_max: 50,
            ..GatewayConfig::default()
        };
        configure(&mut config);
        let gateway = Gateway::bind(config, path).await.unwrap();
        let http = Http { address: gateway.local_address() };
        let addresses = gateway.local_addresses().collect();
        let shutdown = Shutdown::manual();
        let running = tokio::spawn(gateway.run(shutdown.clone()));
        World { scheduler, http, addresses, shutdown, running, _model: model, blobs: None }
    }

    /// One that has a place for files, and the demo model.
    pub(crate) async fn tuning() -> World {
        World::tuning_with(|_| Vec::new()).await
    }

    /// The same in front of a scheduler that answers each submission with what `script` gives.
    pub(crate) async fn tuning_with(script: impl Fn(&Submit) -> Script + Send + Sync + 'static) -> World {
        let (blobs, model) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/model/demo");
        let place = blobs.path().to_string_lossy().into_owned();
        let configure = |config: &mut GatewayConfig| {
            config.blobs = Some(place);
            config.file_bytes_max = 1 << 20;
        };
        let mut world = World::start(model, &demo, configure, script).await;
        world.until_ready().await;
        world.blobs = Some(blobs);
        world
    }

    pub(crate) fn blobs_path(&self) -> &Path {
        self.blobs.as_ref().unwrap().path()
    }

    /// Where its files lie.
    pub(crate) async fn blobs(&self) -> Blobs {
        let place = self.blobs_path().to_string_lossy().into_owned();
        blobs::open(&place, &BlobOptions::default()).await.unwrap()
    }

    /// Uploads a training file and gives its id.
    pub(crate) async fn upload(&self, content: &[u8]) -> String {
        let parts = [("purpose", None, &b"fine-tune"[..]), ("file", Some("train.jsonl"), content)];
        let answer = self.http.form("/v1/files", &parts).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        answer.json()["id"].as_str().unwrap().to_owned()
    }

    /// Creates a job.
    pub(crate) async fn tune(&self, body: Value) -> Answer {
        self.http.post("/v1/fine_tuning/jobs", body).await
    }

    pub(crate) async fn until_ready(&self) {
        while self.http.get("/ready").await.status != 200 {
            tokio::task::yield_now().await;
        }
    }

    pub(crate) async fn chat(&self, body: Value) -> Answer {
        self.http.post("/v1/chat/completions", body).await
    }

    pub(crate) async fn completion(&self, body: Value) -> Answer {
        self.http.post("/v1/completions", body).await
    }

    pub(crate) async fn drain(self) {
        self.shutdown.request(ShutdownReason::Requested);
        self.running.await.unwrap();
    }
}

/// A chat request of one user message, with more fields.
pub(crate) fn ask(more: Value) -> Value {
    let mut body = json!({"model": "tiny", "messages": [{"role": "user", "content": "hi"}]});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

/// A byte-level tokenizer without merges: token `b` is the byte `b`.
pub(crate) fn write_model(dir: &Path, template: &str) {
    let vocab: serde_json::Map<String, Value> =
        (0..=255u8).map(|byte| (byte_letter(byte).to_string(), json!(byte))).collect();
    let specials = ["<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"];
    let added: Vec<Value> = specials
        .iter()
        .enumerate()
        .map(|(at, content)| {
            json!({"id": 256 + at, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": true})
        })
        .collect();
    let level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": level, "decoder": level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<|bos|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [BOS], "tokens": ["<|bos|>"]}},
        },
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []},
    });
    let config = json!({"bos_token": "<|bos|>", "eos_token": "<|end|>", "chat_template": template});
    std::fs::write(dir.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    std::fs::write(dir.join("tokenizer_config.json"), config.to_string()).unwrap();
}

/// GPT-2's letter for a byte.
fn byte_letter(byte: u8) -> char {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if printable(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|b| !printable(*b)).count() as u32;
    char::from_u32(256 + before).unwrap()
}

/// The tokens of a text.
pub(crate) fn bytes(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}
