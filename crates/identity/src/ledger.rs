//! Which tokens there are, which have been used, and which names are taken: small files beside the authority's key, so that
//! whichever process has the key can go by them.
//!
//! A token's file holds the hash of its secret. A token is used by making a second file, which only one process can make, once;
//! it is durable before a certificate is handed out. It names the key that the certificate is for: whoever has lost the answer may ask
//! again with the same key, and gets it again.

use crate::credentials::Fingerprint;
use crate::files;
use crate::name::Identity;
use crate::request::PublicKey;
use crate::token::{SECRET_BYTES, Token};
use ring::digest::{SHA256, digest};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use subtle::ConstantTimeEq;

/// Tokens at a time: used and expired ones count until they are forgotten.
pub const TOKENS_MAX: usize = 4096;
/// How long a token that has expired is still known, so that whoever tries it hears why it does not hold.
const REMEMBERED: Duration = Duration::from_secs(7 * 24 * 60 * 60);
const TOKENS: &str = "tokens";
const NAMES: &str = "names";
const LOCK: &str = "ledger.lock";

/// Why a token does not let anybody in.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// Nobody has made it.
    #[error("nobody knows this token: make one with `ashlar token create`, and use it within its time")]
    Unknown,
    /// It is too old.
    #[error("the token has expired: make another one with `ashlar token create`")]
    Expired,
    /// Another machine has used it.
    #[error(
        "the token has been used already: every machine needs one of its own, from `ashlar token create`"
    )]
    Used,
    /// It holds for another name.
    #[error("the token is for the node `{0}`: give it --name {0}")]
    OtherName(String),
    /// A machine of this name has enrolled.
    #[error(
        "the name `{0}` is taken by another machine: choose one with --name NAME, or, if `{0}` is gone for good, let this machine \
         take its place with a token from `ashlar token create --name {0}`"
    )]
    NameTaken(String),
    /// It has not enrolled, or not with this key.
    #[error(
        "no machine has enrolled as `{0}` with this key: another one has taken the name, or the cluster was made anew; join with a token \
         and an empty --state directory"
    )]
    NotEnrolled(String),
    /// There are too many.
    #[error("there are {TOKENS_MAX} tokens: wait until some have expired")]
    Full,
    /// The files cannot be read or written.
    #[error("cannot use the tokens in {directory}: {source}")]
    Files {
        /// Where.
        directory: PathBuf,
        /// The system's words.
        source: io::Error,
    },
}

/// What somebody shows who wants a certificate.
#[derive(Debug, Clone, Copy)]
pub struct Claim<'a> {
    /// The secret of a token.
    pub secret: &'a [u8],
    /// Who wants to be whom.
    pub identity: &'a Identity,
    /// With which key.
    pub key: &'a PublicKey,
}

/// The tokens and names of an authority.
#[derive(Debug)]
pub struct Ledger {
    directory: PathBuf,
}

#[derive(Serialize, Deserialize)]
struct Issued {
    /// Of the secret. It is random enough for a plain hash.
    hash: [u8; 32],
    expires_unix_s: u64,
    /// The only name that it holds for; it may replace whoever has that name.
    name: Option<String>,
}

#[derive(PartialEq, Serialize, Deserialize)]
struct Use {
    name: String,
    key: [u8; 32],
}

#[derive(PartialEq, Serialize, Deserialize)]
struct Holder {
    key: [u8; 32],
}

impl Ledger {
    /// The ledger beside the authority in `directory`.
    pub fn of(directory: &Path) -> Ledger {
        Ledger { directory: directory.to_owned() }
    }

    /// Makes a token that holds once, for `valid`; with a name only for that, even if it is taken.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub fn create(
        &self,
        cluster: Fingerprint,
        valid: Duration,
        name: Option<&Identity>,
        now: SystemTime,
    ) -> Result<Token, LedgerError> {
        self.locked(|| {
            self.forget_old(now)?;
            if self.issued()?.len() >= TOKENS_MAX {
                return Err(LedgerError::Full);
            }
            let token = Token::generate(cluster).map_err(|error| self.failed(error))?;
            let issued = Issued {
                hash: sha256(token.secret()),
                expires_unix_s: unix_s(now).saturating_add(valid.as_secs()),
                name: name.map(|identity| identity.name().to_owned()),
            };
            // Named after a random number of its own: the name of a file says nothing about the secret.
            let id = Token::generate(cluster).map_err(|error| self.failed(error))?;
            let id = hex(&id.secret()[..8]);
            self.write_new(&self.tokens().join(format!("{id}.json")), &issued)?;
            Ok(token)
        })
    }

    /// Uses a token, for a machine's key and name. Durable when it returns: the certificate may be handed out then.
    ///
    /// # Errors
    /// [`LedgerError`]; the token then still holds, if it did.
    pub fn claim(&self, claim: Claim<'_>, now: SystemTime) -> Result<(), LedgerError> {
        self.locked(|| {
            let (path, issued) = self.find(claim.secret)?.ok_or(LedgerError::Unknown)?;
            let name = claim.identity.name().to_owned();
            let wanted = Use { name: name.clone(), key: sha256(claim.key.bytes()) };
            let used_path = path.with_extension("used");
            let used = self.read::<Use>(&used_path)?;
            if used.as_ref().is_some_and(|used| *used != wanted) {
                return Err(LedgerError::Used);
            }
            if unix_s(now) >= issued.expires_unix_s {
                return Err(LedgerError::Expired);
            }
            if let Some(only) = issued.name.as_ref().filter(|only| **only != name) {
                return Err(LedgerError::OtherName(only.clone()));
            }
            let holder = Holder { key: wanted.key };
            let name_path = self.names().join(&name);
            let taken = self.read::<Holder>(&name_path)?.is_some_and(|other| other != holder);
            if taken && issued.name.is_none() {
                return Err(LedgerError::NameTaken(name));
            }
            if used.is_none() {
                self.write_new(&used_path, &wanted)?;
            }
            self.replace(&name_path, &holder)
        })
    }

    /// Whether a machine has enrolled under this name with this key, and no other has taken its place.
    ///
    /// # Errors
    /// [`LedgerError::NotEnrolled`], or [`LedgerError::Files`].
    pub fn confirm(&self, identity: &Identity, key: &PublicKey) -> Result<(), LedgerError> {
        let wanted = Holder { key: sha256(key.bytes()) };
        match self.read::<Holder>(&self.names().join(identity.name()))? {
            Some(holder) if holder == wanted => Ok(()),
            _ => Err(LedgerError::NotEnrolled(identity.name().to_owned())),
        }
    }

    /// Takes a name for a process of the cluster's own machine, whoever had it.
    ///
    /// # Errors
    /// [`LedgerError::Files`].
    pub fn reserve(&self, identity: &Identity) -> Result<(), LedgerError> {
        self.locked(|| {
            let path = self.names().join(identity.name());
            // No key has this hash.
            self.replace(&path, &Holder { key: [0; 32] })
        })
    }

    fn tokens(&self) -> PathBuf {
        self.directory.join(TOKENS)
    }

    fn names(&self) -> PathBuf {
        self.directory.join(NAMES)
    }

    /// The token of a secret. Every token is looked at, each for as long: how long it takes says nothing about their hashes.
    fn find(&self, secret: &[u8]) -> Result<Option<(PathBuf, Issued)>, LedgerError> {
        if secret.len() != SECRET_BYTES {
            return Ok(None);
        }
        let hash = sha256(secret);
        let mut found = None;
        for path in self.issued()? {
            let Some(issued) = self.read::<Issued>(&path)? else { continue };
            if bool::from(issued.hash.ct_eq(&hash)) {
                found = Some((path, issued));
            }
        }
        Ok(found)
    }

    fn issued(&self) -> Result<Vec<PathBuf>, LedgerError> {
        let list = || -> io::Result<Vec<PathBuf>> {
            let entries = fs::read_dir(self.tokens())?.map(|entry| entry.map(|entry| entry.path()));
            let paths = entries.collect::<io::Result<Vec<_>>>()?;
            Ok(paths.into_iter().filter(|path| path.extension().is_some_and(|is| is == "json")).collect())
        };
        list().map_err(|error| self.failed(error))
    }

    fn forget_old(&self, now: SystemTime) -> Result<(), LedgerError> {
        for path in self.issued()? {
            let Some(issued) = self.read::<Issued>(&path)? else { continue };
            if unix_s(now) >= issued.expires_unix_s.saturating_add(REMEMBERED.as_secs()) {
                // The token first: its use must not be forgotten before it.
                let gone = fs::remove_file(&path).and_then(|()| {
                    match fs::remove_file(path.with_extension("used")) {
                        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                        _ => Ok(()),
                    }
                });
                gone.map_err(|error| self.failed(error))?;
            }
        }
        Ok(())
    }

    /// One process at a time, whatever it does here.
    fn locked<T>(&self, act: impl FnOnce() -> Result<T, LedgerError>) -> Result<T, LedgerError> {
        let lock = || -> io::Result<File> {
            files::private_directory(&self.directory)?;
            files::private_directory(&self.tokens())?;
            files::private_directory(&self.names())?;
            let file =
                File::options().create(true).truncate(false).write(true).open(self.directory.join(LOCK))?;
            file.lock()?;
            Ok(file)
        };
        let _held = lock().map_err(|error| self.failed(error))?;
        act()
    }

    fn read<T: DeserializeOwned>(&self, path: &Path) -> Result<Option<T>, LedgerError> {
        let parse = |bytes: Vec<u8>| {
            serde_json::from_slice(&bytes).map_err(|error| {
                io::Error::new(io::ErrorKind::InvalidData, format!("{}: {error}", path.display()))
            })
        };
        match files::read(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            read => read.and_then(parse).map(Some).map_err(|error| self.failed(error)),
        }
    }

    fn write_new(&self, path: &Path, value: &impl Serialize) -> Result<(), LedgerError> {
        let bytes = serde_json::to_vec(value).map_err(io::Error::other);
        bytes.and_then(|bytes| files::create(path, &bytes)).map_err(|error| self.failed(error))
    }

    fn replace(&self, path: &Path, value: &impl Serialize) -> Result<(), LedgerError> {
        let bytes = serde_json::to_vec(value).map_err(io::Error::other);
        bytes.and_then(|bytes| files::replace(path, &bytes)).map_err(|error| self.failed(error))
    }

    fn failed(&self, source: io::Error) -> LedgerError {
        LedgerError::Files { directory: self.directory.clone(), source }
    }
}

fn unix_s(at: SystemTime) -> u64 {
    at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut hash = [0; 32];
    hash.copy_from_slice(digest(&SHA256, bytes).as_ref());
    hash
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::name::Role;
    use crate::request::KeyPair;

    const HOUR: Duration = Duration::from_secs(3600);

    struct World {
        folder: tempfile::TempDir,
        now: SystemTime,
    }

    impl World {
        fn new() -> World {
            World { folder: tempfile::tempdir().unwrap(), now: SystemTime::now() }
        }

        /// As another process would open it: nothing is kept in memory.
        fn ledger(&self) -> Ledger {
            Ledger::of(&self.folder.path().join("ca"))
        }

        fn token(&self, name: Option<&Identity>) -> Token {
            self.ledger().create(Fingerprint([1; 32]), HOUR, name, self.now).unwrap()
        }

        fn claim(&self, token: &Token, identity: &Identity, key: &KeyPair) -> Result<(), LedgerError> {
            let key = key.public();
            self.ledger().claim(Claim { secret: token.secret(), identity, key: &key }, self.now)
        }
    }

    fn node(name: &str) -> Identity {
        Identity::new(Role::Node, name).unwrap()
    }

    #[test]
    fn a_token_holds_once_and_a_lost_answer_can_be_asked_for_again() {
        let world = World::new();
        let (token, other) = (world.token(None), world.token(None));
        let (key, stranger) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
        world.claim(&token, &node("a"), &key).unwrap();
        world.claim(&token, &node("a"), &key).unwrap();
        assert!(matches!(world.claim(&token, &node("a"), &stranger), Err(LedgerError::Used)));
        assert!(matches!(world.claim(&token, &node("b"), &key), Err(LedgerError::Used)));
        world.claim(&other, &node("b"), &stranger).unwrap();
    }

    #[test]
    fn unknown_and_expired_tokens_are_told_apart_and_old_ones_are_forgotten() {
        let mut world = World::new();
        let key = KeyPair::generate().unwrap();
        let token = world.token(None);
        let unknown = Token::generate(Fingerprint([1; 32])).unwrap();
        assert!(matches!(world.claim(&unknown, &node("a"), &key), Err(LedgerError::Unknown)));
        let short = Claim { secret: &[1; 3], identity: &node("a"), key: &key.public() };
        assert!(matches!(world.ledger().claim(short, world.now), Err(LedgerError::Unknown)));
        world.now += HOUR;
        assert!(matches!(world.claim(&token, &node("a"), &key), Err(LedgerError::Expired)));
        world.now += REMEMBERED;
        let _ = world.token(None);
        assert!(matches!(world.claim(&token, &node("a"), &key), Err(LedgerError::Unknown)));
    }

    #[test]
    fn a_taken_name_is_refused_and_leaves_the_token_unused_unless_it_is_for_that_name() {
        let world = World::new();
        let (first, second) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
        world.ledger().reserve(&node("node-0")).unwrap();
        world.claim(&world.token(None), &node("a"), &first).unwrap();
        let token = world.token(None);
        for name in ["a", "node-0"] {
            let error = world.claim(&token, &node(name), &second).unwrap_err();
            assert!(matches!(&error, LedgerError::NameTaken(taken) if taken == name), "{error}");
        }
        world.claim(&token, &node("b"), &second).unwrap();
        let replacing = world.token(Some(&node("a")));
        assert!(matches!(world.claim(&replacing, &node("c"), &second), Err(LedgerError::OtherName(_))));
        let confirm = |key: &KeyPair| world.ledger().confirm(&node("a"), &key.public());
        confirm(&first).unwrap();
        world.claim(&replacing, &node("a"), &second).unwrap();
        confirm(&second).unwrap();
        assert!(matches!(confirm(&first), Err(LedgerError::NotEnrolled(_))));
        assert!(world.ledger().confirm(&node("nobody"), &first.public()).is_err());
    }

    #[test]
    fn no_secret_is_on_the_disk_and_nobody_else_can_read_what_is() {
        use std::os::unix::fs::PermissionsExt;
        let world = World::new();
        let token = world.token(None);
        let files = world.ledger().issued().unwrap();
        let [file] = files.as_slice() else { panic!("{files:?}") };
        let text = fs::read_to_string(file).unwrap();
        let listed = token.secret().map(|byte| byte.to_string()).join(",");
        assert!(!text.contains(&listed) && !text.contains(&token.reveal()[7..30]), "{text}");
        assert_eq!(fs::metadata(file).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn of_many_machines_with_one_token_one_gets_in() {
        let world = World::new();
        let token = world.token(None);
        let enrolled: usize = std::thread::scope(|scope| {
            let tries: Vec<_> = (0..8)
                .map(|number| {
                    let (world, token) = (&world, &token);
                    scope.spawn(move || {
                        let key = KeyPair::generate().unwrap();
                        usize::from(world.claim(token, &node(&format!("n{number}")), &key).is_ok())
                    })
                })
                .collect();
            tries.into_iter().map(|tried| tried.join().unwrap()).sum()
        });
        assert_eq!(enrolled, 1);
    }
}
