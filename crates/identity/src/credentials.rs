//! What a process keeps to show who it is: its key, its certificate, and the certificate of the authority that made it.

use crate::files;
use crate::name::Identity;
use ring::digest;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;
use webpki::EndEntityCert;

const AUTHORITY_FILE: &str = "ca.der";
const CERTIFICATE_FILE: &str = "certificate.der";
const KEY_FILE: &str = "key.der";
/// Another authority, which is trusted beside that of the certificate: while one takes the place of the other.
const OTHER_AUTHORITY_FILE: &str = "other-ca.der";

/// Why an identity cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A file cannot be read or written.
    #[error("cannot use the identity in {directory}: {source}")]
    Files {
        /// Where.
        directory: PathBuf,
        /// The system's words.
        source: io::Error,
    },
    /// A file is not what it should be.
    #[error("the identity in {directory} is damaged ({reason}): remove the directory and enrol again")]
    Damaged {
        /// Where.
        directory: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

/// The SHA-256 of an authority's certificate: names a cluster.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint(pub [u8; 32]);

impl Fingerprint {
    /// Of a certificate.
    pub fn of(certificate: &CertificateDer<'_>) -> Fingerprint {
        let mut bytes = [0; 32];
        bytes.copy_from_slice(digest::digest(&digest::SHA256, certificate).as_ref());
        Fingerprint(bytes)
    }
}

impl fmt::Display for Fingerprint {
    /// The first bytes, which are enough to tell clusters apart by eye.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().take(8).try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fingerprint({self})")
    }
}

/// A key with its certificate.
pub struct Credentials {
    /// The certificate of the authority.
    pub authority: CertificateDer<'static>,
    /// Made by it, for this key.
    pub certificate: CertificateDer<'static>,
    /// An authority that is trusted, too.
    pub other_authority: Option<CertificateDer<'static>>,
    key: Vec<u8>,
}

/// When the files of a directory were written.
pub(crate) type Written = [Option<SystemTime>; 4];

/// When the files of a directory were written; they are put there in the order in which they are read here, the certificate last.
pub(crate) fn written(directory: &Path) -> Written {
    [KEY_FILE, AUTHORITY_FILE, OTHER_AUTHORITY_FILE, CERTIFICATE_FILE]
        .map(|name| std::fs::metadata(directory.join(name)).and_then(|data| data.modified()).ok())
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Credentials({:?})", self.identity())
    }
}

impl Credentials {
    /// From their parts; `key` is PKCS #8.
    pub fn new(authority: Vec<u8>, certificate: Vec<u8>, key: Vec<u8>) -> Credentials {
        Credentials {
            authority: authority.into(),
            certificate: certificate.into(),
            other_authority: None,
            key,
        }
    }

    /// Those that are kept in a directory.
    ///
    /// # Errors
    /// [`IdentityError`].
    pub fn open(directory: &Path) -> Result<Credentials, IdentityError> {
        let read = |name: &str| {
            files::read(&directory.join(name)).map_err(|source| {
                let source = io::Error::new(source.kind(), format!("{name}: {source}"));
                IdentityError::Files { directory: directory.to_owned(), source }
            })
        };
        let mut credentials =
            Credentials::new(read(AUTHORITY_FILE)?, read(CERTIFICATE_FILE)?, read(KEY_FILE)?);
        if directory.join(OTHER_AUTHORITY_FILE).exists() {
            credentials.other_authority = Some(read(OTHER_AUTHORITY_FILE)?.into());
        }
        if credentials.identity().is_none() {
            let reason = format!("{CERTIFICATE_FILE} names no role and name");
            return Err(IdentityError::Damaged { directory: directory.to_owned(), reason });
        }
        Ok(credentials)
    }

    /// Whether a directory keeps some.
    pub fn exist(directory: &Path) -> bool {
        [AUTHORITY_FILE, CERTIFICATE_FILE, KEY_FILE].iter().all(|name| directory.join(name).is_file())
    }

    /// Keeps them in a directory, which only its owner can look into. The certificate is written last: with it they are whole.
    ///
    /// # Errors
    /// [`IdentityError`].
    pub fn save(&self, directory: &Path) -> Result<(), IdentityError> {
        let write = || {
            files::private_directory(directory)?;
            files::replace(&directory.join(KEY_FILE), &self.key)?;
            files::replace(&directory.join(AUTHORITY_FILE), &self.authority)?;
            let other = directory.join(OTHER_AUTHORITY_FILE);
            match &self.other_authority {
                Some(authority) => files::replace(&other, authority)?,
                None => files::remove(&other)?,
            }
            files::replace(&directory.join(CERTIFICATE_FILE), &self.certificate)
        };
        write().map_err(|source| IdentityError::Files { directory: directory.to_owned(), source })
    }

    /// Who they say that their owner is.
    pub fn identity(&self) -> Option<Identity> {
        identity_of(&self.certificate)
    }

    /// Those who are trusted.
    pub(crate) fn authorities(&self) -> impl Iterator<Item = &CertificateDer<'static>> {
        [&self.authority].into_iter().chain(&self.other_authority)
    }

    /// Which authority made them.
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(&self.authority)
    }

    pub(crate) fn key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.key.clone()))
    }
}

/// Whom a certificate names. It has to have been verified, or be one's own.
pub(crate) fn identity_of(certificate: &CertificateDer<'_>) -> Option<Identity> {
    let parsed = EndEntityCert::try_from(certificate).ok()?;
    let mut names = parsed.valid_dns_names();
    let only = names.next().filter(|_| names.next().is_none())?;
    Identity::of_dns_name(only)
}
