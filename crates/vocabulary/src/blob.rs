//! The name of a blob: the digest of its bytes.

use serde::de::{Error, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::str::FromStr;

/// Names bytes by their SHA-256, so that equal bytes have one name and `sha256sum` shows the same digits.
///
/// As text (and in JSON) it is `sha256:` and 64 lower-case hexadecimal digits, and nothing else is accepted; in binary
/// formats it is the 32 bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlobId(pub [u8; 32]);

/// What stands before the digits of a [`BlobId`].
const SCHEME: &str = "sha256:";

/// A text that is no [`BlobId`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("this is no blob id: write sha256: and 64 lower-case hexadecimal digits")]
pub struct UnknownBlobId;

impl BlobId {
    /// The 64 digits without what stands before them, as `sha256sum` prints them.
    pub fn hex(&self) -> String {
        let mut text = String::with_capacity(64);
        for byte in self.0 {
            text.push(char::from(b"0123456789abcdef"[usize::from(byte >> 4)]));
            text.push(char::from(b"0123456789abcdef"[usize::from(byte & 15)]));
        }
        text
    }

    /// Reads what [`hex`](BlobId::hex) writes.
    ///
    /// # Errors
    /// [`UnknownBlobId`] for anything else.
    pub fn from_hex(text: &str) -> Result<BlobId, UnknownBlobId> {
        let digit = |byte: u8| match byte {
            b'0'..=b'9' => Ok(byte - b'0'),
            b'a'..=b'f' => Ok(byte - b'a' + 10),
            _ => Err(UnknownBlobId),
        };
        let (pairs, []) = text.as_bytes().as_chunks::<2>() else { return Err(UnknownBlobId) };
        let pairs: &[[u8; 2]; 32] = pairs.try_into().map_err(|_| UnknownBlobId)?;
        let mut bytes = [0; 32];
        for (byte, [high, low]) in bytes.iter_mut().zip(pairs) {
            *byte = digit(*high)? << 4 | digit(*low)?;
        }
        Ok(BlobId(bytes))
    }
}

impl fmt::Display for BlobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}", self.hex())
    }
}

impl fmt::Debug for BlobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for BlobId {
    type Err = UnknownBlobId;

    fn from_str(text: &str) -> Result<BlobId, UnknownBlobId> {
        BlobId::from_hex(text.strip_prefix(SCHEME).ok_or(UnknownBlobId)?)
    }
}

impl Serialize for BlobId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            serializer.collect_str(self)
        } else {
            self.0.serialize(serializer)
        }
    }
}

impl<'de> Deserialize<'de> for BlobId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<BlobId, D::Error> {
        struct Text;
        impl Visitor<'_> for Text {
            type Value = BlobId;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("sha256: and 64 lower-case hexadecimal digits")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<BlobId, E> {
                text.parse().map_err(E::custom)
            }
        }
        if deserializer.is_human_readable() {
            deserializer.deserialize_str(Text)
        } else {
            <[u8; 32]>::deserialize(deserializer).map(BlobId)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blob_id_has_exactly_one_text() {
        let id = BlobId(std::array::from_fn(|i| u8::try_from(i * 8 + 3).unwrap_or(0)));
        let text = id.to_string();
        assert!(text.starts_with("sha256:030b131b"), "{text}");
        assert_eq!(text.parse(), Ok(id));
        assert_eq!(BlobId::from_hex(&id.hex()), Ok(id));
        for other in [
            String::new(),
            id.hex(),
            text.to_uppercase(),
            format!("sha256:{}", id.hex().to_uppercase()),
            format!("{text}0"),
            format!("{text}00"),
            text[..text.len() - 2].to_owned(),
            text.replace("sha256", "sha512"),
            format!(" {text}"),
            text.replacen('b', "é", 1),
        ] {
            assert_eq!(other.parse::<BlobId>(), Err(UnknownBlobId), "{other}");
        }
    }
}
