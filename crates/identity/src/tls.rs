//! Both sides of a handshake: who is verified, and how refusals read.

use crate::credentials::{self, Credentials, Fingerprint, IdentityError, Written, identity_of};
use crate::name::{Identity, Role};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::ring::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256;
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, TrustAnchor, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, OtherError,
    ServerConfig, SignatureScheme,
};
use std::fmt;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use webpki::{EndEntityCert, KeyUsage};

/// Why a connection is not encrypted and mutual, and therefore none.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The connection failed.
    #[error("connection failed: {0}")]
    Io(#[from] io::Error),
    /// The other side speaks in the clear.
    #[error(
        "the peer does not speak TLS: give every process of a cluster that is on several machines an `identity`"
    )]
    NotTls,
    /// The other side shows nothing.
    #[error("the peer has no certificate of this cluster")]
    NoCertificate,
    /// The other side belongs elsewhere.
    #[error("the peer's certificate was not made by this cluster's authority: it belongs to another cluster")]
    Stranger,
    /// Too early or too late.
    #[error("the peer's certificate is not valid now ({0}): compare the clocks of both machines")]
    NotNow(&'static str),
    /// The other side refuses this process.
    #[error(
        "the peer refuses this process's certificate ({0}): it belongs to another cluster, or the clocks differ"
    )]
    RefusedUs(String),
    /// The other side is not what belongs there.
    #[error("the peer is {peer}, but a {expected} belongs at this end")]
    WrongRole {
        /// Who it is.
        peer: Identity,
        /// What it should be.
        expected: Role,
    },
    /// Anything else.
    #[error("no encrypted connection: {0}")]
    Other(Error),
    /// One's own files.
    #[error(transparent)]
    Identity(#[from] IdentityError),
}

impl From<Error> for TlsError {
    fn from(error: Error) -> TlsError {
        use rustls::AlertDescription as Alert;
        match error {
            Error::InvalidMessage(_) => TlsError::NotTls,
            Error::NoCertificatesPresented => TlsError::NoCertificate,
            Error::InvalidCertificate(reason) => match reason {
                CertificateError::UnknownIssuer | CertificateError::BadSignature => TlsError::Stranger,
                CertificateError::Expired => TlsError::NotNow("it has expired"),
                CertificateError::NotValidYet => TlsError::NotNow("its time has not come"),
                reason => TlsError::Other(Error::InvalidCertificate(reason)),
            },
            Error::AlertReceived(
                alert @ (Alert::UnknownCA
                | Alert::BadCertificate
                | Alert::CertificateExpired
                | Alert::CertificateUnknown
                | Alert::CertificateRequired
                | Alert::DecryptError
                | Alert::AccessDenied),
            ) => TlsError::RefusedUs(alert.as_str().unwrap_or("alert").to_owned()),
            error => TlsError::Other(error),
        }
    }
}

impl TlsError {
    /// Of an error of a connection, which may hold one of TLS.
    pub fn of_io(error: io::Error) -> TlsError {
        match error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) {
            Some(tls) => tls.clone().into(),
            None => TlsError::Io(error),
        }
    }
}

/// A process's own identity, ready for both sides of a handshake; clones share it.
///
/// Files of a directory are looked at again now and then: what has been renewed there counts from the next connection on, and what cannot
/// be used does not count at all.
#[derive(Debug, Clone)]
pub struct Tls {
    own: Identity,
    cluster: Fingerprint,
    /// Where it is kept, if it is.
    directory: Option<Arc<Path>>,
    state: Arc<Mutex<State>>,
}

/// What is used for the next connection.
#[derive(Debug)]
struct State {
    sides: Arc<Sides>,
    /// When the files were written that were looked at last.
    written: Written,
    looked_at: Instant,
}

/// Both sides of a handshake, and that of the enrolment endpoint.
#[derive(Debug)]
pub(crate) struct Sides {
    pub(crate) client: Arc<ClientConfig>,
    pub(crate) server: Arc<ServerConfig>,
    pub(crate) enrolment: Arc<ServerConfig>,
}

/// How often files are looked at, at most.
const LOOKED_AT_EVERY: Duration = Duration::from_secs(1);

impl Tls {
    /// With the credentials that are kept in a directory.
    ///
    /// # Errors
    /// [`TlsError`].
    pub fn open(directory: &Path) -> Result<Tls, TlsError> {
        let written = credentials::written(directory);
        let tls = Tls::new(&Credentials::open(directory)?)?;
        tls.state.lock().unwrap_or_else(PoisonError::into_inner).written = written;
        Ok(Tls { directory: Some(directory.into()), ..tls })
    }

    /// With these credentials.
    ///
    /// # Errors
    /// [`TlsError`], if key and certificate do not belong together.
    pub fn new(credentials: &Credentials) -> Result<Tls, TlsError> {
        let own = credentials.identity().ok_or(TlsError::NoCertificate)?;
        let state = State {
            sides: Arc::new(Sides::of(credentials)?),
            written: Written::default(),
            looked_at: Instant::now(),
        };
        let state = Arc::new(Mutex::new(state));
        Ok(Tls { own, cluster: credentials.fingerprint(), directory: None, state })
    }

    /// What the next connection uses: the files as they are now, if they have changed and can be used.
    pub(crate) fn sides(&self) -> Arc<Sides> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(directory) = &self.directory
            && state.looked_at.elapsed() >= LOOKED_AT_EVERY
        {
            state.looked_at = Instant::now();
            let written = credentials::written(directory);
            if written != state.written {
                state.written = written;
                match self.renewed(directory) {
                    Ok(sides) => {
                        state.sides = Arc::new(sides);
                        tracing::info!(directory = %directory.display(), "uses the renewed identity");
                    }
                    Err(error) => {
                        tracing::error!(%error, "cannot use the renewed identity, and goes on with the one before");
                    }
                }
            }
        }
        state.sides.clone()
    }

    fn renewed(&self, directory: &Path) -> Result<Sides, TlsError> {
        let credentials = Credentials::open(directory)?;
        match credentials.identity() {
            Some(identity) if identity == self.own => Sides::of(&credentials),
            other => {
                let other = other.map_or_else(|| "nobody".to_owned(), |other| other.to_string());
                let reason = format!("it is now that of {other}, and not of {}", self.own);
                Err(IdentityError::Damaged { directory: directory.to_owned(), reason }.into())
            }
        }
    }

    /// Who this process is.
    pub fn own(&self) -> &Identity {
        &self.own
    }

    /// Which cluster it belongs to.
    pub fn cluster(&self) -> Fingerprint {
        self.cluster
    }
}

impl Sides {
    fn of(credentials: &Credentials) -> Result<Sides, TlsError> {
        let verifier = Arc::new(OfCluster::new(credentials.authorities())?);
        let chain = vec![credentials.certificate.clone()];
        let mut client = client_builder()?
            .dangerous()
            .with_custom_certificate_verifier(verifier.clone())
            .with_client_auth_cert(chain.clone(), credentials.key())?;
        prepare_client(&mut client);
        let mut server = server_builder()?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, credentials.key())?;
        prepare_server(&mut server);
        // Whoever enrols has no certificate yet, and knows only the authority's fingerprint.
        let chain = vec![credentials.certificate.clone(), credentials.authority.clone()];
        let mut enrolment =
            server_builder()?.with_no_client_auth().with_single_cert(chain, credentials.key())?;
        prepare_server(&mut enrolment);
        Ok(Sides { client: Arc::new(client), server: Arc::new(server), enrolment: Arc::new(enrolment) })
    }
}

/// One that trusts the enrolment endpoint of the cluster with this fingerprint, and nobody else.
pub(crate) fn pinned_client(cluster: Fingerprint) -> Result<Arc<ClientConfig>, TlsError> {
    let verifier =
        Arc::new(EnrolmentOf { cluster, algorithms: provider().signature_verification_algorithms });
    let mut client =
        client_builder()?.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth();
    prepare_client(&mut client);
    Ok(Arc::new(client))
}

/// Whom the other side has shown itself to be, if that belongs there.
pub(crate) fn expect(
    certificates: Option<&[CertificateDer<'_>]>,
    expected: Role,
) -> Result<Identity, TlsError> {
    let certificate = certificates.and_then(<[_]>::first).ok_or(TlsError::NoCertificate)?;
    let peer = identity_of(certificate).ok_or(TlsError::NoCertificate)?;
    if peer.role() != expected {
        return Err(TlsError::WrongRole { peer, expected });
    }
    Ok(peer)
}

/// What a client calls the server: certificates name roles, which are checked afterwards.
pub(crate) fn server_name() -> ServerName<'static> {
    ServerName::IpAddress(std::net::Ipv4Addr::LOCALHOST.into())
}

/// One cipher, which needs no new keys however much is sent, and is as fast on processors without instructions for AES.
fn provider() -> CryptoProvider {
    CryptoProvider {
        cipher_suites: vec![TLS13_CHACHA20_POLY1305_SHA256],
        ..rustls::crypto::ring::default_provider()
    }
}

fn client_builder() -> Result<rustls::ConfigBuilder<ClientConfig, rustls::WantsVerifier>, Error> {
    ClientConfig::builder_with_provider(Arc::new(provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
}

fn server_builder() -> Result<rustls::ConfigBuilder<ServerConfig, rustls::WantsVerifier>, Error> {
    ServerConfig::builder_with_provider(Arc::new(provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
}

fn prepare_client(client: &mut ClientConfig) {
    client.enable_sni = false;
    client.resumption = rustls::client::Resumption::disabled();
    // Blocking connections go on with the keys alone: see `records`.
    client.enable_secret_extraction = true;
}

fn prepare_server(server: &mut ServerConfig) {
    // Nothing but data follows a handshake.
    server.send_tls13_tickets = 0;
    server.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    server.enable_secret_extraction = true;
}

/// Accepts whom the cluster's authority has made a certificate for, or one that is to be trusted beside it.
struct OfCluster {
    anchors: Vec<TrustAnchor<'static>>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl fmt::Debug for OfCluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OfCluster")
    }
}

impl OfCluster {
    fn new<'a>(
        authorities: impl IntoIterator<Item = &'a CertificateDer<'static>>,
    ) -> Result<OfCluster, TlsError> {
        let anchor = |authority: &CertificateDer<'static>| {
            let anchor = webpki::anchor_from_trusted_cert(authority);
            anchor.map(|anchor| anchor.to_owned()).map_err(|error| TlsError::from(of_webpki(error)))
        };
        let anchors = authorities.into_iter().map(anchor).collect::<Result<_, _>>()?;
        Ok(OfCluster { anchors, algorithms: provider().signature_verification_algorithms })
    }

    fn verify(&self, certificate: &CertificateDer<'_>, now: UnixTime, usage: KeyUsage) -> Result<(), Error> {
        let certificate = EndEntityCert::try_from(certificate).map_err(of_webpki)?;
        let verified =
            certificate.verify_for_usage(self.algorithms.all, &self.anchors, &[], now, usage, None, None);
        verified.map(|_| ()).map_err(of_webpki)
    }
}

impl ServerCertVerifier for OfCluster {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.verify(certificate, now, KeyUsage::server_auth()).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(only_tls13())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signed, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for OfCluster {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.verify(certificate, now, KeyUsage::client_auth()).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(only_tls13())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signed, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// Accepts the enrolment endpoint of one cluster: it shows the authority's certificate, which has the fingerprint, and one of its own
/// that this authority has made for this role. A node of the cluster is refused, for it could collect tokens.
struct EnrolmentOf {
    cluster: Fingerprint,
    algorithms: WebPkiSupportedAlgorithms,
}

impl fmt::Debug for EnrolmentOf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "EnrolmentOf({})", self.cluster)
    }
}

impl ServerCertVerifier for EnrolmentOf {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let [authority] = intermediates else { return Err(CertificateError::UnknownIssuer.into()) };
        if Fingerprint::of(authority) != self.cluster {
            return Err(CertificateError::UnknownIssuer.into());
        }
        let of_cluster =
            OfCluster::new([&authority.clone().into_owned()]).map_err(|_| CertificateError::BadEncoding)?;
        of_cluster.verify(certificate, now, KeyUsage::server_auth())?;
        match identity_of(certificate) {
            Some(identity) if identity.role() == Role::Enrolment => Ok(ServerCertVerified::assertion()),
            _ => Err(CertificateError::ApplicationVerificationFailure.into()),
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(only_tls13())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signed, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

fn only_tls13() -> Error {
    Error::General("only TLS 1.3 is spoken here".to_owned())
}

fn of_webpki(error: webpki::Error) -> Error {
    use webpki::Error as E;
    let reason = match error {
        E::CertExpired { .. } => CertificateError::Expired,
        E::CertNotValidYet { .. } => CertificateError::NotValidYet,
        E::UnknownIssuer => CertificateError::UnknownIssuer,
        E::InvalidSignatureForPublicKey => CertificateError::BadSignature,
        E::BadDer | E::BadDerTime => CertificateError::BadEncoding,
        other => CertificateError::Other(OtherError(Arc::new(other))),
    };
    Error::InvalidCertificate(reason)
}
