//! The lease under which this process leads: acquired from the store, renewed beside the work.

use super::SchedulerError;
use ashlar_store::{Lease, LeaseAnswer, Store, StoreError};
use ashlar_vocabulary::LeaseTerm;
use std::sync::Arc;
use std::time::Duration;

/// Name of the scheduler's lease.
const LEASE: &str = "scheduler";
/// Pause before the store is asked again while another process leads or the store is away.
const RETRY_MAX: Duration = Duration::from_secs(1);

/// Waits until the lease is ours, at `min_term` or above.
pub(super) async fn acquire(
    store: &Arc<dyn Store>,
    holder: &str,
    ttl: Duration,
    min_term: LeaseTerm,
) -> Result<Lease, SchedulerError> {
    let mut leader = None;
    loop {
        let pause = match store.acquire_lease(LEASE, holder, ttl, min_term).await {
            Ok(LeaseAnswer::Granted(lease)) => return Ok(lease),
            Ok(LeaseAnswer::Held { by, term, remaining }) => {
                if leader.as_ref() != Some(&by) {
                    tracing::info!(%by, %term, "standing by: another scheduler leads");
                    leader = Some(by);
                }
                remaining
            }
            Err(error) if error.is_retryable() => {
                tracing::warn!(%error, "cannot ask for the lease");
                RETRY_MAX
            }
            Err(error) => return Err(error.into()),
        };
        tokio::time::sleep(pause.clamp(Duration::from_millis(20), RETRY_MAX)).await;
    }
}

/// Renews the lease until it is lost. While the store is away, leading goes on: ranks obey the highest term they have
/// seen, so a successor fences this process whatever the store says.
pub(super) async fn keep(store: Arc<dyn Store>, lease: Lease) {
    loop {
        tokio::time::sleep(lease.ttl / 3).await;
        match store.renew(&lease).await {
            Ok(()) => {}
            Err(error @ StoreError::LeaseLost { .. }) => {
                tracing::warn!(%error, "the lease is lost");
                return;
            }
            Err(error) => tracing::warn!(%error, "the lease could not be renewed; serving on"),
        }
    }
}
