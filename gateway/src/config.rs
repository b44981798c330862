//! Configuration of the gateway. Every value has a default except those that name something of the deployment.

use crate::error::GatewayError;
use ashlar_service_kit::Addresses;
use ashlar_service_kit::config::Schema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// What a gateway is told when it starts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct GatewayConfig {
    /// Directory or hub id of the model whose tokenizer and chat template are used. Required by `ashlar gateway`.
    pub model: String,
    /// Where to send traces (OTLP over HTTP), for example `http://127.0.0.1:4318`. Off by default.
    pub otlp_endpoint: Option<String>,
    /// Where to listen for HTTP. Default `127.0.0.1:8080`.
    #[schemars(with = "String")]
    pub listen: SocketAddr,
    /// Where to listen for operators: `/admin`, the dashboard, and all else. They are then nowhere else. Default: where `listen` says.
    #[schemars(with = "Option<String>")]
    pub admin_listen: Option<SocketAddr>,
    /// Where to listen for `/metrics`, which is then nowhere else. Default: where `listen` says.
    #[schemars(with = "Option<String>")]
    pub metrics_listen: Option<SocketAddr>,
    /// A certificate in PEM, followed by those that lead to its authority: with it HTTPS is spoken. Looked at again every ten seconds.
    pub tls_certificate: Option<PathBuf>,
    /// Its private key in PEM.
    pub tls_key: Option<PathBuf>,
    /// Listen in the clear where others than this machine can connect: something in front of it encrypts, or nobody else is on that
    /// network. Default false: refused.
    pub plain_http: bool,
    /// The gateway port (`host:port`) of the scheduler, or of each of several, of which one leads. Default `127.0.0.1:7402`.
    pub scheduler: Addresses,
    /// The directory of this gateway's identity, which `ashlar identity` makes; with it the connection to the scheduler is encrypted
    /// and mutual. Default: in the clear.
    pub identity: Option<PathBuf>,
    /// Names under which the model is offered; the first is the one that answers carry. Default: the name of the
    /// model's directory.
    pub served_model_name: Vec<String>,
    /// Where uploaded files, samples and adapters lie: a directory, or `s3://BUCKET/PREFIX`; the same for every role.
    /// Without it, files, fine-tuning and adapters are refused.
    pub blobs: Option<String>,
    /// Largest uploaded file in bytes. Default 512 MiB.
    pub file_bytes_max: u64,
    /// The directory below which `lora_path` names adapters. Without it none can be loaded by path.
    pub adapters: Option<PathBuf>,
    /// Largest file of an adapter in bytes. Default 2 GiB.
    pub adapter_bytes_max: u64,
    /// Largest request body in bytes, uploads aside. Default 8 MiB.
    pub request_body_bytes_max: usize,
    /// Most choices (`n`) of one prompt. Default 128.
    pub n_max: u32,
    /// Most prompts of one `/v1/completions` request. Default 128.
    pub prompts_max: usize,
    /// Most choices of one request over all its prompts. Default 256.
    pub choices_max: usize,
    /// Most stop strings. Default 16.
    pub stop_strings_max: usize,
    /// Longest stop string in bytes. Default 1024.
    pub stop_string_bytes_max: usize,
    /// Most entries of `logit_bias`. Default 1024.
    pub logit_bias_max: usize,
    /// Most tools. Default 128.
    pub tools_max: usize,
    /// Most choices in flight over all requests; more are answered 429. Default 1024.
    pub choices_in_flight_max: usize,
    /// Most client connections; more take the places of those without a request in progress, or are answered 503. Default 1024.
    pub connections_max: usize,
    /// Tokens of one choice that may wait for a slow reader before the choice is dropped. Default 4096.
    pub unread_tokens_max: usize,
    /// Milliseconds from arrival until a request is failed. Default 600000.
    pub deadline_ms: u64,
    /// Milliseconds in which a client has to send a request's head; also how long a connection may idle. Default 60000.
    pub head_timeout_ms: u64,
    /// Milliseconds in which a client has to send a request's body. Default 30000.
    pub body_timeout_ms: u64,
    /// Milliseconds for which a client may take no byte of an answer. Default 60000.
    pub write_timeout_ms: u64,
    /// Milliseconds without output after which a stream gets a comment, to keep it alive. Default 10000.
    pub keep_alive_ms: u64,
    /// Milliseconds that running requests get when the gateway shuts down. Default 30000.
    pub drain_grace_ms: u64,
    /// Longest wait in milliseconds between two attempts to reach the scheduler. Default 200.
    pub reconnect_ms_max: u64,
    /// Milliseconds that a request which has not begun waits for a scheduler that is away; one that has begun waits until its
    /// deadline. Default 30000.
    pub scheduler_patience_ms: u64,
    /// Milliseconds for which a stored response goes on whose client has gone, unless it is in the background. Default 30000.
    pub resume_grace_ms: u64,
    /// Whether clients must show an API key. Default: where anybody but this machine can reach the gateway.
    pub keys_required: Option<bool>,
    /// A file to which a line of JSON is appended for each request that changes something of the cluster. Default: the log alone.
    pub audit_log: Option<PathBuf>,
    /// Whether a client may set `priority`. Default true.
    pub accept_priority: bool,
}

impl Default for GatewayConfig {
    fn default() -> GatewayConfig {
        GatewayConfig {
            model: String::new(),
            otlp_endpoint: None,
            listen: SocketAddr::from(([127, 0, 0, 1], 8080)),
            admin_listen: None,
            metrics_listen: None,
            tls_certificate: None,
            tls_key: None,
            plain_http: false,
            scheduler: "127.0.0.1:7402".into(),
            identity: None,
            served_model_name: Vec::new(),
            blobs: None,
            file_bytes_max: 512 << 20,
            adapters: None,
            adapter_bytes_max: 2 << 30,
            request_body_bytes_max: 8 << 20,
            n_max: 128,
            prompts_max: 128,
            choices_max: 256,
            stop_strings_max: 16,
            stop_string_bytes_max: 1024,
            logit_bias_max: 1024,
            tools_max: 128,
            choices_in_flight_max: 1024,
            connections_max: 1024,
            unread_tokens_max: 4096,
            deadline_ms: 600_000,
            head_timeout_ms: 60_000,
            body_timeout_ms: 30_000,
            write_timeout_ms: 60_000,
            keep_alive_ms: 10_000,
            drain_grace_ms: 30_000,
            reconnect_ms_max: 200,
            scheduler_patience_ms: 30_000,
            resume_grace_ms: 30_000,
            keys_required: None,
            audit_log: None,
            accept_priority: true,
        }
    }
}

impl GatewayConfig {
    /// Every key, for files, environment and flags.
    pub fn schema() -> Schema {
        Schema::of::<GatewayConfig>("gateway").requiring("model")
    }

    /// Whether clients must show an API key.
    pub fn keys_are_required(&self) -> bool {
        self.keys_required.unwrap_or(self.exposed().is_some())
    }

    /// Every address that is listened on.
    pub fn addresses(&self) -> impl Iterator<Item = SocketAddr> {
        [Some(self.listen), self.admin_listen, self.metrics_listen].into_iter().flatten()
    }

    /// An address that others than this machine can reach, if there is one.
    pub fn exposed(&self) -> Option<SocketAddr> {
        self.addresses().find(|address| !address.ip().is_loopback())
    }

    /// Refuses what would let in anybody, or let anybody listen.
    ///
    /// # Errors
    /// [`GatewayError::InTheClear`], [`GatewayError::WithoutKeys`], [`GatewayError::HalfOfTls`].
    pub fn check_exposure(&self) -> Result<(), GatewayError> {
        if self.tls_certificate.is_some() != self.tls_key.is_some() {
            return Err(GatewayError::HalfOfTls);
        }
        let Some(address) = self.exposed() else { return Ok(()) };
        if !self.keys_are_required() {
            return Err(GatewayError::WithoutKeys { address });
        }
        match self.tls_certificate.is_none() && !self.plain_http {
            true => Err(GatewayError::InTheClear { address }),
            false => Ok(()),
        }
    }

    /// From arrival until a request is failed.
    pub fn deadline(&self) -> Duration {
        Duration::from_millis(self.deadline_ms)
    }

    /// Silence after which a stream gets a comment.
    pub fn keep_alive(&self) -> Duration {
        Duration::from_millis(self.keep_alive_ms.max(1))
    }
}
