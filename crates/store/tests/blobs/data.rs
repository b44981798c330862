//! Bytes to store.

use ashlar_store::blobs::{BlobError, BlobInfo, Blobs};

/// Bytes that repeat nowhere, the same for the same seed.
pub(crate) fn bytes(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// SHA-256 as `sha256sum` prints it.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    let digest = ring::digest::digest(&ring::digest::SHA256, bytes);
    digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Writes in pieces of these lengths, over and over.
pub(crate) async fn put_in_pieces(
    blobs: &Blobs,
    bytes: &[u8],
    lengths: &[usize],
) -> Result<BlobInfo, BlobError> {
    let mut writer = blobs.writer();
    let (mut rest, mut turn) = (bytes, 0);
    while !rest.is_empty() {
        let length = lengths[turn % lengths.len()].clamp(1, rest.len());
        writer.write(&rest[..length]).await?;
        rest = &rest[length..];
        turn += 1;
    }
    assert_eq!(writer.bytes(), bytes.len() as u64);
    writer.finish().await
}

/// Reads all that comes, and the error that ends it, if any.
pub(crate) async fn get(blobs: &Blobs, info: BlobInfo) -> (Vec<u8>, Option<BlobError>) {
    let mut bytes = Vec::new();
    let mut reader = match blobs.get(info.id).await {
        Ok(reader) => reader,
        Err(error) => return (bytes, Some(error)),
    };
    loop {
        match reader.next().await {
            Ok(Some(chunk)) => {
                assert!(!chunk.is_empty());
                bytes.extend_from_slice(&chunk);
            }
            Ok(None) => {
                assert_eq!(reader.next().await, Ok(None), "the end stays the end");
                return (bytes, None);
            }
            Err(error) => {
                assert!(reader.next().await.is_err(), "nothing comes after an error");
                return (bytes, Some(error));
            }
        }
    }
}

/// Asserts that a blob comes back whole, without printing it.
pub(crate) async fn comes_back(blobs: &Blobs, info: BlobInfo, stored: &[u8], when: &str) {
    let (found, error) = get(blobs, info).await;
    assert_eq!(error, None, "{when}");
    assert!(found == stored, "{} of {} bytes came: {when}", found.len(), stored.len());
}
