//! A finished job's files, written to a directory: an adapter that PEFT loads, or a model that can be served.

use crate::http::Client;
use anyhow::{Context, Result, bail};
use indicatif::ProgressBar;
use serde_json::{Value, json};
use std::fs::{self, File};
use std::path::Path;
use std::time::{Duration, Instant};

/// How long a file that the job names may not be there yet.
const LATE_MAX: Duration = Duration::from_secs(10);

/// Writes what `job`, which has succeeded, has left to `directory`, which is made if need be. Files of the same names are replaced,
/// each only once the new one is whole.
pub(super) async fn download(client: &Client, job: &Value, directory: &Path, json: bool) -> Result<()> {
    let files: Vec<&str> =
        job["result_files"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    if files.is_empty() {
        bail!("the job has no files to download: they may have been deleted");
    }
    fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display()))?;
    for id in files {
        let file = described(client, id).await?;
        let name = plain_name(file["filename"].as_str().unwrap_or_default())?;
        let bar = ProgressBar::new_spinner().with_message(format!("fetching {name}"));
        let (to, part) = (directory.join(name), directory.join(format!(".{name}.part")));
        let bytes = fetch(client, id, &part).await.inspect_err(|_| drop(fs::remove_file(&part)))?;
        fs::rename(&part, &to).with_context(|| format!("cannot write {}", to.display()))?;
        bar.finish_and_clear();
        show(&to, bytes, json);
    }
    Ok(())
}

/// A file's record. A table of results is written once the job has ended, and may be a moment late.
async fn described(client: &Client, id: &str) -> Result<Value> {
    let path = format!("/v1/files/{id}");
    let asked = Instant::now();
    loop {
        match client.get(&path).await? {
            (404, _) if asked.elapsed() < LATE_MAX => tokio::time::sleep(LATE_MAX / 50).await,
            (200, file) => return Ok(file),
            _ => return client.get_ok(&path).await,
        }
    }
}

async fn fetch(client: &Client, id: &str, part: &Path) -> Result<u64> {
    let mut to = File::create(part).with_context(|| format!("cannot write {}", part.display()))?;
    let bytes = client.download(&format!("/v1/files/{id}/content"), &mut to).await?;
    to.sync_all().with_context(|| format!("cannot write {}", part.display()))?;
    Ok(bytes)
}

/// A name that stays in the directory.
fn plain_name(name: &str) -> Result<&str> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if name.is_empty() || name.starts_with('.') || !name.chars().all(plain) {
        bail!("the gateway names a file `{}`, which is no plain name", name.escape_debug());
    }
    Ok(name)
}

fn show(path: &Path, bytes: u64, json: bool) {
    if json {
        println!("{}", json!({"file": path, "bytes": bytes}));
    } else {
        eprintln!("{} ({bytes} bytes)", path.display());
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        assert_eq!(plain_name("adapter_model.safetensors").unwrap(), "adapter_model.safetensors");
        for wrong in ["", "..", ".bashrc", "a/b", "/etc/passwd", "a\\b", "a b", "\u{7}"] {
            assert!(plain_name(wrong).is_err(), "{wrong}");
        }
    }
}
