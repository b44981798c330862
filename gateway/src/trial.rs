//! What reads requests, without a server around it and without a cluster behind it: for tests that try any bytes on it.

use crate::admin::models::deployment;
use crate::app::{App, Phase};
use crate::audit::Audit;
use crate::config::GatewayConfig;
use crate::error::GatewayError;
use crate::import;
use crate::metrics::Metrics;
use crate::openai::chat;
use crate::openai::completions_request::CompletionRequest;
use crate::openai::error::ApiError;
use crate::openai::fields::Fields;
use crate::openai::responses;
use crate::openai::tokenize::tokens_of;
use crate::openai::tuning::choices::JobForm;
use crate::openai::tuning::lists::QueryFields;
use crate::openai::tuning::upload::try_form;
use crate::scheduler_client::{SchedulerClient, SchedulerClientSettings};
use crate::text::ModelText;
use crate::tuning::Tuning;
use ashlar_identity::Transport;
use ashlar_store::blobs::{self, BlobOptions};
use axum::body::Body;
use axum::extract::Request;
use axum::http::{HeaderValue, Uri, header};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Runtime;
use tokio::sync::watch;

/// The name of the model that requests may ask for.
pub const MODEL: &str = "trial";

/// A gateway that listens nowhere.
#[derive(Debug)]
pub struct Trial {
    app: App,
    runtime: Runtime,
}

impl Trial {
    /// With the text files of a model; uploads go through `blobs`, a directory, and leave nothing there.
    ///
    /// # Errors
    /// [`GatewayError`].
    pub fn open(model: &Path, blobs: &Path) -> Result<Trial, GatewayError> {
        let failed = |reason: std::io::Error| GatewayError::Model {
            model_dir: model.to_owned(),
            reason: reason.to_string(),
        };
        // Its tasks run only while a form is read: nobody connects to anything.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
        let entered = runtime.enter();
        let config = GatewayConfig {
            served_model_name: vec![MODEL.to_owned()],
            // Nobody is there.
            scheduler: "127.0.0.1:1".to_owned().into(),
            ..GatewayConfig::default()
        };
        let scheduler = SchedulerClient::start(SchedulerClientSettings {
            addresses: config.scheduler.clone(),
            transport: Transport::open(None)?,
            choices_in_flight_max: 1,
            reconnect_max: Duration::from_secs(1),
            patience: Duration::from_secs(1),
            jobs: None,
            comparisons: None,
            adoptions: None,
        });
        let blobs = runtime.block_on(blobs::open(&blobs.to_string_lossy(), &BlobOptions::default()))?;
        let text = Arc::new(ModelText::load(model)?);
        let watched = (watch::channel(Phase::Serving).1, watch::channel(Arc::default()).1);
        let names = config.served_model_name.clone();
        let app = App::new(
            (config, Audit::default()),
            names,
            text,
            scheduler,
            Metrics::new(MODEL)?,
            watched,
            Some(Tuning::new(blobs)),
        );
        drop(entered);
        Ok(Trial { app, runtime })
    }

    /// `POST /v1/chat/completions`: parsed, rendered, tokenised, its grammar compiled.
    ///
    /// # Errors
    /// [`ApiError`], like all that follow.
    pub fn chat(&self, body: &[u8]) -> Result<(), ApiError> {
        chat::Prepared::new(body, &self.app).map(drop)
    }

    /// `POST /v1/completions`: parsed and tokenised, its grammar compiled.
    pub fn completion(&self, body: &[u8]) -> Result<(), ApiError> {
        let request = CompletionRequest::parse(body, &self.app.text, &self.app.config)?;
        let grammar = request.grammar.as_ref();
        grammar.map_or(Ok(()), |grammar| self.app.text.check_grammar(grammar, "response_format"))
    }

    /// `POST /v1/responses`: as a chat.
    pub fn response(&self, body: &[u8]) -> Result<(), ApiError> {
        responses::try_body(body, &self.app)
    }

    /// `POST /tokenize`.
    pub fn tokenize(&self, body: &[u8]) -> Result<(), ApiError> {
        tokens_of(&self.app, &mut Fields::parse(body)?).map(drop)
    }

    /// `POST /v1/fine_tuning/jobs`.
    pub fn job(&self, body: &[u8]) -> Result<(), ApiError> {
        JobForm::parse(body, 7, 4096).map(drop)
    }

    /// `POST /admin/models`.
    pub fn deployment(&self, body: &[u8]) -> Result<(), ApiError> {
        deployment(&mut Fields::parse(body)?).map(drop)
    }

    /// The path and query of a list; anything that is no address is refused before.
    pub fn list(&self, address: &[u8]) -> Result<(), ApiError> {
        let uri = Uri::try_from(address).map_err(|error| ApiError::invalid(error.to_string()))?;
        let mut query = QueryFields::parse(&uri)?;
        query.limit(20, 100)?;
        query.flag("stream")?;
        query.after(|text| text.parse::<u64>().ok())?;
        Ok(())
    }

    /// `POST /v1/files` with this type of content.
    pub fn upload(&self, content_type: &[u8], body: &[u8]) -> Result<(), ApiError> {
        let value =
            HeaderValue::from_bytes(content_type).map_err(|error| ApiError::invalid(error.to_string()))?;
        let mut request = Request::new(Body::from(body.to_vec()));
        request.headers_mut().insert(header::CONTENT_TYPE, value);
        self.runtime.block_on(try_form(&self.app, request))
    }

    /// The files of an adapter in `path` below `root`, as `POST /v1/load_lora_adapter` looks at them.
    pub fn adapter(&self, root: &Path, path: &str) -> Result<(), ApiError> {
        import::open(root, path, self.app.config.adapter_bytes_max).map(drop)
    }
}
