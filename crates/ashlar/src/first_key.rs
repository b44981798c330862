//! The first API key of a cluster: made once, kept where only its owner reads it, and shown when it is made.

use anyhow::{Context, Result};
use ashlar_identity::ApiKey;
use std::fs::{self, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// The key, and whether it was made just now.
#[derive(Debug)]
pub(crate) struct FirstKey {
    pub(crate) key: ApiKey,
    pub(crate) is_new: bool,
    pub(crate) path: PathBuf,
}

impl FirstKey {
    /// What is in the state directory, or a new one.
    pub(crate) fn open(state: &Path) -> Result<FirstKey> {
        let path = state.join("admin.key");
        match fs::read_to_string(&path) {
            Ok(text) => {
                let key =
                    text.parse().with_context(|| format!("{}: delete it for a new one", path.display()))?;
                Ok(FirstKey { key, is_new: false, path })
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let key = ApiKey::generate()?;
                let failed = || format!("cannot write {}", path.display());
                let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
                let mut file = file.with_context(failed)?;
                writeln!(file, "{}", key.reveal()).and_then(|()| file.sync_all()).with_context(failed)?;
                Ok(FirstKey { key, is_new: true, path })
            }
            Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
        }
    }

    /// Shows a new one; of another, where it is.
    pub(crate) fn announce(&self) {
        if self.is_new {
            eprintln!("the first API key, which is shown only now (and kept in {}):", self.path.display());
            eprintln!("  {}", self.key.reveal());
            eprintln!(
                "give it to clients as OPENAI_API_KEY; `ashlar keys create` makes others that may do less"
            );
        } else {
            eprintln!("clients need an API key; the first one is in {}", self.path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn it_is_made_once_and_only_its_owner_reads_it() {
        let state = tempfile::tempdir().unwrap();
        let first = FirstKey::open(state.path()).unwrap();
        let again = FirstKey::open(state.path()).unwrap();
        assert_eq!((first.is_new, again.is_new), (true, false));
        assert_eq!(first.key.reveal(), again.key.reveal());
        assert_eq!(fs::metadata(&first.path).unwrap().permissions().mode() & 0o777, 0o600);
        fs::write(&first.path, "nonsense").unwrap();
        assert!(format!("{:#}", FirstKey::open(state.path()).unwrap_err()).contains("delete it"));
    }
}
