//! From what a user names (a directory, a GGUF file or a hub id) to a local directory or file.
//!
//! Honours `HF_ENDPOINT`, `HF_HOME`, `HF_TOKEN` and `HF_HUB_OFFLINE`; a revision is pinned with `id@revision`.

use hf_hub::api::sync::{Api, ApiBuilder, ApiError};
use hf_hub::{Cache, Repo, RepoType};
use std::path::{Path, PathBuf};

mod ranges;

pub use ranges::HubFiles;

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
    match id_of(model) {
        Some((id, revision)) if !path.exists() => fetch(id, revision, Some(progress)),
        _ => Err(HubError::NotAModel(model.to_owned())),
    }
}

/// [`resolve`], but only what is whole on this machine: no network, and nothing is written.
pub fn local(model: &str) -> Option<PathBuf> {
    let path = Path::new(model);
    if path.join("config.json").is_file() {
        return Some(path.to_owned());
    }
    let cached = || {
        let (id, revision) = id_of(model).filter(|_| !path.exists())?;
        fetch(id, revision, None).ok()
    };
    crate::gguf::file_of(path).or_else(cached)
}

/// Whether `model` is a name on a hub and nothing on this machine.
pub fn is_id(model: &str) -> bool {
    id_of(model).is_some() && !Path::new(model).exists()
}

/// Id and revision, if `model` is shaped like them.
fn id_of(model: &str) -> Option<(&str, &str)> {
    let (id, revision) = model.split_once('@').unwrap_or((model, "main"));
    let valid = id.split('/').count() == 2 && id.split('/').all(crate::weights::is_plain);
    valid.then_some((id, revision))
}

/// The files of `id`, from the hub's cache and, where there is somebody to report to, from the hub.
fn fetch(id: &str, revision: &str, mut progress: Option<&mut dyn FnMut(&str)>) -> Result<PathBuf, HubError> {
    let repo = Repo::with_revision(id.to_owned(), RepoType::Model, revision.to_owned());
    let cache = Cache::from_env();
    let fail = |file: &str, reason: String| HubError::Fetch { id: id.into(), file: file.into(), reason };
    let api = match progress {
        Some(_) => Some(api().map_err(|error| fail("config.json", error.to_string()))?.repo(repo.clone())),
        None => None,
    };
    let api = api.filter(|_| !is_offline());
    let mut get = |file: &str, required: bool| -> Result<Option<PathBuf>, HubError> {
        if let Some(path) = cache.repo(repo.clone()).get(file) {
            return Ok(Some(path));
        }
        let (Some(api), Some(progress)) = (&api, &mut progress) else {
            return match required {
                true => Err(HubError::Offline { id: id.into(), cache: cache.path().clone() }),
                false => Ok(None),
            };
        };
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

fn is_offline() -> bool {
    std::env::var("HF_HUB_OFFLINE").is_ok_and(|v| !matches!(v.as_str(), "" | "0" | "false"))
}

fn token() -> Option<String> {
    std::env::var("HF_TOKEN").ok()
}

/// The hub's client.
fn api() -> Result<Api, ApiError> {
    let builder = ApiBuilder::from_env().with_progress(false);
    match token() {
        Some(token) => builder.with_token(Some(token)),
        None => builder,
    }
    .build()
}

fn directory_of(file: Option<&Path>) -> PathBuf {
    file.and_then(Path::parent).map(Path::to_owned).unwrap_or_default()
}

fn is_not_found(error: &ApiError) -> bool {
    error.to_string().contains("404")
}
