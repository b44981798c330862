//! API keys: what a client shows to be let in. The text is `ash_`, the key's id, `_`, and a secret of 256 random bits; who keeps a key
//! keeps its hash alone. The secret is not a password: it cannot be guessed however fast a hash is, so a plain one will do.

use ashlar_vocabulary::KeyId;
use ring::digest::{SHA256, digest};
use ring::rand::{SecureRandom, SystemRandom};
use std::fmt;
use std::io;
use std::str::FromStr;
use subtle::ConstantTimeEq;

const PREFIX: &str = "ash_";
const ID_CHARACTERS: usize = 16;
const SECRET_BYTES: usize = 32;
/// 256 bits in letters of five.
const SECRET_CHARACTERS: usize = 52;
/// No digit that looks like a letter, and nothing that a shell or a double click treats in its own way.
const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";

/// A key with its secret. Neither `Debug` nor `Display` shows it.
#[derive(Clone)]
pub struct ApiKey {
    id: KeyId,
    text: String,
}

/// Text that is no API key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "this is not an API key: a key is `{PREFIX}`, {ID_CHARACTERS} hexadecimal digits, `_` and {SECRET_CHARACTERS} letters and digits, as \
     `ashlar keys create` prints it"
)]
pub struct ApiKeyError;

impl ApiKey {
    /// A new one.
    ///
    /// # Errors
    /// If the system gives no random numbers.
    pub fn generate() -> io::Result<ApiKey> {
        let mut bytes = [0; 8 + SECRET_BYTES];
        SystemRandom::new()
            .fill(&mut bytes)
            .map_err(|_| io::Error::other("the system gives no random numbers"))?;
        let (id, secret) = bytes.split_at(8);
        let id = KeyId(id.iter().fold(0, |id, byte| id << 8 | u64::from(*byte)));
        let mut text = format!("{PREFIX}{id}_");
        // 5 bits each; the last letter has one that counts.
        let bit = |at: usize| secret.get(at / 8).map_or(0, |byte| byte >> (7 - at % 8) & 1);
        text.extend((0..SECRET_CHARACTERS).map(|letter| {
            let value = (0..5).fold(0, |value, offset| value << 1 | bit(5 * letter + offset));
            char::from(ALPHABET[usize::from(value) & 31])
        }));
        Ok(ApiKey { id, text })
    }

    /// Its name, which is no secret.
    pub fn id(&self) -> KeyId {
        self.id
    }

    /// What is kept of it.
    pub fn hash(&self) -> [u8; 32] {
        fingerprint(self.text.as_bytes())
    }

    /// Whether this is the hash of it. Takes as long whichever bits differ.
    pub fn is(&self, hash: &[u8; 32]) -> bool {
        self.hash().ct_eq(hash).into()
    }

    /// The key as it is given to people. Nothing else prints it.
    pub fn reveal(&self) -> &str {
        &self.text
    }
}

/// The SHA-256 of some bytes.
pub fn fingerprint(bytes: &[u8]) -> [u8; 32] {
    let mut hash = [0; 32];
    hash.copy_from_slice(digest(&SHA256, bytes).as_ref());
    hash
}

impl FromStr for ApiKey {
    type Err = ApiKeyError;

    fn from_str(text: &str) -> Result<ApiKey, ApiKeyError> {
        let text = text.trim();
        let rest = text.strip_prefix(PREFIX).ok_or(ApiKeyError)?;
        let (id, secret) = rest.split_once('_').ok_or(ApiKeyError)?;
        let is_digit = |digit: u8| digit.is_ascii_digit() || (b'a'..=b'f').contains(&digit);
        let well_formed = id.len() == ID_CHARACTERS
            && id.bytes().all(is_digit)
            && secret.len() == SECRET_CHARACTERS
            && secret.bytes().all(|letter| ALPHABET.contains(&letter));
        if !well_formed {
            return Err(ApiKeyError);
        }
        let id = id.parse().map_err(|_| ApiKeyError)?;
        Ok(ApiKey { id, text: text.to_owned() })
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ApiKey({})", self.id)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_key_is_known_by_its_text_alone_and_shows_its_secret_nowhere_else() {
        let key = ApiKey::generate().unwrap();
        let same: ApiKey = format!("  {}\n", key.reveal()).parse().unwrap();
        assert_eq!((same.id(), same.hash()), (key.id(), key.hash()));
        assert!(same.is(&key.hash()));
        let other = ApiKey::generate().unwrap();
        assert!(!other.is(&key.hash()));
        let secret = key.reveal().rsplit('_').next().unwrap();
        assert!(!format!("{key:?}").contains(secret));
    }

    #[test]
    fn every_other_text_is_refused() {
        let text = ApiKey::generate().unwrap().reveal().to_owned();
        let wrong = [
            String::new(),
            "sk-anything".into(),
            text[..text.len() - 1].into(),
            format!("{text}a"),
            text.to_uppercase(),
            text.replace("ash_", "ash-"),
            format!("{}é", &text[..text.len() - 1]),
            text.replacen('_', "__", 2),
        ];
        for text in wrong {
            assert!(text.parse::<ApiKey>().is_err(), "{text}");
        }
    }

    #[test]
    fn secrets_use_all_their_letters() {
        let mut seen = [false; 32];
        for _ in 0..40 {
            let key = ApiKey::generate().unwrap();
            let secret = key.reveal().rsplit('_').next().unwrap().to_owned();
            // The last letter has one bit.
            for letter in &secret.as_bytes()[..SECRET_CHARACTERS - 1] {
                seen[ALPHABET.iter().position(|known| known == letter).unwrap()] = true;
            }
        }
        assert_eq!(seen, [true; 32]);
    }
}
