//! What lets a machine enrol: a secret that holds once, and the fingerprint of the cluster that it is for. The fingerprint lets the
//! machine know the cluster before it says anything; the checksum tells a token that was cut off from one of another cluster.

use crate::credentials::Fingerprint;
use ring::digest::{SHA256, digest};
use ring::rand::{SecureRandom, SystemRandom};
use std::fmt;
use std::io;
use std::str::FromStr;

/// Bytes of the secret: 160 random bits.
pub const SECRET_BYTES: usize = 20;
const CHECKSUM_BYTES: usize = 3;
const FINGERPRINT_BYTES: usize = 32;
const BYTES: usize = SECRET_BYTES + FINGERPRINT_BYTES + CHECKSUM_BYTES;
const CHARACTERS: usize = BYTES * 8 / 5;
/// No digit that looks like a letter, and nothing that a shell or a double click treats in its own way.
const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
const PREFIX: &str = "ashlar1";

/// A token.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    secret: [u8; SECRET_BYTES],
    cluster: Fingerprint,
}

/// Text that is no token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// It looks otherwise.
    #[error(
        "this is not a token: a token is `{PREFIX}` and {CHARACTERS} letters and digits, as `ashlar token create` prints it"
    )]
    Form,
    /// A letter of it is another one.
    #[error("the token is mistyped or was cut off: copy all of it")]
    Checksum,
}

impl Token {
    /// A new one for a cluster.
    ///
    /// # Errors
    /// If the system gives no random numbers.
    pub fn generate(cluster: Fingerprint) -> io::Result<Token> {
        let mut secret = [0; SECRET_BYTES];
        SystemRandom::new()
            .fill(&mut secret)
            .map_err(|_| io::Error::other("the system gives no random numbers"))?;
        Ok(Token { secret, cluster })
    }

    /// For which cluster it is.
    pub fn cluster(&self) -> Fingerprint {
        self.cluster
    }

    /// What only its holder knows.
    pub fn secret(&self) -> &[u8; SECRET_BYTES] {
        &self.secret
    }

    /// The token as it is given to people. Nothing else prints it.
    pub fn reveal(&self) -> String {
        let mut bytes = Vec::with_capacity(BYTES);
        bytes.extend_from_slice(&self.secret);
        bytes.extend_from_slice(&self.cluster.0);
        bytes.extend_from_slice(&checksum(&bytes));
        let mut text = PREFIX.to_owned();
        for group in bytes.chunks(5) {
            let bits = group.iter().fold(0_u64, |bits, byte| bits << 8 | u64::from(*byte));
            text.extend((0..8).rev().map(|at| char::from(ALPHABET[(bits >> (5 * at)) as usize & 31])));
        }
        text
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token(for {})", self.cluster)
    }
}

impl FromStr for Token {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Token, TokenError> {
        let letters = text.trim().strip_prefix(PREFIX).ok_or(TokenError::Form)?.as_bytes();
        let digit = |letter: &u8| ALPHABET.iter().position(|known| known == letter);
        if letters.iter().any(|letter| digit(letter).is_none()) || letters.len() > 2 * CHARACTERS {
            return Err(TokenError::Form);
        }
        if letters.len() != CHARACTERS {
            return Err(TokenError::Checksum);
        }
        let mut bytes = Vec::with_capacity(BYTES);
        for group in letters.chunks(8) {
            let bits = group.iter().filter_map(digit).fold(0_u64, |bits, digit| bits << 5 | digit as u64);
            bytes.extend_from_slice(&bits.to_be_bytes()[3..]);
        }
        let (content, check) = bytes.split_at(BYTES - CHECKSUM_BYTES);
        if check != checksum(content) {
            return Err(TokenError::Checksum);
        }
        let (mut secret, mut cluster) = ([0; SECRET_BYTES], [0; FINGERPRINT_BYTES]);
        secret.copy_from_slice(&content[..SECRET_BYTES]);
        cluster.copy_from_slice(&content[SECRET_BYTES..]);
        Ok(Token { secret, cluster: Fingerprint(cluster) })
    }
}

/// Against mistakes, not against anybody.
fn checksum(content: &[u8]) -> [u8; CHECKSUM_BYTES] {
    let digest = digest(&SHA256, content);
    let mut checksum = [0; CHECKSUM_BYTES];
    checksum.copy_from_slice(&digest.as_ref()[..CHECKSUM_BYTES]);
    checksum
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_token_comes_back_from_its_text_and_no_two_are_alike() {
        let cluster = Fingerprint([7; 32]);
        let token = Token::generate(cluster).unwrap();
        let text = token.reveal();
        assert_eq!(format!(" {text}\n").parse::<Token>().unwrap(), token);
        assert_ne!(Token::generate(cluster).unwrap(), token);
        assert!(!format!("{token:?}").contains(&text[7..20]), "a secret in a message");
    }

    #[test]
    fn a_token_that_was_cut_off_or_mistyped_is_told_from_what_is_none() {
        let text = Token::generate(Fingerprint([7; 32])).unwrap().reveal();
        assert_eq!(text[..text.len() - 1].parse::<Token>(), Err(TokenError::Checksum));
        let other = if text.ends_with('a') { "b" } else { "a" };
        let mistyped = format!("{}{other}", &text[..text.len() - 1]);
        assert_eq!(mistyped.parse::<Token>(), Err(TokenError::Checksum));
        for none in ["", "hello", "ashlar1!", "ashlar2abc"] {
            assert_eq!(none.parse::<Token>(), Err(TokenError::Form), "{none}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_a_token_or_an_error(text in "(ashlar1)?[a-z2-7é]{0,100}") {
            let _ = text.parse::<Token>();
        }
    }
}
