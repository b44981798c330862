//! Values that may be shown, and those that may not.

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::borrow::Cow;
use std::fmt;

const MASK: &str = "***";
/// How API keys begin; then come 16 digits that are no secret.
const KEY_PREFIX: &str = "ash_";
const KEY_ID_CHARACTERS: usize = 16;
/// What the names of secret parameters contain.
const SECRET_WORDS: [&str; 4] = ["secret", "password", "token", "credential"];

/// A value of a configuration that no log shows.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(pub String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(MASK)
    }
}

impl JsonSchema for Secret {
    fn schema_name() -> Cow<'static, str> {
        String::schema_name()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        String::json_schema(generator)
    }

    fn inline_schema() -> bool {
        true
    }
}

/// The value with API keys and the passwords of addresses in it masked: `redis://user:***@host`, `?secret_key=***`.
pub fn masked(value: Value) -> Value {
    match value {
        Value::String(text) => Value::String(masked_text(&text)),
        Value::Array(values) => Value::Array(values.into_iter().map(masked).collect()),
        Value::Object(fields) => {
            Value::Object(fields.into_iter().map(|(name, value)| (name, masked(value))).collect())
        }
        other => other,
    }
}

fn masked_text(text: &str) -> String {
    if let Some(rest) = text.trim().strip_prefix(KEY_PREFIX) {
        let id: String = rest.chars().take(KEY_ID_CHARACTERS).collect();
        return format!("{KEY_PREFIX}{id}_{MASK}");
    }
    let Some((scheme, rest)) = text.split_once("://") else { return text.to_owned() };
    let (rest, query) = rest.split_once('?').map_or((rest, None), |(rest, query)| (rest, Some(query)));
    // A password may contain slashes that should have been escaped: the last @ counts.
    let rest = match rest.rfind('@') {
        Some(at) => {
            let user = rest[..at].split(':').next().unwrap_or_default();
            let shown = if user.len() < at { format!("{user}:{MASK}") } else { user.to_owned() };
            format!("{shown}{}", &rest[at..])
        }
        None => rest.to_owned(),
    };
    let query = query.map_or_else(String::new, |query| {
        let parts: Vec<_> = query.split('&').map(masked_parameter).collect();
        format!("?{}", parts.join("&"))
    });
    format!("{scheme}://{rest}{query}")
}

fn masked_parameter(parameter: &str) -> String {
    match parameter.split_once('=') {
        Some((name, _)) if SECRET_WORDS.iter().any(|word| name.to_lowercase().contains(word)) => {
            format!("{name}={MASK}")
        }
        _ => parameter.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_of_addresses_are_not_shown() {
        let shown = |text: &str| masked_text(text);
        assert_eq!(shown("redis://:hunter2@redis:6379/0"), "redis://:***@redis:6379/0");
        assert_eq!(shown("redis://ash:hun/ter@2@redis/0"), "redis://ash:***@redis/0");
        assert_eq!(shown("redis://ash@redis/0"), "redis://ash@redis/0");
        assert_eq!(shown("redis://redis:6379/0"), "redis://redis:6379/0");
        assert_eq!(
            shown("s3://b/p?endpoint=https://h&secret_key=x"),
            "s3://b/p?endpoint=https://h&secret_key=***"
        );
        assert_eq!(shown("/var/lib/ashlar"), "/var/lib/ashlar");
        assert_eq!(shown("ash_0123456789abcdef_secret"), "ash_0123456789abcdef_***");
        assert_eq!(format!("{:?}", Secret("hunter2".to_owned())), "***");
    }
}
