//! Signatures, version 4 (`AWS4-HMAC-SHA256`), as Amazon's reference describes them for S3.

use super::credentials::Credentials;
use super::time;
use ring::hmac;
use std::fmt::Write;
use std::time::SystemTime;

/// What is signed of a request.
pub(super) struct Signed<'a> {
    pub(super) method: &'a str,
    /// Encoded, as it stands in the request line.
    pub(super) path: &'a str,
    /// As [`query`] makes it.
    pub(super) query: &'a str,
    /// Names in lower case; in any order, with `host`, `x-amz-content-sha256` and `x-amz-date` among them.
    pub(super) headers: &'a [(String, String)],
    /// Of the body, hexadecimal.
    pub(super) body_digest: &'a str,
}

/// The `authorization` header.
pub(super) fn authorization(
    request: &Signed<'_>,
    credentials: &Credentials,
    region: &str,
    moment: SystemTime,
) -> String {
    let mut headers: Vec<_> =
        request.headers.iter().map(|(name, value)| (name.as_str(), value.trim())).collect();
    headers.sort_unstable();
    let names = headers.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(";");
    let lines = headers.iter().fold(String::new(), |mut lines, (name, value)| {
        let _ = writeln!(lines, "{name}:{value}");
        lines
    });
    let Signed { method, path, query, body_digest, .. } = request;
    let canonical = format!("{method}\n{path}\n{query}\n{lines}\n{names}\n{body_digest}");
    let stamp = time::stamp(moment);
    let day = &stamp[..8];
    let scope = format!("{day}/{region}/s3/aws4_request");
    let text = format!("AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{}", digest_hex(canonical.as_bytes()));
    let secret = format!("AWS4{}", credentials.secret_key);
    let key =
        [day, region, "s3", "aws4_request"].iter().fold(secret.into_bytes(), |key, part| mac(&key, part));
    let signature = hex(&mac(&key, &text));
    let access = &credentials.access_key;
    format!("AWS4-HMAC-SHA256 Credential={access}/{scope},SignedHeaders={names},Signature={signature}")
}

fn mac(key: &[u8], text: &str) -> Vec<u8> {
    hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), text.as_bytes()).as_ref().to_vec()
}

/// SHA-256, hexadecimal.
pub(super) fn digest_hex(bytes: &[u8]) -> String {
    hex(ring::digest::digest(&ring::digest::SHA256, bytes).as_ref())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Encodes everything but what never needs it; `/` is kept in paths.
pub(super) fn encode(text: &str, keep_slash: bool) -> String {
    text.bytes().fold(String::with_capacity(text.len()), |mut encoded, byte| {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) || (keep_slash && byte == b'/') {
            encoded.push(char::from(byte));
        } else {
            let _ = write!(encoded, "%{byte:02X}");
        }
        encoded
    })
}

/// A query as it is signed and sent: encoded and sorted.
pub(super) fn query(pairs: &[(String, String)]) -> String {
    let encoded = |(name, value): &(String, String)| (encode(name, false), encode(value, false));
    let mut pairs: Vec<_> = pairs.iter().map(encoded).collect();
    pairs.sort_unstable();
    pairs.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join("&")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, UNIX_EPOCH};

    /// The examples of Amazon's reference, "Signature Calculations for the Authorization Header".
    fn signature(
        method: &str,
        path: &str,
        pairs: &[(&str, &str)],
        extra: &[(&str, &str)],
        body: &[u8],
    ) -> String {
        let credentials =
            Credentials::new("AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", None)
                .expect("good");
        let moment = UNIX_EPOCH + Duration::from_secs(1_369_353_600);
        let body_digest = digest_hex(body);
        let own = |&(name, value): &(&str, &str)| (name.to_owned(), value.to_owned());
        let mut headers: Vec<_> = extra.iter().map(own).collect();
        headers.extend([
            ("x-amz-date".to_owned(), "20130524T000000Z".to_owned()),
            ("x-amz-content-sha256".to_owned(), body_digest.clone()),
            ("host".to_owned(), "examplebucket.s3.amazonaws.com".to_owned()),
        ]);
        let pairs: Vec<_> = pairs.iter().map(own).collect();
        let request = Signed {
            method,
            path: &encode(path, true),
            query: &query(&pairs),
            headers: &headers,
            body_digest: &body_digest,
        };
        let text = authorization(&request, &credentials, "us-east-1", moment);
        text.rsplit_once("Signature=").expect("a signature").1.to_owned()
    }

    #[test]
    fn signatures_are_those_of_the_reference() {
        assert_eq!(
            signature("GET", "/test.txt", &[], &[("range", "bytes=0-9")], b""),
            "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41"
        );
        assert_eq!(
            signature(
                "PUT",
                "/test$file.text",
                &[],
                &[("date", "Fri, 24 May 2013 00:00:00 GMT"), ("x-amz-storage-class", "REDUCED_REDUNDANCY")],
                b"Welcome to Amazon S3."
            ),
            "98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd"
        );
        assert_eq!(
            signature("GET", "/", &[("lifecycle", "")], &[], b""),
            "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543"
        );
        assert_eq!(
            signature("GET", "/", &[("prefix", "J"), ("max-keys", "2")], &[], b""),
            "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7"
        );
    }
}
