//! The cluster's own certificate authority: made on first use, used for nothing else.

use crate::credentials::{Credentials, Fingerprint};
use crate::files;
use crate::name::Identity;
use crate::request::{KeyPair, PublicKey};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyUsagePurpose, SanType,
};
use rustls::pki_types::CertificateDer;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use time::{Duration, OffsetDateTime};

const CERTIFICATE_FILE: &str = "ca.der";
const KEY_FILE: &str = "ca-key.der";
/// Clocks of machines may differ by as much.
const BACKDATED: Duration = Duration::DAY;
/// How long certificates are valid. They are renewed at each start of a node only, which may run for years.
const VALID: Duration = Duration::days(3650);

/// Why the authority cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// There is none.
    #[error("there is no certificate authority in {0}: `ashlar up --join-listen` makes one")]
    Missing(PathBuf),
    /// Its files cannot be read or written.
    #[error("cannot use the certificate authority in {directory}: {source}")]
    Files {
        /// Where.
        directory: PathBuf,
        /// The system's words.
        source: io::Error,
    },
    /// A certificate cannot be made.
    #[error("cannot make a certificate: {0}")]
    Issue(#[from] rcgen::Error),
}

/// The authority, with its key.
pub struct Authority {
    issuer: Issuer<'static, rcgen::KeyPair>,
    certificate: CertificateDer<'static>,
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Authority({})", self.fingerprint())
    }
}

impl Authority {
    /// The one in `directory`.
    ///
    /// # Errors
    /// [`AuthorityError`].
    pub fn open(directory: &Path) -> Result<Authority, AuthorityError> {
        let failed = |source| AuthorityError::Files { directory: directory.to_owned(), source };
        let certificate = match files::read(&directory.join(CERTIFICATE_FILE)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(AuthorityError::Missing(directory.to_owned()));
            }
            read => read.map_err(failed)?,
        };
        let key = files::read(&directory.join(KEY_FILE)).and_then(|bytes| KeyPair::of_pkcs8(&bytes));
        let issuer = Issuer::new(own_params(), key.map_err(failed)?.into_inner());
        Ok(Authority { issuer, certificate: certificate.into() })
    }

    /// The one in `directory`, which is made if there is none. One process at a time may call this for a directory.
    ///
    /// # Errors
    /// [`AuthorityError`].
    pub fn open_or_create(directory: &Path) -> Result<Authority, AuthorityError> {
        match Authority::open(directory) {
            Err(AuthorityError::Missing(_)) => {}
            opened => return opened,
        }
        let failed = |source| AuthorityError::Files { directory: directory.to_owned(), source };
        let key = KeyPair::generate().map_err(failed)?;
        let pkcs8 = key.pkcs8();
        let key = key.into_inner();
        let certificate = own_params().self_signed(&key)?;
        files::private_directory(directory)
            .and_then(|()| files::replace(&directory.join(KEY_FILE), &pkcs8))
            // With its certificate an authority is whole.
            .and_then(|()| files::replace(&directory.join(CERTIFICATE_FILE), certificate.der()))
            .map_err(failed)?;
        Ok(Authority { issuer: Issuer::new(own_params(), key), certificate: certificate.der().clone() })
    }

    /// Names the cluster.
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(&self.certificate)
    }

    /// Its certificate.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// A certificate that says that the owner of this key is `identity`.
    ///
    /// # Errors
    /// [`AuthorityError::Issue`].
    pub fn issue(
        &self,
        identity: &Identity,
        key: &PublicKey,
    ) -> Result<CertificateDer<'static>, AuthorityError> {
        let mut params = CertificateParams::default();
        params.distinguished_name = common_name(&identity.to_string());
        params.subject_alt_names = vec![SanType::DnsName(identity.dns_name().try_into()?)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        // Nodes connect to one another: everybody is a client and a server.
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        valid_from_now(&mut params);
        Ok(params.signed_by(key, &self.issuer)?.der().clone())
    }

    /// A new key with a certificate, for a process of this machine.
    ///
    /// # Errors
    /// [`AuthorityError`].
    pub fn credentials(&self, identity: &Identity) -> Result<Credentials, AuthorityError> {
        let key = KeyPair::generate().map_err(|_| rcgen::Error::RingUnspecified)?;
        let certificate = self.issue(identity, &key.public())?;
        Ok(Credentials::new(self.certificate.to_vec(), certificate.to_vec(), key.pkcs8()))
    }
}

fn own_params() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = common_name("ashlar cluster");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    valid_from_now(&mut params);
    params
}

fn valid_from_now(params: &mut CertificateParams) {
    let now = OffsetDateTime::now_utc();
    (params.not_before, params.not_after) = (now - BACKDATED, now + VALID);
}

fn common_name(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::name::Role;

    #[test]
    fn an_authority_is_made_once_and_its_key_belongs_to_its_owner_alone() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let directory = folder.path().join("state/ca");
        let error = Authority::open(&directory).unwrap_err();
        assert!(error.to_string().contains("--join-listen"), "{error}");
        let made = Authority::open_or_create(&directory).unwrap().fingerprint();
        assert_eq!(Authority::open_or_create(&directory).unwrap().fingerprint(), made);
        assert_eq!(Authority::open(&directory).unwrap().fingerprint(), made);
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&directory), mode(&directory.join(KEY_FILE))), (0o700, 0o600));
        let other = Authority::open_or_create(&folder.path().join("other")).unwrap();
        assert_ne!(other.fingerprint(), made);
    }

    #[test]
    fn credentials_are_kept_and_found_again() {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::open_or_create(&folder.path().join("ca")).unwrap();
        let identity = Identity::new(Role::Node, "a").unwrap();
        let directory = folder.path().join("identities/a");
        assert!(!Credentials::exist(&directory));
        authority.credentials(&identity).unwrap().save(&directory).unwrap();
        assert!(Credentials::exist(&directory));
        let found = Credentials::open(&directory).unwrap();
        assert_eq!(found.identity(), Some(identity));
        assert_eq!(found.fingerprint(), authority.fingerprint());
        // A key that was kept is the one of these credentials.
        let key = KeyPair::keep_in(&directory).unwrap();
        assert_eq!(key.pkcs8(), found.key().secret_der());
    }
}
