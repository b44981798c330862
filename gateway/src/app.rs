//! What all handlers share, and the work that must not run on the threads that serve streams.

use crate::access::Caller;
use crate::audit::Audit;
use crate::config::GatewayConfig;
use crate::context::RequestContext;
use crate::live::Live;
use crate::metrics::Metrics;
use crate::models::{self, Deployed};
use crate::openai::error::ApiError;
use crate::openai::responses::Responses;
use crate::refusals::Refusals;
use crate::scheduler_client::SchedulerClient;
use crate::text::ModelText;
use crate::tuning::Tuning;
use ashlar_protocol::access::Quota;
use ashlar_protocol::admin::AdapterView;
use ashlar_protocol::serving::ClusterSnapshot;
use ashlar_vocabulary::{AdapterId, NUMERIC_VERSION};
use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use std::ops::Deref;
use std::sync::{Arc, OnceLock};
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
pub(crate) struct Shared {
    pub(crate) config: GatewayConfig,
    /// Where is written down who has changed what.
    pub(crate) audit: Arc<Audit>,
    /// Names of the served model; at least one.
    pub(crate) names: Vec<String>,
    pub(crate) text: Arc<ModelText>,
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
    /// What the scheduler has just refused.
    pub(crate) refusals: Refusals,
    /// Unix seconds of the start.
    pub(crate) created: u64,
    origin: Instant,
    workers: Arc<Semaphore>,
}

/// What one caller sees of all that: the same, without what belongs to others. Handlers have no other.
#[derive(Debug)]
pub(crate) struct App {
    shared: Arc<Shared>,
    /// Asks on the caller's behalf.
    pub(crate) scheduler: SchedulerClient,
    /// Who asks.
    pub(crate) caller: Caller,
    /// What the scheduler says is left of the caller's limits, once it has.
    pub(crate) quota: Arc<OnceLock<Quota>>,
}

impl Deref for App {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        &self.shared
    }
}

/// Gives a handler what its caller may see.
pub(crate) struct ForCaller(pub(crate) Arc<App>);

impl FromRequestParts<Arc<App>> for ForCaller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<ForCaller, ApiError> {
        let context = parts.extensions.get::<RequestContext>();
        let context = context.ok_or_else(|| ApiError::internal("nobody knows who asks: please report it"))?;
        Ok(ForCaller(app.for_caller(context.caller.clone(), context.quota.clone())))
    }
}

impl App {
    /// What this server itself sees: everything.
    pub(crate) fn new(
        (config, audit): (GatewayConfig, Audit),
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
        let shared = Shared {
            config,
            audit: Arc::new(audit),
            names,
            text,
            metrics,
            live: Arc::default(),
            phase,
            tuning,
            deployed,
            responses,
            refusals: Refusals::default(),
            created: unix_seconds(),
            origin: Instant::now(),
            workers: Arc::new(Semaphore::new(workers)),
        };
        App { shared: Arc::new(shared), scheduler, caller: Caller::anybody(), quota: Arc::default() }
    }

    /// What serves a deployed model: the same, but for what is the model's. Files, jobs, adapters and stored responses are this one's.
    pub(crate) fn for_deployed(&self, name: &str, text: Arc<ModelText>, metrics: Metrics) -> App {
        let (_, deployed) = watch::channel(Arc::default());
        let shared = Shared {
            config: self.config.clone(),
            audit: self.audit.clone(),
            names: vec![name.to_owned()],
            text,
            metrics,
            live: self.live.clone(),
            phase: self.phase.clone(),
            tuning: None,
            deployed,
            responses: Responses::new(None, self.config.choices_in_flight_max),
            refusals: Refusals::default(),
            created: unix_seconds(),
            origin: self.origin,
            workers: self.workers.clone(),
        };
        let scheduler = self.scheduler.of_model(name);
        App { shared: Arc::new(shared), scheduler, caller: Caller::anybody(), quota: Arc::default() }
    }

    /// As this caller sees it.
    pub(crate) fn for_caller(&self, caller: Caller, quota: Arc<OnceLock<Quota>>) -> Arc<App> {
        let scheduler = self.scheduler.of_tenant(caller.tenant());
        Arc::new(App { shared: self.shared.clone(), scheduler, caller, quota })
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
        adapter.map_or_else(
            || self.model_name().to_owned(),
            |adapter| adapter_name(&self.all_adapters(), adapter),
        )
    }

    /// Whether the base model is served under this name.
    pub(crate) fn is_base(&self, name: &str) -> bool {
        self.names.iter().any(|own| own == name)
    }

    /// The adapters that are served, as last seen, whoever's they are.
    pub(crate) fn all_adapters(&self) -> Vec<AdapterView> {
        self.scheduler.link().cluster.map(|cluster| cluster.adapters.clone()).unwrap_or_default()
    }

    /// Those of them that the caller may use.
    pub(crate) fn adapters(&self) -> Vec<AdapterView> {
        let mut adapters = self.all_adapters();
        adapters.retain(|adapter| self.caller.may_use(adapter));
        adapters
    }

    /// What a request for `model` is answered with, if that is served. An absent one means the base model.
    pub(crate) fn served(&self, model: Option<&str>) -> Result<ServedModel, ApiError> {
        let base = || ServedModel { name: self.model_name().to_owned(), adapter: None };
        let may_ask_base = self.caller.may_ask(&self.names);
        let Some(model) = model.filter(|model| !self.is_base(model) || !may_ask_base) else {
            return match may_ask_base {
                true => Ok(base()),
                false => Err(ApiError::unknown_model(self.model_name(), &self.offered())),
            };
        };
        let adapters = self.adapters();
        match adapters.iter().find(|view| view.name == model) {
            Some(view) => Ok(ServedModel { name: view.name.clone(), adapter: Some(view.adapter) }),
            // Who asks for it has been taken for this model's: it was deployed a moment ago.
            None if models::view_of(self, model).is_some() => Err(models::not_served_yet(model, models::NEW)),
            None => Err(ApiError::unknown_model(model, &self.offered())),
        }
    }

    /// Names of all that the caller may ask.
    fn offered(&self) -> Vec<String> {
        let own = self.names.iter().filter(|_| self.caller.may_ask(&self.names)).cloned();
        own.chain(self.adapters().into_iter().map(|view| view.name)).chain(models::names(self)).collect()
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
        if self.is_base(model) && self.caller.may_ask(&self.names) {
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

    /// Refuses a request with this body if the scheduler has just refused one like it, before anything is done for it.
    pub(crate) fn check_refusals(&self, body: &[u8]) -> Result<(), ApiError> {
        let priority = |asked| self.caller.priority(if self.config.accept_priority { asked } else { 0 });
        let held = self.refusals.holding(Instant::now(), self.caller.key_id(), body, priority);
        let Some((refusal, quota)) = held else { return Ok(()) };
        if let Some(quota) = quota {
            let _ = self.quota.set(quota);
        }
        self.metrics.turned_away(refusal.status);
        self.live.turned_away();
        Err(refusal)
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
