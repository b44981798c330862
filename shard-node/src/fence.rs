//! The highest lease term this rank has accepted, and whose it was. Survives restarts, so that an old leader is refused.

use ashlar_vocabulary::LeaseTerm;
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// What a rank does when it is asked to obey.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Not: it has accepted a higher term, or this one of another holder.
    Refuse,
    /// It does so already.
    Obey,
    /// It obeys from now on, once that is durable.
    ObeyOnceDurable,
}

/// The rule: a rank that has `accepted` a term of a holder is `asked` by another one, or the same. Pure; the node, the simulation
/// and the protocol's model all run this.
pub fn verdict(accepted: (LeaseTerm, &str), asked: (LeaseTerm, &str)) -> Verdict {
    if asked.0 < accepted.0 || (asked.0 == accepted.0 && asked.1 != accepted.1) {
        return Verdict::Refuse;
    }
    if asked.0 > accepted.0 { Verdict::ObeyOnceDurable } else { Verdict::Obey }
}

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
    ///
    /// # Errors
    /// If it cannot be made durable; then nothing is accepted.
    pub fn accept(&mut self, term: LeaseTerm, holder: &str) -> io::Result<bool> {
        match verdict((self.accepted.term, &self.accepted.holder), (term, holder)) {
            Verdict::Refuse => Ok(false),
            Verdict::Obey => Ok(true),
            Verdict::ObeyOnceDurable => {
                let accepted = Accepted { term, holder: holder.to_owned() };
                persist(&self.path, &accepted)?;
                // Only now: were it believed before, the next attempt would pass, and a restart would forget it.
                self.accepted = accepted;
                Ok(true)
            }
        }
    }
}

fn persist(path: &Path, accepted: &Accepted) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    let temporary = path.with_extension("new");
    let text = toml::to_string(accepted).map_err(io::Error::other)?;
    let mut file = File::create(&temporary)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    // The new name is as durable as the folder that holds it.
    File::open(folder)?.sync_all()
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

    #[test]
    fn a_term_that_cannot_be_made_durable_is_not_accepted_at_the_next_attempt_either() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("fence.toml");
        let mut fence = Fence::open(path.clone()).unwrap();
        assert!(fence.accept(LeaseTerm(3), "a").unwrap());
        // What is written first cannot be: a directory has its name.
        let in_the_way = path.with_extension("new");
        fs::create_dir(&in_the_way).unwrap();
        assert!(fence.accept(LeaseTerm(4), "b").is_err());
        assert!(fence.accept(LeaseTerm(4), "b").is_err());
        assert_eq!(fence.term(), LeaseTerm(3));
        assert_eq!(Fence::open(path).unwrap().term(), LeaseTerm(3));
        fs::remove_dir(&in_the_way).unwrap();
        assert!(fence.accept(LeaseTerm(4), "b").unwrap());
    }
}
