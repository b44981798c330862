//! The files of a model that a job trained, into a directory that can be served.

use crate::http::Client;
use anyhow::{Context, Result, bail};
use indicatif::ProgressBar;
use serde_json::Value;
use std::fs::{self, File};
use std::path::Path;

/// The table of steps, which is no part of a model.
const TABLE: &str = "results.csv";

/// Fetches a job's result files into `directory`, which is made. A file appears under its name once it is whole.
pub(super) async fn download(client: &Client, job: &Value, directory: &Path) -> Result<()> {
    fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display()))?;
    let mut fetched = 0;
    for id in job["result_files"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        let file = client.get_ok(&format!("/v1/files/{id}")).await?;
        let name = file["filename"].as_str().unwrap_or_default();
        if name == TABLE {
            continue;
        }
        if !is_plain(name) {
            bail!("the gateway names a file `{name}`, which is no plain file name: it is not written");
        }
        let bar = ProgressBar::new_spinner().with_message(format!("fetching {name}"));
        let (path, part) = (directory.join(name), directory.join(format!(".{name}.part")));
        let cannot = || format!("cannot write {}", part.display());
        let mut to = File::create(&part).with_context(cannot)?;
        client
            .download(&format!("/v1/files/{id}/content"), &mut to)
            .await
            .with_context(|| format!("cannot fetch {name}"))?;
        to.sync_all().with_context(cannot)?;
        fs::rename(&part, &path).with_context(|| format!("cannot write {}", path.display()))?;
        bar.finish_and_clear();
        fetched += 1;
    }
    if fetched == 0 {
        bail!("the job has no files of a model: only jobs with --full have some, once they have succeeded");
    }
    Ok(())
}

/// Whether a name stays in the directory.
fn is_plain(name: &str) -> bool {
    !name.starts_with('.')
        && !name.is_empty()
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_names_are_written() {
        assert!(is_plain("model.safetensors") && is_plain("tokenizer_config.json"));
        for name in ["", "..", ".hidden", "a/b", "a\\b", "\u{7}"] {
            assert!(!is_plain(name), "{name:?}");
        }
    }
}
