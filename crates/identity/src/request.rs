//! What a machine sends that wants a certificate: its name and public key, signed by the private key, which stays where it was made.

use crate::credentials::{Fingerprint, IdentityError};
use crate::files;
use crate::name::{Identity, NameError, Role};
use rcgen::{PKCS_ECDSA_P256_SHA256, PublicKeyData, SignatureAlgorithm, SigningKey};
use ring::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};
use serde::{Deserialize, Serialize};
use std::io;
use std::path::Path;

/// Bytes of a public key: an uncompressed point of P-256.
pub const PUBLIC_KEY_BYTES: usize = 65;
const KEY_FILE: &str = "key.der";
/// So that a signature that was made for this is of no use elsewhere.
const CONTEXT: &[u8] = b"ashlar certificate request 1\0";

/// A key pair on P-256.
pub struct KeyPair(rcgen::KeyPair);

impl std::fmt::Debug for KeyPair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("KeyPair")
    }
}

impl KeyPair {
    /// A new one.
    ///
    /// # Errors
    /// If the system gives no random numbers.
    pub fn generate() -> io::Result<KeyPair> {
        rcgen::KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map(KeyPair).map_err(io::Error::other)
    }

    /// From PKCS #8.
    pub(crate) fn of_pkcs8(bytes: &[u8]) -> io::Result<KeyPair> {
        let key = rustls::pki_types::PrivatePkcs8KeyDer::from(bytes);
        let pair = rcgen::KeyPair::from_pkcs8_der_and_sign_algo(&key, &PKCS_ECDSA_P256_SHA256);
        pair.map(KeyPair).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
    }

    /// The one that is kept in a directory of credentials; made, and durable, if there is none. So that an enrolment whose answer
    /// was lost can be repeated with the same key.
    ///
    /// # Errors
    /// [`IdentityError`].
    pub fn keep_in(directory: &Path) -> Result<KeyPair, IdentityError> {
        let path = directory.join(KEY_FILE);
        let keep = || {
            files::private_directory(directory)?;
            match files::read(&path) {
                Ok(bytes) => KeyPair::of_pkcs8(&bytes),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    let pair = KeyPair::generate()?;
                    files::replace(&path, &pair.pkcs8())?;
                    Ok(pair)
                }
                Err(error) => Err(error),
            }
        };
        keep().map_err(|source| IdentityError::Files { directory: directory.to_owned(), source })
    }

    /// As PKCS #8.
    pub fn pkcs8(&self) -> Vec<u8> {
        self.0.serialize_der()
    }

    /// Its public half.
    pub fn public(&self) -> PublicKey {
        PublicKey(self.0.der_bytes().to_vec())
    }

    pub(crate) fn into_inner(self) -> rcgen::KeyPair {
        self.0
    }
}

/// A public key, as an uncompressed point of P-256.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublicKey(Vec<u8>);

impl PublicKey {
    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl PublicKeyData for PublicKey {
    fn der_bytes(&self) -> &[u8] {
        &self.0
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &PKCS_ECDSA_P256_SHA256
    }
}

/// A request for a certificate as a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CertificateRequest {
    name: String,
    public_key: Vec<u8>,
    signature: Vec<u8>,
}

/// Why a request is refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// No name.
    #[error(transparent)]
    Name(#[from] NameError),
    /// Its key is not on the curve, or it was not signed with it for this cluster.
    #[error("the certificate request is not signed by its own key for this cluster")]
    Signature,
}

impl CertificateRequest {
    /// For the node `name` of the cluster `cluster`.
    ///
    /// # Errors
    /// If the key cannot sign.
    pub fn sign(name: &str, key: &KeyPair, cluster: Fingerprint) -> io::Result<CertificateRequest> {
        let public_key = key.public().0;
        let signature = key.0.sign(&message(name, &public_key, cluster)).map_err(io::Error::other)?;
        Ok(CertificateRequest { name: name.to_owned(), public_key, signature })
    }

    /// Whom it is for, and which key; only if it was signed with that key, for the cluster `cluster`.
    ///
    /// # Errors
    /// [`RequestError`].
    pub fn check(&self, cluster: Fingerprint) -> Result<(Identity, PublicKey), RequestError> {
        let identity = Identity::new(Role::Node, &self.name)?;
        if self.public_key.len() != PUBLIC_KEY_BYTES {
            return Err(RequestError::Signature);
        }
        let message = message(&self.name, &self.public_key, cluster);
        UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, &self.public_key)
            .verify(&message, &self.signature)
            .map_err(|_| RequestError::Signature)?;
        Ok((identity, PublicKey(self.public_key.clone())))
    }
}

fn message(name: &str, public_key: &[u8], cluster: Fingerprint) -> Vec<u8> {
    // Everything before the name has a fixed length.
    [CONTEXT, &cluster.0, public_key, name.as_bytes()].concat()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_request_holds_for_its_name_its_key_and_its_cluster_alone() {
        let (ours, theirs) = (Fingerprint([1; 32]), Fingerprint([2; 32]));
        let key = KeyPair::generate().unwrap();
        let request = CertificateRequest::sign("a", &key, ours).unwrap();
        assert_eq!(request.check(ours).unwrap(), (Identity::new(Role::Node, "a").unwrap(), key.public()));
        assert_eq!(request.check(theirs).unwrap_err(), RequestError::Signature);
        let renamed = CertificateRequest { name: "b".into(), ..request.clone() };
        assert_eq!(renamed.check(ours).unwrap_err(), RequestError::Signature);
        let other_key = KeyPair::generate().unwrap().public().0;
        let stolen = CertificateRequest { public_key: other_key, ..request.clone() };
        assert_eq!(stolen.check(ours).unwrap_err(), RequestError::Signature);
        let short = CertificateRequest { public_key: vec![4; 12], ..request.clone() };
        assert_eq!(short.check(ours).unwrap_err(), RequestError::Signature);
        let nameless = CertificateRequest { name: "../a".into(), ..request };
        assert!(matches!(nameless.check(ours), Err(RequestError::Name(_))));
    }

    #[test]
    fn a_kept_key_stays_the_same_and_belongs_to_its_owner_alone() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let directory = folder.path().join("identity");
        let first = KeyPair::keep_in(&directory).unwrap().public();
        assert_eq!(KeyPair::keep_in(&directory).unwrap().public(), first);
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&directory), mode(&directory.join(KEY_FILE))), (0o700, 0o600));
    }
}
