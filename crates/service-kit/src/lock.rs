//! A file that one process holds for as long as it lives.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// A held file. The system lets go of it when the process ends, however it ends.
#[derive(Debug)]
pub struct HeldFile {
    _file: File,
}

/// Why a file is not held.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another process holds it.
    #[error("{path} is held by {}", holder(.pid))]
    Held {
        /// The file.
        path: PathBuf,
        /// Which process, as far as it has said so.
        pid: Option<u32>,
    },
    /// The system refuses.
    #[error("cannot hold {path}: {source}")]
    Files {
        /// The file.
        path: PathBuf,
        /// The system's words.
        source: io::Error,
    },
}

fn holder(pid: &Option<u32>) -> String {
    pid.map_or_else(|| "another process".to_owned(), |pid| format!("process {pid}"))
}

impl HeldFile {
    /// Holds the file at `path`, which is made if there is none, and writes this process's id into it.
    ///
    /// # Errors
    /// [`LockError`], at once.
    pub fn hold(path: &Path) -> Result<HeldFile, LockError> {
        let failed = |source| LockError::Files { path: path.to_owned(), source };
        let mut file = File::options().create(true).truncate(false).write(true).open(path).map_err(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => {
                let pid = fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok());
                return Err(LockError::Held { path: path.to_owned(), pid });
            }
            Err(fs::TryLockError::Error(source)) => return Err(failed(source)),
        }
        file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id())).map_err(failed)?;
        Ok(HeldFile { _file: file })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_file_is_held_once_at_a_time_and_the_refusal_names_the_holder() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("node.lock");
        let held = HeldFile::hold(&path).unwrap();
        let error = HeldFile::hold(&path).unwrap_err().to_string();
        assert!(error.contains(&format!("process {}", std::process::id())), "{error}");
        drop(held);
        HeldFile::hold(&path).unwrap();
    }
}
