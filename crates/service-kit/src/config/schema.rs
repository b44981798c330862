//! What can be configured: every key with its type, its default and its description, from the struct itself.

use super::nearest::nearest;
use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde_json::Value;
use std::fmt;

/// The configuration of a role, as its struct describes it.
#[derive(Debug, Clone)]
pub struct Schema {
    role: &'static str,
    keys: Vec<Key>,
    tables: Vec<String>,
    json: Value,
}

/// A key that can be set.
#[derive(Debug, Clone, PartialEq)]
pub struct Key {
    /// Its path, levels joined by `.`.
    pub path: String,
    /// What may stand there.
    pub kind: Kind,
    /// What holds where nobody sets it; `None`: nothing, which its description explains.
    pub default: Option<Value>,
    /// Whether somebody has to set it.
    pub required: bool,
    /// What it is for, in one line.
    pub description: String,
    /// The keys of its elements, where it is a list of tables.
    elements: Vec<String>,
}

/// What may stand in a value.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Kind {
    anything: bool,
    boolean: bool,
    integer: bool,
    number: bool,
    text: bool,
    table: bool,
    /// The words that text may be, if it is limited to some.
    words: Vec<String>,
    list: Option<Box<Kind>>,
}

/// What stands at a path.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Found<'a> {
    /// A key.
    Key(&'a Key),
    /// A table of keys.
    Table,
    /// Nothing; this is the nearest key.
    Unknown(Option<&'a str>),
}

impl Schema {
    /// That of the struct `T`, for a role.
    pub fn of<T: JsonSchema>(role: &'static str) -> Schema {
        // Without references, so that one walk meets everything.
        let settings = SchemaSettings::draft2020_12().with(|settings| settings.inline_subschemas = true);
        let json = settings.into_generator().into_root_schema_for::<T>().to_value();
        let mut schema = Schema { role, keys: Vec::new(), tables: Vec::new(), json: Value::Null };
        schema.walk("", &json, None);
        schema.json = json;
        schema
    }

    /// With a key that has to be set although its struct has a default for it.
    pub fn requiring(mut self, path: &str) -> Schema {
        for key in self.keys.iter_mut().filter(|key| key.path == path) {
            (key.required, key.default) = (true, None);
        }
        if let Some(required) = self.json.as_object_mut() {
            let list = required.entry("required").or_insert_with(|| Value::Array(Vec::new()));
            if let Some(list) = list.as_array_mut() {
                list.push(path.into());
            }
        }
        self.without_default(path)
    }

    /// With a key that need not be set although its struct has no default for it: the role finds the value itself.
    pub fn supplying(mut self, path: &str) -> Schema {
        for key in self.keys.iter_mut().filter(|key| key.path == path) {
            key.required = false;
        }
        if let Some(required) = self.json.get_mut("required").and_then(Value::as_array_mut) {
            required.retain(|name| name != path);
        }
        self
    }

    fn without_default(mut self, path: &str) -> Schema {
        if let Some(key) = self.json["properties"].get_mut(path).and_then(Value::as_object_mut) {
            key.shift_remove("default");
        }
        self
    }

    /// Whose it is.
    pub fn role(&self) -> &'static str {
        self.role
    }

    /// All keys, in the order of the struct.
    pub fn keys(&self) -> &[Key] {
        &self.keys
    }

    /// As JSON Schema (draft 2020-12).
    pub fn json(&self) -> &Value {
        &self.json
    }

    /// What stands at a path.
    pub fn find(&self, path: &str) -> Found<'_> {
        match self.keys.iter().find(|key| key.path == path) {
            Some(key) => Found::Key(key),
            None if self.tables.iter().any(|table| table == path) => Found::Table,
            None => Found::Unknown(self.nearest(path)),
        }
    }

    /// The environment variable of a key.
    pub fn variable(&self, path: &str) -> String {
        format!("{}{}", self.prefix(), path.replace('.', "__").to_uppercase())
    }

    /// What the names of all its environment variables begin with.
    pub fn prefix(&self) -> String {
        format!("ASHLAR_{}__", self.role.to_uppercase())
    }

    fn nearest(&self, path: &str) -> Option<&str> {
        nearest(path, self.keys.iter().map(|key| key.path.as_str()))
    }

    /// Reads the properties of `table`, which is at `path`.
    fn walk(&mut self, path: &str, table: &Value, defaults: Option<&Value>) {
        let required = table["required"].as_array().cloned().unwrap_or_default();
        for (name, property) in table["properties"].as_object().into_iter().flatten() {
            let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
            // The default of a table is that of its keys.
            let default = defaults.and_then(|table| table.get(name)).or_else(|| property.get("default"));
            let inner = alternatives(property).into_iter().find(|one| one.get("properties").is_some());
            if let Some(inner) = inner {
                self.tables.push(path.clone());
                self.walk(&path, inner, default);
                continue;
            }
            let element = alternatives(property).into_iter().find_map(|one| one.get("items"));
            let elements = element.and_then(|items| items["properties"].as_object());
            self.keys.push(Key {
                kind: Kind::of(property),
                default: default.filter(|value| !value.is_null()).cloned(),
                // Within a table, what is missing is the table's business: it may be left out itself.
                required: !path.contains('.') && required.iter().any(|key| key == name),
                description: one_line(property["description"].as_str().unwrap_or_default()),
                elements: elements.into_iter().flatten().map(|(name, _)| name.clone()).collect(),
                path,
            });
        }
    }
}

impl Key {
    /// Whether `name` can be a key of an element, and if not, the nearest one.
    pub(super) fn element(&self, name: &str) -> Result<(), Option<&str>> {
        let known = self.elements.is_empty() || self.elements.iter().any(|element| element == name);
        if known { Ok(()) } else { Err(nearest(name, self.elements.iter().map(String::as_str))) }
    }
}

/// The schema itself and those of which one has to hold, at any depth.
fn alternatives(schema: &Value) -> Vec<&Value> {
    let nested = ["anyOf", "oneOf"].into_iter().filter_map(|name| schema[name].as_array()).flatten();
    std::iter::once(schema).chain(nested.flat_map(alternatives)).collect()
}

/// Without line breaks, and without the brackets of links in code.
fn one_line(text: &str) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    line.replace("[`", "`").replace("`]", "`")
}

impl Kind {
    fn of(schema: &Value) -> Kind {
        let mut kind = Kind { anything: schema == &Value::Bool(true), ..Kind::default() };
        let mut said = false;
        for one in alternatives(schema) {
            let types = match &one["type"] {
                Value::Array(types) => types.iter().filter_map(Value::as_str).collect(),
                Value::String(name) => vec![name.as_str()],
                _ => Vec::new(),
            };
            said |= !types.is_empty() || one.get("const").is_some() || one.get("enum").is_some();
            for name in types {
                match name {
                    "boolean" => kind.boolean = true,
                    "integer" => kind.integer = true,
                    "number" => kind.number = true,
                    "string" => kind.text = true,
                    "object" => kind.table = true,
                    "array" => kind.list = Some(Box::new(Kind::of(&one["items"]))),
                    _ => {}
                }
            }
            let words = one["enum"].as_array().into_iter().flatten().chain(one.get("const"));
            let words: Vec<_> = words.filter_map(Value::as_str).map(str::to_owned).collect();
            kind.text |= !words.is_empty();
            kind.words.extend(words);
        }
        // A schema that says nothing about types allows everything.
        kind.anything |= !said && schema.get("anyOf").is_none() && schema.get("oneOf").is_none();
        kind
    }

    /// Whether a value may stand there, as far as its type says.
    pub fn admits(&self, value: &toml::Value) -> bool {
        self.anything
            || match value {
                toml::Value::Boolean(_) => self.boolean,
                toml::Value::Integer(_) => self.integer || self.number,
                toml::Value::Float(_) => self.number,
                toml::Value::String(_) => self.text,
                toml::Value::Table(_) => self.table,
                toml::Value::Array(values) => {
                    self.list.as_ref().is_some_and(|kind| values.iter().all(|value| kind.admits(value)))
                }
                toml::Value::Datetime(_) => false,
            }
    }

    /// Whether one of several words has to stand there, and which.
    pub fn words(&self) -> &[String] {
        &self.words
    }

    /// A value as it is written in an environment variable or after `--set`: TOML where that goes with the key, otherwise the text as it
    /// is; several texts may be separated by commas.
    ///
    /// # Errors
    /// What is expected. It does not repeat the text, which may be a secret.
    pub fn read(&self, text: &str) -> Result<toml::Value, String> {
        let toml = format!("value = {text}\n").parse::<toml::Table>().ok();
        let toml = toml.filter(|table| table.len() == 1).and_then(|mut table| table.remove("value"));
        if let Some(value) = toml.filter(|value| self.admits(value)) {
            return Ok(value);
        }
        let texts = self.list.as_ref().is_some_and(|kind| kind.text);
        if texts && (!self.text || text.contains(',')) {
            let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
            return Ok(toml::Value::Array(parts.map(|part| part.to_owned().into()).collect()));
        }
        if self.text {
            return Ok(text.to_owned().into());
        }
        Err(format!("expected {self}"))
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts: Vec<String> = Vec::new();
        if self.anything {
            parts.push("a value".into());
        }
        if self.boolean {
            parts.push("true or false".into());
        }
        if self.number {
            parts.push("a number".into());
        } else if self.integer {
            parts.push("an integer".into());
        }
        if !self.words.is_empty() {
            let words: Vec<_> = self.words.iter().map(|word| format!("{word:?}")).collect();
            parts.push(words.join(", "));
        } else if self.text {
            parts.push("text".into());
        }
        if let Some(list) = &self.list {
            let of = match (list.table, list.integer, list.text) {
                (true, ..) => "tables",
                (_, true, _) => "integers",
                (_, _, true) => "texts",
                _ => "values",
            };
            parts.push(format!("a list of {of}"));
        }
        if self.table {
            parts.push("a table".into());
        }
        f.write_str(&parts.join(", or "))
    }
}
