//! Values of all layers put together, each with its origin.

use super::problem::{ConfigError, Origin, Problem, without_values};
use super::schema::{Found, Schema};
use super::secrets::masked;
use super::sources::Sources;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use toml::Value;
use toml::de::{DeTable, DeValue};

/// Largest configuration file, and largest file of a value.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// What has been set so far.
#[derive(Debug, Clone)]
pub struct Draft {
    schema: Schema,
    file: Option<PathBuf>,
    table: toml::Table,
    origins: BTreeMap<String, Origin>,
    problems: Vec<Problem>,
}

/// A key with what holds for it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Effective {
    /// Its path.
    pub key: String,
    /// The value, passwords masked; `null` for nothing.
    pub value: serde_json::Value,
    /// Where it comes from.
    pub origin: String,
}

impl Draft {
    /// Puts the layers together: what flags say goes before what the environment says, and that before the file.
    ///
    /// # Errors
    /// [`ConfigError::Read`] and [`ConfigError::Syntax`] of the file. Everything else is kept for [`finish`](Draft::finish), so that all
    /// of it is told at once.
    pub fn gather(schema: Schema, sources: &Sources) -> Result<Draft, ConfigError> {
        let mut draft = Draft {
            schema,
            file: sources.file.clone(),
            table: toml::Table::new(),
            origins: BTreeMap::new(),
            problems: Vec::new(),
        };
        if let Some(file) = &sources.file {
            let text = read(file).map_err(|reason| ConfigError::Read { file: file.clone(), reason })?;
            draft.add_file(file, &text)?;
        }
        draft.add_environment(sources);
        for setting in &sources.settings {
            draft.add_setting(setting);
        }
        Ok(draft)
    }

    /// The schema.
    pub fn schema(&self) -> &Schema {
        &self.schema
    }

    /// What is wrong so far.
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }

    /// A value that somebody has set.
    pub fn get(&self, path: &str) -> Option<&Value> {
        let (first, rest) = path.split_once('.').map_or((path, None), |(first, rest)| (first, Some(rest)));
        let mut value = self.table.get(first)?;
        for level in rest.into_iter().flat_map(|rest| rest.split('.')) {
            value = value.get(level)?;
        }
        Some(value)
    }

    /// Sets what the role has found out itself; `how` is its origin.
    pub fn supply(&mut self, path: &str, value: impl Into<Value>, how: &str) {
        self.place(path, value.into(), &|_| Origin::Found(how.to_owned()));
    }

    /// The configuration.
    ///
    /// # Errors
    /// [`ConfigError::Problems`] with everything that is wrong.
    pub fn finish<T: DeserializeOwned>(&self) -> Result<T, ConfigError> {
        let mut problems = self.problems.clone();
        let spoilt = |path: &str| {
            problems.iter().any(|problem| matches!(problem, Problem::Value { key, .. } if key == path))
        };
        let missing = self.schema.keys().iter().filter(|key| key.required && self.get(&key.path).is_none());
        let missing: Vec<_> = missing
            .filter(|key| !spoilt(&key.path))
            .map(|key| Problem::MissingKey {
                key: key.path.clone(),
                variable: self.schema.variable(&key.path),
                file: self.file.clone(),
            })
            .collect();
        problems.extend(missing);
        if !problems.is_empty() {
            return Err(ConfigError::Problems(problems));
        }
        T::deserialize(Value::Table(self.table.clone())).map_err(|error| {
            // The last line names the key: "in `links.spin_us`".
            let text = error.to_string();
            let path = text.lines().last().and_then(|line| line.strip_prefix("in `")?.strip_suffix('`'));
            let key = path.unwrap_or_default().to_owned();
            let reason = without_values(error.message());
            ConfigError::Problems(vec![Problem::Value { origin: self.origin(&key), key, reason }])
        })
    }

    /// Where a key's value comes from.
    pub fn origin(&self, path: &str) -> Origin {
        if let Some(origin) = self.origins.get(path) {
            return origin.clone();
        }
        // A table, of which a part was set.
        let part = self
            .origins
            .iter()
            .find(|(key, _)| key.strip_prefix(path).is_some_and(|rest| rest.starts_with('.')));
        part.map_or(Origin::Default, |(_, origin)| origin.clone())
    }

    /// Every key with its value and its origin, of the configuration that this has become.
    pub fn effective<T: Serialize>(&self, config: &T) -> Vec<Effective> {
        let values = serde_json::to_value(config).unwrap_or_default();
        let value_at = |path: &str| {
            let mut value = &values;
            for level in path.split('.') {
                value = value.get(level).unwrap_or(&serde_json::Value::Null);
            }
            value.clone()
        };
        let keys = self.schema.keys().iter();
        keys.map(|key| Effective {
            key: key.path.clone(),
            value: masked(value_at(&key.path)),
            origin: self.origin(&key.path).to_string(),
        })
        .collect()
    }

    fn add_file(&mut self, file: &Path, text: &str) -> Result<(), ConfigError> {
        let syntax = |error: &toml::de::Error| ConfigError::Syntax {
            file: file.to_owned(),
            line: line_of(text, error.span().map_or(0, |span| span.start)),
            reason: without_values(error.message()),
        };
        let table: toml::Table = text.parse().map_err(|error| syntax(&error))?;
        let mut lines = BTreeMap::new();
        let spans = DeTable::parse(text).map_err(|error| syntax(&error))?;
        note_lines("", spans.get_ref(), text, &mut lines);
        let mut entries: Vec<_> = table.into_iter().collect();
        // What is wrong is told from the first line to the last.
        entries.sort_by_key(|(key, _)| lines.get(key).copied());
        for (key, value) in entries {
            self.place(&key, value, &|path| {
                let line = lines.get(path).copied().unwrap_or(1);
                Origin::File { file: file.to_owned(), line }
            });
        }
        Ok(())
    }

    fn add_environment(&mut self, sources: &Sources) {
        let prefix = self.schema.prefix();
        let mut set: BTreeMap<String, String> = BTreeMap::new();
        for (name, value) in &sources.environment {
            let Some(name) = name.to_str().filter(|name| name.starts_with(&prefix)) else { continue };
            match value.to_str() {
                // As if it was not there: `${VARIABLE:-}` in a compose file.
                Some("") => {}
                Some(value) => {
                    set.insert(name.to_owned(), value.to_owned());
                }
                None => self.other(name, "its value is not UTF-8"),
            }
        }
        for (name, value) in &set {
            let path = name[prefix.len()..].to_lowercase().replace("__", ".");
            match (self.schema.find(&path), name.strip_suffix("_FILE")) {
                (Found::Key(_) | Found::Table, _) => {
                    self.read_value(&path, value, &Origin::Variable(name.clone()));
                }
                (Found::Unknown(_), Some(variable)) if self.is_known(&prefix, variable) => {
                    if set.contains_key(variable) {
                        self.problems.push(Problem::Twice { variable: variable.to_owned() });
                        continue;
                    }
                    let path = path.strip_suffix("_file").unwrap_or(&path).to_owned();
                    match read(Path::new(value)) {
                        Ok(text) => {
                            let origin = Origin::VariableFile { variable: name.clone(), file: value.into() };
                            self.read_value(&path, text.trim(), &origin);
                        }
                        Err(reason) => self.other(name, &format!("cannot read {value}: {reason}")),
                    }
                }
                (Found::Unknown(nearest), _) => {
                    let nearest = nearest.map(|path| self.schema.variable(path));
                    let (key, role) = (name.clone(), self.schema.role());
                    let origin = Origin::Variable(name.clone());
                    self.problems.push(Problem::UnknownKey { key, origin, nearest, role });
                }
            }
        }
    }

    fn is_known(&self, prefix: &str, variable: &str) -> bool {
        let path = variable.strip_prefix(prefix).unwrap_or_default().to_lowercase().replace("__", ".");
        matches!(self.schema.find(&path), Found::Key(_))
    }

    fn add_setting(&mut self, setting: &str) {
        match setting.split_once('=') {
            Some((path, value)) if !path.trim().is_empty() => {
                self.read_value(path.trim(), value.trim(), &Origin::Flag);
            }
            // It may be a secret whose key was forgotten.
            _ => self.other("--set", "expected key=value, for example --set listen=0.0.0.0:8080"),
        }
    }

    fn read_value(&mut self, path: &str, text: &str, origin: &Origin) {
        let read = match self.schema.find(path) {
            Found::Key(key) => key.kind.read(text),
            Found::Table => match format!("value = {text}\n").parse::<toml::Table>() {
                Ok(mut table) if table.len() == 1 => {
                    Ok(table.remove("value").unwrap_or(Value::Boolean(false)))
                }
                _ => Err("expected a table, for example { shared_memory = false }".to_owned()),
            },
            // What becomes of it is said where it is placed.
            Found::Unknown(_) => Ok(Value::String(text.to_owned())),
        };
        match read {
            Ok(value) => self.place(path, value, &|_| origin.clone()),
            Err(reason) => self.bad_value(path, origin.clone(), reason),
        }
    }

    /// Sets a value, or each value of a table.
    fn place(&mut self, path: &str, value: Value, origin: &dyn Fn(&str) -> Origin) {
        match (self.schema.find(path), value) {
            (Found::Key(key), value) => {
                if !key.kind.admits(&value) {
                    let reason = format!("expected {}, found {}", key.kind, value.type_str());
                    return self.bad_value(path, origin(path), reason);
                }
                let role = self.schema.role();
                let tables = value.as_array().into_iter().flatten().filter_map(Value::as_table);
                let unknown = tables.flat_map(toml::Table::keys).find_map(|name| {
                    let nearest = key.element(name).err()?;
                    Some((format!("{path}.{name}"), nearest.map(str::to_owned)))
                });
                if let Some((key, nearest)) = unknown {
                    let origin = origin(path);
                    return self.problems.push(Problem::UnknownKey { key, origin, nearest, role });
                }
                self.origins.insert(path.to_owned(), origin(path));
                insert(&mut self.table, path, value);
            }
            (Found::Table, Value::Table(table)) => {
                for (name, value) in table {
                    self.place(&format!("{path}.{name}"), value, origin);
                }
            }
            (Found::Table, value) => {
                let reason = format!("expected a table, found {}", value.type_str());
                self.bad_value(path, origin(path), reason);
            }
            (Found::Unknown(nearest), _) => {
                let problem = Problem::UnknownKey {
                    key: path.to_owned(),
                    origin: origin(path),
                    nearest: nearest.map(str::to_owned),
                    role: self.schema.role(),
                };
                self.problems.push(problem);
            }
        }
    }

    fn bad_value(&mut self, path: &str, origin: Origin, reason: String) {
        self.problems.push(Problem::Value { key: path.to_owned(), origin, reason });
    }

    fn other(&mut self, place: &str, reason: &str) {
        self.problems.push(Problem::Other { place: place.to_owned(), reason: reason.to_owned() });
    }
}

fn read(file: &Path) -> Result<String, String> {
    let size = std::fs::metadata(file).map_err(|error| error.to_string())?.len();
    if size > FILE_BYTES_MAX {
        return Err(format!("it has {size} bytes, a configuration has at most {FILE_BYTES_MAX}"));
    }
    std::fs::read_to_string(file).map_err(|error| error.to_string())
}

fn insert(table: &mut toml::Table, path: &str, value: Value) {
    match path.split_once('.') {
        None => {
            table.insert(path.to_owned(), value);
        }
        Some((first, rest)) => {
            let inner = table.entry(first.to_owned()).or_insert_with(|| Value::Table(toml::Table::new()));
            if let Value::Table(inner) = inner {
                insert(inner, rest, value);
            }
        }
    }
}

fn note_lines(path: &str, table: &DeTable<'_>, text: &str, lines: &mut BTreeMap<String, usize>) {
    for (key, value) in table {
        let name = key.get_ref();
        let path = if path.is_empty() { name.to_string() } else { format!("{path}.{name}") };
        if let DeValue::Table(inner) = value.get_ref() {
            note_lines(&path, inner, text, lines);
        }
        lines.insert(path, line_of(text, key.span().start));
    }
}

fn line_of(text: &str, offset: usize) -> usize {
    text.bytes().take(offset).filter(|&byte| byte == b'\n').count() + 1
}
