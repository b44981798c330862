//! The small JSON files that stand beside `tokenizer.json`.

use crate::tokenizer::TokenizerError;
use serde_json::{Map, Value};
use std::io;
use std::path::Path;

/// What the files beside the tokenizer say. All are optional.
#[derive(Debug, Default)]
pub(crate) struct CheckpointFiles {
    /// Special tokens by role (`bos_token`, `eos_token`, …) as text.
    pub(crate) special_tokens: Map<String, Value>,
    /// End-of-sequence ids of `generation_config.json` and `config.json`.
    pub(crate) eos_ids: Vec<u32>,
    /// Beginning-of-sequence id of those files.
    pub(crate) bos_id: Option<u32>,
    /// Default template, with the file that it came from.
    pub(crate) template: Option<(String, String)>,
    /// Template for requests with tools, when there is a separate one.
    pub(crate) tool_template: Option<String>,
}

impl CheckpointFiles {
    pub(crate) fn read(dir: &Path) -> Result<CheckpointFiles, TokenizerError> {
        let mut files = CheckpointFiles::default();
        if let Some(map) = read_object(dir, "special_tokens_map.json")? {
            files.take_special_tokens(&map);
        }
        if let Some(config) = read_object(dir, "tokenizer_config.json")? {
            files.take_special_tokens(&config);
            files.take_templates(&config)?;
        }
        for name in ["generation_config.json", "config.json"] {
            let Some(config) = read_object(dir, name)? else { continue };
            files.bos_id = files.bos_id.or_else(|| config.get("bos_token_id").and_then(as_id));
            match config.get("eos_token_id") {
                Some(Value::Array(ids)) => files.eos_ids.extend(ids.iter().filter_map(as_id)),
                Some(id) => files.eos_ids.extend(as_id(id)),
                None => {}
            }
        }
        // A separate file wins over the configuration, as in Transformers.
        if let Some(source) = read_text(dir, "chat_template.jinja")? {
            files.template = Some((source, "chat_template.jinja".into()));
            files.tool_template = None;
        }
        Ok(files)
    }

    fn take_special_tokens(&mut self, config: &Map<String, Value>) {
        for (role, value) in config {
            let role_of_token = role.ends_with("_token") && !role.starts_with("add_");
            let text = value.as_str().or_else(|| value.get("content").and_then(Value::as_str));
            if let (true, Some(text)) = (role_of_token, text) {
                self.special_tokens.insert(role.clone(), text.into());
            }
        }
    }

    fn take_templates(&mut self, config: &Map<String, Value>) -> Result<(), TokenizerError> {
        let file = "tokenizer_config.json".to_string();
        match config.get("chat_template") {
            None | Some(Value::Null) => {}
            Some(Value::String(source)) => self.template = Some((source.clone(), file)),
            Some(Value::Array(named)) => {
                let find = |wanted: &str| {
                    named.iter().find_map(|entry| {
                        (entry.get("name")?.as_str()? == wanted)
                            .then(|| entry.get("template")?.as_str().map(str::to_string))?
                    })
                };
                self.template = find("default").map(|source| (source, file));
                self.tool_template = find("tool_use");
            }
            Some(_) => {
                return Err(TokenizerError::Field {
                    file,
                    field: "chat_template",
                    expected: "a string or a list of named templates",
                });
            }
        }
        Ok(())
    }
}

fn as_id(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|id| u32::try_from(id).ok())
}

/// Largest file that is read. Vocabularies of today take some 30 MiB.
const FILE_BYTES_MAX: u64 = 256 << 20;

pub(crate) fn read_text(dir: &Path, name: &str) -> Result<Option<String>, TokenizerError> {
    let path = dir.join(name);
    let read = || {
        let found = std::fs::metadata(&path)?;
        // A pipe would be waited for, and a device read for ever.
        if !found.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file"));
        }
        if found.len() > FILE_BYTES_MAX {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        std::fs::read_to_string(&path)
    };
    match read() {
        Ok(text) => Ok(Some(text)),
        Err(source) if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(TokenizerError::Read { file: dir.join(name), source }),
    }
}

fn read_object(dir: &Path, name: &str) -> Result<Option<Map<String, Value>>, TokenizerError> {
    let Some(text) = read_text(dir, name)? else { return Ok(None) };
    serde_json::from_str(&text)
        .map(Some)
        .map_err(|source| TokenizerError::Json { file: dir.join(name), source })
}
