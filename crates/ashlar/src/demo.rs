//! The demo model, carried inside the binary, so that a bare `ashlar up` needs nothing but itself.

use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};

const FILES: [(&str, &[u8]); 5] = [
    ("config.json", include_bytes!("../../model/demo/config.json")),
    ("generation_config.json", include_bytes!("../../model/demo/generation_config.json")),
    ("tokenizer.json", include_bytes!("../../model/demo/tokenizer.json")),
    ("tokenizer_config.json", include_bytes!("../../model/demo/tokenizer_config.json")),
    ("model.safetensors", include_bytes!("../../model/demo/model.safetensors")),
];

/// Writes the demo model below `state` (unless it is there) and returns its directory.
pub(crate) fn unpack(state: &Path) -> Result<PathBuf> {
    let directory = state.join("models").join("ashlar-demo");
    fs::create_dir_all(&directory).with_context(|| format!("cannot create {}", directory.display()))?;
    for (name, bytes) in FILES {
        let path = directory.join(name);
        if fs::read(&path).is_ok_and(|present| present == bytes) {
            continue;
        }
        let temporary = path.with_extension("new");
        fs::write(&temporary, bytes)
            .and_then(|()| fs::rename(&temporary, &path))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(directory)
}
