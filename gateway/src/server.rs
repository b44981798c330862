//! The life of the process's HTTP side: bind, accept, drain.

mod connection;
mod places;
mod stall;

use crate::app::{App, Phase};
use crate::audit::Audit;
use crate::config::GatewayConfig;
use crate::error::GatewayError;
use crate::metrics::Metrics;
use crate::models::{Deployed, ModelFinder, follow};
use crate::openai::responses::{ADOPTIONS_WAITING_MAX, take_up};
use crate::router::{Surface, router};
use crate::scheduler_client::{SchedulerClient, SchedulerClientSettings};
use crate::text::ModelText;
use crate::tuning::Tuning;
use crate::tuning::compare::{COMPARISONS_WAITING_MAX, Comparer};
use crate::tuning::validate::{JOBS_WAITING_MAX, Validator};
use ashlar_identity::Transport;
use ashlar_identity::web::WebServer;
use ashlar_protocol::serving::SchedulerCounters;
use ashlar_service_kit::{Shutdown, Watchdog};
use ashlar_store::blobs::{self, BlobOptions};
use axum::Router;
use connection::{ConnectionSettings, refuse, serve_socket};
use places::Places;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

/// Time that streams get to send their last event when the grace period is over.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// How often certificates are looked at: whether they were renewed.
const CERTIFICATES_LOOKED_AT: Duration = Duration::from_secs(10);

/// Serves until `shutdown` is requested, then drains.
///
/// # Errors
/// [`GatewayError`], before the first request is taken.
pub async fn serve(
    config: GatewayConfig,
    model_dir: PathBuf,
    shutdown: Shutdown,
) -> Result<(), GatewayError> {
    Gateway::bind(config, &model_dir).await?.run(shutdown).await;
    Ok(())
}

/// A gateway that listens and is not yet serving.
#[derive(Debug)]
pub struct Gateway {
    app: Arc<App>,
    /// Where it listens, for what; the first is for clients.
    doors: Vec<Door>,
    phase: watch::Sender<Phase>,
    deployed: watch::Sender<Arc<Deployed>>,
    find: Finder,
    /// What runs beside requests; it ends with the gateway.
    background: JoinSet<()>,
}

impl Gateway {
    /// Loads the model's text files, binds the port and starts connecting to the scheduler.
    ///
    /// # Errors
    /// [`GatewayError`].
    pub async fn bind(config: GatewayConfig, model_dir: &Path) -> Result<Gateway, GatewayError> {
        config.check_exposure()?;
        // The ports first: a second gateway should fail at once.
        let doors = doors(&config).await?;
        let text = Arc::new(ModelText::load(model_dir)?);
        let audit = Audit::open(config.audit_log.as_deref())?;
        let tuning = match &config.blobs {
            Some(address) => Some(Tuning::new(blobs::open(address, &BlobOptions::default()).await?)),
            None => None,
        };
        let (jobs, waiting) = mpsc::channel(JOBS_WAITING_MAX);
        let (adoptions, offered) = mpsc::channel(ADOPTIONS_WAITING_MAX);
        let (comparisons, compared_next) = mpsc::channel(COMPARISONS_WAITING_MAX);
        let names = served_names(&config, model_dir);
        let metrics = Metrics::new(names.first().map_or("", String::as_str))?;
        let scheduler = SchedulerClient::start(SchedulerClientSettings {
            addresses: config.scheduler.clone(),
            transport: Transport::open(config.identity.as_deref())?,
            choices_in_flight_max: config.choices_in_flight_max,
            reconnect_max: Duration::from_millis(config.reconnect_ms_max),
            patience: Duration::from_millis(config.scheduler_patience_ms),
            jobs: tuning.is_some().then_some(jobs),
            comparisons: tuning.is_some().then_some(comparisons),
            adoptions: tuning.is_some().then_some(adoptions),
        });
        let mut background = JoinSet::new();
        if let Some(Tuning { blobs, .. }) = &tuning {
            let comparer = Comparer {
                blobs: blobs.clone(),
                text: text.clone(),
                scheduler: scheduler.clone(),
                deadline_ms: config.deadline_ms,
            };
            background.spawn(comparer.run(compared_next));
            let (blobs, text, scheduler) = (blobs.clone(), text.clone(), scheduler.clone());
            background.spawn(Validator { blobs, text, scheduler }.run(waiting));
        }
        let (phase, seen) = watch::channel(Phase::Serving);
        let (publish, deployed) = watch::channel(Arc::default());
        let app =
            Arc::new(App::new((config, audit), names, text, scheduler, metrics, (seen, deployed), tuning));
        background.spawn(count_steps(app.clone()));
        background.spawn(take_up(app.clone(), offered));
        background.spawn(async {
            Watchdog::from_environment().keep_beating().await;
        });
        if let Some(web) = doors.first().and_then(|door| door.web.clone()) {
            background.spawn(renew(web));
        }
        Ok(Gateway { app, doors, phase, deployed: publish, find: Finder::default(), background })
    }

    /// Lets it serve models that are deployed beside the scheduler's own one, whose files are found by `find`; by default they are
    /// where the scheduler says.
    pub fn finding(self, find: ModelFinder) -> Gateway {
        Gateway { find: Finder(find), ..self }
    }

    /// Where it listens; tells the port that the system chose for port 0.
    pub fn local_address(&self) -> SocketAddr {
        self.local_addresses().next().unwrap_or(self.app.config.listen)
    }

    /// Where it listens: for clients, then for operators and for metrics, where these have addresses of their own.
    pub fn local_addresses(&self) -> impl Iterator<Item = SocketAddr> {
        self.doors.iter().map(|door| door.address)
    }

    /// Serves until `shutdown` is requested, then drains.
    pub async fn run(self, shutdown: Shutdown) {
        let Gateway { app, doors, phase, deployed, find, mut background } = self;
        background.spawn(follow(app.clone(), deployed, find.0));
        for Door { address, surface, web, .. } in &doors {
            let tls = web.is_some();
            tracing::info!(%address, tls, ?surface, model = app.model_name(), "gateway listens");
        }
        let mut connections = JoinSet::new();
        let reason = {
            let accepting = accept(&app, &doors, &mut connections);
            tokio::select! {
                reason = shutdown.requested() => reason,
                () = accepting => unreachable!("accepting ends only when it is dropped"),
            }
        };
        drop(doors);
        tracing::info!(%reason, connections = connections.len(), "gateway drains");
        phase.send_replace(Phase::Draining);
        let grace = Duration::from_millis(app.config.drain_grace_ms);
        if !all_end_within(&mut connections, grace).await {
            phase.send_replace(Phase::Ending);
            all_end_within(&mut connections, LAST_WORDS).await;
        }
        connections.shutdown().await;
        background.shutdown().await;
    }
}

/// Where models are on this machine.
struct Finder(ModelFinder);

impl Default for Finder {
    fn default() -> Finder {
        Finder(Arc::new(|model| match Path::new(model) {
            path if path.exists() => Ok(path.to_owned()),
            _ => Err(format!("`{model}` is not on this machine")),
        }))
    }
}

impl std::fmt::Debug for Finder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Finder")
    }
}

/// An address that is listened on.
#[derive(Debug)]
struct Door {
    listener: TcpListener,
    address: SocketAddr,
    surface: Surface,
    /// Where HTTPS is spoken.
    web: Option<Arc<WebServer>>,
}

async fn doors(config: &GatewayConfig) -> Result<Vec<Door>, GatewayError> {
    let (admin, metrics) = (config.admin_listen, config.metrics_listen);
    let surfaces = [
        (
            Some(config.listen),
            Surface { clients: true, operators: admin.is_none(), metrics: metrics.is_none() },
        ),
        (admin, Surface { clients: true, operators: true, metrics: metrics.is_none() }),
        (metrics, Surface { clients: false, operators: false, metrics: true }),
    ];
    let web = match (&config.tls_certificate, &config.tls_key) {
        (Some(certificate), Some(key)) => Some(Arc::new(WebServer::open(certificate, key)?)),
        _ => None,
    };
    let mut doors = Vec::new();
    for (address, surface) in surfaces.into_iter().filter_map(|(address, has)| Some((address?, has))) {
        let listener = TcpListener::bind(address).await.map_err(|source| match source.kind() {
            io::ErrorKind::AddrInUse => GatewayError::PortInUse { address },
            _ => GatewayError::Listen { address, source },
        })?;
        let address = listener.local_addr().map_err(|source| GatewayError::Listen { address, source })?;
        doors.push(Door { listener, address, surface, web: web.clone() });
    }
    Ok(doors)
}

/// Keeps up with files of certificates that are renewed.
async fn renew(web: Arc<WebServer>) {
    loop {
        tokio::time::sleep(CERTIFICATES_LOOKED_AT).await;
        match web.renew() {
            Ok(false) => {}
            Ok(true) => tracing::info!("the certificate was renewed"),
            Err(error) => {
                tracing::error!(%error, "the renewed certificate cannot be used: going on with the old one")
            }
        }
    }
}

async fn accept(app: &Arc<App>, doors: &[Door], connections: &mut JoinSet<()>) {
    let routers: Vec<Router> = doors.iter().map(|door| router(app.clone(), door.surface)).collect();
    let places = Places::new(app.config.connections_max);
    let settings = ConnectionSettings {
        head_timeout: Duration::from_millis(app.config.head_timeout_ms.max(1)),
        write_timeout: Duration::from_millis(app.config.write_timeout_ms.max(1)),
    };
    loop {
        // Ended connections are collected as new ones come.
        while connections.try_join_next().is_some() {}
        let (door, accepted) = next_connection(doors).await;
        let socket = match accepted {
            Ok((socket, _)) => socket,
            Err(error) => {
                // Out of file descriptors, most likely; some connection will end.
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let (Some(Door { web, .. }), Some(router)) = (doors.get(door), routers.get(door)) else { continue };
        match places.take() {
            Some(place) => {
                let (router, web, phase) = (router.clone(), web.clone(), app.phase.clone());
                connections.spawn(serve_socket(socket, web, router, settings, (place, phase)));
            }
            // Where a handshake comes first, nothing can be said in time.
            None if web.is_none() && connections.len() < 2 * app.config.connections_max => {
                connections.spawn(refuse(socket));
            }
            // A flood: not even a refusal.
            None => drop(socket),
        }
    }
}

/// The next connection, and at which door.
async fn next_connection(doors: &[Door]) -> (usize, io::Result<(TcpStream, SocketAddr)>) {
    let knocks = doors.iter().map(|door| Box::pin(door.listener.accept()));
    let (accepted, door, _) = futures::future::select_all(knocks).await;
    (door, accepted)
}

/// True when they have all ended.
async fn all_end_within(connections: &mut JoinSet<()>, time: Duration) -> bool {
    let all = async { while connections.join_next().await.is_some() {} };
    tokio::time::timeout(time, all).await.is_ok()
}

/// Counts scheduler steps as snapshots tell of them.
async fn count_steps(app: Arc<App>) {
    let mut link = app.scheduler.watch();
    let mut last: Option<SchedulerCounters> = None;
    while link.changed().await.is_ok() {
        let counters = link.borrow_and_update().cluster.as_ref().map(|cluster| cluster.counters);
        if let (Some(last), Some(now)) = (&last, &counters) {
            app.metrics.steps(last, now);
        }
        last = counters.or(last);
    }
}

fn served_names(config: &GatewayConfig, model_dir: &Path) -> Vec<String> {
    if !config.served_model_name.is_empty() {
        return config.served_model_name.clone();
    }
    let resolved = model_dir.canonicalize().unwrap_or_else(|_| model_dir.to_owned());
    vec![resolved.file_name().map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned())]
}
