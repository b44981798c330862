//! From what a user names (a directory, a GGUF file or a hub id) to a local directory or file.
//!
//! Honours `HF_ENDPOINT`, `HF_HOME`, `HF_TOKEN` and `HF_HUB_OFFLINE`; a revision is pinned with `id@revision`.

use hf_hub::api::sync::{ApiBuilder, ApiError};
use hf_hub::{Cache, Repo, RepoType};
use std::path::{Path, PathBuf};

/// Why a model could not be found.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// Neither a directory nor shaped like a hub id.
    #[error(
        "`{0}` is neither a model directory (with config.json), nor a GGUF file, nor a hub id like `org/name` or `org/name@revision`"
    )]
    NotAModel(String),
    /// Offline, and not in the cache.
    #[error(
        "`{id}` is not in the hub cache {cache} and HF_HUB_OFFLINE is set: unset it, or download the model first"
    )]
    Offline {
        /// The id.
        id: String,
        /// Where it was looked for.
        cache: PathBuf,
    },
    /// The hub refused or failed.
    #[error("cannot fetch `{file}` of `{id}` from the hub: {reason}")]
    Fetch {
        /// The id.
        id: String,
        /// The file.
        file: String,
        /// What the hub said.
        reason: String,
    },
}

/// Files that may be absent.
const OPTIONAL_FILES: [&str; 4] =
    ["generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"];

/// Resolves `model`. Downloads what is missing and reports each file's name to `progress` before it is fetched.
pub fn resolve(model: &str, progress: &mut dyn FnMut(&str)) -> Result<PathBuf, HubError> {
    let path = Path::new(model);
    if path.join("config.json").is_file() {
        return Ok(path.to_owned());
    }
    if let Some(file) = crate::gguf::file_of(path) {
        return Ok(file);
    }
    let (id, revision) = model.split_once('@').unwrap_or((model, "main"));
    let valid = id.split('/').count() == 2
        && id.split('/').all(|part| {
            !part.is_empty()
                && !part.starts_with('.')
                && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
        });
    if path.exists() || !valid {
        return Err(HubError::NotAModel(model.to_owned()));
    }
    fetch(id, revision, progress)
}

fn fetch(id: &str, revision: &str, progress: &mut dyn FnMut(&str)) -> Result<PathBuf, HubError> {
    let repo = Repo::with_revision(id.to_owned(), RepoType::Model, revision.to_owned());
    let cache = Cache::from_env();
    let offline = std::env::var("HF_HUB_OFFLINE").is_ok_and(|v| !matches!(v.as_str(), "" | "0" | "false"));
    let mut builder = ApiBuilder::from_env().with_progress(false);
    if let Ok(token) = std::env::var("HF_TOKEN") {
        builder = builder.with_token(Some(token));
    }
    let fail = |file: &str, reason: String| HubError::Fetch { id: id.into(), file: file.into(), reason };
    let api = builder.build().map_err(|error| fail("config.json", error.to_string()))?.repo(repo.clone());
    let mut get = |file: &str, required: bool| -> Result<Option<PathBuf>, HubError> {
        if let Some(path) = cache.repo(repo.clone()).get(file) {
            return Ok(Some(path));
        }
        if offline {
            return match required {
                true => Err(HubError::Offline { id: id.into(), cache: cache.path().clone() }),
                false => Ok(None),
            };
        }
        progress(file);
        match api.get(file) {
            Ok(path) => Ok(Some(path)),
            Err(error) if !required && is_not_found(&error) => Ok(None),
            Err(error) => Err(fail(file, error.to_string())),
        }
    };
    let config = get("config.json", true)?;
    get("tokenizer.json", true)?;
    for file in OPTIONAL_FILES {
        get(file, false)?;
    }
    if get("model.safetensors.index.json", false)?.is_some() {
        let directory = directory_of(config.as_deref());
        let names = crate::weights::file_names(&directory)
            .map_err(|error| fail("model.safetensors.index.json", error.to_string()))?;
        for name in names {
            get(&name, true)?;
        }
    } else {
        get("model.safetensors", true)?;
    }
    Ok(directory_of(config.as_deref()))
}

fn directory_of(file: Option<&Path>) -> PathBuf {
    file.and_then(Path::parent).map(Path::to_owned).unwrap_or_default()
}

fn is_not_found(error: &ApiError) -> bool {
    error.to_string().contains("404")
}
