//! Typed reading of a JSON object: strict on what is known, lenient on what is not.
//!
//! Every error names the field. `null` counts as absent, as OpenAI's clients send it. What was never asked for is
//! listed at the end, for a warning.

use super::error::ApiError;
use serde_json::{Map, Value};

/// An object of which fields are taken one by one.
#[derive(Debug)]
pub(crate) struct Fields {
    /// Where the object stands (`""` or `"stream_options."`).
    prefix: String,
    map: Map<String, Value>,
    /// Paths within objects that have been read to their end.
    unknown_within: Vec<String>,
}

impl Fields {
    /// The body of a request.
    pub(crate) fn parse(body: &[u8]) -> Result<Fields, ApiError> {
        match serde_json::from_slice::<Value>(body) {
            Ok(Value::Object(map)) => Ok(Fields::at(String::new(), map)),
            Ok(other) => Err(ApiError::invalid(format!(
                "the request body must be a JSON object, not {}",
                type_name(&other)
            ))),
            Err(_) if body.iter().all(u8::is_ascii_whitespace) => {
                Err(ApiError::invalid("the request body is empty: send a JSON object"))
            }
            Err(error) => Err(ApiError::invalid(format!(
                "the request body is not valid JSON: {error}. Correct it and retry"
            ))),
        }
    }

    /// The fields of a body that has been read.
    pub(crate) fn of_map(map: Map<String, Value>) -> Fields {
        Fields::at(String::new(), map)
    }

    /// The object under `name`, if any.
    pub(crate) fn object(&mut self, name: &str) -> Result<Option<Fields>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Fields::at(format!("{}{name}.", self.prefix), map))),
            Some(other) => Err(self.mistyped(name, "an object", &other)),
        }
    }

    /// An object that stands at `path`.
    pub(crate) fn of(value: Value, path: &str) -> Result<Fields, ApiError> {
        match value {
            Value::Object(map) => Ok(Fields::at(format!("{path}."), map)),
            other => Err(mistyped(path, "an object", &other)),
        }
    }

    fn at(prefix: String, map: Map<String, Value>) -> Fields {
        Fields { prefix, map, unknown_within: Vec::new() }
    }

    /// Takes note of what nobody has taken of an object within this one.
    pub(crate) fn finish(&mut self, inner: Fields) {
        self.unknown_within.extend(inner.unknown());
    }

    /// The field as it is; `None` when absent or null.
    pub(crate) fn take(&mut self, name: &str) -> Option<Value> {
        self.map.shift_remove(name).filter(|value| !value.is_null())
    }

    /// Whether the field is there and not null.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.map.get(name).is_some_and(|value| !value.is_null())
    }

    /// Takes the field if it is as `wanted`; whether it was.
    pub(crate) fn take_if(&mut self, name: &str, wanted: impl Fn(&Value) -> bool) -> bool {
        let found = self.map.get(name).is_some_and(wanted);
        if found {
            self.map.shift_remove(name);
        }
        found
    }

    /// The full path of a field.
    pub(crate) fn path(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    pub(crate) fn bool(&mut self, name: &str) -> Result<Option<bool>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(other) => Err(self.mistyped(name, "a boolean", &other)),
        }
    }

    pub(crate) fn string(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(value)) => Ok(Some(value)),
            Some(other) => Err(self.mistyped(name, "a string", &other)),
        }
    }

    pub(crate) fn array(&mut self, name: &str) -> Result<Option<Vec<Value>>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Array(value)) => Ok(Some(value)),
            Some(other) => Err(self.mistyped(name, "an array", &other)),
        }
    }

    /// A whole number within `min..=max`.
    pub(crate) fn integer(&mut self, name: &str, min: i64, max: i64) -> Result<Option<i64>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        let Value::Number(number) = &value else { return Err(self.mistyped(name, "an integer", &value)) };
        // 5.0 is an integer to JSON.
        let whole = number
            .as_i64()
            .or_else(|| number.as_f64().filter(|n| n.fract() == 0.0 && n.abs() < 9e15).map(|n| n as i64));
        if whole.is_none() && number.as_f64().is_some_and(|n| n.fract() != 0.0) {
            return Err(self.mistyped(name, "an integer", &value));
        }
        match whole.filter(|n| (min..=max).contains(n)) {
            Some(n) => Ok(Some(n)),
            None => Err(self.out_of_range(name, min, max, &value)),
        }
    }

    /// A number within `min..=max`.
    pub(crate) fn number(&mut self, name: &str, min: f64, max: f64) -> Result<Option<f64>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        let Some(number) = value.as_f64() else { return Err(self.mistyped(name, "a number", &value)) };
        if (min..=max).contains(&number) {
            return Ok(Some(number));
        }
        Err(self.out_of_range(name, min, max, &value))
    }

    pub(crate) fn mistyped(&self, name: &str, expected: &str, found: &Value) -> ApiError {
        mistyped(&self.path(name), expected, found)
    }

    pub(crate) fn required(&self, name: &str) -> ApiError {
        let path = self.path(name);
        ApiError::field(&path, format!("`{path}` is missing: it is required"))
    }

    /// Paths of the fields that nobody has taken, here and within.
    pub(crate) fn unknown(self) -> Vec<String> {
        let here = self.map.into_iter().map(|(name, _)| format!("{}{name}", self.prefix));
        here.chain(self.unknown_within).collect()
    }

    fn out_of_range<N: std::fmt::Display>(&self, name: &str, min: N, max: N, found: &Value) -> ApiError {
        let path = self.path(name);
        ApiError::field(&path, format!("`{path}` must be between {min} and {max}, not {found}"))
    }
}

/// The error for a value of the wrong type at `path`.
pub(crate) fn mistyped(path: &str, expected: &str, found: &Value) -> ApiError {
    ApiError::field(path, format!("`{path}` must be {expected}, not {}", type_name(found)))
}

/// JSON's name of a value's type.
pub(crate) fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}
