//! The enrolment endpoint: the only process that has the authority's key. It hands a certificate to whoever shows a token that
//! holds.
//!
//! Everything that comes before the token is known to hold is short, soon, and from few at a time. What is remembered lies in files
//! beside the key, so that any process that has both can take this one's place.

use crate::roles::permanent;
use anyhow::{Context, Result, bail};
use ashlar_identity::{Authority, Claim, Ledger, LedgerError, Role, Tls, transport};
use ashlar_protocol::enrolment::{
    ClusterFacts, ENROLMENT_BYTES_MAX, EnrolmentAnswer, EnrolmentRequest, ModelSource, Welcome,
};
use ashlar_protocol::frame::{self, FrameError};
use ashlar_service_kit::config::Schema;
use ashlar_vocabulary::{ModelDigest, Precision};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

/// Connections at a time.
const CONNECTIONS_MAX: usize = 32;
/// From a connection to its answer.
const LIMIT: Duration = Duration::from_secs(10);
/// Pause after the system refuses to accept.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Configuration of `ashlar enrolment`. Unknown keys are refused.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct EnrolmentConfig {
    /// Where machines that join connect, `host:port`.
    pub(crate) listen: String,
    /// The same as other machines see it, for the line that tells them.
    pub(crate) advertise: String,
    /// The directory of the authority, and of the tokens.
    pub(crate) authority: PathBuf,
    /// The directory of this process's own identity.
    pub(crate) identity: PathBuf,
    /// Where schedulers listen for nodes, as other machines see them.
    pub(crate) schedulers: Vec<String>,
    /// Where files are kept, if every machine can reach that.
    #[serde(default)]
    pub(crate) blobs: Option<String>,
    /// The digest of the model in its precision.
    #[schemars(with = "serde_json::Value")]
    pub(crate) model_digest: ModelDigest,
    /// Where the model comes from.
    #[schemars(with = "serde_json::Value")]
    pub(crate) model: ModelSource,
    /// In which precision it is served.
    #[schemars(with = "serde_json::Value")]
    pub(crate) precision: Precision,
}

impl EnrolmentConfig {
    /// Every key, for files, environment and flags.
    pub(crate) fn schema() -> Schema {
        Schema::of::<EnrolmentConfig>("enrolment")
    }
}

/// Serves until `shutdown` completes.
pub(crate) async fn serve(config: EnrolmentConfig, shutdown: impl Future<Output = ()>) -> Result<()> {
    let endpoint = permanent(Endpoint::open(&config))?;
    let listener = TcpListener::bind(&config.listen).await.with_context(|| {
        format!("cannot listen on {}: choose another address with --join-listen", config.listen)
    });
    let listener = permanent(listener)?;
    tracing::info!(address = %config.listen, "machines may join");
    tokio::select! {
        () = shutdown => Ok(()),
        never = accept(listener, Arc::new(endpoint)) => match never {},
    }
}

async fn accept(listener: TcpListener, endpoint: Arc<Endpoint>) -> std::convert::Infallible {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok((socket, address)) = listener.accept().await else {
            tokio::time::sleep(ACCEPT_PAUSE).await;
            continue;
        };
        let Ok(place) = places.clone().try_acquire_owned() else {
            tracing::warn!(%address, "refused: {CONNECTIONS_MAX} machines are joining");
            continue;
        };
        let endpoint = endpoint.clone();
        tokio::spawn(async move {
            let _place = place;
            match tokio::time::timeout(LIMIT, endpoint.serve_one(socket, address)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!(%address, %error, "a machine has not joined"),
                Err(_) => tracing::warn!(%address, "a machine has not joined: it took too long"),
            }
        });
    }
}

struct Endpoint {
    tls: Tls,
    authority: Authority,
    ledger: Ledger,
    facts: ClusterFacts,
}

impl Endpoint {
    fn open(config: &EnrolmentConfig) -> Result<Endpoint> {
        let authority = Authority::open(&config.authority)?;
        let tls = Tls::open(&config.identity)?;
        if tls.own().role() != Role::Enrolment || tls.cluster() != authority.fingerprint() {
            bail!(
                "the identity in {} is that of {} of cluster {}: an enrolment endpoint of cluster {} is needed",
                config.identity.display(),
                tls.own(),
                tls.cluster(),
                authority.fingerprint()
            );
        }
        let facts = ClusterFacts {
            schedulers: config.schedulers.clone(),
            model: config.model.clone(),
            model_digest: config.model_digest,
            blobs: config.blobs.clone(),
            precision: config.precision,
        };
        Ok(Endpoint { tls, authority, ledger: Ledger::of(&config.authority), facts })
    }

    async fn serve_one(self: Arc<Self>, socket: TcpStream, address: SocketAddr) -> Result<(), FrameError> {
        frame::tune(&socket)?;
        let mut stream = transport::accept_anybody(&self.tls, socket).await?;
        frame::greet(&mut stream, "enrolment").await?;
        let request: EnrolmentRequest = frame::read_within(&mut stream, ENROLMENT_BYTES_MAX).await?;
        // It waits for the disk.
        let deciding = tokio::task::spawn_blocking(move || self.decide(&request, address));
        let answer = deciding.await.map_err(|error| FrameError::Io(io::Error::other(error)))?;
        frame::write(&mut stream, &answer).await?;
        stream.shutdown().await?;
        Ok(())
    }

    fn decide(&self, asked: &EnrolmentRequest, address: SocketAddr) -> EnrolmentAnswer {
        match self.enrol(asked) {
            Ok(welcome) => EnrolmentAnswer::Welcome(Box::new(welcome)),
            Err(error) => {
                tracing::warn!(%address, "a machine may not join: {error:#}");
                let internal = !matches!(error.downcast_ref::<LedgerError>(), Some(known) if !is_internal(known))
                    && !error.is::<ashlar_identity::request::RequestError>();
                // What is wrong here is no business of others.
                let reason = if internal {
                    "the endpoint cannot do it: see its log".into()
                } else {
                    error.to_string()
                };
                EnrolmentAnswer::Refused(reason)
            }
        }
    }

    fn enrol(&self, asked: &EnrolmentRequest) -> Result<Welcome> {
        let (identity, key) = asked.request.check(self.authority.fingerprint())?;
        // First, so that a token is not lost for a certificate that cannot be made; handed out only once the use is durable.
        let certificate = self.authority.issue(&identity, &key)?;
        match &asked.secret {
            Some(secret) => {
                self.ledger.claim(Claim { secret, identity: &identity, key: &key }, SystemTime::now())?;
                tracing::info!("{identity} has joined");
            }
            None => {
                self.ledger.confirm(&identity, &key)?;
                tracing::info!("{identity} is back");
            }
        }
        Ok(Welcome {
            authority: self.authority.certificate().to_vec(),
            certificate: certificate.to_vec(),
            cluster: self.facts.clone(),
        })
    }
}

fn is_internal(error: &LedgerError) -> bool {
    matches!(error, LedgerError::Files { .. } | LedgerError::Full)
}
