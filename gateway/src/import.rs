//! From a directory with an adapter in PEFT's files to blobs that nodes can load.
//!
//! What is looked at here is cheap: where the files lie, how large they are, and that they are what they say. Whether they fit
//! the model is for the nodes to say, which know it.

use crate::app::App;
use crate::openai::error::ApiError;
use ashlar_store::blobs::{BlobError, BlobInfo, Blobs, Manifest};
use ashlar_vocabulary::AdapterId;
use serde_json::Value;
use std::fs::File;
use std::io::{self, Read, Seek};
use std::path::{Path, PathBuf};

/// PEFT's files.
const CONFIG_FILE: &str = "adapter_config.json";
const TENSORS_FILE: &str = "adapter_model.safetensors";
/// Longest configuration, and longest header of the tensors' file.
const CONFIG_BYTES_MAX: u64 = 1 << 20;
const HEADER_BYTES_MAX: u64 = 16 << 20;
/// What is read at once.
const CHUNK_BYTES: usize = 1 << 20;

/// Puts the adapter at `path`, below the configured directory, into the blob store.
pub(crate) async fn import(app: &App, path: &str) -> Result<AdapterId, ApiError> {
    let no = |what: &str| ApiError::invalid(format!("this server loads no adapters: {what}"));
    let blobs = app.tuning.as_ref().map(|tuning| tuning.blobs.clone());
    let blobs = blobs.ok_or_else(|| no("set `blobs` in the gateway's configuration"))?;
    let root =
        app.config.adapters.clone().ok_or_else(|| no("set `adapters` in the gateway's configuration"))?;
    let (path, limit) = (path.to_owned(), app.config.adapter_bytes_max);
    let (config, tensors) = app.work(move || open(&root, &path, limit)).await?;
    let mut manifest = Manifest::default();
    for (name, file) in [(CONFIG_FILE, config), (TENSORS_FILE, tensors)] {
        let blob = put(&blobs, file, limit).await?;
        manifest.insert(name, blob).map_err(storing)?;
    }
    let stored = blobs.put_manifest(&manifest).await.map_err(storing)?;
    Ok(AdapterId(stored.id))
}

fn storing(error: BlobError) -> ApiError {
    tracing::warn!(%error, "an adapter could not be put into the blob store");
    ApiError::unavailable("the adapter could not be stored: try again shortly")
}

/// Both files, opened and looked at.
pub(crate) fn open(root: &Path, path: &str, limit: u64) -> Result<(File, File), ApiError> {
    let directory = beneath(root, path)?;
    let mut config = file(&directory, CONFIG_FILE, CONFIG_BYTES_MAX.min(limit))?;
    let mut tensors = file(&directory, TENSORS_FILE, limit)?;
    check_config(&mut config)?;
    check_tensors(&mut tensors)?;
    for file in [&mut config, &mut tensors] {
        file.rewind().map_err(|error| unreadable(path, &error))?;
    }
    Ok((config, tensors))
}

fn refuse(message: impl Into<String>) -> ApiError {
    ApiError::field("lora_path", message)
}

fn unreadable(name: &str, error: &io::Error) -> ApiError {
    refuse(format!("{name} cannot be read: {error}"))
}

/// The directory that `path` names, if it lies below `root` whatever links there are.
fn beneath(root: &Path, path: &str) -> Result<PathBuf, ApiError> {
    let root = root.canonicalize().map_err(|error| {
        tracing::warn!(root = %root.display(), %error, "the directory of adapters cannot be used");
        refuse("this server's directory of adapters cannot be used: see its log")
    })?;
    // One answer for all that is outside, whether it exists or not.
    let outside = || refuse(format!("`{path}` is no directory below this server's directory of adapters"));
    let found = root.join(path).canonicalize().map_err(|_| outside())?;
    if found == root || !found.starts_with(&root) || !found.is_dir() {
        return Err(outside());
    }
    Ok(found)
}

/// A regular file in `directory` itself, and not larger than `limit`.
fn file(directory: &Path, name: &str, limit: u64) -> Result<File, ApiError> {
    let path = directory.join(name);
    let found = path.symlink_metadata().map_err(|error| unreadable(name, &error))?;
    // A pipe would be waited for; a link may lead outside.
    if !found.is_file() {
        return Err(refuse(format!("{name} is no regular file: put the file itself there")));
    }
    let file = File::open(&path).map_err(|error| unreadable(name, &error))?;
    let bytes = file.metadata().map_err(|error| unreadable(name, &error))?.len();
    if bytes > limit {
        return Err(refuse(format!("{name} has {bytes} bytes, at most {limit} are allowed")));
    }
    Ok(file)
}

fn check_config(file: &mut File) -> Result<(), ApiError> {
    let mut bytes = Vec::new();
    file.take(CONFIG_BYTES_MAX).read_to_end(&mut bytes).map_err(|error| unreadable(CONFIG_FILE, &error))?;
    let config: Value = serde_json::from_slice(&bytes)
        .map_err(|error| refuse(format!("{CONFIG_FILE} is not valid JSON: {error}")))?;
    if config.get("peft_type").and_then(Value::as_str) != Some("LORA") {
        return Err(refuse(format!(
            "{CONFIG_FILE} is not that of a LoRA adapter: its peft_type is not LORA"
        )));
    }
    if config.get("r").and_then(Value::as_u64).is_none_or(|rank| rank == 0) {
        return Err(refuse(format!("{CONFIG_FILE} has no rank `r`")));
    }
    Ok(())
}

/// A header whose tensors lie within the file.
fn check_tensors(file: &mut File) -> Result<(), ApiError> {
    let broken = |what: &str| refuse(format!("{TENSORS_FILE} is not valid: {what}"));
    let bytes = file.metadata().map_err(|error| unreadable(TENSORS_FILE, &error))?.len();
    let mut length = [0; 8];
    file.read_exact(&mut length).map_err(|_| broken("it is shorter than a header's length"))?;
    let length = u64::from_le_bytes(length);
    let data = bytes.saturating_sub(8).checked_sub(length);
    let data = data.filter(|_| length <= HEADER_BYTES_MAX);
    let data = data.ok_or_else(|| broken("its header is longer than the file, or than any should be"))?;
    let mut header = vec![0; length as usize];
    file.read_exact(&mut header).map_err(|_| broken("its header is cut off"))?;
    let header: Value = serde_json::from_slice(&header).map_err(|_| broken("its header is not JSON"))?;
    let header = header.as_object().ok_or_else(|| broken("its header is no object"))?;
    let tensors = header.iter().filter(|(name, _)| *name != "__metadata__");
    let mut count = 0;
    for (name, tensor) in tensors {
        count += 1;
        let offset = |index: usize| tensor.get("data_offsets")?.get(index)?.as_u64();
        let (Some(start), Some(end)) = (offset(0), offset(1)) else {
            return Err(broken(&format!("the tensor {name} has no place")));
        };
        if start > end || end > data {
            return Err(broken(&format!("the tensor {name} lies outside of the file")));
        }
    }
    if count == 0 {
        return Err(broken("it has no tensors"));
    }
    Ok(())
}

/// Puts a file into the store, and no more of it than `limit`: it may grow while it is read.
async fn put(blobs: &Blobs, file: File, limit: u64) -> Result<BlobInfo, ApiError> {
    use tokio::io::AsyncReadExt;
    let mut file = tokio::fs::File::from_std(file);
    let mut writer = blobs.writer();
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut total = 0;
    loop {
        let count = file.read(&mut chunk).await.map_err(|error| unreadable("a file", &error))?;
        if count == 0 {
            return writer.finish().await.map_err(storing);
        }
        total += count as u64;
        if total > limit {
            return Err(refuse(format!("a file grew beyond {limit} bytes while it was read")));
        }
        writer.write(&chunk[..count]).await.map_err(storing)?;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;

    #[test]
    fn nothing_outside_of_the_directory_of_adapters_is_read_and_nothing_but_files() {
        let place = tempfile::tempdir().unwrap();
        let (root, outside) = (place.path().join("adapters"), place.path().join("outside"));
        for folder in [&root, &outside, &root.join("inside"), &root.join("odd")] {
            fs::create_dir_all(folder).unwrap();
        }
        fs::write(outside.join(CONFIG_FILE), r#"{"peft_type": "LORA", "r": 1}"#).unwrap();
        symlink(&outside, root.join("link")).unwrap();
        let absolute = outside.to_string_lossy().into_owned();
        let refused = |path: &str| beneath(&root, path).unwrap_err().message;
        let said = refused("nowhere");
        for path in ["..", "../outside", "inside/../../outside", "link", &absolute, "/etc", ".", ""] {
            assert_eq!(refused(path), said.replace("nowhere", path), "{path}");
        }
        let inside = beneath(&root, "inside").unwrap();
        symlink(outside.join(CONFIG_FILE), inside.join(CONFIG_FILE)).unwrap();
        assert!(file(&inside, CONFIG_FILE, 1000).unwrap_err().message.contains("no regular file"));
        let odd = beneath(&root, "odd").unwrap();
        let _socket = UnixListener::bind(odd.join(CONFIG_FILE)).unwrap();
        assert!(file(&odd, CONFIG_FILE, 1000).unwrap_err().message.contains("no regular file"));
        fs::remove_file(odd.join(CONFIG_FILE)).unwrap();
        fs::write(odd.join(CONFIG_FILE), "{}").unwrap();
        assert!(file(&odd, CONFIG_FILE, 2).is_ok());
        assert!(file(&odd, CONFIG_FILE, 1).unwrap_err().message.contains("at most 1"));
    }
}
