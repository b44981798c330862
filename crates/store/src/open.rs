//! A store from its address.

use crate::api::Store;
use crate::embedded::EmbeddedStore;
use crate::error::StoreError;
use crate::remote::{RedisOptions, RedisStore};
use std::path::Path;
use std::sync::Arc;

/// Opens `redb:PATH` (one process, one file) or `redis://[[USER]:PASSWORD@]HOST[:PORT][/DATABASE]`.
///
/// # Errors
/// [`StoreError::Address`] for anything else, [`StoreError::Locked`] for a file in use,
/// [`StoreError::Unavailable`] for a Redis that does not answer.
pub async fn open(url: &str) -> Result<Arc<dyn Store>, StoreError> {
    match url.split_once(':') {
        Some(("redb", path)) if !path.is_empty() => Ok(Arc::new(EmbeddedStore::open(Path::new(path)).await?)),
        Some(("redis", _)) => Ok(Arc::new(RedisStore::connect(url, RedisOptions::default()).await?)),
        Some(("rediss", _)) => {
            Err(StoreError::Address("redis over TLS is not built in, use a tunnel on this host".into()))
        }
        // The address itself may hold a password, so it is not repeated.
        _ => Err(StoreError::Address("the store's address has no known scheme".into())),
    }
}
