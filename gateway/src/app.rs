//! What all handlers share, and the work that must not run on the threads that serve streams.

use crate::config::GatewayConfig;
use crate::live::Live;
use crate::metrics::Metrics;
use crate::models::{self, Deployed};
use crate::openai::error::ApiError;
use crate::openai::responses::Responses;
use crate::scheduler_client::SchedulerClient;
use crate::text::ModelText;
use crate::tuning::Tuning;
use ashlar_protocol::admin::AdapterView;
use ashlar_protocol::serving::ClusterSnapshot;
use ashlar_vocabulary::{AdapterId, NUMERIC_VERSION};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::{Semaphore, watch};

/// The gateway's life, as its handlers see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Phase {
    /// Requests are taken.
    Serving,
    /// Requests in flight may end; new ones are refused.
    Draining,
    /// Requests in flight are ended with an error.
    Ending,
}

/// Waits until the gateway has come to `phase`, or is gone altogether.
pub(crate) async fn reached(seen: &mut watch::Receiver<Phase>, phase: Phase) {
    let _ = seen.wait_for(|now| *now >= phase).await;
}

/// What a request is answered with, fixed when it starts: an adapter that is replaced meanwhile changes nothing for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ServedModel {
    /// The name that the answer carries.
    pub(crate) name: String,
    /// The adapter that changes the model.
    pub(crate) adapter: Option<AdapterId>,
}

/// Shared by all handlers. Immutable but for what its parts synchronise themselves.
#[derive(Debug)]
pub(crate) struct App {
    pub(crate) config: GatewayConfig,
    /// Names of the served model; at least one.
    pub(crate) names: Vec<String>,
    pub(crate) text: Arc<ModelText>,
    pub(crate) scheduler: SchedulerClient,
    pub(crate) metrics: Metrics,
    /// What has happened lately, with all models.
    pub(crate) live: Arc<Live>,
    pub(crate) phase: watch::Receiver<Phase>,
    /// `None` where no place for files is configured.
    pub(crate) tuning: Option<Tuning>,
    /// The models beside this one.
    pub(crate) deployed: watch::Receiver<Arc<Deployed>>,
    /// Responses in progress, and where they are stored.
    pub(crate) responses: Responses,
    /// Unix seconds of the start.
    pub(crate) created: u64,
    origin: Instant,
    workers: Arc<Semaphore>,
}

impl App {
    pub(crate) fn new(
        config: GatewayConfig,
        names: Vec<String>,
        text: Arc<ModelText>,
        scheduler: SchedulerClient,
        metrics: Metrics,
        (phase, deployed): (watch::Receiver<Phase>, watch::Receiver<Arc<Deployed>>),
        tuning: Option<Tuning>,
    ) -> App {
        let blobs = tuning.as_ref().map(|tuning| tuning.blobs.clone());
        let responses = Responses::new(blobs, config.choices_in_flight_max);
        let workers = std::thread::available_parallelism().map_or(1, usize::from);
        App {
            config,
            names,
            text,
            scheduler,
            metrics,
            live: Arc::default(),
            phase,
            tuning,
            deployed,
            responses,
            created: unix_seconds(),
            origin: Instant::now(),
            workers: Arc::new(Semaphore::new(workers)),
        }
    }

    /// What serves a deployed model: the same, but for what is the model's. Files, jobs, adapters and stored responses are this one's.
    pub(crate) fn for_deployed(&self, name: &str, text: Arc<ModelText>, metrics: Metrics) -> App {
        let (_, deployed) = watch::channel(Arc::default());
        App {
            config: self.config.clone(),
            names: vec![name.to_owned()],
            text,
            scheduler: self.scheduler.of_model(name),
            metrics,
            live: self.live.clone(),
            phase: self.phase.clone(),
            tuning: None,
            deployed,
            responses: Responses::new(None, self.config.choices_in_flight_max),
            created: unix_seconds(),
            origin: self.origin,
            workers: self.workers.clone(),
        }
    }

    /// Time since the start, which transcripts count in.
    pub(crate) fn now(&self) -> Duration {
        self.origin.elapsed()
    }

    /// The name that answers carry.
    pub(crate) fn model_name(&self) -> &str {
        self.names.first().map_or("", String::as_str)
    }

    /// The name of an adapter, or of the model without one.
    pub(crate) fn name_of(&self, adapter: Option<AdapterId>) -> String {
        adapter
            .map_or_else(|| self.model_name().to_owned(), |adapter| adapter_name(&self.adapters(), adapter))
    }

    /// Whether the base model is served under this name.
    pub(crate) fn is_base(&self, name: &str) -> bool {
        self.names.iter().any(|own| own == name)
    }

    /// The adapters that are served, as last seen.
    pub(crate) fn adapters(&self) -> Vec<AdapterView> {
        self.scheduler.link().cluster.map(|cluster| cluster.adapters.clone()).unwrap_or_default()
    }

    /// What a request for `model` is answered with, if that is served. An absent one means the base model.
    pub(crate) fn served(&self, model: Option<&str>) -> Result<ServedModel, ApiError> {
        let base = || ServedModel { name: self.model_name().to_owned(), adapter: None };
        let Some(model) = model.filter(|model| !self.is_base(model)) else { return Ok(base()) };
        let adapters = self.adapters();
        match adapters.iter().find(|view| view.name == model) {
            Some(view) => Ok(ServedModel { name: view.name.clone(), adapter: Some(view.adapter) }),
            // Who asks for it has been taken for this model's: it was deployed a moment ago.
            None if models::view_of(self, model).is_some() => Err(models::not_served_yet(model, models::NEW)),
            None => {
                let adapters = adapters.into_iter().map(|view| view.name);
                let all = self.names.iter().cloned().chain(adapters).chain(models::names(self));
                Err(ApiError::unknown_model(model, &all.collect::<Vec<_>>()))
            }
        }
    }

    /// Refuses a deployed model where it is of no use.
    pub(crate) fn check_not_deployed(&self, model: &str) -> Result<(), ApiError> {
        match models::view_of(self, model) {
            None => Ok(()),
            Some(_) => Err(ApiError::field(
                "model",
                format!(
                    "`{model}` is deployed beside {}: it answers /v1/chat/completions, /v1/completions, /tokenize and /detokenize; stored \
                     responses and fine-tuning are for {} alone",
                    self.model_name(),
                    self.model_name()
                ),
            )),
        }
    }

    /// Refuses a model that is not the one that weights are served of.
    pub(crate) fn check_base_model(&self, model: &str) -> Result<(), ApiError> {
        if self.is_base(model) {
            return Ok(());
        }
        self.check_not_deployed(model)?;
        Err(ApiError::unknown_model(model, &self.names))
    }

    /// The cluster, or 503. A scheduler that is away for a moment is waited for.
    pub(crate) fn cluster(&self) -> Result<Arc<ClusterSnapshot>, ApiError> {
        if *self.phase.borrow() != Phase::Serving {
            return Err(ApiError::unavailable(
                "this server is shutting down: retry elsewhere or in a moment",
            ));
        }
        self.scheduler.link().known_cluster().cloned().map_err(ApiError::unavailable)
    }

    /// Until the cluster has been seen once: a gateway that has just started waits for the scheduler as for one that is away. Before it,
    /// no model's name means anything.
    pub(crate) async fn first_contact(&self) {
        let mut link = self.scheduler.watch();
        let _ = link.wait_for(|link| link.cluster.is_some() || link.given_up).await;
    }

    /// Runs work that takes more than microseconds (parsing, templates, tokenizing) where it disturbs no stream; as many
    /// at once as there are cores.
    pub(crate) async fn work<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let workers = self.workers.clone();
        let permit = workers.acquire_owned().await.map_err(|_| ApiError::unavailable("shutting down"))?;
        let guarded = move || {
            // Held until the work ends, even if its client has gone meanwhile.
            let _permit = permit;
            work()
        };
        match tokio::task::spawn_blocking(guarded).await {
            Ok(done) => done,
            Err(panic) => {
                tracing::error!(%panic, "a request panicked while it was prepared");
                Err(ApiError::internal("the server failed on this request: please report it"))
            }
        }
    }
}

/// The name that an adapter is served under; of a generation that only those still have who began with it, the digest.
pub(crate) fn adapter_name(served: &[AdapterView], adapter: AdapterId) -> String {
    let named = served.iter().find(|view| view.adapter == adapter);
    named.map_or_else(|| format!("{:.16}", adapter.0.hex()), |view| view.name.clone())
}

/// What identifies the bits that produced an answer: weights, format, numeric version, adapter.
pub(crate) fn system_fingerprint(cluster: &ClusterSnapshot, served: &ServedModel) -> String {
    let adapter = served.adapter.map(|AdapterId(blob)| format!("_a{:.16}", blob.hex())).unwrap_or_default();
    format!("fp_{}_n{NUMERIC_VERSION}{adapter}", cluster.model_digest)
}

/// Seconds since 1970.
pub(crate) fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
