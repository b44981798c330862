//! `/admin/keys`: API keys. Each is shown once, in the answer that makes it.

use crate::app::{App, ForCaller, unix_seconds};
use crate::openai::error::ApiError;
use crate::openai::fields::Fields;
use crate::openai::respond::{add_warning, read_body};
use ashlar_identity::ApiKey;
use ashlar_protocol::access::{KEY_NAME_BYTES_MAX, KEY_NAMES_MAX, KeyCall, KeyLimits, KeyRecord, Scope};
use ashlar_protocol::admin::{AdminReply, AdminRequest};
use ashlar_vocabulary::{KeyId, Tenant};
use axum::Json;
use axum::extract::{Path, Request};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

/// Longest life of a key that has an end, in seconds.
const LIFE_S_MAX: i64 = 100 * 366 * 24 * 3600;

/// `POST /admin/keys`.
pub(crate) async fn create(ForCaller(app): ForCaller, request: Request) -> Result<Response, ApiError> {
    let (parts, body) = request.into_parts();
    let mut fields = Fields::parse(&read_body(&app, &parts.headers, body).await?)?;
    let key = ApiKey::generate().map_err(|error| ApiError::internal(error.to_string()))?;
    let record = record_of(&mut fields, &key)?;
    let unknown = fields.unknown();
    let request = AdminRequest::Key(KeyCall::Create(Box::new(record)));
    let AdminReply::Key(record) = app.scheduler.call(request).await? else {
        return Err(ApiError::internal("the scheduler answered something else"));
    };
    let mut object = key_object(&record);
    object["key"] = key.reveal().into();
    let mut response = Json(object).into_response();
    add_warning(response.headers_mut(), &unknown);
    Ok(response)
}

fn record_of(fields: &mut Fields, key: &ApiKey) -> Result<KeyRecord, ApiError> {
    let name = fields.string("name")?.unwrap_or_default();
    if name.len() > KEY_NAME_BYTES_MAX {
        return Err(ApiError::field(
            "name",
            format!("`name` has more than {KEY_NAME_BYTES_MAX} bytes: shorten it"),
        ));
    }
    let id = key.id();
    let tenant = Tenant(fields.string("tenant")?.unwrap_or_else(|| id.to_string()));
    if !tenant.is_valid() {
        let message = "`tenant` must be 1 to 64 letters, digits, `-`, `_` and `.`";
        return Err(ApiError::field("tenant", message));
    }
    let scopes = match names(fields, "scopes")? {
        None => vec![Scope::Inference],
        Some(names) => names.iter().map(|name| scope_of(name)).collect::<Result<_, _>>()?,
    };
    if scopes.is_empty() {
        return Err(ApiError::field("scopes", "`scopes` must name at least one"));
    }
    let (models, adapters) = (names(fields, "models")?, names(fields, "adapters")?);
    let (limits, shares_prefixes) = (limits_of(fields)?, fields.bool("share_prefix_cache")?.unwrap_or(false));
    let created_at = unix_seconds();
    let life = fields.integer("expires_in_s", 1, LIFE_S_MAX)?;
    if name.is_empty() {
        return Err(fields.required("name"));
    }
    Ok(KeyRecord {
        id,
        hash: key.hash(),
        name,
        tenant,
        scopes,
        models,
        adapters,
        limits,
        shares_prefixes,
        created_at,
        expires_at: life.map(|life| created_at + life as u64),
        configured: false,
    })
}

fn limits_of(fields: &mut Fields) -> Result<KeyLimits, ApiError> {
    let mut number = |name: &str| {
        let number = fields.integer(name, 1, i64::from(u32::MAX))?;
        Ok::<_, ApiError>(number.map(|number| number as u32))
    };
    Ok(KeyLimits {
        requests_per_minute: number("requests_per_minute")?,
        tokens_per_minute: number("tokens_per_minute")?,
        concurrency: number("concurrency")?,
        training_minutes: number("training_minutes")?,
        kv_share_percent: fields.integer("kv_share_percent", 1, 100)?.map(|percent| percent as u8),
        priority: fields
            .integer("priority", i64::from(i32::MIN), i64::from(i32::MAX))?
            .map_or(0, |priority| priority as i32),
    })
}

fn scope_of(name: &str) -> Result<Scope, ApiError> {
    let known = Scope::ALL.into_iter().find(|scope| scope.name() == name);
    known.ok_or_else(|| {
        let all: Vec<&str> = Scope::ALL.iter().map(|scope| scope.name()).collect();
        ApiError::field("scopes", format!("`scopes` must be some of {}", all.join(", ")))
    })
}

fn names(fields: &mut Fields, field: &str) -> Result<Option<Vec<String>>, ApiError> {
    let Some(values) = fields.array(field)? else { return Ok(None) };
    let names: Option<Vec<String>> = values.iter().map(|name| name.as_str().map(str::to_owned)).collect();
    let short = |names: &Vec<String>| {
        names.len() <= KEY_NAMES_MAX && names.iter().all(|name| name.len() <= KEY_NAME_BYTES_MAX)
    };
    names.filter(short).map(Some).ok_or_else(|| {
        let message = format!(
            "`{field}` must be a list of at most {KEY_NAMES_MAX} names of at most {KEY_NAME_BYTES_MAX} bytes"
        );
        ApiError::field(field, message)
    })
}

/// `GET /admin/keys`.
pub(crate) async fn list(ForCaller(app): ForCaller) -> Result<Json<Value>, ApiError> {
    app.cluster()?;
    let keys = app.scheduler.link().keys.map(|keys| keys.all()).unwrap_or_default();
    let data: Vec<Value> = keys.iter().map(|key| key_object(key)).collect();
    Ok(Json(json!({"object": "list", "data": data, "required": app.config.keys_are_required()})))
}

/// `DELETE /admin/keys/{id}`.
pub(crate) async fn revoke(
    ForCaller(app): ForCaller,
    Path(name): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let unknown = || {
        let shown: String = name.chars().take(64).collect();
        ApiError::not_found(format!("there is no key {shown}"), "not_found")
    };
    let id = name.parse::<KeyId>().map_err(|_| unknown())?;
    revoked(&app, id).await?;
    Ok(Json(json!({"id": name, "object": "key", "deleted": true})))
}

async fn revoked(app: &App, id: KeyId) -> Result<(), ApiError> {
    app.scheduler.call(AdminRequest::Key(KeyCall::Revoke(id))).await?;
    Ok(())
}

/// A key, without what makes it one.
fn key_object(key: &KeyRecord) -> Value {
    json!({
        "id": key.id.to_string(),
        "object": "key",
        "name": key.name,
        "tenant": key.tenant.0,
        "scopes": key.scopes,
        "models": key.models,
        "adapters": key.adapters,
        "requests_per_minute": key.limits.requests_per_minute,
        "tokens_per_minute": key.limits.tokens_per_minute,
        "concurrency": key.limits.concurrency,
        "kv_share_percent": key.limits.kv_share_percent,
        "training_minutes": key.limits.training_minutes,
        "priority": key.limits.priority,
        "share_prefix_cache": key.shares_prefixes,
        "created_at": key.created_at,
        "expires_at": key.expires_at,
        "configured": key.configured,
    })
}
