//! Pages of lists: `after` and `limit` in, `{object: "list", data, has_more, first_id, last_id}` out.

use crate::openai::error::ApiError;
use axum::extract::Query;
use axum::http::Uri;
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// The parameters of a query, taken one by one.
pub(crate) struct QueryFields(BTreeMap<String, String>);

impl QueryFields {
    pub(crate) fn parse(uri: &Uri) -> Result<QueryFields, ApiError> {
        let parsed = Query::<BTreeMap<String, String>>::try_from_uri(uri);
        let unreadable = |_| ApiError::invalid("the query of the address cannot be read: write name=value&…");
        Ok(QueryFields(parsed.map_err(unreadable)?.0))
    }

    /// An empty one counts as absent.
    pub(crate) fn take(&mut self, name: &str) -> Option<String> {
        self.0.remove(name).filter(|value| !value.is_empty())
    }

    /// What follows the entry of this name.
    pub(crate) fn after<T>(&mut self, read: impl Fn(&str) -> Option<T>) -> Result<Option<T>, ApiError> {
        let Some(after) = self.take("after") else { return Ok(None) };
        let unknown = || ApiError::field("after", "`after` names no entry of this list: use a `last_id`");
        read(&after).map(Some).ok_or_else(unknown)
    }

    /// At most so many.
    pub(crate) fn limit(&mut self, default: u32, max: u32) -> Result<u32, ApiError> {
        let Some(limit) = self.take("limit") else { return Ok(default) };
        let wrong = || ApiError::field("limit", format!("`limit` must be a number between 1 and {max}"));
        limit.parse().ok().filter(|limit| (1..=max).contains(limit)).ok_or_else(wrong)
    }

    pub(crate) fn flag(&mut self, name: &str) -> Result<bool, ApiError> {
        match self.take(name).as_deref() {
            None | Some("false" | "0") => Ok(false),
            Some("true" | "1") => Ok(true),
            Some(_) => Err(ApiError::field(name, format!("`{name}` must be true or false"))),
        }
    }

    /// What nobody has taken.
    pub(crate) fn unknown(self) -> Vec<String> {
        self.0.into_keys().collect()
    }
}

/// A page as a client sees it.
pub(crate) fn list(data: Vec<Value>, has_more: bool) -> Value {
    let id = |entry: Option<&Value>| entry.map_or(Value::Null, |entry| entry["id"].clone());
    let (first_id, last_id) = (id(data.first()), id(data.last()));
    json!({"object": "list", "data": data, "has_more": has_more, "first_id": first_id, "last_id": last_id})
}
