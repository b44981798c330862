//! Which bucket of which service.

use crate::blobs::error::BlobError;
use std::path::PathBuf;
use url::Url;

/// Where blobs lie in a service. Buckets are named in the path, which every service understands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct S3Address {
    /// The bucket.
    pub bucket: String,
    /// What every object's key starts with; empty, or without a slash at either end.
    pub prefix: String,
    /// `http://HOST[:PORT]` or `https://HOST[:PORT]`.
    pub endpoint: String,
    /// Part of every signature.
    pub region: String,
    /// A file with the certificates (PEM) to trust instead of the public ones.
    pub ca: Option<PathBuf>,
}

fn wrong(what: &str) -> BlobError {
    // The address is not repeated: somebody may have written a secret into it.
    BlobError::Address(what.into())
}

impl S3Address {
    /// Reads `s3://BUCKET[/PREFIX][?endpoint=…&region=…&ca=…]`. Without an endpoint it is Amazon's; without a region, that of
    /// `AWS_REGION`, or `us-east-1`.
    ///
    /// # Errors
    /// [`BlobError::Address`].
    pub fn parse(text: &str) -> Result<S3Address, BlobError> {
        let url = Url::parse(text).map_err(|_| wrong("the s3 address cannot be read"))?;
        if url.scheme() != "s3" {
            return Err(wrong("the address does not begin with s3://"));
        }
        if !url.username().is_empty() || url.password().is_some() || url.port().is_some() {
            return Err(wrong(
                "an s3 address holds no credentials and no port, they belong in the environment and in endpoint",
            ));
        }
        let (mut endpoint, mut region, mut ca) = (None, None, None);
        for (name, value) in url.query_pairs() {
            let value = value.into_owned();
            let slot = match &*name {
                "endpoint" => &mut endpoint,
                "region" => &mut region,
                "ca" => &mut ca,
                _ => return Err(wrong("the s3 address has an option other than endpoint, region and ca")),
            };
            if slot.replace(value).is_some() {
                return Err(wrong("the s3 address has an option twice"));
            }
        }
        let bucket = url.host_str().unwrap_or_default().to_owned();
        let usual = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b".-".contains(&byte);
        if !(3..=63).contains(&bucket.len()) || !bucket.bytes().all(usual) {
            return Err(wrong(
                "the bucket's name is not of 3 to 63 lower-case letters, digits, dots and hyphens",
            ));
        }
        let prefix = url.path().trim_matches('/').to_owned();
        let usual = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        let good = |part: &str| !matches!(part, "" | "." | "..") && part.bytes().all(usual);
        if prefix.len() > 512 || !(prefix.is_empty() || prefix.split('/').all(good)) {
            return Err(wrong("the prefix is not of letters, digits and ._- with / between"));
        }
        let region = region.or_else(|| std::env::var("AWS_REGION").ok().filter(|region| !region.is_empty()));
        let region = region.unwrap_or_else(|| "us-east-1".into());
        if !region.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-') || region.is_empty() {
            return Err(wrong("the region is not of letters, digits and hyphens"));
        }
        let endpoint = match endpoint {
            Some(endpoint) => read_endpoint(&endpoint)?,
            None => format!("https://s3.{region}.amazonaws.com"),
        };
        Ok(S3Address { bucket, prefix, endpoint, region, ca: ca.map(PathBuf::from) })
    }
}

fn read_endpoint(text: &str) -> Result<String, BlobError> {
    let url = Url::parse(text).map_err(|_| wrong("the endpoint cannot be read"))?;
    let bare = url.username().is_empty()
        && url.password().is_none()
        && url.path() == "/"
        && url.query().is_none()
        && url.fragment().is_none();
    if !matches!(url.scheme(), "http" | "https") || !bare {
        return Err(wrong("the endpoint is not http://HOST:PORT or https://HOST:PORT alone"));
    }
    Ok(url.origin().ascii_serialization())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read() {
        let address = S3Address::parse(
            "s3://my.bucket/a/b/?endpoint=http://127.0.0.1:9000/&region=eu-north-1&ca=/etc/ca.pem",
        );
        let address = address.expect("an address");
        assert_eq!(address.bucket, "my.bucket");
        assert_eq!(address.prefix, "a/b");
        assert_eq!(address.endpoint, "http://127.0.0.1:9000");
        assert_eq!(address.region, "eu-north-1");
        assert_eq!(address.ca, Some(PathBuf::from("/etc/ca.pem")));
        let address = S3Address::parse("s3://bucket?region=us-west-2").expect("an address");
        assert_eq!((address.prefix.as_str(), address.ca), ("", None));
        assert_eq!(address.endpoint, "https://s3.us-west-2.amazonaws.com");
    }

    #[test]
    fn wrong_addresses_are_refused_without_repeating_them() {
        for text in [
            "s3://",
            "s3://ab",
            "s3://UPPER_case",
            "s3://hidden-word:hidden-word@bucket/x",
            "s3://bucket:9000/x",
            "s3://bucket/a//b",
            "s3://bucket/a b",
            "s3://bucket/a%2f..%2fb",
            "s3://bucket?secret=hidden-word",
            "s3://bucket?region=a&region=b",
            "s3://bucket?region=a/b",
            "s3://bucket?endpoint=ftp://host",
            "s3://bucket?endpoint=http://hidden-word:x@host",
            "s3://bucket?endpoint=http://host/path",
            "s3://bucket?endpoint=host:9000",
            "http://bucket/x",
        ] {
            let error = S3Address::parse(text).expect_err(text);
            assert!(matches!(error, BlobError::Address(_)), "{text}: {error}");
            assert!(!error.to_string().contains("hidden-word"), "{error}");
        }
    }
}
