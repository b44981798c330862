//! Values that may be shown.

use serde_json::Value;

const MASK: &str = "***";
/// What the names of secret parameters contain.
const SECRET_WORDS: [&str; 4] = ["secret", "password", "token", "credential"];

/// The value with the passwords of addresses in it masked: `redis://user:***@host`, `?secret_key=***`.
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
    }
}
