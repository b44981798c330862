//! One address, or several of which one at a time is the right one.

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::borrow::Cow;
use std::fmt;

/// Addresses (`host:port`), at least one; in a configuration a string, or a list of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Addresses(Vec<String>);

impl Addresses {
    /// Several; `None` of nothing.
    pub fn new(addresses: Vec<String>) -> Option<Addresses> {
        (!addresses.is_empty()).then_some(Addresses(addresses))
    }

    /// The address of attempt `number`: one after the other, and from the first again.
    pub fn of_attempt(&self, number: usize) -> &str {
        self.0.get(number % self.0.len().max(1)).map_or("", String::as_str)
    }

    /// How many.
    pub fn count(&self) -> usize {
        self.0.len()
    }
}

impl From<&str> for Addresses {
    fn from(address: &str) -> Addresses {
        Addresses(vec![address.to_owned()])
    }
}

impl From<String> for Addresses {
    fn from(address: String) -> Addresses {
        Addresses(vec![address])
    }
}

impl fmt::Display for Addresses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join(", "))
    }
}

impl JsonSchema for Addresses {
    fn schema_name() -> Cow<'static, str> {
        "Addresses".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": ["string", "array"], "items": { "type": "string" }, "minItems": 1 })
    }
}

impl Serialize for Addresses {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0.as_slice() {
            [one] => one.serialize(serializer),
            several => several.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Addresses {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Addresses, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "an address as \"host:port\", or a list of them")]
        enum Written {
            One(String),
            Several(Vec<String>),
        }
        let addresses = match Written::deserialize(deserializer)? {
            Written::One(address) => vec![address],
            Written::Several(addresses) => addresses,
        };
        Addresses::new(addresses).ok_or_else(|| serde::de::Error::custom("at least one address is needed"))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Config {
        scheduler: Addresses,
    }

    #[test]
    fn one_or_several_are_read_and_written_back() {
        for text in ["scheduler = \"a:1\"\n", "scheduler = [\"a:1\", \"b:2\"]\n"] {
            let config: Config = toml::from_str(text).unwrap();
            assert_eq!(toml::to_string(&config).unwrap(), text);
        }
        let error = toml::from_str::<Config>("scheduler = []").unwrap_err().to_string();
        assert!(error.contains("at least one"), "{error}");
        assert!(toml::from_str::<Config>("scheduler = 7").unwrap_err().to_string().contains("host:port"));
    }

    #[test]
    fn attempts_take_turns() {
        let addresses = Addresses::new(vec!["a:1".into(), "b:2".into()]).unwrap();
        assert_eq!([0, 1, 2, 3].map(|attempt| addresses.of_attempt(attempt)), ["a:1", "b:2", "a:1", "b:2"]);
        assert_eq!((addresses.count(), addresses.to_string().as_str()), (2, "a:1, b:2"));
    }
}
