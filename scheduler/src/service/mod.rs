//! The shell around the cores: sockets, lease, clock. It decides nothing.
//!
//! Layout: [`config`](SchedulerConfig) (what it is told), `leader` (the one task that owns both cores: select, handle,
//! perform), `connection` (a reader and a writer task per socket), `lease` (under which term it leads), `archive` (jobs' records in the
//! store, in order) with `keeper` (blobs), `records` (adapters, responses and deployed models, in the store), `models` (cores of models that are deployed beside the scheduler's own),
//! `access` (keys and quotas), `spans` (traces).
//!
//! Nodes and gateways connect to addresses of their own ([`SchedulerConfig::listen_nodes`],
//! [`SchedulerConfig::listen_gateways`]): what may speak to which is then a matter of the network, too. A gateway's first
//! message from here is the cluster's snapshot; a node's first message to here is its `Join`.
//!
//! **Invariants:** one task owns all cores; there is no lock. Every queue is bounded: a peer that does not read is
//! disconnected, a peer that sends faster than it is served waits. Whatever a peer sends, only its own connection ends.

mod access;
mod archive;
mod config;
mod connection;
mod keeper;
mod leader;
mod lease;
mod models;
mod records;
mod spans;

pub use config::{ModelCard, SchedulerConfig};
pub use models::ModelOpener;

use self::access::Access;
use crate::adapters::{AdapterRecord, AdaptersConfig};
use crate::cluster::{ClusterConfig, NodeConnection};
use crate::engine::{EngineConfig, GatewayId};
use crate::fleet::FleetRecord;
use crate::jobs::JobsConfig;
use crate::responses::ResponsesConfig;
use ashlar_identity::{ListenError, Role, TlsError, Transport};
use ashlar_protocol::access::KeyRecord;
use ashlar_protocol::responses::ResponseRecord;
use ashlar_service_kit::{Serving, ShutdownRequest, Watchdog};
use ashlar_store::blobs::{self, BlobError, BlobOptions, Blobs};
use ashlar_store::{Lease, Store, StoreError};
use ashlar_vocabulary::{Bytes, LeaseTerm};
use connection::{Door, INBOX_MESSAGES_MAX, Numbers, accept, turn_away};
use leader::{CoresConfig, Ended, Leader, Performers, Sources};
use models::{ModelPerformers, Models};
use records::{Opened, Records};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tracing::Instrument;

/// Why a scheduler cannot run.
#[derive(Debug, thiserror::Error)]
pub enum SchedulerError {
    /// The configuration makes no sense.
    #[error("the scheduler's configuration cannot be used: {0}")]
    Config(String),
    /// A port cannot be bound.
    #[error("cannot listen on {address}: {source}: choose another address with `{key}`")]
    Listen {
        /// The configured address.
        address: String,
        /// The configuration's key.
        key: &'static str,
        /// The system's words.
        source: std::io::Error,
    },
    /// Its identity cannot be used.
    #[error("cannot use `identity`: {0}")]
    Identity(#[from] TlsError),
    /// Anybody could take part.
    #[error(transparent)]
    Exposed(#[from] ListenError),
    /// The directory of the state file cannot be made.
    #[error("cannot create {path}: {source}")]
    State {
        /// The directory.
        path: std::path::PathBuf,
        /// The system's words.
        source: std::io::Error,
    },
    /// The store cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The place for blobs cannot be used.
    #[error(transparent)]
    Blobs(#[from] BlobError),
}

/// Runs a scheduler until `shutdown` completes and what runs has finished, or its grace period is over.
///
/// # Errors
/// [`SchedulerError`], before anything is served.
pub async fn serve(
    config: SchedulerConfig,
    model: ModelCard,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), SchedulerError> {
    Scheduler::bind(config, model).await?.run(shutdown).await
}

/// A scheduler with its ports bound, not yet leading.
pub struct Scheduler {
    config: SchedulerConfig,
    model: ModelCard,
    /// The keys of the configuration.
    keys: Vec<KeyRecord>,
    /// Reads the files of models that are to be deployed.
    opener: Option<ModelOpener>,
    transport: Transport,
    store: Arc<dyn Store>,
    blobs: Option<Blobs>,
    nodes: Arc<TcpListener>,
    gateways: Arc<TcpListener>,
}

impl Scheduler {
    /// Validates, opens the store and binds both ports.
    ///
    /// # Errors
    /// [`SchedulerError`].
    pub async fn bind(config: SchedulerConfig, model: ModelCard) -> Result<Scheduler, SchedulerError> {
        config.validate(&model)?;
        if let Some(file) = config.store.strip_prefix("redb:")
            && let Some(path) = std::path::Path::new(file).parent()
        {
            let failed = |source| SchedulerError::State { path: path.to_owned(), source };
            std::fs::create_dir_all(path).map_err(failed)?;
        }
        let nodes = listen(&config.listen_nodes, "listen_nodes").await?;
        let gateways = listen(&config.listen_gateways, "listen_gateways").await?;
        let transport = Transport::open(config.identity.as_deref())?;
        for listener in [&nodes, &gateways] {
            if let Ok(address) = listener.local_addr() {
                transport.check_listening(address, config.allow_plaintext)?;
            }
        }
        let store = ashlar_store::open(&config.store).await?;
        let blobs = match &config.blobs {
            Some(address) => Some(blobs::open(address, &BlobOptions::default()).await?),
            None => None,
        };
        let keys = access::configured(&config).map_err(SchedulerError::Config)?;
        Ok(Scheduler { config, model, keys, opener: None, transport, store, blobs, nodes, gateways })
    }

    /// Lets other models be deployed beside its own, whose files are read by `opener`.
    pub fn opening(self, opener: ModelOpener) -> Scheduler {
        Scheduler { opener: Some(opener), ..self }
    }

    /// Where nodes connect.
    ///
    /// # Errors
    /// If the system does not say.
    pub fn nodes_address(&self) -> std::io::Result<SocketAddr> {
        self.nodes.local_addr()
    }

    /// Where gateways connect.
    ///
    /// # Errors
    /// If the system does not say.
    pub fn gateways_address(&self) -> std::io::Result<SocketAddr> {
        self.gateways.local_addr()
    }

    /// As [`serve`].
    ///
    /// # Errors
    /// [`SchedulerError`], if the store refuses for good.
    pub fn run(self, shutdown: impl Future<Output = ()> + Send + 'static) -> Serving<SchedulerError> {
        self.boxed(Box::pin(shutdown))
    }

    fn boxed(self, shutdown: ShutdownRequest) -> Serving<SchedulerError> {
        Box::pin(self.run_until(shutdown))
    }

    async fn run_until(self, mut shutdown: ShutdownRequest) -> Result<(), SchedulerError> {
        let holder = self.holder();
        let ttl = Duration::from_millis(self.config.lease_ttl_ms);
        let mut min_term = LeaseTerm(0);
        let watchdog = Watchdog::from_environment();
        loop {
            let lease = tokio::select! {
                lease = lease::acquire(&self.store, &holder, ttl, min_term) => lease?,
                () = &mut shutdown => return Ok(()),
                never = watchdog.keep_beating() => match never {},
                // Whoever has several addresses goes on to the next one.
                never = turn_away(&self.nodes) => match never {},
                never = turn_away(&self.gateways) => match never {},
            };
            tracing::info!(term = %lease.term, %holder, "leading");
            // Not under this term again, should the store have forgotten that it was granted: revisions and sessions count within a
            // term, and ranks would take this leader's new ones for its former ones.
            min_term = min_term.max(LeaseTerm(lease.term.0 + 1));
            // Every line of the log says in which term. The target keeps it out of traces, which begin with requests.
            let term = tracing::info_span!(target: "term", "term", number = %lease.term);
            match self.lead(&lease, &watchdog, &mut shutdown).instrument(term).await {
                Ended::Drained => {
                    // Best effort: a lease that is not given back runs out.
                    if let Err(error) = self.store.release(&lease).await {
                        tracing::warn!(%error, "the lease could not be given back");
                    }
                    return Ok(());
                }
                Ended::LeaseLost => {}
                Ended::Fenced(by) => {
                    tracing::warn!(%by, "a node has accepted a higher term: acquiring one above it");
                    min_term = min_term.max(LeaseTerm(by.0 + 1));
                }
            }
        }
    }

    /// One term of leading. Connections do not outlive it: peers come back and meet the next term.
    async fn lead(&self, lease: &Lease, watchdog: &Watchdog, shutdown: &mut ShutdownRequest) -> Ended {
        // Before anybody is served: a request for an adapter is not to be refused as unknown.
        let opening = async {
            let (adapters, responses) =
                (Records::open(self.store.clone()).await, Records::open(self.store.clone()).await);
            let (models, keys) =
                (Records::open(self.store.clone()).await, Records::open(self.store.clone()).await);
            (adapters, responses, models, keys)
        };
        let (adapters, responses, models, keys): (
            Opened<AdapterRecord>,
            Opened<ResponseRecord>,
            Opened<FleetRecord>,
            Opened<KeyRecord>,
        ) = tokio::select! {
            opened = opening => opened,
            never = watchdog.keep_beating() => match never {},
        };
        let (node_sender, nodes) = mpsc::channel(INBOX_MESSAGES_MAX);
        let (gateway_sender, gateways) = mpsc::channel(INBOX_MESSAGES_MAX);
        let numbers = Arc::new(Numbers::default());
        let door = |listener: &Arc<TcpListener>, role| Door {
            listener: listener.clone(),
            transport: self.transport.clone(),
            role,
        };
        tokio::spawn(accept(door(&self.nodes, Role::Node), numbers.clone(), NodeConnection, node_sender));
        tokio::spawn(accept(door(&self.gateways, Role::Gateway), numbers, GatewayId, gateway_sender));
        let keeper = tokio::spawn(lease::keep(self.store.clone(), lease.clone()));
        let stop_keeping = keeper.abort_handle();
        let lease_lost = async move {
            let _ = keeper.await;
        };
        let (answer, answers) = mpsc::channel(archive::ANSWERS_MAX);
        let archive = archive::Archive::start(self.store.clone(), lease.term, answer.clone());
        let keeper = keeper::Keeper::start(self.store.clone(), self.blobs.clone(), answer);
        let performers =
            Performers { archive, keeper, adapters: adapters.records, responses: responses.records };
        let mut config = CoresConfig {
            cluster: self.cluster_config(lease),
            engine: self.engine_config(),
            adapters: self.adapters_config(),
            jobs: self.jobs_config(lease),
            responses: self.responses_config(),
        };
        let stored_responses = responses.stored.into_iter().map(|(_, record)| record).collect();
        let (opened, models_opened) = mpsc::channel(models::OPENED_MAX);
        let model_performers =
            ModelPerformers { opener: self.opener.clone(), opened, records: models.records };
        let models_written = models.written;
        let models = Models::new(config.clone(), model_performers, models.stored);
        // Nodes that belong to others will not come.
        config.cluster.expected_nodes =
            config.cluster.expected_nodes.map(|nodes| nodes.saturating_sub(models.nodes_deployed()).max(1));
        let access = Access::new(keys.records, keys.stored, self.keys.clone());
        let leader = Leader::new(config, performers, (models, access), adapters.stored, stored_responses);
        let grace = Duration::from_millis(self.config.drain_grace_ms);
        let (adapters_written, responses_written) = (adapters.written, responses.written);
        let sources = Sources {
            nodes,
            gateways,
            answers,
            adapters_written,
            responses_written,
            models_written,
            models_opened,
            keys_written: keys.written,
        };
        let ended = leader.lead(sources, watchdog, lease_lost, shutdown, grace).await;
        stop_keeping.abort();
        ended
    }

    /// A name that no other process has: terms of two processes must never be mistaken for each other's.
    fn holder(&self) -> String {
        let address = self.nodes_address().map(|address| address.to_string()).unwrap_or_default();
        let started = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        format!("{address}/pid-{}/started-{}", std::process::id(), started.as_nanos())
    }

    fn cluster_config(&self, lease: &Lease) -> ClusterConfig {
        let config = &self.config;
        ClusterConfig {
            model: self.model.source.clone(),
            precision: self.model.precision,
            model_digest: self.model.digest,
            shape: self.model.shape.clone(),
            max_context_tokens: self.model.max_context_tokens,
            term: lease.term,
            holder: lease.holder.clone(),
            stages: config.stages,
            tensor_parallel_size: config.tensor_parallel_size,
            replicas: config.replicas,
            expected_nodes: config.expected_nodes,
            settle_ms: config.settle_ms,
            max_num_seqs: config.max_num_seqs,
            max_num_batched_tokens: config.max_num_batched_tokens,
            spread_head: config.spread_head,
            kv_memory_share: config.kv_memory_share,
            silence_ms_max: config.silence_ms_max,
            boundary_log: config.boundary_log,
            replan_after_ms: config.replan_after_ms,
            links: config.links.clone(),
        }
    }

    fn jobs_config(&self, lease: &Lease) -> JobsConfig {
        JobsConfig {
            term: lease.term,
            model_digest: self.model.digest,
            shape: self.model.shape.clone(),
            adapter_memory: Bytes(self.config.adapter_memory_bytes),
            max_jobs_running: self.config.max_jobs_running,
            blobs: self.blobs.is_some(),
        }
    }

    fn adapters_config(&self) -> AdaptersConfig {
        AdaptersConfig {
            max_adapters: self.config.max_adapters,
            memory: Bytes(self.config.adapter_memory_bytes),
        }
    }

    fn responses_config(&self) -> ResponsesConfig {
        ResponsesConfig {
            resume_grace_ms: self.config.resume_grace_ms,
            kept_s: self.config.responses_kept_s,
            max: self.config.responses_max,
        }
    }

    fn engine_config(&self) -> EngineConfig {
        EngineConfig {
            model_digest: self.model.digest,
            vocab_size: self.model.shape.vocab_size as u32,
            max_context_tokens: self.model.max_context_tokens,
            max_num_seqs: self.config.max_num_seqs,
            max_num_batched_tokens: self.config.max_num_batched_tokens,
            audit_per_million: (self.config.audit_share * 1e6).round() as u32,
            enable_prefix_caching: self.config.enable_prefix_caching,
            step_target_ms: self.config.step_target_ms,
            queue_max: self.config.queue_max,
            queue_wait_ms_max: self.config.queue_wait_ms_max,
            deadline_default_ms: self.config.deadline_ms,
            repair_patience_ms: self.config.repair_patience_ms,
        }
    }
}

async fn listen(address: &str, key: &'static str) -> Result<Arc<TcpListener>, SchedulerError> {
    let failed = |source| SchedulerError::Listen { address: address.to_owned(), key, source };
    Ok(Arc::new(TcpListener::bind(address).await.map_err(failed)?))
}
