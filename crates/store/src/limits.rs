//! Limits on everything that is stored, checked before it is.

use crate::error::StoreError;
use ashlar_vocabulary::LeaseTerm;
use std::time::Duration;

/// Longest key, lease name or holder, in bytes.
pub const KEY_BYTES_MAX: usize = 512;
/// Longest value, in bytes.
pub const VALUE_BYTES_MAX: usize = 1 << 20;
/// Most entries of one list.
pub const LIST_ENTRIES_MAX: usize = 4096;
/// Most bytes of one list's values.
pub const LIST_BYTES_MAX: usize = 64 << 20;
/// Shortest time-to-live of a lease.
pub const LEASE_TTL_MIN: Duration = Duration::from_millis(50);
/// Longest time-to-live of a lease.
pub const LEASE_TTL_MAX: Duration = Duration::from_secs(24 * 3600);
/// Highest term: Redis' scripts count in doubles, which are exact up to here.
pub const TERM_MAX: u64 = 1 << 52;

/// A key, lease name or holder: 1 to [`KEY_BYTES_MAX`] printable ASCII characters without a space.
pub(crate) fn check_name(kind: &str, name: &str) -> Result<(), StoreError> {
    if name.is_empty() {
        return Err(StoreError::Invalid(format!("a {kind} is empty: give it a name")));
    }
    check_prefix(kind, name)
}

/// As [`check_name`], but may be empty.
pub(crate) fn check_prefix(kind: &str, name: &str) -> Result<(), StoreError> {
    if name.len() > KEY_BYTES_MAX {
        let what = format!("a {kind} (in bytes)");
        return Err(StoreError::TooLarge { what, size: name.len(), limit: KEY_BYTES_MAX });
    }
    if !name.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(StoreError::Invalid(format!(
            "a {kind} has a character that is not printable ASCII, or a space: leave it out"
        )));
    }
    Ok(())
}

pub(crate) fn check_value(bytes: &[u8]) -> Result<(), StoreError> {
    if bytes.len() > VALUE_BYTES_MAX {
        let what = "a value (in bytes)".to_owned();
        return Err(StoreError::TooLarge { what, size: bytes.len(), limit: VALUE_BYTES_MAX });
    }
    Ok(())
}

pub(crate) fn check_lease(
    name: &str,
    holder: &str,
    ttl: Duration,
    min_term: LeaseTerm,
) -> Result<(), StoreError> {
    check_name("lease name", name)?;
    check_name("lease holder", holder)?;
    if !(LEASE_TTL_MIN..=LEASE_TTL_MAX).contains(&ttl) {
        return Err(StoreError::Invalid(format!(
            "a lease of {ttl:?} is not between {LEASE_TTL_MIN:?} and {LEASE_TTL_MAX:?}"
        )));
    }
    if min_term.0 >= TERM_MAX {
        return Err(StoreError::Invalid(format!("term {min_term} is not below {TERM_MAX}")));
    }
    Ok(())
}
