//! HTTPS, for clients from outside the cluster: certificates that name hosts, from an authority that browsers and tools can be told of.
//! It has nothing to do with who takes part in the cluster.
//!
//! Files are PEM, as every tool reads and writes them. A server looks at its files again now and then: renewed ones count from the next
//! connection on, and broken ones not at all.

use crate::bounded::Bounded;
use crate::files;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, InvalidDnsNameError, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme};
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::SystemTime;
use time::{Duration, OffsetDateTime};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// A server's encrypted connection.
pub type ServerStream = tokio_rustls::server::TlsStream<Bounded>;
/// A client's encrypted connection.
pub type ClientStream = tokio_rustls::client::TlsStream<TcpStream>;

const AUTHORITY_FILE: &str = "ca.pem";
const AUTHORITY_KEY_FILE: &str = "ca-key.pem";
const CERTIFICATE_FILE: &str = "server.pem";
const KEY_FILE: &str = "server-key.pem";
/// Clocks of machines may differ by as much.
const BACKDATED: Duration = Duration::DAY;
const AUTHORITY_VALID: Duration = Duration::days(3650);
/// The longest that browsers accept.
const CERTIFICATE_VALID: Duration = Duration::days(397);
/// HTTP/2 is not spoken.
const PROTOCOL: &[u8] = b"http/1.1";
/// Most bytes of a client's side of a handshake: ten times the longest of browsers.
const GREETING_BYTES_MAX: usize = 24 << 10;
/// Most certificates of a chain, or of a file of authorities.
const CERTIFICATES_MAX: usize = 1_000;

/// Why there is no HTTPS.
#[derive(Debug, thiserror::Error)]
pub enum WebError {
    /// A file cannot be read or written.
    #[error("cannot use {path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// The system's words.
        source: io::Error,
    },
    /// A file is not what it should be.
    #[error("{path} holds no {what} in PEM: {reason}")]
    Pem {
        /// Which.
        path: PathBuf,
        /// What should be there.
        what: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// Key and certificate do not fit.
    #[error("this certificate and this key cannot be used together: {0}")]
    Unfit(#[from] rustls::Error),
    /// No certificate can be made.
    #[error("cannot make a certificate: {0}")]
    Issue(#[from] rcgen::Error),
    /// A name that no host can have.
    #[error("`{0}` is neither a host's name nor an address")]
    Name(String),
}

/// The server's side.
#[derive(Debug)]
pub struct WebServer {
    certificate: PathBuf,
    key: PathBuf,
    state: RwLock<State>,
}

#[derive(Debug)]
struct State {
    config: Arc<ServerConfig>,
    /// When the files were written that were looked at last.
    written: Written,
}

type Written = (Option<SystemTime>, Option<SystemTime>);

impl WebServer {
    /// With a certificate, followed by those that lead to its authority, and its key.
    ///
    /// # Errors
    /// [`WebError`].
    pub fn open(certificate: &Path, key: &Path) -> Result<WebServer, WebError> {
        let written = written(certificate, key);
        let config = server_config(certificate, key)?;
        let state = RwLock::new(State { config, written });
        Ok(WebServer { certificate: certificate.to_owned(), key: key.to_owned(), state })
    }

    /// Takes the files as they are now, if they have changed since they were looked at last; whether they are used now.
    ///
    /// # Errors
    /// [`WebError`], once for each change that cannot be used: then it goes on with what it has.
    pub fn renew(&self) -> Result<bool, WebError> {
        let now = written(&self.certificate, &self.key);
        if self.state.read().unwrap_or_else(PoisonError::into_inner).written == now {
            return Ok(false);
        }
        let config = server_config(&self.certificate, &self.key);
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        state.written = now;
        state.config = config?;
        Ok(true)
    }

    /// The handshake of a connection.
    ///
    /// # Errors
    /// As the system, or rustls in its words.
    pub async fn accept(&self, socket: TcpStream) -> io::Result<ServerStream> {
        let config = self.state.read().unwrap_or_else(PoisonError::into_inner).config.clone();
        let socket = Bounded::new(socket, GREETING_BYTES_MAX);
        let mut stream = TlsAcceptor::from(config).accept(socket).await?;
        stream.get_mut().0.lift();
        Ok(stream)
    }
}

fn written(certificate: &Path, key: &Path) -> Written {
    let of = |path: &Path| std::fs::metadata(path).and_then(|data| data.modified()).ok();
    (of(certificate), of(key))
}

fn server_config(certificate: &Path, key: &Path) -> Result<Arc<ServerConfig>, WebError> {
    let chain = certificates(certificate)?;
    let read = PrivateKeyDer::from_pem_slice(&read(key)?);
    let pem = |error: rustls::pki_types::pem::Error| WebError::Pem {
        path: key.to_owned(),
        what: "private key",
        reason: error.to_string(),
    };
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, read.map_err(pem)?)?;
    config.alpn_protocols = vec![PROTOCOL.to_vec()];
    Ok(Arc::new(config))
}

fn read(path: &Path) -> Result<Vec<u8>, WebError> {
    files::read(path).map_err(|source| WebError::File { path: path.to_owned(), source })
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, WebError> {
    let bytes = std::fs::read(path).map_err(|source| WebError::File { path: path.to_owned(), source })?;
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).take(CERTIFICATES_MAX).collect();
    let wrong = |reason: String| WebError::Pem { path: path.to_owned(), what: "certificate", reason };
    match all {
        Ok(all) if all.is_empty() => Err(wrong("there is none in it".to_owned())),
        Ok(all) => Ok(all),
        Err(error) => Err(wrong(error.to_string())),
    }
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// The client's side.
#[derive(Debug, Clone)]
pub struct WebClient {
    config: Arc<ClientConfig>,
}

impl WebClient {
    /// One that trusts the authorities of a file, or else those that browsers do.
    ///
    /// # Errors
    /// [`WebError`].
    pub fn new(authorities: Option<&Path>) -> Result<WebClient, WebError> {
        let mut roots = RootCertStore::empty();
        match authorities {
            Some(path) => {
                for certificate in certificates(path)? {
                    roots.add(certificate)?;
                }
            }
            None => roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned()),
        }
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![PROTOCOL.to_vec()];
        Ok(WebClient { config: Arc::new(config) })
    }

    /// One that trusts a single server, by the certificate of that file: for who has the server's own files.
    ///
    /// # Errors
    /// [`WebError`].
    pub fn of_server(certificate: &Path) -> Result<WebClient, WebError> {
        let pinned = certificates(certificate)?.swap_remove(0);
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Pinned(pinned)))
            .with_no_client_auth();
        config.alpn_protocols = vec![PROTOCOL.to_vec()];
        Ok(WebClient { config: Arc::new(config) })
    }

    /// The handshake with a host of this name or address.
    ///
    /// # Errors
    /// As the system, or rustls in its words.
    pub async fn connect(&self, host: &str, socket: TcpStream) -> io::Result<ClientStream> {
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let name = ServerName::try_from(host.to_owned());
        let name = name.map_err(|error: InvalidDnsNameError| io::Error::other(error))?;
        TlsConnector::from(self.config.clone()).connect(name, socket).await
    }
}

/// Accepts one certificate, whatever names it has, and checks that the server has its key.
#[derive(Debug)]
struct Pinned(CertificateDer<'static>);

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        match *certificate == self.0 {
            true => Ok(ServerCertVerified::assertion()),
            false => Err(rustls::CertificateError::UnknownIssuer.into()),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signed, &provider().signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signed, &provider().signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}

/// Files of a server's certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WebFiles {
    /// The authority's certificate: clients are told to trust it.
    pub authority: PathBuf,
    /// The server's certificate.
    pub certificate: PathBuf,
    /// The server's key.
    pub key: PathBuf,
}

impl WebFiles {
    /// Where they are in a directory.
    pub fn of(directory: &Path) -> WebFiles {
        WebFiles {
            authority: directory.join(AUTHORITY_FILE),
            certificate: directory.join(CERTIFICATE_FILE),
            key: directory.join(KEY_FILE),
        }
    }
}

/// Makes a certificate for a server that clients reach under these names and addresses, with a new key, by the authority of the
/// directory, which is made if there is none. One process at a time may call this for a directory.
///
/// # Errors
/// [`WebError`].
pub fn issue(directory: &Path, hosts: &[String]) -> Result<WebFiles, WebError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| WebError::File { path, source }
    };
    let names: Vec<SanType> = hosts.iter().map(|host| subject(host)).collect::<Result<_, _>>()?;
    files::private_directory(directory).map_err(failed(directory))?;
    let (paths, authority_key) = (WebFiles::of(directory), directory.join(AUTHORITY_KEY_FILE));
    let issuer = match files::read(&authority_key) {
        Ok(pem) => Issuer::new(authority_params(), KeyPair::from_pem(&String::from_utf8_lossy(&pem))?),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let key = KeyPair::generate()?;
            let certificate = authority_params().self_signed(&key)?;
            files::replace(&paths.authority, certificate.pem().as_bytes())
                .map_err(failed(&paths.authority))?;
            // With its key an authority is whole.
            files::replace(&authority_key, key.serialize_pem().as_bytes()).map_err(failed(&authority_key))?;
            Issuer::new(authority_params(), key)
        }
        Err(source) => return Err(failed(&authority_key)(source)),
    };
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, hosts.first().map_or("ashlar", String::as_str));
    params.subject_alt_names = names;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    params.use_authority_key_identifier_extension = true;
    valid_for(&mut params, CERTIFICATE_VALID);
    let key = KeyPair::generate()?;
    let certificate = params.signed_by(&key, &issuer)?;
    files::replace(&paths.key, key.serialize_pem().as_bytes()).map_err(failed(&paths.key))?;
    files::replace(&paths.certificate, certificate.pem().as_bytes()).map_err(failed(&paths.certificate))?;
    Ok(paths)
}

fn subject(host: &str) -> Result<SanType, WebError> {
    if let Ok(address) = host.parse::<IpAddr>() {
        return Ok(SanType::IpAddress(address));
    }
    let plain = |part: &str| {
        !part.is_empty()
            && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'*')
    };
    let name = host.try_into().ok().filter(|_| host.split('.').all(plain));
    name.map(SanType::DnsName).ok_or_else(|| WebError::Name(host.to_owned()))
}

fn authority_params() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "ashlar web authority");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    valid_for(&mut params, AUTHORITY_VALID);
    params
}

fn valid_for(params: &mut CertificateParams, time: Duration) {
    let now = OffsetDateTime::now_utc();
    params.not_before = now - BACKDATED;
    params.not_after = now + time;
}
