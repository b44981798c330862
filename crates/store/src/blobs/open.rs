//! A blob store from its address.

use super::directory::Directory;
use super::error::BlobError;
use super::s3::{Credentials, S3, S3Address};
use super::store::{BlobOptions, Blobs};
use std::path::Path;

/// Opens a directory (a plain path or `file:///DIRECTORY`) or a bucket of an S3-compatible service
/// (`s3://BUCKET/PREFIX?endpoint=http://HOST:PORT&region=NAME&ca=PEM_FILE`, all of the query optional), with the credentials that
/// [`Credentials::find`] finds.
///
/// # Errors
/// [`BlobError::Address`] for anything else and for missing credentials; [`BlobError::Disk`] for a directory that cannot be
/// used. A service is not spoken to yet.
pub async fn open(address: &str, options: &BlobOptions) -> Result<Blobs, BlobError> {
    if options.attempts == 0 || options.part_bytes == 0 || options.copy_bytes == 0 {
        return Err(BlobError::Invalid("attempts, part_bytes and copy_bytes are at least 1".into()));
    }
    if address.starts_with("s3://") {
        let place = S3Address::parse(address)?;
        return open_s3(&place, Credentials::find().await?, options);
    }
    let path = match address.strip_prefix("file://") {
        Some(_) => {
            let url = url::Url::parse(address).ok();
            url.and_then(|url| url.to_file_path().ok()).ok_or_else(|| {
                BlobError::Address("the file address is not that of an absolute path".into())
            })?
        }
        // The address itself may hold a secret, so it is not repeated.
        None if address.is_empty() || address.contains("://") => {
            return Err(BlobError::Address("the blob store's address has no known scheme".into()));
        }
        None => Path::new(address).to_owned(),
    };
    Ok(Blobs::new(Directory::open(&path, options).await?, options))
}

/// Opens a bucket with given credentials.
///
/// # Errors
/// [`BlobError::Address`] if the certificates that it names cannot be read.
pub fn open_s3(
    address: &S3Address,
    credentials: Credentials,
    options: &BlobOptions,
) -> Result<Blobs, BlobError> {
    Ok(Blobs::new(S3::new(address, credentials, options)?, options))
}
