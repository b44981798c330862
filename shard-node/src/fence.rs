//! The highest lease term this rank has accepted, and whose it was. Survives restarts, so that an old leader is refused.

use ashlar_vocabulary::LeaseTerm;
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::PathBuf;

#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Accepted {
    term: LeaseTerm,
    holder: String,
}

/// A rank's last word on who may command it.
#[derive(Debug)]
pub struct Fence {
    path: PathBuf,
    accepted: Accepted,
}

impl Fence {
    /// Reads the fence kept at `path`; absent means that no term was ever accepted.
    pub fn open(path: PathBuf) -> io::Result<Fence> {
        let accepted = match fs::read_to_string(&path) {
            Ok(text) => toml::from_str(&text).map_err(|error| {
                io::Error::new(io::ErrorKind::InvalidData, format!("{}: {error}", path.display()))
            })?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Accepted::default(),
            Err(error) => return Err(error),
        };
        Ok(Fence { path, accepted })
    }

    /// The highest accepted term.
    pub fn term(&self) -> LeaseTerm {
        self.accepted.term
    }

    /// Accepts a higher term, or the same term of the same holder; durable before it returns `true`.
    pub fn accept(&mut self, term: LeaseTerm, holder: &str) -> io::Result<bool> {
        if term < self.accepted.term || (term == self.accepted.term && holder != self.accepted.holder) {
            return Ok(false);
        }
        if term > self.accepted.term {
            self.accepted = Accepted { term, holder: holder.to_owned() };
            self.persist()?;
        }
        Ok(true)
    }

    fn persist(&self) -> io::Result<()> {
        if let Some(parent) = self.path.parent() {
            fs::create_dir_all(parent)?;
        }
        let temporary = self.path.with_extension("new");
        let text = toml::to_string(&self.accepted).map_err(io::Error::other)?;
        let mut file = File::create(&temporary)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&temporary, &self.path)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_lower_term_and_a_second_holder_are_refused_even_after_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("fence.toml");
        let mut fence = Fence::open(path.clone()).unwrap();
        assert!(fence.accept(LeaseTerm(3), "a").unwrap());
        assert!(fence.accept(LeaseTerm(3), "a").unwrap());
        assert!(!fence.accept(LeaseTerm(3), "b").unwrap());
        let mut fence = Fence::open(path).unwrap();
        assert_eq!(fence.term(), LeaseTerm(3));
        assert!(!fence.accept(LeaseTerm(2), "a").unwrap());
        assert!(fence.accept(LeaseTerm(4), "b").unwrap());
    }
}
